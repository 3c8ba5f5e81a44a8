"""Load base encoders and trained models by name: a Hub id, a folder, or `embedded`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, did_you_mean
from ..files import RECORD_FILE, check_hub_answers, damaged_model_file
from .embedded_isotropic_gaussian import EMBEDDED, EMBEDDED_NAME, embedded_model_folder, has_embedded_model

if TYPE_CHECKING:
    from .modeling_isotropic_gaussian import IsotropicGaussianModel


DEFAULT_BASE_MODEL = "sentence-transformers/all-mpnet-base-v2"


def register_auto_classes() -> None:
    """Register `isotropic_gaussian` with AutoConfig and AutoModel, which then load it without remote code."""
    from transformers import AutoConfig, AutoModel

    from .configuration_isotropic_gaussian import IsotropicGaussianConfig
    from .modeling_isotropic_gaussian import IsotropicGaussianModel

    AutoConfig.register(IsotropicGaussianConfig.model_type, IsotropicGaussianConfig, exist_ok=True)
    AutoModel.register(IsotropicGaussianConfig, IsotropicGaussianModel, exist_ok=True)


def load_base_model(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **config_fields: Any
) -> IsotropicGaussianModel:
    """Create a model in evaluation mode around the encoder that `--base_model` names, or raise a UserError."""
    from huggingface_hub.errors import StrictDataclassError

    from .modeling_isotropic_gaussian import IsotropicGaussianModel

    check_base_name(name)
    _refuse_trained_model(name)
    try:
        _check_connection(name, revision)
        return IsotropicGaussianModel.from_encoder(
            name, revision=revision, trust_remote_code=trust_remote_code, **config_fields
        )
    except (OSError, ImportError) as error:
        raise UserError(str(error) if name == EMBEDDED else _unreachable(name, error)) from error
    except (ValueError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"--base_model expects an encoder that transformers knows, got {name}, which brings code of its own: "
                "read that code, then run ragcun eval-beir or ragcun mine-negatives with --trust_remote_code; for "
                "training take another encoder, because a saved model could not load the code"
            ) from error
        other = "" if name == EMBEDDED else f", or take --base_model {EMBEDDED}"
        raise UserError(f"no model can be made with --base_model {name}: {error} Change the flag{other}") from error
    except Exception as error:
        if not Path(name).is_dir():
            raise
        # Of damaged files, transformers raises any type.
        raise UserError(_unreachable(name, error)) from error


def check_base_name(name: str) -> None:
    """Refuse a misspelled `embedded`, before anything is looked for on the Hub."""
    try:
        is_here = name == EMBEDDED or Path(name).exists()
    except OSError as error:  # a name that is too long
        raise UserError(
            f"--base_model expects a Hub id, a folder, or the word {EMBEDDED}, got {name[:80]!r} ({error.strerror}): "
            "check the name"
        ) from error
    if not is_here and did_you_mean(name.lower(), [EMBEDDED]):
        raise UserError(
            f"--base_model expects a Hub id, a folder, or the word {EMBEDDED}, got {name!r}: did you mean {EMBEDDED}?"
        )


def check_model_path(path: str) -> None:
    """Refuse what can only be a folder, and is none, before it is looked for on the Hub."""
    folder = Path(path)
    try:
        is_in_folder = folder.parent != Path() and folder.parent.is_dir()
        folder.exists()
    except OSError as error:  # a name that is too long
        raise UserError(
            f"--model_path expects a folder or a Hub id, got {path[:80]!r} ({error.strerror}): check the path"
        ) from error
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or is_in_folder
    if folder.exists() or not looks_local:
        return
    beside = [str(each) for each in folder.parent.iterdir()] if is_in_folder else []
    raise UserError(
        f"--model_path expects a folder written by save_pretrained or a Hub id, got {path!r}, where nothing is: "
        f"{did_you_mean(str(folder), beside)}check the path"
    )


def _check_connection(name: str, revision: str | None) -> None:
    """Raise an OSError if a model must be downloaded and the Hub does not answer."""
    from huggingface_hub import try_to_load_from_cache

    if name == EMBEDDED or Path(name).exists():
        return
    with contextlib.suppress(ValueError):  # of a name that no model can have
        # An adapter has no config.json, and an old folder has it in that of its first module.
        for file in ("config.json", "adapter_config.json", "modules.json"):
            if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
                return
    check_hub_answers()


def _refuse_trained_model(name: str) -> None:
    config_file = Path(name) / "config.json"
    if config_file.is_file() and '"model_type": "isotropic_gaussian"' in config_file.read_text(encoding="utf-8"):
        raise UserError(
            f"--base_model expects an encoder, got {name}, which is a trained model of this package: name the encoder "
            "that it started from, or evaluate it with --model_path"
        )


def load_base_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """Load the tokenizer of the encoder that `--base_model` names, or raise a UserError."""
    from transformers import AutoTokenizer

    from .sentence_transformers_isotropic_gaussian import transformer_options

    folder = str(embedded_model_folder()) if name == EMBEDDED else name
    try:
        _check_connection(folder, revision)
        options = transformer_options(folder, {"revision": revision} if revision else {})
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_unreachable(name, error)) from error


def load_trained_model(path: str, *, revision: str | None = None) -> IsotropicGaussianModel:
    """Load a trained model in evaluation mode, with the installed code, never the folder's, or raise a UserError.

    A folder with missing, extra or misshapen weights is refused, and so are weights in a pickle, and files that differ
    from their checksums in the training record.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig

    from .modeling_isotropic_gaussian import IsotropicGaussianModel

    check_model_path(path)
    refuse_damage(Path(path))
    register_auto_classes()
    options = {"revision": revision} if revision else {}
    try:
        _check_connection(path, revision)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
        if config.model_type != "isotropic_gaussian":
            raise UserError(
                f"--model_path expects a model of type isotropic_gaussian, got {config.model_type} in {path}: "
                "train one first, or name the encoder with --base_model"
            )
        with _quiet_loading():
            model, report = IsotropicGaussianModel.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **options
            )
        _check_weights(path, report)
        model.eval()
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise UserError(
            f"--model_path expects whole weights, got {path!r} with a damaged model.safetensors ({error}): "
            "train, copy or download the model again"
        ) from error
    except Exception as error:  # noqa: BLE001 (of damaged files, transformers raises any type)
        raise UserError(
            f"--model_path expects a folder written by save_pretrained or a Hub id, got {path!r} "
            f"({_first_sentence(error)}): check the path, the id and the network"
        ) from error
    _check_tokenizer(model, path)
    return model


