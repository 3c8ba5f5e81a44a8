"""Files, folders and Hub datasets: the rows read are the rows written, and every error names its place."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ragcun_hf import data
from ragcun_hf.data.documents import read_documents
from ragcun_hf.data.file_rows import file_kind, read_rows
from ragcun_hf.data.pairs import read_pairs
from ragcun_hf.data.sources import open_source
from ragcun_hf.errors import UserError

ROWS = [{"query": "who?", "positive": "she"}, {"query": "Ünïcode 🦊 שלום e\u0301", "positive": "a\u2028b\x00c"}]


def read(source, **options):
    """Read the fields of all rows of a source."""
    return [row.fields for row in open_source(source, **options).rows()]


def as_json_lines(rows, ending="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + ending for row in rows)


def write_csv(path, separator=","):
    path.write_text(
        separator.join(["query", "positive"]) + "\n" + separator.join(['"a ""b"""', '"two\nlines"']) + "\n"
    )


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_rows_that_were_written(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name.endswith("gz"):
        path.write_bytes(gzip.compress(as_json_lines(ROWS).encode()))
    else:
        path.write_text(json.dumps(ROWS) if name == "a.json" else as_json_lines(ROWS), encoding="utf-8")
    assert read(path) == ROWS
    source = open_source(path)
    assert list(source.rows()) == list(source.rows())


def test_content_decides_whether_a_json_file_is_lines_or_an_array(tmp_path):
    (tmp_path / "lines.json").write_text(as_json_lines(ROWS), encoding="utf-8")
    (tmp_path / "array.jsonl").write_text("\n  " + json.dumps(ROWS, indent=1), encoding="utf-8")
    assert read(tmp_path / "lines.json") == read(tmp_path / "array.jsonl") == ROWS


def test_strings_become_a_text_column(tmp_path):
    (tmp_path / "a.json").write_text('["one", "two"]')
    (tmp_path / "b.txt").write_text("one\n\n  two \n")
    for name in ("a.json", "b.txt"):
        assert read(tmp_path / name) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_quoted_separators_quotes_and_line_breaks_survive_csv(tmp_path, name, separator):
    write_csv(tmp_path / name, separator)
    assert read(tmp_path / name) == [{"query": 'a "b"', "positive": "two\nlines"}]


def test_a_quote_that_opens_a_field_of_a_tsv_file_swallows_no_lines(tmp_path):
    texts = ['"to be', "or not", 'he said "yes', '"no"', '"a" and "b"', "c", 'end"', '""', '"', 'a ""b""', '"last']
    lines = [f"{number}\t{text}" for number, text in enumerate(texts)] + [f"{text}\tx" for text in texts]
    (tmp_path / "a.tsv").write_text("query\tpositive\n\n" + "\r\n".join(lines))
    unquoted = {'"no"': "no", '""': ""}
    read_texts = [unquoted.get(text, text) for text in texts]
    rows = [{"query": str(number), "positive": text} for number, text in enumerate(read_texts)]
    assert read(tmp_path / "a.tsv") == [*rows, *({"query": text, "positive": "x"} for text in read_texts)]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_quoted_tsv_is_read_as_the_csv_module_wrote_it(tmp_path, ending):
    rows = [
        ["a", "b", "c"],
        ["two\nlines", 'a "b"', "x\ty"],
        ["", "", ""],
        ["1", "2", "two\n\nlines"],
        ["4", "5\n6", "7"],
    ]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator=ending).writerows(rows)
    assert [list(row.values()) for row in read(tmp_path / "a.tsv")] == rows[1:]
    assert [row.number for row in read_rows(tmp_path / "a.tsv")] == [2, 4, 5, 8]


def test_a_tsv_file_of_one_column_may_have_texts_of_several_lines(tmp_path):
    (tmp_path / "a.tsv").write_text('text\n"two\nlines"\nplain\n')
    assert read(tmp_path / "a.tsv") == [{"text": "two\nlines"}, {"text": "plain"}]


@pytest.mark.parametrize("ending", ["", "\n"])
def test_lines_that_are_lists_are_pairs_and_one_list_is_an_array(tmp_path, ending):
    (tmp_path / "a.jsonl").write_text('["q", "p"]\n\n["q2", "p2", "n", "m"]' + ending)
    pairs = [
        {"query": "q", "positive": "p", "negative": []},
        {"query": "q2", "positive": "p2", "negative": ["n", "m"]},
    ]
    assert read(tmp_path / "a.jsonl") == pairs
    (tmp_path / "b.json").write_text('[["q", "p"],\n["q2", "p2", "n", "m"]]')
    assert read(tmp_path / "b.json") == pairs
    (tmp_path / "c.json").write_text('["one", "two"]' + ending)
    assert read(tmp_path / "c.json") == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(UserError, match="field 'text': expected a text, got no such field"):
        read_documents(tmp_path / "a.jsonl")


