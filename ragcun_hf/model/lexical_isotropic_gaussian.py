# Licensed under the Apache License, Version 2.0. This file travels with every published model.
"""The lexical half of a feature: which words a text has, as a vector computed from the encoder's own token ids.

    token ids -> saturated counts x inverse document frequencies -> L principal directions of a corpus -> unit length

An encoder blurs rare words. Beside its features, the lexical half keeps them, so that one vector and one index find
both meanings and exact words. It is fitted to documents without labels, and needs no training.

Shape letters: N = documents, B = texts, T = tokens per text, V = tokens in the vocabulary, L = width.
"""

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

# A token that occurs often counts for more than one that occurs once, but at most 1 + _K1 times as much, as in BM25.
_K1 = 1.5
_MAX_FITTED = 100_000  # documents that the directions are computed from; all count for the frequencies
_OVERSAMPLING, _POWER_ITERATIONS = 64, 3  # of the randomized singular value decomposition
_MOST_WEIGHT = 0.4  # of exact words, beside a weight of 1 for meaning


def lexical_weight(share: float) -> float:
    """Choose the share of exact words in the similarity, without labels, by how many words the directions hold.

    L directions blur the words of a large collection. Where they hold a third of them, as in SciFact and NFCorpus,
    exact words gain most at a weight of .3 to .8 beside 1 for meaning; where they hold a fifth, questions to the
    passages of a mixed collection gain up to .15 and lose from there on. So the weight is 0 where they hold a tenth,
    and grows with the share. The measurements are in EXPERIMENTS.md. Pseudo-queries cut from documents cannot choose
    it: they share words with their documents and always ask for more.

    >>> [round(lexical_weight(share), 3) for share in (0.1, 0.2, 0.3, 0.5)]
    [0.0, 0.13, 0.231, 0.286]
    """
    weight = min(max(1.5 * (share - 0.1), 0.0), _MOST_WEIGHT)
    return weight / (1 + weight)


class LexicalHalf(nn.Module):
    """Map token ids to vectors of unit length whose inner products tell how many rare words two texts share.

    `table` (V, L) holds a vector per token, scaled by its inverse document frequency; it is zero for tokens that the
    corpus does not have, and before `fit`. It is kept in float16, which loses nothing that a ranking would show.
    """

    table: Tensor

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(vocab_size, dim, dtype=torch.float16))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (B, L) float32 for (B, T) tokens; a text without a known token gets the zero vector."""
        present_BT = attention_mask.bool()
        is_same_BTT = input_ids.unsqueeze(1) == input_ids.unsqueeze(2)  # smaller than counts of a whole vocabulary
        counts_BT = (is_same_BTT & present_BT.unsqueeze(1)).sum(dim=2)
        # Every occurrence gets an equal part of the token's saturated count.
        weights_BT = present_BT * (1 + _K1) / (counts_BT + _K1)
        vectors_BTL = nn.functional.embedding(input_ids, self.table).float()
        # Autocast would round the product, so that training sees other vectors than `encode`.
        with torch.autocast(input_ids.device.type, enabled=False):
            return nn.functional.normalize((weights_BT.unsqueeze(1) @ vectors_BTL).squeeze(1), dim=-1)

    def resize(self, vocab_size: int) -> None:
        """Change the number of tokens; new ones are unknown."""
        kept = self.table[:vocab_size]
        self.table = torch.cat([kept, kept.new_zeros(vocab_size - len(kept), kept.shape[1])])

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` was called, or a fitted table was loaded."""
        return bool(self.table.any())

    @torch.no_grad()
    def fit(self, documents: Iterable[list[int]], *, ignored: Iterable[int] = ()) -> float:
        """Compute the table from the token ids of documents, read once and in their order.

        A direction is divided by the square root of its singular value, so that common words do not drown rare ones.

        Args:
            documents: The token ids of each document.
            ignored: Tokens that say nothing of a text, such as those of a prompt.

        Returns:
            The share of the documents' words that the directions hold, in [0, 1]: the mean squared length of a
            document's vector of words, of unit length, after the projection to them.

        Raises:
            ValueError: If fewer than two documents have a token.

        Source:
            Deerwester et al., "Indexing by latent semantic analysis", JASIS 41(6), 1990; saturation as in Robertson
            and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
        """
        vocab_size, dim = self.table.shape
        corpus = _Corpus(documents, vocab_size)
        frequencies_V, num_documents = corpus.frequencies_V, corpus.num_documents
        idf_V = np.log1p((num_documents - frequencies_V + 0.5) / (frequencies_V + 0.5)).astype(np.float32)
        idf_V[[token for token in ignored if token < vocab_size]] = 0.0
        rows_NV = corpus.weighted(idf_V)
        directions_VK, singular_K = _directions(rows_NV, dim)
        table_VL = torch.zeros(vocab_size, dim)
        table_VL[:, : len(singular_K)] = torch.from_numpy(idf_V)[:, None] * directions_VK * singular_K.rsqrt()
        # The scale is free, as the output has unit length; this one keeps float16 far from its ends.
        self.table.copy_(table_VL / table_VL.abs().max().clamp_min(1e-9))
        return float(singular_K.square().sum() / corpus.num_rows)


