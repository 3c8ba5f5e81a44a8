"""Runs (query -> document -> score): built from search results, and written as TREC files."""

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

Run = dict[str, dict[str, float]]


def build_run(
    query_ids: Sequence[str],
    document_ids: Sequence[str],
    search_result: SearchResult,
    *,
    drop_identical_ids: bool = True,
    k: int = 100,
) -> Run:
    """Turn search results into a run, best first, without the document that has the query's own id, as in BEIR.

    Query ids name the rows of the search result, document ids the searched documents; found ids must be different.
    (ArguAna's queries are in its corpus.) To drop identical ids and keep k documents, search for k + 1. A document row
    of -1 stands for none: BM25 finds only documents that share a word with the query.

    >>> import numpy as np
    >>> found = SearchResult(np.array([[0.9, 0.5]], dtype=np.float32), np.array([[1, 0]]))
    >>> build_run(["b"], ["a", "b"], found, k=1)
    {'b': {'a': 0.5}}
    """
    num_rows, num_found = search_result.indices.shape
    if len(query_ids) != num_rows:
        raise ValueError(
            f"expected {num_rows} query ids, one per row, got {len(query_ids)}: pass the ids that were encoded"
        )
    needed = min(k + drop_identical_ids, len(document_ids))
    if num_rows and num_found < needed:
        raise ValueError(f"expected {needed} results per query to keep {k}, got {num_found}: search for k + 1")
    is_found = search_result.indices >= 0
    distinct, places = np.unique(search_result.indices[is_found], return_inverse=True)
    names = take(document_ids, distinct.tolist())
    for ids, what in ((query_ids, "query"), (names, "document")):
        if len(set(ids)) != len(ids):
            repeated = next(name for place, name in enumerate(ids) if name in ids[:place])
            raise UserError(
                f"expected {what} ids that are all different, got {repeated!r} twice: remove one of the two"
            )
    run: Run = {}
    found = np.full(search_result.indices.shape, None, dtype=object)
    found[is_found] = np.array(names, dtype=object)[places]
    for query_id, documents, scores in zip(query_ids, found, search_result.scores, strict=True):
        ranking = dict(zip(documents.tolist(), scores.tolist(), strict=True))
        ranking.pop(None, None)
        if drop_identical_ids:
            ranking.pop(query_id, None)
        run[query_id] = ranking if len(ranking) <= k else dict(islice(ranking.items(), k))
    return run


def write_trec_run(path: str | os.PathLike[str], run: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Write a run in TREC format: `query Q0 document rank score tag`, one line per document.

    The same run always gives the same bytes: queries are ordered by id, documents by falling score and then by id,
    and every score has enough digits to be read back exactly. (trec_eval ignores the rank and sorts again by score,
    equal scores by falling id.) Raises a UserError for an id or tag with spaces, or a score that is not finite.
    """
    check_trec_ids([tag], "tag")
    check_trec_ids(run, "query id")
    lines = []
    for query in sorted(run):
        check_trec_ids(run[query], "document id")
        ordered = sorted(run[query].items(), key=lambda item: (-item[1], item[0]))
        for rank, (document, score) in enumerate(ordered, start=1):
            if not math.isfinite(score):
                raise UserError(f"expected finite scores, got {score} for query {query!r}: check the model's vectors")
            lines.append(f"{query} Q0 {document} {rank} {float(score)!r} {tag}\n")
    write_whole(Path(path), "".join(lines))


def read_trec_run(path: str | os.PathLike[str]) -> Run:
    """Read a run in TREC format; of a line `query Q0 document rank score tag`, query, document and score count.

    Raises a UserError if the file cannot be read or a line has another form.
    """
    run: Run = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: expected a run in TREC format, got an unreadable file ({error}): check it"
        ) from error
    for number, line in enumerate(lines, start=1):
        fields = re.split(r"\s+", line.strip(), flags=re.ASCII)
        if fields == [""]:
            continue
        try:
            query, _, document, _, score, _ = fields
            run.setdefault(query, {})[document] = float(score)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: expected 'query Q0 document rank score tag', got {line[:80]!r}: write the "
                "run again"
            ) from error
    return run


def check_trec_ids(ids: Iterable[str], what: str) -> None:
    """Raise a UserError, which calls an id `what`, if a TREC file cannot hold one: it is empty or contains a space."""
    for word in ids:
        # Readers of TREC files split at ASCII white space only; other Unicode spaces may be part of an id.
        if not word or re.search(r"[\s\0]", word, flags=re.ASCII):
            raise UserError(f"expected a {what} without spaces and NUL for a TREC file, got {word!r}: rename it")
