"""Several heads trained at once on the same features: one stacked tensor per weight, one forward under vmap.

What the Trainer does to one head is done to each here: its loss, order of rows, schedule, clipping and AdamW. Dropout
alone is drawn for the batch of heads as a whole, so it follows from which heads are together.

Shape letters used in this file: G = heads, B = pairs in a batch, M = documents in a batch, H = feature width,
D = embedding width, K = random directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap
from transformers import get_scheduler

from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
from ..trainer.feature_pairs import FeaturePairs
from ..trainer.isotropy import random_directions
from ..trainer.known_pairs import KnownPairs, PairIds
from ..trainer.objective import TERMS, Objective, resolve_weights
from .settings import Trial

_OBJECTIVE_NUMBERS = ("temperature", "margin")
_PAIRS_AT_ONCE = 1_024  # beyond so many, matrices are so large that stacking them costs more cache than it saves calls
_MOST_HEADS = 16


def heads_at_once(batch_size: int) -> int:
    """Return how many heads are best trained together."""
    return max(1, min(_MOST_HEADS, _PAIRS_AT_ONCE // batch_size))


class PairBatches:
    """Training pairs as tensors, and batches of them for several heads.

    Args:
        pairs: Precomputed features of all pairs.
        num_rows: Only the first so many are for training.
        device: Where the heads train.
    """

    def __init__(self, pairs: FeaturePairs, num_rows: int, device: torch.device) -> None:
        self._query_features = torch.from_numpy(pairs.query_vectors).to(device)
        self._document_features = torch.from_numpy(pairs.document_vectors).to(device)
        self._query_rows = torch.from_numpy(pairs.query_rows[:num_rows])
        self._positive_rows = torch.from_numpy(pairs.positive_rows[:num_rows])
        self._negative_rows = pairs.negative_rows[:num_rows]
        ids = PairIds(self._query_rows, self._positive_rows)
        self.known_pairs = ids.known_pairs()
        self.has_negatives = any(len(rows) for rows in self._negative_rows)
        self.device = device

    def __len__(self) -> int:
        return len(self._query_rows)

    def steps_per_epoch(self, batch_size: int, *, drop_last: bool) -> int:
        """Count the batches of one pass; pairs that fit in less than one batch are one all the same."""
        return max(1, len(self) // batch_size if drop_last else math.ceil(len(self) / batch_size))

    def batch(self, rows_GB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (G, B + M, H), query ids (G, B) and document ids (G, M), laid out as the collators do."""
        queries_GB, documents_GM = self._query_rows[rows_GB], self._positive_rows[rows_GB]
        if self.has_negatives:  # then all heads have the same rows
            negatives = np.concatenate([self._negative_rows[row] for row in rows_GB[0].tolist()]).astype(np.int64)
            documents_GM = torch.cat([documents_GM, torch.from_numpy(negatives).expand(len(rows_GB), -1)], dim=1)
        queries_GB, documents_GM = queries_GB.to(self.device), documents_GM.to(self.device)
        features = torch.cat([self._query_features[queries_GB], self._document_features[documents_GM]], dim=1)
        return features, queries_GB, documents_GM


