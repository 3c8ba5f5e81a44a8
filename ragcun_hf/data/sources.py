"""Open what a data argument names: a file, a folder or a Hub dataset; put checked rows into a dataset."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import check_hub_answers
from .file_rows import KNOWN_SUFFIXES, file_kind, holds_text, path_of, read_rows
from .rows import Origin, Row, shorten

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_SPLIT_NAMES = {"train": "train", "test": "test", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev"}
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[^:/]+))?")
_ROWS_PER_CHUNK = 10_000


@dataclass(frozen=True)
class Source:
    """Rows that can be read any number of times, from local files or from a dataset."""

    name: str  # as the user gave it
    files: tuple[Path, ...] = ()  # in order
    dataset: Any = None  # of the Hub, written by `save_to_disk`, or rows in memory
    dataset_origin: Origin | None = None  # names the rows of `dataset`
    limit: int | None = None  # rows to read; None reads all

    def rows(self, is_read: Callable[[str], bool] | None = None) -> Iterator[Row]:
        """Yield the rows, each with its place.

        With `is_read`, columns for which it is false need not be there, except that the first row has all names.
        """
        return islice(self._all_rows(is_read), self.limit)

    def _all_rows(self, is_read: Callable[[str], bool] | None) -> Iterator[Row]:
        for file in self.files:
            yield from read_rows(file, is_read)
        if self.dataset is not None and self.dataset_origin is not None:
            for index, fields in enumerate(_wanted_columns(self.dataset, is_read)):
                if isinstance(fields, str):
                    fields = {"text": fields}
                if not isinstance(fields, dict):
                    place = self.dataset_origin.place(index)
                    raise UserError(
                        f"{place}: expected a dictionary or a text, got {shorten(fields)}: convert the row"
                    )
                yield Row(self.dataset_origin, index, fields)


def _wanted_columns(dataset: Any, is_read: Callable[[str], bool] | None) -> Iterator[Any]:
    """Yield the rows of a dataset; of a table, only the columns that are read are decoded.

    A transform may need any column, so with one all are decoded.
    """
    import datasets

    is_table = isinstance(dataset, datasets.Dataset) and len(dataset) and dataset.format["type"] != "custom"
    names = dataset.column_names if is_table else []
    wanted = [name for name in names if is_read is None or is_read(name)]
    if not wanted:
        yield from dataset
        return
    types = {field.name: field.type for field in dataset.features.arrow_schema}
    texts = [name for name in names if name not in wanted and holds_text(types[name])]
    first = dict.fromkeys(names) | dataset.select_columns([*wanted, *texts])[0]
    for index, fields in enumerate(dataset.select_columns(wanted)):
        yield first | fields if index == 0 else fields


def check_limit(limit: int | None) -> None:
    """Refuse a limit below one row; None means no limit."""
    if limit is not None and limit < 1:
        raise UserError(f"expected a limit of at least 1 row, got {limit}: leave it out to read all rows")
    if limit is not None and limit > sys.maxsize:
        raise UserError(f"expected a limit of at most {sys.maxsize} rows, got more: leave it out to read all rows")


def open_source(
    source: Any,
    *,
    split: str = "train",
    streaming: bool = False,
    limit: int | None = None,
    name: str = "the dataset",
) -> Source:
    """Find the rows that a data argument names; local files are not opened yet.

    A source that is no name or path is a dataset or a list of rows itself, which messages call `name`.

    With streaming or a limit, a Hub dataset (`org/name` or `org/name:config`) is not downloaded first. The files of a
    folder are of one kind; if their names start with those of splits (`train.jsonl`, `test-00001.parquet`), only those
    of `split` are read. A single file has no splits.
    """
    check_limit(limit)
    if not isinstance(source, (str, os.PathLike)):
        return Source(name, dataset=source, dataset_origin=Origin(name, "row index"), limit=limit)
    name = os.fspath(source)
    path = path_of(name)
    if name and path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _open_saved_dataset(path, split, limit)
        return Source(str(path), files=_files_of_folder(path, split), limit=limit)
    if name and path.exists():
        if file_kind(path) is None:
            raise UserError(f"expected a file ending in {KNOWN_SUFFIXES}, got {name!r}: convert or rename the file")
        return Source(name, files=(path,), limit=limit)
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id is None or file_kind(path) is not None or name.startswith((".", "~")):
        raise UserError(
            f"expected an existing file or folder, or a Hub dataset 'org/name', got {name!r}: "
            "nothing of that name exists, check the path"
        )
    return _open_hub(hub_id["name"], hub_id["config"], split, streaming or limit is not None, limit)


def build_table(
    make_rows: Callable[..., Iterator[dict[str, Any]]], features: Any, *, streaming: bool, **arguments: Any
) -> Dataset | IterableDataset:
    """Put checked rows into a `Dataset` in memory, or, for streaming, into an `IterableDataset` that keeps none.

    `make_rows` is a generator function, called with `arguments` for every pass over the rows. It must be defined in a
    module, for the workers of a loader, and take tuples instead of lists, which `datasets` splits into shards.
    """
    import datasets
    import pyarrow

    if streaming:
        return datasets.IterableDataset.from_generator(make_rows, features=features, gen_kwargs=arguments)
    schema = features.arrow_schema
    # In chunks, so that only Arrow columns, and never all rows as Python objects, are in memory.
    rows, chunks = make_rows(**arguments), []
    while pending := list(islice(rows, _ROWS_PER_CHUNK)):
        chunks.append(pyarrow.Table.from_pylist(pending, schema=schema))
    table = pyarrow.concat_tables(chunks or [schema.empty_table()])
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=_fingerprint(table))


def _fingerprint(table: Any) -> str:
    """Hash the content; by default `datasets` pickles the whole table for this, in four times its memory."""
    import xxhash

    digest = xxhash.xxh64(str(table.schema).encode("utf-8"))
    for column in table.columns:
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                digest.update(buffer if buffer is not None else b"-")
    return digest.hexdigest()


def _files_of_folder(folder: Path, split: str) -> tuple[Path, ...]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in files if file_kind(file) and file.stem.lower() not in ("readme", "license")]
    if not files:
        raise UserError(f"expected a folder with files ending in {KNOWN_SUFFIXES}, got {str(folder)!r} without any")
    split_of = {file: _SPLIT_NAMES.get(re.split(r"[._-]", file.name.lower())[0]) for file in files}
    if any(split_of.values()):
        files = [file for file in files if split_of[file] == _SPLIT_NAMES.get(split, split)]
    if not files:
        present = ", ".join(file.name for file in split_of)
        raise UserError(
            f"{folder}: expected files of the split {split!r}, got {present}: name another split or one file"
        )
    kinds = sorted({str(file_kind(file)) for file in files})
    if len(kinds) > 1:
        raise UserError(f"{folder}: expected files of one kind, got {', '.join(kinds)}: name one file instead")
    return tuple(files)


def _open_saved_dataset(folder: Path, split: str, limit: int | None) -> Source:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: expected a folder of `save_to_disk`, got {error}: write it again") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"{folder}: expected the split {split!r}, got {', '.join(saved)}: name one of these")
        saved = saved[split]
    return Source(str(folder), dataset=saved, dataset_origin=Origin(str(folder), "row index"), limit=limit)


def _open_hub(name: str, config: str | None, split: str, streaming: bool, limit: int | None) -> Source:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from datasets.naming import camelcase_to_snakecase

    whole_name = f"{name}:{config}" if config else name
    here = f"no file or folder {whole_name!r} exists here either"
    try:
        *owner, last = name.split("/")
        cached = Path(datasets.config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(last)]))
        if not (cached.exists() or datasets.config.HF_HUB_OFFLINE):
            check_hub_answers()
        dataset = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except DatasetNotFoundError as error:
        raise UserError(
            f"expected a Hub dataset, got {whole_name!r}, which the Hub does not have or does not show you "
            f"({here}): check the name, or log in with `hf auth login`"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"expected to reach the Hub for the dataset {whole_name!r}, got {type(error).__name__} ({here}): "
            "check the connection, or give a local file"
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"expected the split {split!r} of the Hub dataset {whole_name!r}, got {shorten(str(error))}: "
            "check split and configuration ('org/name:config')"
        ) from error
    origin = Origin(f"{whole_name}, split {split}", "row index")
    return Source(whole_name, dataset=dataset, dataset_origin=origin, limit=limit)
