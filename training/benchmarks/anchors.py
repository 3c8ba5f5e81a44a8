"""Put encoders side by side: each as its makers publish it, without labels, and trained on a dataset's own pairs.

    python training/benchmarks/anchors.py --bases BAAI/bge-small-en-v1.5 intfloat/e5-small-v2 --data_dir data/beir

For each encoder and BEIR folder it trains the recipe `unlabelled` on the corpus and `adapt` on the pairs of the split
train, where there is one, and evaluates both beside the base, BM25 and their fusion. The prompts are those that the
makers publish. An encoder that is refused gets a line with the reason. What is finished is not computed again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragcun_hf.cli import eval_beir, train_contrastive, train_self_supervised
from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script, say
from ragcun_hf.errors import UserError
from ragcun_hf.model.sentence_transformers_isotropic_gaussian import published_prompts

_SYSTEMS = {"base": "as published", "bm25": "BM25", "fusion": "base + BM25"}  # of a results file


@dataclass
class Arguments:
    """Encoders, BEIR datasets, and where models and results go."""

    bases: list[str] = argument(["embedded"], "Encoders: names on the Hub, folders, or embedded.")
    data_dir: str = argument("data/beir", "Folder with the BEIR datasets.")
    datasets: list[str] = argument(["scifact", "nfcorpus", "arguana"], "Names of the BEIR datasets.")
    output_dir: str = argument("results/anchors", "Folder for the models, the results and the table.")


def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate every encoder on every dataset, then print and save the table."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    rows = [row for base in args.bases for row in rows_of_base(args, base)]
    header = f"| encoder | vectors | {' | '.join(args.datasets)} | mean | recall@100 |"
    lines = [header, "|---" * (len(args.datasets) + 4) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    path = Path(args.output_dir) / "table.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say("\n".join(lines) + f"\nNDCG@10 of each dataset, its mean, and the mean recall@100. Wrote {path}")


def rows_of_base(args: Arguments, base: str) -> list[list[str]]:
    """Return the cells of one encoder: a row for each kind of vectors."""
    found: dict[str, dict[str, Any]] = {}  # kind of vectors -> dataset -> figures
    try:
        for dataset in args.datasets:
            for kind, figures in figures_of_dataset(args, base, Path(args.data_dir) / dataset).items():
                found.setdefault(kind, {})[dataset] = figures
    except UserError as error:
        return [[base, f"refused: {str(error).splitlines()[0]}", *["-"] * (len(args.datasets) + 2)]]
    return [[base, kind, *_cells(figures, args.datasets)] for kind, figures in found.items()]


def _cells(figures: dict[str, dict[str, float]], datasets: list[str]) -> list[str]:
    ndcg = [figures[name]["ndcg@10"] if name in figures else None for name in datasets]
    means = [sum(each[name] for each in figures.values()) / len(datasets) for name in ("ndcg@10", "recall@100")]
    # A mean over fewer datasets could not be compared with the others.
    values = [*ndcg, *(means if len(figures) == len(datasets) else [None, None])]
    return ["-" if value is None else f"{value:.4f}" for value in values]


def figures_of_dataset(args: Arguments, base: str, folder: Path) -> dict[str, dict[str, float]]:
    """Train and evaluate the recipes of one dataset: kind of vectors -> figures."""
    place = Path(args.output_dir) / re.sub(r"[^A-Za-z0-9._-]+", "--", base).strip("-")
    # Prompts in an encoder's own files are used without a flag.
    prompts = ["--query_prompt", "auto"] if published_prompts(base) else []
    shared = ["--base_model", base, *prompts]
    found: dict[str, dict[str, float]] = {}
    for recipe, train, data in (
        ("unlabelled", train_self_supervised, "--documents"),
        ("adapt", train_contrastive, "--train_data"),
    ):
        if recipe == "adapt" and not (folder / "qrels" / "train.tsv").is_file():
            continue
        results = place / f"{folder.name}-{recipe}.json"
        if not results.is_file():
            model = place / "models" / f"{folder.name}-{recipe}"
            flags = ["--recipe", recipe, *shared, data, str(folder), "--output_dir", str(model), "--overwrite"]
            train.main(flags)
            _evaluate(model, folder, results)
        found |= _figures(results, folder.name, recipe)
    return found


def _evaluate(model: Path, folder: Path, results: Path) -> None:
    flags = ["--model_path", str(model), "--datasets", folder.name, "--data_dir", str(folder.parent)]
    eval_beir.main([*flags, "--output_dir", str(results.parent), "--run_name", results.stem])


def _figures(results: Path, dataset: str, recipe: str) -> dict[str, dict[str, float]]:
    from ragcun_hf.evaluation.results import read_results

    systems = read_results(results)["datasets"][dataset]["systems"]
    names = {**_SYSTEMS, "projection": recipe}
    return {kind: systems[name] for name, kind in names.items() if name in systems}


if __name__ == "__main__":
    run_script(main)
