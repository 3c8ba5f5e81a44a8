"""Send a model folder to the Hub: choose its files, check them, and make one commit."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands import command
from ..errors import UserError
from ..evaluation.results import read_json_object
from ..files import DOCUMENTS_FILE, HELD_OUT_FILE, RECORD_FILE, write_whole
from .card import check_card, read_own_words, render_card
from .card_sources import SOURCES_FILE, read_manifest, read_sources

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_CARD = "README.md"
_NEEDED = {
    "config.json": "its configuration",
    "modeling_isotropic_gaussian.py": "its code",
    "tokenizer_config.json": "its tokenizer",
    _CARD: "its card",
}
_TOKENIZER = (
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"(sentencepiece\.bpe|spiece|spm|tokenizer|source|target)\.model|chat_template\.jinja|bpe\.codes"
)
# A model consists of these files. A file under another name may hold anything.
_SENT = re.compile(
    rf"{_TOKENIZER}|config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    rf"modules\.json|sentence_bert_config\.json|config_sentence_transformers\.json|README\.md|LICENSE(\.txt|\.md)?|"
    rf"{re.escape(SOURCES_FILE)}|{re.escape(RECORD_FILE)}|{re.escape(DOCUMENTS_FILE)}|\.eval_results/[\w-][\w.-]*\.yaml|"
    rf"(onnx/)?(model(_int8)?\.onnx(\.data)?|onnx_config\.json)|onnx/({_TOKENIZER})"
)
_LEFT_OUT = (
    (re.compile(r"(.*/)?(checkpoint-\d+|runs|__pycache__)/.*"), "part of the run, not of the model"),
    (
        re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib)(\.\w+)?", re.IGNORECASE),
        "a pickle, which can run code when it is loaded",
    ),
    (re.compile(r".*\.(trec|tmp|pyc|log|lock)"), "part of the run, not of the model"),
    (re.compile(re.escape(HELD_OUT_FILE)), "texts of yours"),
    (re.compile(r"results/.*"), "not shown by the card"),
    (re.compile(r"(.*/)?\..*"), "hidden"),
    (re.compile(r".*", re.DOTALL), "not known as a part of a model"),
)
_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
# The beginning of a path in somebody's own folder, which names the person.
_PERSONAL = re.compile(r"(?<![\w.:/-])(/home/|/Users/|/root/|[A-Za-z]:\\{1,2}Users\\{1,2})[\w.-]+")
_SHOWN = re.compile(r"([\w-][\w.-]*/)*[\w-][\w.-]*\.(png|jpe?g|svg|webp|gif)", re.IGNORECASE)
_JSON = re.compile(r"([^./\\][^/\\]*/)*[^./\\][^/\\]*\.json")  # in the folder, and not hidden
_LARGEST_READ = 2**24  # bytes of a text that is searched for paths; a vocabulary may be larger
_LOG_IN = "run hf auth login, or set HF_TOKEN to a token with write access (huggingface.co/settings/tokens)"


@dataclass(frozen=True)
class UploadPlan:
    """Files to send, and files that stay."""

    files: dict[str, Path]  # path in the repository -> file
    left_out: dict[str, str]  # path in the folder -> why it stays


def plan_upload(folder: Path, *, training_digests: bool = True, foreign_code: bool = False) -> UploadPlan:
    """List what to send of a model folder, by name: what a model consists of, and the results and plots of its card.

    All other files stay, and so does what a link names outside the folder. Without `training_digests`, the digests of
    the training documents stay, too. With `foreign_code`, other modules beside the weights are sent with them.
    """
    _check_parts(folder)
    known = _files_of_card(folder) | {path.name for path in _own_code()}
    known |= {path.name for path in folder.glob("*.py")} if foreign_code else set()
    plan, inside = UploadPlan({}, {}), folder.resolve()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if not path.resolve().is_relative_to(inside):
            plan.left_out[name] = "a link to a file outside the folder"
        elif name == DOCUMENTS_FILE and not training_digests:
            plan.left_out[name] = "digests of training documents"
        elif name in known or _SENT.fullmatch(name):
            plan.files[name] = path
        else:
            plan.left_out[name] = next(reason for pattern, reason in _LEFT_OUT if pattern.fullmatch(name))
    for name in _NEEDED:
        if name not in plan.files:
            raise UserError(
                f"expected {name} in {folder} itself, got a link to outside: copy the file into the folder"
            )
    return plan


def _check_parts(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"--model_path expects the folder of a trained model, got {folder}: check the path")
    render = f"evaluate it, then {command('render_card', '--model_path', folder)} --results ... --repo_id ..."
    for name, what in _NEEDED.items():
        if not (folder / name).is_file():
            remedy = render if name == _CARD else "name the folder that a training script wrote"
            raise UserError(f"expected a model with {what} in {folder}, found no {name}: {remedy}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"expected weights in {folder}, found no *.safetensors: train the model again")


def _own_code() -> list[Path]:
    """Return the files of this package that travel with a model."""
    return sorted((Path(__file__).parents[1] / "model").glob("*_isotropic_gaussian.py"))


def check_code(folder: Path) -> None:
    """Refuse a model folder with other code than the installed package's, before any of it runs."""
    for own in _own_code():
        path = folder / own.name
        if path.is_file() and path.read_bytes() != own.read_bytes():
            raise UserError(
                f"{path}: expected the code of the installed package, got other code, which would run here and on the "
                "machines of others: load the model and save it again, or, once you have read that code, add "
                "--trust_remote_code"
            )
    known = {own.stem for own in _own_code()}
    _check_modules(folder / "modules.json")
    for name in ("config.json", "tokenizer_config.json"):
        named = read_json_object(folder / name).get("auto_map", {}) if (folder / name).is_file() else {}
        for word in _strings(named):
            if word.rpartition(".")[0] not in known:
                raise UserError(
                    f"{folder / name}: expected only code of the installed package in auto_map, got {word!r}: remove "
                    "it, or, once you have read that code, add --trust_remote_code"
                )


