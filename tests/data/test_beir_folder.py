"""BEIR folders: the content is that of BEIR's own loader, and errors name file and line."""

import json
import zipfile

import datasets
import pytest
import requests
from beir import util
from beir.datasets.data_loader import GenericDataLoader

from ragcun_hf.data import beir_folder
from ragcun_hf.data.beir_folder import find_beir_dataset, load_beir_folder
from ragcun_hf.data.documents import document_text, read_documents
from ragcun_hf.data.mapped_column import MappedColumn, take
from ragcun_hf.errors import UserError

CORPUS = [
    {"_id": "d1", "title": "Title", "text": "Text\u2028of the first."},
    {"_id": "d2", "title": "", "text": " only text "},
    {"_id": "d3", "title": "only title", "text": ""},
    {"_id": "q1", "title": "", "text": ""},
]
QUERIES = [{"_id": f"q{n}", "text": f"query {n}", "metadata": {"n": n}} for n in (1, 2, 3)]
QRELS = "query-id\tcorpus-id\tscore\nq2\td1\t2\nq1\td2\t1\nq2\td3\t0\nq2\tabsent\t1\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus.jsonl", CORPUS), ("queries.jsonl", QUERIES)):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    (folder / "qrels" / "test.tsv").write_text(QRELS)
    return folder


