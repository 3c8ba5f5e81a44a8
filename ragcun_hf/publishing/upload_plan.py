"""What of a model folder goes to the Hub, and the checks before it does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .card_check import check_card_against
from .card_sources import read_manifest, read_sources
from .clean_load import check_clean_load
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
