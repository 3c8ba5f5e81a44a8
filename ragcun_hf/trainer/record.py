"""The output folder of a run: checkpoints to resume from, the saved model, and its training record."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..command_line import argument_facts, say
from ..data.documents import text_digest
from ..data.rows import warn_once
from ..errors import UserError
from ..evaluation.calibration import fit_calibration
from ..evaluation.results import MAIN_METRIC, remark_on_few_documents
from ..files import (
    CHECKSUMS_FILE,
    DOCUMENTS_FILE,
    HELD_OUT_FILE,
    RECORD_FILE,
    WEIGHT_FILES,
    check_writable,
    damaged_file,
    disk_errors_explained,
    model_digests,
    replaced_folder,
)
from ..objective.head_weights import blend_weights, trainable_weights
from .sharding import save_whole, whole_tensor

if TYPE_CHECKING:
    from ..evaluation.validation import RetrievalValidation
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from ..objective.arguments import IsotropicGaussianTrainingArguments
    from .loss_trainer import LossTrainer
    from .trainer import IsotropicGaussianTrainer

logger = logging.getLogger(__name__)

RUNNING_SUMS_FILE = "running_sums.json"  # in a checkpoint: a list, with the sums of each process
_STEP = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to resume from."""

    path: str
    step: int = 0
    callbacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # class name -> stored attributes

    @property
    def bad_evaluations(self) -> int:
        """Evaluations in a row without a better figure, as early stopping counts them."""
        return self.callbacks.get("EarlyStoppingCallback", {}).get("early_stopping_patience_counter", 0)

    def running_sums(self, rank: int, num_processes: int) -> dict[str, float]:
        """Return what a process had summed up for the next log line; each of another number gets the mean of all."""
        saved = json.loads((Path(self.path) / RUNNING_SUMS_FILE).read_text(encoding="utf-8"))
        if len(saved) == num_processes:
            return dict(saved[rank])
        return {name: sum(each[name] for each in saved) / len(saved) for name in saved[0]}

    def is_at_end(self, max_steps: int, patience: int | None) -> bool:
        """Return whether the run had no step left, or was stopped early."""
        return self.step >= max_steps or (patience is not None and self.bad_evaluations >= patience)


def check_output_folder(training: IsotropicGaussianTrainingArguments, *, overwrite: bool) -> None:
    """Raise a UserError if the output folder is not writable, or holds another run and may not be overwritten."""
    check_writable(str(training.output_dir))
    folder, wanted = Path(str(training.output_dir)), training.resume_from_checkpoint
    checkpoint = open_checkpoint(folder, wanted)
    has_weights = any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    is_used = has_weights or any(_is_whole(each) for each in _checkpoints(folder))
    is_own = checkpoint is not None and Path(checkpoint.path).resolve().parent == folder.resolve()
    if is_used and not is_own and not overwrite:
        raise UserError(
            f"{folder} holds an earlier run: name another --output_dir, continue it with "
            "--resume_from_checkpoint last, or replace it with --overwrite"
        )


def open_checkpoint(folder: Path, wanted: str | None) -> Checkpoint | None:
    """Open the checkpoint to resume from: a folder, or `last` for the last whole one in the output folder."""
    if not wanted:
        return None
    path = _last_whole(folder) if wanted == "last" else Path(wanted)
    if not path.is_dir():
        raise UserError(
            f"--resume_from_checkpoint expects a checkpoint folder or the word last, got {path}, which is not one "
            "whole checkpoint: name another, or leave the flag out"
        )
    if fault := _fault(path):
        raise UserError(
            f"--resume_from_checkpoint expects a whole checkpoint, got {path} {fault}: name another, or leave the "
            "flag out"
        )
    try:
        state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
        callbacks = {
            name: each["attributes"] for name, each in state.stateful_callbacks.items() if "attributes" in each
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--resume_from_checkpoint expects a checkpoint of the Trainer, got {path} with another "
            f"{TRAINER_STATE_NAME} ({error}): name another, or leave the flag out"
        ) from error
    return Checkpoint(str(path), state.global_step, callbacks)


def _last_whole(folder: Path) -> Path:
    """Return the last whole checkpoint in the output folder, and say which later ones are not whole."""
    faults: list[str] = []
    for checkpoint in reversed(_checkpoints(folder)):
        fault = _fault(checkpoint)
        if fault is None:
            if faults:
                warn_once(f"{'; '.join(faults)}; the run goes on from {checkpoint}.")
            return checkpoint
        faults.append(f"{checkpoint} {fault}")
    found = f"{len(faults)}, none whole ({faults[0]})" if faults else "none"
    raise UserError(
        f"--resume_from_checkpoint last expects a whole checkpoint in {folder}, found {found}: leave the flag out"
    )


