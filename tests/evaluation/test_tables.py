"""Tables of many models: rows, seeds, significance marks and formats."""

import csv
import io

import numpy as np
import pytest

from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.tables import collect_rows, compare_rows, holm


def _results(name, **datasets):
    """Results of a model; `datasets` maps a name to (base, projection)."""
    return {
        "model": {"name": name},
        "datasets": {
            data: {"systems": {"base": {"ndcg@10": base}, "bm25": {"ndcg@10": 0.3}, "projection": {"ndcg@10": own}}}
            for data, (base, own) in datasets.items()
        },
    }


def _per_query(values):
    return {f"q{number}": {"ndcg@10": value} for number, value in enumerate(values)}


def _labels(rows):
    return [row.label for row in rows]


def test_baselines_with_equal_figures_have_one_row_and_stand_first():
    rows = collect_rows([_results("a", one=(0.4, 0.5)), _results("b", one=(0.4, 0.6), two=(0.1, 0.2))])
    assert _labels(rows) == ["base", "bm25", "a", "b"]
    assert rows[0].values(("two", "ndcg@10"), []) == [0.1]  # of the file that has more
    other = collect_rows([_results("a", one=(0.4, 0.5)), _results("b", one=(0.45, 0.6))])
    assert _labels(other) == ["base of a", "base of b", "bm25", "a", "b"]


def test_the_fusion_stands_behind_bm25_and_is_of_no_model():
    results = [_results("a", one=(0.4, 0.5)), _results("b", one=(0.4, 0.6))]
    for each in results:
        each["datasets"]["one"]["systems"]["fusion"] = {"ndcg@10": 0.45}
    assert _labels(collect_rows(results)) == ["base", "bm25", "fusion", "a", "b"]


@pytest.mark.parametrize("names", [("mine_seed1", "mine_seed2", "mine-seed-10"), ("mine.seed1", "mineseed2", "mine")])
def test_seeds_of_one_model_are_one_row_with_mean_and_sample_deviation(names):
    results = [_results(name, one=(0.4, value)) for name, value in zip(names, (0.5, 0.6, 0.7), strict=True)]
    table = compare_rows(collect_rows(results), ["ndcg@10"])
    assert _labels(table.rows) == ["base", "bm25", "mine"]
    (cell,) = table.cells[2]
    assert (cell.mean, cell.deviation) == (pytest.approx(0.6), pytest.approx(0.1))
    assert table.cells[0][0].deviation is None
    assert table.text_rows()[3] == ("mine (3 seeds)", "0.6000 ±0.1000")


def test_a_group_is_named_by_the_beginning_of_its_names():
    results = [_results(name, one=(0.4, 0.5)) for name in ("first_a", "first_b", "second")]
    assert _labels(collect_rows(results)) == ["base", "bm25", "first_a", "first_b", "second"]
    assert _labels(collect_rows(results, groups=["first"])) == ["base", "bm25", "first", "second"]


def test_a_missing_data_set_is_a_dash_and_leaves_no_mean():
    results = [_results("a", one=(0.4, 0.5), two=(0.2, 0.4)), _results("b", one=(0.4, 0.6))]
    table = compare_rows(collect_rows(results), ["ndcg@10"])
    assert table.text_rows()[0] == ("model", "one NDCG@10", "two NDCG@10", "mean NDCG@10")
    assert table.text_rows()[3:] == [("a", "0.5000", "0.4000", "0.4500"), ("b", "0.6000", "-", "-")]


def test_marks_are_letters_of_rows_that_are_significantly_worse():
    better, worse = np.full(40, 0.8), np.full(40, 0.5)
    close = worse + np.tile([0.01, -0.01], 20)
    results = [_results(name, one=(0.5, values.mean())) for name, values in (("a", better), ("b", close))]
    per_query = {
        ("a", "one", "base"): _per_query(worse),
        ("a", "one", "projection"): _per_query(better),
        ("b", "one", "projection"): _per_query(close),
    }
    table = compare_rows(collect_rows(results, per_query=per_query), ["ndcg@10"])
    assert _labels(table.rows) == ["base", "bm25", "a", "b"]
    assert [cells[0].marks for cells in table.cells] == ["", "", "ad", ""]  # BM25 has no run: it cannot be compared
    assert table.text_rows()[3] == ("c a", "0.8000 ad")
    assert not compare_rows(collect_rows(results), ["ndcg@10"]).is_marked


def test_the_mean_over_data_sets_is_tested_too():
    results = [_results("a", one=(0.5, 0.8), two=(0.5, 0.8))]
    per_query = {
        ("a", data, system): _per_query(np.full(40, value))
        for data in ("one", "two")
        for system, value in (("base", 0.5), ("projection", 0.8))
    }
    table = compare_rows(collect_rows(results, per_query=per_query), ["ndcg@10"])
    assert [cell.marks for cell in table.cells[2]] == ["a", "a", "a"]
    del per_query["a", "two", "base"]
    table = compare_rows(collect_rows(results, per_query=per_query), ["ndcg@10"])
    assert [cell.marks for cell in table.cells[2]] == ["a", "", ""]


@pytest.mark.slow
def test_correction_makes_chance_findings_rare():
    """Of twenty equal models, some differ with p < .05 by chance; corrected, none does."""
    generator = np.random.default_rng(0)
    results, per_query = [], {}
    for number in range(20):
        values = generator.random(30)
        results.append(_results(f"m{number}", one=(0.5, float(values.mean()))))
        per_query[f"m{number}", "one", "projection"] = _per_query(values)
    rows = collect_rows(results, per_query=per_query)
    assert not any(cells[0].marks for cells in compare_rows(rows, ["ndcg@10"]).cells)


def test_corrected_p_values_are_holm_s_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


@pytest.fixture
def table():
    results = [_results("a_1 & b|c", one=(0.4, 1 / 3)), _results("m_seed1", one=(0.4, 0.5))]
    return compare_rows(collect_rows([*results, _results("m_seed2", one=(0.4, 0.7))]), ["ndcg@10"])


def test_markdown_and_latex_escape_names_and_have_the_best_figure_in_bold(table):
    lines = table.to_markdown().splitlines()
    assert lines[:2] == ["| model | one NDCG@10 |", "|---|--:|"]
    assert "| a_1 & b\\|c | 0.3333 |" in lines
    assert "| m (2 seeds) | **0.6000** ± 0.1414 |" in lines
    latex = table.to_latex()
    assert r"a\_1 \& b|c & 0.3333 \\" in latex
    assert r"m (2 seeds) & \textbf{0.6000} $\pm$ 0.1414 \\" in latex
    assert latex.startswith(r"\begin{tabular}{lr}")


def test_csv_holds_unrounded_figures(table):
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    named = {row["model"]: row for row in rows}
    assert float(named["a_1 & b|c"]["one ndcg@10"]) == 1 / 3
    assert named["m"]["seeds"] == "2"
    assert float(named["m"]["one ndcg@10 sd"]) == pytest.approx(0.02**0.5)
    assert named["base"]["one ndcg@10 sd"] == ""


def test_equal_names_and_unknown_metrics_are_user_errors():
    with pytest.raises(UserError, match="different models, got 'a' twice"):
        collect_rows([_results("a", one=(0.4, 0.5))] * 2)
    with pytest.raises(UserError, match=r"expected metrics of these results \(ndcg@10\), got 'ndcg'"):
        compare_rows(collect_rows([_results("a", one=(0.4, 0.5))]), ["ndcg"])
