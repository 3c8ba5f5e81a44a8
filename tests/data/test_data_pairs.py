"""Pairs: every row is checked, and its texts are read unchanged."""

import json
import pickle

import datasets
import pytest

from ragcun_hf.data.pairs import audit_pairs, drop_duplicate_rows, read_pairs, read_xy_pairs
from ragcun_hf.errors import UserError


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def good_rows(count):
    return [{"query": f"query {n}", "positive": f"document {n}"} for n in range(count)]


def test_the_negatives_of_equal_pairs_are_joined():
    rows = [
        {"query": "q", "positive": "p", "negative": "a"},
        {"query": "q", "positive": "other", "negative": "b"},
        {"query": "q", "positive": "p", "negative": ["c", "a"]},
    ]
    kept, num_dropped = drop_duplicate_rows(read_pairs(rows))
    assert num_dropped == 1
    assert kept["positive"][:] == ["p", "other"]
    assert kept["negative"][:] == [["a", "c"], ["b"]]


def test_only_numbered_columns_hold_more_negatives():
    rows = [{"query": "q", "positive": "p", "negative_1": "a", "negative_2": "b", "negative_id_1": "c"}]
    assert read_pairs(rows)["negative"][:] == [["a", "b"]]


MINED = ["she", "he", "it"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"query": "who?", "positive": "she", "negative_1": "he", "negative_2": "it", "score": [0.9, 0.5, 0.4]}],
        [{"query": "who?", "positive": "she", "negative": ["he", "it"], "score": 0.4}],
        [{"query": "who?", "positive": text, "label": int(text == "she")} for text in MINED],
        [{"query": "who?", "positive": text, "score": str(float(text == "she"))} for text in MINED],
        [{"query": "who?", "positive": MINED, "labels": [True, False, False]}],
        [{"query": "who?", "pos": ["she"], "neg": ["he", "it"], "pos_scores": [1.0], "prompt": "Search"}],
        ["who?", "she", "he", "it"],
    ],
    ids=["tuple", "triplet", "labelled pairs", "scored pairs", "labelled list", "FlagEmbedding", "list"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_files_of_other_tools_give_the_pair_and_its_negatives(tmp_path, rows, streaming):
    rows = rows if isinstance(rows[0], dict) else [rows]
    other = {"list": ["why?", "so"]}.get(type(rows[0]).__name__)
    other = other or {**dict.fromkeys(rows[0]), "query": "why?", **_only_answer(rows[0])}
    pairs = read_pairs(write_lines(tmp_path / "a.jsonl", [*rows, other]), streaming=streaming)
    assert list(pairs) == [
        {"query": "who?", "positive": "she", "negative": ["he", "it"]},
        {"query": "why?", "positive": "so", "negative": []},
    ]


def _only_answer(row):
    if "pos" in row:
        return {"pos": ["so"], "neg": []}
    return {"positive": "so", **({"label": 1} if "label" in row else {})}


def test_several_positives_of_a_row_share_its_negatives():
    pairs = read_pairs([{"query": "q", "pos": ["a", "b"], "neg": ["n"]}])
    assert list(pairs) == [{"query": "q", "positive": text, "negative": ["n"]} for text in "ab"]
    named = read_pairs([{"query": "q", "good": ["a", "b"], "bad": "n"}], positive_column="good", negative_column="bad")
    assert list(named) == list(pairs)


@pytest.mark.parametrize("column", ["label", "labels", "score"])
def test_a_text_column_may_be_called_as_labels_are(column):
    rows = [{"question": "q", column: "the answer"}]
    assert read_pairs(rows, query_column="question", positive_column=column)[:] == {
        "query": ["q"],
        "positive": ["the answer"],
        "negative": [[]],
    }


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_labels_of_a_dataset_in_another_format_are_read(kind):
    rows = datasets.Dataset.from_list([{"query": "q", "positive": text, "label": int(text == "p")} for text in "pn"])
    assert list(read_pairs(rows.with_format(kind))) == [{"query": "q", "positive": "p", "negative": ["n"]}]


def test_a_transform_of_a_dataset_sees_all_columns():
    rows = datasets.Dataset.from_list([{"query": "q", "answer": "p", "embedding": [0.5]}])
    rows.set_transform(lambda batch: {"query": batch["query"], "positive": batch["answer"]})
    assert list(read_pairs(rows)) == [{"query": "q", "positive": "p", "negative": []}]


def test_a_document_with_the_label_0_never_becomes_a_positive(caplog):
    labelled = [("q", "lost", 0), ("q", "p", 1), ("q", "n", 0), ("r", "lost", 0), ("r", "s", 1), ("q", "lost", 0)]
    rows = [{"query": query, "positive": text, "label": label} for query, text, label in labelled]
    assert list(read_pairs(rows, name="a labelled table")) == [
        {"query": "q", "positive": "p", "negative": ["n"]},
        {"query": "r", "positive": "s", "negative": []},
    ]
    assert "a labelled table: left out 3 documents with the label 0" in caplog.text
    with pytest.raises(UserError, match="expected a document with the label 1, got 1 with 0"):
        read_pairs(rows[:1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": 0.83}, "field 'score': expected 1 for each document .* got 0.83"),
        ({"label": "entailment"}, "field 'label': expected 1 for each .* got 'entailment'"),
        ({"label": 3}, "field 'label'"),
        ({"label": [1, 0]}, "field 'label'"),
        ({"positive": ["p", "n"], "labels": [1]}, "field 'labels'"),
        ({"positive": []}, "field 'positive': expected a text, or a list with at least one"),
        ({"positive": [{"text": "p"}]}, "field 'positive'"),
        ({"negative": [{"text": "n"}]}, "field 'negative'"),
    ],
)
def test_labels_and_lists_that_are_not_understood_are_refused_by_name_at_once(tmp_path, fields, message):
    path = write_lines(tmp_path / "a.jsonl", [{"query": "q", "positive": "p", **fields}, *good_rows(1)])
    with pytest.raises(UserError, match=f"line 1, {message}"):
        read_pairs(path)


def test_columns_that_look_like_negatives_and_are_not_read_are_named_once(tmp_path, caplog):
    row = {
        "query": "q",
        "positive": "p",
        "hard_negatives": ["not read at all"],
        "passages": [{"text": "x"}],
        "id": "1",
    }
    path = write_lines(tmp_path / "a.jsonl", [row, {**row, "query": "r"}])
    stream = read_pairs(path, streaming=True)
    assert list(stream) == list(stream) == list(read_pairs(path))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        f"{path}: not read: 'hard_negatives', 'passages'. If they are meant, name them with --query"
    )


