"""Pairs that are known over the whole of the data, and epochs in which every query counts once."""

import pytest
import torch

from ragcun_hf.trainer.collators import text_ids
from ragcun_hf.trainer.known_pairs import KnownPairs, PairIds, QueryBalancedSampler


@pytest.mark.parametrize("kind", ["rows", "hashes"])
def test_the_lookup_equals_a_set_of_pairs(kind):
    generator = torch.Generator().manual_seed(0)
    names = torch.arange(40) if kind == "rows" else text_ids([f"text {number}" for number in range(40)])
    rows = torch.randint(40, (2, 300), generator=generator)
    known = KnownPairs(names[rows[0]], names[rows[1]])
    pairs = set(zip(*rows.tolist(), strict=True))
    expected = [[(query, document) in pairs for document in range(40)] for query in range(40)]
    assert known(names, names).tolist() == expected
    assert 200 < sum(map(sum, expected)) < 300


def test_one_document_per_query_needs_no_lookup():
    ids = torch.tensor([4, 5, 6])
    assert PairIds(ids, torch.tensor([1, 1, 2])).known_pairs() is None
    assert PairIds(torch.tensor([4, 4, 6]), torch.tensor([1, 1, 2])).known_pairs() is None  # a row that comes twice
    assert PairIds(torch.tensor([4, 4, 6]), torch.tensor([1, 3, 2])).known_pairs() is not None


QUERIES = torch.tensor([9, 3, 9, 9, 5, 3])


def test_an_epoch_takes_every_query_once():
    sampler = QueryBalancedSampler(QUERIES, seed=1)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == 3
        assert sorted(QUERIES[rows].tolist()) == [3, 5, 9]


def test_epochs_differ_and_in_the_end_every_row_was_drawn():
    sampler = QueryBalancedSampler(QUERIES, seed=1)
    epochs = []
    for epoch in range(60):
        sampler.set_epoch(epoch)
        epochs.append(tuple(sampler))
    assert {row for rows in epochs for row in rows} == set(range(6))
    assert len(set(epochs)) > 20
    nines = [row for rows in epochs for row in rows if QUERIES[row] == 9]
    assert all(8 <= nines.count(row) <= 32 for row in (0, 2, 3))  # 20 each, but for chance


def test_seed_and_epoch_decide_the_draw():
    first, second = QueryBalancedSampler(QUERIES, seed=1), QueryBalancedSampler(QUERIES, seed=1)
    list(first)  # what was drawn before plays no part
    for sampler in (first, second):
        sampler.set_epoch(7)
    assert list(first) == list(second) == list(first)
    draws = {tuple(QueryBalancedSampler(QUERIES, seed=seed)) for seed in range(20)}
    assert len(draws) > 5
