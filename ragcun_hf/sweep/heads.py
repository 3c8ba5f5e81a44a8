"""Several heads trained at once on the same features: one stacked tensor per weight, one forward pass under vmap.

Each head is trained as the Trainer would train it: with its loss, order of rows, schedule, clipping and AdamW. Only
dropout is drawn for the batch of heads as a whole, so it depends on which heads train together.

Shape letters used in this file: G = heads, B = pairs in a batch, M = documents in a batch, H = feature width,
D = embedding width, K = random directions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers import get_scheduler

from ..data.training_rows import TrainingRows, read_columns
from ..errors import NotFiniteError, UserError
from ..features.devices import moved
from ..model.arguments import ModelArguments
from ..model.configuration_isotropic_gaussian import IsotropicGaussianConfig
from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
from ..objective.arguments import learning_rates
from ..objective.head_weights import trainable_weights
from ..objective.inputs import FeaturePairs, retrieval_validation
from ..objective.isotropy import random_directions
from ..objective.terms import TERMS, Objective, resolve_weights

if TYPE_CHECKING:
    from ..features.feature_store import FeatureStore
    from ..objective.arguments import IsotropicGaussianTrainingArguments
    from .settings import Trial

logger = logging.getLogger(__name__)

Validation = Callable[[IsotropicGaussianModel], dict[str, float]]

# With more pairs, stacked matrices cost a processor more in cache misses than they save in calls. A card is idle with
# so few.
_PAIRS_AT_ONCE, _PAIRS_AT_ONCE_ON_CARD = 1_024, 8_192
_MOST_HEADS = 16
_FEW_DOCUMENTS = 10  # a search among so few documents finds everything


def heads_at_once(batch_size: int, device: torch.device) -> int:
    """Return how many heads train fastest together."""
    pairs = _PAIRS_AT_ONCE_ON_CARD if device.type == "cuda" else _PAIRS_AT_ONCE
    return max(1, min(_MOST_HEADS * pairs // _PAIRS_AT_ONCE, pairs // batch_size))


class HeadData:
    """Training pairs as features on the device of the heads, and the weights that heads start with on them.

    `base` is a model with the encoder of the features. The first `num_rows` pairs are for training; the validation
    measures a model on the others.
    """

    def __init__(
        self,
        base: IsotropicGaussianModel,
        pairs: FeaturePairs,
        num_rows: int,
        validation: Validation | None = None,
    ) -> None:
        self.base, self.pairs, self.num_rows, self.validation = base, pairs, num_rows, validation
        self.device = base.device
        self._query_features = torch.from_numpy(pairs.query_vectors).to(self.device)
        self._document_features = torch.from_numpy(pairs.document_vectors).to(self.device)
        self._query_rows = torch.from_numpy(pairs.query_rows[:num_rows])
        self._positive_rows = torch.from_numpy(pairs.positive_rows[:num_rows])
        self._negative_rows = pairs.negative_rows[:num_rows]
        self.has_negatives = any(len(rows) for rows in self._negative_rows)
        self.known_pairs = pairs.pair_ids(slice(num_rows)).known_pairs()
        self._projections: dict[tuple[int, float], Tensor] = {}

    @classmethod
    def of_rows(
        cls,
        base: IsotropicGaussianModel,
        train: TrainingRows,
        store: FeatureStore,
        *,
        held_out: TrainingRows | None = None,
        validation: Validation | None = None,
        corpus: Sequence[str] = (),
    ) -> Self:
        """Encode training rows; held-out rows, which search the corpus too, become the validation."""
        num_rows = train.num_rows or 0
        if num_rows < 2:
            raise UserError(
                f"expected at least two training rows, got {num_rows}: a batch needs other documents to compare with"
            )
        if held_out is None:
            return cls(base, FeaturePairs.of_rows([train], store, base), num_rows, validation)
        num_documents = len(set(read_columns(held_out)[1]))
        if num_documents <= _FEW_DOCUMENTS:
            logger.warning("Only %d documents are held out: NDCG@10 says little about them.", num_documents)
        pairs = FeaturePairs.of_rows([train, held_out], store, base)
        return cls(base, pairs, num_rows, retrieval_validation(held_out, store, corpus=corpus))

    def base_figures(self) -> dict[str, float]:
        """Measure the frozen base by its makers' similarity."""
        published = self.base.config.encoder_similarity
        model = with_head(self.base, ModelArguments(projection_kind="linear", similarity_fn_name=published))
        return {} if self.validation is None else self.validation(model)

    def steps_per_epoch(self, training: IsotropicGaussianTrainingArguments) -> int:
        """Count the batches of an epoch, at least one."""
        num_rows, size = self.num_rows, training.per_device_train_batch_size
        return max(1, num_rows // size if training.dataloader_drop_last else math.ceil(num_rows / size))

    def num_steps(self, training: IsotropicGaussianTrainingArguments, share: float = 1.0) -> int:
        """Count the optimizer steps of a share of a whole training."""
        whole = training.max_steps
        if whole <= 0:
            whole = math.ceil(training.num_train_epochs * self.steps_per_epoch(training))
        return max(1, math.ceil(share * whole))

    def batch(self, rows_GB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (G, B + M, H), query ids (G, B) and document ids (G, M), arranged as by the collators."""
        queries_GB, documents_GM = self._query_rows[rows_GB], self._positive_rows[rows_GB]
        if self.has_negatives:  # then all heads have the same rows
            negatives = np.concatenate([self._negative_rows[row] for row in rows_GB[0].tolist()]).astype(np.int64)
            documents_GM = torch.cat([documents_GM, torch.from_numpy(negatives).expand(len(rows_GB), -1)], dim=1)
        queries_GB, documents_GM = moved(queries_GB, self.device), moved(documents_GM, self.device)
        features = torch.cat([self._query_features[queries_GB], self._document_features[documents_GM]], dim=1)
        return features, queries_GB, documents_GM

    def initial_weights(self, template: IsotropicGaussianModel, trial: Trial) -> dict[str, Tensor]:
        """Initialize the head of a template as a trial asks for, and return its weights."""
        torch.manual_seed(trial.seed)
        _reset(template)
        config, linear, whitening = template.config, template.projection.linear, trial.training.whitening
        is_from_features = config.output_dim < config.feature_dim or whitening > 0
        if config.projection_init == "identity" and linear is not None and is_from_features:
            key = (config.output_dim, whitening)
            if key in self._projections:
                linear.weight.data.copy_(self._projections[key])
            else:
                template.start_from_features(torch.from_numpy(self.pairs.sample(self.num_rows)), whitening=whitening)
                if config.output_dim <= config.feature_dim:  # a wider projection has directions of this seed
                    self._projections[key] = linear.weight.detach().clone()
        return trainable_weights(template)


def with_head(base: IsotropicGaussianModel, arguments: ModelArguments) -> IsotropicGaussianModel:
    """Make a model with a new head around the encoder of another model."""
    of_encoder = ("encoder_config", "base_model_name", "pooling", "pooled_layers", "normalize_features", "max_length")
    of_texts = ("query_prompt", "document_prompt", "lexical_dim", "lexical_weight", "lexical_scale")
    fields = {name: getattr(base.config, name) for name in (*of_encoder, "encoder_similarity", *of_texts)}
    config = IsotropicGaussianConfig(**{**arguments.config_fields(), **fields})
    with torch.device("meta"):  # the encoder made here is not used
        model = IsotropicGaussianModel(config)
    for head in (model.projection, model.predictor):
        if head is not None:
            head.to_empty(device=base.device)
    model.encoder, model.pooled_layers, model.lexical = base.encoder, base.pooled_layers, base.lexical
    model.tokenizer = base.tokenizer
    model.apply_freezing()
    _reset(model)
    return model.eval()


def _reset(model: IsotropicGaussianModel) -> None:
    for head in (model.projection, model.predictor):
        for module in head.modules() if head is not None else ():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


def measure_head(
    template: IsotropicGaussianModel, head: dict[str, Tensor], validation: Validation
) -> dict[str, float]:
    """Return the figures of a head; none if it diverged."""
    template.load_state_dict(head, strict=False)
    try:
        return validation(template.eval())
    except NotFiniteError:
        return {}


class HeadBatch:
    """Heads of one shape, with a trial and initial weights (parameter name -> tensor) for each.

    The template is a model with such a head. It does the computation; its own weights do not change.
    """

    def __init__(
        self, template: IsotropicGaussianModel, heads: Sequence[dict[str, Tensor]], trials: Sequence[Trial]
    ) -> None:
        self._template, self._trials, self._args = template, trials, trials[0].training
        self._parameters = {name: torch.stack([head[name] for head in heads]).requires_grad_() for name in heads[0]}
        weights = [resolve_weights(trial.training, use_predictor=trial.model.use_predictor) for trial in trials]
        self._terms = [term for term in TERMS if weights[0][term] > 0]
        self._needs_directions = "isotropy" in self._terms and self._args.isotropy_kind == "sigreg"
        numbers = {term: [each[term] for each in weights] for term in self._terms}
        numbers |= {name: [trial.value(name) for trial in trials] for name in ("temperature", "margin")}
        self._numbers = {name: torch.tensor(values, device=template.device) for name, values in numbers.items()}

    def train(self, data: HeadData, *, total_steps: int, share: float = 1.0) -> Iterator[int]:
        """Train all heads, and yield the number of each step when it is done.

        `total_steps`, after which the schedule ends, are a `share` of a whole training; so is a warm-up in steps.
        """
        optimizer, scheduler = self._optimizer(total_steps, share)
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        torch.manual_seed(self._trials[0].seed)  # of dropout, which differs from head to head
        self._template.train()

        def loss_of_head(
            parameters: dict[str, Tensor],
            features: Tensor,
            query_ids: Tensor,
            document_ids: Tensor,
            numbers: dict[str, Tensor],
            directions: Tensor | None,
        ) -> Tensor:
            with torch.autocast(features.device.type, dtype=torch.bfloat16, enabled=self._args.bf16):
                inputs = {"features": features, "num_predicted": query_ids.shape[0]}
                outputs = functional_call(self._template, parameters, (), inputs)
            objective = Objective.of_arguments(
                self._args,
                {term: numbers[term] for term in self._terms},
                similarity=self._template.config.similarity_fn_name,
                temperature=numbers["temperature"],
                margin=numbers["margin"],
                known_pairs=data.known_pairs,
            )
            return objective.total(objective.terms(outputs, query_ids, document_ids, directions=directions))

        in_dims = (0, 0, 0, 0, 0, 0 if self._needs_directions else None)
        loss = vmap(loss_of_head, randomness="different", in_dims=in_dims)
        for step, rows_GB in enumerate(self._orders(data, total_steps)):
            losses_G = loss(self._parameters, *data.batch(rows_GB), self._numbers, self._directions(step))
            losses_G.sum().backward()
            _clip_each(gradients, self._args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            torch._foreach_zero_(gradients)
            yield step

    def heads(self) -> list[dict[str, Tensor]]:
        """Return the weights of each head."""
        return [
            {name: parameter.detach()[number] for name, parameter in self._parameters.items()}
            for number in range(len(self._trials))
        ]

    def _orders(self, data: HeadData, total_steps: int) -> Iterator[Tensor]:
        """Yield the rows (G, B) of each step, in the order of the Trainer."""
        batch_size, steps_per_epoch = self._args.per_device_train_batch_size, data.steps_per_epoch(self._args)
        orders_GN = torch.zeros(0)
        for step in range(total_steps):
            epoch, place = divmod(step, steps_per_epoch)
            if place == 0:
                # As accelerate seeds the sampler of an epoch; heads with the same seed see the same order.
                seeds = [torch.Generator().manual_seed(trial.seed + epoch) for trial in self._trials]
                orders_GN = torch.stack([torch.randperm(data.num_rows, generator=seed) for seed in seeds])
            yield orders_GN[:, place * batch_size : (place + 1) * batch_size]

    def _directions(self, step: int) -> Tensor | None:
        """Return (G, D, K), drawn once per seed, or None if no term needs them."""
        if not self._needs_directions:
            return None
        width, count = self._template.config.output_dim, self._args.num_directions
        seeds = [trial.seed + step for trial in self._trials]
        drawn = {seed: random_directions(width, count, seed=seed) for seed in set(seeds)}
        return moved(torch.stack([drawn[seed] for seed in seeds]), self._template.device)

    def _optimizer(self, total_steps: int, share: float) -> tuple[torch.optim.Optimizer, Any]:
        """Make one AdamW for all heads, each with its own learning rate and weight decay, and its schedule."""
        args = self._args
        for parameter in self._parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        groups = []
        for number, trial in enumerate(self._trials):
            for is_decayed in (True, False):
                names = [name for name in self._parameters if ("bias" not in name) == is_decayed]
                weight_decay = trial.training.weight_decay if is_decayed else 0.0
                views = [_view(self._parameters[name], number) for name in names]
                groups.append({"params": views, "lr": trial.training.learning_rate, "weight_decay": weight_decay})
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=args.adam_epsilon, fused=True)
        warmup = args.get_warmup_steps(total_steps)
        if args.warmup_steps >= 1:
            warmup = math.ceil(share * warmup)
        learning_rates(args, total_steps, warmup)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            warmup,
            total_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs or None,  # type: ignore[arg-type]
        )
        return optimizer, schedule


def _view(parameter: Tensor, number: int) -> Tensor:
    """Return one head's part of a stacked parameter, with its part of the gradient, in the same memory."""
    view = parameter.detach()[number].requires_grad_()
    view.grad = None if parameter.grad is None else parameter.grad[number]
    return view


def _clip_each(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale down the gradients of each head whose norm is above the limit, as clip_grad_norm_ does."""
    if max_norm <= 0:
        return
    norms_G = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]).norm(dim=0)
    scales_G = (max_norm / (norms_G + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scales_G.view(-1, *[1] * (gradient.ndim - 1)))
