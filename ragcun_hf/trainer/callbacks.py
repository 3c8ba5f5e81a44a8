"""Callbacks of the Trainer: epochs, what a resumed run goes on with, log lines, progress and plots."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import GradientState
from torch import Tensor
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import UserError

if TYPE_CHECKING:
    from ..data.stream import ShuffledStream
    from .record import Checkpoint

logger = logging.getLogger(__name__)


class EpochCallback(TrainerCallback):
    """Tells a dataset with `set_epoch` which epoch begins, which accelerate omits in parallel and in resumed runs."""

    def __init__(self, dataset: Any, *, is_stream: bool) -> None:
        self._dataset, self._is_stream = dataset, is_stream
        self._epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the epoch of a resumed run; the Trainer always starts a stream, whose length it lacks, at 0."""
        self._epoch = 0 if self._is_stream else int(state.epoch or 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the epoch on. It is counted here: for a stream, the epoch of the state is a share of the steps."""
        self._dataset.set_epoch(self._epoch)
        self._epoch += 1


class RestoredSums(TrainerCallback):
    """Calls a function when the Trainer has set its sums to 0, which is after it has read a checkpoint."""

    def __init__(self, restore: Callable[[], None]) -> None:
        self._restore = restore

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Call it."""
        self._restore()


def early_stopping(patience: int, checkpoint: Checkpoint | None) -> EarlyStoppingCallback:
    """Make the callback; in a resumed run it continues the count of the checkpoint."""
    callback = EarlyStoppingCallback(patience)
    if checkpoint is not None:
        callback.early_stopping_patience_counter = checkpoint.bad_evaluations
    return callback


class StreamPosition(TrainerCallback, ExportableState):
    """Stores the position in a stream in every checkpoint, and continues at that of the checkpoint to resume from.

    It ends a pass when fewer rows are left than a step needs: accelerate would fill up a smaller last batch with other
    rows, and the Trainer would leave its gradient out of the step.
    """

    def __init__(self, trainer: Trainer, stream: ShuffledStream, checkpoint: Checkpoint | None) -> None:
        args, self._stream = trainer.args, stream
        self._rows_per_batch = args.train_batch_size * args.world_size
        self._num_batches = 0
        self._restore_random_state: Callable[[], None] | None = None
        stream.rows_at_once = self._rows_per_batch * args.gradient_accumulation_steps
        if checkpoint is not None:
            position = checkpoint.callbacks[StreamPosition.__name__]
            is_shown = not args.disable_tqdm and args.process_index == 0
            stream.start_at(position["number_of_pass"], position["num_rows"], show_progress=is_shown)
            # transformers has no public function that restores the random state of a checkpoint.
            self._restore_random_state = partial(trainer._load_rng_state, checkpoint.path)  # noqa: SLF001

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """In the middle of a pass, restore the random state again: opening the loader has drawn from it once."""
        if self._restore_random_state is not None and self._stream.num_skipped:
            self._restore_random_state()
        self._restore_random_state = None

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Begin to count a pass."""
        self._num_batches = 0

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Count a batch that is not the last of its step."""
        self._num_batches += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the last batch of a step, and correct the epoch, which the Trainer counts from the resume."""
        self._num_batches += 1
        share = self._num_rows / self._rows_per_batch / (state.max_steps * args.gradient_accumulation_steps)
        state.epoch = self._stream.number_of_pass + share

    @property
    def _num_rows(self) -> int:
        return self._stream.num_skipped + self._num_batches * self._rows_per_batch

    def state(self) -> dict[str, Any]:
        """Return the position in the form that the Trainer writes."""
        position = {"number_of_pass": self._stream.number_of_pass, "num_rows": self._num_rows}
        return {"args": {}, "attributes": {**position, **self._stream.stream_order}}


def check_stream_position(checkpoint: Checkpoint, order: Mapping[str, int] | None) -> None:
    """Raise a UserError if the run of a checkpoint read other rows than those with this `stream_order`."""
    stored = checkpoint.callbacks.get(StreamPosition.__name__)
    if order is None or stored is None:
        if order is stored:
            return
        which, what_to_do = ("without", "add --streaming") if order is None else ("with", "leave --streaming out")
        raise UserError(f"expected a checkpoint of a run {which} --streaming, got {checkpoint.path}: {what_to_do}")
    for name, value in order.items():
        if stored[name] != value:
            raise UserError(
                f"expected --{name} {stored[name]} as in the run of {checkpoint.path}, got {value}: rows would come "
                "in another order"
            )


_LABELS = {
    "loss": "loss",
    "loss/contrastive": "contrastive",
    "loss/isotropy": "isotropy",
    "loss/predictive": "predictive",
    "embedding_std": "std",
    "effective_rank": "rank",
    "sigreg": "sigreg",
    "eval_loss": "eval loss",
    "eval_ndcg@10": "eval NDCG@10",
    "eval_ndcg@10_predictor": "by predictor",
    "train_runtime": "training seconds",
}


class LogTimes(TrainerCallback):
    """Asks for log lines at other times than transformers does.

    A run with fewer steps than lie between two log lines has about ten, so that it has a curve. The line of an epoch
    comes at the end of its last step, before a checkpoint of that step is saved: a resumed run would lack it.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log line."""
        if args.logging_strategy == "steps":
            is_due = state.max_steps < state.logging_steps and state.global_step % -(-state.max_steps // 10) == 0
        else:
            is_last = GradientState().end_of_dataloader or state.global_step >= state.max_steps
            is_due = args.logging_strategy == "epoch" and is_last
        if is_due:
            control.should_log = True


class TermsProgressCallback(ProgressCallback):
    """Show loss terms and collapse measures above the progress bar; the training record holds the whole log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line above the bar."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        parts = [f"{label} {logs[key]:.4g}" for key, label in _LABELS.items() if key in logs]
        if parts:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts))


