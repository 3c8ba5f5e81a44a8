"""Convert a file, a folder or a Hub dataset into the files that the training scripts read.

Every row is read and checked, and the numbers of kept and dropped rows are printed. Examples:

  python training/prepare_data.py --input raw.csv --query_column question --positive_column answer --output train.json
  python training/prepare_data.py --input corpus.txt --output documents.json
  python training/prepare_data.py --input documents.json --output_format xy --output xy_masked_documents.json
  python training/prepare_data.py --input data/beir/scifact --split train --output scifact_train.json
  python training/prepare_data.py --python_docs --output data/beir/python_docs
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..command_line import argument, parse_arguments, say
from ..commands import command
from ..data.documents import document_texts, is_beir_folder, read_documents, text_digest
from ..data.held_out import split_by_document
from ..data.masking import MaskedViews, MaskKind
from ..data.pairs import audit_pairs, drop_duplicate_rows, read_pairs, read_xy_pairs
from ..data.python_docs import DEFAULT_PACKAGES, build_python_docs, is_test_entry, write_entries
from ..data.sources import check_limit, open_source
from ..data.word_spans import has_two_words
from ..data.writing import refuse_existing, write_beir_folder, write_json_rows
from ..errors import UserError
from ..model.base_models import DEFAULT_BASE_MODEL
from ..model.embedded_isotropic_gaussian import EMBEDDED, has_embedded_model

if TYPE_CHECKING:
    from datasets import Dataset

InputFormat = Literal["auto", "pairs", "triples", "documents", "beir", "xy"]
OutputFormat = Literal["auto", "pairs", "documents", "xy", "beir"]


@dataclass
class InputArguments:
    """The data to read."""

    input: str | None = argument(None, "File (JSON, JSON Lines, CSV, TSV, Parquet, txt; .gz), folder, or Hub dataset.")
    input_format: InputFormat = argument("auto", "Format of the input; auto decides by its columns.")
    python_docs: bool = argument(False, "Instead of reading --input, use the docstrings of installed packages.")
    packages: list[str] = argument(list(DEFAULT_PACKAGES), "Installed packages for --python_docs.")
    split: str = argument("train", "Split of a Hub dataset, BEIR folder or folder of files, and of BEIR output.")
    limit: int | None = argument(None, "Read only this many rows; all rows by default.")
    query_column: str = argument("query", "Column with the query; a column 'anchor' is found without this flag.")
    positive_column: str = argument("positive", "Column with a document that answers the query.")
    negative_column: str = argument("negative", "Column with one or a list of wrong documents; may be missing.")
    text_column: str = argument("text", "Column with a document's text.")
    title_column: str = argument("title", "Column with a document's title; may be missing.")
    x_column: str = argument("x", "Column with the original text of a masked pair.")
    y_column: str = argument("y", "Column with the masked text of a masked pair.")


@dataclass
class OutputArguments:
    """The data to write, and how to mask texts for it."""

    output: str = argument(dataclasses.MISSING, "File ending in .json or .jsonl, or a folder for the format beir.")
    output_format: OutputFormat = argument("auto", "auto: the format of the input, and pairs for a BEIR folder.")
    overwrite: bool = argument(False, "Replace an existing output.")
    test_fraction: float = argument(
        0.2,
        "For the format beir: fraction of the documents whose queries become the split test; 0 writes --split only.",
    )
    dev_fraction: float = argument(0.1, "For the format beir: likewise for the split dev.")
    corpus: str | None = argument(None, "For the format beir: more documents to search, from any source.")
    seed: int = argument(42, "Seed of the splits and of the masking.")
    mask_kind: MaskKind = argument("word", "Mask single words, or runs of about three.")
    mask_probability: float = argument(0.2, "Share of words masked, above 0 and below 1.")
    mask_token: str = argument("[MASK]", "The encoder's own, such as '<mask>' for MPNet; '' removes masked words.")
    mask_variants: int = argument(1, "Masked versions per text.", "--num_variants")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, check, convert and write, and report the counts."""
    read, write = parse_arguments((InputArguments, OutputArguments), description=__doc__ or "", arguments=arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    refuse_existing(write.output, overwrite=write.overwrite)
    if read.python_docs:
        _write_python_docs(read, write)
        return
    if read.input is None:
        raise UserError("expected --input (or --python_docs), got neither: name a file, a folder or a Hub dataset")
    kind, query_column = _kind_and_query_column(read)
    wanted = write.output_format if write.output_format != "auto" else {"beir": "pairs"}.get(kind, kind)
    convert = _CONVERSIONS.get((kind, wanted))
    if convert is None:
        possible = ", ".join(goal for start, goal in _CONVERSIONS if start == kind)
        raise UserError(f"expected an output format of {possible} for {kind}, got {wanted}: set --output_format")
    convert(dataclasses.replace(read, query_column=query_column), write)
    _say_next(wanted, read, write.output)


def _kind_and_query_column(read: InputArguments) -> tuple[str, str]:
    """Return pairs, documents, beir or xy, and the column with the query, which may be `anchor`."""
    kind = read.input_format
    is_beir = is_beir_folder(read.input or "")
    if kind == "beir" and not is_beir:
        raise UserError(
            f"expected a BEIR folder (corpus.jsonl, queries.jsonl, qrels/), got {read.input!r}: check --input"
        )
    if is_beir and kind in ("auto", "beir", "documents"):
        return "documents" if kind == "documents" else "beir", read.query_column
    first = next(open_source(read.input or "", split=read.split, limit=read.limit).rows(), None)
    if first is None:
        raise UserError(f"{read.input}: expected at least one row, got none: check --input and --split")
    columns = set(first.fields)
    has_anchor = read.query_column == "query" and "query" not in columns and "anchor" in columns
    query_column = "anchor" if has_anchor else read.query_column
    if kind == "triples" and read.negative_column not in columns:
        raise UserError(
            f"{read.input}: expected triples with the column {read.negative_column!r}, got the columns "
            f"{', '.join(sorted(columns))}: set --negative_column"
        )
    if kind == "auto":
        return _kind_of_columns(read, query_column, columns), query_column
    return {"triples": "pairs"}.get(kind, kind), query_column


def _kind_of_columns(read: InputArguments, query_column: str, columns: set[str]) -> str:
    if {query_column, read.positive_column} <= columns:
        return "pairs"
    if {read.x_column, read.y_column} <= columns:
        return "xy"
    if read.text_column in columns:
        return "documents"
    raise UserError(
        f"{read.input}: expected columns {query_column!r} and {read.positive_column!r} (pairs), "
        f"{read.x_column!r} and {read.y_column!r} (xy) or {read.text_column!r} (documents), "
        f"got {', '.join(sorted(columns))}: name yours with --query_column, --text_column, ..."
    )


def _read_pairs(read: InputArguments) -> Dataset:
    names = ("split", "query_column", "positive_column", "negative_column", "limit")
    pairs: Any = read_pairs(read.input or "", **{name: getattr(read, name) for name in names})
    say(f"read {audit_pairs(pairs)}")
    pairs, dropped = drop_duplicate_rows(pairs)
    say(f"kept {len(pairs)}, dropped {dropped} (query and positive came before)")
    return pairs


def _read_documents(read: InputArguments) -> list[dict[str, str]]:
    names = ("split", "text_column", "title_column", "limit")
    documents: Any = read_documents(read.input or "", **{name: getattr(read, name) for name in names})
    say(f"read {len(documents)} distinct documents")
    return list(documents)


def _read_xy(read: InputArguments) -> Dataset:
    names = ("split", "x_column", "y_column", "limit")
    pairs: Any = read_xy_pairs(read.input or "", **{name: getattr(read, name) for name in names})
    say(f"read {audit_pairs(pairs)} (query: masked, positive: original)")
    return pairs


def _texts_of_pairs(pairs: Dataset) -> list[str]:
    texts = (text for row in pairs for text in (row["positive"], *row["negative"]))
    return list(dict.fromkeys(texts))


def _pairs_to_pairs(read: InputArguments, write: OutputArguments) -> None:
    pairs = _read_pairs(read)
    rows = (row if row["negative"] else {"query": row["query"], "positive": row["positive"]} for row in pairs)
    _write_rows(rows, write, "pairs")


def _to_documents(read_rows: Callable[..., Dataset], read: InputArguments, write: OutputArguments) -> None:
    _write_rows(({"text": text} for text in _texts_of_pairs(read_rows(read))), write, "distinct documents")


def _pairs_to_xy(read: InputArguments, write: OutputArguments) -> None:
    _write_masked(_texts_of_pairs(_read_pairs(read)), write)


def _pairs_to_beir(read: InputArguments, write: OutputArguments) -> None:
    pairs = _read_pairs(read)
    more = [] if write.corpus is None else document_texts(read_documents(write.corpus, unique_ids=False))
    texts = dict.fromkeys([*_texts_of_pairs(pairs), *more])
    documents = {text: f"d{number}" for number, text in enumerate(texts)}
    queries = {text: f"q{number}" for number, text in enumerate(dict.fromkeys(pairs["query"][:]))}
    judgements: dict[str, dict[str, dict[str, int]]] = {}
    for split, rows in _splits(pairs, read, write).items():
        for row in rows:
            judgements.setdefault(split, {}).setdefault(queries[row["query"]], {})[documents[row["positive"]]] = 1
    write_beir_folder(
        write.output,
        {key: ("", text) for text, key in documents.items()},
        {key: text for text, key in queries.items()},
        judgements,
    )
    counts = ", ".join(f"{split} {len(of_split)}" for split, of_split in judgements.items())
    say(f"wrote {len(documents)} documents and {len(queries)} queries ({counts}) to {write.output}")


def _splits(pairs: Dataset, read: InputArguments, write: OutputArguments) -> dict[str, Dataset]:
    """Split pairs by document, so that no document and no query is in two splits."""
    if not 0 <= write.test_fraction + write.dev_fraction < 1 or min(write.test_fraction, write.dev_fraction) < 0:
        raise UserError(
            "expected --test_fraction and --dev_fraction of at least 0 that add up to less than 1, got "
            f"{write.test_fraction} and {write.dev_fraction}: lower one"
        )
    splits = {}
    rest, share = pairs, 1.0
    for name, fraction in (("test", write.test_fraction), ("dev", write.dev_fraction)):
        if not (write.test_fraction and fraction):
            continue
        try:
            salt = "" if name == "test" else name
            rest, splits[name] = split_by_document(rest, fraction / share, seed=write.seed, salt=salt)
            share -= fraction
        except UserError as error:  # two documents are few, but no reason to write nothing
            say(f"no split {name}: {error}")
    return {read.split: rest, **splits}


def _documents_to_documents(read: InputArguments, write: OutputArguments) -> None:
    rows = ({key: row[key] for key in ("id", "title", "text") if row[key]} for row in _read_documents(read))
    _write_rows(rows, write, "documents")


def _documents_to_xy(read: InputArguments, write: OutputArguments) -> None:
    _write_masked(document_texts(_read_documents(read)), write)


def _xy_to_xy(read: InputArguments, write: OutputArguments) -> None:
    rows, dropped = drop_duplicate_rows(_read_xy(read))
    say(f"kept {len(rows)}, dropped {dropped} (the same x and y came before)")
    _write_rows(({"x": row["positive"], "y": row["query"]} for row in rows), write, "masked pairs")


def _write_masked(texts: list[str], write: OutputArguments) -> None:
    """Write each text (x) with one or more masked versions (y)."""
    if write.mask_variants < 1:
        raise UserError(f"expected --mask_variants of at least 1, got {write.mask_variants}: set it to e.g. 3")
    usable = [text for text in texts if has_two_words(text)]
    say(f"kept {len(usable)}, dropped {len(texts) - len(usable)} (fewer than two words cannot be masked)")
    views = MaskedViews(usable, write.mask_kind, write.mask_probability, write.seed, write.mask_token)
    rows: dict[bytes, dict[str, str]] = {}
    for variant in range(write.mask_variants):
        views.set_epoch(variant)
        for view in (views[index] for index in range(len(views))):
            row = {"x": str(view["positive"]), "y": str(view["query"])}
            rows.setdefault(text_digest(row["x"], row["y"]), row)
    repeated = write.mask_variants * len(views) - len(rows)
    if repeated:
        say(f"dropped {repeated} versions that are masked alike")
    _write_rows(rows.values(), write, "masked pairs")


def _write_rows(rows: Any, write: OutputArguments, what: str) -> None:
    say(f"wrote {write_json_rows(rows, write.output)} {what} to {write.output}")


def _write_python_docs(read: InputArguments, write: OutputArguments) -> None:
    if write.output_format not in ("auto", "beir") or read.input is not None:
        raise UserError("expected --python_docs without --input and with the format beir, got others: leave them out")
    check_limit(read.limit)
    entries = build_python_docs(read.packages)[: read.limit]
    write_entries(entries, write.output)
    test = sum(map(is_test_entry, entries))
    say(f"wrote {len(entries)} entries to {write.output}: {len(entries) - test} train, {test} test")
    _say_next("beir", read, write.output)


def _say_next(written: str, read: InputArguments, output: str) -> None:
    path = Path(output)
    if written == "beir" and not read.python_docs and read.split != "train":  # judgements to evaluate with
        place = ("--datasets", path.name, "--data_dir", path.parent, "--split", read.split)
        say(f"Next: {command('eval_beir', '--base_model', _base_model_at_hand(), *place)}")
        return
    words = {
        "documents": ("train_self_supervised", "--recipe", "unlabelled", "--documents"),
        "xy": ("train_xy_masked", "--use_predictor", "--input_xy_pairs"),
    }.get(written, ("train_contrastive", "--recipe", "adapt", "--train_data"))  # pairs, beir
    base_model = _base_model_at_hand()
    encoder = [] if base_model == DEFAULT_BASE_MODEL else ["--base_model", base_model]
    say(f"Next: {command(*words, output, *encoder)}")


def _base_model_at_hand() -> str:
    """Return the default encoder, or the embedded one where only that needs no download."""
    from huggingface_hub import try_to_load_from_cache

    is_cached = isinstance(try_to_load_from_cache(DEFAULT_BASE_MODEL, "config.json"), str)
    return DEFAULT_BASE_MODEL if is_cached or not has_embedded_model() else EMBEDDED


_CONVERSIONS: dict[tuple[str, str], Callable[[InputArguments, OutputArguments], None]] = {
    ("pairs", "pairs"): _pairs_to_pairs,
    ("pairs", "documents"): partial(_to_documents, _read_pairs),
    ("pairs", "xy"): _pairs_to_xy,
    ("pairs", "beir"): _pairs_to_beir,
    ("beir", "pairs"): _pairs_to_pairs,
    ("beir", "documents"): _documents_to_documents,
    ("beir", "xy"): _documents_to_xy,
    ("documents", "documents"): _documents_to_documents,
    ("documents", "xy"): _documents_to_xy,
    ("xy", "xy"): _xy_to_xy,
    ("xy", "documents"): partial(_to_documents, _read_xy),
}
