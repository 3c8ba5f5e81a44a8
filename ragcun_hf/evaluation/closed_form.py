"""The closed form for known documents: each moves towards its training queries, as a baseline that trains nothing.

Shape letters used in this file: Q = queries, H = width of a feature.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

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
from .results import CLOSED_FORM_SYSTEM, MAIN_METRIC
from .retrieval import VectorSystem, evaluate_retrieval

if TYPE_CHECKING:
    from .model_evaluation import TextEncoder

GAMMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
_HELD_OUT = 0.2  # of the queries, to choose gamma, if the pairs have no split dev
_ROWS_AT_ONCE = 4_096

Answers = dict[str, list[int]]  # query -> rows of its documents in the corpus


class ClosedForm:
    """Moves the documents of training pairs: d becomes the direction of d + gamma g, all others stay as they are.

    d is the document's feature and g the sum of the features of its training queries, all scaled to length 1. Where
    the base is not ranked by cosine, a moved document keeps its own length. One
    gamma serves all documents: the one of `GAMMAS` with the best NDCG@10 over the whole corpus on held-out pairs, or
    the smallest of several.

    Source:
        Zeighami et al., "NUDGE: Lightweight Non-Parametric Fine-Tuning of Embeddings for Retrieval", 2024,
        arXiv:2409.02343, in the normalized variant NUDGE-N; there, gamma is computed, and bounded otherwise.

    Args:
        pairs: Rows with the texts `query` and `positive`.
        held_out: More such rows, to choose gamma. Without any, a fifth of the queries of `pairs` is held out for that,
            and then all of them are used.

    Attributes:
        gammas: The chosen gamma of each data set, by name.
    """

    def __init__(self, pairs: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]] = ()) -> None:
        self._pairs, self._held_out = (
            [(row["query"], document_text("", row["positive"])) for row in rows] for rows in (pairs, held_out)
        )
        self._rows: dict[str, dict[str, list[int]]] = {}  # data set -> text -> rows
        self.gammas: dict[str, float] = {}

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
        self, dataset: BeirDataset, base: VectorSystem, encoder: TextEncoder, folder: str | Path = "."
    ) -> VectorSystem:
        """Choose gamma, move documents of a copy of the base's, and return them as a system of their own."""
        self.check(dataset)
        answers, held_out = (self._answers(dataset, pairs) for pairs in (self._pairs, self._held_out))
        kept = answers
        if not held_out:
            queries = sorted(answers, key=text_position)
            num_held_out = max(1, int(_HELD_OUT * len(queries)))
            held_out = {query: answers[query] for query in queries[:num_held_out]}
            kept = {query: answers[query] for query in queries[num_held_out:]}
        train_QH, held_out_QH = (_unit_features(encoder, queries) for queries in (answers, held_out))
        train = dict(zip(answers, train_QH, strict=True))
        documents = _copy(base.documents, Path(folder))
        moved = replace(base, name=CLOSED_FORM_SYSTEM, documents=documents, kept=None)
        figures = {}
        for gamma in GAMMAS:
            _move(base, documents, kept, train, gamma)
            figures[gamma] = _figure(dataset, replace(moved, queries=held_out_QH, search=exact_search), held_out)
        self.gammas[dataset.name] = gamma = max(figures, key=figures.__getitem__)
        _move(base, documents, answers, train, gamma)
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


def _unit_features(encoder: TextEncoder, queries: Iterable[str]) -> Rows:
    features = encoder.store.features(list(queries), prompt=encoder.model.config.query_prompt).expanded()
    return unit_rows(encoder.model.encoder_part(features))


def _copy(documents: Any, folder: Path) -> Rows:
    copied = new_matrix(len(documents), documents.shape[1], folder)
    for part in row_blocks(len(copied), _ROWS_AT_ONCE):
        copied[part] = documents[part]
        release(documents)
        release(copied)
    return copied


def _move(base: VectorSystem, documents: Rows, answers: Answers, train: Mapping[str, Rows], gamma: float) -> None:
    """Write this process's documents that have queries, moved by gamma, over those in `documents`."""
    start = 0 if base.shard is None else base.shard.start
    sums: dict[int, Rows] = {}
    for query, found in answers.items():
        for row in found:
            if start <= row < start + len(documents):
                sums[row - start] = sums.get(row - start, 0) + train[query]
    for part in row_blocks(len(sums), _ROWS_AT_ONCE):
        rows = np.array(list(sums)[part])
        moved = read_far_apart(np.asarray(base.documents), rows)
        if gamma:  # at 0 they stay what they were, to the last bit
            lengths = 1.0 if base.similarity == "cosine" else np.linalg.norm(moved, axis=1, keepdims=True)
            moved = unit_rows(unit_rows(moved) + gamma * unit_rows([sums[row] for row in rows.tolist()])) * lengths
        documents[rows] = moved


def _figure(dataset: BeirDataset, system: VectorSystem, answers: Answers) -> float:
    """Return the NDCG@10 of queries that search the whole corpus."""
    queries = {f"q{number}": query for number, query in enumerate(answers)}
    qrels = {name: dict.fromkeys(take(dataset.corpus_ids, answers[query]), 1) for name, query in queries.items()}
    judged = replace(dataset, queries=queries, qrels=qrels)
    found = evaluate_retrieval(judged, [system], k=10, drop_identical_ids=False)
    return float(found.entry["systems"][system.name][MAIN_METRIC])
