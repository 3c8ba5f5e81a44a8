"""Arguments of a training run: weights and kinds of the three loss terms, start, features, and the Trainer's own."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, TypeVar, get_args

import torch
from transformers import TrainingArguments

from ..command_line import argument, recipe_values
from ..data.splitting import SplitMethod
from ..features.arguments import FeatureArguments
from ..model.arguments import ModelArguments

ContrastiveKind = Literal["info_nce", "triplet"]
IsotropyKind = Literal["sigreg", "covariance"]
PredictiveKind = Literal["mse", "cosine"]

Arguments = TypeVar("Arguments")


@dataclass
class IsotropicGaussianTrainingArguments(FeatureArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the loss terms, the start of the head, its features and its blend.

    Fields of the parents are declared again if their default differs or if a fact is added.

    Example:
        >>> from ragcun_hf import IsotropicGaussianTrainingArguments
        >>> arguments = IsotropicGaussianTrainingArguments(output_dir="out", lambda_isotropy=1.5, use_cpu=True)
        >>> arguments.lambda_isotropy, arguments.isotropy_kind
        (1.5, 'sigreg')
    """

    lambda_contrastive: float = argument(
        1.0, "Weight of the contrastive term, >= 0; 0 skips the term.", essential=1, swept="number"
    )
    lambda_isotropy: float = argument(
        0.1,
        "Weight of the isotropy term, >= 0; 0 skips the term. Weights of 1 and more pull embeddings so hard towards "
        "N(0, I) that retrieval gets worse (EXPERIMENTS.md).",
        essential=2,
        swept="number",
    )
    lambda_predictive: float | None = argument(
        None,
        "Weight of the predictive term, >= 0; 0 skips the term. Default: 1 with a predictor, 0 without.",
        essential=3,
        swept="number",
    )
    contrastive_kind: ContrastiveKind = argument(
        "info_nce",
        "info_nce: pick the query's own document among all documents in the batch; triplet: Euclidean margin.",
        essential=4,
        swept="shape",
    )
    temperature: float = argument(
        0.05,
        "Temperature of info_nce, > 0. A smaller one concentrates the loss on the hardest negatives.",
        recorded="always",
        swept="number",
    )
    bidirectional: bool = argument(
        False, "Average info_nce over both directions: documents also pick their queries.", swept="shape"
    )
    margin: float = argument(0.1, "Margin of triplet, >= 0: a Euclidean distance between embeddings.", swept="number")
    matryoshka_dims: list[int] = argument(
        [],
        "Also compute the contrastive term on the first k coordinates of embeddings, for each k named here, so that "
        "embeddings can be cut to these widths (truncate_dim).",
    )
    isotropy_kind: IsotropyKind = argument(
        "sigreg",
        "sigreg: sliced Epps-Pulley statistic against N(0, I), per row; covariance: penalty of the original.",
        essential=5,
        swept="shape",
    )
    num_directions: int = argument(
        256, "Random directions of sigreg per step, >= 1. The cost grows linearly.", swept="shape"
    )
    predictive_kind: PredictiveKind = argument(
        "mse",
        "How predictions are compared with document embeddings, which get no gradient: mse or cosine.",
        recorded="always",
        swept="shape",
    )
    balance_queries: bool = argument(
        False, "Use every query once per epoch, with one of its documents, so that all queries count alike."
    )
    whitening: float = argument(
        0.0,
        "Partial whitening of an identity initialization, in [0, 0.5]; 0 is none, and 0.1 to 0.3 can help.",
        swept="number",
    )
    blend: float = argument(
        1.0,
        "Weight of the trained head in the saved one, in [0, 1]: 1 saves the trained head, a smaller value stays "
        "closer to the frozen base.",
    )
    val_fraction: float = argument(
        0.0, "Without validation data: fraction of the documents to hold out with their queries, in [0, 1)."
    )
    split_method: SplitMethod = argument(
        "sentence",
        "For documents without labels, which part is the query. half: the first half; random: the shorter part of a "
        "split at any point; prefix or suffix: the first or last part; sentence: one random sentence, which gained "
        "most where it was measured (EXPERIMENTS.md).",
    )
    split_fraction: float = argument(0.25, "Fraction of the words that prefix and suffix take, in (0, 1).")
    automatic: bool = argument(
        False,
        "For documents without labels: draw pseudo-queries of each document as queries. Those of held-out documents "
        "choose initialization, head, length of training and blend, or keep the base if nothing helps.",
    )
    shuffle_buffer_size: int = argument(
        10_000, "For a stream: rows in memory, from which the next row is drawn; 1 keeps the order of the source."
    )
    measure_energy: bool = argument(
        False, "Estimate the energy of encoding and training for record and card; needs the extra energy."
    )
    encoder_learning_rate: float = argument(2e-5, "Learning rate of encoder weights that are not frozen, > 0.")
    early_stopping_patience: int | None = argument(
        None,
        "Stop after this many evaluations without a better validation NDCG@10; needs --val_data or --val_fraction.",
    )

    num_train_epochs: float = argument(3.0, "Passes over the training rows.", "--epochs", essential=6, swept="shape")
    per_device_train_batch_size: int = argument(
        32,
        "Rows per process and step. A larger batch gives each query more in-batch negatives.",
        "--batch_size",
        essential=7,
        swept="shape",
    )
    per_device_eval_batch_size: int | None = argument(  # type: ignore[assignment]
        None, "Rows per process in an evaluation. Default: as in training, so that the two losses are comparable."
    )
    learning_rate: float = argument(
        3e-4, "Peak learning rate of projection and predictor.", essential=8, swept="number"
    )
    warmup_steps: float = argument(
        0.1, "Steps of linear warm-up; a value below 1 is a share of all steps.", swept="shape"
    )
    weight_decay: float = argument(0.01, "Weight decay of AdamW, not applied to biases.", swept="number")
    logging_steps: float = argument(10, "Steps between two log lines; a value below 1 is a share of all steps.")
    save_total_limit: int | None = argument(2, "Checkpoints to keep. Each holds the encoder too.")
    dataloader_drop_last: bool = argument(
        True, "Drop the last batch of an epoch if it is smaller: it has fewer negatives and a noisier isotropy term."
    )
    logging_nan_inf_filter: bool = argument(
        False, "Leave losses that are not finite out of the log. False shows a divergence."
    )
    remove_unused_columns: bool = argument(
        False, "Must stay False: the collator reads columns that the model does not."
    )
    label_names: list[str] | None = argument([], "Must stay empty: there are no labels.")

    seed: int = argument(42, "Seed of initialization, order of rows and dropout.", recorded="always")
    output_dir: str | None = argument(None, "Folder of the model and its checkpoints.", recorded="never")
    resume_from_checkpoint: str | None = argument(
        None, "Continue the run of this checkpoint: a folder, or the word last.", recorded="never"
    )
    disable_tqdm: bool | None = argument(None, "Hide progress bars.", recorded="never")
    use_cpu: bool = argument(False, "Train on the CPU even if there is an accelerator.", recorded="never")
    hub_token: str | None = argument(
        None, "Token for --push_to_hub. Default: the one saved by hf auth login.", recorded="never"
    )
    accelerator_config: dict | str | None = argument(
        None, "Settings of accelerate: a JSON file or an object.", recorded="never"
    )
    dataloader_pin_memory: bool = argument(True, "Pin memory for copies to an accelerator.", recorded="never")

    model_fields: dict[str, Any] = field(default_factory=dict, init=False)
    """Fields of the model's configuration that a recipe sets."""

    @classmethod
    def from_recipe(cls, name_or_file: str, **overrides: Any) -> Self:
        """Read a recipe: what `--recipe` gives the training commands.

        A recipe may also set fields of the model's configuration, such as `projection_hidden_dim`. The Trainer gives
        them to a model of `from_encoder` whose head is untrained, except for fields that were named there.

        Args:
            name_or_file: The name of a shipped recipe, such as `adapt`, or a YAML file.
            **overrides: Any of the arguments, or of the model's configuration, with other values.

        Returns:
            The arguments; the recipe's encoder is left out, because the Trainer is given a model.

        Raises:
            UserError: If there is no such recipe or argument.

        Example:
            >>> from ragcun_hf import IsotropicGaussianTrainingArguments
            >>> arguments = IsotropicGaussianTrainingArguments.from_recipe("adapt", output_dir="mine", max_steps=50)
            >>> arguments.blend, arguments.max_steps, arguments.model_fields
            (0.4, 50, {'projection_hidden_dim': 2048})
        """
        values = recipe_values(name_or_file, [ModelArguments, cls], overrides)
        of_config = ModelArguments(**{name: values[name] for name in _names(ModelArguments) & values.keys()})
        model_fields = {name: value for name, value in of_config.config_fields().items() if name in values}
        arguments = cls(**{name: values[name] for name in _names(cls) & values.keys()})
        return with_values(arguments, model_fields=model_fields)

    def __post_init__(self) -> None:
        """Check our own values, then let the parent check its own."""
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        self.check_values()
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # The parent looks only at the end of the name and would maximize eval_loss/contrastive.
            self.greater_is_better = not self.metric_for_best_model.removeprefix("eval_").startswith("loss")
        # Without this, accelerate does not let several processes train together on a machine without accelerators.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        # The tensors of a batch differ in length (queries, documents, both), so accelerate must not slice a batch.
        # Each process reads its own batches of a stream instead.
        accelerator_config: Any = self.accelerator_config
        accelerator_config.dispatch_batches = accelerator_config.split_batches = False
        # If one process had no last batch, the others would wait for its rows forever.
        accelerator_config.even_batches = True
        # Without an accelerator, pinned memory only causes a warning in every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()

    def check_values(self) -> None:
        """Raise a ValueError that names the field if a weight, rate, count or kind is out of range."""
        above_0 = ("temperature", "learning_rate", "encoder_learning_rate")
        at_least_0 = ("lambda_contrastive", "lambda_isotropy", "lambda_predictive", "margin", "weight_decay")
        for name in (*at_least_0, *above_0):
            value, bound = getattr(self, name), "above 0" if name in above_0 else "of at least 0"
            if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and name in at_least_0))):
                raise ValueError(f"`{name}` must be a finite number {bound}, got {value}.")
        if self.lambda_contrastive == self.lambda_isotropy == 0 and self.lambda_predictive == 0:
            raise ValueError("All three lambda weights are 0: there is nothing to train, set one above 0.")
        counts = {
            "batch_size": self.per_device_train_batch_size,
            "per_device_eval_batch_size": self.per_device_eval_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "num_directions": self.num_directions,
            "early_stopping_patience": self.early_stopping_patience,
            "shuffle_buffer_size": self.shuffle_buffer_size,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        if any(width < 1 for width in self.matryoshka_dims):
            raise ValueError(f"`matryoshka_dims` must be widths of at least 1, got {self.matryoshka_dims}.")
        if self.max_steps <= 0 and not (math.isfinite(self.num_train_epochs) and self.num_train_epochs > 0):
            raise ValueError(f"`epochs` must be a finite number above 0, got {self.num_train_epochs}.")
        self._check_shares_and_kinds()

    def _check_shares_and_kinds(self) -> None:
        ranges = {"whitening": "[0, 0.5]", "blend": "[0, 1]", "val_fraction": "[0, 1)"}
        in_range = (0 <= self.whitening <= 0.5, 0 <= self.blend <= 1, 0 <= self.val_fraction < 1)
        for (name, interval), is_in_range in zip(ranges.items(), in_range, strict=True):
            if not is_in_range:
                raise ValueError(f"`{name}` must be in {interval}, got {getattr(self, name)}.")
        kinds = {"contrastive": ContrastiveKind, "isotropy": IsotropyKind, "predictive": PredictiveKind}
        for term, choices in kinds.items():
            if (kind := getattr(self, f"{term}_kind")) not in get_args(choices):
                raise ValueError(f"`{term}_kind` must be one of {', '.join(get_args(choices))}, got {kind!r}.")


def _names(dataclass_type: type) -> set[str]:
    return {each.name for each in fields(dataclass_type) if each.init}


def with_values(arguments: Arguments, **values: Any) -> Arguments:
    """Return a copy of an arguments object with other values; the only place that sets one after its creation."""
    # `dataclasses.replace` would run `__post_init__` again, which resets what accelerate knows of the processes.
    changed = copy.copy(arguments)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed
