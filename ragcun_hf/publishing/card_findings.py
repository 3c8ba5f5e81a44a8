"""What the figures of a results file say in words: better or worse than the frozen base, and on what."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..evaluation.results import (
    BASE_SYSTEM,
    BASELINES,
    BM25_SYSTEM,
    CLOSED_FORM_SYSTEM,
    FUSION_SYSTEM,
    MAIN_METRIC,
    MOVED_SYSTEM,
    compared_systems,
)

NOT_MEASURED = "not measured"
_BASELINES_IN_WORDS = {
    BM25_SYSTEM: "BM25, which needs no encoder,",
    FUSION_SYSTEM: "the fusion of frozen base and BM25, which needs no training,",
    CLOSED_FORM_SYSTEM: "the closed form, which moves known documents to their training queries,",
}

_SUBJECTS = {BM25_SYSTEM: "BM25", MOVED_SYSTEM: "the projection with known documents moved"}

# Entities, not backslashes, which would show up inside code and in front of letters.
_ESCAPED = {each: f"&#{ord(each)};" for each in "\\`*_[]|~$"}
# Some signs begin code, a link, HTML or a cell anywhere; others make a heading, a quotation or a list of a line.
_MARKUP = re.compile(r"[`\[\]<|$]|^(?:[#>=+*-]|~(?=~))")
_DIRECTIONS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # signs that show the text after them backwards
_PATH = re.compile(r"(?:~|[A-Za-z]:)?[\\/].*[\\/](?=[^\\/])", re.DOTALL)

_OUTCOMES = {
    "below": "is below the frozen base on",
    "above": "is above the frozen base on",
    "alike": "does not differ significantly from the frozen base (the 95% interval includes zero) on",
    "untested": "differs from the frozen base, not tested for significance, on",
}
_VERDICTS = {
    frozenset[str](): "Whether this model retrieves better than its frozen base was not measured.",
    frozenset({"untested"}): (
        "No difference from the frozen base was tested for significance, so it is not known which of them is better."
    ),
    frozenset({"below"}): "On every data set measured here, the frozen base alone retrieves better than this model.",
    frozenset({"above"}): "On every data set measured here, this model retrieves better than its frozen base.",
    frozenset({"alike"}): (
        "On the data sets measured here, this model does not differ significantly from its frozen base."
    ),
    frozenset({"below", "alike"}): (
        "On some data sets measured here, this model is worse than its frozen base; on none is it better."
    ),
    frozenset({"above", "alike"}): (
        "On some data sets measured here, this model is better than its frozen base; on none is it worse."
    ),
}


def format_figure(value: float | None) -> str:
    """Write a measured figure with four decimals, or with one from 10 on."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"


def format_difference(value: float | None) -> str:
    """Write a difference with its sign and four decimals."""
    return NOT_MEASURED if value is None else f"{round(value, 4) + 0.0:+.4f}"  # + 0.0 turns -0.0 into 0.0