def _table_with_vectors(num_rows):
    return pyarrow.table(
        {
            "query": [f"query {n}" for n in range(num_rows)],
            "vector": [[0.5] * 4] * num_rows,
            "positive": [f"document {n}" for n in range(num_rows)],
            "negative_1": [None, "other", *[None] * (num_rows - 2)],
            "passage": [f"a text {n}" for n in range(num_rows)],
            # No Python date can hold these: decoding them is an error.
            "seen": pyarrow.array([2**60] * num_rows, pyarrow.timestamp("us")),
        }
    )


@pytest.mark.parametrize("kind", ["parquet", "saved", "hub"])
def test_columns_that_nobody_asked_for_are_not_decoded(tmp_path, monkeypatch, caplog, kind):
    table, source = _table_with_vectors(3000), str(tmp_path / "a")
    if kind == "parquet":
        source += ".parquet"
        pyarrow.parquet.write_table(table, source)
        with pytest.raises((OverflowError, ValueError)):
            read(source)
    else:
        dataset = datasets.Dataset(datasets.table.InMemoryTable(table))
        dataset.save_to_disk(source) if kind == "saved" else None
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset)
        source = source if kind == "saved" else "org/name"
    pairs = read_pairs(source)
    assert (len(pairs), pairs[1]) == (3000, {"query": "query 1", "positive": "document 1", "negative": ["other"]})
    assert "not read: 'passage'. If" in caplog.text
    with pytest.raises(
        UserError, match=r"field 'answer': .* \(it has 'query', 'vector', 'positive', 'negative_1', 'pass"
    ):
        read_pairs(source, positive_column="answer")
    with pytest.raises(UserError, match="got only the columns 'query', 'vector', 'positive', 'negative_1', 'passage'"):
        read_pairs(source, negative_column="wrong")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_byte_order_mark_and_crlf_are_removed(tmp_path, name):
    text = as_json_lines(ROWS[:1], "\r\n") if name == "a.jsonl" else "query,positive\r\nwho?,she\r\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / name) == ROWS[:1]


def test_a_csv_field_may_be_longer_than_the_default_limit(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read(tmp_path / "a.csv")[0]["text"]) == 200_000


BAD_FILES = {
    "empty.jsonl": (b"", "at least one row"),
    "blank.json": (b" \n \n", "at least one row"),
    "none.json": (b"[]", "at least one row"),
    "header_only.csv": (b"query,positive\n", "at least one row"),
    "broken.jsonl": (b'{"a": 1}\n\n{"a": 2\n', "line 3: expected one JSON object per line"),
    "broken.json": (b'[{"a": 1},\n{"a": }]', "line 2: expected a JSON array"),
    "number.jsonl": (b'{"a": 1}\n7\n', "line 2: expected an object or a string, got 7"),
    "list.json": (b'[{"a": 1}, [1]]', "row 2: expected an object or a string"),
    "latin.jsonl": (b'{"a": "x"}\n{"a": "\xe9"}\n', "line 2: expected UTF-8 text, got byte 0xe9"),
    "utf16.csv": ("a,b\n1,2\n".encode("utf-16"), "line 1: expected UTF-8 text"),
    "ragged.csv": (b"a,b\n1,2\n1,2,3\n", "line 3: expected 2 columns (a, b), got 3"),
    "short.csv": (b'a,b\n"1\n",2\n1\n', "line 4: expected 2 columns (a, b), got 1"),
    "unnamed.csv": (b"a,,b\n1,2,3\n", "line 1: expected a header of distinct column names"),
    "twice.tsv": (b"a\ta\n1\t2\n", "line 1: expected a header of distinct column names"),
    "open.tsv": (b'a\tb\n1\t2\n"3\n4\t5\n', "line 3: expected a quote that closes"),
    "short.tsv": (b'a\tb\n1\t"2\n3\n4\t5\n', "line 3: expected 2 columns (a, b), got 1"),
    "open.csv": (b'a,b\n1,2\n3,"4\n5,6\n', "line 3: not a valid CSV row"),
    "not.parquet": (b"PAR2 or so", "expected a Parquet file"),
    "not.jsonl.gz": (b"plain text", "expected a readable file"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 1000)[:40], "expected a readable file"),
    "digits.jsonl": (b'{"a": 1}\n{"a": ' + b"7" * 5000 + b"}\n", "line 2: expected one JSON object per line"),
    "digits.json": (
        b'[{"a": "' + b"7" * 5000 + b'\\""},\n{"a": 0.' + b"7" * 5000 + b'},\n{"a": -' + b"7" * 5000 + b"}]",
        "line 3: expected a JSON array, got a number that cannot be read",
    ),
    "latin.json": (b'["x",\n"\xe9"]', "line 2: expected UTF-8 text, got byte 0xe9"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_the_error_of_a_bad_file_names_the_place_in_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        read(tmp_path / name)
    assert message in str(raised.value)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_files_of_a_folder_are_read_in_alphabetical_order(tmp_path):
    for name, text in (("b.jsonl", '{"n": 2}'), ("a.jsonl", '{"n": 1}'), (".c.jsonl", "hidden"), ("notes.md", "")):
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == [{"n": 1}, {"n": 2}]


def test_a_folder_with_files_named_after_splits_keeps_test_rows_out_of_training(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"n": 1}')
    (tmp_path / "validation-00001.jsonl").write_text('{"n": 2}')
    assert read(tmp_path) == [{"n": 1}]
    assert read(tmp_path, split="dev") == [{"n": 2}]
    with pytest.raises(UserError, match=r"split 'test'.*train\.jsonl, validation-00001\.jsonl"):
        read(tmp_path, split="test")


def test_a_folder_of_mixed_or_unknown_files_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match="without any"):
        read(tmp_path)
    (tmp_path / "a.csv").write_text("n\n1\n")
    (tmp_path / "b.jsonl").write_text('{"n": 1}')
    with pytest.raises(UserError, match="files of one kind, got csv, json"):
        read(tmp_path)


