"""Model cards: rendered from a results file, and checked against it ever after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.results import mean_over_datasets, read_results
from ..files import write_whole
from .card_comparison import comparison_of_model
from .card_content import card_metadata, card_sections
from .card_findings import comparison_sentences
from .card_numbers import allowed_numbers, body_lines, check_card_numbers

__all__ = [
    "allowed_numbers",
    "check_card",
    "check_card_numbers",
    "join_results",
    "read_json_object",
    "read_published",
    "render_card",
    "write_card",
]

_MEASUREMENT_KEYS = ("created", "command", "commit", "versions", "machine", "settings")


def render_card(
    *,
    template: Path,
    results: Mapping[str, Any],
    training_record: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
    comparison: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    plots: Mapping[str, str] | None = None,
    dataset_ids: Sequence[str] = (),
) -> str:
    """Render a model card in which every number stems from the given files.

    Args:
        template: Jinja template, with the metadata block as `{{ card_data }}`.
        results: As from `read_results` or `join_results`.
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


def check_card(
    path: Path,
    results_path: Path | Sequence[Path],
    *,
    training_path: Path | None = None,
    published_path: Path | None = None,
    comparison_path: Path | None = None,
    recipe: str | None = None,
    repo_id: str | None = None,
    template: Path,
) -> None:
    """Refuse a card whose numbers are not those of its files.

    Text may be added or written anew as long as its numbers are in the files. Rows of tables, the sentences on
    how the model stands to its frozen base, and the figures in the metadata must be exactly those that rendering
    makes: figures cannot change places, and a loss cannot be left out.

    Args:
        path: The card.
        results_path: The results file, or several.
        training_path: The training record, if the card shows one; a path without a file means none.
        published_path: The file of published figures, if the card shows any.
        comparison_path: The file of `eval_beir.py --compare`, if the card shows any.
        recipe: Whose published figures; default: the card's file name.
        repo_id: Id on the Hub that the card was rendered with, if any.
        template: The template of the card.

    Raises:
        UserError: Naming the card, and the first line or figure that no file holds.
    """
    from huggingface_hub import ModelCard

    paths = [results_path] if isinstance(results_path, Path) else list(results_path)
    results = join_results([read_results(file) for file in paths])
    record = read_json_object(training_path) if training_path is not None and training_path.is_file() else None
    published = read_published(published_path, recipe or path.stem) if published_path is not None else None
    try:
        text = path.read_text(encoding="utf-8")
        found = ModelCard(text)
    except OSError as error:
        raise UserError(f"expected a model card, could not read {path} ({error.strerror}): render it") from error
    except ValueError as error:
        raise UserError(f"{path}: expected valid metadata, got {error}: render the card again") from error
    comparison = None if comparison_path is None else read_json_object(comparison_path)
    sources: dict[str, Any] = {"results": results, "training_record": record, "published": published}
    rendered = render_card(template=template, comparison=comparison, **sources)
    compared = None if comparison is None else comparison_of_model(comparison, results["model"])
    try:
        check_card_numbers(text, allowed_numbers(**sources, comparison=compared, repo_id=repo_id))
        _check_table_rows(text, rendered)
        _check_sentences(text, results)
        _check_metadata(found, ModelCard(rendered))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


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
        raise UserError(f"{path}: expected the key 'recipes', got none: take model_cards/published.json as a pattern")
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


def _check_table_rows(text: str, rendered: str) -> None:
    """Both ways: no row that the files do not give, and none left out that they do (a loss, for example)."""
    found, expected = _table_rows(text), _table_rows(rendered)
    for line, line_number in found.items():
        if line not in expected:
            raise UserError(
                f"model card, line {line_number}: expected a table row as rendered from the results, got {line!r}: "
                "render the card again"
            )
    for line in expected:
        if line not in found:
            raise UserError(f"model card: expected the table row {line!r}, got none: render the card again")


def _table_rows(text: str) -> dict[str, int]:
    """Map every table row with a digit to its line number."""
    return {
        line.strip(): line_number
        for line_number, line in body_lines(text)
        if line.strip().startswith("|") and any(character.isdigit() for character in line)
    }


def _check_sentences(text: str, results: Mapping[str, Any]) -> None:
    for sentence in comparison_sentences(results):
        if sentence not in text:
            raise UserError(f"model card: expected the sentence {sentence!r}, got none: render the card again")


def _check_metadata(found: Any, rendered: Any) -> None:
    expected = {_without_value(result): result.metric_value for result in rendered.data.eval_results or []}
    for result in found.data.eval_results or []:
        key = _without_value(result)
        if expected.get(key) != result.metric_value:
            raise UserError(
                f"model card, metadata: expected {expected.get(key, 'no figure')} as {result.metric_name} on "
                f"{result.dataset_name}, got {result.metric_value}: render the card again"
            )


def _without_value(result: Any) -> tuple[Any, ...]:
    return (*result.unique_identifier, result.metric_type, result.metric_name)
