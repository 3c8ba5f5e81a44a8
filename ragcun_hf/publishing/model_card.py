"""Model cards, rendered from results files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.results import mean_over_datasets
from ..files import write_whole
from .card_content import card_metadata, card_sections
from .card_findings import comparison_of_model
from .card_numbers import allowed_numbers, check_card_numbers

CARD_TEMPLATE = Path(__file__).with_name("card_template.md")
PUBLISHED_FIGURES = CARD_TEMPLATE.with_name("published.json")

_MEASUREMENT_KEYS = ("created", "command", "commit", "versions", "machine", "settings")


def render_card(
    *,
    results: Mapping[str, Any],
    template: Path = CARD_TEMPLATE,
    training_record: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
    comparison: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    plots: Mapping[str, str] | None = None,
    dataset_ids: Sequence[str] = (),
) -> str:
    """Render a model card in which every number stems from the given files.

    Args:
        results: As from `read_results`, `join_results` or `nothing_measured`.
        template: Jinja template, with the metadata block as `{{ card_data }}`.
        training_record: Content of the model folder's `training_record.json`; None: settings are "not recorded".
        published: One recipe's published figures, as from `read_published`; None: the section is left out.
        comparison: Content of a file of `eval_beir.py --compare`; None: the section is left out.
        repo_id: Id on the Hub, for the examples of use; None: a placeholder for the folder.
        plots: Description -> address, relative to the card.
        dataset_ids: Hub ids of the training data, for the metadata.

    Returns:
        The card's text, metadata first.

    Raises:
        UserError: If the template cannot be read or used, or holds a number that no file holds, or the comparison is
            of other models.
    """
    from huggingface_hub import ModelCard
    from jinja2 import TemplateError

    results = results if "measurements" in results else join_results([results])
    name = repo_id.split("/")[-1] if repo_id else results["model"]["name"]
    compared = None if comparison is None else comparison_of_model(comparison, results["model"])
    metadata = card_metadata(
        results,
        name=name,
        dataset_ids=dataset_ids,
        uses_prediction=bool(results["model"]["use_predictor"]),
    )
    try:
        card = ModelCard.from_template(
            metadata,
            template_path=str(template),
            name=name,
            model_id=repo_id or f"path/to/{name}",
            model=results["model"],
            settings=results["settings"],
            published=published,
            plots=plots or {},
            has_record=training_record is not None,
            **card_sections(results, training_record, published, compared),
        )
    except OSError as error:
        raise UserError(f"expected a card template, could not read {template} ({error.strerror})") from error
    except (TemplateError, ValueError) as error:
        raise UserError(f"{template}: expected a Jinja template of a model card, got {error}: correct it") from error
    text = _without_blank_runs(str(card))
    allowed = allowed_numbers(results, training_record, published, comparison=compared, repo_id=repo_id)
    check_card_numbers(text, allowed)
    return text


def join_results(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join results files of one model, each with other data sets.

    Args:
        results: As from `read_results`, at least one.

    Returns:
        The first, with everybody's data sets, the mean over them, and under `measurements` how each was made.
        The isotropy is the first file's.

    Raises:
        UserError: If they are of different models, or measure a data set twice.
    """
    if not results:
        raise UserError("--results expects at least one results file, got none: write one with training/eval_beir.py")
    first = results[0]
    datasets: dict[str, Any] = {}
    for part in results:
        if part["model"] != first["model"]:
            raise UserError(
                f"--results expects files of one model, got {first['model']['name']!r} and {part['model']['name']!r} "
                "with different settings: render a card for each"
            )
        twice = sorted(datasets.keys() & part["datasets"].keys())
        if twice:
            raise UserError(f"--results expects each data set once, got {twice[0]!r} twice: leave one file out")
        datasets |= part["datasets"]
    measurements = [{key: part[key] for key in _MEASUREMENT_KEYS} for part in results]
    return {**first, "datasets": datasets, "mean": mean_over_datasets(datasets), "measurements": measurements}


def nothing_measured(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Stand in for results where nothing was evaluated yet: the card then says "not measured".

    Args:
        name: The model's name.
        config: Content of its `config.json`.

    Returns:
        What `join_results` gives, without data sets and measurements.
    """
    facts = ("use_predictor", "output_dim", "projection_init", "projection_kind", "freeze_base")
    model = {fact: config[fact] for fact in facts if fact in config}
    base, similarity = config.get("base_model_name"), config.get("similarity_fn_name", "cosine")
    model |= {"name": name, "path": name, "base_model": base, "similarity": similarity}
    empty: dict[str, Any] = {part: {} for part in ("datasets", "mean", "isotropy", "settings")}
    return {"model": {"use_predictor": False, **model}, "measurements": [], **empty}


def read_published(path: Path, recipe: str) -> dict[str, Any] | None:
    """Read the figures published for a recipe.

    Args:
        path: File with `recipes`: name -> `figures` (`label`, `value`), `source`, `remark`.
        recipe: Name of the recipe.

    Returns:
        The recipe's part with its name under `recipe`, or None if nothing was published for it.

    Raises:
        UserError: If the file cannot be read.
    """
    recipes = read_json_object(path).get("recipes")
    if not isinstance(recipes, Mapping):
        raise UserError(
            f"{path}: expected the key 'recipes', got none: take publishing/published.json of the package as a pattern"
        )
    return {"recipe": recipe, **recipes[recipe]} if recipe in recipes else None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        UserError: If it cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"expected a JSON file, could not read {path} ({error.strerror}): check the path") from error
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got something else ({error}): write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(content).__name__}: write it again")
    return content


def write_card(path: Path, text: str) -> None:
    """Write a card whole or not at all.

    Args:
        path: The card; its folder is made if needed.
        text: As from `render_card`.

    Raises:
        UserError: If the folder cannot be written to.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"expected to write {path}, got {error.strerror}: name another --output") from error


def _without_blank_runs(text: str) -> str:
    """Loops and conditions of the template leave blank lines behind."""
    lines: list[str] = []
    for line in (line.rstrip() for line in text.splitlines()):
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip() + "\n"