def test_negatives_become_a_list_whatever_their_form(tmp_path):
    forms = [None, "", "  ", "one", ["one", "two"], []]
    rows = [{"query": "q", "positive": "p", "negative": form} for form in forms] + [{"query": "q", "positive": "p"}]
    pairs = read_pairs(write_lines(tmp_path / "a.jsonl", rows))
    assert pairs["negative"][:] == [[], [], [], ["one"], ["one", "two"], [], []]
    assert pairs.column_names == ["query", "positive", "negative"]


def test_one_row_is_enough(tmp_path):
    assert len(read_pairs(write_lines(tmp_path / "a.jsonl", good_rows(1)))) == 1


def test_columns_are_found_by_their_flags_and_others_are_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("id,question,answer,wrong\n1,who?,she,he\n2,why?,so,\n")
    names = {"query_column": "question", "positive_column": "answer", "negative_column": "wrong"}
    assert list(read_pairs(tmp_path / "a.csv", **names)) == [
        {"query": "who?", "positive": "she", "negative": ["he"]},
        {"query": "why?", "positive": "so", "negative": []},
    ]


@pytest.mark.parametrize("limit", [None, 2])
def test_a_named_column_of_negatives_that_no_row_has_is_refused(tmp_path, limit):
    path = write_lines(tmp_path / "a.jsonl", [*good_rows(2), {"query": "q", "positive": "p", "negative": "n"}])
    with pytest.raises(UserError) as raised:
        read_pairs(path, negative_column="typo", limit=limit)
    columns = "'query', 'positive'" if limit else "'query', 'positive', 'negative'"
    assert f"{path}: expected the column 'typo' with negatives, got only the columns {columns}: " in str(raised.value)


def test_a_named_column_of_negatives_may_occur_in_the_last_row_only(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*good_rows(2), {"query": "q", "positive": "p", "wrong": "n"}])
    assert read_pairs(path, negative_column="wrong")["negative"][:] == [[], [], ["n"]]


def test_unicode_is_kept_to_the_last_code_point(tmp_path):
    texts = ["e\u0301 vs \u00e9", "\u202eעברית\u202c", "👩‍👩‍👧", "nul\x00inside", "a\u2028b\u0085c", "\U0001f98a" * 3]
    rows = [{"query": text, "positive": text + "!"} for text in texts]
    pairs = read_pairs(write_lines(tmp_path / "a.jsonl", rows))
    assert pairs["query"][:] == texts


def test_a_surrogate_pair_written_as_two_escapes_is_one_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "\\ud83e\\udd8a", "positive": "fox"}')
    assert read_pairs(tmp_path / "a.jsonl")[0]["query"] == "🦊"


