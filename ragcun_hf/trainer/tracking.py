"""Plots for what follows a run (`--report_to`): the terms of the loss, the spread before and after training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class TrackedPlots(TrainerCallback):
    """Draw two plots when training ends and hand them to trackio, TensorBoard or wandb.

    Args:
        sample: Called for features of some training texts, shape (N, H), when they are first needed.
    """

    def __init__(self, sample: Callable[[], Tensor]) -> None:
        self._sample = sample
        self._trackers: list[Any] = []

    def attach(self, trainer: Trainer) -> None:
        """Stand before the trackers' own callbacks, which close their runs when training ends."""
        self._trackers = list(trainer.callback_handler.callbacks)
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw and send."""
        if not state.is_world_process_zero or not args.report_to:
            return
        with TemporaryDirectory() as folder:
            for name, path in self._draw(Path(folder), kwargs["model"], state.log_history).items():
                for tracker in args.report_to:
                    self._send(tracker, name, path, state.global_step)

    def _draw(self, folder: Path, model: Any, log_history: list[dict[str, float]]) -> dict[str, Path]:
        from ..evaluation.plots import plot_isotropy, plot_learning_curves

        plots = {"plots/isotropy": folder / "isotropy.png"}
        features_NH = self._sample().float()
        with torch.no_grad():
            embeddings_ND = model.eval()(features=features_NH.to(model.device)).embeddings.cpu()
        plot_isotropy(features_NH.numpy(), embeddings_ND.numpy(), plots["plots/isotropy"])
        if any("loss" in entry for entry in log_history):
            plots["plots/loss"] = folder / "learning_curves.png"
            plot_learning_curves(log_history, plots["plots/loss"])
        return plots

    def _send(self, tracker: str, name: str, path: Path, step: int) -> None:
        if tracker == "trackio":
            import trackio

            trackio.log({name: trackio.Image(str(path))})
        elif tracker == "wandb":
            import wandb

            wandb.log({name: wandb.Image(str(path))})
        elif tracker == "tensorboard":
            import numpy as np
            from PIL import Image

            writers = [getattr(callback, "tb_writer", None) for callback in self._trackers]
            image = np.asarray(Image.open(path).convert("RGB"))
            for writer in filter(None, writers):
                writer.add_image(name, image, step, dataformats="HWC")
        else:
            logger.info("Plots are not sent to %s: only its curves are.", tracker)
