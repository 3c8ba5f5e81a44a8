"""Documents: from any form to id, title and text, each text once."""

import json

import pytest

from ragcun_hf.data.documents import document_text, read_documents, text_digest
from ragcun_hf.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_text_file_holds_one_document_per_line(tmp_path):
    (tmp_path / "a.txt").write_text("first line\n\nsecond line\r\n")
    assert list(read_documents(tmp_path / "a.txt")) == [
        {"id": "0", "title": "", "text": "first line"},
        {"id": "1", "title": "", "text": "second line"},
    ]


def test_strings_and_rows_give_the_same_documents(tmp_path):
    (tmp_path / "a.json").write_text('["one", "two"]')
    write(tmp_path / "b.jsonl", [{"text": "one"}, {"text": "two", "title": None}])
    assert list(read_documents(tmp_path / "a.json")) == list(read_documents(tmp_path / "b.jsonl"))


def test_ids_titles_and_column_names_are_taken_from_the_rows(tmp_path):
    rows = [{"id": 7, "head": "T", "body": "one"}, {"id": "x", "body": "two"}]
    documents = read_documents(write(tmp_path / "a.jsonl", rows), text_column="body", title_column="head")
    assert list(documents) == [{"id": "7", "title": "T", "text": "one"}, {"id": "x", "title": "", "text": "two"}]


def test_repeated_texts_are_dropped_and_counted(tmp_path, caplog):
    rows = [{"title": "A", "text": "b"}, {"text": "A b"}, {"text": "c"}, {"text": "c"}]
    assert read_documents(write(tmp_path / "a.jsonl", rows))["text"][:] == ["b", "c"]
    assert "dropped 2 repeated and 0 empty" in caplog.text


def test_a_stream_drops_the_same_repetitions_in_every_pass(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "a"}, {"text": "b"}])
    stream = read_documents(path, streaming=True)
    assert list(stream) == list(stream) == list(read_documents(path))


def test_a_beir_folder_is_read_as_its_corpus_without_empty_documents(tmp_path, caplog):
    (tmp_path / "qrels").mkdir()
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "not a document"}])
    rows = [{"_id": "d1", "title": "T", "text": "t"}, {"_id": "d2", "title": "", "text": ""}]
    write(tmp_path / "corpus.jsonl", rows)
    assert list(read_documents(tmp_path)) == [{"id": "d1", "title": "T", "text": "t"}]
    assert "0 repeated and 1 empty" in caplog.text


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": " "}, "line 5000, field 'text'"),
        ({"title": "only"}, "line 5000, field 'text'"),
        ({"text": "a", "title": 3}, "line 5000, field 'title'"),
        ({"text": "a", "id": "x0"}, "line 5000, field 'id': expected an id that no earlier document has, got 'x0'"),
        ({"text": "a", "id": 1.5}, "line 5000, field 'id'"),
    ],
)
def test_the_error_names_a_bad_document_on_line_5000(tmp_path, bad, message):
    rows = [{"id": f"x{n}", "text": f"text {n}"} for n in range(4999)]
    with pytest.raises(UserError, match=message):
        read_documents(write(tmp_path / "a.jsonl", [*rows, bad]))


def test_a_limit_counts_rows_read_not_documents_kept(tmp_path):
    (tmp_path / "a.txt").write_text("a\na\nb\n")
    assert read_documents(tmp_path / "a.txt", limit=2)["text"][:] == ["a"]


def test_title_and_text_are_joined_by_one_space_and_stripped():
    assert document_text("Title", "text ") == "Title text"
    assert document_text("", " text") == "text"
    assert document_text("Title", "") == "Title"


def test_a_digest_depends_on_where_one_text_ends_and_the_next_begins():
    assert len({text_digest("ab", "c"), text_digest("a", "bc"), text_digest("abc"), text_digest("abc", "")}) == 4


def test_columns_that_look_like_data_and_are_not_read_are_named_once(tmp_path, caplog):
    row = {"id": 1, "text": "a b", "body": "more words", "url": "http://x", "parts": ["of a document"], "tags": ["x"]}
    path = write(tmp_path / "a.jsonl", [row, {**row, "id": 2, "text": "c", "late": "of a later row"}])
    for _ in range(2):
        assert read_documents(path)["text"][:] == ["a b", "c"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{path}: not read: 'body', 'parts'. If they are meant, name them with --text_column")


def test_passages_that_share_an_id_are_read_where_only_their_texts_are_used(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [{"id": "d", "text": "first"}, {"id": "d", "text": "second"}])
    for _ in range(2):
        assert read_documents(path, unique_ids=False)["text"][:] == ["first", "second"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 1 documents have the id of an earlier one; only texts are used here"
    ]
    with pytest.raises(UserError, match="line 2, field 'id': expected an id that no earlier document has"):
        read_documents(path)


def test_two_documents_of_a_beir_folder_never_share_an_id(tmp_path):
    (tmp_path / "qrels").mkdir()
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "a"}])
    write(tmp_path / "corpus.jsonl", [{"_id": "d", "text": "first"}, {"_id": "d", "text": "second"}])
    with pytest.raises(UserError, match="line 2, field '_id': expected an id that no earlier document has"):
        read_documents(tmp_path, unique_ids=False)