def _checkpoints(folder: Path) -> list[Path]:
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path in steps if _STEP.fullmatch(steps[path])), key=lambda path: int(steps[path]))


# Without one of these parts, a run would go on in silence to other weights, or with another log.
_PARTS = {
    "the weights": ("*.safetensors", "pytorch_model_fsdp*"),
    "the state of the optimizer": ("optimizer*",),
    "the state of the schedule": ("scheduler.pt",),
    "the random state": ("rng_state*.pth",),
    "the settings of the model": ("config.json",),
    "the sums for the log": (RUNNING_SUMS_FILE,),
    "the state of the Trainer": (TRAINER_STATE_NAME,),
}


def _fault(checkpoint: Path) -> str | None:
    """Return why a run cannot go on from a checkpoint; None if it can."""
    for part, patterns in _PARTS.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"lacks {part} ({patterns[0]})"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    states = [(found.st_size, found.st_mtime_ns) for found in map(Path.stat, files)]
    damaged = _damaged_file(checkpoint, tuple(zip(files, states, strict=True)))
    if damaged == CHECKSUMS_FILE:
        return f"is unfinished, or of an earlier version (no valid {CHECKSUMS_FILE})"
    return None if damaged is None else f"is damaged ({damaged})"


@lru_cache(maxsize=16)
def _damaged_file(checkpoint: Path, states: tuple[Any, ...]) -> str | None:
    """Compare the checksums of a checkpoint once for each state of its files: several parts of a run ask."""
    return damaged_file(checkpoint)


def _is_whole(checkpoint: Path) -> bool:
    # The Trainer writes this file after all others of its own.
    return (checkpoint / TRAINER_STATE_NAME).is_file()


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of an earlier run; called once the new run is sure to begin."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)


def check_model_flags(config: Any, checkpoint: Path) -> None:
    """Refuse to resume with other model flags; the UserError names the first field that differs."""
    stored = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    current = json.loads(config.to_json_string(use_diff=False))
    for name in type(config).__annotations__:
        # The encoder is compared by the shapes of its weights when they are loaded; a newer field has its default.
        if name != "encoder_config" and name in stored and stored[name] != current[name]:
            raise UserError(
                f"--resume_from_checkpoint expects the model flags of the first run, got {name} {current[name]!r} "
                f"where {checkpoint} has {stored[name]!r}: give the same flags, or start a new run"
            )


def check_and_blend(
    trainer: LossTrainer, start: Mapping[str, Tensor], blend: float, validation: RetrievalValidation | None
) -> dict[str, float]:
    """Check the trained weights, blend them with those of the start, and warn if validation got worse.

    Returns the validation NDCG@10 of the frozen `base`, the `start` and the `saved` model, if they were measured.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_finite(model)
    if blend < 1:
        model.load_state_dict(blend_weights(start, trainable_weights(model), blend), strict=False)
    if validation is None:
        return {}
    key = f"eval_{MAIN_METRIC}"
    measured = [entry[key] for entry in trainer.state.log_history if key in entry and entry["step"] == 0]
    found = {"base": validation.base_figures(model).get(MAIN_METRIC), "start": measured[0] if measured else None}
    figures = {name: value for name, value in found.items() if value is not None}
    # The saved weights need not be those of the last or the best evaluation, and another evaluation by the Trainer may
    # cast the model for good.
    figures["saved"] = validation(model)[MAIN_METRIC]
    names = {"base": "frozen base", "start": "start of the head", "saved": "saved model"}
    shown = ", ".join(f"{names[name]} {value:.4f}" for name, value in figures.items())
    say(f"Validation NDCG@10, searching {validation.num_documents:,} documents: {shown}.")
    if remark := remark_on_few_documents(validation.num_documents, "--val_corpus (in Python: corpus=)"):
        say(remark)
    best_before = max(figures.get("start", 0.0), figures.get("base", 0.0))
    if figures["saved"] < best_before:
        logger.warning(
            "Validation NDCG@10 was %.4f before training and is %.4f after it: on these data the untrained start is "
            "the better choice. Try fewer epochs, a lower learning rate, a smaller --blend, or other pairs.",
            *(best_before, figures["saved"]),
        )
    return figures


def calibrate(model: IsotropicGaussianModel, validation: RetrievalValidation | None) -> None:
    """Keep in the model's configuration how probable it is that a first document is relevant.

    It is fitted to held-out queries, if there are enough of them. All processes must call this.
    """
    model.config.relevance_calibration = None
    if validation is not None:
        scores, labels = validation.first_two(model)
        found = fit_calibration(scores, labels, num_documents=validation.num_documents)
        model.config.relevance_calibration = found
        if found is not None:
            say(f"model.relevance_probability is fitted to {len(labels):,} held-out queries.")


def check_finite(model: nn.Module) -> None:
    """Raise a UserError that names a trained weight with NaN or infinity; all processes must call this."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    broken = [name for name, parameter in trained.items() if not whole_tensor(parameter.detach()).isfinite().all()]
    if broken:
        raise UserError(
            f"expected finite weights after training, got NaN or infinity in {broken[0]}: nothing was saved, lower "
            "--learning_rate"
        )