def test_a_dataset_saved_to_disk_is_read_by_split(tmp_path):
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == ROWS
    with pytest.raises(UserError, match="split 'test', got train"):
        read(tmp_path / "saved", split="test")


@pytest.mark.parametrize("name", ["nothing/here.jsonl", "./org/name", "a/b/c", "bareword", "/no/such/folder", ""])
def test_a_name_that_looks_like_a_path_never_reaches_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(UserError, match="expected an existing file or folder"):
        open_source(name)


def test_an_unknown_file_type_lists_the_known_ones(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"expected a file ending in \.json, .*model\.bin"):
        read(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "expected to reach the Hub"),
        (datasets.exceptions.DatasetNotFoundError("gone"), "which the Hub does not have"),
        (ValueError('Unknown split "dev"'), "expected the split 'train' of the Hub dataset"),
    ],
)
def test_hub_failures_say_that_no_such_file_exists_either(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=message) as raised:
        read("org/name")
    assert "org/name" in str(raised.value)


def test_a_hub_id_may_name_a_configuration_and_rows_count_from_zero(monkeypatch):
    asked = {}

    def load(name, config, *, split, streaming):
        asked.update(name=name, config=config, split=split, streaming=streaming)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    first = next(open_source("org/name:hard", split="dev", streaming=True).rows())
    assert asked == {"name": "org/name", "config": "hard", "split": "dev", "streaming": True}
    assert first.origin.place(first.number) == "org/name:hard, split dev, row index 0"


def test_a_limit_streams_a_hub_dataset_instead_of_downloading_it(monkeypatch):
    def load(*_, split, streaming):
        assert streaming
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_pairs("org/name", limit=1)["query"][:] == ["who?"]


def test_fingerprints_are_equal_for_equal_files_only(tmp_path):
    for name, rows in (("a.jsonl", ROWS), ("b.jsonl", ROWS), ("c.jsonl", ROWS[::-1])):
        (tmp_path / name).write_text(as_json_lines(rows), encoding="utf-8")
    first, same, other = (read_pairs(tmp_path / name)._fingerprint for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert first == same != other


@pytest.mark.parametrize("limit", [1, 3])
def test_a_limit_ends_the_rows_of_all_files_together(tmp_path, limit):
    for name, numbers in (("a.jsonl", (1, 2)), ("b.jsonl", (3, 4))):
        (tmp_path / name).write_text("".join(f'{{"n": {number}}}\n' for number in numbers))
    assert [row["n"] for row in read(tmp_path, limit=limit)] == [1, 2, 3][:limit]


def test_a_limit_below_one_row_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(UserError, match="expected a limit of at least 1 row, got 0"):
        open_source(tmp_path / "a.txt", limit=0)


def test_line_numbers_start_at_one_and_include_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert [row.number for row in read_rows(tmp_path / "a.jsonl")] == [2, 4]


def test_compressed_parquet_has_no_reader(tmp_path):
    assert file_kind(tmp_path / "a.parquet.gz") is None
    assert file_kind(tmp_path / "A.JSONL") == "json"


def test_importing_the_data_room_imports_no_heavy_library():
    names = [path.stem for path in Path(data.__file__).parent.glob("[!_]*.py") if path.stem != "stream"]
    assert "beir_folder" in names
    code = f"import sys; [__import__('ragcun_hf.data.' + name) for name in {names}]; "
    code += "sys.exit(bool({'torch', 'transformers', 'datasets', 'pyarrow', 'beir'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
