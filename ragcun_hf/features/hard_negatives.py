"""Hard negatives: documents that a query finds near its own document, but that do not answer it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.pairs import pair_features
from ..data.sources import build_table
from ..errors import UserError
from ..search.exact import exact_search, search_device
from ..search.similarity import score_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset

    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from .feature_store import FeatureStore

_ROWS_AT_ONCE = 8_192


def mine_hard_negatives(
    pairs: Dataset,
    corpus: Sequence[str],
    model: IsotropicGaussianModel,
    store: FeatureStore,
    *,
    num_negatives: int = 1,
    range_min: int = 10,
    range_max: int = 100,
    relative_margin: float = 0.05,
    seed: int = 42,
) -> Dataset:
    """Add documents to the negatives of each pair that the model ranks high for its query, but not as an answer.

    A candidate stands among the first `range_max` documents of the query, not among the first `range_min` (which often
    answer it although nobody said so), scores at least `relative_margin` below the pair's own document, and is the
    document of no pair with the same query and no negative of this pair. Of the candidates, `num_negatives` are drawn.

    Args:
        pairs: Rows `query`, `positive`, `negative`, as from `read_pairs`.
        corpus: Documents to search, beside those and the negatives of the pairs.
        model: Ranks the documents, by its projection; an untrained one ranks as its frozen encoder does.
        store: Features of the model's encoder, cached.
        num_negatives: Negatives to add per pair, at least 1; a pair with fewer candidates gets fewer.
        range_min: First rank, counted from 0, of the candidates.
        range_max: Rank after the last one.
        relative_margin: Share by which a candidate's similarity has to be below that of the pair's own document.
        seed: Of the draw.

    Returns:
        The pairs in their order, with the negatives they had and the added ones.

    Raises:
        UserError: If the ranks contradict each other.

    Source:
        Moreira et al., "NV-Retriever: Improving text embedding models with effective hard-negative mining", 2024,
        arXiv:2407.15831 (margins relative to the positive).
    """
    if not 0 <= range_min < range_max or num_negatives < 1:
        raise UserError(
            "expected ranks 0 <= range_min < range_max and at least one negative, got "
            f"{range_min}, {range_max} and {num_negatives}: correct them"
        )
    queries = list(dict.fromkeys(pairs["query"][:]))
    had = [text for texts in pairs["negative"] for text in texts]
    documents = list(dict.fromkeys([*corpus, *pairs["positive"][:], *had]))
    query_rows = {text: row for row, text in enumerate(queries)}
    document_rows = {text: row for row, text in enumerate(documents)}
    config = model.config
    query_features = store.features(queries, prompt=config.query_prompt).expanded()
    query_vectors = _embed(model, query_features, num_predicted=None)
    document_features = store.features(documents, prompt=config.document_prompt).expanded()
    document_vectors = _embed(model, document_features, num_predicted=0)
    similarity = config.similarity_fn_name
    options: Any = {"similarity": similarity, "device": search_device(model.device)}
    found = exact_search(query_vectors, document_vectors, k=min(range_max, len(documents)), **options)
    of_pairs = [(query_rows[row["query"]], document_rows[row["positive"]]) for row in pairs]
    known: dict[int, set[int]] = {}
    for query, document in of_pairs:
        known.setdefault(query, set()).add(document)
    own_queries, own_documents = (
        torch.from_numpy(vectors[list(rows)])
        for vectors, rows in zip((query_vectors, document_vectors), zip(*of_pairs, strict=True), strict=True)
    )
    highest = score_rows(own_queries, own_documents, similarity).numpy()
    highest = highest - relative_margin * np.abs(highest)
    generator = random.Random(seed)
    chosen = []
    for (query, _), limit, own in zip(of_pairs, highest, pairs["negative"], strict=True):
        ranked = zip(found.indices[query][range_min:].tolist(), found.scores[query][range_min:].tolist(), strict=True)
        excluded = known[query] | {document_rows[text] for text in own}
        candidates = [document for document, score in ranked if score <= limit and document not in excluded]
        drawn = generator.sample(candidates, min(num_negatives, len(candidates)))
        chosen.append(tuple(documents[document] for document in drawn))
    return build_table(_with_negatives, pair_features(), streaming=False, pairs=pairs, added=tuple(chosen))


def _with_negatives(pairs: Dataset, added: tuple[tuple[str, ...], ...]) -> Iterator[dict[str, Any]]:
    for row, negatives in zip(pairs, added, strict=True):
        yield {**row, "negative": [*row["negative"], *negatives]}


@torch.inference_mode()
def _embed(model: IsotropicGaussianModel, features: np.ndarray, *, num_predicted: int | None) -> np.ndarray:
    model.eval()
    blocks = np.array_split(features, max(1, -(-len(features) // _ROWS_AT_ONCE)))
    inputs = (torch.from_numpy(block).to(model.device) for block in blocks)
    parts = [model(features=block, num_predicted=num_predicted).embeddings for block in inputs]
    return torch.cat([part.float().cpu() for part in parts]).numpy()
