"""Every block of the README runs, in order, in a folder with the files that it names."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ragcun_hf.commands import COMMANDS as COMMANDS_BY_NAME

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
# `make` and pip install everything, and the search page runs until it is stopped: these have tests of their own.
COMMANDS = [
    text
    for language, text in BLOCKS
    if language == "bash" and not text.startswith(("make ", "python3 -m venv ", "ragcun search "))
]
SNIPPETS = [text for language, text in BLOCKS if language == "python"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: pairs, documents and a BEIR folder, made of documentation strings."""
    from ragcun_hf.data.python_docs import build_python_docs, write_entries

    folder = tmp_path_factory.mktemp("readme")
    for name in ("training", "model_cards"):
        (folder / name).symlink_to(ROOT / name)
    # Few and short, to be encoded fast; of 220 the recipe `unlabelled` can hold out the hundred that it needs.
    entries = sorted(build_python_docs(["numpy"]), key=lambda entry: len(entry.document))[100:320]
    entries = [entry._replace(document=" ".join(entry.document.split()[:20])) for entry in entries]
    pairs = [json.dumps({"query": entry.query, "positive": entry.document}) for entry in entries[::5]]
    (folder / "your_pairs.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    documents = [json.dumps({"text": entry.document}) for entry in entries]
    (folder / "your_documents.jsonl").write_text("\n".join(documents), encoding="utf-8")
    write_entries(entries[::5], folder / "data" / "beir" / "my_set")
    return folder


def _run(line, folder):
    """Run one line of a block: scripts of ours in this process, which has imported everything already."""
    words = shlex.split(line)
    if words[:1] == ["ragcun"]:
        importlib.import_module(f"ragcun_hf.cli.{COMMANDS_BY_NAME[words[1]].module}").main(words[2:])
    elif words[:1] == ["python"] and words[1].startswith("training/"):
        place, script = Path(words[1]).parent.name, Path(words[1]).stem
        module = f"ragcun_hf.cli.{script}" if place == "training" else script
        sys.path.insert(0, str(ROOT / Path(words[1]).parent))
        try:
            importlib.import_module(module).main(words[2:])
        finally:
            sys.path.pop(0)
    else:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-e", "-c", line], cwd=folder, env={**os.environ, "PATH": path}, check=True)


def test_readme_names_the_two_commands_and_shows_blocks_of_both_kinds():
    assert [text for _, text in BLOCKS if text.startswith("make demo")]
    assert len(COMMANDS) >= 4
    assert SNIPPETS


def test_commands_are_those_of_an_installed_package():
    """A checkout has scripts, too: one line says so, and the published recipes keep their published lines."""
    scripts = [line for text in COMMANDS for line in text.splitlines() if re.match(r"python training/\w+\.py", line)]
    assert len(scripts) == 2
    assert "--show_plan" in scripts[0]
    assert "--recipe jepa_10k" in scripts[1]


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_folder")
@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: " ".join(block.split()[1:2]))
def test_a_block_of_commands_runs(folder, block, monkeypatch):
    monkeypatch.chdir(folder)
    for line in block.replace("\\\n", " ").splitlines():
        if line.partition("#")[0].strip():
            _run(line, folder)


@pytest.mark.slow
def test_the_commands_have_written_what_the_readme_says(folder):
    for name in ("mine", "unlabelled", "by_hand", "masked", "jepa_10k"):
        assert (folder / "checkpoints" / name / "model.safetensors").is_file()
    results = json.loads((folder / "results" / "mine.json").read_text(encoding="utf-8"))
    assert set(results["datasets"]["my_set"]["systems"]) == {"base", "bm25", "fusion", "projection"}
    assert "mine |" in (folder / "results" / "table.md").read_text(encoding="utf-8")
    assert list((folder / "results" / "mine").glob("*.trec"))
    card = (folder / "checkpoints" / "mine" / "README.md").read_text(encoding="utf-8")
    assert "frozen base" in card
    assert 'AutoModel.from_pretrained("your-name/mine"' in card


@pytest.mark.slow
def test_python_blocks_run_on_the_model_that_they_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)  # noqa: S102 (our own README)
    assert names["queries"].shape == names["documents"].shape
