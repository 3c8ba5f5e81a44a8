"""table.py from the command line, on results and runs that the evaluator wrote."""

import importlib
import json

import numpy as np
import pytest

from ragcun_hf import RetrievalEvaluator, UserError

WORDS = [f"word{number}" for number in range(40)]


class Encoder:
    """Ranks right or wrong, query by query."""

    def __init__(self, name, is_right):
        self.name_or_path = name
        self._is_right = is_right

    def encode_query(self, texts):
        rows = np.arange(len(texts))
        return np.eye(len(WORDS), dtype=np.float32)[np.where(self._is_right(rows), rows, (rows + 1) % len(WORDS))]

    def encode_document(self, texts):
        return np.eye(len(WORDS), dtype=np.float32)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Write results and runs of two models and one in two seeds, and return the command."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "beir" / "toy"
    (folder / "qrels").mkdir(parents=True)
    for name, sign in (("queries", "q"), ("corpus", "d")):
        rows = [{"_id": f"{sign}{number}", "text": word} for number, word in enumerate(WORDS)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lines = [f"q{number}\td{number}\t1" for number in range(len(WORDS))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines), encoding="utf-8")
    evaluator = RetrievalEvaluator.from_beir(folder, bm25=False)
    models = {"good": lambda rows: rows >= 0, "bad_seed1": lambda rows: rows < 5, "bad_seed2": lambda rows: rows < 3}
    for name, is_right in models.items():
        evaluator(Encoder(name, is_right)).save(tmp_path / "results" / f"{name}.json")
    return importlib.import_module("ragcun_hf.cli.table").main


RESULTS = ["--results", *(f"results/{name}.json" for name in ("good", "bad_seed1", "bad_seed2"))]


def test_the_table_has_seeds_and_marks_and_is_written_in_every_format(script, tmp_path, capsys):
    outputs = [f"tables/t.{kind}" for kind in ("md", "tex", "csv")]
    script([*RESULTS, "--data_dir", "beir", "--output", *outputs, "--metrics", "ndcg@10", "recall@100"])
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["a", "good", "1.0000", "b", "1.0000"] in lines  # recall@100 finds everything: no difference
    assert ["b", "bad", "(2", "seeds)"] in [words[:4] for words in lines]
    assert "significantly better than these rows (p < 0.05" in shown
    assert "1.0000**<sup>b</sup>" in (tmp_path / "tables" / "t.md").read_text()
    assert r"\textsuperscript{b}" in (tmp_path / "tables" / "t.tex").read_text()
    assert "toy ndcg@10,toy ndcg@10 sd" in (tmp_path / "tables" / "t.csv").read_text()


def test_without_judgements_nothing_is_marked_and_the_output_names_the_flag(script, capsys):
    for flags, place in ((["--data_dir", "elsewhere"], "elsewhere"), ([], "data/beir")):
        script([*RESULTS, *flags])
        shown = capsys.readouterr().out
        assert "1.0000 b" not in shown
        said = f"Not tested for significance: there is no {place}/toy/qrels/test.tsv: name the folder that holds the "
        assert f"{said}folder toy with --data_dir (2 more)." in shown


@pytest.mark.parametrize("flag", ["--data_dir beir", "--data_dir=beir"])
def test_the_folder_that_the_evaluation_was_given_is_looked_at(script, tmp_path, capsys, flag):
    for path in (tmp_path / "results").glob("*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        results["command"] = f"ragcun eval-beir --model_path m --datasets toy {flag}"
        path.write_text(json.dumps(results), encoding="utf-8")
    script(RESULTS)
    assert "significantly better than these rows" in capsys.readouterr().out


def test_results_of_pairs_and_results_without_runs_say_so(script, tmp_path, capsys):
    path = tmp_path / "results" / "good.json"
    (tmp_path / "results" / "good" / "toy.model.trec").unlink()
    script(["--results", "results/good.json", "--data_dir", "beir"])
    assert "significance: there is no results/good/toy.model.trec, which the evaluation" in capsys.readouterr().out
    results = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**results, "command": "ragcun eval-beir --pairs held_out.jsonl"}), encoding="utf-8")
    script(["--results", "results/good.json"])
    assert "significance: the queries of toy are pairs without a BEIR folder." in capsys.readouterr().out


def test_a_run_that_is_not_that_of_the_results_is_refused(script, tmp_path):
    run = tmp_path / "results" / "good" / "toy.model.trec"
    run.write_bytes((tmp_path / "results" / "bad_seed1" / "toy.model.trec").read_bytes())
    with pytest.raises(
        UserError, match=r"toy\.model\.trec: expected the run of results/good\.json, with ndcg@10 1\.0"
    ):
        script([*RESULTS, "--data_dir", "beir"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--results expects at least one results file"),
        (
            [*RESULTS, "--output", "table.doc"],
            r"--output expects files ending in \.md, \.tex, \.csv, got 'table\.doc'",
        ),
        ([*RESULTS, "--systems", "base"], r"--systems expects some of model for good, got base"),
        ([*RESULTS, "--level", "5"], "--level must be between 0 and 1"),
        (["--results", "nowhere.json"], "expected a results file, could not read nowhere.json"),
    ],
)
def test_wrong_flags_are_user_errors(script, flags, message):
    with pytest.raises(UserError, match=message):
        script(flags)
