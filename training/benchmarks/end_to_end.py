"""Compare training and evaluation from raw texts with sentence-transformers.

    python training/benchmarks/end_to_end.py --data_dir data/beir

Both train on SciFact train (919 pairs), 3 epochs at batch 32, with all-MiniLM-L6-v2 frozen. In sentence-transformers,
the head is a Dense layer that starts at the identity, the loss is MultipleNegativesRankingLoss, and the evaluator is
its own. It takes minutes, so it runs once. Ours runs once with each of --encoder_backends, from an empty cache.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import BenchmarkArguments, at_least, figure, report, set_threads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script
from ragcun_hf.errors import UserError

_EPOCHS, _BATCH_SIZE, _LEARNING_RATE = 3, 32, 1e-3


@dataclass
class Arguments(BenchmarkArguments):
    """The data and our back ends."""

    data_dir: str = argument("data/beir", "Folder with the BEIR dataset scifact.")
    encoder_backends: list[str] = argument(["openvino"], "Back ends of our encoder: torch, openvino or both.")


def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate with both, and train one more head with ours."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    if not (Path(args.data_dir) / "scifact").is_dir():
        raise UserError(
            f"--data_dir expects a folder with scifact, found none in {args.data_dir}: name another folder"
        )
    quiet_libraries()
    set_threads(args.threads)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # like the peer, even if there is a GPU
    figures: dict[str, float] = {}
    measured = {"peer": run_peer(args, figures)}
    for backend in args.encoder_backends:
        measured[backend] = run_ours(args, backend, figures)
    seconds = {f"{who}, {name}": value for who, times in measured.items() for name, value in times.items()}
    claims = [claim for backend in args.encoder_backends for claim in claims_of(backend, seconds)]
    claims += [figure(f"NDCG@10 of the head, {who}", value, "") for who, value in figures.items()]
    report(args, "end_to_end", claims, details={"seconds": seconds})


def claims_of(backend: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Compare ours, with one back end, to sentence-transformers."""
    peer, ours = seconds["peer, training"], seconds[f"{backend}, training"]
    evaluated = (peer + seconds["peer, evaluation"]) / (ours + seconds[f"{backend}, evaluation"])
    return [
        at_least(f"{backend}: from texts to a trained head, relative to sentence-transformers", peer / ours, 18),
        at_least(f"{backend}: the same with an evaluation on 5,183 documents", evaluated, 6),
        at_least(f"{backend}: each further head", peer / seconds[f"{backend}, next head"], 100),
    ]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Call a function; return the seconds that it took, and its value."""
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


def run_ours(args: Arguments, backend: str, figures: dict[str, float]) -> dict[str, float]:
    """Train and evaluate from an empty cache, then train one more head."""
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
        evaluate = ["--model_path", f"{folder}/a", "--data_dir", args.data_dir, "--datasets", "scifact", "--no_bm25"]
        evaluate += cache
        first, _ = timed(lambda: train_contrastive.main([*train, "--output_dir", f"{folder}/a"]))
        evaluation, _ = timed(lambda: eval_beir.main([*evaluate, "--output_dir", f"{folder}/results"]))
        second, _ = timed(lambda: train_contrastive.main([*train, "--seed", "7", "--output_dir", f"{folder}/b"]))
        entry = read_results(f"{folder}/results/a.json")["datasets"]["scifact"]
    figures[backend] = entry["systems"]["projection"]["ndcg@10"]
    return {"training": first, "evaluation": evaluation, "next head": second}


def run_peer(args: Arguments, figures: dict[str, float]) -> dict[str, float]:
    """Train and evaluate with sentence-transformers' own trainer and evaluator."""
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
    from ragcun_hf.model.embedded_isotropic_gaussian import embedded_model_folder

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
