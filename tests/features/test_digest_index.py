"""The index of digests: every digest is found at its place, in little memory."""

import tracemalloc
from random import Random

import numpy as np
import pytest

from ragcun_hf.features.digest_index import DigestIndex


def _index(*shards):
    index = DigestIndex()
    for digests in shards:
        index.add(digests)
    return index


def test_digests_of_many_shards_are_found_at_their_places():
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 40, size=60)
    shards = [[generator.bytes(16) for _ in range(length)] for length in lengths]
    index = _index(*map(b"".join, shards))
    found = index.find([digest for digests in shards for digest in digests])
    assert found[0].tolist() == np.repeat(np.arange(60), lengths).tolist()
    assert found[1].tolist() == [row for length in lengths for row in range(length)]
    assert len(index) == lengths.sum()


def test_digests_that_share_a_half_are_distinguished():
    halves = [bytes([number]) * 8 for number in range(3)]
    digests = [first + second for first in halves for second in halves]
    index = _index(b"".join(digests[0:7:2]), b"", b"".join(digests[1:7:2]))
    shards, rows = index.find([*digests, halves[0] + b"z" * 8])
    assert shards.tolist() == [0, 2, 0, 2, 0, 2, 0, -1, -1, -1]
    assert rows.tolist() == [0, 0, 1, 1, 2, 2, 3, -1, -1, -1]
    assert len(index) == 7


def test_a_digest_in_two_shards_is_found_in_one_and_counts_once():
    index = _index(b"a" * 16, b"b" * 16 + b"a" * 16)
    shards, rows = index.find([b"a" * 16])
    assert (shards[0], rows[0]) in {(0, 0), (1, 1)}
    assert len(index) == 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_copy_with_the_lowest_precedence_is_found_whatever_the_order(order):
    generator = np.random.default_rng(0)
    copied, other = generator.bytes(16), [generator.bytes(16 * (50 + number)) for number in range(3)]
    index = DigestIndex()
    for number in order:
        index.add(other[number] + copied, precedence=[7, 5, 2**64 - 1][number])
        index.add(generator.bytes(16 * 200))
        assert len(index) == sum(len(other[each]) // 16 + 200 for each in order[: order.index(number) + 1]) + 1
    assert [part.tolist() for part in index.find([copied])] == [[2 * order.index(1)], [51]]


def test_the_first_copy_in_a_shard_is_found():
    index = _index(b"b" * 16 + b"a" * 16 + b"b" * 16)
    assert [part.tolist() for part in index.find([b"a" * 16, b"b" * 16])] == [[0, 0], [1, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("finds_every", [1, 32, 128])
def test_an_index_takes_24_bytes_a_digest_and_hardly_more_while_it_grows(finds_every):
    generator = np.random.default_rng(0)
    shards = [generator.bytes(16 * 4_096) for _ in range(128)]
    index = DigestIndex()
    tracemalloc.start()
    try:
        for number, digests in enumerate(shards):
            index.add(digests)
            if number % finds_every == finds_every - 1:
                assert index.find([digests[:16]])[0].tolist() == [number]
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(index) == 128 * 4_096
    assert kept < 25 * len(index)
    assert most < 27 * len(index)


@pytest.mark.parametrize("seed", range(40))
def test_random_shards_with_copies_are_found_as_in_a_dictionary(seed):
    random, index, expected, known = Random(seed), DigestIndex(), {}, []
    sizes = (2, 3, 16)  # few different bytes: copies, equal halves and zeros at the end are frequent
    for shard in range(random.randrange(12)):
        length = random.choice([0, 1, 5, 60])
        digests = [bytes(random.choices(range(random.choice(sizes)), k=2)) * 8 for _ in range(length)]
        digests += random.choices(known, k=5) if known else []
        known += digests
        precedence = random.getrandbits(64)
        index.add(b"".join(digests), precedence=precedence)
        for row, digest in enumerate(digests):
            expected[digest] = min(expected.get(digest, (2**64, 0, 0)), (precedence, shard, row))
        asked = [*known, b"\xff" * 16]
        random.shuffle(asked)
        found = zip(*(part.tolist() for part in index.find(asked)), strict=True)
        assert list(found) == [expected.get(digest, (0, -1, -1))[1:] for digest in asked]
        assert len(index) == len(expected)


def test_an_empty_index_finds_nothing():
    assert [part.tolist() for part in DigestIndex().find([b"a" * 16])] == [[-1], [-1]]
    assert [part.tolist() for part in _index(b"a" * 16).find([])] == [[], []]
