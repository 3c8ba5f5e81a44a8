"""Where a run ends, also one that is resumed: early stopping goes on to count, and nothing is trained past the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .arguments import IsotropicGaussianTrainingArguments

if TYPE_CHECKING:
    from transformers import TrainerControl

logger = logging.getLogger(__name__)


def ending_callbacks(args: IsotropicGaussianTrainingArguments) -> list[TrainerCallback]:
    """Make the callbacks that end a run.

    Args:
        args: May ask for early stopping, and name a checkpoint.

    Returns:
        Early stopping, where it is asked for, with the patience that is left to a resumed run; and the end of a run
        that is resumed after its last step.
    """
    patience = args.early_stopping_patience
    stopping = [] if patience is None else [_early_stopping(patience, args.resume_from_checkpoint)]
    return [*stopping, _NothingLeft(stopping)]


def _early_stopping(patience: int, checkpoint: str | None) -> EarlyStoppingCallback:
    callback = EarlyStoppingCallback(patience)
    if checkpoint:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        stored = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, callback.state())
        callback.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]
    return callback


class _NothingLeft(TrainerCallback):
    """Stop before the first step where the checkpoint is that of the last one; the trainer heeds it."""

    def __init__(self, stopping: list[EarlyStoppingCallback]) -> None:
        self._stopping = stopping

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        stopping = self._stopping
        has_stopped = any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in stopping)
        if has_stopped or state.global_step >= state.max_steps:
            logger.warning("%s is of the last step: nothing is left to train.", args.resume_from_checkpoint)
            control.should_training_stop = True


class _NewEpoch(TrainerCallback):
    """Tell training data and sampler which epoch begins, so that views and draws are made anew.

    accelerate's loaders tell it too, but neither with several processes nor in the epoch of a resume.
    """

    def __init__(self, data: Any, sampler: Any) -> None:
        self._listeners = [each for each in (data, sampler) if hasattr(each, "set_epoch")]
        self._is_stream = not hasattr(data, "__len__")
        self._epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Of a stream the Trainer knows no length: it begins with epoch 0 after a resume, too.
        self._epoch = 0 if self._is_stream else int(state.epoch or 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Counted here, because the state's epoch of a stream is a share of the steps.
        for each in self._listeners:
            each.set_epoch(self._epoch)
        self._epoch += 1


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


class TermsProgressCallback(ProgressCallback):
    """Show the terms and collapse measures of each log; the whole of it stays in the training record."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line above the bar."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        parts = [f"{label} {logs[key]:.4g}" for key, label in _LABELS.items() if key in logs]
        if parts:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts))
