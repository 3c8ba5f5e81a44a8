"""New heads on one encoder, and the weights that they start with."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..configuration_isotropic_gaussian import IsotropicGaussianConfig
from ..modeling_isotropic_gaussian import IsotropicGaussianModel
from ..run_arguments import ModelArguments
from .settings import Trial


class Startable(Protocol):
    """What lets a projection start where features suggest."""

    def start(self, model: IsotropicGaussianModel, whitening: float) -> None:
        """Set the start of the model's projection."""
        ...


def with_head(base: IsotropicGaussianModel, arguments: ModelArguments) -> IsotropicGaussianModel:
    """Put a new head on the base's encoder."""
    of_encoder = ("encoder_config", "base_model_name", "pooling", "normalize_features", "max_length")
    fields = {name: getattr(base.config, name) for name in (*of_encoder, "query_prompt", "document_prompt")}
    config = IsotropicGaussianConfig(**{**arguments.config_fields(), **fields})
    with torch.device("meta"):  # its encoder is not for use
        model = IsotropicGaussianModel(config)
    for head in (model.projection, model.predictor):
        if head is not None:
            head.to_empty(device=base.device)
    model.encoder = base.encoder
    model.tokenizer = base.tokenizer
    model.apply_freezing()
    _reset(model)
    return model.eval()


def _reset(model: IsotropicGaussianModel) -> None:
    for head in (model.projection, model.predictor):
        for module in head.modules() if head is not None else ():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


def start_weights(template: IsotropicGaussianModel, trial: Trial, data: Startable) -> dict[str, Tensor]:
    """Draw the start of a trial's head."""
    torch.manual_seed(trial.seed)
    _reset(template)
    data.start(template, trial.model.whitening)
    return head_weights(template)


def head_weights(model: IsotropicGaussianModel) -> dict[str, Tensor]:
    """Copy the trainable weights of a model."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
