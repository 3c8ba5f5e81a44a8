"""Time the training of a head on features, and the parts of a step.

    python training/benchmarks/head_training.py

10,000 pairs of random features, 3 epochs with batches of 128, H = D = 384, all three terms, SIGReg on 256 directions.
The same matrix products alone, which no training can avoid, are timed for comparison.
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
    """Train heads with the Trainer, with and without SIGReg, and time the products alone."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    set_threads(args.threads)
    from ragcun_hf.objective.inputs import FeaturePairs

    queries, documents = ([f"{kind}{row}" for row in range(args.num_pairs)] for kind in "qd")
    pairs = FeaturePairs(queries, documents, [[]] * args.num_pairs, store=RandomStore(args.num_pairs))
    num_steps = args.epochs * (args.num_pairs // args.batch_size)
    contenders = {
        "three terms": trainer_run(args, pairs),
        "three terms, bfloat16": trainer_run(args, pairs, bf16=True),
        "without SIGReg": trainer_run(args, pairs, lambda_isotropy=0.0),
        "products alone": bare_products(num_steps, args.batch_size, pairs.query_vectors.shape[1]),
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


class RandomStore:
    """A feature store of random vectors for the texts `q0`, `q1`, ... and documents near them, `d0`, `d1`, ..."""

    def __init__(self, num_pairs: int, width: int = 384) -> None:
        import numpy as np

        rng = np.random.default_rng(0)
        documents = rng.standard_normal((num_pairs, width), dtype=np.float32)
        queries = documents + rng.standard_normal((num_pairs, width), dtype=np.float32)
        pairs = {"q": queries, "d": documents}
        self._vectors = {kind: rows / np.linalg.norm(rows, axis=1, keepdims=True) for kind, rows in pairs.items()}

    def features(self, texts: Any, *, prompt: str = "") -> Any:
        """Look up the vectors of different texts of one kind."""
        import numpy as np

        from ragcun_hf.features.feature_store import FeatureTable

        rows = [int(text[1:]) for text in texts]
        return FeatureTable(vectors=self._vectors[texts[0][0]][rows], rows=np.arange(len(rows)))


def trainer_run(
    args: Any, pairs: Any, model: Any = None, *, use_cpu: bool = True, **options: Any
) -> Callable[[], None]:
    """Make a function that trains the head of a model, or of the embedded one, as the training commands do."""
    from transformers import PrinterCallback

    from ragcun_hf import IsotropicGaussianTrainingArguments
    from ragcun_hf.model.base_models import load_base_model
    from ragcun_hf.trainer.loss_trainer import LossTrainer

    model = model or load_base_model("embedded", use_predictor=True)
    folder = tempfile.TemporaryDirectory()

    def train() -> None:
        arguments = IsotropicGaussianTrainingArguments(
            output_dir=folder.name,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=1e-3,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=use_cpu,
            **options,
        )
        rows = range(args.num_pairs)
        trainer = LossTrainer(model=model, args=arguments, data_collator=pairs, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    return train


def bare_products(num_steps: int, batch_size: int, width: int) -> Callable[[], None]:
    """Make a function that only computes the matrix products of the forward and the backward pass."""
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
