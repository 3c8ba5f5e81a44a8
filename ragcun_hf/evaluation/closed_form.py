"""The closed form for known documents: each moves towards its training queries, and nothing is trained.

Shape letters used in this file: N = documents, Q = queries, D = width of the vectors.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..data.beir_folder import BeirDataset
from ..data.documents import document_text, is_beir_folder, text_digest, text_position
from ..data.mapped_column import take
from ..data.pairs import read_pairs
from ..errors import UserError
from ..search.exact import exact_search
from ..search.first_pass import row_blocks
from ..search.memory_maps import new_matrix, read_far_apart, release
from ..search.similarity import unit_rows
from ..search.ties import Rows
from .results import MAIN_METRIC
from .retrieval import VectorSystem, evaluate_retrieval

GAMMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
_HELD_OUT = 0.2  # of the queries, to choose gamma, if the pairs have no split dev
_ROWS_AT_ONCE = 4_096

Answers = dict[str, list[int]]  # query -> rows of its documents in the corpus


def move_known_documents(documents: Rows, queries: Rows, answers: Sequence[Sequence[int]], *, gamma: float) -> Rows:
    """Move the vectors of documents with known queries towards these, before the documents are indexed.

    A document d becomes the direction of d + gamma g, where g is the sum of its queries' differences from the mean
    query, all scaled to length 1. Documents without queries stay as they are, and so do queries: only the index
    changes. `ragcun eval-beir --closed_form` chooses gamma on held-out queries, and measures what it costs documents
    without queries.

    Args:
        documents: Vectors, shape (N, D).
        queries: Vectors of training queries from the same model, shape (Q, D).
        answers: For each query, the row numbers of its documents; a number that comes twice counts once.
        gamma: How far documents move: 0 is not at all, and more brings them nearer to their queries.

    Returns:
        Vectors of length 1, shape (N, D), float32.

    Raises:
        UserError: If the shapes do not fit each other, a row number is not in the corpus, or gamma is below 0.

    Source:
        Zeighami et al., "NUDGE: Lightweight Non-Parametric Fine-Tuning of Embeddings for Retrieval", 2024,
        arXiv:2409.02343, in the normalized variant NUDGE-N; there, gamma is computed, and bounded otherwise, and the
        mean query is not subtracted.

    Example:
        >>> documents = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> queries = np.array([[0.0, 0.6, 0.8], [0.0, 0.6, -0.8]])
        >>> print(move_known_documents(documents, queries, [[0], []], gamma=1.0).round(2))
        [[0.71 0.   0.71]
         [0.   1.   0.  ]]
    """
    documents, queries = np.asarray(documents), np.asarray(queries)
    is_fitting = documents.ndim == queries.ndim == 2 and documents.shape[1] == queries.shape[1]
    if not (is_fitting and len(answers) == len(queries) and gamma >= 0):
        raise UserError(
            "expected queries as wide as the documents, rows for each query, and a gamma of at least 0, got documents "
            f"of shape {documents.shape}, queries of shape {queries.shape}, {len(answers)} lists and {gamma=}"
        )
    moved = unit_rows(documents)
    answers = [[operator.index(row) for row in rows] for rows in answers]  # NumPy's are slow to find in a range
    sums = _sums(_centred(queries), answers, range(len(moved)))
    if unknown := {row for rows in answers for row in rows} - set(sums):
        raise UserError(f"expected row numbers from 0 to {len(moved) - 1}, got {min(unknown)}")
    if gamma and sums:
        moved[list(sums)] = _moved(moved[list(sums)], list(sums.values()), gamma)
    return moved.astype(np.float32)


def _centred(queries: Rows) -> Rows:
    """Scale queries to length 1 and subtract their mean, in which a document would come nearer to every query."""
    directions = unit_rows(queries)
    return directions - directions.mean(axis=0) if len(directions) > 1 else directions


def _sums(queries: Iterable[Rows], answers: Iterable[Sequence[int]], rows: range) -> dict[int, Rows]:
    """Add up the vectors of each document's queries, for the documents in some rows."""
    sums: dict[int, Rows] = {}
    for query, found in zip(queries, answers, strict=True):
        for row in dict.fromkeys(found):
            if row in rows:
                sums[row] = sums.get(row, 0) + query
    return sums


def _moved(documents: Rows, sums: Sequence[Rows], gamma: float) -> Rows:
    return unit_rows(unit_rows(documents) + gamma * unit_rows(np.stack(sums)))


