"""Read BEIR's folder format as BEIR reads it, with errors that name file and line.

A folder holds corpus.jsonl (`_id`, `title`, `text`), queries.jsonl (`_id`, `text`) and qrels/<split>.tsv (query id,
document id, score).
"""

from __future__ import annotations

import csv
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm.auto import tqdm

from ..errors import UserError
from .documents import document_id, document_text, is_beir_folder
from .file_rows import read_lines, read_rows
from .mapped_column import MappedColumn
from .rows import Row, shorten, warn_once

logger = logging.getLogger(__name__)

DOWNLOAD_URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/{name}.zip"
LARGEST_IN_MEMORY = 2**26  # bytes of corpus.jsonl; a larger file is copied to columns on disk and read from there
_LAYOUT = 2  # version of these columns; increase it when their content changes


@dataclass(frozen=True)
class BeirDataset:
    """One collection with the judgements of one split."""

    name: str  # of the folder
    split: str
    queries: dict[str, str]  # query id -> text; only queries with judgements
    corpus_ids: Sequence[str]  # in the order of the file
    corpus_texts: Sequence[str]  # title and text of these documents, joined by `document_text`; may be ""
    # Judgements of documents outside the corpus are kept: the official metric counts them as relevant and never found.
    qrels: dict[str, dict[str, int]]  # query id -> document id -> score; 0 means judged not relevant


def load_beir_folder(path: str | os.PathLike[str], split: str = "test") -> BeirDataset:
    """Read a BEIR folder with the judgements of qrels/<split>.tsv, whose header line may be missing."""
    folder = Path(path).expanduser()
    if not is_beir_folder(folder):
        raise UserError(
            f"expected a BEIR folder with corpus.jsonl, queries.jsonl and qrels/, got {str(folder)!r}: check the path"
        )
    qrels = read_qrels(folder, split)
    corpus_ids, corpus_texts = read_corpus(folder / "corpus.jsonl")
    queries: dict[str, str] = {}
    for row in read_rows(folder / "queries.jsonl"):
        identifier = document_id(row)
        if identifier in queries:
            _reject_repeated_id(row)
        queries[identifier] = row.text("text")
    without_text = [query_id for query_id in qrels if query_id not in queries]
    if without_text:
        raise UserError(
            f"{folder / 'qrels' / (split + '.tsv')}: expected queries of queries.jsonl, "
            f"got {len(without_text)} others, first {shorten(without_text[0])}: complete queries.jsonl"
        )
    judged_queries = {query_id: queries[query_id] for query_id in qrels}
    return BeirDataset(folder.resolve().name, split, judged_queries, corpus_ids, corpus_texts, qrels)


def dataset_of_pairs(
    pairs: Iterable[Mapping[str, Any]], documents: Iterable[str] = (), *, name: str = "data", split: str = "test"
) -> BeirDataset:
    """Make a collection of pairs: a query's relevant documents are those that it has a pair with.

    The corpus is made of the documents and negatives of all pairs, and of more documents. Equal texts are one.
    """
    rows = list(pairs)
    texts = [document_text("", text) for row in rows for text in (row["positive"], *(row.get("negative") or ()))]
    document_ids = {text: f"d{number}" for number, text in enumerate(dict.fromkeys([*texts, *documents]))}
    query_ids = {text: f"q{number}" for number, text in enumerate(dict.fromkeys(row["query"] for row in rows))}
    qrels: dict[str, dict[str, int]] = {}
    for row in rows:
        qrels.setdefault(query_ids[row["query"]], {})[document_ids[document_text("", row["positive"])]] = 1
    queries = {identifier: text for text, identifier in query_ids.items()}
    return BeirDataset(name, split, queries, list(document_ids.values()), list(document_ids), qrels)


def find_beir_dataset(name: str, data_dir: str | os.PathLike[str], split: str = "test") -> BeirDataset:
    """Read the BEIR collection `name` from its folder in `data_dir`; download it first if there is none."""
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
    # BEIR saves even a server's error page as the .zip file, and would find it the next time: use a temporary folder.
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


def read_qrels(folder: Path, split: str) -> dict[str, dict[str, int]]:
    """Read the judgements of a BEIR folder: query id -> document id -> score."""
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        present = ", ".join(sorted(file.stem for file in path.parent.glob("*.tsv"))) or "none"
        raise UserError(
            f"{path.parent}: expected judgements of the split {split!r}, got the splits {present}: name one of them"
        )
    qrels: dict[str, dict[str, int]] = {}
    for number, line in read_lines(path):
        line = line.rstrip("\r\n")
        # BEIR reads qrels with the csv module, which removes quotes; without quotes, splitting gives the same.
        fields = next(csv.reader([line], delimiter="\t")) if '"' in line else line.split("\t")
        if not line.strip() or (number == 1 and _is_header(fields)):
            continue
        if len(fields) != 3 or not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", fields[2]) or not fields[0] or not fields[1]:
            raise UserError(
                f"{path}, line {number}: expected query id, document id and whole score (up to nine digits), "
                f"separated by tabs, got {shorten(fields)}: correct the line"
            )
        qrels.setdefault(fields[0], {})[fields[1]] = int(fields[2])
    if not qrels:
        raise UserError(f"{path}: expected at least one judgement, got none: check the file")
    return qrels


def _is_header(fields: list[str]) -> bool:
    return len(fields) == 3 and re.search("score|rel|label|judg|grade", fields[2].lower()) is not None


def read_corpus(path: Path) -> tuple[Sequence[str], Sequence[str]]:
    """Read the ids and texts of corpus.jsonl; slices of both are lists, and a text may be "".

    A file above `LARGEST_IN_MEMORY` is copied to the cache of `datasets` (`HF_DATASETS_CACHE`) when it is new.
    """
    ids: Sequence[str]
    texts: Sequence[str]
    if path.stat().st_size > LARGEST_IN_MEMORY:
        files = _columns_on_disk(path)
        ids, texts = MappedColumn(files, "id"), MappedColumn(files, "text")
    else:
        documents = list(_documents(path))
        ids, texts = ([document[name] for document in documents] for name in ("id", "text"))
    # Checksums of 8 bytes are compared instead of ids; only if two are equal, the file is read again.
    checksums = np.fromiter(map(_checksum, ids), dtype=np.uint64, count=len(ids))
    checksums.sort()
    candidates = set(checksums[1:][checksums[1:] == checksums[:-1]].tolist())
    seen: set[str] = set()
    for row in read_rows(path) if candidates else ():
        identifier = document_id(row)
        if identifier in seen:
            _reject_repeated_id(row)
        if _checksum(identifier) in candidates:
            seen.add(identifier)
    _count_empty(path, texts)
    return ids, texts


def _count_empty(path: Path, texts: Sequence[str]) -> None:
    num_empty = texts.count_empty() if isinstance(texts, MappedColumn) else sum(not text for text in texts)
    if num_empty == len(texts):
        raise UserError(
            f"{path}: expected documents with a title or a text, got {num_empty} empty ones: check the file"
        )
    if num_empty:
        warn_once(f"{path}: {num_empty} of {len(texts)} documents have neither title nor text")


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
        text = document_text(row.optional_text("title"), row.present_text("text"))
        yield {"id": document_id(row), "text": text}


def _checksum(identifier: str) -> int:
    return xxhash.xxh3_64_intdigest(identifier.encode("utf-8"))


def _reject_repeated_id(row: Row) -> None:
    row.reject("_id", "an id that no earlier line has", "give every line its own id")
