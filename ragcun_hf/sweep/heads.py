"""New heads on one encoder, and the weights that they start with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..model.arguments import ModelArguments
from ..model.configuration_isotropic_gaussian import IsotropicGaussianConfig
from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
from ..trainer.outcome import head_weights
from .settings import Trial

if TYPE_CHECKING:
    from ..trainer.feature_pairs import FeaturePairs


@dataclass
class TrainingPairs:
    """What heads are trained on, and where their projections start.

    Args:
        base: A model whose encoder made the features.
        pairs: Pairs to train on; others may follow.
        num_training_rows: How many are for training.
    """

    base: IsotropicGaussianModel
    pairs: FeaturePairs
    num_training_rows: int
    _starts: dict[tuple[int, float], Tensor] = field(default_factory=dict, init=False)

    def start(self, model: IsotropicGaussianModel, whitening: float) -> None:
        """Let a model's projection start where the training texts' features suggest; computed once."""
        is_narrower = model.config.output_dim < model.config.feature_dim
        linear = model.projection.linear
        if model.config.projection_init != "identity" or linear is None or not (is_narrower or whitening):
            return
        key = (model.config.output_dim, whitening)
        if key not in self._starts:
            sample = torch.from_numpy(self.pairs.sample(self.num_training_rows))
            model.start_from_features(sample, whitening=whitening)
            if model.config.output_dim > model.config.feature_dim:
                return  # begun with directions drawn for this head
            self._starts[key] = linear.weight.detach().clone()
        linear.weight.data.copy_(self._starts[key])


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


def start_weights(template: IsotropicGaussianModel, trial: Trial, data: TrainingPairs) -> dict[str, Tensor]:
    """Draw the start of a trial's head."""
    torch.manual_seed(trial.seed)
    _reset(template)
    data.start(template, trial.model.whitening)
    return head_weights(template)