def _check_modules(path: Path) -> None:
    try:
        kinds = [each["type"] for each in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(
            f"{path}: expected a list of modules, got something else ({error}): save the model again"
        ) from error
    if foreign := [kind for kind in kinds if not str(kind).startswith("sentence_transformers.")]:
        raise UserError(
            f"{path}: expected modules of sentence-transformers, got {foreign[0]!r}: save the model again, or, once "
            "you have read that code, add --trust_remote_code"
        )


def check_no_personal_paths(plan: UploadPlan) -> None:
    """Refuse to publish a file with a path in somebody's own folder, which has a name in it."""
    for name, path in plan.files.items():
        if path.suffix in (".json", ".md", ".yaml") and path.stat().st_size < _LARGEST_READ:
            if found := _PERSONAL.search(path.read_text(encoding="utf-8", errors="replace")):
                raise UserError(
                    f"{path}: expected no path of this machine in a published file, got {found[0]!r} in {name}: write "
                    "a Hub id or a relative path there"
                )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _files_of_card(folder: Path) -> set[str]:
    """Return the results, records and plots that the card in a folder shows, by their names in it."""
    manifest = read_manifest(folder)
    shown = {str(name) for name in (*manifest["results"], manifest["training_record"], manifest["comparison"]) if name}
    images = _IMAGE.findall((folder / _CARD).read_text(encoding="utf-8"))
    # Only JSON, and pictures under plain names: a card may be written by somebody else.
    return set(filter(_JSON.fullmatch, shown)) | set(filter(_SHOWN.fullmatch, images))


def plan_plain_upload(folder: Path, target: Path, repo_id: str, texts: Sequence[str]) -> UploadPlan:
    """Write the plain folder of a model, with its card and what that shows, and list its files.

    `target` exists and is empty. A `UserError` says if the model's own card differs from its sources, or what
    `write_plain` refuses.
    """
    from ..model.base_models import load_trained_model
    from .plain_export import write_plain

    own = plan_upload(folder)  # refuses what is no model with a card
    sources, card = read_sources(folder), folder / _CARD
    if repo_id == sources["repo_id"]:
        raise UserError(
            f"--repo_id expects a repository of its own for a plain folder, got {repo_id}, that of the model itself: "
            f"name another one, such as {repo_id}-plain"
        )
    check_card(card, sources)
    write_plain(load_trained_model(str(folder)), target, texts)
    words = read_own_words(card.read_text(encoding="utf-8"), card) or ""
    text = render_card(**{**sources, "repo_id": repo_id}, is_plain=True, own_words=words)
    write_whole(target / _CARD, text)
    for name in _files_of_card(folder) & own.files.keys():  # a card may also name files outside its folder
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    return UploadPlan({path.relative_to(target).as_posix(): path for path in files}, {})


def describe_plan(plan: UploadPlan, repo_id: str, *, revision: str | None = None) -> str:
    """Return lines that say what would be sent where, with sizes, and what is left out."""
    sizes = {name: path.stat().st_size for name, path in plan.files.items()}
    lines = [f"For {repo_id}, branch {revision or 'main'}, in one commit:"]
    lines += [f"  {_size(size):>9}  {name}" for name, size in sizes.items()]
    lines.append(f"{len(sizes)} files, {_size(sum(sizes.values()))}.")
    for reason in dict.fromkeys(plan.left_out.values()):
        names = [name for name, given in plan.left_out.items() if given == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"Left out, {reason}: {', '.join(names[:3])}{more}.")
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def check_before_upload(folder: Path, repo_id: str, *, trust_remote_code: bool = False) -> None:
    """Refuse a folder whose card differs from its sources or names another id, or that others could not load.

    Code other than the installed package's is refused, too, unless `trust_remote_code`.
    """
    from ..model.base_models import refuse_damage

    config = read_json_object(folder / "config.json")
    if config.get("model_type") != "isotropic_gaussian" or "AutoModel" not in config.get("auto_map", {}):
        raise UserError(
            f"{folder / 'config.json'}: expected an isotropic_gaussian model with its code, got "
            f"{config.get('model_type')!r}: name the folder that a training script wrote"
        )
    refuse_damage(folder)
    named = read_manifest(folder)["repo_id"]
    if named != repo_id:
        raise UserError(
            f"{folder / _CARD}: expected examples that load {repo_id}, got {named or 'a placeholder'}: run "
            f"{command('render_card')} again with --repo_id {repo_id}"
        )
    check_card(folder / _CARD, read_sources(folder))
    plan = plan_upload(folder, foreign_code=trust_remote_code)
    check_no_personal_paths(plan)
    if not trust_remote_code:
        check_code(folder)
    with tempfile.TemporaryDirectory() as sent:  # what others will have
        for name, path in plan.files.items():
            place = Path(sent) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                place.symlink_to(path.resolve())
            except OSError:  # Windows allows links to administrators only
                shutil.copyfile(path, place)
        check_clean_load(Path(sent), name=folder)


_LOAD_SCRIPT = """
import sys
sys.modules["ragcun_hf"] = None  # users who load the model do not have the package
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
_PLAIN_LOAD_SCRIPT = """
import sys
sys.modules["ragcun_hf"] = None
import numpy as np
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu")
texts = ["how do vaccines work?", "Vaccines train the immune system to recognise a germ."]
vectors = np.stack([model.encode(texts, prompt_name=name) for name in ("query", "document")])
if not np.isfinite(vectors).all() or np.allclose(vectors[:, 0], vectors[:, 1]):
    sys.exit("expected finite vectors that differ between texts, got others")
"""
_SECONDS = 600
# All that a process needs of the environment to find its libraries: tokens and everything else stay here.
_ENVIRONMENT = re.compile(
    r"PATH|LANG|LC_\w+|TMPDIR|TEMP|TMP|SYSTEMROOT|COMSPEC|PATHEXT|VIRTUAL_ENV|LD_LIBRARY_PATH|DYLD_LIBRARY_PATH|"
    r"(OMP|MKL|OPENBLAS)_NUM_THREADS|TOKENIZERS_PARALLELISM"
)


def check_clean_load(folder: Path, *, is_plain: bool = False, name: Path | None = None) -> None:
    """Load a model folder without this package, the network or any cache, and embed two texts; quote what fails.

    The process that runs the folder's code has neither tokens nor anything else of the user's environment. A plain
    folder is loaded by sentence-transformers, without the right to run its code. Messages call the folder `name`.
    """
    with tempfile.TemporaryDirectory() as empty:
        caches = {name: empty for name in ("HOME", "USERPROFILE", "HF_HOME", "HF_MODULES_CACHE", "HF_HUB_CACHE")}
        kept = {name: value for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name)}
        if site.ENABLE_USER_SITE:  # packages may be installed below the user's own folder
            kept["PYTHONUSERBASE"] = site.getuserbase()
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PLAIN_LOAD_SCRIPT if is_plain else _LOAD_SCRIPT, str(folder.resolve())],
                env={**kept, **caches, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
                cwd=empty,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"expected {name or folder} to load within {_SECONDS} seconds, got no result: try again"
            ) from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"expected {name or folder} to load with {'SentenceTransformer' if is_plain else 'AutoModel'} in a clean "
            f"process, got {reason!r}: train or save the model again, so that nothing is missing"
        )


def prepare_repository(api: HfApi, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Create the repository and the branch if they are missing, which also tests the token; return the whole id.

    A name alone belongs to the token's owner. If `private` is None, the owner's settings decide.
    """
    with _hub_errors_explained(repo_id):
        whole = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main"):
            api.create_branch(whole, branch=str(revision), exist_ok=True)
    return whole


def upload(
    api: HfApi, plan: UploadPlan, repo_id: str, *, revision: str | None = None, commit_message: str | None = None
) -> CommitInfo:
    """Send all files in one commit, so that visitors see the whole new model or the old one, also after an error."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, str(path)) for name, path in plan.files.items()]
    model_type = read_json_object(plan.files["config.json"]).get("model_type")
    message = commit_message or f"Upload {model_type} model with its card"
    with _hub_errors_explained(repo_id):
        # Not upload_folder, which may split the files over several commits.
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


@contextmanager
def _hub_errors_explained(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub's client into one line that says what to do."""
    import httpx2
    from huggingface_hub import errors

    network = (httpx2.HTTPError, ConnectionError, TimeoutError)
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"--repo_id expects organisation/name, got {repo_id!r} ({error}): correct it") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError("expected to reach the Hub, got HF_HUB_OFFLINE in the environment: unset it") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"expected a token for {repo_id}, found none: {_LOG_IN}") from error
    except errors.HfHubHTTPError as error:
        raise UserError(_refusal(error, repo_id)) from error
    except (*network, RuntimeError, OSError) as error:
        # If an upload breaks, the client wraps the cause in a RuntimeError that names the file.
        cause = error if isinstance(error, network) else error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise UserError(_refusal(cause, repo_id)) from error
        if not isinstance(cause, network):
            raise
        raise UserError(
            f"expected to send to {repo_id}, but the connection broke ({error}): nothing was committed, run the same "
            "command again; files that arrived are not sent twice"
        ) from error


def _refusal(error: Any, repo_id: str) -> str:
    status = getattr(error.response, "status_code", None)
    reason = " ".join(str(getattr(error, "server_message", None) or error).split())
    if status == 401:
        return f"expected a valid token for {repo_id}, got one that the Hub refuses, or none ({reason}): {_LOG_IN}"
    if status == 403:
        return (
            f"expected a token that may write to {repo_id}, got one that may not ({reason}): use a token with write "
            "access, or another organisation"
        )
    if status == 404:
        return f"expected the repository {repo_id} on the Hub, found none ({reason}): check --repo_id and --revision"
    if status in (409, 412):
        return f"{repo_id} was changed on the Hub at the same time ({reason}): run the same command again"
    return f"expected the Hub to take {repo_id}, got status {status} ({reason}): try again later"
