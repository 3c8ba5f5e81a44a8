"""Time the training of 24 heads by a sweep against one head by the Trainer, on given features.

    python training/benchmarks/many_heads.py

The features are the random ones of head_training.py, a fifth of them held out. The Trainer trains one head as
train_contrastive.py does; the sweep tries the 24 settings of the shipped sweep `quick` with successive halving.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparison import BenchmarkArguments, at_most, compare, figure, report, set_threads
from head_training import RandomStore

from ragcun_hf.command_line import argument, parse_arguments, parse_yaml, quiet_libraries, run_script, shipped_file


@dataclass
class Arguments(BenchmarkArguments):
    """Sizes of the run."""

    num_pairs: int = argument(10_000, "Pairs, a fifth of them for validation.")
    epochs: int = argument(3, "Passes over the training pairs.")
    batch_size: int = argument(128, "Pairs per step.")
    repeats: int = argument(2, "Timed rounds; one round is not warmed up.")


def main(arguments: list[str] | None = None) -> None:
    """Time one head through the Trainer, one through the sweep, and 24 through the sweep."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    set_threads(args.threads)
    seconds = time_heads(args, torch.device("cpu"))
    claims = [
        at_most(f"24 settings against {name}", seconds.ratio("24, by the sweep", name), 4.0)
        for name in ("one, by the Trainer", "one, by the sweep")
    ]
    claims.append(figure("seconds for 24 settings", seconds.median("24, by the sweep"), "s"))
    report(args, "many_heads", claims, details={"grid": sweep_grid(), "seconds": seconds.seconds})


def sweep_grid() -> dict[str, Any]:
    """Return the settings of the shipped sweep."""
    return parse_yaml(shipped_file("sweeps", "quick").read_text(encoding="utf-8"))["grid"]


def time_heads(args: Any, device: torch.device) -> Any:
    """Time one head by the Trainer, one by the sweep, and 24 by the sweep."""
    from ragcun_hf.evaluation.validation import RetrievalValidation
    from ragcun_hf.model.base_models import load_base_model
    from ragcun_hf.objective.inputs import FeaturePairs
    from ragcun_hf.sweep.heads import HeadData

    store, num_training = RandomStore(args.num_pairs), args.num_pairs * 4 // 5
    queries, documents = ([f"{kind}{row}" for row in range(args.num_pairs)] for kind in "qd")
    pairs = FeaturePairs(queries, documents, [[]] * args.num_pairs, store=store)
    validation = RetrievalValidation(queries[num_training:], documents[num_training:], store=store)
    data = HeadData(load_base_model("embedded").to(device), pairs, num_training, validation)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contenders = {
            "one, by the Trainer": trainer_run(args, data, folder),
            "one, by the sweep": sweep_run(args, data, {}, folder),
            "24, by the sweep": sweep_run(args, data, sweep_grid(), folder),
        }
        return compare(contenders, repeats=args.repeats, warm_up=args.repeats > 1)


def training_arguments(args: Any, folder: Path, device: torch.device) -> Any:
    """Make the arguments that all heads share."""
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
        use_cpu=device.type == "cpu",
    )


def trainer_run(args: Any, data: Any, folder: Path) -> Callable[[], None]:
    """Make a function that trains one head as train_contrastive.py does with held-out pairs, but saves nothing."""
    from transformers import PrinterCallback

    from ragcun_hf.model.base_models import load_base_model
    from ragcun_hf.trainer.loss_trainer import LossTrainer

    model = load_base_model("embedded")

    def train() -> None:
        trainer = LossTrainer(
            model=model,
            args=training_arguments(args, folder, data.device),
            data_collator=data.pairs,
            train_dataset=range(data.num_rows),
            eval_dataset=range(data.num_rows, len(data.pairs)),
            evaluators=[data.validation],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    return train


def sweep_run(args: Any, data: Any, grid: dict[str, Any], folder: Path) -> Callable[[], None]:
    """Make a function that tries a grid of settings on the features."""
    from ragcun_hf.model.arguments import ModelArguments
    from ragcun_hf.sweep.records import SweepRecords, remove_sweep
    from ragcun_hf.sweep.run import run_rounds
    from ragcun_hf.sweep.settings import grid_settings, make_trial

    settings = grid_settings(grid)
    shared = training_arguments(args, folder, data.device)
    trials = [make_trial(setting, 1, ModelArguments(), shared) for setting in settings]

    def sweep() -> None:
        remove_sweep(folder)
        records = SweepRecords(folder, {})
        run_rounds(data, settings, trials, records, factor=4, select="ndcg@10")

    return sweep


if __name__ == "__main__":
    run_script(main)
