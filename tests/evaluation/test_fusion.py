"""The fusion of base and BM25: its formula, its ties, and what it does where one part says nothing."""

import math

import numpy as np
import pytest

from ragcun_hf.data.beir_folder import BeirDataset
from ragcun_hf.evaluation import fusion
from ragcun_hf.evaluation.bm25 import Bm25Index, Bm25System
from ragcun_hf.evaluation.fusion import FusionSystem
from ragcun_hf.evaluation.retrieval import VectorSystem, evaluate_retrieval

WORDS = "bread food moon river star stone fish tree".split()


def _dataset(texts, queries, ids=None):
    ids = ids or [f"d{row}" for row in range(len(texts))]
    names = [f"q{row}" for row in range(len(queries))]
    qrels = {name: {ids[0]: 1} for name in names}
    return BeirDataset("toy", "test", dict(zip(names, queries, strict=True)), ids, texts, qrels)


def _system(queries, documents, **options):
    vectors = (np.asarray(each, dtype=np.float32) for each in (queries, documents))
    return FusionSystem(VectorSystem("base", *vectors, "cosine", **options), Bm25System())


def _rank(dataset, system, k=100):
    return system.rank(dataset, np.arange(len(dataset.queries)), k)


def test_a_score_is_that_of_the_formula_by_hand():
    dataset = _dataset(["moon", "fish", "tree"], ["fish"])
    found = _rank(dataset, _system([[2, 0]], [[3, 4], [0, 1], [5, 0]]))
    # BM25 finds only the second document: 0, s, 0 has mean s / 3 and standard deviation s sqrt(2) / 3, for any s.
    deviation = math.sqrt((0.36 + 0 + 1) / 3 - (8 / 15) ** 2)
    cosine = [(value - 8 / 15) / deviation for value in (0.6, 0, 1)]
    lexical = [value / math.sqrt(2) for value in (-1, 2, -1)]
    expected = [0.7 * a + 0.3 * b for a, b in zip(cosine, lexical, strict=True)]
    assert found.indices.tolist() == [[2, 0, 1]]
    assert found.scores[0].tolist() == pytest.approx([expected[row] for row in (2, 0, 1)], rel=1e-6)
    assert found.scores.sum() == pytest.approx(0, abs=1e-6)


def _slowly(dataset, queries, documents, k):
    """Rank with Python's own arithmetic, document by document."""
    rows = []
    for text, query in zip(dataset.queries.values(), queries, strict=True):
        found = Bm25Index(dataset.corpus_texts).search([text], k=len(documents))
        lexical = [0.0] * len(documents)
        for row, score in zip(found.indices[0].tolist(), found.scores[0].tolist(), strict=True):
            if row >= 0:
                lexical[row] = score
        cosines = [
            math.fsum(a * b for a, b in zip(query.tolist(), document.tolist(), strict=True))
            / math.hypot(*query.tolist())
            / math.hypot(*document.tolist())
            for document in documents
        ]
        total = [0.0] * len(documents)
        for weight, scores in ((0.7, cosines), (0.3, lexical)):
            mean = math.fsum(scores) / len(scores)
            deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
            if max(scores) > min(scores):
                total = [
                    sofar + weight * (score - mean) / deviation for sofar, score in zip(total, scores, strict=True)
                ]
        order = sorted(range(len(total)), key=lambda row: (-round(total[row], 9), dataset.corpus_ids[row]))[:k]
        rows.append(([total[row] for row in order], order))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("k", [7, 60])
def test_blocks_rank_as_a_slow_version_does_with_ties_by_id(monkeypatch, k):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, size=size)) for size in generator.integers(1, 9, size=30)]
    documents = generator.standard_normal((30, 5)).astype(np.float32)
    queries = generator.standard_normal((6, 5)).astype(np.float32)
    # Every document twice, far apart: each tie is decided by ids in another order than the rows.
    texts, documents = texts * 2, np.concatenate([documents, documents])
    ids = [f"d{number:02d}" for number in generator.permutation(60)]
    dataset = _dataset(
        texts, ["moon food", "fish", "tree tree star", "nothing", "river bread stone", "fish moon"], ids
    )
    monkeypatch.setattr(fusion, "_SCORES_AT_ONCE", 4 * 60)
    monkeypatch.setattr(fusion, "_DOCUMENT_BLOCK", 7)
    found = _rank(dataset, _system(queries, documents), k)
    scores, indices = _slowly(dataset, queries, documents, k)
    assert found.indices.tolist() == indices.tolist()
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-6)


def test_a_part_whose_scores_are_all_equal_counts_nothing():
    texts, documents = ["moon fish", "fish tree moon", "fish"], [[1, 0], [1, 1], [0, 1]]
    without_words = _rank(_dataset(texts, ["xyz"]), _system([[0.1, 1]], documents))
    assert without_words.indices.tolist() == [[2, 1, 0]]
    alike = _rank(_dataset(texts, ["tree moon"]), _system([[0.3, 0.7]], [[0.1, 0.7]] * 3))
    assert alike.indices.tolist() == [[1, 0, 2]]  # as BM25 does
    neither = _rank(_dataset(texts, ["xyz"], ids=["c", "a", "b"]), _system([[0.3, 0.7]], [[0.1, 0.7]] * 3))
    assert neither.indices.tolist() == [[1, 2, 0]]
    assert not neither.scores.any()


def test_only_the_asked_queries_are_ranked_and_identical_ids_are_dropped():
    dataset = _dataset(["moon", "fish", "tree"], ["moon", "fish", "tree"], ids=["d0", "q1", "d2"])
    dataset.qrels.pop("q0")
    base = VectorSystem("base", np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), "cosine")
    bm25 = Bm25System()
    evaluation = evaluate_retrieval(dataset, [FusionSystem(base, bm25), bm25, base])
    assert list(evaluation.entry["systems"]) == ["base", "bm25", "fusion"]
    assert set(evaluation.runs["fusion"]["q1"]) == {"d0", "d2"}
    assert next(iter(evaluation.runs["fusion"]["q2"])) == "d2"
    assert evaluation.entry["comparisons"].keys() == {"bm25", "fusion"}


def test_a_corpus_is_indexed_once_for_bm25_and_the_fusion(monkeypatch):
    dataset, made = _dataset(["moon", "fish"], ["moon"]), []
    make = Bm25Index.__init__
    monkeypatch.setattr(Bm25Index, "__init__", lambda *args, **options: made.append(1) or make(*args, **options))
    base = VectorSystem("base", np.eye(1, 2, dtype=np.float32), np.eye(2, dtype=np.float32), "cosine", kept={})
    bm25 = Bm25System()
    first = evaluate_retrieval(dataset, [base, bm25, FusionSystem(base, bm25)])
    assert len(made) == 1
    again = evaluate_retrieval(dataset, [base, bm25, FusionSystem(base, bm25)])  # the ranking is kept with the base's
    assert len(made) == 1
    assert again.runs == first.runs
