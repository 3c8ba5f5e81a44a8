# Licensed under the Apache License, Version 2.0. This file travels with every published model.
"""Turn texts into vectors and compare vectors: the model's methods `encode*`, `similarity*`, `relevance_probability`.

Shape letters: N, M = texts or vectors, D = embedding width, K = coordinates that are kept (D, or `truncate_dim`).
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
Vectors = np.ndarray | Tensor | Sequence[Any]

_TEXTS_AT_ONCE, _TOKENS_ON_A_CARD = 32, 65_536  # per forward pass, by default
_CHARACTERS_PER_TOKEN = 8  # of a text that are read first; English has four or five
_NUM_COMPARED = 8  # texts of which a tokenizer and its backend must return the same tokens


def quantize(vectors: np.ndarray, precision: Precision, ranges: Vectors | None = None) -> np.ndarray:
    """Store vectors in fewer bits, in the formats of sentence-transformers' `quantize_embeddings`.

    Args:
        vectors: Float vectors, shape (N, K).
        precision: `float32` changes nothing. `int8` and `uint8` divide the range of each coordinate into 256 steps and
            store the number of the step, from -128 or from 0. `binary` and `ubinary` store one bit per coordinate, 1
            if it is above 0; eight bits are one byte, from -128 or from 0.
        ranges: For `int8` and `uint8`: minimum and maximum of each coordinate, shape (2, K). Values outside get the
            first or the last step. Default: the ranges of `vectors`.

    Returns:
        Shape (N, K), or (N, ceil(K / 8)) for `binary` and `ubinary`.

    Raises:
        ValueError: If `int8` or `uint8` has neither `ranges` nor two vectors to take them from.

    Example:
        >>> ranges = np.array([[0.0, -51.0], [255.0, 51.0]])
        >>> quantize(np.array([[0.0, -51.0], [7.5, 0.0], [300.0, 51.0]], np.float32), "uint8", ranges).tolist()
        [[0, 0], [7, 127], [255, 255]]
        >>> quantize(np.array([[0.3, -0.1, 0.2, 0.0, 0.0, 0.0, 0.0, 0.5]], np.float32), "ubinary").tolist()
        [[161]]
    """
    if precision == "float32":
        return vectors
    if precision in ("binary", "ubinary"):
        bytes_ = np.packbits(vectors > 0, axis=-1)
        return bytes_ if precision == "ubinary" else (bytes_ ^ 128).view(np.int8)
    if len(vectors) == 0:
        return vectors.astype(precision)
    if ranges is None:
        _check_calibration(precision, len(vectors))
        ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    low_K, high_K = np.asarray(ranges, dtype=np.float32)
    step_K = (high_K - low_K) / 255
    step_K[step_K == 0] = 1
    steps_NK = np.floor((vectors - low_K) / step_K).clip(0, 255)
    return steps_NK.astype(np.uint8) if precision == "uint8" else (steps_NK - 128).astype(np.int8)


def _check_calibration(precision: str, num_vectors: int) -> None:
    if num_vectors < 2:
        raise ValueError(
            f"`precision={precision!r}` needs `ranges`, or at least two texts to take them from, got {num_vectors}."
        )
    if num_vectors < 100:
        logger.warning(
            "%s vectors get their ranges from only %d texts: pass the `ranges` of a larger sample. Vectors with other "
            "ranges cannot be compared.",
            precision,
            num_vectors,
        )


def relevance_probability(calibration: dict[str, float], scores: Vectors) -> Tensor:
    """Return how probable it is that the best document is relevant, as `EncodingMixin.relevance_probability` does.

    >>> calibration = {"bias": -2.0, "score": 2.0, "margin": 10.0}
    >>> relevance_probability(calibration, np.array([[0.5, 0.4], [0.3, 0.6]])).tolist()  # of 0 and of 2.2
    [0.5, 0.9002495408058167]
    """
    scores_QK = _float_tensor(scores)
    if scores_QK.ndim not in (1, 2) or scores_QK.shape[-1] < 2:
        raise ValueError(f"`scores` must be those of at least two documents, got shape {tuple(scores_QK.shape)}.")
    best, second = scores_QK.topk(2, dim=-1).values.unbind(-1)
    return torch.sigmoid(calibration["bias"] + calibration["score"] * best + calibration["margin"] * (best - second))


def default_batch_size(device: torch.device, max_length: int) -> int:
    """Return how many texts of up to `max_length` tokens make a batch that suits a device.

    >>> [default_batch_size(torch.device(name), 256) for name in ("cpu", "cuda")]
    [32, 256]
    """
    return max(_TEXTS_AT_ONCE, _TOKENS_ON_A_CARD // max_length) if device.type == "cuda" else _TEXTS_AT_ONCE


@dataclass(frozen=True)
class _Options:
    """The options that `encode`, `encode_query` and `encode_document` share."""

    batch_size: int | None
    show_progress_bar: bool
    convert_to_tensor: bool
    normalize_embeddings: bool | None  # None: as the model's similarity asks
    device: str | torch.device | None
    precision: Precision
    truncate_dim: int | None
    ranges: Vectors | None

    def check(self, num_texts: int, width: int) -> None:
        """Refuse invalid values before any text is encoded."""
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if self.precision not in get_args(Precision):
            raise ValueError(f"`precision` must be one of {', '.join(get_args(Precision))}, got {self.precision!r}.")
        if self.truncate_dim is not None and not 1 <= self.truncate_dim <= width:
            raise ValueError(f"`truncate_dim` must be between 1 and the model's {width}, got {self.truncate_dim}.")
        if self.ranges is not None:
            shape, expected = np.shape(self.ranges), (2, self.truncate_dim or width)
            if self.precision not in ("int8", "uint8") or shape != expected:
                raise ValueError(
                    f"`ranges` has the shape {expected} and belongs to the precisions int8 and uint8, got shape "
                    f"{shape} and precision {self.precision}."
                )
        elif self.precision in ("int8", "uint8") and num_texts == 1:
            _check_calibration(self.precision, num_texts)

    def apply(self, vectors_ND: Tensor, *, has_unit_vectors: bool) -> Tensor:
        """Truncate, then normalize if that is asked for or, by default, the model does, then quantize."""
        vectors_NK = vectors_ND[:, : self.truncate_dim]
        if has_unit_vectors if self.normalize_embeddings is None else self.normalize_embeddings:
            vectors_NK = nn.functional.normalize(vectors_NK, dim=-1)
        if self.precision == "float32":
            return vectors_NK
        return torch.from_numpy(quantize(vectors_NK.numpy(), self.precision, self.ranges))


class EncodingMixin:
    """The methods of the model that take texts or vectors."""

    config: Any
    predictor: Any

    @overload
    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        convert_to_tensor: Literal[False] = False,
        normalize_embeddings: bool | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        ranges: Vectors | None = None,
    ) -> np.ndarray: ...

    @overload
    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        convert_to_tensor: Literal[True],
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        normalize_embeddings: bool | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        ranges: Vectors | None = None,
    ) -> Tensor: ...

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        ranges: Vectors | None = None,
    ) -> np.ndarray | Tensor:
        """Embed texts. For retrieval, take `encode_query` and `encode_document`, which add the model's prompts.

        With `config.freeze_documents`, texts are documents, with the encoder's own vectors, whatever their prompt.

        Args:
            sentences: One text, which gives shape (K,), or several, which give shape (N, K).
            prompt: Text prepended to every text; it wins over `prompt_name`.
            prompt_name: `query` or `document`, the model's own prompts. Default: `config.default_prompt_name`, which
                is no prompt unless it was set.
            batch_size: Texts per forward pass. Default: 32, and on a CUDA device more if texts are short, so that the
                longest of them fill 65,536 tokens.
            show_progress_bar: Show a progress bar.
            convert_to_tensor: Return a tensor on the CPU instead of an array.
            normalize_embeddings: Scale vectors to unit length, after truncation; False leaves them as training sees
                them. Default: if the model's similarity is cosine.
            device: Move the model there first, as sentence-transformers does; it stays there. Default: do not move it.
            precision: `float32`, or `int8`, `uint8`, `binary` or `ubinary`, which need 4 or 32 times less memory; see
                the function `quantize` in this file.
            truncate_dim: Keep the first coordinates only.
            ranges: For `int8` and `uint8`: minimum and maximum of each coordinate, shape (2, K). Default: those of the
                given texts. Vectors can only be compared if they have the same ranges, so take those of the documents
                for the queries, too.

        Returns:
            Vectors in the order of the input. They are float32, int8 (`int8`, `binary`) or uint8 (`uint8`, `ubinary`).
            `binary` and `ubinary` have ceil(K / 8) columns.

        Raises:
            ValueError: If an option has no such value, an item is not a string, or ranges cannot be computed.

        Example:
            >>> vectors = model.encode(["a text", "another"], truncate_dim=64)  # doctest: +SKIP
            >>> ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])  # doctest: +SKIP
            >>> model.encode("third", truncate_dim=64, precision="int8", ranges=ranges).dtype  # doctest: +SKIP
            dtype('int8')
        """
        options = _Options(
            batch_size,
            show_progress_bar,
            convert_to_tensor,
            normalize_embeddings,
            device,
            precision,
            truncate_dim,
            ranges,
        )
        prompt = self._prompt(prompt, prompt_name, self.config.default_prompt_name)
        return self._encode(sentences, prompt, options, is_query=False)

    @overload
    def encode_query(
        self,
        sentences: str | Sequence[str],
        *,
        use_predictor: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        convert_to_tensor: Literal[False] = False,
        normalize_embeddings: bool | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        ranges: Vectors | None = None,
    ) -> np.ndarray: ...

    @overload
    def encode_query(
        self,
        sentences: str | Sequence[str],
        *,
        convert_to_tensor: Literal[True],
        use_predictor: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        normalize_embeddings: bool | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        ranges: Vectors | None = None,
    ) -> Tensor: ...

    def encode_query(
        self,
        sentences: str | Sequence[str],
        *,
        use_predictor: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        ranges: Vectors | None = None,
    ) -> np.ndarray | Tensor:
        """Embed queries, with the query prompt.

        Args:
            sentences: One text, which gives shape (K,), or several, which give shape (N, K).
            use_predictor: Return the predicted document embedding instead of the query's own embedding.
            prompt: Text to prepend instead of `config.query_prompt`.
            prompt_name: `query` or `document`. Default: `query`.
            batch_size: See `encode`, as for all options below.
            show_progress_bar: Show a progress bar.
            convert_to_tensor: Return a tensor on the CPU instead of an array.
            normalize_embeddings: Scale vectors to unit length, after truncation, or not.
            device: Move the model there first; it stays there.
            precision: `float32`, `int8`, `uint8`, `binary` or `ubinary`.
            truncate_dim: Keep the first coordinates only.
            ranges: For `int8` and `uint8`: the ranges of the documents' vectors, shape (2, K).

        Returns:
            Vectors in the order of the input, as from `encode`. Compare them with `similarity`.

        Raises:
            ValueError: If the model has no predictor to use, an option has no such value, or an item is not a string.

        Example:
            >>> model.encode_query(["a question"], use_predictor=True).shape  # doctest: +SKIP
            (1, 768)
        """
        if use_predictor and self.predictor is None:
            raise ValueError(
                "`use_predictor` needs a model with a predictor, got one without: train with a predictor."
            )
        options = _Options(
            batch_size,
            show_progress_bar,
            convert_to_tensor,
            normalize_embeddings,
            device,
            precision,
            truncate_dim,
            ranges,
        )
        prompt = self._prompt(prompt, prompt_name, "query")
        return self._encode(sentences, prompt, options, is_query=True, use_predictor=use_predictor)

    @overload
    def encode_document(
        self,
        sentences: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        convert_to_tensor: Literal[False] = False,
        normalize_embeddings: bool | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        ranges: Vectors | None = None,
    ) -> np.ndarray: ...

    @overload
    def encode_document(
        self,
        sentences: str | Sequence[str],
        *,
        convert_to_tensor: Literal[True],
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        normalize_embeddings: bool | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        ranges: Vectors | None = None,
    ) -> Tensor: ...

    def encode_document(
        self,
        sentences: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        ranges: Vectors | None = None,
    ) -> np.ndarray | Tensor:
        """Embed documents, with the document prompt.

        Args:
            sentences: One text, which gives shape (K,), or several, which give shape (N, K).
            prompt: Text to prepend instead of `config.document_prompt`.
            prompt_name: `query` or `document`. Default: `document`.
            batch_size: See `encode`, as for all options below.
            show_progress_bar: Show a progress bar.
            convert_to_tensor: Return a tensor on the CPU instead of an array.
            normalize_embeddings: Scale vectors to unit length, after truncation, or not.
            device: Move the model there first; it stays there.
            precision: `float32`, `int8`, `uint8`, `binary` or `ubinary`.
            truncate_dim: Keep the first coordinates only.
            ranges: For `int8` and `uint8`: minimum and maximum of each coordinate, shape (2, K).

        Returns:
            Vectors in the order of the input, as from `encode`. Compare them with `similarity`.

        Raises:
            ValueError: If an option has no such value, an item is not a string, or ranges cannot be computed.

        Example:
            >>> model.encode_document(["a text", "another"], precision="binary").shape  # doctest: +SKIP
            (2, 96)
        """
        options = _Options(
            batch_size,
            show_progress_bar,
            convert_to_tensor,
            normalize_embeddings,
            device,
            precision,
            truncate_dim,
            ranges,
        )
        return self._encode(sentences, self._prompt(prompt, prompt_name, "document"), options, is_query=False)

    def similarity(self, a: Vectors, b: Vectors) -> Tensor:
        """Compare every vector of `a` with every vector of `b`, by `config.similarity_fn_name`.

        Args:
            a: Shape (N, K), or (K,) for one vector: an array, a tensor or a list of vectors, of any number type.
            b: Shape (M, K), or (K,).

        Returns:
            Float32, shape (N, M), on the device of `a`. A higher value is a better match; for `euclidean`, it is the
            negative distance.

        Raises:
            ValueError: If the shapes do not fit.

        Example:
            >>> queries = model.encode_query(["a question"])  # doctest: +SKIP
            >>> documents = model.encode_document(["a text", "another"])  # doctest: +SKIP
            >>> model.similarity(queries, documents).shape  # doctest: +SKIP
            torch.Size([1, 2])
        """
        a_NK, b_MK = (torch.atleast_2d(_float_tensor(vectors)) for vectors in (a, b))
        if a_NK.ndim != 2 or b_MK.ndim != 2 or a_NK.shape[1] != b_MK.shape[1]:
            raise ValueError(
                f"`similarity` compares vectors of one width, got shapes {tuple(a_NK.shape)} and {tuple(b_MK.shape)}."
            )
        b_MK = b_MK.to(a_NK.device)
        name = self.config.similarity_fn_name
        if name == "euclidean":
            return -torch.cdist(a_NK, b_MK)
        if name == "cosine":
            a_NK, b_MK = nn.functional.normalize(a_NK, dim=-1), nn.functional.normalize(b_MK, dim=-1)
        return a_NK @ b_MK.T

    def similarity_pairwise(self, a: Vectors, b: Vectors) -> Tensor:
        """Compare the first vector of `a` with the first of `b`, the second with the second, and so on.

        Args:
            a: Shape (N, K), or (K,) for one vector: an array, a tensor or a list of vectors, of any number type.
            b: The same shape.

        Returns:
            Float32, shape (N,), or () for one vector, on the device of `a`: the diagonal of `similarity(a, b)`.

        Raises:
            ValueError: If the shapes differ.

        Example:
            >>> vectors = model.encode(["a text", "another"])  # doctest: +SKIP
            >>> model.similarity_pairwise(vectors, vectors)  # doctest: +SKIP
            tensor([1.0000, 1.0000])
        """
        a_NK, b_NK = _float_tensor(a), _float_tensor(b)
        if a_NK.shape != b_NK.shape or a_NK.ndim not in (1, 2):
            raise ValueError(
                f"`similarity_pairwise` compares equal numbers of vectors of one width, got shapes "
                f"{tuple(a_NK.shape)} and {tuple(b_NK.shape)}."
            )
        b_NK = b_NK.to(a_NK.device)
        name = self.config.similarity_fn_name
        if name == "euclidean":
            return -torch.linalg.vector_norm(a_NK - b_NK, dim=-1)
        if name == "cosine":
            a_NK, b_NK = nn.functional.normalize(a_NK, dim=-1), nn.functional.normalize(b_NK, dim=-1)
        return (a_NK * b_NK).sum(-1)

    def relevance_probability(self, scores: Vectors) -> Tensor:
        """Tell how probable it is that the best document is relevant, from its score and its margin over the second.

        This was fitted to held-out queries (`config.relevance_calibration`), and holds for queries and documents like
        those. A value below .5 means: probably nothing relevant.

        Args:
            scores: The similarities of a query to at least two documents, the best two among them, in any order: shape
                (K,), or (Q, K) for several queries. They are those of `similarity` for whole vectors: neither
                truncated, nor quantized, nor from the predictor.

        Returns:
            Probabilities, float32, shape (), or (Q,).

        Raises:
            ValueError: If the model has no calibration, or a query has fewer than two scores.

        Example:
            >>> scores = model.similarity(model.encode_query(["a question"]), documents)  # doctest: +SKIP
            >>> model.relevance_probability(scores)  # doctest: +SKIP
            tensor([0.8312])
        """
        if self.config.relevance_calibration is None:
            raise ValueError(
                "`relevance_probability` needs a model with a calibration, got one without: train with at least 100 "
                "held-out queries."
            )
        return relevance_probability(self.config.relevance_calibration, scores)

    def _prompt(self, prompt: str | None, prompt_name: str | None, default_name: str | None) -> str:
        if prompt is not None:
            return prompt
        prompt_name = default_name if prompt_name is None else prompt_name
        if prompt_name is None:
            return ""
        known = {"query": self.config.query_prompt, "document": self.config.document_prompt}
        if prompt_name not in known:
            raise ValueError(
                f"`prompt_name` must be one of {', '.join(known)}, got {prompt_name!r}: give any other prompt as the "
                "text `prompt`."
            )
        return known[prompt_name]

    def num_queries(self, *, is_query: bool) -> int | None:
        """Return the `num_predicted` of a forward pass over texts of one side.

        Only a model whose documents keep the encoder's vectors tells the sides apart; a text of unknown side is a
        document there, so that an index made by any other method fits.
        """
        return 0 if self.config.freeze_documents and not is_query else None

    @torch.no_grad()  # not inference mode, whose tensors cannot be trained on
    def _encode(
        self,
        sentences: str | Sequence[str],
        prompt: str,
        options: _Options,
        *,
        is_query: bool,
        use_predictor: bool = False,
    ) -> np.ndarray | Tensor:
        if not isinstance(sentences, Iterable):
            raise ValueError(f"Texts to encode must be a string or a list of strings, got {type(sentences).__name__}.")
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        check_texts(texts)
        options.check(len(texts), self.config.output_dim)
        num_queries = self.num_queries(is_query=is_query)
        vectors_ND = _embed(self, texts, prompt, options, num_queries, use_predictor)
        vectors_NK = options.apply(vectors_ND, has_unit_vectors=self.config.has_unit_vectors)
        vectors = vectors_NK[0] if isinstance(sentences, str) else vectors_NK
        return vectors if options.convert_to_tensor else vectors.numpy()


def check_texts(texts: Sequence[Any]) -> None:
    """Raise a ValueError that names the place of the first value that is not a text."""
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"Texts to encode must be strings, got {type(text).__name__} at position {position}.")


def _embed(
    model: Any, texts: list[str], prompt: str, options: _Options, num_queries: int | None, use_predictor: bool
) -> Tensor:
    """Return (N, D) float32 vectors on the CPU."""
    if options.device is not None:
        model.to(options.device)
    # Sort by length to reduce padding; longest first, so that memory runs out early if at all.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    batch_size = options.batch_size or default_batch_size(model.device, model.config.max_length)
    vectors_ND = torch.empty(len(texts), model.config.output_dim)
    was_training, start = model.training, 0
    model.eval()
    try:
        with tqdm(total=len(texts), desc="Encoding", unit="text", disable=not options.show_progress_bar) as bar:
            while start < len(texts):
                rows = order[start : start + batch_size]
                vectors_BD = _embed_if_it_fits(model, [texts[row] for row in rows], prompt, num_queries, use_predictor)
                if vectors_BD is None:
                    batch_size = len(rows) // 2
                    continue
                vectors_ND[rows] = vectors_BD
                start += len(rows)
                bar.update(len(rows))
    finally:
        model.train(was_training)
    return vectors_ND


def _embed_if_it_fits(
    model: Any, texts: list[str], prompt: str, num_queries: int | None, use_predictor: bool
) -> Tensor | None:
    """Return (B, D) float32 vectors on the CPU, or None if the device has no memory for several texts at once."""
    try:
        tokens = model.tokenize(texts, prompt).to(model.device)
        output = model(**tokens, num_predicted=num_queries, return_dict=True)
        return (output.predictions if use_predictor else output.embeddings).float().cpu()
    except torch.OutOfMemoryError:
        if len(texts) == 1:
            raise
    # Outside the handler, whose error holds the tensors of the attempt.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def tokenize(tokenizer: Any, texts: Sequence[str], *, max_length: int) -> Any:
    """Tokenize, truncate and pad to the longest: `input_ids` and `attention_mask`, (B, T) tensors."""
    found = token_ids(tokenizer, texts, max_length=max_length)
    return pad(tokenizer, [ids or [tokenizer.pad_token_id] for ids in found])


def pad(tokenizer: Any, token_ids: Sequence[Sequence[int]]) -> Any:
    """Pad on the right, to the longest: `input_ids` and `attention_mask`, (B, T) tensors.

    On the left, encoders with absolute positions would number the tokens of a text by the others in its batch.
    """
    return tokenizer.pad({"input_ids": token_ids}, padding_side="right", return_tensors="pt")


def token_ids(tokenizer: Any, texts: Sequence[str], *, max_length: int) -> list[list[int]]:
    """Return what `tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]` returns, faster.

    Of a long text, only the first words are read, and more of them until they give `max_length` tokens. This changes
    nothing for tokenizers whose tokens end where words do. A text without spaces and line breaks is read whole.
    """
    if tokenizer.truncation_side != "right":
        return _ids(tokenizer, list(texts), max_length)
    found: list[list[int]] = [[]] * len(texts)
    rows, num_characters = list(range(len(texts))), _CHARACTERS_PER_TOKEN * max_length
    while rows:
        begun = [_beginning(texts[row], num_characters) for row in rows]
        too_short = []
        for row, text, ids in zip(rows, begun, _ids(tokenizer, begun, max_length), strict=True):
            found[row] = ids
            if len(text) < len(texts[row]) and (not text or len(ids) < max_length):
                too_short.append(row)
        rows, num_characters = too_short, 2 * num_characters
    return found


def _beginning(text: str, num_characters: int) -> str:
    """Return the whole words before some character, which may be none."""
    if len(text) <= num_characters:
        return text
    return text[: max(text.rfind(space, 0, num_characters) for space in (" ", "\n")) + 1].rstrip()


def _ids(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Tokenize without offsets and masks where the tokenizer has a backend in Rust that agrees with it."""

    def by_transformers(texts: list[str]) -> list[list[int]]:
        options = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
        return tokenizer(texts, return_token_type_ids=False, **options)["input_ids"]

    if not tokenizer.is_fast or len(texts) <= _NUM_COMPARED:
        return by_transformers(texts)
    # A tokenizer may do more than its backend. This call also sets truncation and padding in the backend.
    expected = by_transformers(texts[:_NUM_COMPARED])
    found = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
    return found if found[:_NUM_COMPARED] == expected else by_transformers(texts)


def _float_tensor(vectors: Vectors) -> Tensor:
    """Convert to float32, without a copy where possible."""
    if isinstance(vectors, Tensor):
        return vectors.float()
    if isinstance(vectors, np.ndarray):
        return torch.from_numpy(np.require(vectors, np.float32, ["C", "W"]))
    return torch.stack([_float_tensor(one) if np.ndim(one) else torch.tensor(float(one)) for one in vectors])
