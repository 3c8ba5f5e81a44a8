"""The README's code blocks run in a folder with the files they name, and links between the pages resolve."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
# The make commands install everything, and the search page runs until it is stopped: both are tested elsewhere.
COMMANDS = [
    text
    for language, text in BLOCKS
    if language == "bash" and not text.startswith(("make ", "python training/search_demo"))
]
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "training/SCALE.md",
    "training/examples/README.md",
    "training/space/README.md",
]


def _entries(count):
    from ragcun_hf.data.python_docs import build_python_docs

    return build_python_docs(["numpy"])[:count]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded_folder):
    """Run all commands of the README in order, in a user's folder, and return the folder."""
    from ragcun_hf.data.python_docs import write_entries

    folder = tmp_path_factory.mktemp("readme")
    for name in ("training", "model_cards"):
        (folder / name).symlink_to(ROOT / name)
    entries = _entries(400)  # enough for the recipe `unlabelled` to hold out a hundred
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
            ["bash", "-e", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return folder


def test_the_readme_shows_the_two_make_commands_and_blocks_of_both_languages():
    assert [text for _, text in BLOCKS if text.startswith("make demo")]
    assert len(COMMANDS) >= 4
    assert SNIPPETS


def _sections(path):
    """Return the anchors that the Hub and GitHub give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "EXPERIMENTS.md", "training/examples/README.md"])
def test_links_of_a_page_lead_to_files_and_sections_that_exist(name):
    page = ROOT / name
    links = re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert links
    for link in links:
        path, _, section = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not section or section in _sections(target), link


@pytest.mark.parametrize("name", PAGES)  # EXPERIMENTS.md names files as they were on the day of the experiment
def test_files_that_a_page_names_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w/.])((?:ragcun_hf|training|tests|model_cards)/[\w/.*-]*)", text)
    assert paths
    assert not [path for path in paths if not list(ROOT.glob(path.rstrip(".")))]


@pytest.mark.slow
def test_the_readme_s_commands_write_the_files_that_it_mentions(folder):
    for name in ("mine", "unlabelled", "by_hand", "masked", "jepa_10k"):
        assert (folder / "checkpoints" / name / "model.safetensors").is_file()
    results = json.loads((folder / "results" / "mine.json").read_text(encoding="utf-8"))
    assert set(results["datasets"]["my_set"]["systems"]) == {"base", "projection"}
    assert list((folder / "results" / "mine").glob("*.trec"))


@pytest.mark.slow
def test_the_readme_s_python_blocks_run_on_the_model_that_its_commands_trained(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)  # noqa: S102 (our own README)
    assert names["queries"].shape == names["documents"].shape


@pytest.mark.slow
def test_the_readme_s_commands_put_a_card_into_the_model_folder(folder):
    card = (folder / "checkpoints" / "mine" / "README.md").read_text(encoding="utf-8")
    assert "frozen base" in card
    assert 'AutoModel.from_pretrained("your-name/mine"' in card