def recorded_arguments(training: IsotropicGaussianTrainingArguments) -> dict[str, Any]:
    """Return the arguments that the record always holds, and those that differ from their defaults."""
    recorded, essential = (argument_facts(type(training), fact) for fact in ("recorded", "essential"))
    # The defaults do not come from a second instance: to create one resets what accelerate knows of the processes.
    defaults = {each.name: each.default for each in fields(training)}
    empty: tuple[Any, ...] = (None, False, "", "none", [])  # the parent replaces some empty values by others

    def is_recorded(name: str, value: Any) -> bool:
        default = defaults.get(name)
        is_changed = value != default and not (value in empty and (default in empty or default is MISSING))
        return name in essential or {"always": True, "never": False}.get(recorded.get(name, ""), is_changed)

    return {name: value for name, value in training.to_dict().items() if is_recorded(name, value)}


def essential_arguments(training: IsotropicGaussianTrainingArguments) -> list[str]:
    """Name the arguments that a reader of the record looks for first, in order."""
    places = argument_facts(type(training), "essential")
    return sorted(places, key=places.__getitem__)


def save_run(
    trainer: IsotropicGaussianTrainer, folder: Path, facts: dict[str, Any], weights: dict[str, Tensor] | None
) -> None:
    """Replace the model and the training record (`facts` and the Trainer's log) in a folder, all at once.

    The digests of the documents that were seen are saved too, and the pairs that were held out, if they are the same
    in every epoch. `weights` come from `sharding.whole_weights`.
    """
    held_out = trainer.data.validation
    with disk_errors_explained(folder), replaced_folder(folder, obsolete=(*WEIGHT_FILES, HELD_OUT_FILE)) as new:
        save_whole(trainer.accelerator.unwrap_model(trainer.model), new, weights)
        record = {**facts, "checksums": model_digests(new), "log_history": trainer.state.log_history}
        (new / RECORD_FILE).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
        seen = (*trainer.data.train.documents, *trainer.data.documents)
        digests = sorted({text_digest(text).hex() for text in seen})
        if held_out is not None and held_out.known_pairs() is not None:
            lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in held_out)
            (new / HELD_OUT_FILE).write_text(lines, encoding="utf-8")
        (new / DOCUMENTS_FILE).write_text("\n".join(digests) + "\n", encoding="utf-8")


@contextmanager
def measured_energy(is_wanted: bool) -> Iterator[dict[str, Any]]:
    """Estimate the energy of the code inside with codecarbon, on this machine and without the network.

    Where no meter can be read, codecarbon estimates from load and rated power. If `is_wanted`, the yielded dict holds
    `kwh` and `by` at the end.
    """
    found: dict[str, Any] = {}
    if not is_wanted:
        yield found
        return
    try:
        import codecarbon
    except ImportError as error:
        raise UserError("--measure_energy expects codecarbon: run pip install codecarbon") from error
    # The country matters only for carbon dioxide, which is not used here.
    tracker = codecarbon.OfflineEmissionsTracker(
        country_iso_code="USA",
        measure_power_secs=5,
        save_to_file=False,
        allow_multiple_runs=True,
        log_level="critical",
    )
    with tracker:
        yield found
    energy = tracker.final_emissions_data.energy_consumed
    found |= {"kwh": float(f"{energy:.3g}"), "by": f"codecarbon {codecarbon.__version__}"}
