"""BM25: its formula, its ties, and what it does not find."""

import math
import subprocess
import sys

import numpy as np
import pytest

from ragcun_hf.data.beir_folder import BeirDataset
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.bm25 import Bm25Index, Bm25System
from ragcun_hf.evaluation.retrieval import evaluate_retrieval
from ragcun_hf.search.ties import IdOrder

TEXTS = ["bread food food", "bread", "moon river star stone", "fish"]


def _dataset(texts=TEXTS, queries=None, qrels=None):
    ids = [f"d{row}" for row in range(len(texts))]
    queries = queries or {"q0": "food", "q1": "moon"}
    return BeirDataset("toy", "test", queries, ids, texts, qrels or {"q0": {"d0": 1}, "q1": {"d2": 1}})


def test_scores_are_those_of_the_formula_by_hand():
    found = Bm25Index(TEXTS).search(["bread food"], k=4)

    def weight(frequency, length, num_with_word):
        rarity = math.log(1 + (4 - num_with_word + 0.5) / (num_with_word + 0.5))
        return rarity * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * length / (9 / 4)))

    assert found.indices.tolist() == [[0, 1, -1, -1]]
    expected = [weight(1, 3, 2) + weight(2, 3, 1), weight(1, 1, 2), 0, 0]
    assert found.scores[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_ties_are_in_the_order_of_ids_at_the_cut_too():
    texts, ids = ["same words"] * 6, ["c", "f", "a", "e", "b", "d"]
    found = Bm25Index([*texts, "other"]).search(["words"], k=3, ties=IdOrder([*ids, "z"]))
    assert [ids[row] for row in found.indices[0]] == ["a", "b", "c"]
    assert len(set(found.scores[0].tolist())) == 1
    assert Bm25Index([*texts, "other"]).search(["words"], k=3).indices.tolist() == [[0, 1, 2]]


def test_the_order_of_documents_changes_no_score():
    words = np.random.default_rng(0).choice("bread food moon river star stone fish tree".split(), size=(50, 6))
    texts = [" ".join(row) for row in words]
    order = np.random.default_rng(1).permutation(50)
    found = Bm25Index(texts).search(["moon food fish moon"], k=50)
    moved = Bm25Index([texts[row] for row in order]).search(["moon food fish moon"], k=50)
    scores = dict(zip(found.indices[0].tolist(), found.scores[0].tolist(), strict=True))
    assert scores == dict(zip(np.append(order, -1)[moved.indices[0]].tolist(), moved.scores[0].tolist(), strict=True))


@pytest.mark.slow
def test_another_process_finds_the_same():
    script = (
        "from ragcun_hf.evaluation.bm25 import Bm25Index\n"
        f"print(Bm25Index({TEXTS * 9}).search(['food bread moon fish'], k=9).scores.tobytes().hex())"
    )
    # The vocabulary is a set of strings, whose order differs between processes.
    found = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**_env(seed)})
        for seed in "12"
    ]
    assert len({each.stdout for each in found}) == 1


def _env(seed):
    import os

    return {**os.environ, "PYTHONHASHSEED": seed}


def test_a_query_without_a_known_word_finds_nothing_and_counts_as_zero():
    dataset = _dataset(queries={"q0": "food", "q1": "the xyz"})
    evaluation = evaluate_retrieval(dataset, [Bm25System()])
    assert evaluation.runs["bm25"] == {"q0": {"d0": pytest.approx(evaluation.runs["bm25"]["q0"]["d0"])}, "q1": {}}
    assert evaluation.entry["systems"]["bm25"]["ndcg@10"] == 0.5


@pytest.mark.parametrize("texts", [["", "a ?", "the of"], ["", "bread"]], ids=["no words", "an empty text"])
def test_texts_without_words_are_never_found(texts):
    found = Bm25Index(texts).search(["bread", "", "the"], k=10)
    assert found.indices.shape == (3, len(texts))
    assert set(found.indices.ravel().tolist()) <= {-1, 1}
    assert found.indices[1:].tolist() == [[-1] * len(texts)] * 2


def test_a_corpus_smaller_than_k_is_ranked_whole():
    assert Bm25Index(["bread", "bread food"]).search(["bread"], k=100).indices.tolist() == [[0, 1]]


def test_words_of_other_languages_are_stemmed_on_request():
    texts = ["Die Häuser am Fluss", "Fische im Wasser"]
    assert Bm25Index(texts, language="german").search(["das Haus"], k=1).indices.tolist() == [[0]]
    assert Bm25Index(texts, language="none").search(["das Haus"], k=1).indices.tolist() == [[-1]]
    assert Bm25Index(texts, language="none").search(["am"], k=1).indices.tolist() == [[0]]  # no stop words


def test_an_unknown_language_is_a_user_error_before_any_work():
    with pytest.raises(UserError, match=r"got 'klingon': use 'none' .* german"):
        Bm25System("klingon")


def test_a_data_set_is_searched_once(monkeypatch):
    dataset, system = _dataset(), Bm25System()
    first = evaluate_retrieval(dataset, [system])
    monkeypatch.setattr(Bm25Index, "search", lambda *args, **options: pytest.fail("searched again"))
    assert evaluate_retrieval(dataset, [system]).runs == first.runs
    with pytest.raises(pytest.fail.Exception):
        evaluate_retrieval(_dataset(), [system])  # of the same name, but another one
