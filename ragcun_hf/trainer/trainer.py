"""A `transformers.Trainer` for the three-term loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from ..evaluation.metrics.isotropy.measures import effective_rank, embedding_std
from .arguments import IsotropicGaussianTrainingArguments
from .callbacks import _NewEpoch
from .isotropy import SIGREG_NULL_FLOOR, random_directions, sigreg_statistic
from .known_pairs import KnownPairs, PairIds, QueryBalancedSampler
from .objective import Objective, resolve_weights
from .sharding import prepare_sharding, under_its_own_class


class IsotropicGaussianTrainer(Trainer):
    """Train a projection and a predictor with contrastive + isotropy + predictive terms.

    A term whose weight is 0 is not computed. Each term is logged unweighted under `loss/<term>`, beside measures
    that show a collapse: `embedding_std` (about 1 when healthy), `effective_rank` (at most the batch's rows) and
    `sigreg` (about `sigreg_floor` for a Gaussian batch, up to 0.4 per row when collapsed).

    Args:
        *args: As for `transformers.Trainer`.
        validation: Called with the model at every evaluation; its figures (e.g. `ndcg@10`) are logged with the
            prefix `eval_` and can select the best checkpoint.
        pair_ids: The ids of the training rows. With them a document that is known to answer a query, wherever in the
            data, is never its negative, and `balance_queries` can draw.
        eval_pair_ids: The same of the evaluation rows.
        **kwargs: As for `transformers.Trainer`; `args` is an `IsotropicGaussianTrainingArguments`.
    """

    # The loss is the mean of one batch, so under gradient accumulation the Trainer has to divide it.
    loss_is_scaled_for_ga = False

    args: IsotropicGaussianTrainingArguments

    def __init__(
        self,
        *args: Any,
        validation: Callable[[Any], dict[str, float]] | None = None,
        pair_ids: PairIds | None = None,
        eval_pair_ids: PairIds | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        prepare_sharding(self.accelerator, self.model)
        # There are no labels: the loss comes from the batch itself, in evaluation too.
        self.can_return_loss = True
        self.validation = validation
        # Looked up once: unwrapping walks through all modules of the encoder, at every step.
        config = self.accelerator.unwrap_model(self.model).config
        self.weights = resolve_weights(self.args, use_predictor=config.use_predictor)
        self._objectives = {
            mode: self._make_objective(config, None if ids is None else ids.known_pairs())
            for mode, ids in (("train", pair_ids), ("eval", eval_pair_ids))
        }
        self._sampler = self._make_sampler(pair_ids)
        self._term_sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._term_counts: dict[str, int] = {"train": 0, "eval": 0}
        self._last_embeddings: Tensor | None = None
        if self.weights["predictive"] > 0 and not config.use_predictor:
            raise ValueError(
                f"`lambda_predictive` is {self.weights['predictive']}, but the model has no predictor: "
                "build it with `use_predictor=True`, or set the weight to 0."
            )
        if not any(self.weights.values()):
            raise ValueError("All lambda weights are 0: there is nothing to train, set one above 0.")
        self.add_callback(_NewEpoch(self.train_dataset, self._sampler))

    def _make_sampler(self, pair_ids: PairIds | None) -> QueryBalancedSampler | None:
        if not self.args.balance_queries:
            return None
        if pair_ids is None:
            raise ValueError(
                "`balance_queries` needs rows that are known before training, got a stream or views drawn anew: leave "
                "it out."
            )
        return QueryBalancedSampler(pair_ids.query_ids, seed=self.args.seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return super()._get_train_sampler(train_dataset) if self._sampler is None else self._sampler

    def _make_objective(self, config: Any, known_pairs: KnownPairs | None) -> Objective:
        args = self.args
        return Objective(
            weights={name: weight for name, weight in self.weights.items() if weight > 0},
            contrastive_kind=args.contrastive_kind,
            temperature=args.temperature,
            margin=args.margin,
            similarity=config.similarity_fn_name,
            is_bidirectional=args.bidirectional,
            isotropy_kind=args.isotropy_kind,
            predictive_kind=args.predictive_kind,
            known_pairs=known_pairs,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Embed the whole batch in one forward and add up the weighted terms."""
        query_ids, document_ids = inputs["query_ids"], inputs["document_ids"]
        texts = {key: value for key, value in inputs.items() if key not in ("query_ids", "document_ids")}
        outputs = model(**texts, num_predicted=len(query_ids))
        objective = self._objectives[self._mode]
        terms = objective.terms(outputs, query_ids, document_ids, directions=self._directions(outputs))
        self._track(terms, outputs.embeddings, num_queries=len(query_ids))
        loss = objective.total(terms)
        return (loss, outputs) if return_outputs else loss

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _directions(self, outputs: Any) -> Tensor | None:
        """Draw SIGReg's directions; they follow from the step: the same on every process, and again after a resume."""
        if self.weights["isotropy"] == 0 or self.args.isotropy_kind != "sigreg":
            return None
        width, seed = outputs.embeddings.shape[1], self.args.seed + self.state.global_step
        return random_directions(width, self.args.num_directions, seed=seed).to(outputs.embeddings.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer, with the encoder's own learning rate where the encoder trains."""
        if self.optimizer is None:
            super().create_optimizer(model)
            unwrapped = self.accelerator.unwrap_model(self.model if model is None else model)
            encoder_parameters = set(unwrapped.encoder.parameters())
            for group in list(self.optimizer.param_groups):
                of_encoder = [parameter for parameter in group["params"] if parameter in encoder_parameters]
                if of_encoder:
                    group["params"] = [p for p in group["params"] if p not in encoder_parameters]
                    settings = {key: value for key, value in group.items() if key not in ("params", "lr")}
                    self.optimizer.add_param_group(
                        {"params": of_encoder, **settings, "lr": self.args.encoder_learning_rate}
                    )
        return self.optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train a pass, but nothing where a callback stopped the run before; transformers would take one more step."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with under_its_own_class(self.accelerator, self.model):
            super()._save(output_dir, state_dict)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Keep the last, smaller batch, which training drops; several processes fill it up with the first rows."""
        drops_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops_last

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the terms and the retrieval figures to the metrics, before callbacks choose by them."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_loss/{name}": value for name, value in self._pop_terms("eval").items()})
        if self.validation is not None:
            figures = self.validation(self.accelerator.unwrap_model(self.model))
            output.metrics.update({f"{prefix}_{name}": value for name, value in figures.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the terms and the collapse measures beside the training loss."""
        if "loss" in logs:
            logs.update({f"loss/{name}": value for name, value in self._pop_terms("train").items()})
            logs.update(self._collapse_measures())
        super().log(logs, *args, **kwargs)

    def _track(self, terms: dict[str, Tensor], embeddings: Tensor, *, num_queries: int) -> None:
        mode = self._mode
        # The Trainer averages the training loss over batches, and the evaluation loss over rows.
        weight = 1 if mode == "train" else num_queries
        sums = self._term_sums[mode]
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + weight * term.detach()
        self._term_counts[mode] += weight
        if mode == "train":
            self._last_embeddings = embeddings.detach()

    def _pop_terms(self, mode: str) -> dict[str, float]:
        """Return the means over all processes since the last call."""
        sums = self._term_sums[mode]
        if not sums:
            return {}
        count = next(iter(sums.values())).new_tensor(self._term_counts[mode])
        totals = self.accelerator.reduce(torch.stack([*sums.values(), count]), reduction="sum")
        means = dict(zip(sums, (totals[:-1] / totals[-1]).tolist(), strict=True))
        sums.clear()
        self._term_counts[mode] = 0
        return means

    def _collapse_measures(self) -> dict[str, float]:
        """Measure the last batch; `sigreg` over all processes, the others over this one's rows."""
        if self._last_embeddings is None:
            return {}
        rows = self._last_embeddings.float()
        directions = random_directions(rows.shape[1], self.args.num_directions, seed=self.args.seed).to(rows.device)
        # First, whatever the rows are: the other processes wait for it.
        sigreg = float(sigreg_statistic(rows, directions))
        if not bool(rows.isfinite().all()):
            return {}
        return {
            "embedding_std": float(embedding_std(rows)),
            "effective_rank": float(effective_rank(rows)),
            "sigreg": sigreg,
            "sigreg_floor": SIGREG_NULL_FLOOR,
        }
