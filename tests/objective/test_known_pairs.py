"""Pairs that are known over all training rows, and epochs that use every query once."""

import pytest
import torch
from torch.utils.data import DataLoader

from ragcun_hf.objective.inputs import text_ids
from ragcun_hf.objective.known_pairs import KnownPairs, PairIds, QueryBalancedRows


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


def _drawn(rows, epoch):
    rows.set_epoch(epoch)
    return tuple(rows[index] for index in range(len(rows)))


@pytest.fixture
def make_rows():
    """Balanced rows that are the numbers of the rows themselves."""
    return lambda seed=1: QueryBalancedRows(range(6), QUERIES, seed=seed)


def test_an_epoch_uses_every_query_once(make_rows):
    rows = make_rows()
    assert len(rows) == 3
    for epoch in range(20):
        assert sorted(QUERIES[list(_drawn(rows, epoch))].tolist()) == [3, 5, 9]


def test_epochs_differ_and_use_every_row_in_the_end(make_rows):
    rows = make_rows()
    epochs = [_drawn(rows, epoch) for epoch in range(60)]
    assert {row for drawn in epochs for row in drawn} == set(range(6))
    assert len(set(epochs)) > 20
    nines = [row for drawn in epochs for row in drawn if QUERIES[row] == 9]
    assert all(8 <= nines.count(row) <= 32 for row in (0, 2, 3))  # about 20 each


def test_seed_and_epoch_decide_the_draw(make_rows):
    first, second = make_rows(), make_rows()
    _drawn(first, 2)  # an earlier epoch changes nothing
    assert _drawn(first, 7) == _drawn(second, 7) == _drawn(first, 7)
    assert len({_drawn(make_rows(seed), 0) for seed in range(20)}) > 5


def test_a_new_dataset_is_at_its_first_epoch(make_rows):
    rows = make_rows()
    before = tuple(rows[index] for index in range(len(rows)))
    assert before == _drawn(rows, 0)


def test_loader_processes_that_are_kept_between_epochs_see_the_new_draw(make_rows):
    rows = make_rows()
    # Not forked: a fork would copy locks that the threads of other libraries hold.
    own_process = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "spawn"}
    loader = DataLoader(rows, batch_size=3, collate_fn=tuple, **own_process)
    for epoch in range(4):
        expected = _drawn(rows, epoch)
        assert list(loader) == [expected]
