"""Every block of the README runs as it stands, in a folder with the files it names."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
# Those of make install everything; the page runs until it is stopped, and has its own test.
COMMANDS = [
    text
    for language, text in BLOCKS
    if language == "bash" and not text.startswith(("make ", "python training/search_demo"))
]
SNIPPETS = [text for language, text in BLOCKS if language == "python"]


def _entries(count):
    from ragcun_hf.data.python_docs import build_python_docs

    return build_python_docs(["numpy"])[:count]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded_folder):
    """A user's folder after all commands of the README have run in it, in order."""
    from ragcun_hf.data.python_docs import write_entries

    folder = tmp_path_factory.mktemp("readme")
    for name in ("training", "model_cards"):
        (folder / name).symlink_to(ROOT / name)
    entries = _entries(400)  # enough for the automatic recipe to hold a hundred out
    pairs = [json.dumps({"query": entry.query, "positive": entry.document}) for entry in entries]
    (folder / "your_pairs.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    documents = [json.dumps({"text": entry.document}) for entry in entries]
    (folder / "your_documents.jsonl").write_text("\n".join(documents), encoding="utf-8")
    write_entries(entries, folder / "data" / "beir" / "my_set")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf_home"),
    }
    for command in COMMANDS:
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return folder


def test_readme_names_the_two_commands_and_shows_blocks_of_both_kinds():
    assert [text for _, text in BLOCKS if text.startswith("make demo")]
    assert len(COMMANDS) >= 4
    assert SNIPPETS


@pytest.mark.slow
def test_commands_of_the_readme_leave_what_it_says(folder):
    for name in ("mine", "unlabelled", "by_hand", "masked", "jepa_10k"):
        assert (folder / "checkpoints" / name / "model.safetensors").is_file()
    results = json.loads((folder / "results" / "mine.json").read_text(encoding="utf-8"))
    assert set(results["datasets"]["my_set"]["systems"]) == {"base", "projection"}
    assert list((folder / "results" / "mine").glob("*.trec"))


@pytest.mark.slow
def test_python_blocks_of_the_readme_run_on_the_model_they_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)  # noqa: S102 (our own README)
    assert names["queries"].shape == names["documents"].shape


@pytest.mark.slow
def test_card_of_the_readme_stands_in_the_folder(folder):
    card = (folder / "checkpoints" / "mine" / "README.md").read_text(encoding="utf-8")
    assert "frozen base" in card
    assert 'AutoModel.from_pretrained("your-name/mine"' in card
