"""The preparation script: it converts formats, counts dropped rows, and overwrites only when asked to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ragcun_hf.cli import prepare_data
from ragcun_hf.data.beir_folder import load_beir_folder
from ragcun_hf.data.pairs import read_pairs
from ragcun_hf.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training" / "prepare_data.py"


@pytest.fixture(scope="module")
def prepare():
    return lambda *arguments: prepare_data.main([str(argument) for argument in arguments])


@pytest.fixture
def pairs_csv(tmp_path):
    path = tmp_path / "raw.csv"
    path.write_text("question,answer\nwho?,she was here\nwho?,she was here\nwhy?,so it is\nhow?,she was here\n")
    return path


COLUMNS = ("--query_column", "question", "--positive_column", "answer")


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_help_exits_with_0_and_names_the_flags():
    done = run("--help")
    assert done.returncode == 0
    for flag in ("--input_format", "--python_docs", "--mask_probability", "--overwrite", "--x_column"):
        assert flag in done.stdout


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(tmp_path):
    done = run("--input", tmp_path / "absent.json", "--output", tmp_path / "out.json")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "absent.json" in done.stderr


def test_pairs_are_recognized_deduplicated_counted_and_written(prepare, pairs_csv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_data, "has_embedded_model", lambda: False)
    out = tmp_path / "new" / "train.json"
    prepare("--input", pairs_csv, *COLUMNS, "--output", out)
    assert json.loads(out.read_text()) == [
        {"query": "who?", "positive": "she was here"},
        {"query": "why?", "positive": "so it is"},
        {"query": "how?", "positive": "she was here"},
    ]
    said = capsys.readouterr().out
    assert "kept 3, dropped 1" in said
    assert said.splitlines()[-1] == f"Next: ragcun train-contrastive --recipe adapt --train_data {out}"
    assert [entry.name for entry in out.parent.iterdir()] == ["train.json"]


def test_an_existing_output_is_replaced_only_with_overwrite(prepare, pairs_csv, tmp_path):
    out = tmp_path / "train.jsonl"
    out.write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        prepare("--input", pairs_csv, *COLUMNS, "--output", out)
    assert out.read_text() == "mine"
    prepare("--input", pairs_csv, *COLUMNS, "--output", out, "--overwrite")
    assert len(read_pairs(out)) == 3


def test_a_failed_run_leaves_the_old_output_and_no_temporary_file(prepare, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    (tmp_path / "in.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": "a"}\n')
    with pytest.raises(UserError, match="line 2"):
        prepare("--input", tmp_path / "in.jsonl", "--output", out, "--overwrite")
    assert out.read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_triples_with_an_anchor_column_keep_their_negatives(prepare, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"anchor": "q", "positive": "p", "negative": "n"}\n')
    prepare("--input", tmp_path / "in.jsonl", "--input_format", "triples", "--output", tmp_path / "out.jsonl")
    assert read_pairs(tmp_path / "out.jsonl")[0] == {"query": "q", "positive": "p", "negative": ["n"]}


def test_pairs_with_an_anchor_column_are_recognized(prepare, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"anchor": "q", "positive": "p"}\n')
    prepare("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"query": "q", "positive": "p"}


def test_triples_without_negatives_are_refused(prepare, pairs_csv, tmp_path):
    with pytest.raises(UserError, match="triples with the column 'negative'"):
        prepare("--input", pairs_csv, *COLUMNS, "--input_format", "triples", "--output", tmp_path / "out.jsonl")


def test_a_beir_folder_of_pairs_has_three_splits_by_document_and_can_be_evaluated(
    prepare, tmp_path, tiny_encoder_folder, monkeypatch
):
    from ragcun_hf.cli import eval_beir

    monkeypatch.chdir(tmp_path)
    rows = [{"query": f"what is {n}", "positive": f"document {n // 2}"} for n in range(100)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "all.txt").write_text("document 3\none more document\n", encoding="utf-8")
    prepare("--input", "pairs.jsonl", "--output_format", "beir", "--corpus", "all.txt", "--output", "data/mine")
    folders = {split: load_beir_folder(tmp_path / "data" / "mine", split) for split in ("train", "dev", "test")}
    judged = {split: folder.qrels for split, folder in folders.items()}
    documents = [{name for of_query in qrels.values() for name in of_query} for qrels in judged.values()]
    assert sum(map(len, judged.values())) == 100
    assert not (documents[0] & documents[1] or documents[0] & documents[2] or documents[1] & documents[2])
    assert 5 <= len(judged["test"]) <= 35
    assert 3 <= len(judged["dev"]) <= 25
    assert len(folders["test"].corpus_ids) == 51  # those of the pairs, and one more
    flags = ["--base_model", str(tiny_encoder_folder), "--datasets", "mine", "--data_dir", "data"]
    eval_beir.main([*flags, "--feature_cache_dir", "cache"])
    with pytest.raises(UserError, match="add up to less than 1"):
        prepare("--input", "pairs.jsonl", "--output_format", "beir", "--test_fraction", "1", "--output", "data/other")


def test_pairs_become_a_beir_folder_and_come_back(prepare, pairs_csv, tmp_path):
    flags = ["--output_format", "beir", "--test_fraction", "0", "--output", tmp_path / "folder"]
    prepare("--input", pairs_csv, *COLUMNS, *flags)
    collection = load_beir_folder(tmp_path / "folder", "train")
    assert (len(collection.corpus_ids), len(collection.queries)) == (2, 3)
    prepare("--input", tmp_path / "folder", "--output", tmp_path / "back.json")
    back = [(row["query"], row["positive"]) for row in json.loads((tmp_path / "back.json").read_text())]
    assert back == [("who?", "she was here"), ("why?", "so it is"), ("how?", "she was here")]


def test_documents_become_masked_pairs_that_repeat_with_the_seed(prepare, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a red fox ran home today\nword\nanother line of text here\n")
    outputs = []
    for name, seed in (("a.json", 1), ("b.json", 1), ("c.json", 2)):
        flags = ("--output_format", "xy", "--seed", seed, "--mask_variants", 3, "--mask_token", "<mask>")
        prepare("--input", tmp_path / "in.txt", *flags, "--output", tmp_path / name)
        outputs.append(json.loads((tmp_path / name).read_text()))
    assert outputs[0] == outputs[1] != outputs[2]
    assert 4 <= len(outputs[0]) <= 6
    assert {row["x"] for row in outputs[0]} == {"a red fox ran home today", "another line of text here"}
    assert all("<mask>" in row["y"] and row["x"] != row["y"] for row in outputs[0])
    assert "kept 2, dropped 1 (fewer than two words" in capsys.readouterr().out


def test_masked_pairs_keep_their_direction(prepare, tmp_path):
    (tmp_path / "in.json").write_text('[{"x": "a red fox", "y": "a [MASK] fox"}]')
    prepare("--input", tmp_path / "in.json", "--output", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [{"x": "a red fox", "y": "a [MASK] fox"}]


def test_documents_of_pairs_are_written_once_each(prepare, pairs_csv, tmp_path):
    prepare("--input", pairs_csv, *COLUMNS, "--output_format", "documents", "--output", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [{"text": "she was here"}, {"text": "so it is"}]


def test_an_impossible_conversion_lists_the_possible_ones(prepare, tmp_path):
    (tmp_path / "in.txt").write_text("one document\n")
    with pytest.raises(UserError, match="documents, xy for documents, got pairs"):
        prepare("--input", tmp_path / "in.txt", "--output_format", "pairs", "--output", tmp_path / "out.json")


def test_unknown_columns_are_listed(prepare, pairs_csv, tmp_path):
    with pytest.raises(UserError, match="got answer, question"):
        prepare("--input", pairs_csv, "--output", tmp_path / "out.json")


def test_the_limit_is_obeyed_and_an_unknown_output_suffix_refused(prepare, pairs_csv, tmp_path):
    prepare("--input", pairs_csv, *COLUMNS, "--limit", 1, "--output", tmp_path / "out.jsonl")
    assert len(read_pairs(tmp_path / "out.jsonl")) == 1
    with pytest.raises(UserError, match=r"ending in \.json or \.jsonl"):
        prepare("--input", pairs_csv, *COLUMNS, "--output", tmp_path / "out.parquet")


@pytest.mark.slow
def test_the_python_docs_are_built_from_the_named_packages(prepare, tmp_path, capsys):
    prepare("--python_docs", "--packages", "numpy", "--limit", 50, "--output", tmp_path / "docs")
    assert len(load_beir_folder(tmp_path / "docs", "train").corpus_ids) == 50
    assert "wrote 50 entries" in capsys.readouterr().out


def test_a_limit_below_one_is_refused(prepare, pairs_csv, tmp_path):
    for source in (("--python_docs", "--packages", "numpy"), ("--input", pairs_csv, *COLUMNS)):
        with pytest.raises(UserError, match="expected a limit of at least 1 row, got 0"):
            prepare(*source, "--limit", 0, "--output", tmp_path / "out.json")


def test_input_is_required(prepare, tmp_path):
    with pytest.raises(UserError, match="expected --input"):
        prepare("--output", tmp_path / "out.json")


def test_a_yaml_file_sets_the_flags(prepare, pairs_csv, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"input: {pairs_csv}\nquery_column: question\npositive_column: answer\noutput: {tmp_path}/o.json\n"
    )
    prepare("--config", recipe)
    assert len(json.loads((tmp_path / "o.json").read_text())) == 3


@pytest.mark.parametrize("has_embedded", [False, True])
def test_judgements_to_evaluate_with_lead_to_an_evaluation_and_others_to_training(
    tmp_path, capsys, monkeypatch, has_embedded
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "has_embedded_model", lambda: has_embedded)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    rows = [{"query": f"what is {name}", "positive": f"{name} is food"} for name in ("bread", "fish", "rice")]
    Path("held out.json").write_text(json.dumps(rows), encoding="utf-8")
    base = f"--base_model {'embedded' if has_embedded else 'sentence-transformers/all-mpnet-base-v2'}"
    for split, expected in (
        ("test", f"eval-beir {base} --datasets test --data_dir data --split test"),
        (
            "train",
            f"train-contrastive --recipe adapt --train_data data/train{' --base_model embedded' * has_embedded}",
        ),
    ):
        prepare_data.main(
            ["--input", "held out.json", "--output_format", "beir", "--split", split, "--output", f"data/{split}"]
        )
        assert capsys.readouterr().out.splitlines()[-1] == f"Next: ragcun {expected}"
