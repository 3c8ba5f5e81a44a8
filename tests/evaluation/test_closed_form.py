"""The closed form: where documents move, how gamma is chosen, and what stays."""

import json
import math

import numpy as np
import pytest

from ragcun_hf.data.beir_folder import BeirDataset
from ragcun_hf.data.documents import text_digest, text_position
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation import closed_form
from ragcun_hf.evaluation.closed_form import ClosedForm, move_known_documents
from ragcun_hf.evaluation.retrieval import VectorSystem, evaluate_retrieval


def _dataset(num_documents):
    ids = [f"d{row}" for row in range(num_documents)]
    return BeirDataset("toy", "test", {"q0": "query"}, ids, [f"text {row}" for row in range(num_documents)], {})


def _moved(form, dataset, still, vectors):
    """The system under the name `moved`; `vectors` are those of queries."""
    return form.system(
        "moved", dataset, still, lambda texts: np.array([vectors[text] for text in texts], dtype=np.float32)
    )


def _base(documents, queries=((1, 0),)):
    return VectorSystem("base", *(np.asarray(each, dtype=np.float32) for each in (queries, documents)), "cosine")


def _pairs(**documents):
    """Pairs by query name: `a=[0, 2]` has two."""
    return [{"query": query, "positive": f"text {row} "} for query, rows in documents.items() for row in rows]


def test_a_document_moves_as_worked_out_by_hand(monkeypatch):
    monkeypatch.setattr(closed_form, "GAMMAS", (0.5,))
    form = ClosedForm(_pairs(a=[0, 0], b=[0], e=[2]), _pairs(c=[1]))  # a pair that is there twice counts once
    base = _base([[3, 4], [0, 2], [1, 1]])
    vectors = {"a": [7, 0], "b": [0, -2], "e": [0, 1], "c": [1, 0]}
    moved = _moved(form, _dataset(3), base, vectors)
    # a = (1, 0), b = (0, -1), e = (0, 1), so their mean is (1/3, 0); a + b less twice that is (1/3, -1).
    # d = (.6, .8); g = (1, -3) / sqrt(10); d + g / 2 = (.7581, .3257), of length .8251.
    x, y = 0.6 + 0.5 / math.sqrt(10), 0.8 - 1.5 / math.sqrt(10)
    assert moved.documents[0].tolist() == pytest.approx([x / math.hypot(x, y), y / math.hypot(x, y)])
    assert moved.documents[1].tolist() == [0, 2]
    assert base.documents[0].tolist() == [3, 4]
    assert (moved.name, moved.kept, form.gammas) == ("moved", None, {"moved": {"toy": 0.5}})


def _slowly(documents, answers, vectors, gamma):
    """Move documents one by one; `answers` maps a query to rows, and `vectors` has the training queries."""
    directions = {query: vector / np.linalg.norm(vector) for query, vector in vectors.items()}
    mean, moved = sum(directions.values()) / len(directions), []
    for row, document in enumerate(documents.astype(float)):
        queries = [directions[query] - mean for query, rows in answers.items() if row in rows]
        if queries:
            direction = np.sum(queries, axis=0)
            document = document / np.linalg.norm(document) + gamma * direction / np.linalg.norm(direction)
        moved.append(document / np.linalg.norm(document))
    return np.array(moved)


def _figure_slowly(documents, answers, vectors):
    figures = []
    for query, rows in answers.items():
        ranking = np.argsort(-(documents @ vectors[query]))[:10].tolist()
        gained = sum(1 / math.log2(place + 2) for place, row in enumerate(ranking) if row in rows)
        figures.append(gained / sum(1 / math.log2(place + 2) for place in range(min(10, len(rows)))))
    return sum(figures) / len(figures)


