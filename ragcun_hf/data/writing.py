"""Write data files: whole or not at all, and never over an existing file by accident."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import replaced_file, replaced_folder


def refuse_existing(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Return the path, with `~` expanded; an existing file or folder is a UserError unless it may be replaced."""
    target = Path(path).expanduser()
    if target.exists() and not overwrite:
        raise UserError(f"expected a new output, got the existing {str(target)!r}: name another, or add --overwrite")
    return target


def write_json_rows(rows: Iterable[Mapping[str, Any] | str], path: str | os.PathLike[str]) -> int:
    """Write rows to a .jsonl file (one row per line) or a .json file (one array), and return how many there were."""
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
    """Write a BEIR folder, replacing an earlier one, and return its path; a folder of anything else is a UserError.

    Documents are id -> (title, text), queries id -> text, qrels split -> query id -> document id -> score.
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
                with (new / "qrels" / f"{split}.tsv").open("w", encoding="utf-8", newline="\n") as file:
                    file.write("query-id\tcorpus-id\tscore\n")
                    for query_id, scores in judgements.items():
                        file.writelines(f"{query_id}\t{document}\t{score}\n" for document, score in scores.items())
    except OSError as error:
        raise UserError(f"expected a writable folder, got {str(target)!r} ({error.strerror}): name another") from error
    return target
