"""Early stopping that a resumed run goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import EarlyStoppingCallback, TrainerState

if TYPE_CHECKING:
    from .training_arguments import IsotropicGaussianTrainingArguments


def early_stopping(args: IsotropicGaussianTrainingArguments) -> list[EarlyStoppingCallback]:
    """Make the callback, with the patience that is left to a resumed run.

    Args:
        args: May ask for early stopping, and name a checkpoint.

    Returns:
        The callback, or nothing where none is asked for.
    """
    if args.early_stopping_patience is None:
        return []
    callback = EarlyStoppingCallback(args.early_stopping_patience)
    if args.resume_from_checkpoint:
        state = TrainerState.load_from_json(str(Path(args.resume_from_checkpoint) / "trainer_state.json"))
        stored = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, callback.state())
        callback.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]
    return [callback]
