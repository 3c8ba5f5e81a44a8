"""Put the package under load, and count what goes wrong: the search page, the feature cache, encoding, training.

    python training/benchmarks/load.py --data_dir data/beir
    python training/benchmarks/load.py --parts cache trainings

    page       the command as a process of its own, and clients that ask for minutes as browsers do
    cache      processes that write one feature cache while others prune it, and a writer that is killed
    encode     a million texts with a small encoder, then some thousands with the real one
    trainings  a hundred trainings in one process

The exit code is 1 if an answer is missing or wrong, never because of speed.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import BenchmarkArguments, report, set_threads
from feature_store import one_layer_model
from load_cache import cache_trial
from load_page import page_trial
from load_trial import MARKS, Trial, documents_of, num_unlike

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script, say
from ragcun_hf.errors import UserError

PARTS = ("page", "cache", "encode", "trainings")


@dataclass
class Arguments(BenchmarkArguments):
    """The trials and their sizes."""

    parts: list[str] = argument(list(PARTS), f"Trials to run, of {', '.join(PARTS)}.")
    data_dir: str = argument("data/beir", "Folder with the BEIR dataset scifact, for page and encode.")
    base_model: str = argument("embedded", "The real encoder.")
    model_path: str | None = argument(
        None, "A trained model for the page. Default: the base model with a random head, which costs as much."
    )
    feature_cache_dir: str | None = argument(None, "Folder of the feature cache of the page. Default: inside HF_HOME.")
    clients: int = argument(50, "Clients of the page; each asks again as soon as it is answered.")
    seconds: float = argument(300.0, "How long they ask.")
    writers: int = argument(8, "Processes that write the cache.")
    pruners: int = argument(2, "Processes that prune it.")
    rounds: int = argument(30, "How often each writer does so.")
    texts: int = argument(1_000_000, "Texts for the small encoder.")
    real_texts: int = argument(20_000, "Short texts for the real one.")
    trainings: int = argument(100, "Trainings in one process.")


def main(arguments: list[str] | None = None) -> None:
    """Run the trials, print a line for each figure, and exit with 1 if something was wrong."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    set_threads(args.threads)
    if unknown := sorted(set(args.parts) - set(PARTS)):
        raise UserError(f"--parts expects names of {', '.join(PARTS)}, got {unknown[0]!r}: use one of these names")
    trials = {"page": page_trial, "cache": cache_trial, "encode": encode_trial, "trainings": training_trial}
    wrong = []
    for part in args.parts:
        trial = Trial()
        trials[part](args, trial)
        report(args, f"load_{part}", trial.claims, details={"wrong": trial.wrong})
        wrong += trial.wrong
    say("\n".join(f"WRONG: {line}" for line in wrong) or "Nothing was wrong.")
    sys.exit(bool(wrong))


def encode_trial(args: Arguments, trial: Trial) -> None:
    """Encode many texts into an empty cache, and compare some features with those computed without one."""
    from ragcun_hf.model.base_models import load_base_model

    texts = [f"w{row % 997} w{row // 997 % 997} w{row // 994_009} w{row * 7 % 997}" for row in range(args.texts)]
    _encode(trial, "small encoder", one_layer_model(48, max_length=16), texts)
    words = " ".join(documents_of(args.data_dir)["text"]).split()
    texts = [f"{row} {' '.join(words[8 * row : 8 * row + 8])}" for row in range(args.real_texts)]
    _encode(trial, args.base_model, load_base_model(args.base_model), texts)


def _encode(trial: Trial, name: str, model: Any, texts: list[str]) -> None:
    import numpy as np

    from ragcun_hf.features.feature_store import FeatureStore

    with tempfile.TemporaryDirectory() as folder:
        kept, plain = (FeatureStore(model, cache_folder=place, show_progress=False) for place in (folder, None))
        start = 0
        for stop in (round(mark * len(texts)) for mark in MARKS):
            kept.encode(texts[start:stop])
            trial.note_process(f"({name}) after {stop:,} texts")
            start = stop
        chosen = np.random.default_rng(0).choice(len(texts), min(1_000, len(texts)), replace=False).tolist()
        sample = [texts[row] for row in chosen]
        found, expected = (store.features(sample).expanded() for store in (kept, plain))
        trial.count(f"features ({name})", num_unlike(found, expected), of=len(sample))
        names = [path.name for path in Path(folder).rglob("*")]
        trial.count(f"files left unfinished ({name})", sum(each.startswith(".") for each in names), of=len(names))


def training_trial(args: Arguments, trial: Trial) -> None:
    """Train again and again in one process, always the same; the last model must equal the first."""
    import torch

    heads: list[dict[str, torch.Tensor]] = []
    marks = {1, *(round(mark * args.trainings) for mark in MARKS)}
    with tempfile.TemporaryDirectory() as folder:
        one_layer_model(48, max_length=16).save_pretrained(Path(folder) / "start")
        for number in range(1, args.trainings + 1):
            heads[1:] = [_trained_head(Path(folder))]
            if number in marks:
                trial.note_process(f"after {number:,} trainings")
    unlike = [name for name, weight in heads[0].items() if not torch.equal(weight, heads[-1][name])]
    trial.count("weights of the last model unlike the first's", len(unlike), of=len(heads[0]))


def _trained_head(folder: Path) -> dict[str, Any]:
    from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments

    pairs = [{"query": f"w{row} w{row + 1}", "positive": f"w{row} w{2 * row} w{row + 2}"} for row in range(256)]
    training = IsotropicGaussianTrainingArguments(
        output_dir=str(folder / "model"), feature_cache_dir=str(folder / "cache"), use_cpu=True,
        per_device_train_batch_size=64, num_train_epochs=2, val_fraction=0.2, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    model = IsotropicGaussianModel.from_pretrained(folder / "start")
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = IsotropicGaussianTrainer(model, training, train_dataset=pairs)
        trainer.train()
        trainer.save_model()
    return {name: weight.clone() for name, weight in model.state_dict().items() if not name.startswith("encoder.")}


if __name__ == "__main__":
    run_script(main)
