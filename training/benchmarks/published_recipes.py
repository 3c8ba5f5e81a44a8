"""Train and evaluate the four published recipes with both starts of the head, and print one table.

    python training/benchmarks/published_recipes.py --base_model embedded --data_dir data/beir \
        --train_data pairs/nq_small.jsonl pairs/msmarco_small.jsonl

Each run calls train_contrastive.py with the recipe, then eval_beir.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ragcun_hf.cli import eval_beir, train_contrastive
from ragcun_hf.command_line import argument, parse_arguments, run_script, say, shipped_file

RECIPES = ("jepa_10k", "512dim_10k", "jepa_iso15_pred12", "pure_isotropy")
STARTS = ("random", "identity")


@dataclass
class Arguments:
    """Training pairs, BEIR datasets, encoder and recipes."""

    train_data: list[str] = argument([], "Training pairs, as for train_contrastive.py.")
    data_dir: str = argument("data/beir", "Folder with the BEIR datasets.")
    datasets: list[str] = argument(["scifact", "nfcorpus", "arguana"], "Names of the BEIR datasets.")
    base_model: str = argument("embedded", "The encoder.")
    recipes: list[str] = argument(list(RECIPES), "Names of the recipes.")
    output_dir: str = argument("results/published", "Folder for the models, the results and the table.")


def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate every recipe with every start, then print the table."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    rows = []
    for recipe in args.recipes:
        for start in STARTS:
            results = run_recipe(args, recipe, start)
            rows.append((recipe, start, results))
    table = "\n".join(_table(rows, args.datasets))
    (Path(args.output_dir) / "table.md").write_text(table + "\n", encoding="utf-8")
    say(table)


def run_recipe(args: Arguments, recipe: str, start: str) -> dict:
    """Train one recipe with one start of the head, evaluate it, and return the content of the results file."""
    from ragcun_hf.evaluation.results import read_results

    name = recipe if start == "random" else f"{recipe}-{start}"
    output = Path(args.output_dir)
    model = output / "models" / name
    train = ["--recipe", recipe, "--base_model", args.base_model, "--train_data", *args.train_data]
    train_contrastive.main([*train, "--projection_init", start, "--output_dir", str(model), "--overwrite"])
    flags = ["--model_path", str(model), "--datasets", *args.datasets, "--data_dir", args.data_dir]
    if "use_predictor: true" in shipped_file("recipes", recipe).read_text(encoding="utf-8"):
        flags.append("--use_predictor")
    eval_beir.main([*flags, "--output_dir", str(output), "--run_name", name])
    return read_results(output / f"{name}.json")


def _table(rows: list[tuple[str, str, dict]], datasets: list[str]) -> list[str]:
    lines = [f"| recipe | start | query by | {' | '.join(datasets)} | mean |", "|---" * (len(datasets) + 4) + "|"]
    for recipe, start, results in rows:
        for system in results["mean"]:
            if system == "base" and (recipe, start) != rows[0][:2]:
                continue
            names = ("frozen base", "-") if system == "base" else (recipe, start)
            figures = [results["datasets"][name]["systems"][system]["ndcg@10"] for name in datasets]
            cells = [*names, system, *(f"{figure:.4f}" for figure in [*figures, results["mean"][system]["ndcg@10"]])]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    run_script(main)
