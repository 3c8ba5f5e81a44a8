"""The benchmark of quantized vectors: its contenders return documents, and rescoring brings back the exact results."""

import numpy as np
import pytest

from ragcun_hf.search.exact import exact_search


@pytest.mark.slow
def test_float32_is_exact_and_rescoring_finds_more_of_it():
    pytest.importorskip("faiss")
    pytest.importorskip("sentence_transformers")
    from quantized_search import contenders

    rng = np.random.default_rng(0)
    documents = rng.standard_normal((400, 64), dtype=np.float32)
    queries = documents[:30] + rng.standard_normal((30, 64), dtype=np.float32)
    queries, documents = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, documents))
    found = {name: contender.search() for name, contender in contenders(queries, documents, 4).items()}
    exact = found["float32"]
    assert np.array_equal(exact, exact_search(queries, documents, k=exact.shape[1]).indices)

    def recall(name):
        assert found[name].shape == exact.shape
        return np.mean([len(set(row) & set(best)) / len(best) for row, best in zip(found[name], exact, strict=True)])

    assert recall("uint8") < recall("uint8, rescored")
    assert recall("binary") < recall("binary, rescored with float32")
