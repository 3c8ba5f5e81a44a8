"""Arguments of a training run: the Trainer's own, and what weighs and shapes the three loss terms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainingArguments

from ..command_line import argument
from ..features.arguments import FeatureArguments
from ..model.arguments import ModelArguments

if TYPE_CHECKING:
    pass


@dataclass
class IsotropicGaussianTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the three terms' weights and shapes.

    The fields declared below that the parent has too differ from it in their default; each help says how.

    Example:
        >>> from ragcun_hf import IsotropicGaussianTrainingArguments
        >>> arguments = IsotropicGaussianTrainingArguments(output_dir="out", lambda_isotropy=1.5, use_cpu=True)
        >>> arguments.lambda_isotropy, arguments.isotropy_kind
        (1.5, 'sigreg')
    """

    lambda_contrastive: float = argument(1.0, "Weight of the contrastive term, >= 0; 0 skips the term.")
    lambda_isotropy: float = argument(
        0.1,
        "Weight of the isotropy term, >= 0; 0 skips the term. Larger pulls embeddings harder towards N(0, I); "
        "a light touch keeps the base's retrieval, 1 and more cost some of it (EXPERIMENTS.md).",
    )
    lambda_predictive: float | None = argument(
        None, "Weight of the predictive term, >= 0; 0 skips the term. Default: 1 with a predictor, 0 without."
    )
    contrastive_kind: Literal["info_nce", "triplet"] = argument(
        "info_nce", "info_nce: pick the own document among all of the batch; triplet: the original's Euclidean margin."
    )
    temperature: float = argument(0.05, "Divides similarities in info_nce, > 0; smaller looks at the hardest only.")
    bidirectional: bool = argument(False, "Let documents pick their queries too, and average both directions.")
    margin: float = argument(0.1, "Gap that triplet asks for, >= 0, as a Euclidean distance between embeddings.")
    isotropy_kind: Literal["sigreg", "covariance"] = argument(
        "sigreg", "sigreg: sliced Epps-Pulley test against N(0, I), over N; covariance: the original's penalty."
    )
    num_directions: int = argument(256, "Random directions of sigreg per step, >= 1; cost grows linearly.")
    predictive_kind: Literal["mse", "cosine"] = argument(
        "mse", "How predictions are compared with document embeddings, which are held fixed."
    )
    balance_queries: bool = argument(
        False, "Each epoch takes every query once, with one of its documents: many judgements do not outweigh few."
    )
    encoder_learning_rate: float = argument(2e-5, "Learning rate of encoder weights where they are not frozen, > 0.")
    early_stopping_patience: int | None = argument(
        None,
        "Stop after this many evaluations without a better validation NDCG@10; needs --val_data or --val_fraction.",
    )

    num_train_epochs: float = argument(3.0, "Passes over the training data.", "--epochs")
    per_device_train_batch_size: int = argument(
        32, "Pairs per process and step. Larger gives each query more in-batch negatives.", "--batch_size"
    )
    per_device_eval_batch_size: int | None = argument(  # type: ignore[assignment]
        None, "Pairs per process in an evaluation. Default: as in training, so that the two losses compare."
    )
    learning_rate: float = argument(3e-4, "Peak learning rate of projection and predictor.")
    warmup_steps: float = argument(0.1, "Steps of linear warm-up; below 1 it is a share of all steps.")
    weight_decay: float = argument(0.01, "AdamW's weight decay; biases are exempt.")
    logging_steps: float = argument(10, "Steps between log lines; below 1 it is a share of all steps.")
    save_total_limit: int | None = argument(2, "Checkpoints kept; each holds the encoder too.")
    dataloader_drop_last: bool = argument(
        True, "Drop the last, smaller batch: it has fewer negatives and a noisier isotropy term."
    )
    logging_nan_inf_filter: bool = argument(
        False, "Leave out steps whose loss is not finite; False shows a divergence."
    )
    remove_unused_columns: bool = argument(False, "Leave False: the collator reads the columns, the model does not.")
    label_names: list[str] | None = argument([], "Leave empty: there are no labels, the loss comes from the batch.")

    def __post_init__(self) -> None:
        """Check the values that are ours before the parent's own checks."""
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        self.check_values()
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # The parent looks at the end of the name only, and would take eval_loss/contrastive for a score.
            self.greater_is_better = not self.metric_for_best_model.removeprefix("eval_").startswith("loss")
        # Said outright, or accelerate would not let several processes of a machine without accelerators work together.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        # A batch's tensors have unlike lengths (queries, documents, both), so accelerate must not slice it. Each
        # process reads a stream itself instead.
        accelerator_config: Any = self.accelerator_config
        accelerator_config.dispatch_batches = accelerator_config.split_batches = False
        # A process without a last batch would leave the others waiting for its rows.
        accelerator_config.even_batches = True
        # Pinning memory without an accelerator only warns, at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()

    def check_values(self) -> None:
        """Check weights, temperature, rates, counts and kinds.

        Raises:
            ValueError: If one cannot be; the message names it.
        """
        self._check_weights()
        for name in ("temperature", "learning_rate", "encoder_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` must be a finite number above 0, got {value}.")
        for name in ("margin", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {value}.")
        self._check_counts()
        for name in ("contrastive_kind", "isotropy_kind", "predictive_kind"):
            _check_choice(name, getattr(self, name))

    def _check_counts(self) -> None:
        counts = {
            "batch_size": self.per_device_train_batch_size,
            "per_device_eval_batch_size": self.per_device_eval_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "num_directions": self.num_directions,
            "early_stopping_patience": self.early_stopping_patience,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        if self.max_steps <= 0 and not (math.isfinite(self.num_train_epochs) and self.num_train_epochs > 0):
            raise ValueError(f"`epochs` must be a finite number above 0, got {self.num_train_epochs}.")

    def _check_weights(self) -> None:
        for name in ("lambda_contrastive", "lambda_isotropy", "lambda_predictive"):
            weight = getattr(self, name)
            if weight is not None and not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {weight}.")
        if self.lambda_contrastive == self.lambda_isotropy == 0 and self.lambda_predictive == 0:
            raise ValueError("All three lambda weights are 0: there is nothing to train, set one above 0.")


_CHOICES = {
    "contrastive_kind": ("info_nce", "triplet"),
    "isotropy_kind": ("sigreg", "covariance"),
    "predictive_kind": ("mse", "cosine"),
}


def _check_choice(name: str, value: str) -> None:
    if value not in _CHOICES[name]:
        raise ValueError(f"`{name}` must be one of {', '.join(_CHOICES[name])}, got {value!r}.")


@dataclass
class ValidationArguments:
    """What is held out to choose the checkpoint by."""

    val_data: str | None = argument(
        None,
        "Held-out query-document pairs: eval_loss and NDCG@10 after every epoch (or --eval_steps), best checkpoint "
        "kept, unless --blend goes back from the last one.",
    )
    val_split: str | None = argument(None, "Split of --val_data. Default: as --split.")
    val_fraction: float = argument(
        0.0, "Without --val_data: share of the documents held out (with their queries), in [0, 1)."
    )


@dataclass
class ParsedArguments:
    """All arguments of a training script, by what they are about."""

    data: Any
    validation: ValidationArguments
    model: ModelArguments
    features: FeatureArguments
    run: RunArguments
    training: IsotropicGaussianTrainingArguments

    @property
    def uses_cached_features(self) -> bool:
        """Whether the head trains on features computed once; else every step runs the encoder."""
        return self.model.freeze_base and self.features.feature_cache


@dataclass
class RunArguments:
    """What happens around the training itself."""

    overwrite: bool = argument(False, "Replace the model that an earlier run left in the output folder.")
    blend: float = argument(
        1.0,
        "How far from the start to the trained weights the saved head lies, in [0, 1]: 1 all the way, less keeps more "
        "of the frozen base.",
    )
    measure_energy: bool = argument(
        False, "Estimate the energy of encoding and training for record and card; needs the extra energy."
    )
