"""Exact search: order, ties, blocks, unusual vectors. Then similarities, and approximate search."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ragcun_hf.errors import UserError
from ragcun_hf.search import approximate as faiss_search
from ragcun_hf.search import exact as search
from ragcun_hf.search import first_pass, memory_maps
from ragcun_hf.search.exact import exact_search
from ragcun_hf.search.similarity import SIMILARITIES, inner_product_vectors, score_pairs, score_rows
from ragcun_hf.search.ties import IdOrder


def _random(rows, width, seed):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def _slow_search(queries, documents, k, similarity):
    """Order all pairs in float64, equal scores by the lower row."""
    queries, documents = queries.astype(np.float64), documents.astype(np.float64)
    rows = []
    for query in queries:
        if similarity == "euclidean":
            scores = -np.sqrt(((documents - query) ** 2).sum(axis=1))
        else:
            scores = documents @ query
            if similarity == "cosine":
                scores /= np.linalg.norm(documents, axis=1) * np.linalg.norm(query)
        rows.append(sorted(range(len(documents)), key=lambda row: (-np.float32(scores[row]), row))[:k])  # noqa: B023
    return np.array(rows)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize(("document_block", "query_block"), [(16_384, 1_024), (7, 3), (1, 1)])
def test_search_equals_sorting_all_pairs(similarity, document_block, query_block):
    queries, documents = _random(11, 24, 0), _random(150, 24, 1)
    found = exact_search(
        queries, documents, k=20, similarity=similarity, document_block=document_block, query_block=query_block
    )
    assert found.scores.dtype == np.float32
    assert found.indices.dtype == np.int64
    np.testing.assert_array_equal(found.indices, _slow_search(queries, documents, 20, similarity))


@pytest.mark.parametrize("document_block", [1, 5, 33, 1000])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_equal_documents_are_ordered_by_row_also_across_blocks(similarity, document_block):
    queries = _random(9, 48, 0)
    documents = _random(10, 48, 1)[np.arange(100) % 10]  # each one ten times
    found = exact_search(queries, documents, k=25, similarity=similarity, document_block=document_block)
    np.testing.assert_array_equal(found.indices, _slow_search(queries, documents, 25, similarity))
    for row in found.indices:
        assert row[:10].tolist() == sorted(row[:10]), "the ten copies of the best document"
        assert len({document % 10 for document in row[:10]}) == 1


def test_more_ties_than_candidates_keep_the_lowest_rows():
    found = exact_search(np.ones((3, 4)), np.ones((500, 4)), k=5, document_block=64)
    assert found.indices.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_ties_cut_by_a_later_block_keep_the_lowest_rows():
    # 40 equal documents are the best of the first block; 20 better ones in the next block displace most of them.
    documents = np.repeat([[0.0], [1.0], [0.0], [2.0]], [200, 40, 2760, 20], axis=0)
    found = exact_search(np.ones((5, 1)), documents, k=24, similarity="dot", document_block=3000)
    assert found.indices.tolist() == [[*range(3000, 3020), 200, 201, 202, 203]] * 5


def test_equal_scores_are_ordered_by_the_given_ties_also_where_the_results_end():
    documents = _random(10, 8, 1)[np.arange(200) % 10]  # each one twenty times
    ties = np.random.default_rng(2).permutation(200)
    found = exact_search(_random(6, 8, 0), documents, k=30, ties=ties, document_block=16)
    by_row = exact_search(_random(6, 8, 0), documents, k=30)
    np.testing.assert_array_equal(found.scores, by_row.scores)
    for row in found.indices:
        assert ties[row[:20]].tolist() == sorted(ties[row[:20]])
        assert set(row[20:]) <= set(np.flatnonzero(np.arange(200) % 10 == row[20] % 10))
        lowest = sorted(ties[np.arange(200) % 10 == row[20] % 10])[:10]
        assert ties[row[20:]].tolist() == lowest


def test_equal_documents_of_a_collapsed_model_give_the_lowest_rows_with_few_candidates_in_memory(monkeypatch):
    monkeypatch.setattr(first_pass, "SPARE_CANDIDATES", 64)
    documents = np.ones((5_000, 4), dtype=np.float32)
    documents[4_000] = [2.0, 0.0, 0.0, 0.0]
    queries = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    found = exact_search(queries, documents, k=5, document_block=128)
    assert found.indices.tolist() == [[4_000, 0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_a_query_with_too_many_candidates_costs_other_queries_none(monkeypatch):
    monkeypatch.setattr(first_pass, "SPARE_CANDIDATES", 0)
    # For the first query all 60 documents have almost equal scores; the second must order ten of them exactly.
    documents = np.zeros((60, 2), dtype=np.float32)
    documents[:, 0] = 1.0
    documents[:, 1] = 1e-4 * np.arange(60)
    documents[10:, 1] = -1.0
    found = exact_search(np.array([[1.0, 0.0], [0.0, 1.0]]), documents, k=4, similarity="dot")
    assert found.indices[0].tolist() == [0, 1, 2, 3]
    assert found.indices[1].tolist() == [9, 8, 7, 6]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_documents_that_differ_by_less_than_the_rounding_of_a_product_are_still_ordered(similarity):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 384)).astype(np.float32)
    documents = (rng.standard_normal(384) + 1e-6 * rng.standard_normal((500, 384))).astype(np.float32)
    found = exact_search(query, documents, k=20, similarity=similarity, document_block=50)
    np.testing.assert_array_equal(found.indices, _slow_search(query, documents, 20, similarity))


def test_ties_decide_when_more_documents_are_equal_than_candidates_are_held():
    ties = np.arange(5_000)[::-1].copy()
    found = exact_search(np.ones((1, 4)), np.ones((5_000, 4)), k=5, ties=ties)
    assert found.indices.tolist() == [[4_999, 4_998, 4_997, 4_996, 4_995]]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("noise", [3e-7, 1e-6])
def test_none_of_the_best_is_lost_among_more_near_duplicates_than_candidates_are_held(monkeypatch, similarity, noise):
    monkeypatch.setattr(first_pass, "SPARE_CANDIDATES", 64)
    rng = np.random.default_rng(0)
    near = rng.standard_normal(32) + noise * rng.standard_normal((900, 32))
    documents = np.concatenate([_random(500, 32, 1), near]).astype(np.float32)
    queries = near[:3].astype(np.float32)
    found = exact_search(queries, documents, k=40, similarity=similarity, document_block=300)
    np.testing.assert_array_equal(found.indices, _slow_search(queries, documents, 40, similarity))


def test_distances_from_far_away_to_a_tight_cluster_are_ordered_as_rounded_to_float32():
    for seed in range(10):
        documents = 0.01 * _random(400, 8, seed)
        queries = np.full((1, 8), 3000.0, dtype=np.float32)
        found = exact_search(queries, documents, k=20, similarity="euclidean")
        np.testing.assert_array_equal(found.indices, _slow_search(queries, documents, 20, "euclidean"))


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_vectors_whose_squares_underflow_float32_are_ordered(similarity):
    documents, queries = 1e-23 * _random(6_000, 8, 0), 1e-21 * _random(2, 8, 1)
    found = exact_search(queries, documents, k=5, similarity=similarity)
    np.testing.assert_array_equal(found.indices, _slow_search(queries, documents, 5, similarity))


def test_a_lower_matmul_precision_is_suspended_during_the_search_and_restored():
    torch.set_float32_matmul_precision("medium")
    try:
        found = exact_search(_random(10, 64, 0), _random(500, 64, 1), k=7)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found.indices, exact_search(_random(10, 64, 0), _random(500, 64, 1), k=7).indices)


@pytest.mark.parametrize("ties", [np.zeros(50, dtype=np.int64), np.arange(49)])
def test_ties_that_do_not_define_an_order_are_a_user_error(ties):
    with pytest.raises(UserError, match="different numbers for ties"):
        exact_search(_random(2, 4, 0), _random(50, 4, 1), k=3, ties=ties)


@pytest.mark.parametrize("search_", [exact_search, faiss_search.approximate_search])
def test_ids_are_read_only_for_documents_with_equal_scores(search_):
    if search_ is not exact_search:
        pytest.importorskip("faiss")
    generator = np.random.default_rng(3)
    ids = [f"d{number}" for number in generator.permutation(400)]  # d10 before d9
    documents = _random(20, 8, 1)[generator.integers(0, 20, 400)]
    documents[:50] = _random(50, 8, 2)  # all different
    asked = []

    class Listening(IdOrder):
        def __call__(self, rows):
            asked.extend(rows.tolist())
            return super().__call__(rows)

    by_id = search_(_random(5, 8, 0), documents, k=60, ties=Listening(ids))
    by_number = search_(_random(5, 8, 0), documents, k=60, ties=np.argsort(np.argsort(np.array(ids))))
    np.testing.assert_array_equal(by_id.indices, by_number.indices)
    np.testing.assert_array_equal(by_id.scores, by_number.scores)
    assert asked
    assert min(asked) >= 50


def test_ties_may_be_any_whole_numbers():
    documents, large = np.ones((4, 2)), np.array([2**62, -(2**62), 5, 2**61])
    assert exact_search(np.ones((3, 2)), documents, k=4, ties=large).indices.tolist() == [[1, 2, 3, 0]] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_gpu_finds_what_the_processor_finds(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        queries, documents = _random(50, 384, 0), _random(20_000, 384, 1)
        found = exact_search(queries, documents, k=100, device="cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found.indices, exact_search(queries, documents, k=100).indices)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_the_larger_blocks_of_a_card_find_the_same(similarity):
    queries, documents = _random(20, 16, 0), _random(9_000, 16, 1)
    found, expected = (
        exact_search(queries, documents, k=30, similarity=similarity, document_block=block)
        for block in (search._CARD_BLOCK, None)
    )
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_queries_in_several_rounds_get_the_same_results(monkeypatch):
    expected = exact_search(_random(10, 6, 0), _random(50, 6, 1), k=7)
    monkeypatch.setattr(search, "RESULTS_AT_ONCE", 21)
    found = exact_search(_random(10, 6, 0), _random(50, 6, 1), k=7)
    np.testing.assert_array_equal(found.indices, expected.indices)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory where Linux reports it")
def test_pages_of_a_memory_map_are_released_during_the_search(tmp_path):
    path = tmp_path / "documents.npy"
    np.save(path, _random(50_000, 256, 1))
    script = (
        "import sys, numpy as np, torch\n"
        "from ragcun_hf.search.exact import exact_search\n"
        "def peak():\n"
        "    with open('/proc/self/status') as status:\n"
        "        return next(int(line.split()[1]) for line in status if line.startswith('VmHWM'))\n"
        "documents = np.load(sys.argv[1], mmap_mode='r')\n"
        "exact_search(np.ones((2, 256)), documents[:5_000], k=3)\n"
        "before = peak()\n"
        "exact_search(np.ones((2, 256)), documents, k=3)\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 25_000, "KiB; the whole map has 50,000"


def test_hints_change_no_content_and_ignore_arrays_that_are_not_mapped(tmp_path, monkeypatch):
    path = tmp_path / "documents.npy"
    np.save(path, _random(5_000, 64, 1))
    expected = _random(5_000, 64, 1)
    for mode in ("r", "r+", "c"):
        documents = np.load(path, mmap_mode=mode)
        if mode == "c":
            documents[7] = 0  # a change that is saved nowhere
            expected[7] = 0
        for rows in (slice(0, 10), slice(4_990, 5_000), slice(0, 0), slice(3, 3_000)):
            memory_maps.will_need(documents, rows)
            memory_maps.will_need(documents[5:], rows)
            memory_maps.release(documents[5:])
        memory_maps.release(documents)
        np.testing.assert_array_equal(documents, expected)
    memory_maps.will_need(expected, slice(0, 3))
    memory_maps.release(torch.zeros(3))


def test_k_above_the_number_of_documents_is_clipped():
    found = exact_search(_random(2, 4, 0), _random(3, 4, 1), k=10)
    assert found.indices.shape == found.scores.shape == (2, 3)
    assert sorted(found.indices[0].tolist()) == [0, 1, 2]


def test_zero_vectors_have_cosine_zero_to_everything():
    found = exact_search(np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]), k=3)
    assert found.scores.tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]
    assert found.indices.tolist() == [[0, 1, 2], [2, 0, 1]]


def test_cosine_survives_very_large_and_very_small_vectors():
    found = exact_search(np.array([[1e30, 1e30], [1e-30, 0.0]]), np.array([[1e-35, 1e-35], [1e35, 0.0]]), k=1)
    assert found.indices.tolist() == [[0], [1]]
    np.testing.assert_allclose(found.scores, 1.0, rtol=1e-6)


def test_cosine_ignores_the_length_of_documents():
    queries, documents = _random(5, 8, 0), _random(200, 8, 1)
    lengths = np.logspace(-35, 35, 200, dtype=np.float64)[np.random.default_rng(0).permutation(200)]
    expected = exact_search(queries, documents, k=10)
    found = exact_search(queries, (documents * lengths[:, None]).astype(np.float32), k=10)
    np.testing.assert_array_equal(found.indices, expected.indices)


def test_euclidean_is_exact_far_from_the_origin():
    # In float32, |q|^2 + |d|^2 - 2qd of these vectors is off by more than the distances themselves.
    offset = np.full(16, 4096.0, dtype=np.float32)
    queries, documents = offset + _random(5, 16, 0), offset + _random(60, 16, 1)
    found = exact_search(queries, documents, k=10, similarity="euclidean")
    np.testing.assert_array_equal(found.indices, _slow_search(queries, documents, 10, "euclidean"))
    nearest = documents[found.indices[:, 0]].astype(np.float64)
    np.testing.assert_allclose(found.scores[:, 0], -np.linalg.norm(nearest - queries, axis=1), rtol=1e-6)


def test_euclidean_distance_of_a_vector_to_itself_is_zero():
    documents = _random(40, 32, 0) * 100
    found = exact_search(documents, documents, k=1, similarity="euclidean")
    assert found.indices.ravel().tolist() == list(range(40))
    assert (found.scores == 0).all()


def test_arrays_memory_maps_and_tensors_give_the_same_results(tmp_path):
    queries, documents = _random(6, 8, 0), _random(50, 8, 1)
    np.save(tmp_path / "documents.npy", documents)
    mapped = np.load(tmp_path / "documents.npy", mmap_mode="r")
    expected = exact_search(queries, documents, k=5, document_block=16)
    for other in (mapped, torch.from_numpy(documents), documents.astype(np.float64), np.asfortranarray(documents)):
        found = exact_search(torch.from_numpy(queries), other, k=5, document_block=16)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_inputs_are_not_changed():
    queries, documents = _random(4, 8, 0) * 3, _random(20, 8, 1) * 3
    before = queries.copy(), documents.copy()
    exact_search(torch.from_numpy(queries), documents, k=3)
    np.testing.assert_array_equal(queries, before[0])
    np.testing.assert_array_equal(documents, before[1])


def test_no_queries_give_an_empty_result():
    assert exact_search(np.empty((0, 4)), _random(3, 4, 0), k=2).indices.shape == (0, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["queries", "documents"])
def test_vectors_that_are_not_finite_are_refused(bad, side):
    vectors = {"queries": _random(3, 4, 0), "documents": _random(9, 4, 1)}
    vectors[side][2, 1] = bad
    with pytest.raises(UserError, match="finite"):
        exact_search(vectors["queries"], vectors["documents"], k=1, document_block=2)


@pytest.mark.parametrize(
    ("queries", "documents", "options"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), {"k": 1}),
        (np.ones(3), np.ones((2, 3)), {"k": 1}),
        (np.ones((2, 3)), np.ones((0, 3)), {"k": 1}),
        (np.ones((2, 3)), np.ones((2, 3)), {"k": 0}),
        (np.ones((2, 3)), np.ones((2, 3)), {"k": 1, "similarity": "manhattan"}),
        (np.full((1, 3), 1e30), np.full((1, 3), 1e30), {"k": 1, "similarity": "dot"}),
    ],
)
def test_wrong_input_is_a_user_error_of_one_line(queries, documents, options):
    with pytest.raises(UserError) as caught:
        exact_search(queries, documents, **options)
    assert "\n" not in str(caught.value)


# Similarities


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_scores_by_rows_and_by_pairs_are_those_of_the_search(similarity):
    queries, documents = (torch.from_numpy(_random(20, 12, seed)) for seed in (0, 1))
    found = exact_search(queries, documents, k=20, similarity=similarity)
    expected = np.empty((20, 20), dtype=np.float32)
    np.put_along_axis(expected, found.indices, found.scores, axis=1)
    np.testing.assert_allclose(score_pairs(queries, documents, similarity), expected, atol=1e-5)
    np.testing.assert_allclose(score_rows(queries, documents, similarity), np.diag(expected), atol=1e-5)
    np.testing.assert_allclose(score_rows(queries[:1], documents, similarity), expected[0], atol=1e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_scoring_changes_the_documents_only_in_place(similarity):
    queries, documents = (torch.from_numpy(_random(20, 12, seed)) for seed in (0, 1))
    before = documents.clone()
    scores = score_rows(queries, documents, similarity)
    assert torch.equal(documents, before)
    assert torch.equal(score_rows(queries, documents, similarity, in_place=True), scores)
    assert not torch.equal(documents, before)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_inner_product_vectors_order_documents_as_the_similarity_does(similarity):
    queries, documents = _random(11, 24, 0), _random(150, 24, 1) + 3
    queries_QX, documents_NX = (
        inner_product_vectors(torch.from_numpy(vectors), similarity, is_query=is_query)
        for vectors, is_query in ((queries, True), (documents, False))
    )
    order = torch.argsort(queries_QX @ documents_NX.T, dim=1, descending=True)[:, :20]
    np.testing.assert_array_equal(order, _slow_search(queries, documents, 20, similarity))


# Approximate search


@pytest.fixture
def clustered():
    """Three thousand documents around fifty centres, and queries near some of them."""
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((50, 16))
    documents = (centres[rng.integers(0, 50, 3_000)] + 0.3 * rng.standard_normal((3_000, 16))).astype(np.float32)
    return documents[::200] + 0.05, documents


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_faiss_finds_most_of_what_the_exact_search_finds_with_the_same_scores(clustered, similarity):
    pytest.importorskip("faiss")
    queries, documents = clustered
    exact = exact_search(queries, documents, k=10, similarity=similarity)
    found = faiss_search.approximate_search(queries, documents, k=10, similarity=similarity, num_probes=8)
    assert 0.8 < faiss_search.recall_of(found, exact) <= 1.0
    known = [dict(zip(*row, strict=True)) for row in zip(exact.indices, exact.scores, strict=True)]
    for indices, scores, expected in zip(found.indices, found.scores, known, strict=True):
        assert scores.tolist() == sorted(scores, reverse=True)
        assert all(expected.get(index, score) == score for index, score in zip(indices, scores, strict=True))
    everywhere = faiss_search.approximate_search(queries, documents, k=10, similarity=similarity, num_probes=1_000)
    np.testing.assert_array_equal(everywhere.indices, exact.indices)


def test_a_query_whose_lists_are_too_small_is_searched_exactly(clustered):
    pytest.importorskip("faiss")
    queries, documents = clustered
    found = faiss_search.approximate_search(queries, documents, k=2_000, num_probes=1)
    np.testing.assert_array_equal(found.indices, exact_search(queries, documents, k=2_000).indices)


@pytest.mark.parametrize(
    ("queries", "k", "similarity"), [((2, 16), 5, "manhattan"), ((2, 8), 5, "dot"), ((2, 16), 0, "dot")]
)
def test_faiss_refuses_the_same_arguments_as_the_exact_search(clustered, queries, k, similarity):
    pytest.importorskip("faiss")
    for find in (faiss_search.approximate_search, exact_search):
        with pytest.raises(UserError, match="expected"):
            find(np.ones(queries), clustered[1], k=k, similarity=similarity)


def test_a_measured_search_reports_its_recall(clustered):
    pytest.importorskip("faiss")
    queries, documents = clustered
    few, many = faiss_search.MeasuredSearch(num_probes=1), faiss_search.MeasuredSearch(num_probes=1_000)
    for search_ in (few, many):
        search_(queries, documents, k=20, similarity="cosine", ties=np.arange(3_000))
    assert few.recalls[0] < many.recalls[0] == 1.0


def test_recall_of_a_case_worked_by_hand():
    found = search.SearchResult(np.zeros((2, 2)), np.array([[1, 2], [3, 4]]))
    exact = search.SearchResult(np.zeros((2, 2)), np.array([[2, 1], [3, 5]]))
    assert faiss_search.recall_of(found, exact) == 0.75


def test_a_missing_faiss_is_a_user_error_with_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        faiss_search.approximate_search(np.ones((1, 2)), np.ones((3, 2)), k=1)
