"""The Trainer: a model, arguments and a dataset in; a trained, saved and published head out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import ProgressCallback, set_seed
from transformers.trainer_utils import TrainOutput

from ..command_line import say
from ..data.documents import read_documents
from ..data.stream import ShuffledStream
from ..data.training_rows import TableRows, TrainingRows
from ..errors import UserError
from ..evaluation.validation import RetrievalValidation
from ..features.arguments import FeatureArguments
from ..files import disk_errors_explained, encoder_name, owned_folder
from ..model.arguments import ModelArguments
from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
from ..objective.arguments import IsotropicGaussianTrainingArguments, with_values
from ..objective.head_weights import trainable_weights
from ..objective.inputs import TrainerInputs, feature_inputs, retrieval_validation, text_inputs
from ..objective.lexical import prepare_lexical_half
from ..sweep.automatic import CHOSEN_FIELDS, ChosenSettings, choose_settings
from .callbacks import LogTimes, StreamPosition, TermsProgressCallback, TrackedPlots, early_stopping
from .data import TrainingData, read_held_out
from .loss_trainer import Evaluator, LossTrainer, check_names
from .plan import RunPlan, check_run, find_facts, plan_run
from .push import PlannedPush, plan_push, write_training_card
from .record import (
    calibrate,
    check_and_blend,
    check_model_flags,
    essential_arguments,
    measured_energy,
    open_checkpoint,
    recorded_arguments,
    save_run,
)
from .sharding import whole_weights

if TYPE_CHECKING:
    from ..features.feature_store import FeatureStore

logger = logging.getLogger(__name__)


class IsotropicGaussianTrainer(LossTrainer):
    """Train the head of a model: a `transformers.Trainer` for the contrastive, isotropy and predictive terms.

    The encoder, if it is frozen, runs once per distinct text when the Trainer is made; its features are cached on disk
    and the head trains on them. The head starts as the arguments say, the best checkpoint is kept, and the trained
    head is blended with its start. A model of `from_encoder` gets a new head from the seed of the arguments, with the
    fields that a recipe sets; any other model goes on from its weights. Where documents choose kind and width of the
    projection, a model that was made with either is refused.

    Each loss term is logged unweighted under `loss/<term>`, beside measures that show a collapse (see `LossTrainer`).

    Args:
        model: The model to train.
        args: The arguments, e.g. of a recipe. Default: all defaults, with `output_dir="tmp_trainer"`.
        train_dataset: A `Dataset`, an `IterableDataset` or a list of rows, or a dictionary of several. Rows have the
            texts `query`, `positive` and optionally `negative` or `negative_1`, `negative_2` and so on; rows with only
            a `text` are documents without labels, of whose parts the rows are made.
        eval_dataset: Held-out pairs, likewise. Loss and NDCG@10 are measured on them, and NDCG@10 chooses the
            checkpoint. Default: `args.val_fraction` of the documents, with their queries.
        corpus: Documents (rows with a `text` and optionally a `title`, or strings) that held-out queries search
            besides their own: with all documents of a collection, validation is as hard as the search will be.
        evaluator: One or more functions of the model that return figures, such as a `RetrievalEvaluator`. The figures
            are logged with the prefix `eval_` at every evaluation. `eval_ndcg@10` is that of `eval_dataset`: give a
            `RetrievalEvaluator` a `name`, so that its figures have names of their own.
        callbacks: As in transformers.
        **kwargs: Other arguments of `transformers.Trainer`, such as `optimizers`. `compute_metrics` gets, as
            `predictions`, the embeddings (N, D) of the held-out queries and of their documents, and, as `label_ids`,
            the ids (N,) of both, equal for equal texts.

    Raises:
        UserError: If a dataset has another form, or arguments contradict each other or the data.

    Example:
        >>> from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments
        >>> model = IsotropicGaussianModel.from_encoder("embedded")  # doctest: +SKIP
        >>> args = IsotropicGaussianTrainingArguments.from_recipe("adapt", output_dir="mine")  # doctest: +SKIP
        >>> trainer = IsotropicGaussianTrainer(model, args, train_dataset=pairs)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: IsotropicGaussianModel,
        args: IsotropicGaussianTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        corpus: Any = None,
        evaluator: Evaluator | Sequence[Evaluator] | None = None,
        callbacks: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        args = IsotropicGaussianTrainingArguments(output_dir="tmp_trainer") if args is None else args
        _check_types(model, args)
        if isinstance(train_dataset, TrainingData):
            self.data = train_dataset
        else:
            self.data = TrainingData.of_datasets(train_dataset, eval_dataset, corpus, args)
        self._given_evaluators = [evaluator] if callable(evaluator) else list(evaluator or ())
        if evaluator is not None and self.data.validation is None:
            raise UserError("expected held-out pairs beside evaluator, got none: give eval_dataset or val_fraction")
        check_names([RetrievalValidation, *self._given_evaluators])
        self._given_args, self._seconds_of_features = args, 0.0
        self._store: FeatureStore | None = None
        self._energy: list[dict[str, Any]] = []
        self._run_callbacks: list[Any] = []
        self._validation_figures: dict[str, float] = {}
        self._chosen: ChosenSettings | None = None
        self._blend = 1.0  # of the weights that the model has
        self._prepare_lexical(model)
        set_seed(args.seed)
        if model.is_untrained:
            model.reset_head(**_recipe_fields(model, args))
        _check_optimizer(model, kwargs.get("optimizers"))
        self.plan = self._planned(model)
        self._of_documents = self._plan_documents() if self.data.documents and model.is_untrained else None
        # The token is tested now, not after hours of training.
        self._push: PlannedPush | None = plan_push(args) if args.push_to_hub and args.process_index == 0 else None
        model.to(args.device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
        inputs = self._encoded(model)
        self._validation = None
        if self.data.validation is not None:
            self._validation = retrieval_validation(self.data.validation, self._store, corpus=self.data.corpus)
        own = [] if self._validation is None else [self._validation]
        super().__init__(
            model=model,
            args=_without_token(self.plan.arguments),  # a copy, so that later changes are seen
            data_collator=inputs.collator,
            train_dataset=inputs.train_rows,
            eval_dataset=inputs.validation_rows,
            evaluators=[*own, *self._given_evaluators],
            pair_ids=inputs.pair_ids,
            eval_pair_ids=inputs.eval_pair_ids,
            callbacks=list(callbacks),
            **kwargs,
        )
        # The plots run the model in the main process alone, where a sharded model would wait for the others.
        if args.report_to and not self.accelerator.is_fsdp2:
            TrackedPlots(inputs.sample).attach(self)
        self.add_callback(LogTimes)
        if not args.disable_tqdm and self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TermsProgressCallback)

    def _prepare_lexical(self, model: IsotropicGaussianModel) -> None:
        """Give the model the lexical half that the arguments, or its configuration, ask for."""
        args = self._given_args
        checkpoint = open_checkpoint(Path(str(args.output_dir)), args.resume_from_checkpoint)
        facts = prepare_lexical_half(
            model,
            self.data.known_documents,
            is_wanted=args.lexical,
            fields={**args.model_fields, **model.given_fields},
            checkpoint=None if checkpoint is None else checkpoint.path,
        )
        self.data = replace(self.data, facts={**self.data.facts, **facts})

    def _planned(self, model: IsotropicGaussianModel, **facts: Any) -> RunPlan:
        encoder = None if model.supports_gradient_checkpointing else type(model.encoder).__name__
        facts = {"is_untrained": model.is_untrained, "given_fields": model.given_fields, **facts}
        facts["without_checkpointing"] = encoder
        facts["has_foreign_code"] = model.has_foreign_code
        found = find_facts(self._given_args, model.config, self.data, **facts)
        check_run(self._given_args, found)
        return plan_run(self._given_args, found)

    def _encoded(self, model: IsotropicGaussianModel) -> TrainerInputs:
        """Encode what the run trains on, and start the projection from it."""
        started, args = time.perf_counter(), self.plan.arguments
        with measured_energy(args.measure_energy and args.process_index == 0) as energy:
            self._store = args.store(model) if self.plan.facts.uses_features else None
            inputs = self._inputs(model, self.data.train, self.data.validation)
            if self._store is not None:
                say(self._store.summary())
            self._sample = inputs.sample
            if self.data.automatic is None and model.is_untrained:
                self._start_projection(model)
        self._energy.append(energy)
        self._seconds_of_features = time.perf_counter() - started
        return inputs

    def _inputs(
        self, model: IsotropicGaussianModel, train: TrainingRows, validation: TrainingRows | None
    ) -> TrainerInputs:
        if self._store is None:
            return text_inputs(model, train, validation)
        return feature_inputs(model, train, validation, self._store)

    def _start_projection(self, model: IsotropicGaussianModel) -> None:
        whitening, is_ordered = self.plan.arguments.whitening, bool(self.plan.arguments.matryoshka_dims)
        if model.config.output_dim < model.config.feature_dim or whitening or is_ordered:
            model.start_from_features(self._sample(), whitening=whitening, is_ordered=is_ordered)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as planned, blend the trained head with its start, and measure the result on held-out pairs.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last one in `args.output_dir`. Default: that
                of the arguments.
            trial: As in transformers.
            ignore_keys_for_eval: As in transformers.

        Returns:
            The `TrainOutput` of transformers. The model is saved by `save_model`.
        """
        with self._owned(self.args.output_dir):
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _owned(self, folder: Any) -> AbstractContextManager[None]:
        """Own an output folder; of several processes, the first one does."""
        return owned_folder(Path(str(folder))) if self.is_world_process_zero() else nullcontext()

    def _train(self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: Any) -> TrainOutput:
        planned = vars(_without_token(self.plan.arguments))
        changed = {name: value for name, value in vars(self.args).items() if planned[name] != value}
        self._given_args = with_values(self._given_args, **changed)
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        self.checkpoint = open_checkpoint(
            Path(str(self.args.output_dir)), "last" if wanted is True else wanted or None
        )
        path = None if self.checkpoint is None else self.checkpoint.path
        model = self.accelerator.unwrap_model(self.model)
        model.config.relevance_calibration = None  # of the weights before
        self.plan = self._planned(model, checkpoint=self.checkpoint, chosen=self._chosen)
        with measured_energy(self.args.measure_energy and self.args.process_index == 0) as energy:
            started = time.perf_counter()
            self._find_start(model)
            self._seconds_of_features += time.perf_counter() - started
            self.args = _without_token(self.plan.arguments)
            for warning in self.plan.warnings:
                logger.warning(warning)
            self._attach_run_callbacks()
            start = trainable_weights(model) if self.args.blend < 1 else {}
            output, self._blend = TrainOutput(0, 0.0, {}), 1.0
            try:
                if self.args.blend > 0:
                    with disk_errors_explained(Path(str(self.args.output_dir))):
                        output = super().train(path, trial, ignore_keys_for_eval)
                    output = output._replace(training_loss=output.metrics["train_loss"])
            finally:
                model.is_untrained = False  # after an interruption, too: the weights are no longer those of the start
        self._energy.append(energy)
        self._validation_figures = check_and_blend(self, start, self.args.blend, self._validation)
        self._blend = self.args.blend
        if self.args.fall_back and self._validation_figures["saved"] <= self._validation_figures["base"]:
            self._fall_back(model)
        rows = self.data.validation
        # Pseudo-queries, which are drawn anew each epoch, are not calibrated as real queries are.
        calibrate(model, None if rows is None or rows.known_pairs() is None else self._validation)
        return output

    def _fall_back(self, model: IsotropicGaussianModel) -> None:
        """Make the model the unchanged frozen base."""
        model.reset_head(projection_kind="linear", projection_hidden_dim=None)
        self.optimizer = None  # of the head before
        self._blend = 0.0
        figures = self._validation_figures
        self._validation_figures = {**figures, "trained": figures["saved"], "saved": figures["base"]}
        say("The trained head is no better than the frozen base on held-out pairs: the model is the unchanged base.")

    def _find_start(self, model: IsotropicGaussianModel) -> None:
        """Bring the head to where training on the rows begins."""
        if self.data.automatic is not None and model.is_untrained:
            self._choose(model)
        if self._of_documents is not None and model.is_untrained:
            self._train_on_documents(model, *self._of_documents)
        if self.checkpoint is not None:
            check_model_flags(model.config, Path(self.checkpoint.path))

    def _choose(self, model: IsotropicGaussianModel) -> None:
        """Choose the settings of an automatic run."""
        if self.data.automatic is None or self._store is None:
            raise ValueError("expected an automatic run on features")  # check_run has refused any other
        chosen, facts = choose_settings(self.data.automatic, model, self._given_args, self._store)
        self._chosen = chosen
        self.plan = self._planned(model, checkpoint=self.checkpoint, chosen=chosen)
        self.data = replace(self.data, facts={**self.data.facts, **facts})
        self._reset_head(model, chosen.model)

    def _reset_head(self, model: IsotropicGaussianModel, chosen: Mapping[str, Any]) -> None:
        """Make the head and its start from the seed, so that nothing that was tried before matters."""
        set_seed(self._given_args.seed)
        model.reset_head(**{**_recipe_fields(model, self._given_args), **chosen})
        self._start_projection(model)

    def _plan_documents(self) -> tuple[IsotropicGaussianTrainingArguments, TrainingData]:
        """Return arguments and data of the run on documents without labels that comes first."""
        args = self.plan.arguments
        of_features = {each.name: getattr(args, each.name) for each in fields(FeatureArguments)}
        shared = {name: getattr(args, name) for name in ("output_dir", "seed", "use_cpu", "disable_tqdm", "bf16")}
        # The model has the lexical half of the whole run, or none.
        own = type(args).from_recipe("unlabelled", **of_features, **shared, lexical=False, report_to="none")
        kept = {name: value for name, value in args.model_fields.items() if name not in CHOSEN_FIELDS}
        own = with_values(own, model_fields=kept)
        documents = read_documents(list(self.data.documents), name="documents")
        return own, TrainingData.of_documents(documents, None, own, {"train": ["documents"]})

    def _train_on_documents(
        self, model: IsotropicGaussianModel, args: IsotropicGaussianTrainingArguments, data: TrainingData
    ) -> None:
        """Give the head its start: train it without labels, or keep the recipe's own start if that does not help."""
        say(f"First, a head is trained on {len(self.data.documents):,} documents without labels.")
        first = IsotropicGaussianTrainer(model, args, data)
        first.train()
        names = ("pseudo_queries", "held_out_pseudo_queries", "chosen", "tried")
        facts = {f"documents_{name}": first.data.facts[name] for name in names}
        self.data = replace(self.data, facts={**self.data.facts, **facts})
        if first.args.blend == 0:
            model.is_untrained = True
            self._reset_head(model, {})

    def _attach_run_callbacks(self) -> None:
        """Attach what depends on the checkpoint to resume from."""
        for callback in self._run_callbacks:
            self.remove_callback(callback)
        self._run_callbacks = []
        if self.args.early_stopping_patience is not None:
            self._run_callbacks.append(early_stopping(self.args.early_stopping_patience, self.checkpoint))
        if isinstance(self.data.train, ShuffledStream):
            self._run_callbacks.append(StreamPosition(self, self.data.train, self.checkpoint))
        for callback in self._run_callbacks:
            self.add_callback(callback)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the model on held-out pairs.

        Args:
            eval_dataset: Pairs in any form that `eval_dataset` of the Trainer may have. Default: those.
            ignore_keys: As in transformers.
            metric_key_prefix: As in transformers.

        Returns:
            Loss, loss terms and NDCG@10, and the figures of the evaluators, with the prefix.
        """
        if eval_dataset is None:
            if self.data.validation is None:
                raise UserError("evaluate expects held-out pairs, got none: name eval_dataset here or in the Trainer")
            return super().evaluate(None, ignore_keys, metric_key_prefix)
        model, rows = self.accelerator.unwrap_model(self.model), TableRows(read_held_out(eval_dataset))
        inputs = self._inputs(model, rows, None)
        own, given = (self.data_collator, self.evaluators, self._objectives["eval"]), self._given_evaluators
        validation = retrieval_validation(rows, self._store, corpus=self.data.corpus)
        try:
            self.data_collator, self.evaluators = inputs.collator, [validation, *given]
            self._objectives["eval"] = self._objective(inputs.pair_ids)
            return super().evaluate(inputs.train_rows, ignore_keys, metric_key_prefix)
        finally:
            self.data_collator, self.evaluators, self._objectives["eval"] = own

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error: there are no labels to predict.

        Args:
            *args: As in transformers.
            **kwargs: As in transformers.

        Raises:
            UserError: Always.
        """
        raise UserError("predict has no labels here: call evaluate for figures, or model.encode for embeddings")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with its tokenizer, training record and digests of its documents, all at once.

        Args:
            output_dir: The folder; default: `args.output_dir`.
            _internal_call: For transformers, which saves checkpoints with it.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        weights = whole_weights(self.accelerator, self.model)
        folder = Path(output_dir or str(self.args.output_dir))
        if self.is_world_process_zero():
            with owned_folder(folder):
                save_run(self, folder, self.record(), weights)
        self.accelerator.wait_for_everyone()
        # The place of its weights, from which an evaluation tells what was measured.
        self.accelerator.unwrap_model(self.model).name_or_path = str(folder)

    def create_model_card(
        self, language: str | Sequence[str] | None = None, license: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Write the card, README.md, into `args.output_dir`, where the model must be saved.

        Args:
            language: Codes of the languages that the model is for, such as `en`.
            license: An id of the Hub such as `mit`; default: that of the base if it is known, else none.
            *args: Ignored, as the rest of the card is written from the training record.
            **kwargs: Ignored.
        """
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            write_training_card(folder, self.args.hub_model_id, license_id=license, language=language)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model, write its card and send both to the Hub, in one commit.

        Args:
            commit_message: Title of the commit.
            blocking: Must be True.
            token: Default: `args.hub_token`, or the one saved by `hf auth login`.
            revision: Branch; default: `args.hub_revision`.
            private: Whether a new repository is private; default: `args.hub_private_repo`.
            language: As in `create_model_card`.
            license: As in `create_model_card`.
            **kwargs: Must be empty.

        Returns:
            The `CommitInfo`, in the main process.

        Raises:
            UserError: If the Hub refuses the model; it is then saved in `args.output_dir`.
        """
        if kwargs or not blocking:
            raise TypeError(f"push_to_hub sends one commit and waits for it, got {kwargs or 'blocking=False'}")
        self.save_model()
        if not self.is_world_process_zero():
            return None
        if self._push is None or token or revision or private is not None:
            self._push = plan_push(self._given_args, token=token, revision=revision, private=private)
        folder = Path(str(self.args.output_dir))
        write_training_card(folder, self._push.repo_id, license_id=license, language=language)
        return self._push.send(folder, commit_message)

    def record(self) -> dict[str, Any]:
        """Return what a reader of the model wants to know of its training, without the log."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        training_seconds = (self.state.log_history or [{}])[-1].get("train_runtime", 0.0)
        base = {"base_model": encoder_name(model.config.base_model_name or "")}
        resolved = {f"lambda_{term}": weight for term, weight in self.weights.items()}
        measured = [each for each in self._energy if each]
        energy = {"kwh": sum(each["kwh"] for each in measured), "by": measured[0]["by"]} if measured else None
        return {
            "model": {**asdict(ModelArguments.of_config(model.config)), **base},
            "seconds": {"features": round(self._seconds_of_features, 2), "training": round(training_seconds, 2)},
            "features": None if self._store is None else self._store.settings(),
            "steps": self.state.global_step,
            "blend": self._blend,
            "training_arguments": {**recorded_arguments(args), **resolved},
            "essential": essential_arguments(args),
            "data": self.data.facts,
            "energy": energy,
            "validation_ndcg@10": self._validation_figures,
        }


def _without_token(args: IsotropicGaussianTrainingArguments) -> IsotropicGaussianTrainingArguments:
    """Return a copy without the token: the Trainer of transformers writes its arguments into every checkpoint."""
    return with_values(args, hub_token=None)


def _recipe_fields(model: IsotropicGaussianModel, args: IsotropicGaussianTrainingArguments) -> dict[str, Any]:
    """Return what a recipe sets of the model, but not what was named when it was made."""
    fixed = {*model.given_fields, "lexical_dim", "lexical_weight"}  # of the lexical half, which is fitted by now
    return {name: value for name, value in args.model_fields.items() if name not in fixed}


def _check_optimizer(model: IsotropicGaussianModel, optimizers: Any) -> None:
    """Refuse an optimizer whose parameters are not the model's: those of a head that was replaced train nothing."""
    optimizer = (optimizers or (None,))[0]
    own = {id(parameter) for parameter in model.parameters()}
    given = [] if optimizer is None else [each for group in optimizer.param_groups for each in group["params"]]
    if any(id(parameter) not in own for parameter in given):
        raise UserError(
            "optimizers: expected parameters of the model, got others: an untrained model gets a new head, so give "
            "optimizer_cls_and_kwargs instead, or load a saved model"
        )


def _check_types(model: Any, args: Any) -> None:
    if not isinstance(model, IsotropicGaussianModel):
        raise UserError(
            f"expected an IsotropicGaussianModel, got {type(model).__name__}: make one with "
            "IsotropicGaussianModel.from_encoder"
        )
    if not isinstance(args, IsotropicGaussianTrainingArguments):
        kind = type(args).__name__
        hint = "use IsotropicGaussianTrainingArguments, which takes the same arguments and more"
        raise UserError(f"expected IsotropicGaussianTrainingArguments, got {kind}: {hint}")
