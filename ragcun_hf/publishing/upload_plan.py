"""What of a model folder goes to the Hub, and the checks before it does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .card_check import check_card_against
from .card_sources import read_manifest, read_sources
from .model_card import read_json_object

_CARD = "README.md"
_NEEDED = {
    "config.json": "its configuration",
    "modeling_isotropic_gaussian.py": "its code",
    "tokenizer_config.json": "its tokenizer",
    _CARD: "its card",
}
_LEFT_OUT = (
    (re.compile(r"(.*/)?(checkpoint-\d+|runs|__pycache__|\.unfinished)/.*"), "of the run, not of the model"),
    (re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib)"), "a pickle, which can run code when it is loaded"),
    (re.compile(r".*\.(trec|tmp|pyc|log|lock)"), "of the run, not of the model"),
)
_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class UploadPlan:
    """What would be sent, and what would not."""

    files: dict[str, Path]
    """Path in the repository -> file."""
    left_out: dict[str, str]
    """Path in the folder -> why it stays here."""

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(path.stat().st_size for path in self.files.values())


def plan_upload(folder: Path) -> UploadPlan:
    """List what of a model folder goes to the Hub: weights, code, tokenizer, card, its results and plots.

    Args:
        folder: As the training scripts leave it, its card rendered by `training/render_card.py`.

    Returns:
        The files in order of their names.

    Raises:
        UserError: If something that a model needs is missing.
    """
    if not folder.is_dir():
        raise UserError(f"--model_path expects the folder of a trained model, got {folder}: check the path")
    for name, what in _NEEDED.items():
        if not (folder / name).is_file():
            raise UserError(f"expected a model with {what} in {folder}, found no {name}: {_remedy(name, folder)}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"expected weights in {folder}, found no *.safetensors: train the model again")
    manifest = read_manifest(folder)
    wanted = {*manifest["results"], *([manifest["comparison"]] if manifest["comparison"] else [])}
    wanted |= set(_IMAGE.findall((folder / _CARD).read_text(encoding="utf-8")))
    files, left_out = {}, {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            reason = _reason_to_leave_out(name, wanted)
            if reason is None:
                files[name] = path
            else:
                left_out[name] = reason
    return UploadPlan(files, left_out)


def check_before_upload(folder: Path, repo_id: str) -> None:
    """Refuse a folder whose card shows unmeasured figures or another address, or that others could not load.

    Args:
        folder: The model's folder.
        repo_id: Where it goes.

    Raises:
        UserError: Naming what is wrong and how to mend it.
    """
    config = read_json_object(folder / "config.json")
    if config.get("model_type") != "isotropic_gaussian" or "AutoModel" not in config.get("auto_map", {}):
        raise UserError(
            f"{folder / 'config.json'}: expected an isotropic_gaussian model with its code, got "
            f"{config.get('model_type')!r}: name the folder that a training script wrote"
        )
    named = read_manifest(folder)["repo_id"]
    if named != repo_id:
        raise UserError(
            f"{folder / _CARD}: expected examples that load {repo_id}, got {named or 'a placeholder'}: run "
            f"python training/render_card.py again with --repo_id {repo_id}"
        )
    check_card_against(folder / _CARD, read_sources(folder), repo_id=repo_id)
    check_clean_load(folder)


def describe_plan(plan: UploadPlan, repo_id: str, *, revision: str | None = None) -> str:
    """Say in lines what would be sent where, with sizes, and what is left out."""
    lines = [f"For {repo_id}, branch {revision or 'main'}, in one commit:"]
    lines += [f"  {_size(path.stat().st_size):>9}  {name}" for name, path in plan.files.items()]
    lines.append(f"{len(plan.files)} files, {_size(plan.num_bytes)}.")
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"Left out, {reason}: {', '.join(names[:3])}{more}.")
    return "\n".join(lines)


def _remedy(name: str, folder: Path) -> str:
    if name == _CARD:
        return f"evaluate it, then python training/render_card.py --model_path {folder} --results ... --repo_id ..."
    return "name the folder that a training script wrote"


def _reason_to_leave_out(name: str, wanted: set[str]) -> str | None:
    if name in wanted:
        return None
    if name.startswith("results/"):
        return "not shown by the card"
    for pattern, reason in _LEFT_OUT:
        if pattern.fullmatch(name):
            return reason
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return "hidden" if is_hidden and not re.fullmatch(r"\.eval_results/[^/]+\.yaml", name) else None


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


_SCRIPT = """
import sys
sys.modules["ragcun_hf"] = None  # whoever loads the model does not have the package
import numpy as np
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
texts = ["how do vaccines work?", "Vaccines train the immune system to recognise a germ."]
vectors = np.stack([model.encode_query(texts), model.encode_document(texts)])
if vectors.shape != (2, 2, model.config.output_dim):
    sys.exit(f"expected two vectors of {model.config.output_dim}, got the shape {vectors.shape}")
if not np.isfinite(vectors).all() or np.allclose(vectors[:, 0], vectors[:, 1]):
    sys.exit("expected finite vectors that differ between texts, got others")
"""
_SECONDS = 600


def check_clean_load(folder: Path) -> None:
    """Load a model folder where neither this package nor a network nor any cache is, and embed two texts.

    Args:
        folder: The model's folder.

    Raises:
        UserError: With the last line of what went wrong there.
    """
    with tempfile.TemporaryDirectory() as empty:
        caches = {name: empty for name in ("HF_HOME", "HF_MODULES_CACHE", "HF_HUB_CACHE")}
        left_out = ("HUGGINGFACE_HUB_CACHE", "PYTHONPATH", "TRANSFORMERS_CACHE")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _SCRIPT, str(folder.resolve())],
                env={**kept, **caches, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
                cwd=empty,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"expected {folder} to load within {_SECONDS} seconds, got no end: try again") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"expected {folder} to load with AutoModel in a clean process, got {reason!r}: train or save it again, so "
            "that code, tokenizer and weights lie in it"
        )
