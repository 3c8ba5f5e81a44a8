"""Isotropic-Gaussian retrieval heads for frozen sentence encoders, in the Hugging Face ecosystem."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_isotropic_gaussian import IsotropicGaussianConfig
    from .errors import UserError
    from .modeling_isotropic_gaussian import IsotropicGaussianModel, IsotropicGaussianOutput
    from .trainer import IsotropicGaussianTrainer
    from .training_arguments import IsotropicGaussianTrainingArguments

__version__ = "0.1.0"

_HOMES = {
    "IsotropicGaussianConfig": "configuration_isotropic_gaussian",
    "IsotropicGaussianModel": "modeling_isotropic_gaussian",
    "IsotropicGaussianOutput": "modeling_isotropic_gaussian",
    "IsotropicGaussianTrainer": "trainer",
    "IsotropicGaussianTrainingArguments": "training_arguments",
    "UserError": "errors",
}
__all__ = [
    "IsotropicGaussianConfig",
    "IsotropicGaussianModel",
    "IsotropicGaussianOutput",
    "IsotropicGaussianTrainer",
    "IsotropicGaussianTrainingArguments",
    "UserError",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import ragcun_hf` stays cheap (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("IsotropicGaussianConfig", "IsotropicGaussianModel"):
        register_auto_classes()
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def register_auto_classes() -> None:
    """Make AutoConfig and AutoModel know `isotropic_gaussian` without remote code."""
    from transformers import AutoConfig, AutoModel

    from .configuration_isotropic_gaussian import IsotropicGaussianConfig
    from .modeling_isotropic_gaussian import IsotropicGaussianModel

    AutoConfig.register(IsotropicGaussianConfig.model_type, IsotropicGaussianConfig, exist_ok=True)
    AutoModel.register(IsotropicGaussianConfig, IsotropicGaussianModel, exist_ok=True)
