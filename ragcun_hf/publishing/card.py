"""A model card: rendered from its sources, and checked by rendering it again.

Whoever publishes a model may write between two marker lines of the card. Rendering keeps these words, and no digit is
allowed in them. Everything else, metadata included, must equal the rendering.
"""

from __future__ import annotations

import html
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import UserError
from ..files import write_whole
from .card_content import card_metadata, card_sections, hub_id
from .card_findings import without_markup
from .card_labels import card_license, check_languages
from .card_sources import join_results

CARD_TEMPLATE = Path(__file__).with_name("card_template.md")
BEGIN_WORDS = "<!-- begin: your own words, no digits -->"
END_WORDS = "<!-- end: your own words -->"

_SECTION = re.compile(rf"^{re.escape(BEGIN_WORDS)}\n(.*?)^{re.escape(END_WORDS)}$", re.MULTILINE | re.DOTALL)
_ENDS_ADDRESS = re.compile(r"[:()\[\]<>\s\\`|%?#]")  # or makes it that of another machine
# An open tag, comment or code block in the words of the user would hide what follows the section.
_HIDING = re.compile(r"<[A-Za-z/!?]|```|~~~")


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
    license_id: str | None = None,
    languages: Sequence[str] = (),
    is_plain: bool = False,
    own_words: str = "",
) -> str:
    """Render the text of a model card, metadata first, in which every number comes from the given sources.

    `results` come from `read_results`, `join_results` or `nothing_measured`, `published` from `read_published`, and
    `comparison` from a file of `eval_beir.py --compare`; `plots` maps descriptions to addresses relative to the card,
    and `dataset_ids` are Hub ids of the training data. With `is_plain`, it is the card of a plain folder of
    sentence-transformers, of the same model. Without a `license_id`, the license is that of a known base, or
    not stated; `languages` are codes such as `en`.
    """
    from huggingface_hub import ModelCard
    from jinja2 import TemplateError

    results = results if "measurements" in results else join_results([results])
    name = repo_id.split("/")[-1] if repo_id else results["model"]["name"]
    license_of_model = card_license(license_id, hub_id(results["model"]["base_model"]))
    metadata = card_metadata(
        results,
        name=name,
        dataset_ids=dataset_ids,
        license_id=license_of_model[0],
        languages=check_languages(languages),
        is_plain=is_plain,
    )
    sections = card_sections(*map(without_markup, (results, training_record, published, comparison)))
    try:
        card = ModelCard.from_template(
            metadata,
            template_str=_read_template(template),
            name=without_markup(name),
            model_id=repo_id or f"path/to/{without_markup(name)}",
            plots={without_markup(description): _address(place) for description, place in (plots or {}).items()},
            license=license_of_model,
            is_plain=is_plain,
            **sections,
        )
    except UserError:
        raise
    except (TemplateError, ValueError) as error:
        raise UserError(f"{template}: expected a Jinja template of a model card, got {error}: correct it") from error
    lines: list[str] = []
    for line in (line.rstrip() for line in str(card).splitlines()):
        if line or (lines and lines[-1]):  # loops and conditions of the template leave blank lines behind
            lines.append(line)
    text = "\n".join(lines).strip() + "\n"
    section = _section(text)
    if section is None:
        raise UserError(f"{template}: expected the lines {BEGIN_WORDS} and {END_WORDS} once in the card: correct it")
    return text[: section.start(1)] + own_words + text[section.end(1) :]


def _address(place: str) -> str:
    """Return the address of a plot in a card: always that of a file beside it, or below."""
    return _ENDS_ADDRESS.sub(lambda found: quote(found[0], safe=""), place.lstrip("/"))


def _read_template(path: Path) -> str:
    """Read a template, and refuse one that brings figures of its own."""
    text, known = _read(path, "card template"), CARD_TEMPLATE.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(text.splitlines(), start=1):
        if _digit(line) and line not in known:
            raise UserError(
                f"{path}, line {number}: expected digits only in lines of the package's {CARD_TEMPLATE.name}, got "
                f"{line!r}: remove them"
            )
    return text


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"expected a {what}, could not read {path} ({error}): check the path") from error


def _section(text: str) -> re.Match[str] | None:
    """Find the section of the user's own words, if a card has exactly one."""
    is_single = text.count(BEGIN_WORDS) == text.count(END_WORDS) == 1
    return _SECTION.search(text) if is_single else None


def read_own_words(text: str, path: Path) -> str | None:
    """Return the lines between the marker lines of a card, or None without markers; refuse what could mislead."""
    if BEGIN_WORDS not in text and END_WORDS not in text:
        return None
    section = _section(text)
    if section is None:
        raise UserError(
            f"{path}: expected your own words between one line {BEGIN_WORDS} and one line {END_WORDS}, got "
            f"{text.count(BEGIN_WORDS)} and {text.count(END_WORDS)}: leave one pair, each on a line of its own"
        )
    words, first = section.group(1), text.count("\n", 0, section.start(1)) + 1
    for number, line in enumerate(words.splitlines(), start=first):
        digit, hiding = _digit(line), _HIDING.search(line)
        if digit:
            raise UserError(
                f"{path}, line {number}: expected your own words without digits, got {digit!r} in {line!r}: "
                "figures come from results files"
            )
        if hiding:
            raise UserError(
                f"{path}, line {number}: expected plain Markdown, got {hiding.group()!r} in {line!r}: HTML and "
                "code blocks could hide the rest of the card"
            )
    return words


def _digit(line: str) -> str | None:
    """Return the first digit of a line, in any script, as a fraction, Roman numeral or such, or as an HTML entity."""
    return next((each for each in line + html.unescape(line) if unicodedata.category(each).startswith("N")), None)


def write_card(path: Path, *, template: Path = CARD_TEMPLATE, **sources: Any) -> None:
    """Render a card and write it, keeping the user's own words if there is one already; arguments of `render_card`."""
    words = read_own_words(_read(path, "model card"), path) if path.exists() else None
    text = render_card(template=template, **sources, own_words=words or "")
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"expected to write {path}, got {error.strerror}: name another --output") from error


def check_card(path: Path, sources: Mapping[str, Any]) -> None:
    """Refuse a card that differs by a character from the rendering of its sources, outside the user's own words."""
    text = _read(path, "model card")
    words = read_own_words(text, path)
    if words is None:
        raise UserError(
            f"{path}: expected a card with the lines {BEGIN_WORDS} and {END_WORDS}, got one of an older form: render "
            "the card again"
        )
    rendered = render_card(**sources, own_words=words)
    if text != rendered:
        same = os.path.commonprefix([text, rendered])
        start = max(same.rfind("\n") + 1, len(same) - 30)
        raise UserError(
            f"{path}, line {same.count(chr(10)) + 1}: expected {rendered[start : start + 80]!r} as rendered from the "
            f"sources, got {text[start : start + 80]!r}: render the card again, without --template; your own words go "
            f"between {BEGIN_WORDS} and {END_WORDS}"
        )
