"""What a training run leaves in its output folder, whole or not at all."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import say
from ..data.documents import text_digest
from ..errors import UserError
from ..files import (
    DOCUMENTS_FILE,
    RECORD_FILE,
    WEIGHT_FILES,
    check_writable,
    disk_errors_explained,
    replaced_folder,
)
from .sharding import under_its_own_class

if TYPE_CHECKING:
    from torch import Tensor

    from .arguments import IsotropicGaussianTrainingArguments
    from .trainer import IsotropicGaussianTrainer

logger = logging.getLogger(__name__)

_ALWAYS_RECORDED = (
    "lambda_contrastive",
    "lambda_isotropy",
    "lambda_predictive",
    "contrastive_kind",
    "isotropy_kind",
    "predictive_kind",
    "temperature",
    "num_train_epochs",
    "per_device_train_batch_size",
    "learning_rate",
    "seed",
)


_NEVER_RECORDED = (
    "output_dir",
    "resume_from_checkpoint",
    "disable_tqdm",
    "use_cpu",
    "hub_token",
    "accelerator_config",
    "dataloader_pin_memory",
)


def report_saved_model(trainer: IsotropicGaussianTrainer) -> None:
    """Say what was written and what to do with it."""
    folder = trainer.args.output_dir
    predictor = " --use_predictor" if trainer.accelerator.unwrap_model(trainer.model).config.use_predictor else ""
    say(f"\nSaved the model, its tokenizer and its training record in {folder}.")
    command = f"python training/eval_beir.py --model_path {shlex.quote(str(folder))}{predictor}"
    say(f"Next: {command} --datasets scifact nfcorpus arguana")


def check_output_folder(training_args: IsotropicGaussianTrainingArguments, *, overwrite: bool) -> None:
    """Refuse to mix two runs in one folder, and turn `--resume_from_checkpoint last` into a path.

    Args:
        training_args: Names the folder and what to resume; its `resume_from_checkpoint` may be changed.
        overwrite: Accept the folder of an earlier run instead of refusing; nothing is removed yet.

    Raises:
        UserError: If the folder holds another run's model or checkpoints, cannot be written, or there is nothing
            to resume.
    """
    folder = Path(str(training_args.output_dir))
    check_writable(folder)
    checkpoints = [checkpoint for checkpoint in _checkpoints(folder) if _is_whole(checkpoint)]
    if training_args.resume_from_checkpoint:
        if training_args.resume_from_checkpoint == "last":
            if not checkpoints:
                raise UserError(
                    f"--resume_from_checkpoint last expects a whole checkpoint in {folder}, found none: leave the "
                    "flag out"
                )
            training_args.resume_from_checkpoint = str(checkpoints[-1])
        checkpoint = Path(training_args.resume_from_checkpoint)
        if not _is_whole(checkpoint):
            raise UserError(
                f"--resume_from_checkpoint expects a checkpoint folder or the word last, got {checkpoint}, which is "
                "not one whole checkpoint: name another, or leave the flag out"
            )
        if checkpoint.resolve().parent == folder.resolve():
            return
    is_used = bool(checkpoints) or (folder / "model.safetensors").exists()
    if not is_used:
        return
    if not overwrite:
        raise UserError(
            f"{folder} holds an earlier run: name another --output_dir, continue it with "
            "--resume_from_checkpoint last, or replace it with --overwrite"
        )


def check_same_model(config: Any, checkpoint: Path) -> None:
    """Refuse to resume a run with a model that its checkpoint does not describe.

    Args:
        config: Of the model that the flags describe.
        checkpoint: What is to be resumed.

    Raises:
        UserError: On the first field that differs.
    """
    stored = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    current = json.loads(config.to_json_string(use_diff=False))
    for name in type(config).__annotations__:
        # The encoder is compared by its weights' shapes when they are loaded; a newer field has its default.
        if name != "encoder_config" and name in stored and stored[name] != current[name]:
            raise UserError(
                f"--resume_from_checkpoint expects the model flags of the first run, got {name} {current[name]!r} "
                f"where {checkpoint} has {stored[name]!r}: give the same flags, or start a new run"
            )


def _checkpoints(folder: Path) -> list[Path]:
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path in steps if steps[path].isdigit()), key=lambda path: int(steps[path]))


def _is_whole(checkpoint: Path) -> bool:
    # The Trainer writes this file last.
    return (checkpoint / "trainer_state.json").is_file()


def remove_checkpoints(folder: Path) -> None:
    """Remove what an earlier run left to resume from, once the new run is sure to begin."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)