def format_setting(value: Any) -> str:
    """Write a setting or a count from a JSON file as one line."""
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{format_setting(key)} {format_setting(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(format_setting(item) for item in value) or "none"
    return " ".join(without_folders(str(value)).split())


def format_text(text: str) -> str:
    """Write a text of a corpus so that a card shows it as it is, in one cell: it brings no Markdown or HTML.

    >>> format_text("a | *b* <c> [d](e)")
    'a &#124; &#42;b&#42; &lt;c&gt; &#91;d&#93;(e)'
    """
    return "".join(_ESCAPED.get(each, each) for each in html.escape(_one_line(text), quote=False))


def without_markup(value: Any, place: tuple[Any, ...] = ()) -> Any:
    r"""Return the content of a JSON file with all keys and texts on one line each, and without Markdown or HTML.

    Results, records and comparisons may come from somebody else. Commands, which a card has in code blocks, keep all
    signs that cannot end the block; `format_text` writes the texts of examples. Both are known by the keys that lead
    to them, `place`: a setting may have the same name.

    >>> without_markup({"name": "a<b> [c](d)", "command": "run `x`\n```", "seeds": [1, "# 2"]})
    {'name': 'a&#60;b> &#91;c&#93;(d)', 'command': "run `x` '''", 'seeds': [1, '&#35; 2']}
    """
    if isinstance(value, Mapping):
        if len(place) == 3 and (place[0], place[2]) == ("datasets", "examples"):
            return value
        return {without_markup(key): without_markup(item, (*place, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_markup(item, place) for item in value]
    if not isinstance(value, str):
        return value
    if place in (("command",), ("measurements", "command")):
        return re.sub("```|~~~", "'''", _one_line(value))
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", _one_line(value))


def _one_line(text: str) -> str:
    return " ".join(_DIRECTIONS.sub(" ", text).split())


def without_folders(text: str) -> str:
    """Return the last part of a path that starts at a root or at home, and any other text unchanged.

    A file of an earlier version, or a setting in Python, may hold a path with the name of a user.

    >>> without_folders("/home/jane/docs.jsonl"), without_folders("beir/scifact")
    ('docs.jsonl', 'beir/scifact')
    """
    found = _PATH.match(text)
    return text[found.end() :].rstrip("\\/") if found else text


class Outcome(NamedTuple):
    """How one system compares with the frozen base on one set of queries."""

    system: str
    kind: str  # a key of _OUTCOMES
    words: str  # the queries, with both figures


def compare_with_base(places: Mapping[str, Mapping[str, Any]]) -> list[Outcome]:
    """Compare each system with the base; `places` maps a name to an entry of a results file."""
    found = []
    for place, entry in places.items():
        for system, value, difference, tested in compared_systems(entry):
            if difference is None:
                continue
            if tested is None:
                kind = "untested"
            else:
                kind = "below" if tested["high"] < 0 else "above" if tested["low"] > 0 else "alike"
            base = entry["systems"][BASE_SYSTEM][MAIN_METRIC]
            figures = f"{format_figure(value)} against {format_figure(base)}, {format_difference(difference)}"
            found.append(Outcome(system, kind, f"{place} ({figures})"))
    return found


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Say in one sentence whether the model or its frozen base is better, as far as the figures show it."""
    kinds = frozenset(outcome.kind for outcome in outcomes if outcome.system not in (*BASELINES, MOVED_SYSTEM))
    if kinds >= {"below", "above"}:
        return (
            "Compared with its frozen base, this model wins in some of the measurements made here and loses in others."
        )
    return _VERDICTS.get(
        kinds,
        "Some differences from the frozen base were not tested for significance, so there is no overall verdict.",
    )


def describe(outcomes: Sequence[Outcome], *, queries: str = "") -> list[str]:
    """Write a sentence for each kind and system, losses first; `queries` says which, if not all."""
    sentences = []
    for kind, words in _OUTCOMES.items():
        for system in dict.fromkeys(outcome.system for outcome in outcomes):
            found = [outcome.words for outcome in outcomes if (outcome.kind, outcome.system) == (kind, system)]
            if found:
                places = " and ".join(part for part in (", ".join(found[:-1]), found[-1]) if part)
                name = _SUBJECTS.get(system, f"the {system.replace('_', ' ')}")
                sentences.append(f"{queries}NDCG@10 of {name} {words} {places}.")
    return sentences


def describe_baselines(datasets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name the data sets on which a baseline other than the base is above a system of the model."""
    found: dict[tuple[str, str], list[str]] = {}
    for baseline in _BASELINES_IN_WORDS:
        for place, entry in datasets.items():
            values = {system: metrics.get(MAIN_METRIC) for system, metrics in entry["systems"].items()}
            reached = values.get(baseline)
            for system, value in values.items():
                if system not in (*BASELINES, MOVED_SYSTEM) and None not in (value, reached) and reached > value:
                    figures = f"{format_figure(reached)} against {format_figure(value)}"
                    found.setdefault((baseline, system), []).append(f"{place} ({figures})")
    return [
        f"NDCG@10 of {_BASELINES_IN_WORDS[baseline]} is above that of the {system} (not tested for significance) on "
        f"{', '.join(places)}."
        for (baseline, system), places in found.items()
    ]


def describe_unseen(datasets: Mapping[str, Mapping[str, Any]], *, has_lexical: bool = False) -> str:
    """Say on which data sets no relevant document was a training document, where that is recorded; else ""."""
    places = [name for name, entry in datasets.items() if entry.get("num_seen_queries") == 0]
    if not places:
        return ""
    sentence = (
        f"No test query's document was trained on: none of the documents that answer the queries of "
        f"{', '.join(places)} is, word for word, among the training documents."
    )
    # It is fitted to the documents to search, without their queries: that is known, and no training.
    fitted = " The lexical half, which needs no queries, was fitted to a corpus that may contain them."
    return sentence + fitted * has_lexical


def describe_memory(datasets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Compare on the queries that have, and on those that have no, relevant document used in training."""
    sentences = []
    for subset, words in (("unseen_documents", "no"), ("seen_documents", "a")):
        places = {
            name: entry["subsets"][subset] for name, entry in datasets.items() if subset in entry.get("subsets", {})
        }
        queries = f"For queries with {words} relevant document among the training documents, "
        sentences += describe(compare_with_base(places), queries=queries)
    if sentences:
        sentences.append(
            "Gains on seen documents are partly memorized; the unseen ones show what to expect of new texts."
        )
    return sentences
