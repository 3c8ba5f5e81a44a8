"""The notebook runs from its first cell to its last, and shows what it says."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "training" / "examples" / "quick_start.ipynb"


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_folder")
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells:
        assert cell["outputs"] == []  # a reader's own figures, not ours
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)  # noqa: S102 (our own notebook)
    report = names["report"]
    assert report["ndcg@10"] > report["base_ndcg@10"] - 0.02
    assert {"bm25_ndcg@10", "recall@100"} <= report.keys()
    assert names["loaded"].encode_query(names["queries"]).shape == (2, 384)
    shown = capsys.readouterr().out
    assert "sort" in shown.split("->")[1].lower()
