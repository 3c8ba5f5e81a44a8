"""The check that a model card still says what its files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.results import read_results
from .card_findings import comparison_of_model, comparison_sentences
from .card_numbers import allowed_numbers, body_lines, check_card_numbers
from .model_card import CARD_TEMPLATE, join_results, read_json_object, read_published, render_card


def check_card(
    path: Path,
    results_path: Path | Sequence[Path],
    *,
    training_path: Path | None = None,
    published_path: Path | None = None,
    comparison_path: Path | None = None,
    recipe: str | None = None,
    repo_id: str | None = None,
    template: Path = CARD_TEMPLATE,
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
    paths = [results_path] if isinstance(results_path, Path) else list(results_path)
    sources = {
        "results": join_results([read_results(file) for file in paths]),
        "training_record": read_json_object(training_path) if training_path and training_path.is_file() else None,
        "published": read_published(published_path, recipe or path.stem) if published_path is not None else None,
        "comparison": None if comparison_path is None else read_json_object(comparison_path),
    }
    check_card_against(path, sources, repo_id=repo_id, template=template)


def check_card_against(
    path: Path, sources: Mapping[str, Any], *, repo_id: str | None = None, template: Path = CARD_TEMPLATE
) -> None:
    """Do the same with contents of files instead of paths: `results`, `training_record`, `published`, `comparison`."""
    from huggingface_hub import ModelCard

    results, comparison = sources["results"], sources["comparison"]
    try:
        text = path.read_text(encoding="utf-8")
        found = ModelCard(text)
    except OSError as error:
        raise UserError(f"expected a model card, could not read {path} ({error.strerror}): render it") from error
    except ValueError as error:
        raise UserError(f"{path}: expected valid metadata, got {error}: render the card again") from error
    rendered = render_card(template=template, **sources)
    compared = None if comparison is None else comparison_of_model(comparison, results["model"])
    try:
        check_card_numbers(text, allowed_numbers(**{**sources, "comparison": compared}, repo_id=repo_id))
        _check_table_rows(text, rendered)
        _check_sentences(text, results)
        _check_metadata(found, ModelCard(rendered))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


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
