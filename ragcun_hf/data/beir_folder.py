"""BEIR's folder format, read as BEIR reads it, with errors that name file and line.

A folder holds corpus.jsonl (`_id`, `title`, `text`), queries.jsonl (`_id`, `text`) and
qrels/<split>.tsv (query id, document id, score).
"""

from __future__ import annotations

import csv
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from tqdm.auto import tqdm

from ..errors import UserError
from .documents import document_id, document_text, is_beir_folder
from .file_rows import read_lines, read_rows
from .mapped_column import MappedColumn
from .rows import Row, shorten

logger = logging.getLogger(__name__)

DOWNLOAD_URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/{name}.zip"


@dataclass(frozen=True)
class BeirDataset:
    """One collection with the judgements of one split.

    Attributes:
        name: The folder's name.
        split: Which qrels were read.
        queries: Query id -> text; only queries that have judgements in the split.
        corpus_ids: Document ids in the order of the file.
        corpus_texts: `document_text(title, text)` of the same documents; may be "". Where the corpus is large, both
            are read from the disk as they are asked for (`read_corpus`); a slice of them is a list.
        qrels: Query id -> document id -> score (0 = judged not relevant). Documents that are not in the
            corpus stay in, because the official metric counts them as relevant and never found.
    """

    name: str
    split: str
    queries: dict[str, str]
    corpus_ids: Sequence[str]
    corpus_texts: Sequence[str]
    qrels: dict[str, dict[str, int]]


def load_beir_folder(path: str | os.PathLike[str], split: str = "test") -> BeirDataset:
    """Read a BEIR folder as `beir.datasets.data_loader.GenericDataLoader` does.

    Args:
        path: The folder.
        split: Name of the file in qrels/, without `.tsv`. Its header line may be missing.

    Returns:
        The collection.

    Raises:
        UserError: If a part is missing, a line is malformed, an id comes twice, or a judged query has no text.
    """
    folder = Path(path).expanduser()
    if not is_beir_folder(folder):
        raise UserError(
            f"expected a BEIR folder with corpus.jsonl, queries.jsonl and qrels/, got {str(folder)!r}: check the path"
        )
    qrels = _read_qrels(folder / "qrels", split)
    corpus_ids, corpus_texts = read_corpus(folder / "corpus.jsonl")
    all_queries: dict[str, str] = {}
    for row in read_rows(folder / "queries.jsonl"):
        all_queries[_new_id(row, all_queries)] = row.text("text")
    without_text = [query_id for query_id in qrels if query_id not in all_queries]
    if without_text:
        raise UserError(
            f"{folder / 'qrels' / (split + '.tsv')}: expected queries of queries.jsonl, "
            f"got {len(without_text)} others, first {shorten(without_text[0])}: complete queries.jsonl"
        )
    return BeirDataset(
        name=folder.resolve().name,
        split=split,
        queries={query_id: all_queries[query_id] for query_id in qrels},
        corpus_ids=corpus_ids,
        corpus_texts=corpus_texts,
        qrels=qrels,
    )


def find_beir_dataset(name: str, data_dir: str | os.PathLike[str], split: str = "test") -> BeirDataset:
    """Read a BEIR collection by its name, downloading it once if it is not there.

    Args:
        name: Official name in lower case, such as `scifact`, or the name of a folder in `data_dir`.
        data_dir: Folder that holds (or will hold) one folder per collection.
        split: Name of the qrels file.

    Returns:
        The collection.

    Raises:
        UserError: If it is not there and cannot be downloaded.
    """
    folder = Path(data_dir).expanduser() / name
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UserError(
            f"expected the name of a BEIR collection such as scifact, got {shorten(name)}: give a plain name"
        )
    if not folder.is_dir():
        _download(name, folder)
    return load_beir_folder(folder, split)