class HeadBatch:
    """Some heads of one shape.

    Args:
        template: A model with a head of that shape; used for its computation, its weights stay as they are.
        heads: Start of each head: parameter name -> tensor.
        trials: What each head is trained with.
    """

    def __init__(
        self, template: IsotropicGaussianModel, heads: Sequence[dict[str, Tensor]], trials: Sequence[Trial]
    ) -> None:
        self._template = template
        self._trials = trials
        self._args = trials[0].training
        self._known_pairs: KnownPairs | None = None
        self._parameters = {name: torch.stack([head[name] for head in heads]).requires_grad_() for name in heads[0]}
        weights = [resolve_weights(trial.training, use_predictor=trial.model.use_predictor) for trial in trials]
        self._terms = [term for term in TERMS if weights[0][term] > 0]
        numbers = {term: [each[term] for each in weights] for term in self._terms}
        numbers |= {name: [trial.value(name) for trial in trials] for name in _OBJECTIVE_NUMBERS}
        self._numbers = {name: torch.tensor(values, device=template.device) for name, values in numbers.items()}

    def train(self, pairs: PairBatches, *, total_steps: int, share: float = 1.0) -> Iterator[int]:
        """Train all heads; the learning rate falls to its end within these steps.

        Args:
            pairs: What to train on.
            total_steps: Optimizer steps.
            share: These steps as a part of the whole budget; a warm-up given in steps shrinks with it.

        Yields:
            int: The number of each step when it is done.
        """
        optimizer, scheduler = self._optimizer(total_steps, share)
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        torch.manual_seed(self._trials[0].seed)  # of dropout, which no head shares with another
        self._template.train()
        self._known_pairs = pairs.known_pairs
        of_directions = 0 if self._needs_directions else None
        loss = vmap(self._loss, randomness="different", in_dims=(0, 0, 0, 0, 0, of_directions))
        for step, rows_GB in enumerate(self._orders(pairs, total_steps)):
            losses_G = loss(self._parameters, *pairs.batch(rows_GB), self._numbers, self._directions(step))
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

    def _loss(
        self,
        parameters: dict[str, Tensor],
        features: Tensor,
        query_ids: Tensor,
        document_ids: Tensor,
        numbers: dict[str, Tensor],
        directions: Tensor | None,
    ) -> Tensor:
        """Compute the weighted loss of one head; runs under vmap."""
        args, trial = self._args, self._trials[0]
        with torch.autocast(features.device.type, dtype=torch.bfloat16, enabled=args.bf16):
            inputs = {"features": features, "num_predicted": query_ids.shape[0]}
            outputs = functional_call(self._template, parameters, (), inputs)
        objective = Objective(
            weights={term: numbers[term] for term in self._terms},
            contrastive_kind=args.contrastive_kind,
            temperature=numbers["temperature"],
            margin=numbers["margin"],
            similarity=trial.model.similarity_fn_name,
            is_bidirectional=args.bidirectional,
            isotropy_kind=args.isotropy_kind,
            predictive_kind=args.predictive_kind,
            known_pairs=self._known_pairs,
        )
        return objective.total(objective.terms(outputs, query_ids, document_ids, directions=directions))

    def _orders(self, pairs: PairBatches, total_steps: int) -> Iterator[Tensor]:
        """Yield the rows (G, B) of each step, in the order in which the Trainer takes them."""
        batch_size = self._args.per_device_train_batch_size
        steps_per_epoch = pairs.steps_per_epoch(batch_size, drop_last=self._args.dataloader_drop_last)
        orders_GN = torch.zeros(0)
        for step in range(total_steps):
            epoch, place = divmod(step, steps_per_epoch)
            if place == 0:
                # As accelerate seeds the sampler of an epoch; heads of one seed see the same order.
                seeds = [torch.Generator().manual_seed(trial.seed + epoch) for trial in self._trials]
                orders_GN = torch.stack([torch.randperm(len(pairs), generator=seed) for seed in seeds])
            yield orders_GN[:, place * batch_size : (place + 1) * batch_size]

    @property
    def _needs_directions(self) -> bool:
        return "isotropy" in self._terms and self._args.isotropy_kind == "sigreg"

    def _directions(self, step: int) -> Tensor | None:
        """Return (G, D, K), drawn once for each seed, or None where no term needs them."""
        if not self._needs_directions:
            return None
        width, count = self._template.config.output_dim, self._args.num_directions
        seeds = [trial.seed + step for trial in self._trials]
        drawn = {seed: random_directions(width, count, seed=seed) for seed in set(seeds)}
        return torch.stack([drawn[seed] for seed in seeds]).to(self._template.device)

    def _optimizer(self, total_steps: int, share: float) -> tuple[torch.optim.Optimizer, Any]:
        """Make one AdamW over all heads, each with its own learning rate and weight decay, and its schedule."""
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
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            warmup,
            total_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs or None,  # type: ignore[arg-type]
        )
        return optimizer, schedule


def _view(parameter: Tensor, number: int) -> Tensor:
    """One head's part of a stacked parameter and of its gradient, in the same memory."""
    view = parameter.detach()[number].requires_grad_()
    view.grad = None if parameter.grad is None else parameter.grad[number]
    return view


def _clip_each(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale each head's gradients down where their common norm is above the limit, as clip_grad_norm_ does."""
    if max_norm <= 0:
        return
    norms_G = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]).norm(dim=0)
    scales_G = (max_norm / (norms_G + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scales_G.view(-1, *[1] * (gradient.ndim - 1)))