def recorded_arguments(training_args: IsotropicGaussianTrainingArguments) -> dict[str, Any]:
    """List what matters in every run, and what differs from the defaults; paths of this machine stay out."""
    # Not read from a second instance: making one resets what accelerate knows of the other processes.
    defaults = {field.name: field.default for field in fields(training_args)}
    return {
        key: value
        for key, value in training_args.to_dict().items()
        if key in _ALWAYS_RECORDED or (key not in _NEVER_RECORDED and _is_changed(value, defaults.get(key)))
    }


def _is_changed(value: Any, default: Any) -> bool:
    # The arguments put an empty value of their own in the place of other ones.
    empty: tuple[Any, ...] = (None, False, "", "none", [])
    return value != default and not (value in empty and (default in empty or default is MISSING))


def save_run(
    trainer: IsotropicGaussianTrainer, facts: dict[str, Any], train_views: Any, weights: dict[str, Tensor] | None
) -> None:
    """Replace the model in the output folder, its record beside it, as a whole.

    Args:
        trainer: After training.
        facts: What the record says, beside the Trainer's log.
        train_views: What was trained on.
        weights: As from `sharding.whole_weights`.
    """
    folder = Path(str(trainer.args.output_dir))
    with disk_errors_explained(folder), replaced_folder(folder, obsolete=WEIGHT_FILES) as new:
        model = trainer.accelerator.unwrap_model(trainer.model)
        with under_its_own_class(trainer.accelerator, model):
            model.save_pretrained(new, state_dict=weights)
        record = {**facts, "log_history": trainer.state.log_history}
        (new / RECORD_FILE).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
        digests = sorted({text_digest(text).hex() for text in _document_texts(train_views)})
        (new / DOCUMENTS_FILE).write_text("\n".join(digests) + "\n", encoding="utf-8")


def _document_texts(views: Any) -> Sequence[str]:
    # Views of documents show parts of them; what was trained on is the whole.
    if hasattr(views, "documents"):
        return views.documents
    # Streams are not walked through a second time for this list.
    if not hasattr(views, "__len__"):
        return []
    # A document seen as a negative is a document seen.
    return [*views["positive"], *(text for texts in views["negative"] for text in texts)]


@contextmanager
def measured_energy(is_wanted: bool) -> Iterator[dict[str, Any]]:
    """Estimate the energy of what runs inside, on this machine, without asking the network for anything.

    Where processor or accelerator have no meter that may be read, `codecarbon` goes by their load and rated power.

    Args:
        is_wanted: False measures nothing.

    Yields:
        dict[str, Any]: Holds `kwh` and `by` once the work is over; stays empty where nothing was measured.

    Raises:
        UserError: If `codecarbon` is wanted and not installed.
    """
    found: dict[str, Any] = {}
    if not is_wanted:
        yield found
        return
    try:
        import codecarbon
    except ImportError as error:
        raise UserError("--measure_energy expects codecarbon: run pip install 'ragcun_hf[energy]'") from error
    # The country matters for carbon dioxide only, which is not asked for here.
    tracker = codecarbon.OfflineEmissionsTracker(
        country_iso_code="USA",
        measure_power_secs=5,
        save_to_file=False,
        allow_multiple_runs=True,
        log_level="critical",
    )
    tracker.start()
    try:
        yield found
    finally:
        tracker.stop()
    energy = tracker.final_emissions_data.energy_consumed
    found |= {"kwh": float(f"{energy:.3g}"), "by": f"codecarbon {codecarbon.__version__}"}