@pytest.fixture(params=["small", "large"])
def corpus_size(request, tmp_path, monkeypatch):
    """Read a corpus into memory, or leave it on the disk."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if request.param == "large":
        monkeypatch.setattr(beir_folder, "LARGEST_IN_MEMORY", 0)
    return request.param


def test_content_and_order_equal_those_of_the_loader_of_beir(folder, corpus_size):
    ours = load_beir_folder(folder)
    corpus, queries, qrels = GenericDataLoader(str(folder)).load("test")
    assert list(ours.queries.items()) == list(queries.items())
    assert ours.qrels == qrels
    assert list(ours.corpus_ids) == list(corpus)
    texts = [document_text(document["title"], document["text"]) for document in corpus.values()]
    assert list(ours.corpus_texts) == texts
    assert (len(ours.corpus_texts), ours.corpus_texts[1:3], ours.corpus_texts[-1]) == (4, texts[1:3], texts[-1])
    assert isinstance(ours.corpus_texts, list) == (corpus_size == "small")
    assert (ours.name, ours.split) == ("tiny", "test")


def test_quoted_ids_are_read_as_beir_reads_them(folder):
    (folder / "qrels" / "test.tsv").write_text('query-id\tcorpus-id\tscore\n"q1"\t"d1"\t1\n')
    assert load_beir_folder(folder).qrels == GenericDataLoader(str(folder)).load("test")[2] == {"q1": {"d1": 1}}


def test_the_header_of_qrels_may_be_missing(folder):
    (folder / "qrels" / "test.tsv").write_text("q1\td1\t1\r\nq2\td2\t0\r\n")
    assert load_beir_folder(folder).qrels == {"q1": {"d1": 1}, "q2": {"d2": 0}}


def test_a_missing_split_lists_the_splits_that_exist(folder):
    (folder / "qrels" / "dev.tsv").write_text(QRELS)
    with pytest.raises(UserError, match="split 'train', got the splits dev, test"):
        load_beir_folder(folder, "train")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("corpus.jsonl", '{"_id": "d9", "title": ', r"corpus\.jsonl, line 5: expected one JSON object"),
        ("corpus.jsonl", '{"_id": "d1", "text": "x"}', r"corpus\.jsonl, line 5, field '_id': expected an id that no"),
        ("corpus.jsonl", '{"text": "x"}', r"corpus\.jsonl, line 5, field '_id': expected an id, got no such field"),
        ("corpus.jsonl", '{"_id": "d9", "text": 5}', r"corpus\.jsonl, line 5, field 'text'"),
        ("queries.jsonl", '{"_id": "q9", "text": ""}', r"queries\.jsonl, line 4, field 'text'"),
        ("queries.jsonl", '["q9", "text"]', r"queries\.jsonl, line 4, field '_id': expected an id"),
        ("queries.jsonl", '["q9", 7]', r"queries\.jsonl, line 4: expected an object"),
        ("qrels/test.tsv", "q1\td1", r"test\.tsv, line 6: expected query id, document id and whole score"),
        ("qrels/test.tsv", "q1\td1\thigh", r"test\.tsv, line 6"),
        ("qrels/test.tsv", "q1 d1 1", r"test\.tsv, line 6"),
        ("qrels/test.tsv", "q7\td1\t1", r"test\.tsv: expected queries of queries\.jsonl, got 1 others, first 'q7'"),
    ],
)
def test_a_malformed_line_is_named(folder, corpus_size, name, line, message):
    with (folder / name).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        load_beir_folder(folder)


@pytest.mark.parametrize("field", ["contents", "content", "Text", "body"])
def test_a_corpus_without_text_names_the_fields_that_it_has(folder, corpus_size, field):
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "d9", "title": "Title", field: "words"}) + "\n")
    fields = (
        f"field 'text': expected a text, which may be empty, got no such field \\(it has '_id', 'title', '{field}'\\)"
    )
    for read in (load_beir_folder, read_documents):
        with pytest.raises(UserError, match=rf"corpus\.jsonl, line 5, {fields}"):
            read(folder)


def test_documents_without_title_and_text_are_counted_once(folder, corpus_size, caplog):
    (folder / "corpus.jsonl").open("a").write('{"_id": "d9", "title": null, "text": null}\n')
    assert load_beir_folder(folder).corpus_texts[-1] == load_beir_folder(folder).corpus_texts[-2] == ""
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'corpus.jsonl'}: 2 of 5 documents have neither title nor text"
    ]


def test_a_corpus_of_empty_documents_is_refused(folder, corpus_size):
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": " "}\n')
    with pytest.raises(UserError, match=r"corpus\.jsonl: expected documents with a title or a text, got 1 empty"):
        load_beir_folder(folder)


def test_a_large_corpus_is_copied_again_only_after_it_has_changed(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(beir_folder, "LARGEST_IN_MEMORY", 0)
    assert len(load_beir_folder(folder).corpus_ids) == 4
    read, calls = beir_folder.read_rows, []
    monkeypatch.setattr(beir_folder, "read_rows", lambda path: calls.append(path) or read(path))
    assert len(load_beir_folder(folder).corpus_ids) == 4
    assert folder / "corpus.jsonl" not in calls
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "d9", "text": "new"}) + "\n")
    assert load_beir_folder(folder).corpus_texts[[4, 0, 4]] == ["new", "Title Text\u2028of the first.", "new"]
    assert calls


def test_a_large_corpus_without_room_for_its_copy_is_a_user_error(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    monkeypatch.setattr(beir_folder, "LARGEST_IN_MEMORY", 0)
    with pytest.raises(UserError, match=r"expected room for a copy of .*corpus\.jsonl in .*set HF_DATASETS_CACHE"):
        load_beir_folder(folder)


def test_different_ids_with_equal_checksums_are_accepted(folder, monkeypatch):
    monkeypatch.setattr(beir_folder.xxhash, "xxh3_64_intdigest", lambda identifier: 7)
    assert load_beir_folder(folder).corpus_ids == ["d1", "d2", "d3", "q1"]


def test_a_split_without_judgements_is_refused(folder):
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(UserError, match="at least one judgement"):
        load_beir_folder(folder)


def test_a_folder_without_all_three_parts_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a BEIR folder with"):
        load_beir_folder(tmp_path)


def test_a_collection_on_disk_needs_no_network(folder, monkeypatch):
    monkeypatch.setattr(util, "download_and_unzip", lambda *_: pytest.fail("asked the network"))
    assert find_beir_dataset("tiny", folder.parent).corpus_ids == ["d1", "d2", "d3", "q1"]


def test_a_missing_collection_is_downloaded_once_and_leaves_no_zip(folder, tmp_path, monkeypatch):
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in sorted(folder.rglob("*.*")):
            zipped.write(file, file.relative_to(folder.parent))
    asked = []

    def download(url, path, chunk_size=1024):
        asked.append(url)
        (tmp_path / path).write_bytes(archive.read_bytes())

    monkeypatch.setattr(util, "download_url", download)
    data_dir = tmp_path / "data"
    assert find_beir_dataset("tiny", data_dir).queries == {"q2": "query 2", "q1": "query 1"}
    find_beir_dataset("tiny", data_dir)
    assert len(asked) == 1 and asked[0].endswith("/tiny.zip")
    assert [entry.name for entry in data_dir.iterdir()] == ["tiny"]


def test_a_failed_download_names_collection_and_folder_and_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(util, "download_url", fail)
    with pytest.raises(UserError, match="'scifact' in .*nowhere.*scifact.zip failed"):
        find_beir_dataset("scifact", tmp_path / "nowhere")
    monkeypatch.setattr(util, "download_url", lambda url, path, *_: (tmp_path / path).write_text("<html>404</html>"))
    with pytest.raises(UserError, match="BadZipFile"):
        find_beir_dataset("scifact", tmp_path / "nowhere")
    assert list((tmp_path / "nowhere").iterdir()) == []


@pytest.mark.parametrize("name", ["../secret", "a/b", "", ".."])
def test_a_name_that_leaves_the_data_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="expected the name of a BEIR collection"):
        find_beir_dataset(name, tmp_path)


@pytest.mark.parametrize("rows", [[], [0], [11], [2, 3, 4], [4, 3, 2], [2, 4, 6], [5, 5, 6], [0, 11], [10, 11]])
def test_a_column_on_disk_gives_the_same_rows_as_a_list(tmp_path, rows):
    texts = [f"text {number}" for number in range(12)]
    table = datasets.Dataset.from_generator(
        lambda texts: ({"text": text} for text in texts), gen_kwargs={"texts": texts}, cache_dir=str(tmp_path)
    )
    column = MappedColumn([file["filename"] for file in table.cache_files], "text")
    assert take(column, rows) == take(texts, rows) == [texts[row] for row in rows]
