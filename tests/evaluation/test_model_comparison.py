"""Comparison of models query by query: the figures, the table and the plot."""

import numpy as np
import pytest

from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.model_comparison import (
    ComparedDataset,
    compare_models,
    format_comparison,
    plot_model_comparison,
    system_names,
)
from ragcun_hf.evaluation.significance import compare_over_datasets, compare_systems


def _figures(values):
    return {f"q{number}": {"ndcg@10": value, "recall@100": value / 2} for number, value in enumerate(values)}


def _dataset(name, seen=None, **systems):
    per_query = {system: _figures(values) for system, values in systems.items()}
    texts = {query: f"text of {query}" for query in next(iter(per_query.values()))}
    subsets = {}
    if seen is not None:
        unseen = [query for query in texts if query not in seen]
        subsets = {"seen_documents": sorted(seen), "unseen_documents": unseen}
    return ComparedDataset(name, "test", texts, per_query, subsets)


@pytest.fixture
def comparison():
    """Three systems on a set of four queries and one of two."""
    first = _dataset(
        "one", frozenset({"q0"}), base=[0.5, 0.5, 0.5, 0.5], a=[1.0, 0.5, 0.25, 0.5], b=[0.0, 0.5, 1, 0.9]
    )
    second = _dataset("two", base=[0.2, 0.4], a=[0.4, 0.4], b=[0.2, 0.4])
    return compare_models([first, second])


def _pair(entry, system, reference, key="comparisons"):
    return next(each for each in entry[key] if (each["system"], each["reference"]) == (system, reference))


# Figures


def test_the_comparison_over_one_data_set_is_that_on_the_data_set():
    a, b = (_figures(np.random.default_rng(seed).random(40)) for seed in (1, 2))
    alone = compare_systems(a, b, "ndcg@10")
    together = compare_over_datasets([(a, b)], "ndcg@10")
    assert together.difference == pytest.approx(alone.difference)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert together.p_value == pytest.approx(alone.p_value)
    assert (together.wins, together.ties, together.losses) == (alone.wins, alone.ties, alone.losses)


def test_every_data_set_has_the_same_weight_however_many_queries_it_has():
    many, few = (_figures([0.1] * 300), _figures([0.0] * 300)), (_figures([0.0] * 3), _figures([0.3] * 3))
    assert compare_over_datasets([many, few], "ndcg@10").difference == pytest.approx((0.1 - 0.3) / 2)


def test_the_interval_over_data_sets_is_narrower_than_that_on_one_and_covers_the_difference():
    rng = np.random.default_rng(0)
    sets = [(_figures(rng.random(50)), _figures(rng.random(50))) for _ in range(4)]
    together = compare_over_datasets(sets, "ndcg@10")
    assert together.low < together.difference < together.high
    widths = [each.high - each.low for each in (compare_systems(a, b, "ndcg@10") for a, b in sets)]
    assert together.high - together.low == pytest.approx(np.mean(widths) / 2, rel=0.1)  # by the root of four


def test_no_data_set_is_an_error():
    with pytest.raises(ValueError, match="at least one data set"):
        compare_over_datasets([], "ndcg@10")


def test_every_system_is_compared_with_every_one_before_it(comparison):
    pairs = [(each["system"], each["reference"]) for each in comparison["overall"]["comparisons"]]
    assert pairs == [("a", "base"), ("b", "base"), ("b", "a")]
    one = _pair(comparison["datasets"]["one"], "b", "a")
    assert one["difference"] == pytest.approx((-1 + 0 + 0.75 + 0.4) / 4)
    assert (one["wins"], one["ties"], one["losses"]) == (2, 1, 1)
    overall = _pair(comparison["overall"], "a", "base")
    assert overall["difference"] == pytest.approx((0.0625 + 0.1) / 2)
    assert comparison["overall"]["systems"]["a"]["recall@100"] == pytest.approx((0.28125 + 0.2) / 2)


def test_queries_with_seen_documents_are_compared_separately_if_any_are_known(comparison):
    subsets = comparison["datasets"]["one"]["subsets"]
    assert {name: part["num_queries"] for name, part in subsets.items()} == {
        "seen_documents": 1,
        "unseen_documents": 3,
    }
    assert _pair(subsets["seen_documents"], "a", "base")["difference"] == 0.5
    assert "subsets" not in comparison["datasets"]["two"]


def test_the_queries_that_changed_most_are_listed_with_their_texts_and_no_unchanged_ones(comparison):
    changed = _pair(comparison["datasets"]["one"], "b", "a", key="changed_queries")
    assert [query["id"] for query in changed["gained"]] == ["q2", "q3"]
    assert [query["id"] for query in changed["lost"]] == ["q0"]
    assert changed["lost"][0] == {"id": "q0", "text": "text of q0", "system_value": 0.0, "reference_value": 1.0}
    unchanged = _pair(comparison["datasets"]["two"], "b", "base", key="changed_queries")
    assert unchanged["gained"] == unchanged["lost"] == []


def test_data_sets_with_different_systems_are_refused():
    with pytest.raises(ValueError, match="the same systems"):
        compare_models([_dataset("one", base=[1.0], a=[1.0]), _dataset("two", base=[1.0])])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["checkpoints/a", "checkpoints/b"], ["a", "b"]),
        (["runs/a/final", "runs/b/final"], ["a/final", "b/final"]),
        (["org/model", "other/model"], ["org/model", "other/model"]),
        (["x/base", "x/b"], ["x/base", "x/b"]),
    ],
)
def test_models_get_the_shortest_distinct_names(paths, names):
    assert system_names(paths) == names


@pytest.mark.parametrize("paths", [["a"], ["a", "a"]])
def test_models_that_cannot_be_compared_are_a_user_error(paths):
    with pytest.raises(UserError, match="--compare expects"):
        system_names(paths)


# Table and plot


def test_the_table_shows_every_pair_once_and_the_changed_queries(comparison):
    text = format_comparison(comparison)
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["data", "set", "(queries)"]
    assert sum("one test (4)" in line for line in lines) == 1
    assert any(line.startswith("mean of data sets") for line in lines)
    assert any("q0: text of q0" in line and "0.50 -> 1.00" in line for line in lines)
    assert "b against base: queries" in text
    assert "b against a: queries" not in text  # only in the file


def test_a_subset_that_is_the_whole_set_has_no_rows_of_its_own():
    everything = frozenset({"q0", "q1"})
    text = format_comparison(compare_models([_dataset("one", everything, base=[0.2, 0.4], a=[0.4, 0.4])]))
    assert "one test (2, seen documents)" in text
    assert len(text.split("\n\n")[0].splitlines()) == 3


def test_no_line_of_the_table_ends_in_spaces(comparison):
    lines = format_comparison(comparison).splitlines()
    assert not any(line != line.rstrip() for line in lines)


def test_the_plot_is_drawn(comparison, tmp_path):
    plot_model_comparison(comparison, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
