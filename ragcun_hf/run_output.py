"""What a training run leaves in its output folder, whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_line import say
from .data.documents import text_digest
from .errors import UserError
from .training_record import DOCUMENTS_FILE, RECORD_FILE

if TYPE_CHECKING:
    from .trainer import IsotropicGaussianTrainer
    from .training_arguments import IsotropicGaussianTrainingArguments

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


def source_name(source: str) -> str:
    """Name a data source by its last two parts, without the folders of this machine; a Hub id stays whole."""
    path = Path(source)
    return "/".join(path.absolute().parts[-2:]) if path.exists() else source


def report_saved_model(trainer: IsotropicGaussianTrainer) -> None:
    """Say what was written and what to do with it."""
    if not trainer.is_world_process_zero():
        return
    folder = trainer.args.output_dir
    predictor = " --use_predictor" if trainer.accelerator.unwrap_model(trainer.model).config.use_predictor else ""
    say(f"\nSaved the model, its tokenizer and its training record in {folder}.")
    say(f"Next: python training/eval_beir.py --model_path {folder}{predictor} --datasets scifact nfcorpus arguana")


def check_output_folder(training_args: IsotropicGaussianTrainingArguments, *, overwrite: bool) -> None:
    """Refuse to mix two runs in one folder, and turn `--resume_from_checkpoint last` into a path.

    Args:
        training_args: Names the folder and what to resume; its `resume_from_checkpoint` may be changed.
        overwrite: Remove the checkpoints of an earlier run instead of refusing.

    Raises:
        UserError: If the folder holds another run's model or checkpoints, or there is nothing to resume.
    """
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(str(training_args.output_dir))
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if training_args.resume_from_checkpoint:
        if training_args.resume_from_checkpoint == "last":
            training_args.resume_from_checkpoint = last
        if not training_args.resume_from_checkpoint or not Path(training_args.resume_from_checkpoint).is_dir():
            raise UserError(
                f"--resume_from_checkpoint expects a checkpoint folder, found none in {folder}: start anew"
            )
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir expects a folder, got the file {folder}: name another")
    is_used = last is not None or (folder / "model.safetensors").exists()
    if not is_used:
        return
    if not overwrite:
        raise UserError(
            f"{folder} holds an earlier run: name another --output_dir, continue it with "
            "--resume_from_checkpoint last, or replace it with --overwrite"
        )
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def recorded_arguments(training_args: IsotropicGaussianTrainingArguments) -> dict[str, Any]:
    """List what matters in every run, and what differs from the defaults; paths of this machine stay out."""
    current = training_args.to_dict()
    defaults = type(training_args)(output_dir=training_args.output_dir).to_dict()
    machine_dependent = ("output_dir", "resume_from_checkpoint", "disable_tqdm")
    return {
        key: value
        for key, value in current.items()
        if key in _ALWAYS_RECORDED or (value != defaults.get(key) and key not in machine_dependent)
    }


def save_run(trainer: IsotropicGaussianTrainer, facts: dict[str, Any], train_views: Any) -> None:
    """Write the model and its record beside the output folder's final place, then move file by file."""
    folder = Path(str(trainer.args.output_dir))
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(unfinished)
        record = {**facts, "log_history": trainer.state.log_history}
        (unfinished / RECORD_FILE).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
        digests = sorted({text_digest(text).hex() for text in _document_texts(train_views)})
        (unfinished / DOCUMENTS_FILE).write_text("\n".join(digests) + "\n", encoding="utf-8")
        for path in sorted(unfinished.iterdir()):
            path.replace(folder / path.name)
    except OSError as error:
        raise UserError(
            f"expected room for the model in {folder}, got {error}: free some space and run again"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _document_texts(views: Any) -> list[str]:
    # Streams are not walked through a second time for this list.
    return [views[index]["positive"] for index in range(len(views))] if hasattr(views, "__len__") else []
