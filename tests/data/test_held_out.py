"""The validation split: no text is in both parts, and added rows move no other row."""

import json
import logging
import random

import pytest
from datasets import Dataset

from ragcun_hf.data.held_out import drop_validation_negatives, hold_out_pairs, split_by_document
from ragcun_hf.data.pairs import read_pairs
from ragcun_hf.errors import UserError


def pairs(rows):
    return Dataset.from_dict(
        {"query": [q for q, _ in rows], "positive": [p for _, p in rows], "negative": [[] for _ in rows]}
    )


def chance_rows(count, queries, documents, seed=0):
    rng = random.Random(seed)
    return [(f"q{rng.randrange(queries)}", f"d{rng.randrange(documents)}") for _ in range(count)]


def rows_of(dataset):
    return list(zip(dataset["query"], dataset["positive"], strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_no_query_and_no_document_is_in_both_parts(seed):
    rows = chance_rows(800, 900, 700, seed)
    train, validation = split_by_document(pairs(rows), 0.3, seed)
    assert not set(train["query"]) & set(validation["query"])
    assert not set(train["positive"]) & set(validation["positive"])
    assert sorted(rows_of(train) + rows_of(validation)) == sorted(rows)
    assert len(train) and len(validation)


def test_a_chain_of_shared_texts_stays_together():
    chain = [("a", "1"), ("b", "1"), ("b", "2"), ("c", "2"), ("c", "3")]
    others = [(f"q{n}", f"d{n}") for n in range(40)]
    for seed in range(10):
        train, validation = split_by_document(pairs(chain + others), 0.5, seed)
        assert len(set(chain) & set(rows_of(train))) in (0, 5)
        assert len(validation) and len(train)


def test_a_text_that_is_both_a_query_and_a_document_stays_in_one_part():
    rows = [(f"t{n}", f"t{n + 1}") for n in range(0, 10)] + [(f"q{n}", f"d{n}") for n in range(30)]
    train, validation = split_by_document(pairs(rows), 0.4, 1)
    texts = [set(part["query"]) | set(part["positive"]) for part in (train, validation)]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_the_size_is_near_the_fraction(fraction):
    rows = [(f"q{n}", f"d{n // 3}") for n in range(9000)]
    _, validation = split_by_document(pairs(rows), fraction, 0)
    assert len(validation) / len(rows) == pytest.approx(fraction, abs=0.025)


def test_added_rows_move_no_other_row():
    rows = [(f"q{n}", f"d{n // 2}") for n in range(2000)]
    more = [(f"new q{n}", f"new d{n}") for n in range(1000)]
    shuffled = rows + more
    random.Random(0).shuffle(shuffled)
    before = set(rows_of(split_by_document(pairs(rows), 0.1, 7)[1]))
    after = set(rows_of(split_by_document(pairs(shuffled), 0.1, 7)[1]))
    assert before == after & set(rows)
    assert len(after) > len(before)


def test_a_larger_fraction_contains_a_smaller_one():
    rows = [(f"q{n}", f"d{n}") for n in range(500)]
    small, large = (set(rows_of(split_by_document(pairs(rows), fraction)[1])) for fraction in (0.1, 0.2))
    assert small < large


def test_the_same_seed_repeats_a_split_and_another_one_changes_it():
    rows = pairs([(f"q{n}", f"d{n}") for n in range(300)])
    first, again, other = (rows_of(split_by_document(rows, 0.2, seed)[1]) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.4])
def test_a_split_of_what_a_split_has_left_has_the_wanted_size_too(fraction):
    rows = [(f"q{n}", f"d{n}") for n in range(2000)]
    rest = pairs(rows)
    for wanted in (0.2, fraction, fraction):
        before = len(rest)
        rest, validation = split_by_document(rest, wanted, 42)
        assert len(validation) / before == pytest.approx(wanted, abs=0.05)


def test_few_rows_are_split_a_second_time_too():
    for seed in range(20):
        rest, _ = split_by_document(pairs([(f"q{n}", f"d{n}") for n in range(40)]), 0.2, seed)
        assert 2 <= len(split_by_document(rest, 0.2, seed)[1]) <= 14
        assert 1 <= len(split_by_document(rest, 0.3, seed, salt="dev")[1]) <= 20


def test_an_ordinary_split_is_the_one_that_earlier_versions_drew():
    rows = pairs([(f"q{n}", f"d{n}") for n in range(30)])
    assert split_by_document(rows, 0.2, 42)[1]["query"][:] == ["q10", "q12", "q17", "q26"]


def test_a_giant_group_goes_to_training_and_the_log_says_so(caplog):
    rows = [(f"q{n}", "everything") for n in range(500)] + [(f"r{n}", f"d{n}") for n in range(20)]
    for seed in range(20):
        train, validation = split_by_document(pairs(rows), 0.3, seed)
        assert "everything" in train["positive"]
        assert 1 <= len(validation) <= 20
    assert "held out" in caplog.text


def test_two_rows_give_one_each():
    train, validation = split_by_document(pairs([("a", "1"), ("b", "2")]), 0.01)
    assert len(train) == len(validation) == 1


@pytest.mark.parametrize("rows", [[("a", "1")], [("a", "1"), ("b", "1"), ("b", "2")]])
def test_a_single_group_cannot_be_split(rows):
    with pytest.raises(UserError, match="at least two unrelated documents"):
        split_by_document(pairs(rows), 0.5)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(UserError, match="between 0 and 1"):
        split_by_document(pairs([("a", "1"), ("b", "2")]), fraction)


def rows_with_negatives(count):
    """Every document is a negative of every other row, one of them with blanks around it."""
    texts = [f"d{n}" for n in range(count)]
    negatives = [[f" {text} " if text == "d0" else text for text in texts if text != own] for own in texts]
    queries = [f"q{n}" for n in range(count)]
    return Dataset.from_dict({"query": queries, "positive": texts, "negative": negatives})


def hold_out(rows, val_data=None, val_fraction=0.0):
    held_out = None if val_data is None else read_pairs(val_data)
    return hold_out_pairs(rows, held_out, val_fraction=val_fraction, seed=0)


def negatives_of(rows):
    return {text.strip() for row in rows for text in row["negative"]}


def test_held_out_documents_are_removed_from_training_negatives(caplog):
    rows = rows_with_negatives(30)
    with caplog.at_level(logging.INFO):
        train, validation = hold_out(rows, val_fraction=0.3)
    assert len(train) + len(validation) == 30
    assert negatives_of(train) == set(train["positive"])
    assert negatives_of(validation) == set(rows["positive"])  # these may be searched among
    assert f"dropped {len(train) * len(validation)} negatives" in caplog.text
    assert train.column_names == rows.column_names


def test_documents_of_a_validation_file_are_removed_from_training_negatives(tmp_path, caplog):
    (tmp_path / "val.json").write_text(json.dumps([{"query": "q", "positive": text} for text in ("d0", "d1")]))
    with caplog.at_level(logging.INFO):
        train, validation = hold_out(rows_with_negatives(5), val_data=tmp_path / "val.json")
    assert (len(train), len(validation)) == (5, 2)
    assert negatives_of(train) == {"d2", "d3", "d4"}
    assert "dropped 8 negatives" in caplog.text


def test_a_stream_loses_the_same_negatives():
    rows = rows_with_negatives(5)
    stream = drop_validation_negatives(rows.to_iterable_dataset(), pairs([("q", "d0"), ("q", "d1")]))
    assert [row["query"] for row in stream] == rows["query"][:]
    assert negatives_of(stream) == {"d2", "d3", "d4"}
    assert list(stream.features) == ["query", "positive", "negative"]


def test_without_validation_every_negative_stays():
    rows = rows_with_negatives(5)
    assert hold_out(rows) == (rows, None)
