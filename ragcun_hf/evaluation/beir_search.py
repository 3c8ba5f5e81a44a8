"""A model for `beir`: its own exact search and its own figures, with every similarity a model may have.

    retriever = beir_retriever(model)
    run = retriever.retrieve(corpus, queries)
    ndcg, mean_average_precision, recall, precision = retriever.evaluate(qrels, run, retriever.k_values)

`corpus`, `queries` and `qrels` are what beir's `GenericDataLoader` gives. Search and figures of this package's own are
in `search` and `beir_evaluation`, and give the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.documents import document_text
from ..errors import UserError

if TYPE_CHECKING:
    from beir.retrieval.evaluation import EvaluateRetrieval
    from torch import Tensor

    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

K_VALUES = (1, 3, 5, 10, 100)  # ranks of the figures; the largest says how many documents of a query beir keeps
_SCORE_FUNCTIONS = {"cosine": "cos_sim", "dot": "dot", "euclidean": "dot"}


class BeirModel:
    """What beir's `DenseRetrievalExactSearch` takes for a model.

    beir compares by cosine or dot product only. A Euclidean model therefore gives longer vectors, whose dot product
    orders documents exactly as their distances do: with [2d, -|d|²] for a document d and [q, 1] for a query q it is
    2 q·d - |d|² = |q|² - |q - d|², and |q|² is the same for all documents of a query. They are in float64, because
    |d|² is large beside the differences that decide.

    Args:
        model: Gives the vectors; in evaluation mode.
        use_predictor: Search with the predictor's output as the query vector.

    Attributes:
        score_function: How beir has to compare these vectors: `cos_sim` or `dot`.

    Raises:
        UserError: If there is no predictor to use.
    """

    def __init__(self, model: IsotropicGaussianModel, *, use_predictor: bool = False) -> None:
        if use_predictor and model.predictor is None:
            raise UserError(
                "use_predictor expects a model with a predictor, got one without: leave it out, or train with one"
            )
        self._model = model
        self._use_predictor = use_predictor
        self._is_euclidean = model.config.similarity_fn_name == "euclidean"
        self.score_function = _SCORE_FUNCTIONS[model.config.similarity_fn_name]

    def encode_queries(self, queries: Sequence[str], batch_size: int = 32, **options: Any) -> Tensor:
        """Embed queries for beir.

        Args:
            queries: Texts.
            batch_size: Texts per batch.
            **options: Of beir; only `show_progress_bar` counts.

        Returns:
            Shape (N, D) in float32; (N, D + 1) in float64 for a Euclidean model.
        """
        import torch

        options = {"batch_size": batch_size, "show_progress_bar": options.get("show_progress_bar", False)}
        vectors_ND = torch.as_tensor(
            self._model.encode_query(list(queries), use_predictor=self._use_predictor, **options)
        )
        if not self._is_euclidean:
            return vectors_ND
        vectors_ND = vectors_ND.double()
        return torch.cat([vectors_ND, vectors_ND.new_ones(len(vectors_ND), 1)], dim=1)

    def encode_corpus(self, corpus: Sequence[dict[str, str]], batch_size: int = 32, **options: Any) -> Tensor:
        """Embed documents for beir.

        Args:
            corpus: Documents with `text` and, if they have one, `title`.
            batch_size: Texts per batch.
            **options: Of beir; only `show_progress_bar` counts.

        Returns:
            Shape (N, D) in float32; (N, D + 1) in float64 for a Euclidean model.
        """
        import torch

        options = {"batch_size": batch_size, "show_progress_bar": options.get("show_progress_bar", False)}
        texts = [document_text(document.get("title", ""), document.get("text", "")) for document in corpus]
        vectors_ND = torch.as_tensor(self._model.encode_document(texts, **options))
        if not self._is_euclidean:
            return vectors_ND
        vectors_ND = vectors_ND.double()
        return torch.cat([2 * vectors_ND, -vectors_ND.square().sum(1, keepdim=True)], dim=1)


def beir_retriever(
    model: IsotropicGaussianModel,
    *,
    use_predictor: bool = False,
    batch_size: int = 32,
    k_values: Sequence[int] = K_VALUES,
    show_progress_bar: bool = False,
) -> EvaluateRetrieval:
    """Set up beir's exact search and evaluation for a model.

    Args:
        model: Gives the vectors; in evaluation mode.
        use_predictor: Search with the predictor's output as the query vector.
        batch_size: Texts per batch.
        k_values: Ranks of the figures; the largest says how many documents of a query are kept.
        show_progress_bar: Draw a bar while texts are encoded.

    Returns:
        With `retrieve(corpus, queries)` for at least two queries (beir fails on one) and
        `evaluate(qrels, run, k_values)`. A Euclidean model's scores are |q|² minus the squared distance.

    Raises:
        UserError: If there is no predictor to use.
    """
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    adapter = BeirModel(model, use_predictor=use_predictor)
    search = DenseRetrievalExactSearch(adapter, batch_size=batch_size, show_progress_bar=show_progress_bar)
    return EvaluateRetrieval(search, k_values=list(k_values), score_function=adapter.score_function)
