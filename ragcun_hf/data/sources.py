"""From what the user names (a file, a folder, a Hub id) to located rows and to one table.

`open_source` decides what is meant and gives rows that know their place; `read_table` puts them into
one `datasets.Dataset`. Which columns must be there and what they hold is decided by the readers of
pairs and documents, which build on `open_source`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .file_rows import file_kind, known_suffixes, read_rows
from .rows import Origin, Row, shorten

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SPLIT_NAMES = {"train": "train", "test": "test", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev"}
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[^:/]+))?")
_ROWS_PER_CHUNK = 10_000


@dataclass(frozen=True)
class Source:
    """Something that rows can be read from, as often as needed.

    Attributes:
        name: What the user called it.
        files: The local files, in order; empty for a dataset.
        dataset: A dataset of the Hub, or one written by `save_to_disk`; None for files.
        dataset_origin: How to name the rows of `dataset`.
    """

    name: str
    files: tuple[Path, ...] = ()
    dataset: Any = None
    dataset_origin: Origin | None = None

    def rows(self) -> Iterator[Row]:
        """Yield all rows, each with its place."""
        for file in self.files:
            yield from read_rows(file)
        if self.dataset is not None and self.dataset_origin is not None:
            for index, fields in enumerate(self.dataset):
                yield Row(self.dataset_origin, index, fields)


def open_source(source: str | os.PathLike[str], *, split: str = "train", streaming: bool = False) -> Source:
    """Find out what a data argument means.

    Args:
        source: An existing file or folder, or the id of a Hub dataset: `org/name` or `org/name:config`.
            A folder holds files of one kind; where their names start with a split's name
            (`train.jsonl`, `test-00001.parquet`), only those of `split` are read.
        split: Part of the Hub dataset or folder. One file is one table: it has no splits.
        streaming: Read a Hub dataset over the network row by row instead of downloading it first.

    Returns:
        The source. Local files are not opened yet.

    Raises:
        UserError: If nothing of that name exists, here or on the Hub, or nothing in it can be read.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _open_folder(path, split)
    if name and path.exists():
        if file_kind(path) is None:
            raise UserError(f"expected a file ending in {known_suffixes()}, got {name!r}: convert or rename the file")
        return Source(name, files=(path,))
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id is None or file_kind(path) is not None or name.startswith((".", "~")):
        raise UserError(
            f"expected an existing file or folder, or a Hub dataset 'org/name', got {name!r}: "
            "nothing of that name exists, check the path"
        )
    return _open_hub(hub_id["name"], hub_id["config"], split, streaming)