BAD_VALUES = {
    "missing": ({"query": "q"}, "field 'positive': expected a text, got no such field (it has 'query')"),
    "null": ({"query": "q", "positive": None}, "field 'positive': expected a text that is not blank, got None"),
    "blank": ({"query": " \t", "positive": "p"}, "field 'query': expected a text that is not blank, got ' \\t'"),
    "number": ({"query": 7, "positive": "p"}, "field 'query': expected a text that is not blank, got 7"),
    "surrogate": ({"query": "\ud800x", "positive": "p"}, "field 'query': expected valid Unicode"),
    "negative_number": ({"query": "q", "positive": "p", "negative": 3}, "field 'negative': expected a text, a list"),
    "negative_blank": ({"query": "q", "positive": "p", "negative": ["a", " "]}, "field 'negative'"),
    "negative_surrogate": ({"query": "q", "positive": "p", "negative": ["\udc00"]}, "field 'negative'"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_error_names_a_bad_row_on_line_5000(tmp_path, name, streaming):
    bad, message = BAD_VALUES[name]
    path = write_lines(tmp_path / "a.jsonl", [*good_rows(4999), bad, *good_rows(3)])
    with pytest.raises(UserError) as raised:
        list(read_pairs(path, streaming=streaming))
    assert f"{path}, line 5000, " in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_of_an_array_are_counted_as_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([*good_rows(2), {"query": "q"}], indent=2))
    with pytest.raises(UserError, match=r"a\.json, row 3, field 'positive'"):
        read_pairs(tmp_path / "a.json")


def test_a_long_value_is_shortened_in_the_message(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"query": ["x" * 5000], "positive": "p"}])
    with pytest.raises(UserError) as raised:
        read_pairs(path)
    assert len(str(raised.value)) < 400


def test_a_stream_has_the_same_rows(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", good_rows(25))
    assert list(read_pairs(path, streaming=True)) == list(read_pairs(path))
    assert list(read_pairs(path, streaming=True).features) == ["query", "positive", "negative"]


def test_streamed_pairs_can_be_sent_to_the_workers_of_a_loader(tmp_path):
    stream = read_pairs(write_lines(tmp_path / "a.jsonl", good_rows(3)), streaming=True)
    assert list(pickle.loads(pickle.dumps(stream))) == good_rows_with_negatives(3)


def good_rows_with_negatives(count):
    return [{**row, "negative": []} for row in good_rows(count)]


def test_rows_after_the_limit_are_not_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*good_rows(3), {"query": ""}])
    assert len(read_pairs(path, limit=3)) == 3
    with pytest.raises(UserError, match="at least 1 row, got 0"):
        read_pairs(path, limit=0)


def beir_folder(tmp_path, qrels):
    (tmp_path / "qrels").mkdir()
    documents = [{"_id": "d1", "title": "Title", "text": "text."}, {"_id": "d2", "title": "", "text": "other"}]
    write_lines(tmp_path / "corpus.jsonl", documents)
    write_lines(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "first?"}, {"_id": "q2", "text": "second?"}])
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return tmp_path


def test_the_relevant_judgements_of_a_beir_folder_become_pairs(tmp_path, caplog):
    folder = beir_folder(tmp_path, "q1\td1\t2\nq1\td2\t0\nq2\tabsent\t1\nq2\td2\t1\n")
    assert list(read_pairs(folder)) == [
        {"query": "first?", "positive": "Title text.", "negative": []},
        {"query": "second?", "positive": "other", "negative": []},
    ]
    assert "skipped 1 judgements" in caplog.text
    assert list(read_pairs(folder, streaming=True)) == list(read_pairs(folder))


def test_a_missing_beir_split_lists_the_splits_that_exist(tmp_path):
    with pytest.raises(UserError, match="split 'test', got the splits train"):
        read_pairs(beir_folder(tmp_path, "q1\td1\t1\n"), split="test")


def test_an_audit_counts_distinct_texts_duplicates_and_negatives(tmp_path):
    rows = [
        {"query": "a", "positive": "x"},
        {"query": "a", "positive": "x", "negative": ["n", "m"]},
        {"query": "b", "positive": "x"},
        {"query": "c", "positive": "c"},
    ]
    audit = audit_pairs(read_pairs(write_lines(tmp_path / "a.jsonl", rows)))
    assert (audit.rows, audit.distinct_queries, audit.distinct_positives) == (4, 3, 2)
    assert (audit.query_is_positive, audit.duplicate_rows, audit.negatives) == (1, 1, 2)


def test_dropping_duplicates_keeps_the_first_of_each_and_the_order(tmp_path):
    rows = [("a", "x"), ("b", "x"), ("a", "x"), ("a", "y"), ("b", "x")]
    path = write_lines(tmp_path / "a.jsonl", [{"query": query, "positive": positive} for query, positive in rows])
    kept, dropped = drop_duplicate_rows(read_pairs(path))
    assert [(row["query"], row["positive"]) for row in kept] == [("a", "x"), ("b", "x"), ("a", "y")]
    assert dropped == 2


def test_the_masked_text_is_the_query_and_the_original_the_positive(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"x": "a red fox", "y": "a [MASK] fox"}])
    assert read_xy_pairs(path)[0] == {"query": "a [MASK] fox", "positive": "a red fox", "negative": []}
    with pytest.raises(UserError, match=r"line 1, field 'original'"):
        read_xy_pairs(path, x_column="original")


def test_unmasked_pairs_are_counted_in_the_log(tmp_path, caplog):
    read_xy_pairs(write_lines(tmp_path / "a.jsonl", [{"x": "same", "y": "same"}, {"x": "a b", "y": "a"}]))
    assert "1 rows have the same text" in caplog.text
