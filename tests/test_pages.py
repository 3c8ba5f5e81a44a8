"""Links between the pages resolve, and the files that they name exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "RELIABILITY.md",
    "training/SCALE.md",
    "training/examples/README.md",
    "training/space/README.md",
]


def _sections(path):
    """Return the anchors that the Hub and GitHub give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "EXPERIMENTS.md", "training/examples/README.md"])
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
def test_the_pages_of_the_api_are_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "training.html").read_text(encoding="utf-8")
    assert "compute_metrics" in page  # of the Trainer's docstring
    assert "from_recipe" in page
