"""How fast a head trains on features, and where a step's time goes.

    python training/benchmarks/head_training.py

10,000 pairs of random features, 3 epochs at batch 128, H = D = 384, all three terms, SIGReg on 256 directions; beside
the bare matrix products of the same heads, which no training can do without.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comparison import BenchmarkArguments, at_most, compare, figure, report, set_threads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script


@dataclass
class Arguments(BenchmarkArguments):
    """Sizes of the run."""

    num_pairs: int = argument(10_000, "Training pairs.")
    epochs: int = argument(3, "Passes over them.")
    batch_size: int = argument(128, "Pairs per step.")
    repeats: int = argument(3, "Timed rounds.")


def main(arguments: list[str] | None = None) -> None:
    """Train heads through the Trainer, with and without SIGReg, and time the products alone."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    set_threads(args.threads)
    features = random_features(args.num_pairs)
    num_steps = args.epochs * (args.num_pairs // args.batch_size)
    contenders = {
        "three terms": trainer_run(args, features),
        "three terms, bfloat16": trainer_run(args, features, bf16=True),
        "without SIGReg": trainer_run(args, features, lambda_isotropy=0.0),
        "products alone": bare_products(num_steps, args.batch_size, features[0].shape[1]),
    }
    seconds = compare(contenders, repeats=args.repeats)
    whole = seconds.median("three terms")
    sigreg = 1 - 1 / seconds.ratio("three terms", "without SIGReg")
    claims = [
        at_most(f"seconds for {args.num_pairs:,} pairs x {args.epochs} epochs", whole, 6.0, "s"),
        figure("milliseconds per step", 1e3 * whole / num_steps, "ms"),
        figure("the same against its matrix products alone", seconds.ratio("three terms", "products alone"), "x"),
        at_most("share of SIGReg", sigreg, 0.3, ""),
        figure("seconds in bfloat16 (--bf16)", seconds.median("three terms, bfloat16"), "s"),
    ]
    report(args, "head_training", claims, details={"steps": num_steps, "seconds": seconds.seconds})


def random_features(num_pairs: int, width: int = 384) -> tuple[Any, Any]:
    """Draw features of queries and of documents near them, unit length; their values do not matter for the time."""
    import numpy as np

    rng = np.random.default_rng(0)
    documents = rng.standard_normal((num_pairs, width), dtype=np.float32)
    queries = documents + rng.standard_normal((num_pairs, width), dtype=np.float32)
    return tuple(rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, documents))


def trainer_run(args: Arguments, features: tuple[Any, Any], **options: Any) -> Callable[[], None]:
    """Make a function that trains one head from scratch as the training scripts do."""
    import numpy as np
    from transformers import PrinterCallback

    from ragcun_hf import IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments
    from ragcun_hf.model.base_models import load_base_model
    from ragcun_hf.trainer.collators import FeaturePairCollator
    from ragcun_hf.trainer.feature_pairs import FeaturePair

    no_negatives = np.zeros(0, dtype=np.int64)
    rows = [FeaturePair(row, row, no_negatives) for row in range(args.num_pairs)]
    model = load_base_model("embedded", use_predictor=True)
    folder = tempfile.TemporaryDirectory()

    def train() -> None:
        arguments = IsotropicGaussianTrainingArguments(
            output_dir=folder.name,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=1e-3,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )
        collator = FeaturePairCollator(*features)
        trainer = IsotropicGaussianTrainer(model=model, args=arguments, data_collator=collator, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    return train


def bare_products(num_steps: int, batch_size: int, width: int) -> Callable[[], None]:
    """Make a function that computes the matrix products of forward and backward, and nothing else."""
    import torch

    # A linear part and an MLP of twice the width: on queries and documents (projection), on queries (predictor).
    shapes = [(width, width), (width, 2 * width), (2 * width, width)]
    weights = [torch.randn(shape) for shape in shapes]
    inputs = {rows: [torch.randn(rows, shape[0]) for shape in shapes] for rows in (2 * batch_size, batch_size)}
    outputs = {rows: [torch.randn(rows, shape[1]) for shape in shapes] for rows in (2 * batch_size, batch_size)}

    def multiply() -> None:
        for _ in range(num_steps):
            for rows in inputs:
                for place, weight in enumerate(weights):
                    _ = inputs[rows][place] @ weight  # forward
                    _ = inputs[rows][place].T @ outputs[rows][place]  # gradient of the weight
                    if rows == batch_size or place == 2:  # features need no gradient
                        _ = outputs[rows][place] @ weight.T

    return multiply


if __name__ == "__main__":
    run_script(main)