class _Corpus:
    """Token counts of documents: `frequencies_V` says how many documents have a token, of all `num_documents`.

    The counts of a sample are kept, in which every document is as likely as any other (Vitter, "Random sampling with a
    reservoir", 1985).
    """

    def __init__(self, documents: Iterable[list[int]], vocab_size: int) -> None:
        self.frequencies_V = np.zeros(vocab_size)
        self.num_documents = 0
        sample: list[tuple[np.ndarray, np.ndarray]] = []
        random = np.random.default_rng(0)
        for ids in documents:
            tokens, counts = np.unique(np.asarray(ids, dtype=np.int32), return_counts=True)
            if len(tokens) and tokens[-1] >= vocab_size:
                raise ValueError(
                    f"The tokenizer has a token {tokens[-1]}, but the encoder only {vocab_size} tokens: call "
                    "`resize_token_embeddings` first."
                )
            self.frequencies_V[tokens] += 1
            place = self.num_documents
            if place >= _MAX_FITTED:
                place = int(random.integers(self.num_documents + 1))
            if place < _MAX_FITTED:
                sample[place : place + 1] = [(tokens, counts.astype(np.float32))]
            self.num_documents += 1
        self.num_rows = len(sample)
        self._ends = np.cumsum([0, *(len(tokens) for tokens, _ in sample)])
        self._tokens = np.concatenate([tokens for tokens, _ in sample] or [np.zeros(0, np.int32)])
        self._counts = np.concatenate([counts for _, counts in sample] or [np.zeros(0, np.float32)])

    def weighted(self, idf_V: np.ndarray) -> Tensor:
        """Return the sample as rows (N, V) of unit length, sparse."""
        values = self._counts * (1 + _K1) / (self._counts + _K1) * idf_V[self._tokens]
        numbers = np.repeat(np.arange(self.num_rows), np.diff(self._ends))
        lengths_N = np.sqrt(np.bincount(numbers, weights=values.astype(np.float64) ** 2, minlength=self.num_rows))
        if (lengths_N > 0).sum() < 2:
            raise ValueError(
                f"The lexical half is fitted to at least two documents with words, got {self.num_documents} "
                "documents: give more of the texts to search."
            )
        values = (values / np.maximum(lengths_N, 1e-9)[numbers]).astype(np.float32)
        ends, tokens = torch.from_numpy(self._ends), torch.from_numpy(self._tokens.astype(np.int64))
        size = (self.num_rows, len(idf_V))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls all its sparse tensors a beta
            return torch.sparse_csr_tensor(ends, tokens, torch.from_numpy(values), size, check_invariants=True)


def _directions(rows_NV: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return right singular vectors (V, K), K <= dim, and their singular values (K,), none of them 0.

    Source:
        Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53(2), 2011.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        num_vectors = min(dim + _OVERSAMPLING, *rows_NV.shape)
        _, singular_K, vectors_VK = torch.svd_lowrank(rows_NV, q=num_vectors, niter=_POWER_ITERATIONS)
    is_real = (singular_K > 1e-4 * singular_K[0]) & (torch.arange(len(singular_K)) < dim)
    return vectors_VK[:, is_real], singular_K[is_real]
