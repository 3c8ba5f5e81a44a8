"""Render the model card of a trained model from its results files.

    python training/render_card.py --model_path checkpoints/jepa_10k --results results/jepa_10k.json

Every number of the card comes from the results, from the training record in the model's folder, or from the figures
published for a recipe (--recipe). What no file holds is "not measured". The card shows the plots of the evaluation,
and the loss terms in the log of the training record.
Write your own words between the two marker lines of the card; rendering it again keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command_line import argument, parse_arguments, say
from ..commands import command
from ..errors import UserError
from ..evaluation.results import read_json_object, read_record, read_results
from ..files import RECORD_FILE
from ..publishing.card import CARD_TEMPLATE, write_card
from ..publishing.card_sources import PUBLISHED_FIGURES, join_results, keep_sources, read_published

_PLOTS = {
    "comparison.png": "Difference to the frozen base on each data set",
    "isotropy.png": "How evenly the vectors of base and projection spread in all directions",
}
_COMPARISON_PLOT = "Differences between the compared models"


@dataclass
class CardArguments:
    """The model, its results, and the card."""

    model_path: str | None = argument(None, "Folder of the trained model.")
    results: list[str] = argument([], "Results files of this model's evaluations, each with other data sets.")
    comparison: str | None = argument(None, "Results file of a comparison with this model; its plot is shown too.")
    output: str | None = argument(None, "Path of the card. Default: README.md in the model's folder.")
    repo_id: str | None = argument(None, "Id on the Hub, such as organisation/name, for the card's examples.")
    recipe: str | None = argument(None, "Recipe the model was trained with; the card shows its published figures.")
    dataset_ids: list[str] = argument([], "Hub ids of the training data, for the card's metadata.")
    license: str | None = argument(
        None, "License, as an id of the Hub such as mit. Default: that of the base if it is known, else none."
    )
    language: list[str] = argument([], "Languages that the model is for, as codes such as en, for the metadata.")
    training_record: str | None = argument(
        None, "Record of the training. Default: that in the model's folder, if any."
    )
    template: str | None = argument(None, "Jinja template. Default: the package's own, which push expects.")
    published: str | None = argument(None, "Figures published for the recipes. Default: the package's own file.")


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, render and write the card, keep its sources, and print what was written."""
    (args,) = parse_arguments([CardArguments], description=__doc__ or "", arguments=arguments)
    from ..publishing.card_plots import draw_learning_curves, place_plots

    folder = _model_folder(args)
    output = Path(args.output) if args.output else folder / "README.md"
    results = join_results([read_results(path) for path in args.results])
    _check_model(results, folder)
    own = folder / RECORD_FILE
    record_file = Path(args.training_record) if args.training_record else own if own.is_file() else None
    record = read_record(record_file) if record_file else None
    sources = {
        "published": _published(args),
        "comparison": read_json_object(Path(args.comparison)) if args.comparison else None,
        "repo_id": args.repo_id,
        "plots": {**place_plots(_found_plots(args), output), **draw_learning_curves(record or {}, output)},
        "dataset_ids": args.dataset_ids,
        "license_id": args.license,
        "languages": args.language,
    }
    write_card(
        output,
        template=Path(args.template) if args.template else CARD_TEMPLATE,
        results=results,
        training_record=record,
        **sources,
    )
    say(f"Wrote {output}: every number in it comes from a file ({', '.join(args.results)}, ...).")
    if any(entry.get("examples") for entry in results["datasets"].values()):
        say("It shows texts of queries and documents, because the evaluation had --examples.")
    if output.resolve() == (folder / "README.md").resolve():
        keep_sources(folder, results=list(map(Path, args.results)), training_record=record_file, **sources)
        repo_id = args.repo_id or "organisation/name"
        say(f"Next: {command('push_to_hub', '--model_path', folder, '--repo_id', repo_id)}")


def _model_folder(args: CardArguments) -> Path:
    if not args.model_path or not Path(args.model_path).is_dir():
        raise UserError(f"--model_path expects the folder of a trained model, got {args.model_path!r}: check the path")
    if args.repo_id is not None and args.repo_id.count("/") != 1:
        raise UserError(f"--repo_id expects organisation/name, got {args.repo_id!r}: add the organisation or user")
    return Path(args.model_path)


def _check_model(results: dict[str, Any], folder: Path) -> None:
    """Refuse results of another model, as far as the configuration shows it."""
    path = folder / "config.json"
    config = read_json_object(path) if path.is_file() else {}
    measured = {**results["model"], "base_model_name": results["model"]["base_model"]}
    for key in ("base_model_name", "output_dim", "projection_init", "projection_kind", "use_predictor"):
        if key in config and key in measured and config[key] != measured[key]:
            raise UserError(
                f"--results expects results of the model in {folder}, got those of a model with {key} "
                f"{measured[key]!r} instead of {config[key]!r}: evaluate this model, or name its folder"
            )


def _published(args: CardArguments) -> dict[str, Any] | None:
    if args.recipe is None:
        return None
    path = Path(args.published) if args.published else PUBLISHED_FIGURES
    published = read_published(path, args.recipe)
    if published is None:
        raise UserError(
            f"--recipe expects a recipe of {path}, got {args.recipe!r}: use its name, or leave the flag out"
        )
    return published


def _found_plots(args: CardArguments) -> dict[str, tuple[Path, str]]:
    """Return description -> file of the plots of the evaluation, the first of each, with their names beside a card."""
    folders = [Path(path).resolve().with_suffix("") for path in args.results]
    found: dict[str, tuple[Path, str]] = {}
    for name, description in _PLOTS.items():
        files = [folder / name for folder in folders if (folder / name).is_file()]
        found |= {description: (files[0], name)} if files else {}
    of_comparison = Path(args.comparison).resolve().with_suffix(".png") if args.comparison else None
    if of_comparison is not None and of_comparison.is_file():
        found[_COMPARISON_PLOT] = (of_comparison, "models.png")
    return found
