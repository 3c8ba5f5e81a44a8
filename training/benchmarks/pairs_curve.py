"""How many pairs pay: heads from 25 to 800 pairs, alone and on top of a head that was trained without labels.

    python training/benchmarks/pairs_curve.py --data_dir data/beir --datasets scifact nfcorpus

Each dataset is a BEIR folder with the splits train and test. The pairs are drawn from train; figures are of the test
queries over the whole corpus, all of them and those without a document seen in training. It writes a JSON file.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragcun_hf.command_line import argument, format_table, parse_arguments, quiet_libraries, run_script, say


@dataclass
class CurveArguments:
    """Datasets, numbers of pairs, and where the figures go."""

    data_dir: str = argument("data/beir", "Folder with the BEIR folders.")
    datasets: list[str] = argument(["scifact", "nfcorpus"], "Names of BEIR folders with the splits train and test.")
    base_model: str = argument("embedded", "The encoder.")
    counts: list[int] = argument([25, 50, 100, 200, 400, 800], "Numbers of pairs.")
    seeds: list[int] = argument([1], "Seeds of the draw and of the head.")
    output: str = argument("results/pairs_curve.json", "File with all figures.")


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and print one table per dataset."""
    (args,) = parse_arguments([CurveArguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    rows = []
    for name in args.datasets:
        for row in curve(args, Path(args.data_dir) / name):
            rows.append({"dataset": name, **row})
            say(json.dumps(rows[-1]))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    names = ("dataset", "start", "pairs", "seed", "ndcg@10", "recall@100", "unseen_ndcg@10", "base_ndcg@10")
    table = [
        [f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows
    ]
    say(format_table([names, *table], num_names=2))


def curve(args: CurveArguments, folder: Path) -> Any:
    """Yield the figures of every head of one dataset."""
    from ragcun_hf import IsotropicGaussianModel
    from ragcun_hf.data.beir_folder import load_beir_folder
    from ragcun_hf.data.pairs import read_pairs

    test, pairs = load_beir_folder(folder, "test"), list(read_pairs(folder, split="train"))
    corpus = [text for text in test.corpus_texts if text]
    for seed in args.seeds:
        order = random.Random(seed).sample(pairs, len(pairs))
        for start in ("base", "unlabelled"):
            model = IsotropicGaussianModel.from_encoder(args.base_model)
            if start == "unlabelled":
                train(model, "unlabelled", corpus, seed)
                yield {"start": start, "pairs": 0, "seed": seed, **figures(model, test, [])}
            model.save_pretrained("build/pairs_curve_start")
            for count in (count for count in args.counts if count <= len(order)):
                if start == "base":
                    model = IsotropicGaussianModel.from_encoder(args.base_model)
                else:
                    model = IsotropicGaussianModel.from_pretrained("build/pairs_curve_start")
                train(model, "adapt", order[:count], seed, corpus=corpus)
                yield {"start": start, "pairs": count, "seed": seed, **figures(model, test, order[:count])}


def train(model: Any, recipe: str, dataset: Any, seed: int, corpus: list[str] | None = None) -> None:
    """Train a head by a recipe, its exact words fitted to the corpus, and save nothing."""
    from ragcun_hf import IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments

    options = {"output_dir": "build/pairs_curve", "seed": seed, "disable_tqdm": True, "report_to": "none"}
    options |= {"logging_strategy": "no"}
    args = IsotropicGaussianTrainingArguments.from_recipe(recipe, **options)
    IsotropicGaussianTrainer(model, args, train_dataset=dataset, corpus=corpus).train()


def figures(model: Any, test: Any, pairs: list[Any]) -> dict[str, float]:
    """Measure a head on the test queries: all, and those without a document of the training pairs."""
    from ragcun_hf.evaluation.model_evaluation import ModelSystems, TextEncoder, evaluate_model
    from ragcun_hf.features.arguments import FeatureArguments

    systems = ModelSystems(TextEncoder(model, FeatureArguments().store(model, show_progress=False)))
    evaluation = evaluate_model(systems, [test])
    (entry,) = evaluation.datasets.values()
    head, base = entry["systems"]["projection"], entry["systems"]["base"]
    seen = {row["positive"] for row in pairs}
    texts = dict(zip(test.corpus_ids, test.corpus_texts, strict=True))
    unseen = [query for query, judged in test.qrels.items() if not any(texts.get(name) in seen for name in judged)]
    per_query = evaluation.evaluations[0].per_query
    found = {"ndcg@10": head["ndcg@10"], "recall@100": head["recall@100"], "base_ndcg@10": base["ndcg@10"]}
    for prefix, system in (("unseen", "projection"), ("base_unseen", "base")):
        values = [per_query[system][query]["ndcg@10"] for query in unseen if query in per_query[system]]
        found[f"{prefix}_ndcg@10"] = sum(values) / max(1, len(values))
    return found


if __name__ == "__main__":
    run_script(main)
