"""From search results to runs (query -> document -> score), and runs as TREC files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from ..data.mapped_column import take
from ..errors import UserError
from ..files import write_whole
from ..search.exact import SearchResult
from ..search.ties import Rows

Run = dict[str, dict[str, float]]


def build_run(
    query_ids: Sequence[str],
    document_ids: Sequence[str],
    search_result: SearchResult,
    *,
    drop_identical_ids: bool = True,
    k: int = 100,
) -> Run:
    """Name the found documents, and leave out the query itself as BEIR does.

    Args:
        query_ids: Id of each row of the search result, length Q, all different.
        document_ids: Id of each searched document, length N, all different (looked at among those that were found).
        search_result: Scores and rows (Q, K). With `drop_identical_ids`, search for k + 1.
        drop_identical_ids: Drop the document whose id equals the query's (ArguAna's queries are in its
            corpus), then cut to k.
        k: Documents kept per query.

    Returns:
        Query id -> document id -> score, best first, at most k documents each.

    Raises:
        ValueError: If lengths do not fit, an id repeats, or the search was too short for k.

    Example:
        >>> import numpy as np
        >>> found = SearchResult(np.array([[0.9, 0.5]], dtype=np.float32), np.array([[1, 0]]))
        >>> build_run(["b"], ["a", "b"], found, k=1)
        {'b': {'a': 0.5}}
    """
    _check_ids(query_ids, "query", len(search_result.indices))
    needed = min(k + drop_identical_ids, len(document_ids))
    if len(query_ids) and search_result.indices.shape[1] < needed:
        raise ValueError(
            f"expected {needed} results per query to keep {k}, got {search_result.indices.shape[1]}: search for k + 1"
        )
    distinct, places = np.unique(search_result.indices, return_inverse=True)
    names = np.array(take(document_ids, distinct.tolist()), dtype=object)
    _check_ids(names.tolist(), "document", None)
    run: Run = {}
    found = names[places.reshape(search_result.indices.shape)]
    for query_id, documents, scores in zip(query_ids, found, search_result.scores, strict=True):
        ranking = dict(zip(documents.tolist(), scores.tolist(), strict=True))
        if drop_identical_ids:
            ranking.pop(query_id, None)
        run[query_id] = ranking if len(ranking) <= k else dict(islice(ranking.items(), k))
    return run


def _check_ids(ids: Sequence[str], what: str, expected: int | None) -> None:
    if expected is not None and len(ids) != expected:
        raise ValueError(
            f"expected {expected} {what} ids, one per row, got {len(ids)}: pass the ids that were encoded"
        )
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        repeated = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UserError(f"expected {what} ids that are all different, got {repeated!r} twice: remove one of the two")


def write_trec_run(path: str | os.PathLike[str], run: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Write a run in TREC format: `query Q0 document rank score tag`, one line per document.

    The same run always gives the same bytes: queries are ordered by id, documents by falling score
    and then by id, and scores are written with as many digits as reading them back exactly needs. A
    query without documents leaves no line. (trec_eval ignores the rank and orders again by score,
    equal scores by falling id.)

    Args:
        path: File to write; replaced at once when complete.
        run: Query id -> document id -> score.
        tag: Name of the system, without spaces.

    Raises:
        UserError: If an id or the tag is empty or contains a space, or a score is not finite.
    """
    _check_word(tag, "tag")
    lines = []
    for query in sorted(run):
        _check_word(query, "query id")
        ordered = sorted(run[query].items(), key=lambda item: (-item[1], item[0]))
        for rank, (document, score) in enumerate(ordered, start=1):
            _check_word(document, "document id")
            if not math.isfinite(score):
                raise UserError(f"expected finite scores, got {score} for query {query!r}: check the model's vectors")
            lines.append(f"{query} Q0 {document} {rank} {float(score)!r} {tag}\n")
    write_whole(Path(path), "".join(lines))


def check_trec_ids(ids: Iterable[str], what: str) -> None:
    """Refuse ids that `write_trec_run` would refuse, before the work that leads to a run.

    Args:
        ids: Ids of queries or documents.
        what: How an error calls one of them, such as `query id`.

    Raises:
        UserError: If an id is empty or contains a space.
    """
    for word in ids:
        _check_word(word, what)


def _check_word(word: str, what: str) -> None:
    # Readers of TREC files split at ASCII white space only; other Unicode spaces are part of an id.
    if not word or re.search(r"\s", word, flags=re.ASCII):
        raise UserError(f"expected a {what} without spaces for a TREC file, got {word!r}: rename it")


def read_trec_run(path: str | os.PathLike[str]) -> Run:
    """Read a run in TREC format.

    Args:
        path: File with lines `query Q0 document rank score tag`; ranks are ignored.

    Returns:
        Query id -> document id -> score, in the order of the file.

    Raises:
        UserError: If the file cannot be read, or a line is malformed or repeats a document.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a TREC run file, could not read {path} ({error}): check the path") from error
    run: Run = {}
    for number, line in enumerate(text.split("\n"), start=1):
        words = re.split(r"[ \t]+", line.strip(" \t\r"))
        if words == [""]:
            continue
        try:
            query, _, document, _, score, _ = words
            value = float(score)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: expected `query Q0 document rank score tag`, got {line!r}: correct the line"
            ) from error
        if document in run.setdefault(query, {}):
            raise UserError(f"{path}, line {number}: expected each document once, got {document!r} again: remove it")
        run[query][document] = value
    return run


class IdOrder:
    """The lower id comes first; ids are looked up when they are asked for, so that many can stay on the disk.

    Args:
        ids: Id of each document, all different.

    Example:
        >>> IdOrder(["b", "a", "c"])(np.array([2, 0, 2])).tolist()
        [1, 0, 1]
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids

    def __call__(self, rows: Rows) -> Rows:
        """Number some rows (P,) by the order of their ids among them."""
        distinct, places = np.unique(rows, return_inverse=True)
        names = take(self._ids, distinct.tolist())
        ranks = np.empty(len(names), dtype=np.int64)
        ranks[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
        return ranks[places]
