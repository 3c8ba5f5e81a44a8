"""Writing data files: never half a file, never over an existing one by accident."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import replaced_file, replaced_folder


def refuse_existing(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Return the path unless something is there that must not be replaced.

    Args:
        path: File or folder to be written.
        overwrite: Allow replacing it. A folder is only ever replaced by a BEIR folder if it is one.

    Returns:
        The path, with `~` resolved.

    Raises:
        UserError: If it exists and may not be replaced.
    """
    target = Path(path).expanduser()
    if target.exists() and not overwrite:
        raise UserError(f"expected a new output, got the existing {str(target)!r}: name another, or add --overwrite")
    return target


def write_json_rows(rows: Iterable[Mapping[str, Any] | str], path: str | os.PathLike[str]) -> int:
    """Write rows as JSON.

    Args:
        rows: Objects or strings.
        path: Ends in .jsonl (one row per line) or .json (one array, one row per line of text).

    Returns:
        How many rows were written.

    Raises:
        UserError: If the file name ends otherwise, or the file cannot be written.
    """
    target = Path(path).expanduser()
    if target.suffix not in (".json", ".jsonl"):
        raise UserError(f"expected an output file ending in .json or .jsonl, got {str(target)!r}: rename it")
    as_array = target.suffix == ".json"
    count = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(target) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(("[\n" if not count else ",\n") if as_array else "")
                file.write(json.dumps(row, ensure_ascii=False) + ("" if as_array else "\n"))
                count += 1
            if as_array:
                file.write("\n]\n" if count else "[]\n")
    except OSError as error:
        raise UserError(f"expected a writable output, got {str(target)!r} ({error.strerror}): name another") from error
    return count


def write_beir_folder(
    folder: str | os.PathLike[str],
    documents: Mapping[str, tuple[str, str]],
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> Path:
    """Write a BEIR folder; an existing folder is replaced if it is a BEIR folder.

    Args:
        folder: Where to.
        documents: Document id -> (title, text).
        queries: Query id -> text.
        qrels: Split -> query id -> document id -> score.

    Returns:
        The folder.

    Raises:
        UserError: If something else is there, or it cannot be written.
    """
    target = Path(folder).expanduser()
    if target.exists() and not (target / "corpus.jsonl").is_file() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"expected a new, empty or BEIR folder, got {str(target)!r}: name another")
    try:
        with replaced_folder(target, obsolete=("*",), last="corpus.jsonl") as new:
            (new / "qrels").mkdir()
            corpus_rows = ({"_id": key, "title": title, "text": text} for key, (title, text) in documents.items())
            write_json_rows(corpus_rows, new / "corpus.jsonl")
            write_json_rows(({"_id": key, "text": text} for key, text in queries.items()), new / "queries.jsonl")
            for split, judgements in qrels.items():
                _write_qrels(new / "qrels" / f"{split}.tsv", judgements)
    except OSError as error:
        raise UserError(f"expected a writable folder, got {str(target)!r} ({error.strerror}): name another") from error
    return target


def _write_qrels(path: Path, judgements: Mapping[str, Mapping[str, int]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for query_id, scores in judgements.items():
            for document_id, score in scores.items():
                file.write(f"{query_id}\t{document_id}\t{score}\n")
