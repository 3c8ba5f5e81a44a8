"""The results file: results are read back as they were written, and anything else is refused."""

import copy
import json
import shutil
import subprocess

import pytest

from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.environment import checkout_commit, environment_facts
from ragcun_hf.evaluation.results import (
    format_results_table,
    mean_over_datasets,
    read_results,
    remark_on_few_documents,
    write_results,
)


def _dataset(base, projection):
    comparison = {"metric": "ndcg@10", "difference": projection - base, "p_value": 0.0123, "low": -0.001, "high": 0.2}
    systems = {
        "projection": {"ndcg@10": projection, "recall@100": 0.9},
        "base": {"ndcg@10": base, "recall@100": 0.8},
    }
    return {
        "split": "test",
        "num_queries": 300,
        "num_documents": 5183,
        "num_judgements": 339,
        "systems": systems,
        "comparisons": {"projection": {**comparison, "wins": 3, "ties": 2, "losses": 1}},
    }


@pytest.fixture
def results():
    datasets = {"scifact": _dataset(0.6446, 0.65), "文書": _dataset(0.3, 0.2)}
    datasets["scifact"]["subsets"] = {
        "unseen_documents": {
            "num_queries": 104,
            "systems": {"base": {"ndcg@10": 0.674}, "projection": {"ndcg@10": 0.6}},
        }
    }
    return {
        "schema_version": 1,
        "created": "2025-01-01T00:00:00+00:00",
        "command": "python training/eval_beir.py",
        "commit": None,
        "versions": {"torch": "2.13"},
        "machine": {"processor": "x", "cores": 2, "python": "3.11"},
        "model": {
            "path": "p",
            "name": "n",
            "similarity": "cosine",
            "base_model": None,
            "use_predictor": False,
            "output_dim": 384,
        },
        "settings": {"k": 100},
        "datasets": datasets,
        "mean": mean_over_datasets(datasets),
        "isotropy": {"base": {"effective_rank": 100.5}},
    }


def test_results_come_back_as_they_were_written(tmp_path, results):
    write_results(tmp_path / "new" / "results.json", results)
    assert read_results(tmp_path / "new" / "results.json") == results
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]


def test_the_file_is_readable_text(tmp_path, results):
    write_results(tmp_path / "results.json", results)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert "文書" in text
    assert text.endswith("}\n")


def _paths(value, path=()):
    """Yield the full path of every key in the example."""
    for key, part in value.items():
        yield (*path, key)
        if isinstance(part, dict):
            yield from _paths(part, (*path, key))


@pytest.mark.parametrize(
    "path",
    [
        ("schema_version",),
        ("commit",),
        ("machine", "cores"),
        ("model", "similarity"),
        ("datasets", "scifact", "split"),
        ("datasets", "scifact", "comparisons", "projection", "p_value"),
        ("datasets", "scifact", "subsets", "unseen_documents", "num_queries"),
    ],
)
def test_a_missing_key_is_named_with_the_file(tmp_path, results, path):
    holder = results
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(UserError, match="results.json") as caught:
        read_results(tmp_path / "results.json")
    assert ".".join(path) in str(caught.value)
    with pytest.raises(UserError):
        write_results(tmp_path / "other.json", results)
    assert not (tmp_path / "other.json").exists()


def test_a_value_of_the_wrong_type_is_refused_at_every_key_of_the_schema(tmp_path, results):
    open_places = {("settings", "k"), ("model", "output_dim")}
    tried = 0
    for path in _paths(results):
        if path in open_places:
            continue
        broken = copy.deepcopy(results)
        holder = broken
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = [object]
        with pytest.raises(UserError, match=path[-1]):
            write_results(tmp_path / "results.json", broken)
        tried += 1
    assert tried > 50


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "0.5", None])
def test_a_figure_that_is_not_a_finite_number_is_refused(tmp_path, results, value):
    results["datasets"]["scifact"]["systems"]["base"]["ndcg@10"] = value
    with pytest.raises(UserError, match="datasets.scifact.systems.base.ndcg@10"):
        write_results(tmp_path / "results.json", results)


def test_an_unknown_key_is_refused(tmp_path, results):
    results["datasets"]["scifact"]["comparison"] = {}
    with pytest.raises(UserError, match="datasets.scifact.comparison"):
        write_results(tmp_path / "results.json", results)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema_version": 2}', "\x00"])
def test_a_file_that_is_not_a_results_file_is_a_user_error_of_one_line(tmp_path, text):
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="results.json") as caught:
        read_results(tmp_path / "results.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="could not read"):
        read_results(tmp_path / "none.json")


def test_the_mean_gives_data_sets_the_same_weight_and_omits_systems_not_measured_on_all(results):
    means = mean_over_datasets(
        {"a": {"systems": {"base": {"m": 1.0}, "new": {"m": 1.0}}}, "b": {"systems": {"base": {"m": 0.5}}}}
    )
    assert means == {"base": {"m": 0.75}}
    assert mean_over_datasets({}) == {}


def test_the_table_has_a_row_per_data_set_and_system_with_the_base_first(results):
    lines = format_results_table(results).splitlines()
    assert [line.split()[:4] for line in lines if line.startswith("scifact")] == [["scifact", "test", "(300)", "base"]]
    position = next(i for i, line in enumerate(lines) if line.startswith("scifact"))
    assert lines[position + 1].split() == [
        "projection",
        "0.6500",
        "+0.0054",
        "[-0.0010,",
        "+0.2000]",
        "0.0123",
        "0.9000",
    ]
    assert any(line.startswith("  unseen documents (104)") for line in lines)
    assert any(line.startswith("mean of data sets") and "0.4723" in line for line in lines)


def test_the_table_is_aligned_and_under_100_columns(results):
    long_name = "a data set whose name is far too long for any table"
    results["datasets"][long_name] = {**_dataset(0.5, 0.6), "num_queries": 123456}
    lines = format_results_table(results).splitlines()
    assert max(map(len, lines)) < 100
    ends = {line.index(number) + 6 for line, number in ((line, "0.8000") for line in lines) if number in line}
    assert len(ends) == 1, "recall@100 of the base stands in one column"


def test_environment_facts_fit_the_schema(tmp_path, results):
    results.update(environment_facts())
    write_results(tmp_path / "results.json", results)
    assert results["versions"]["torch"]
    assert results["machine"]["cores"] >= 1


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_checkout_and_marked_if_files_changed(tmp_path):
    def git(*arguments):
        settings = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", tmp_path, *settings, *arguments], check=True, capture_output=True, text=True
        )

    file = tmp_path / "module.py"
    file.write_text("1", encoding="utf-8")
    assert checkout_commit(file) is None
    git("init", "-q")
    assert checkout_commit(file) is None, "a file that the checkout does not track is not part of it"
    git("add", "module.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert checkout_commit(file) == commit
    file.write_text("2", encoding="utf-8")
    assert checkout_commit(file) == f"{commit}-dirty"


def test_commit_is_none_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment_facts()["commit"] is None


def test_a_search_among_few_documents_is_remarked_on():
    assert "documents with --corpus." in remark_on_few_documents(499, "--corpus")
    assert remark_on_few_documents(500, "--corpus") is None