def refuse_damage(folder: Path) -> None:
    """Refuse weights and a tokenizer that are not those of the training record: nothing else shows a changed bit."""
    if name := damaged_model_file(folder):
        raise UserError(
            f"--model_path expects the files that {folder / RECORD_FILE} has checksums of, got another {name}: it is "
            "damaged, so copy or train the model again; if it was changed on purpose, remove that record, which is "
            "about another model"
        )


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide the table of weights that do not fit: `_check_weights` says the same in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_weights(path: str, report: dict[str, Any]) -> None:
    """Refuse weights that do not fit the configuration: transformers would make up the missing ones."""
    for kind in ("missing", "unexpected", "mismatched"):
        found = report.get(f"{kind}_keys") or ()
        names = sorted(each if isinstance(each, str) else str(each[0]) for each in found)  # a mismatch has its shapes
        if kind == "unexpected":  # a predictor that the configuration has switched off
            names = [name for name in names if not name.startswith("predictor.")]
        if names:
            what = {"missing": "without", "unexpected": "with the unknown", "mismatched": "with another shape of"}[
                kind
            ]
            more = f" and {len(names) - 1} others" if len(names) > 1 else ""
            raise UserError(
                f"--model_path expects the weights that config.json describes, got {path!r} {what} {names[0]}{more}: "
                "train, copy or download the model again"
            )


def _check_tokenizer(model: IsotropicGaussianModel, path: str) -> None:
    try:
        model.tokenize(["a text"])
    except Exception as error:  # noqa: BLE001 (of damaged files, transformers and tokenizers raise any type)
        raise UserError(
            f"--model_path expects a model with its tokenizer, got {path!r}, whose tokenizer cannot be loaded: copy "
            "the tokenizer files into the folder"
        ) from error


def load_untrained_base(model: IsotropicGaussianModel) -> IsotropicGaussianModel:
    """Load the encoder that a model with a trained encoder started from, with the model's pooling and length."""
    from .sentence_transformers_isotropic_gaussian import AUTO, published_prompts

    config = model.config
    if not config.base_model_name:
        raise UserError(
            "expected base_model_name, the untrained encoder, in the model's config.json, got none: add it"
        )
    is_embedded = config.base_model_name == EMBEDDED_NAME and has_embedded_model()
    name = EMBEDDED if is_embedded else config.base_model_name
    fields = {key: getattr(config, key) for key in ("pooling", "pooled_layers", "normalize_features", "max_length")}
    if published := published_prompts(name):  # its own prompts, if the model took them over
        is_taken_over = published == {"query": config.query_prompt, "document": config.document_prompt}
        fields["query_prompt"] = AUTO if is_taken_over else None
    return load_base_model(name, revision=config.base_model_revision, **fields)


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"--base_model expects a Hub id, a folder, or the word embedded, got {name!r}, which could not be loaded "
        f"({_first_sentence(error)}): check the name and the network, or take --base_model embedded, which needs none"
    )


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
