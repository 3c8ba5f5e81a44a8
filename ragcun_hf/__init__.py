"""Isotropic-Gaussian retrieval heads for frozen sentence encoders, in the Hugging Face ecosystem."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UserError
    from .evaluation.closed_form import move_known_documents
    from .evaluation.evaluator import RetrievalEvaluator
    from .model.base_models import register_auto_classes
    from .model.configuration_isotropic_gaussian import IsotropicGaussianConfig
    from .model.modeling_isotropic_gaussian import IsotropicGaussianModel, IsotropicGaussianOutput
    from .objective.arguments import IsotropicGaussianTrainingArguments
    from .trainer.trainer import IsotropicGaussianTrainer

__version__ = "0.1.0"

_HOMES = {
    "IsotropicGaussianConfig": "model.configuration_isotropic_gaussian",
    "IsotropicGaussianModel": "model.modeling_isotropic_gaussian",
    "IsotropicGaussianOutput": "model.modeling_isotropic_gaussian",
    "IsotropicGaussianTrainer": "trainer.trainer",
    "IsotropicGaussianTrainingArguments": "objective.arguments",
    "RetrievalEvaluator": "evaluation.evaluator",
    "UserError": "errors",
    "move_known_documents": "evaluation.closed_form",
    "register_auto_classes": "model.base_models",
}
__all__ = [
    "IsotropicGaussianConfig",
    "IsotropicGaussianModel",
    "IsotropicGaussianOutput",
    "IsotropicGaussianTrainer",
    "IsotropicGaussianTrainingArguments",
    "RetrievalEvaluator",
    "UserError",
    "move_known_documents",
    "register_auto_classes",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import ragcun_hf` stays cheap (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("IsotropicGaussianConfig", "IsotropicGaussianModel"):
        importlib.import_module(".model.base_models", __name__).register_auto_classes()
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
