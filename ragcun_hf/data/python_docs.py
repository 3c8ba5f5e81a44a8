"""Build a corpus from the docstrings of installed Python packages, for trials without a network.

The query is the first sentence about a function, class or method; the document is the rest of its docstring. The
source files are read, never run.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .documents import text_digest, text_position
from .word_spans import sentence_spans
from .writing import write_beir_folder

logger = logging.getLogger(__name__)

DEFAULT_PACKAGES = ("numpy", "torch", "scipy")
_MIN_QUERY_WORDS = 4
_MAX_QUERY_WORDS = 40  # longer first sentences are lists and tables
_MIN_DOCUMENT_WORDS = 20
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "benchmarks", "vendored", "third_party"})
_PUBLIC_FOLDERS = frozenset({"_core"})  # where NumPy defines what `numpy` exports
_SIGNATURE = re.compile(r"^\s*[\w.\[\], ]*\w\(.*\)(\s*->.*)?\s*:?\s*(\\)?$|^\s*[\w.]+\s*=\s*\w+\(")
_TEST_SHARE = 0.2


class DocEntry(NamedTuple):
    """One documented object."""

    id: str  # dotted name, such as `scipy.signal._filter_design.butter`
    query: str  # the summary: the first sentence
    document: str  # the rest of the docstring


def build_python_docs(packages: Sequence[str] = DEFAULT_PACKAGES) -> list[DocEntry]:
    """Read the docstrings of public functions, classes and methods, in the order of packages, files and lines.

    No query and no document occurs twice, a query has 4 to 40 words, a document has at least 20, and no document
    contains its query.
    """
    seen_queries: set[bytes] = set()
    seen_documents: set[bytes] = set()
    entries: list[DocEntry] = []
    for package in packages:
        before = len(entries)
        for name, docstring in _documented_objects(package):
            query, document = _summary_and_rest(docstring)
            if not _is_meaningful(query, document):
                continue
            keys = text_digest(query.casefold()), text_digest(document)
            if keys[0] in seen_queries or keys[1] in seen_documents:
                continue
            seen_queries.add(keys[0])
            seen_documents.add(keys[1])
            entries.append(DocEntry(name, query, document))
        logger.info("%s: %d entries", package, len(entries) - before)
    if not entries:
        raise UserError(f"expected packages with documentation, found none in {list(packages)}: name other packages")
    return entries


def is_test_entry(entry: DocEntry) -> bool:
    """Return whether an entry belongs to the test split (one in five), which depends on its document alone."""
    return text_position(entry.document) < _TEST_SHARE


def write_entries(entries: Sequence[DocEntry], folder: str | os.PathLike[str]) -> Path:
    """Write entries as a BEIR folder whose splits train and test hold one judgement per query; return the folder."""
    qrels: dict[str, dict[str, dict[str, int]]] = {"train": {}, "test": {}}
    for entry in entries:
        qrels["test" if is_test_entry(entry) else "train"][f"query:{entry.id}"] = {entry.id: 1}
    documents = {entry.id: ("", entry.document) for entry in entries}
    queries = {f"query:{entry.id}": entry.query for entry in entries}
    return write_beir_folder(folder, documents, queries, qrels)


def _documented_objects(package: str) -> Iterator[tuple[str, str]]:
    # find_spec would import the parent package of a dotted name.
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"expected an installed package, got {package!r}: install it, or name others")
    root = Path(next(iter(found.submodule_search_locations)))
    known: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if not _is_public(parts):
            continue
        module = ".".join((package, *(part for part in parts if part != "__init__")))
        for name, docstring in _docstrings(_parse(file), module):
            if name not in known:  # overloads and branches define a name several times
                known.add(name)
                yield name, docstring


def _is_public(parts: tuple[str, ...]) -> bool:
    """Leave out tests and private folders, but not private modules: they define what SciPy exports."""
    *folders, module = parts
    is_private = any(folder.startswith("_") and folder not in _PUBLIC_FOLDERS for folder in folders)
    is_test = _SKIPPED_FOLDERS.intersection(parts) or module.startswith("test_") or module == "conftest"
    return not (is_private or is_test)


def _parse(file: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in the packages
        try:
            return ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError) as error:
            logger.debug("left out %s: %s", file, error)
            return ast.Module(body=[], type_ignores=[])


def _docstrings(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield dotted names and docstrings in the order of the file; what functions define inside is not public."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if child.name.startswith("_"):
                continue
            name = f"{prefix}.{child.name}"
            docstring = ast.get_docstring(child, clean=False)
            if docstring:
                yield name, docstring
            if isinstance(child, ast.ClassDef):
                yield from _docstrings(child, name)
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _docstrings(child, prefix)


def _summary_and_rest(docstring: str) -> tuple[str, str]:
    """Return the first sentence, on one line, and the text after it; signature lines are skipped."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)
    first_lines = paragraphs[0].splitlines()
    while first_lines and _SIGNATURE.match(first_lines[0]):
        first_lines.pop(0)
    rest = paragraphs[1] if len(paragraphs) > 1 else ""
    if not first_lines:
        return _summary_and_rest(rest) if rest else ("", "")
    paragraph = " ".join(" ".join(first_lines).split())
    end = next(iter(sentence_spans(paragraph)), (0, 0))[1]
    return paragraph[:end], f"{paragraph[end:].strip()}\n\n{rest}".strip()


def _is_meaningful(query: str, document: str) -> bool:
    has_usual_length = _MIN_QUERY_WORDS <= len(query.split()) <= _MAX_QUERY_WORDS
    if not has_usual_length or len(document.split()) < _MIN_DOCUMENT_WORDS:
        return False
    if not query[0].isalnum() and query[0] not in "`\"'":
        return False
    return query.rstrip(".").casefold() not in " ".join(document.split()).casefold()