class TrackedPlots(TrainerCallback):
    """Sends two plots to the trackers of `--report_to` when training ends; `sample` returns features (N, H + L)."""

    def __init__(self, sample: Callable[[], Tensor]) -> None:
        self._sample = sample
        self._trackers: list[Any] = []

    def attach(self, trainer: Trainer) -> None:
        """Add this callback before those of the trackers, which close their runs when training ends."""
        self._trackers = list(trainer.callback_handler.callbacks)
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the loss terms, and the spread of embeddings before and after training."""
        if not state.is_world_process_zero or not args.report_to:
            return
        from ..evaluation.plots import plot_isotropy, plot_learning_curves

        features_NH = self._sample().float()
        with torch.no_grad():
            embeddings_ND = kwargs["model"].eval()(features=features_NH.to(kwargs["model"].device)).embeddings.cpu()
        with TemporaryDirectory() as folder:
            plots = {"plots/isotropy": Path(folder, "isotropy.png")}
            plot_isotropy(features_NH.numpy(), embeddings_ND.numpy(), plots["plots/isotropy"])
            if any("loss" in entry for entry in state.log_history):
                plots["plots/loss"] = Path(folder, "learning_curves.png")
                plot_learning_curves(state.log_history, plots["plots/loss"])
            for name, path in plots.items():
                for tracker in args.report_to:
                    self._send(tracker, name, path, state.global_step)

    def _send(self, tracker: str, name: str, path: Path, step: int) -> None:
        if tracker in ("trackio", "wandb"):
            module = importlib.import_module(tracker)
            module.log({name: module.Image(str(path))})
        elif tracker == "tensorboard":
            import numpy as np
            from PIL import Image

            writers = [getattr(callback, "tb_writer", None) for callback in self._trackers]
            image = np.asarray(Image.open(path).convert("RGB"))
            for writer in filter(None, writers):
                writer.add_image(name, image, step, dataformats="HWC")
        else:
            logger.info("Plots are not sent to %s, which gets the curves only.", tracker)
