"""Where a run stands in a stream, kept in each checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer

    from ..data.stream import ShuffledStream


class StreamPosition(TrainerCallback, ExportableState):
    """Count the rows that were trained on; the Trainer writes them to `trainer_state.json`.

    Args:
        stream: What is trained on.
        rows_per_batch: Of all processes together.
        resume_draws: Called before the first step of a run that goes on in the midst of a pass: the Trainer takes up
            the draws of a checkpoint before it opens its loader, which draws once itself.
    """

    def __init__(self, stream: ShuffledStream, rows_per_batch: int, resume_draws: Callable[[], None] | None) -> None:
        self._stream, self._rows_per_batch = stream, rows_per_batch
        self._resume_draws = resume_draws
        self._num_batches = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Take up the draws of the run that is resumed, once."""
        if self._resume_draws is not None and self._stream.num_skipped:
            self._resume_draws()
        self._resume_draws = None

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Begin to count a pass."""
        self._num_batches = 0

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Count a batch that is not the last of its step."""
        self._num_batches += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count the last batch of a step."""
        self._num_batches += 1

    def state(self) -> dict[str, Any]:
        """Say where the run stands, in the form that the Trainer writes."""
        attributes = {
            "number_of_pass": self._stream.number_of_pass,
            "num_rows": self._stream.num_skipped + self._num_batches * self._rows_per_batch,
        }
        return {"args": {}, "attributes": {**attributes, **_order(self._stream)}}


def follow_stream(trainer: Trainer, stream: ShuffledStream) -> None:
    """Keep the position in a stream in every checkpoint, and go on from that of the one that is resumed.

    A pass ends where fewer rows are left than a step takes: of a smaller last batch, accelerate would fill up the
    processes with other rows, and the Trainer would not count its gradient with those of its step.

    Args:
        trainer: Its arguments may name a checkpoint to resume; it is told to leave skipping rows to the stream.
        stream: What is trained on.

    Raises:
        UserError: If the checkpoint is of no stream, or of one in another order.
    """
    args, resume_draws = trainer.args, None
    rows_per_batch = args.train_batch_size * args.world_size
    args.dataloader_drop_last = True
    stream.rows_at_once = rows_per_batch * args.gradient_accumulation_steps
    if args.resume_from_checkpoint:
        position = _position(args.resume_from_checkpoint, stream)
        stream.start_at(
            position["number_of_pass"],
            position["num_rows"],
            show_progress=not args.disable_tqdm and args.process_index == 0,
        )
        args.ignore_data_skip = True
        resume_draws = partial(trainer._load_rng_state, args.resume_from_checkpoint)  # noqa: SLF001 (no public way)
    trainer.add_callback(StreamPosition(stream, rows_per_batch, resume_draws))


def refuse_streamed_checkpoint(checkpoint: str | None) -> None:
    """Refuse to go on with rows that are all known where a stream was trained on.

    Args:
        checkpoint: What is resumed, if anything.

    Raises:
        UserError: If it is of a stream.
    """
    if checkpoint and _read_position(checkpoint) is not None:
        raise UserError(f"expected a checkpoint of a run without --streaming, got {checkpoint}: add --streaming")


def _read_position(checkpoint: str) -> dict[str, int] | None:
    """Read where the checkpoint's run stood; None where it was of no stream."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    stored = state.stateful_callbacks.get(StreamPosition.__name__)
    return None if stored is None else stored["attributes"]


def _position(checkpoint: str, stream: ShuffledStream) -> dict[str, int]:
    position = _read_position(checkpoint)
    if position is None:
        raise UserError(f"expected a checkpoint of a run with --streaming, got {checkpoint}: leave --streaming out")
    for name, value in _order(stream).items():
        if position[name] != value:
            raise UserError(
                f"expected --{name} {position[name]} as in the run of {checkpoint}, got {value}: rows would come in "
                "another order"
            )
    return position


def _order(stream: ShuffledStream) -> dict[str, int]:
    return {"shuffle_buffer_size": stream.buffer_size, "seed": stream.seed}
