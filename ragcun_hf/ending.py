"""Where a run ends, also one that is resumed: early stopping goes on to count, and nothing is trained past the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

if TYPE_CHECKING:
    from transformers import TrainerControl

    from .training_arguments import IsotropicGaussianTrainingArguments

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
