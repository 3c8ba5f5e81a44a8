"""From pairs of text to a trained head and its evaluation: sentence-transformers beside this package.

    python training/benchmarks/end_to_end.py --data_dir data/beir

SciFact train (919 pairs), 3 epochs at batch 32, all-MiniLM-L6-v2 frozen. The peer: a Dense layer that starts at the
identity, MultipleNegativesRankingLoss, its own evaluator. It takes minutes, so it runs once; ours runs once with each
back end of --encoder_backends, from nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import BenchmarkArguments, at_least, figure, report, set_threads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script
from ragcun_hf.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts are run as they are, not installed

_EPOCHS, _BATCH_SIZE, _LEARNING_RATE = 3, 32, 1e-3


@dataclass
class Arguments(BenchmarkArguments):
    """Where the data are."""

    data_dir: str = argument("data/beir", "Folder with the BEIR data set scifact.")
    encoder_backends: list[str] = argument(["openvino"], "Back ends that ours runs with: torch, openvino or both.")


def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate with both, and train one more head with ours."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    if not (Path(args.data_dir) / "scifact").is_dir():
        raise UserError(f"--data_dir expects a folder with scifact, found none in {args.data_dir}: name another")
    quiet_libraries()
    set_threads(args.threads)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as the peer, also where there is a GPU
    figures: dict[str, float] = {}
    measured = {"peer": run_peer(args, figures)}
    for backend in args.encoder_backends:
        measured[backend] = run_ours(args, backend, figures)
    seconds = {f"{who}, {name}": value for who, times in measured.items() for name, value in times.items()}
    claims = [claim for backend in args.encoder_backends for claim in claims_of(backend, seconds)]
    claims += [figure(f"NDCG@10 of the head, {who}", value, "") for who, value in figures.items()]
    report(args, "end_to_end", claims, details={"seconds": seconds})


def claims_of(backend: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Compare ours with one back end to sentence-transformers."""
    peer, ours = seconds["peer, training"], seconds[f"{backend}, training"]
    evaluated = (peer + seconds["peer, evaluation"]) / (ours + seconds[f"{backend}, evaluation"])
    return [
        at_least(f"{backend}: from texts to a trained head, against sentence-transformers", peer / ours, 18),
        at_least(f"{backend}: the same with an evaluation on 5,183 documents", evaluated, 6),
        at_least(f"{backend}: each further head", peer / seconds[f"{backend}, next head"], 100),
    ]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


def run_ours(args: Arguments, backend: str, figures: dict[str, float]) -> dict[str, float]:
    """Run the two scripts from an empty cache, then one more head."""
    from ragcun_hf.cli import eval_beir, train_contrastive
    from ragcun_hf.evaluation.results import read_results

    with tempfile.TemporaryDirectory() as folder:
        cache = ["--feature_cache_dir", f"{folder}/features", "--encoder_backend", backend]
        train = [
            *("--base_model", "embedded", "--train_data", f"{args.data_dir}/scifact"),
            *("--epochs", str(_EPOCHS), "--batch_size", str(_BATCH_SIZE), "--learning_rate", str(_LEARNING_RATE)),
            *("--lambda_isotropy", "0", "--projection_kind", "linear"),
            *("--save_strategy", "no", "--disable_tqdm", "true", "--use_cpu"),
            *cache,
        ]
        evaluate = ["--model_path", f"{folder}/a", "--data_dir", args.data_dir, "--datasets", "scifact", *cache]
        first, _ = timed(lambda: train_contrastive.main([*train, "--output_dir", f"{folder}/a"]))
        evaluation, _ = timed(lambda: eval_beir.main([*evaluate, "--output_dir", f"{folder}/results"]))
        second, _ = timed(lambda: train_contrastive.main([*train, "--seed", "7", "--output_dir", f"{folder}/b"]))
        entry = read_results(f"{folder}/results/a.json")["datasets"]["scifact"]
    figures[backend] = entry["systems"]["projection"]["ndcg@10"]
    return {"training": first, "evaluation": evaluation, "next head": second}


def run_peer(args: Arguments, figures: dict[str, float]) -> dict[str, float]:
    """Do the same with sentence-transformers' own trainer and evaluator."""
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
        models,
    )
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    from ragcun_hf.data.beir_folder import load_beir_folder
    from ragcun_hf.data.pairs import read_pairs
    from ragcun_hf.model.base_models import embedded_model_folder

    model = SentenceTransformer(str(embedded_model_folder()), device="cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    width = model.get_sentence_embedding_dimension()
    dense = models.Dense(width, width, bias=True, activation_function=torch.nn.Identity())
    torch.nn.init.eye_(dense.linear.weight)
    torch.nn.init.zeros_(dense.linear.bias)
    model.append(dense)
    pairs = read_pairs(f"{args.data_dir}/scifact", split="train")
    rows = Dataset.from_dict({"anchor": pairs["query"], "positive": pairs["positive"]})
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=_EPOCHS,
            per_device_train_batch_size=_BATCH_SIZE,
            learning_rate=_LEARNING_RATE,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
        )
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss)
        training, _ = timed(trainer.train)
    test = load_beir_folder(f"{args.data_dir}/scifact")
    relevant = {query: {name for name, gain in found.items() if gain > 0} for query, found in test.qrels.items()}
    corpus = dict(zip(test.corpus_ids, test.corpus_texts, strict=True))
    evaluator = InformationRetrievalEvaluator(test.queries, corpus, relevant, write_csv=False)
    evaluation, scores = timed(lambda: evaluator(model))
    figures["peer"] = next(value for name, value in scores.items() if name.endswith("cosine_ndcg@10"))
    return {"training": training, "evaluation": evaluation}


if __name__ == "__main__":
    run_script(main)