@pytest.mark.parametrize("has_dev", [True, False])
def test_gamma_and_documents_are_those_of_a_slow_version(monkeypatch, has_dev):
    monkeypatch.setattr(closed_form, "_ROWS_AT_ONCE", 7)
    generator = np.random.default_rng(3)
    documents = generator.standard_normal((60, 6)).astype(np.float32)
    answers = {f"q{n}": sorted({*generator.choice(40, size=2).tolist()}) for n in range(50)}
    dev = {f"dev{n}": generator.choice(40, size=1).tolist() for n in range(20)} if has_dev else {}
    asked = documents + 1.5 * generator.standard_normal((60, 6)).astype(np.float32)  # what queries are close to
    vectors = {
        query: asked[rows].mean(axis=0) + 0.5 * generator.standard_normal(6).astype(np.float32)
        for query, rows in {**answers, **dev}.items()
    }
    form = ClosedForm(_pairs(**answers), _pairs(**dev))
    moved = _moved(form, _dataset(60), _base(documents, [[1] * 6]), vectors)
    train = {query: vectors[query] for query in answers}
    order = sorted(answers, key=text_position)
    held_out = dev or {query: answers[query] for query in order[:10]}
    kept = answers if dev else {query: answers[query] for query in order[10:]}
    figures = {
        gamma: _figure_slowly(_slowly(documents, kept, train, gamma), held_out, vectors)
        for gamma in closed_form.GAMMAS
    }
    best = max(figures, key=figures.get)
    assert form.gammas == {"moved": {"toy": best}}
    assert best > 0
    expected = _slowly(documents, answers, train, best)
    found = moved.documents / np.linalg.norm(moved.documents, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_at_gamma_0_the_figures_are_those_of_the_base_to_the_last_bit(monkeypatch):
    monkeypatch.setattr(closed_form, "GAMMAS", (0.0,))
    generator = np.random.default_rng(0)
    base = _base(generator.standard_normal((30, 4)), generator.standard_normal((1, 4)))
    vectors = dict(zip("abc", generator.standard_normal((3, 4)), strict=True))
    form = ClosedForm(_pairs(a=[0], b=[0, 1], c=[5]))
    moved = _moved(form, _dataset(30), base, vectors)
    found = [system.rank(_dataset(30), np.arange(1), 30) for system in (base, moved)]
    assert found[0].indices.tolist() == found[1].indices.tolist()
    assert found[0].scores.tolist() == found[1].scores.tolist()


def test_a_single_query_leaves_nothing_to_choose_with_and_changes_nothing():
    form = ClosedForm(_pairs(a=[0]))
    _moved(form, _dataset(3), _base(np.eye(3), np.eye(1, 3)), {"a": [0, 1, 0]})
    assert form.gammas == {"moved": {"toy": 0.0}}


def test_equal_documents_move_together_and_missing_ones_are_ignored(monkeypatch):
    monkeypatch.setattr(closed_form, "GAMMAS", (1.0,))
    dataset = _dataset(3)
    dataset.corpus_texts[2] = "text 0"
    form = ClosedForm(_pairs(a=[0, 9], b=[9]), _pairs(c=[0]))
    vectors = {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
    moved = _moved(form, dataset, _base([[1, 0], [1, 1], [1, 0]]), vectors)
    assert moved.documents[0].tolist() == moved.documents[2].tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert form.document_digests() == {text_digest(text).hex() for text in ("text 0", "text 9")}


def test_pairs_without_a_document_of_the_corpus_are_a_user_error():
    with pytest.raises(
        UserError, match="toy: expected documents of the corpus in the pairs of --closed_form, got none"
    ):
        ClosedForm(_pairs(a=[9])).check(_dataset(3))


def test_a_folder_s_split_dev_chooses_gamma_unless_it_is_evaluated(tmp_path):
    (tmp_path / "qrels").mkdir()
    for name, rows in (("corpus", {"d0": "text 0", "d1": "text 1"}), ("queries", {"q0": "a", "q1": "b"})):
        lines = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in rows.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    for split, line in (("train", "q0\td0\t1"), ("dev", "q1\td1\t1")):
        (tmp_path / "qrels" / f"{split}.tsv").write_text(line)
    vectors = {"a": [0, 1, 0], "b": [0, 0, 1]}
    asked = []
    for split in ("test", "dev"):

        def asked_for(texts):
            asked.append(texts)
            return np.array([vectors[text] for text in texts], dtype=np.float32)

        form = ClosedForm.read(tmp_path, evaluated_split=split)
        form.system("moved", _dataset(2), _base(np.eye(2, 3), np.eye(1, 3)), asked_for)
    assert asked == [["a"], ["b"], ["a"], ["a"]]


def test_it_is_compared_with_the_base_on_seen_documents():
    dataset = _dataset(3)
    dataset.qrels["q0"] = {"d1": 1}
    base = _base(np.eye(3), [[1, 0.9, 0]])
    form = ClosedForm(_pairs(a=[1]), _pairs(b=[1]))
    moved = _moved(form, dataset, base, {"a": [1, 1, 0], "b": [1, 0.9, 0]})
    evaluation = evaluate_retrieval(dataset, [moved, base], seen_document_ids=["d1"])
    assert list(evaluation.entry["systems"]) == ["base", "moved"]
    assert evaluation.entry["subsets"]["seen_documents"]["systems"]["moved"]["ndcg@10"] == 1
    assert evaluation.entry["systems"]["base"]["ndcg@10"] < 1


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_vectors_that_a_user_indexes_move_as_in_the_evaluation(gamma):
    generator = np.random.default_rng(1)
    documents, queries = generator.standard_normal((12, 5)), generator.standard_normal((4, 5))
    answers = [[0, 3, 3], [3], [], [11]]  # a row that comes twice counts once
    moved = move_known_documents(documents, queries, answers, gamma=gamma)
    by_query = {number: sorted({*rows}) for number, rows in enumerate(answers)}
    np.testing.assert_allclose(moved, _slowly(documents, by_query, dict(enumerate(queries)), gamma), atol=1e-6)
    assert moved.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": [[0]]}, "1 lists"),
        ({"answers": [[0], [5]]}, "expected row numbers from 0 to 2, got 5"),
        ({"answers": [[0], [-1]]}, "expected row numbers from 0 to 2, got -1"),
        ({"queries": np.ones((2, 3))}, r"queries of shape \(2, 3\)"),
        ({"queries": np.ones(2)}, r"queries of shape \(2,\)"),
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"gamma": math.nan}, "gamma=nan"),
    ],
)
def test_vectors_and_rows_that_do_not_fit_are_refused(change, message):
    arguments = {"documents": np.eye(3, 2), "queries": np.eye(2), "answers": [[0], [1]], "gamma": 1.0, **change}
    with pytest.raises(UserError, match=message):
        move_known_documents(**arguments)