def read_table(
    source: str | os.PathLike[str], *, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Read a source with whatever columns it has.

    Args:
        source: File, folder or Hub id, as for `open_source`. Bare strings become a column `text`.
        split: Part of a Hub dataset or folder.
        streaming: Return a `datasets.IterableDataset`, which reads as it is walked through.

    Returns:
        A `Dataset` held in memory (Arrow), or an `IterableDataset`.

    Raises:
        UserError: If the source cannot be found or read, or a column mixes types.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "texts.json")
        >>> _ = file.write_text('["one", "two"]')
        >>> read_table(file)["text"][:]
        ['one', 'two']
    """
    opened = open_source(source, split=split, streaming=streaming)
    if opened.dataset is not None:
        return opened.dataset
    return build_table(_all_columns, (opened,), None, streaming=streaming)


def _all_columns(opened: Source) -> Iterator[tuple[Row, dict[str, Any]]]:
    for row in opened.rows():
        yield row, row.fields


def build_table(
    make_rows: Callable[..., Iterator[tuple[Row | None, dict[str, Any]]]],
    arguments: tuple[Any, ...],
    features: Any,
    *,
    streaming: bool,
) -> Dataset | IterableDataset:
    """Put checked rows into a dataset.

    Args:
        make_rows: Called for each walk through the rows; gives the row as read (for messages) and the
            columns wanted of it. A function of a module, so that a loader's workers can be given it.
        arguments: What it is called with.
        features: `datasets.Features` of the columns, or None to take them from the values.
        streaming: Keep nothing: rows are made each time the dataset is walked through.

    Returns:
        A `Dataset` in memory, built in chunks so that only the Arrow columns stay, or an
        `IterableDataset`.

    Raises:
        UserError: If values of one column have different types.
    """
    import datasets
    import pyarrow

    if streaming:
        inputs = {"make_rows": make_rows, "arguments": arguments}
        return datasets.IterableDataset.from_generator(_columns_only, features=features, gen_kwargs=inputs)
    schema = features.arrow_schema if features is not None else None
    chunks: list[Any] = []
    rows = make_rows(*arguments)
    while pending := list(islice(rows, _ROWS_PER_CHUNK)):
        chunks.append(_arrow_table(pending, schema))
        if schema is None:
            _refuse_changed_type(chunks, pending)
    table = pyarrow.concat_tables(chunks or [_arrow_table([], schema)], promote_options="permissive")
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=_fingerprint(table))


def _columns_only(
    make_rows: Callable[..., Iterator[tuple[Row | None, dict[str, Any]]]], arguments: tuple[Any, ...]
) -> Iterator[dict[str, Any]]:
    yield from (columns for _, columns in make_rows(*arguments))


def _fingerprint(table: Any) -> str:
    """Hash the content; left to itself, `datasets` pickles the whole table for this, in four times its memory."""
    import xxhash

    digest = xxhash.xxh64(str(table.schema).encode("utf-8"))
    for column in table.columns:
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                digest.update(buffer if buffer is not None else b"-")
    return digest.hexdigest()


def _refuse_changed_type(chunks: list[Any], rows: list[tuple[Row | None, dict[str, Any]]]) -> None:
    """Name the row where a column of the last chunk has another type than the same column before."""
    import pyarrow

    for name in chunks[-1].column_names:
        schemas = [pyarrow.schema([chunk.schema.field(name)]) for chunk in chunks if name in chunk.column_names]
        try:
            pyarrow.unify_schemas(schemas, promote_options="permissive")
        except pyarrow.ArrowException:
            first = next(row for row, columns in rows if columns.get(name) is not None)
            if first is not None:
                first.reject(name, f"a {schemas[0].field(0).type} as in the rows before", "give the column one type")
            raise


def _arrow_table(rows: list[tuple[Row | None, dict[str, Any]]], schema: Any) -> Any:
    import pyarrow

    if schema is not None:
        return pyarrow.Table.from_pylist([columns for _, columns in rows], schema=schema)
    names = dict.fromkeys(name for _, columns in rows for name in columns)
    arrays = {}
    for name in names:
        try:
            arrays[name] = pyarrow.array([columns.get(name) for _, columns in rows])
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):
            _reject_mixed_column(name, rows)
            raise
    return pyarrow.table(arrays)


def _reject_mixed_column(name: str, rows: list[tuple[Row | None, dict[str, Any]]]) -> None:
    """Name the first row whose value does not have the type of the first value."""
    first_type: type | None = None
    for row, columns in rows:
        value = columns.get(name)
        if row is None or value is None:
            continue
        first_type = first_type or type(value)
        if isinstance(value, str):
            row.valid_unicode(name, value)
        if type(value) is not first_type:
            row.reject(name, f"a {first_type.__name__} as in the rows before", "give the column one type")


def _open_folder(folder: Path, split: str) -> Source:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _open_saved_dataset(folder, split)
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in files if file_kind(file) and file.stem.lower() not in ("readme", "license")]
    if not files:
        raise UserError(f"expected a folder with files ending in {known_suffixes()}, got {str(folder)!r} without any")
    files = _files_of_split(folder, files, split)
    kinds = sorted({str(file_kind(file)) for file in files})
    if len(kinds) > 1:
        raise UserError(f"{folder}: expected files of one kind, got {', '.join(kinds)}: name one file instead")
    return Source(str(folder), files=tuple(files))


def _files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    named = {file: SPLIT_NAMES.get(re.split(r"[._-]", file.name.lower())[0]) for file in files}
    if not any(named.values()):
        return files
    wanted = SPLIT_NAMES.get(split, split)
    chosen = [file for file in files if named[file] == wanted]
    if not chosen:
        present = ", ".join(file.name for file in files)
        raise UserError(
            f"{folder}: expected files of the split {split!r}, got {present}: name another split or one file"
        )
    return chosen


def _open_saved_dataset(folder: Path, split: str) -> Source:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: expected a folder of `save_to_disk`, got {error}: write it again") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"{folder}: expected the split {split!r}, got {', '.join(saved)}: name one of these")
        saved = saved[split]
    return Source(str(folder), dataset=saved, dataset_origin=Origin(str(folder), "row index"))


def _open_hub(name: str, config: str | None, split: str, streaming: bool) -> Source:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    whole_name = f"{name}:{config}" if config else name
    here = f"no file or folder {whole_name!r} exists here either"
    try:
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
    return Source(whole_name, dataset=dataset, dataset_origin=Origin(f"{whole_name}, split {split}", "row index"))
