"""The corpus of docstrings: meaningful, without repetitions, and read without importing any package."""

import sys

import pytest

from ragcun_hf.data.beir_folder import load_beir_folder
from ragcun_hf.data.python_docs import DocEntry, build_python_docs, is_test_entry, write_entries
from ragcun_hf.errors import UserError

BODY = "It walks through all of the values one after another and gives back their sum, as a number of the same type."
MODULE = f'''
"""A module."""
raise RuntimeError("this package must not be imported")

def add(a, b):
    """
    add(a, b, /) -> int

    Add two numbers of any type. Slowly.

    {BODY}
    """
    def inner():
        """Summary of an inner function.

        {BODY}"""

def again():
    """Another one with the same body.

    Slowly.

    {BODY}
    """

def short():
    """Too short a body here.

    Few words."""

def same():
    """Add two numbers of any type.

    Another text, but the question has been asked before: {BODY}"""

def echo():
    """Echo what has been said.

    Echo what has been said. {BODY}"""

def _private():
    """A private function is left out.

    private {BODY}"""

class Thing:
    """Hold a thing for later.

    Thing {BODY}"""

    def take(self):
        """Take the thing out again.

        take {BODY}"""

if True:
    def conditional():
        """Do it on some systems only.

        conditional {BODY}"""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "fakedocs_package"
    for name in ("tests", "_internal", "sub"):
        (folder / name).mkdir(parents=True)
    (folder / "__init__.py").write_text(MODULE)
    (folder / "sub" / "broken.py").write_text("def (:\n")
    for name in ("tests/thing.py", "_internal/thing.py", "sub/test_thing.py", "sub/_private_module.py"):
        where = name.replace("/", " ")
        text = f'def f():\n    """Summary written in {where}.\n\n    {where} {BODY}"""\n'
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "fakedocs_package"


def test_exactly_the_public_meaningful_and_distinct_entries_are_kept(package):
    entries = build_python_docs([package])
    assert [entry.id.removeprefix(package + ".") for entry in entries] == [
        "add",
        "Thing",
        "Thing.take",
        "conditional",
        "sub._private_module.f",
    ]
    assert entries[0] == DocEntry(f"{package}.add", "Add two numbers of any type.", f"Slowly.\n\n{BODY}")
    assert package not in sys.modules


def test_the_corpus_is_a_beir_folder_whose_splits_cover_it_once(package, tmp_path):
    entries = build_python_docs([package])
    folder = write_entries(entries, tmp_path / "corpus")
    ids = set()
    for split, wanted in (("train", False), ("test", True)):
        expected = [entry for entry in entries if is_test_entry(entry) is wanted]
        if not expected:
            continue
        collection = load_beir_folder(folder, split)
        assert collection.corpus_ids == [entry.id for entry in entries]
        assert collection.corpus_texts == [entry.document for entry in entries]
        assert list(collection.queries.values()) == [entry.query for entry in expected]
        assert [list(judged) for judged in collection.qrels.values()] == [[entry.id] for entry in expected]
        assert not set(collection.queries) & set(collection.corpus_ids)
        ids |= {next(iter(judged)) for judged in collection.qrels.values()}
    assert ids == {entry.id for entry in entries}


def test_one_entry_in_five_belongs_to_the_test_split_whatever_its_name():
    entries = [DocEntry(f"a.b{n}", "Some query here.", f"document {n}") for n in range(5000)]
    assert sum(map(is_test_entry, entries)) / 5000 == pytest.approx(0.2, abs=0.02)
    assert all(is_test_entry(entry) == is_test_entry(entry._replace(id="x", query="y")) for entry in entries[:50])


@pytest.mark.slow
def test_numpy_alone_yields_hundreds_of_clean_entries_in_a_stable_order():
    entries = build_python_docs(["numpy"])
    assert 500 < len(entries) < 1500
    for field in ("id", "query", "document"):
        assert len({getattr(entry, field) for entry in entries}) == len(entries)
    for entry in entries:
        assert "\n" not in entry.query
        assert entry.query.rstrip(".").lower() not in " ".join(entry.document.lower().split())
        assert len(entry.document.split()) >= 20
        assert ".tests." not in entry.id
    assert entries == build_python_docs(["numpy"])


@pytest.mark.parametrize("name", ["no_such_package_here", "numpy.linalg", "", "math"])
def test_the_error_names_a_package_without_source_files(name):
    with pytest.raises(UserError, match="expected an installed package"):
        build_python_docs([name])


def test_another_folder_is_never_replaced(tmp_path):
    (tmp_path / "photo.jpg").write_text("x")
    with pytest.raises(UserError, match="new, empty or BEIR folder"):
        write_entries([DocEntry("a", "b", "c")], tmp_path)
    assert (tmp_path / "photo.jpg").exists()


def test_rewriting_leaves_no_old_entries_and_no_temporary_files(tmp_path):
    for text in ("old", "new"):
        write_entries([DocEntry(text, "query", f"document {text}")], tmp_path / "corpus")
    assert "old" not in (tmp_path / "corpus" / "corpus.jsonl").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["corpus"]
