"""What 24 settings cost beside one, features given.

    python training/benchmarks/many_heads.py

The same random features as in head_training.py, a fifth of them held out. One setting is what train_contrastive.py
does with features and validation at hand; the sweep tries 24 with successive halving, as training/sweeps/quick.yaml.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from comparison import BenchmarkArguments, at_most, compare, figure, report, set_threads
from head_training import random_features

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script

_SWEEP_FILE = Path(__file__).resolve().parents[1] / "sweeps" / "quick.yaml"


@dataclass
class Arguments(BenchmarkArguments):
    """Sizes of the run."""

    num_pairs: int = argument(10_000, "Pairs, a fifth of them for validation.")
    epochs: int = argument(3, "Passes over the training pairs.")
    batch_size: int = argument(128, "Pairs per step.")
    repeats: int = argument(2, "Timed rounds.")


class RandomPairs:
    """Pairs of features without texts, with what `FeaturePairs` has."""

    def __init__(self, num_pairs: int) -> None:
        import numpy as np

        self.query_vectors, self.document_vectors = random_features(num_pairs)
        self.query_rows = self.positive_rows = np.arange(num_pairs)
        self.negative_rows = [np.zeros(0, dtype=np.int64)] * num_pairs

    def __len__(self) -> int:
        return len(self.query_rows)

    def __getitem__(self, row: int) -> Any:
        from ragcun_hf.trainer.feature_pairs import FeaturePair

        return FeaturePair(row, row, self.negative_rows[row])


class RandomTexts:
    """A feature store that knows its texts by number: `q17` and `d17`."""

    def __init__(self, pairs: RandomPairs) -> None:
        self._pairs = pairs

    def features(self, texts: Any, *, prompt: str = "") -> Any:
        """Look the rows up."""
        import numpy as np

        from ragcun_hf.features.feature_store import FeatureTable

        vectors = self._pairs.query_vectors if texts[0][0] == "q" else self._pairs.document_vectors
        rows = [int(text[1:]) for text in texts]
        return FeatureTable(vectors=vectors[rows], rows=np.arange(len(rows)))


def main(arguments: list[str] | None = None) -> None:
    """Time one head through the Trainer, one through the sweep, and 24 through the sweep."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    set_threads(args.threads)
    from ragcun_hf.evaluation.validation import RetrievalValidation
    from ragcun_hf.model.base_models import load_base_model
    from ragcun_hf.sweep.run import SweepData

    base, pairs = load_base_model("embedded"), RandomPairs(args.num_pairs)
    num_training = args.num_pairs * 4 // 5
    held_out = range(num_training, args.num_pairs)
    names = [f"q{row}" for row in held_out], [f"d{row}" for row in held_out]
    data = SweepData(base, pairs, num_training, RetrievalValidation(*names, store=RandomTexts(pairs)))  # type: ignore[arg-type]
    grid = yaml.safe_load(_SWEEP_FILE.read_text(encoding="utf-8"))["grid"]
    folder = Path(tempfile.mkdtemp())
    contenders = {
        "one, by the Trainer": trainer_run(args, data, folder),
        "one, by the sweep": sweep_run(args, data, {}, folder),
        "24, by the sweep": sweep_run(args, data, grid, folder),
    }
    try:
        seconds = compare(contenders, repeats=args.repeats)
    finally:
        shutil.rmtree(folder)
    claims = [
        at_most(f"24 settings against {name}", seconds.ratio("24, by the sweep", name), 4.0)
        for name in ("one, by the Trainer", "one, by the sweep")
    ]
    claims.append(figure("seconds for 24 settings", seconds.median("24, by the sweep"), "s"))
    report(args, "many_heads", claims, details={"grid": grid, "seconds": seconds.seconds})


def training_arguments(args: Arguments, folder: Path) -> Any:
    """Make what all heads share."""
    from ragcun_hf import IsotropicGaussianTrainingArguments

    return IsotropicGaussianTrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=args.epochs,
        learning_rate=1e-3,
        eval_strategy="epoch",
        save_strategy="no",
        eval_on_start=True,
        disable_tqdm=True,
        use_cpu=True,
    )


def trainer_run(args: Arguments, data: Any, folder: Path) -> Callable[[], None]:
    """Make a function that trains one head as train_contrastive.py does with a validation part, but saves nothing."""
    from torch.utils.data import Subset
    from transformers import PrinterCallback

    from ragcun_hf import IsotropicGaussianTrainer
    from ragcun_hf.model.base_models import load_base_model
    from ragcun_hf.trainer.collators import FeaturePairCollator

    model = load_base_model("embedded")

    def train() -> None:
        trainer = IsotropicGaussianTrainer(
            model=model,
            args=training_arguments(args, folder),
            data_collator=FeaturePairCollator(data.pairs.query_vectors, data.pairs.document_vectors),
            train_dataset=Subset(data.pairs, range(data.num_training_rows)),
            eval_dataset=Subset(data.pairs, range(data.num_training_rows, len(data.pairs))),
            validation=data.validation,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    return train


def sweep_run(args: Arguments, data: Any, grid: dict[str, Any], folder: Path) -> Callable[[], None]:
    """Make a function that tries a grid of settings from nothing but features."""
    from ragcun_hf.model.arguments import ModelArguments
    from ragcun_hf.sweep.records import SweepRecords, remove_sweep
    from ragcun_hf.sweep.run import run_rounds
    from ragcun_hf.sweep.settings import grid_settings, make_trial

    settings = grid_settings(grid)
    shared = training_arguments(args, folder)
    trials = [make_trial(setting, 1, ModelArguments(), shared) for setting in settings]

    def sweep() -> None:
        remove_sweep(folder)
        records = SweepRecords(folder, {})
        run_rounds(data, settings, trials, records, factor=4, select="ndcg@10")

    return sweep


if __name__ == "__main__":
    run_script(main)
