"""Evaluate a model with beir's own exact search and figures, for every similarity that a model may have.

    retriever = beir_retriever(model)
    run = retriever.retrieve(corpus, queries)
    ndcg, mean_average_precision, recall, precision = retriever.evaluate(qrels, run, retriever.k_values)

`corpus`, `queries` and `qrels` come from beir's `GenericDataLoader`. The search and the figures of this package
(`search.exact`, `evaluation.retrieval`) give the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..data.documents import document_text
from ..errors import UserError

if TYPE_CHECKING:
    from beir.retrieval.evaluation import EvaluateRetrieval
    from torch import Tensor

    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

K_VALUES = (1, 3, 5, 10, 100)  # ranks of the figures; beir keeps as many documents per query as the largest


class BeirModel:
    """Gives a model in evaluation mode the interface that beir's `DenseRetrievalExactSearch` expects."""

    score_function = "dot"  # beir must compare these vectors by dot product, whatever the model's similarity

    def __init__(self, model: IsotropicGaussianModel, *, use_predictor: bool = False) -> None:
        if use_predictor and model.predictor is None:
            raise UserError(
                "use_predictor expects a model with a predictor, got one without: leave it out, or train with one"
            )
        self._model = model
        self._use_predictor = use_predictor

    def encode_queries(self, queries: Sequence[str], batch_size: int = 32, **options: Any) -> Tensor:
        """Embed query texts as `inner_product_vectors`; of beir's other options only `show_progress_bar` counts."""
        return self._encode(list(queries), batch_size, options, is_query=True)

    def encode_corpus(self, corpus: Sequence[dict[str, str]], batch_size: int = 32, **options: Any) -> Tensor:
        """Embed documents, with `text` and perhaps `title`, in the same way."""
        texts = [document_text(document.get("title", ""), document.get("text", "")) for document in corpus]
        return self._encode(texts, batch_size, options, is_query=False)

    def _encode(self, texts: list[str], batch_size: int, options: dict[str, Any], *, is_query: bool) -> Tensor:
        import torch

        from ..search.similarity import inner_product_vectors

        encode_query = partial(self._model.encode_query, use_predictor=self._use_predictor)
        encode = encode_query if is_query else self._model.encode_document
        vectors = encode(texts, batch_size=batch_size, show_progress_bar=options.get("show_progress_bar", False))
        similarity = self._model.config.similarity_fn_name
        return inner_product_vectors(torch.as_tensor(vectors), similarity, is_query=is_query)


def beir_retriever(
    model: IsotropicGaussianModel,
    *,
    use_predictor: bool = False,
    batch_size: int = 32,
    k_values: Sequence[int] = K_VALUES,
    show_progress_bar: bool = False,
) -> EvaluateRetrieval:
    """Set up beir's exact search and evaluation for a model in evaluation mode.

    With `use_predictor`, the predictor's output is the query vector; a UserError says if there is no predictor.
    `retrieve` needs at least two queries, because beir fails on one, and keeps as many documents per query as the
    largest of `k_values`. The scores of a Euclidean model are |q|² minus the squared distance.
    """
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    adapter = BeirModel(model, use_predictor=use_predictor)
    search = DenseRetrievalExactSearch(adapter, batch_size=batch_size, show_progress_bar=show_progress_bar)
    return EvaluateRetrieval(search, k_values=list(k_values), score_function=adapter.score_function)