def _download(name: str, folder: Path) -> None:
    import zipfile

    import requests
    from beir.util import download_and_unzip

    url = DOWNLOAD_URL.format(name=name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s to %s", url, folder)
    # BEIR writes even a server's error page as the .zip and finds it again next time: keep that apart.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        try:
            unpacked = Path(download_and_unzip(url, scratch))
            if not folder.exists():  # another process may have been faster
                unpacked.replace(folder)
        except (requests.RequestException, zipfile.BadZipFile, OSError) as error:
            if folder.is_dir():
                return
            raise UserError(
                f"expected the BEIR collection {name!r} in {str(folder)!r}, found no such folder, "
                f"and downloading {url} failed ({type(error).__name__}): check name and connection, "
                "or unpack the collection there yourself"
            ) from error


def _new_id(row: Row, known: dict[str, str]) -> str:
    identifier = document_id(row)
    if identifier in known:
        row.reject("_id", "an id that no earlier line has", "give every line its own id")
    return identifier


def _read_qrels(folder: Path, split: str) -> dict[str, dict[str, int]]:
    path = folder / f"{split}.tsv"
    if not path.is_file():
        present = ", ".join(sorted(file.stem for file in folder.glob("*.tsv"))) or "none"
        raise UserError(
            f"{folder}: expected judgements of the split {split!r}, got the splits {present}: name one of them"
        )
    qrels: dict[str, dict[str, int]] = {}
    for number, line in read_lines(path):
        fields = _qrels_fields(line.rstrip("\r\n"))
        if not line.strip() or (number == 1 and _is_header(fields)):
            continue
        query_id, document, score = _judgement(fields, f"{path}, line {number}")
        qrels.setdefault(query_id, {})[document] = score
    if not qrels:
        raise UserError(f"{path}: expected at least one judgement, got none: check the file")
    return qrels


def _qrels_fields(line: str) -> list[str]:
    # BEIR reads qrels with the csv module, which takes quotes away; without quotes a split is the same.
    return next(csv.reader([line], delimiter="\t")) if '"' in line else line.split("\t")


def _is_header(fields: list[str]) -> bool:
    return len(fields) == 3 and re.search("score|rel|label|judg|grade", fields[2].lower()) is not None


def _judgement(fields: list[str], place: str) -> tuple[str, str, int]:
    if len(fields) != 3 or not re.fullmatch(r"\s*-?\d+\s*", fields[2]) or not fields[0] or not fields[1]:
        raise UserError(
            f"{place}: expected query id, document id and whole score, separated by tabs, got {shorten(fields)}: "
            "correct the line"
        )
    return fields[0], fields[1], int(fields[2])


_LARGEST_IN_MEMORY = 2**26  # bytes of a file
_LAYOUT = 1  # of the columns on disk; one more with every change of what they hold


def read_corpus(path: Path) -> tuple[Sequence[str], Sequence[str]]:
    """Read corpus.jsonl.

    Args:
        path: The file. One of more than 64 MiB is written, once until it changes, to the cache of `datasets`
            (`HF_DATASETS_CACHE`), and read from there.

    Returns:
        Ids, and texts as `document_text` joins title and text; a text may be "". Slices of both are lists.

    Raises:
        UserError: If a line is malformed, an id comes twice, or there is no room for the copy.
    """
    ids: Sequence[str]
    texts: Sequence[str]
    if path.stat().st_size > _LARGEST_IN_MEMORY:
        files = _columns_on_disk(path)
        ids, texts = MappedColumn(files, "id"), MappedColumn(files, "text")
    else:
        documents = list(_documents(path))
        ids, texts = ([document[name] for document in documents] for name in ("id", "text"))
    _refuse_repeated_ids(path, ids)
    return ids, texts


def _columns_on_disk(path: Path) -> list[str]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    facts = path.stat()
    inputs = {"path": str(path.resolve()), "layout": _LAYOUT, "size": facts.st_size, "changed": facts.st_mtime_ns}
    columns = datasets.Features({name: datasets.Value("string") for name in ("id", "text")})
    try:
        table = datasets.Dataset.from_generator(_rows_on_disk, features=columns, gen_kwargs=inputs)
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"expected room for a copy of {path} in {datasets.config.HF_DATASETS_CACHE}, got {cause}: free some "
            "space, or set HF_DATASETS_CACHE to another folder"
        ) from error
    return [file["filename"] for file in table.cache_files]


def _rows_on_disk(path: str, **_: int) -> Iterator[dict[str, str]]:
    yield from tqdm(_documents(Path(path)), desc=f"Copying {Path(path).name}", unit=" documents")


def _documents(path: Path) -> Iterator[dict[str, str]]:
    for row in read_rows(path):
        text = document_text(row.optional_text("title"), row.optional_text("text"))
        yield {"id": document_id(row), "text": text}


def _refuse_repeated_ids(path: Path, ids: Sequence[str]) -> None:
    """Look for equal checksums, 8 bytes an id; where there are some, read the file again to name the line."""
    checksums = np.fromiter(map(_checksum, ids), dtype=np.uint64, count=len(ids))
    checksums.sort()
    suspects = set(checksums[1:][checksums[1:] == checksums[:-1]].tolist())
    seen: set[str] = set()
    for row in read_rows(path) if suspects else ():
        identifier = document_id(row)
        if identifier in seen:
            row.reject("_id", "an id that no earlier line has", "give every line its own id")
        if _checksum(identifier) in suspects:
            seen.add(identifier)


def _checksum(identifier: str) -> int:
    return xxhash.xxh3_64_intdigest(identifier.encode("utf-8"))
