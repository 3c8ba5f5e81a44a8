"""Run the whole workflow in one command: a frozen encoder gets measurably better at retrieval.

    python training/demo.py

Builds a retrieval corpus from the documentation strings of installed packages, trains a head on the embedded
all-MiniLM-L6-v2, compares it with the frozen base on documents that were not used in training, reloads it in a clean
process, answers three queries, and writes a results file, plots and a model card. Needs no network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..command_line import argument, parse_arguments, quiet_libraries, say, shipped_file
from ..commands import command
from ..evaluation.results import BASE_SYSTEM, MAIN_METRIC, PROJECTION_SYSTEM
from . import eval_beir, render_card, train_contrastive

QUERIES = (
    "sort an array and get the indices instead of the values",
    "fill missing samples by a smooth curve through the known points",
    "randomly switch off units of a network while training",
)

# Runs in a process that cannot import this package, like that of any user who loads the folder.
_CLEAN_PROCESS = """
import json, sys
sys.modules["ragcun_hf"] = None
import numpy as np
from transformers import AutoModel
from transformers.utils import logging
logging.disable_progress_bar()
folder, corpus, queries = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
rows = [json.loads(line) for line in open(corpus, encoding="utf-8")][:: int(sys.argv[4])]
scores = model.encode_query(queries) @ model.encode_document([row["text"] for row in rows]).T
print(json.dumps([[rows[i]["_id"] for i in np.argsort(-row)[:3]] for row in scores]))
"""
_CORPUS_STEP = 4  # the clean process encodes every fourth document, to be quick


@dataclass
class DemoArguments:
    """The corpus, the recipe, and the output."""

    output_dir: str = argument("demo", "Folder for corpus, model, results, plots and card.")
    packages: list[str] = argument(["numpy", "torch", "scipy"], "Installed packages whose docstrings are the corpus.")
    recipe: str = argument(str(shipped_file("recipes", "demo")), "Recipe to train with.")


def main(arguments: list[str] | None = None) -> None:
    """Run every step and print the result."""
    (args,) = parse_arguments([DemoArguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    started = time.perf_counter()
    folder = Path(args.output_dir)
    corpus, model = folder / "python_docs", folder / "model"
    _build_corpus(corpus, args.packages)
    _headline(2, "Training: the encoder runs once per text, then the head is trained on the features")
    flags = ["--config", args.recipe, "--base_model", "embedded", "--train_data", str(corpus), "--overwrite"]
    train_contrastive.main([*flags, "--output_dir", str(model)])
    results = _evaluate(corpus, model, folder / "results")
    _reload_and_search(model, corpus)
    _write_card(model, folder)
    _report(results, folder, model, time.perf_counter() - started)


def _build_corpus(folder: Path, packages: list[str]) -> None:
    from ..data.beir_folder import load_beir_folder
    from ..data.python_docs import build_python_docs, write_entries

    _headline(1, f"Corpus: documentation strings of {', '.join(packages)}")
    write_entries(build_python_docs(packages), folder)
    train, test = load_beir_folder(folder, "train"), load_beir_folder(folder, "test")
    say(f"{len(test.corpus_ids)} documents; {len(train.queries)} queries to train on, {len(test.queries)} to test on,")
    say("split by document. The query is the one-line summary, the document the rest of the docstring.")


def _evaluate(corpus: Path, model: Path, output: Path) -> dict:
    _headline(3, "Evaluation: known-item search on new documents, compared with the frozen base")
    flags = ["--model_path", str(model), "--use_predictor", "--datasets", corpus.name]
    flags += ["--data_dir", str(corpus.parent), "--output_dir", str(output), "--run_name", "demo"]
    eval_beir.main(flags)
    return json.loads((output / "demo.json").read_text(encoding="utf-8"))


def _reload_and_search(model: Path, corpus: Path) -> None:
    _headline(4, "Sharing: a clean process without this package loads the folder with AutoModel and searches")
    command = [sys.executable, "-c", _CLEAN_PROCESS, str(model.resolve()), str((corpus / "corpus.jsonl").resolve())]
    answer = subprocess.run(
        [*command, json.dumps(QUERIES), str(_CORPUS_STEP)],
        check=True,
        capture_output=True,
        text=True,
        cwd=model,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    for query, names in zip(QUERIES, json.loads(answer.stdout.splitlines()[-1]), strict=True):
        say(f'  "{query}"\n     -> {", ".join(names)}')


def _write_card(model: Path, folder: Path) -> None:
    _headline(5, "Model card and plots")
    render_card.main(["--model_path", str(model), "--results", str(folder / "results" / "demo.json")])


def _report(results: dict, folder: Path, model: Path, seconds: float) -> None:
    (entry,) = results["datasets"].values()
    base, trained = (entry["systems"][system][MAIN_METRIC] for system in (BASE_SYSTEM, PROJECTION_SYSTEM))
    p_value = entry["comparisons"][PROJECTION_SYSTEM]["p_value"]
    say(
        f"\nNDCG@10 on unseen documents: frozen base {base:.4f}, trained head {trained:.4f} "
        f"({trained / base - 1:+.1%}, p = {p_value:.4f}). {seconds / 60:.1f} minutes in total."
    )
    say(f"In {folder}: the model, its card (model/README.md), results/demo.json, and plots in results/demo.")
    say("Next, on your own pairs:")
    flags = "--recipe adapt --base_model embedded --train_data YOUR_PAIRS.jsonl --output_dir checkpoints/mine"
    say(f"  {command('train_contrastive', *flags.split())}")
    say(f"Or load this model:  AutoModel.from_pretrained({str(model)!r}, trust_remote_code=True)")


def _headline(number: int, text: str) -> None:
    say(f"\n[{number}/5] {text}")
