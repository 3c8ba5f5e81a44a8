"""Training rows of all kinds answer the same questions."""

import json

import pytest
from datasets import Dataset

from ragcun_hf.data.masking import MaskedViews
from ragcun_hf.data.pairs import read_pairs
from ragcun_hf.data.pseudo_queries import PseudoQueryViews, draw_pseudo_queries
from ragcun_hf.data.splitting import SplitViews
from ragcun_hf.data.stream import ShuffledStream
from ragcun_hf.data.training_rows import TableRows, read_columns, rows_digest

ROWS = [
    {"query": "who?", "positive": "she", "negative": ["he", "it"]},
    {"query": "where?", "positive": "here", "negative": []},
]
DOCUMENTS = ["One red fox. Two dogs. Three.", "The sun is far away. The moon is near."]


def _stream(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return ShuffledStream(read_pairs(tmp_path / "rows.jsonl", streaming=True), buffer_size=1, seed=3)


@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["a list", "a dataset"])
def test_known_rows_are_those_of_their_table(make):
    rows = TableRows(make(ROWS))
    assert (rows.num_rows, rows.stream_order) == (2, None)
    assert list(rows) == [rows[0], rows[1]] == ROWS
    assert read_columns(rows) == (["who?", "where?"], ["she", "here"], [["he", "it"], []])
    assert rows.known_pairs() == (["who?", "where?"], ["she", "here"])
    assert rows.documents == ["she", "here", "he", "it"]  # a negative is seen too
    rows.set_epoch(5)
    assert list(rows) == ROWS


def test_a_row_may_lack_negatives():
    rows = TableRows([{"query": "who?", "positive": "she"}])
    assert read_columns(rows) == (["who?"], ["she"], [[]])
    assert rows.documents == ["she"]


@pytest.mark.parametrize(
    "rows",
    [
        MaskedViews(DOCUMENTS, "word", 0.5),
        SplitViews(DOCUMENTS, "sentence"),
        PseudoQueryViews(DOCUMENTS, draw_pseudo_queries(DOCUMENTS, {"sentence": 1})),
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_of_documents_are_not_known_before_training_but_their_documents_are(rows):
    assert (rows.num_rows, rows.stream_order) == (2, None)
    assert rows.known_pairs() is None
    assert rows.documents == DOCUMENTS
    draws = set()
    for epoch in range(8):
        rows.set_epoch(epoch)
        drawn = list(rows)
        assert drawn == [rows[0], rows[1]]
        draws.add(json.dumps(drawn))
    assert (len(draws) == 1) == isinstance(rows, PseudoQueryViews)  # its queries are drawn once


def test_of_a_stream_nothing_is_known_before_it_is_read(tmp_path):
    stream = _stream(tmp_path)
    assert (stream.num_rows, stream.known_pairs(), list(stream.documents)) == (None, None, [])
    assert stream.stream_order == {"shuffle_buffer_size": 1, "seed": 3}
    assert list(stream) == ROWS


def test_the_digest_depends_on_every_text_its_place_and_its_row(tmp_path):
    digest = rows_digest(TableRows(ROWS))
    assert digest == rows_digest(TableRows(Dataset.from_list(ROWS))) == rows_digest(_stream(tmp_path))
    first, second = ROWS
    others = [
        [second, first],
        [{**first, "query": "why?"}, second],
        [{**first, "positive": "we"}, second],
        [{**first, "negative": ["it", "he"]}, second],
        [{**first, "negative": ["he"]}, {**second, "negative": ["it"]}],
    ]
    digests = {rows_digest(TableRows(rows)) for rows in others}
    assert len(digests | {digest}) == len(others) + 1