class ClosedForm:
    """Moves the documents of training pairs as `move_known_documents` does; all others stay as they are.

    Where a system is not ranked by cosine, a moved document keeps its own length. One gamma serves all documents: the
    one of `GAMMAS` with the best NDCG@10 over the whole corpus on held-out pairs, or the smallest of several.

    Args:
        pairs: Rows with the texts `query` and `positive`.
        held_out: More such rows, to choose gamma. Without any, a fifth of the queries of `pairs` is held out for that,
            and then all of them are used.

    Attributes:
        gammas: The chosen gamma by names of system and data set.
    """

    def __init__(self, pairs: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]] = ()) -> None:
        self._pairs, self._held_out = (
            [(row["query"], document_text("", row["positive"])) for row in rows] for rows in (pairs, held_out)
        )
        self._rows: dict[str, dict[str, list[int]]] = {}  # data set -> text -> rows
        self.gammas: dict[str, dict[str, float]] = {}

    @classmethod
    def read(cls, source: str | os.PathLike[str], *, evaluated_split: str = "test") -> Self:
        """Read the split train of any source, and the split dev of a BEIR folder, unless dev itself is evaluated."""
        has_dev = is_beir_folder(source) and (Path(source).expanduser() / "qrels" / "dev.tsv").is_file()
        held_out: Any = read_pairs(source, split="dev") if has_dev and evaluated_split != "dev" else ()
        return cls(read_pairs(source), held_out)  # type: ignore[arg-type]

    def document_digests(self) -> set[str]:
        """Return the hexadecimal digests of the documents that have training queries."""
        return {text_digest(text).hex() for text in {text for _, text in self._pairs}}

    def check(self, dataset: BeirDataset) -> None:
        """Raise a UserError if no document of the pairs is in the corpus."""
        if not self._answers(dataset, self._pairs):
            raise UserError(
                f"{dataset.name}: expected documents of the corpus in the pairs of --closed_form, got none of them: "
                "name the training pairs of this data set, and evaluate others without the flag"
            )

    def system(
        self,
        name: str,
        dataset: BeirDataset,
        still: VectorSystem,
        query_vectors: Callable[[list[str]], Rows],
        folder: str | Path = ".",
    ) -> VectorSystem:
        """Choose gamma, move documents of a copy of a system's, and return them as a system of another name.

        `query_vectors` gives the vectors of query texts, shape (Q, D), as the system `still` has them.
        """
        self.check(dataset)
        answers, held_out = (self._answers(dataset, pairs) for pairs in (self._pairs, self._held_out))
        kept = answers
        if not held_out:
            queries = sorted(answers, key=text_position)
            num_held_out = max(1, int(_HELD_OUT * len(queries)))
            held_out = {query: answers[query] for query in queries[:num_held_out]}
            kept = {query: answers[query] for query in queries[num_held_out:]}
        train = dict(zip(answers, _centred(query_vectors(list(answers))), strict=True))
        held_out_QD = query_vectors(list(held_out))  # as long as they are: a Euclidean ranking depends on it
        documents = _copy(still.documents, Path(folder))
        moved = replace(still, name=name, documents=documents, kept=None)
        figures = {}
        for gamma in GAMMAS:
            _move(still, documents, kept, train, gamma)
            figures[gamma] = _figure(dataset, replace(moved, queries=held_out_QD, search=exact_search), held_out)
        gamma = max(figures, key=figures.__getitem__)
        self.gammas.setdefault(name, {})[dataset.name] = gamma
        _move(still, documents, answers, train, gamma)
        return moved

    def _answers(self, dataset: BeirDataset, pairs: Iterable[tuple[str, str]]) -> Answers:
        """Find the documents of pairs in a corpus: query -> rows, for queries with any."""
        wanted: dict[str, list[int]] = {text: [] for _, text in (*self._pairs, *self._held_out)}
        if dataset.name not in self._rows:
            for row, text in enumerate(dataset.corpus_texts):
                if text in wanted:
                    wanted[text].append(row)
            self._rows[dataset.name] = wanted
        answers: dict[str, dict[int, None]] = {}  # a pair that is there twice counts once
        for query, text in pairs:
            for row in self._rows[dataset.name][text]:
                answers.setdefault(query, {})[row] = None
        return {query: list(rows) for query, rows in answers.items()}


def _copy(documents: Any, folder: Path) -> Rows:
    copied = new_matrix(len(documents), documents.shape[1], folder)
    for part in row_blocks(len(copied), _ROWS_AT_ONCE):
        copied[part] = documents[part]
        release(documents)
        release(copied)
    return copied


def _move(still: VectorSystem, documents: Rows, answers: Answers, train: Mapping[str, Rows], gamma: float) -> None:
    """Write this process's documents that have queries, moved by gamma, over those in `documents`."""
    start = 0 if still.shard is None else still.shard.start
    queries = [train[query] for query in answers]
    sums = _sums(queries, answers.values(), range(start, start + len(documents)))
    for part in row_blocks(len(sums), _ROWS_AT_ONCE):
        rows = np.array(list(sums)[part]) - start
        moved = read_far_apart(np.asarray(still.documents), rows)
        if gamma:  # at 0 they stay what they were, to the last bit
            lengths = 1.0 if still.similarity == "cosine" else np.linalg.norm(moved, axis=1, keepdims=True)
            moved = _moved(moved, list(sums.values())[part], gamma) * lengths
        documents[rows] = moved


def _figure(dataset: BeirDataset, system: VectorSystem, answers: Answers) -> float:
    """Return the NDCG@10 of queries that search the whole corpus."""
    queries = {f"q{number}": query for number, query in enumerate(answers)}
    qrels = {name: dict.fromkeys(take(dataset.corpus_ids, answers[query]), 1) for name, query in queries.items()}
    judged = replace(dataset, queries=queries, qrels=qrels)
    found = evaluate_retrieval(judged, [system], k=10, drop_identical_ids=False)
    return float(found.entry["systems"][system.name][MAIN_METRIC])
