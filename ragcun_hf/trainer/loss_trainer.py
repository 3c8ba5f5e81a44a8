"""A `transformers.Trainer` that computes the three-term loss of ready batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints

from ..distributed import gather_objects
from ..errors import UserError
from ..evaluation.metrics.isotropy.measures import effective_rank, embedding_std
from ..features.devices import moved
from ..files import write_checksums
from ..objective.arguments import IsotropicGaussianTrainingArguments, with_values
from ..objective.inputs import FeaturePairs
from ..objective.isotropy import SIGREG_NULL_FLOOR, random_directions, sigreg_statistic
from ..objective.known_pairs import PairIds, QueryBalancedRows
from ..objective.terms import Objective, resolve_weights
from .callbacks import EpochCallback, RestoredSums
from .record import RUNNING_SUMS_FILE
from .sharding import prepare_sharding, save_whole, whole_weights

if TYPE_CHECKING:
    from .record import Checkpoint

Evaluator = Callable[[Any], Mapping[str, float]]

logger = logging.getLogger(__name__)

_ONE_NAME = (
    "evaluator: expected one figure of each name, got {} twice: name the evaluator, as in RetrievalEvaluator(..., "
    "name='mine'), or rename the figure"
)


def check_names(evaluators: Sequence[Any]) -> None:
    """Refuse evaluators with the same `primary_metric`: one figure would replace the other in the log."""
    names = [name for each in evaluators if (name := getattr(each, "primary_metric", None))]
    for name in names:
        if names.count(name) > 1:
            raise UserError(_ONE_NAME.format(name))


class LossTrainer(Trainer):
    """Train a projection and a predictor with contrastive + isotropy + predictive terms.

    A term whose weight is 0 is not computed. Each term is logged unweighted under `loss/<term>`, beside measures
    that show a collapse: `embedding_std` (about 1 when healthy), `effective_rank` (at most the number of rows in the
    batch) and `sigreg` (about `sigreg_floor` for a Gaussian batch, up to 0.4 per row when collapsed).

    Args:
        *args: As for `transformers.Trainer`.
        evaluators: Called with the model at every evaluation. Their figures (e.g. `ndcg@10`) are logged with the
            prefix `eval_` and can select the best checkpoint.
        pair_ids: Ids of the training rows. With them, a document that is known to answer a query anywhere in the data
            is never its negative, and `balance_queries` can draw.
        eval_pair_ids: Ids of the evaluation rows.
        **kwargs: As for `transformers.Trainer`; `args` is an `IsotropicGaussianTrainingArguments`.
    """

    # The loss is the mean over a batch, so the Trainer has to divide it under gradient accumulation.
    loss_is_scaled_for_ga = False

    args: IsotropicGaussianTrainingArguments

    def __init__(
        self,
        *args: Any,
        evaluators: Sequence[Evaluator] = (),
        pair_ids: PairIds | None = None,
        eval_pair_ids: PairIds | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        prepare_sharding(self.accelerator, self.model)
        # There are no labels: the loss comes from the batch itself, in evaluation too.
        self.can_return_loss = True
        self.evaluators = list(evaluators)
        self.checkpoint: Checkpoint | None = None  # that `train` resumes from
        # Looked up once: unwrapping walks through all modules of the encoder.
        config = self.accelerator.unwrap_model(self.model).config
        self.weights = resolve_weights(self.args, use_predictor=config.use_predictor)
        if self.args.balance_queries:
            if pair_ids is None:
                raise ValueError(
                    "`balance_queries` needs rows that are known before training, got a stream or rows that are drawn "
                    "anew each epoch: leave it out."
                )
            self.train_dataset = QueryBalancedRows(self.train_dataset, pair_ids.query_ids, seed=self.args.seed)
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(EpochCallback(self.train_dataset, is_stream=not has_length(self.train_dataset)))
        self.add_callback(RestoredSums(self._restore_sums))
        self._similarity = config.similarity_fn_name
        self._objectives = {"train": self._objective(pair_ids), "eval": self._objective(eval_pair_ids)}
        self._term_sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._term_counts: dict[str, int] = {"train": 0, "eval": 0}
        self._last_embeddings: Tensor | None = None

    def _objective(self, ids: PairIds | None) -> Objective:
        """Make the loss of rows with these ids."""
        return Objective.of_arguments(
            self.args,
            {name: weight for name, weight in self.weights.items() if weight > 0},
            similarity=self._similarity,
            known_pairs=None if ids is None else ids.known_pairs(),
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Embed the whole batch in one forward pass and sum the weighted terms."""
        query_ids, document_ids = inputs["query_ids"], inputs["document_ids"]
        texts = {key: value for key, value in inputs.items() if key not in ("query_ids", "document_ids")}
        if isinstance(self.data_collator, FeaturePairs):
            texts = {"features": self.data_collator.features(query_ids, document_ids)}
        outputs = model(**texts, num_predicted=len(query_ids))
        directions = None
        if self.weights["isotropy"] > 0 and self.args.isotropy_kind == "sigreg":
            # They follow from the step: the same on every process, and again after a resume.
            width, seed = outputs.embeddings.shape[1], self.args.seed + self.state.global_step
            drawn = random_directions(width, self.args.num_directions, seed=seed)
            directions = moved(drawn, outputs.embeddings.device)
        objective = self._objectives[self._mode]
        terms = objective.terms(outputs, query_ids, document_ids, directions=directions)
        self._track(terms, outputs.embeddings, num_queries=len(query_ids))
        loss = objective.total(terms)
        return (loss, outputs) if return_outputs else loss

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer, with a learning rate of its own for an encoder that trains."""
        if self.optimizer is None:
            super().create_optimizer(model)
            unwrapped = self.accelerator.unwrap_model(self.model if model is None else model)
            layers = unwrapped.pooled_layers
            encoder_parameters = {*unwrapped.encoder.parameters(), *(() if layers is None else layers.parameters())}
            for group in list(self.optimizer.param_groups):
                of_encoder = [parameter for parameter in group["params"] if parameter in encoder_parameters]
                if of_encoder:
                    group["params"] = [p for p in group["params"] if p not in encoder_parameters]
                    settings = {key: value for key, value in group.items() if key not in ("params", "lr")}
                    self.optimizer.add_param_group(
                        {"params": of_encoder, **settings, "lr": self.args.encoder_learning_rate}
                    )
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # As in transformers, without a walk through all parameters of a frozen encoder at every step.
        if model is not self.model or not model.config.freeze_base:
            return super()._clip_grad_norm(model)
        heads = (child for child in model.children() if child is not model.encoder)
        parameters = [parameter for head in heads for parameter in head.parameters()]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            known = ", ".join(name for name in metrics if name.startswith("eval_"))
            raise UserError(
                f"--metric_for_best_model expects one of {known}, got {self.args.metric_for_best_model!r}: choose one"
            ) from error

    def get_train_dataloader(self) -> DataLoader:
        """Read balanced rows in the order of their draw; other rows are shuffled here."""
        loader = super().get_train_dataloader()
        if self.args.balance_queries:
            loader.set_sampler(SequentialSampler(self.train_dataset))
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Keep a smaller last batch, which training drops; several processes fill it up with the first rows."""
        rows: Any = self.eval_dataset
        if eval_dataset is not None:
            rows = rows[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        loader = DataLoader(
            rows,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        """Return no epoch for a run that is resumed at its end; transformers would train one more step."""
        num_epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        if self.checkpoint is not None and self.checkpoint.is_at_end(max_steps, args.early_stopping_patience):
            logger.warning("%s is of the last step: nothing is left to train.", self.checkpoint.path)
            num_epochs = 0
        return num_epochs, *others, max_steps

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, with running sums, and checksums written last; only then remove older ones."""
        sums = gather_objects(self._running_sums())
        limit = self.args.save_total_limit
        self.args = with_values(self.args, save_total_limit=None)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args = with_values(self.args, save_total_limit=limit)
        self.accelerator.wait_for_everyone()  # each process has saved its own random state
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save(self.args, checkpoint / TRAINING_ARGS_NAME)  # with the limit
            (checkpoint / RUNNING_SUMS_FILE).write_text(json.dumps(sums) + "\n", encoding="utf-8")
            write_checksums(checkpoint)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; whole, if it is sharded."""
        weights = whole_weights(self.accelerator, self.model)
        if weights is None:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_whole(self.model, folder, weights)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Return the loss and, for `compute_metrics`, embeddings and ids of queries and of their own documents."""
        num_queries = len(inputs["query_ids"])
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        embeddings = outputs.embeddings.float()
        ids = (inputs["query_ids"], inputs["document_ids"][:num_queries])
        return loss.detach(), (embeddings[:num_queries], embeddings[num_queries : 2 * num_queries]), ids

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the terms and the retrieval figures to the metrics, before callbacks choose by them."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_loss/{name}": value for name, value in self._pop_terms("eval").items()})
        for evaluator in self.evaluators:
            figures = evaluator(self.accelerator.unwrap_model(self.model))
            figures = {f"{prefix}_{name}": value for name, value in figures.items()}
            if twice := sorted(figures.keys() & output.metrics.keys()):
                raise UserError(_ONE_NAME.format(twice[0]))
            output.metrics.update(figures)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the terms and the collapse measures beside the training loss."""
        if "loss" in logs:
            logs.update({f"loss/{name}": value for name, value in self._pop_terms("train").items()})
            logs.update(self._collapse_measures())
        if "train_loss" in logs and self.checkpoint is not None:
            # The mean over all steps; transformers divides by the number of steps since the resume.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, *args, **kwargs)

    def _running_sums(self) -> dict[str, float]:
        """Return what this process has summed up for the next log line; `_restore_sums` reads it."""
        return {
            "loss": float(self._tr_loss),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "num_batches": self._term_counts["train"],
            **{f"loss/{name}": float(value) for name, value in self._term_sums["train"].items()},
        }

    def _restore_sums(self) -> None:
        """Let the next log line have the means over the same steps as that of a run without interruption."""
        self._term_sums, self._term_counts = {"train": {}, "eval": {}}, {"train": 0, "eval": 0}
        if self.checkpoint is None:
            return
        sums = self.checkpoint.running_sums(self.args.process_index, self.args.world_size)
        # transformers has no public place for these.
        self._tr_loss.fill_(sums.pop("loss"))
        self._total_loss_scalar = sums.pop("logged_loss")
        self._globalstep_last_logged = int(sums.pop("logged_step"))
        self._term_counts["train"] = int(sums.pop("num_batches"))
        device = self._tr_loss.device
        terms = {name.removeprefix("loss/"): torch.tensor(value, device=device) for name, value in sums.items()}
        self._term_sums["train"] = terms

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
        """Measure the last batch: `sigreg` over all processes, the other measures over the rows of this one."""
        if self._last_embeddings is None:
            return {}
        rows = self._last_embeddings.float()
        directions = random_directions(rows.shape[1], self.args.num_directions, seed=self.args.seed).to(rows.device)
        # First, even if the rows are not finite: the other processes wait for it.
        sigreg = float(sigreg_statistic(rows, directions))
        if not bool(rows.isfinite().all()):
            return {}
        return {
            "embedding_std": float(embedding_std(rows)),
            "effective_rank": float(effective_rank(rows)),
            "sigreg": sigreg,
            "sigreg_floor": SIGREG_NULL_FLOOR,
        }
