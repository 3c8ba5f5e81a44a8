"""Flags of a training run besides the Trainer's own. This file imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..command_line import argument
from ..data.splitting import SplitMethod

ContrastiveKind = Literal["info_nce", "triplet"]
IsotropyKind = Literal["sigreg", "covariance"]
PredictiveKind = Literal["mse", "cosine"]


@dataclass
class ObjectiveArguments:
    """The loss terms, the start of the head, and what is made of data and weights."""

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
    fall_back: bool = argument(
        False, "If held-out queries are answered no better than by the frozen base, save the unchanged base instead."
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
    lexical: bool = argument(
        False,
        "Give an untrained model a lexical half, which brings exact words into the vector. It is fitted to all "
        "documents that the run knows: those of the pairs, --documents, --val_corpus, the corpus of a BEIR folder. "
        "Its share is chosen without labels, unless --lexical_weight says it.",
    )
    shuffle_buffer_size: int = argument(
        10_000, "For a stream: rows in memory, from which the next row is drawn; 1 keeps the order of the source."
    )
    measure_energy: bool = argument(
        False, "Estimate the energy of encoding and training for record and card; needs the package codecarbon."
    )
    encoder_learning_rate: float = argument(2e-5, "Learning rate of encoder weights that are not frozen, > 0.")
    early_stopping_patience: int | None = argument(
        None,
        "Stop after this many evaluations without a better validation NDCG@10; needs --val_data or --val_fraction.",
    )


@dataclass
class ScheduleArguments:
    """Length of training, batches, learning rate and output."""

    num_train_epochs: float = argument(3.0, "Passes over the training rows.", "--epochs", essential=6, swept="shape")
    per_device_train_batch_size: int = argument(
        32,
        "Rows per process and step. A larger batch gives each query more in-batch negatives.",
        "--batch_size",
        essential=7,
        swept="shape",
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
    seed: int = argument(42, "Seed of initialization, order of rows and dropout.", recorded="always")
    output_dir: str | None = argument(None, "Folder of the model and its checkpoints.", recorded="never")
    resume_from_checkpoint: str | None = argument(
        None, "Continue the run of this checkpoint: a folder, or the word last.", recorded="never"
    )
    use_cpu: bool = argument(False, "Train on the CPU even if there is an accelerator.", recorded="never")
