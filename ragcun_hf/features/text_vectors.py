"""Vectors of texts that a function computes from tokens: each distinct text is computed once, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.documents import text_digest
from ..data.mapped_column import take
from ..distributed import broadcast_from_first, gather_objects, rank, world_size
from .encoder_loop import BatchLimits, EncodingProgress, WorkShare, encode_in_batches
from .feature_cache import FeatureCache, key_folder
from .tokenizing import text_size

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from .encoder_backends import ComputeFeatures

TEXTS_AT_ONCE = 32_768  # texts of a large corpus in memory; batches of similar length are formed among them
TEXTS_PER_ROUND = 262_144  # processes wait for each other after a round; long rounds keep that wait small
_SIZES_IN_SAMPLE = 1_024  # texts whose size stands for that of all
_GAIN = 1.25  # what the faster of two functions computes in the time of the other, at least about
_MAX_READS = 3  # of vectors that another process keeps removing; after that, they are not kept


class TextVectors:
    """Vectors (N, `dim`) of texts, computed from the tokens of a model's tokenizer, and cached under a key.

    `make_compute` returns the function from tokens to vectors; it is called when texts are computed, and what it
    returned is dropped afterwards. `key_parts` returns, for a prompt, all that changes a vector. Without a
    `cache_folder`, nothing is kept. With `is_shared`, all processes call `fill` with the same texts; each computes a
    part and reads what the others wrote. Unless `is_padded`, only texts of equal length are computed together, at
    least on a processor.
    """

    def __init__(
        self,
        model: IsotropicGaussianModel,
        make_compute: Callable[[], ComputeFeatures],
        key_parts: Callable[[str], dict[str, Any]],
        *,
        dim: int,
        dtype: str,
        cache_folder: str | Path | None,
        description: str | None = None,
        is_shown: bool = True,
        is_shared: bool = False,
        is_padded: bool = True,
    ) -> None:
        self._model, self._make_compute, self._key_parts = model, make_compute, key_parts
        self._dim, self._dtype, self._cache_folder = dim, dtype, cache_folder
        self._description, self._is_shown, self._is_shared = description, is_shown, is_shared
        self._is_padded = is_padded
        self._caches: dict[str, FeatureCache] = {}
        self._limits: dict[str, BatchLimits] = {}  # by device; what was learned about its memory is kept
        self.num_asked = self.num_computed = 0

    @property
    def is_kept(self) -> bool:
        """Whether there is a cache."""
        return self._cache_folder is not None

    @property
    def held(self) -> tuple[int, int]:
        """Texts and bytes in the caches that were used."""
        caches = self._caches.values()
        return sum(len(cache) for cache in caches), sum(cache.num_bytes for cache in caches)

    def fill(self, texts: Sequence[str], *, prompt: str = "") -> None:
        """Fill the cache with the vectors of texts, without reading them. Without a cache, do nothing."""
        if not self.is_kept:
            return
        with self._progress() as progress:
            for rows in _rounds(texts):
                self._encode_round(texts, rows, prompt, progress)

    def read(self, texts: list[str], *, prompt: str = "") -> np.ndarray:
        """Return the vectors of distinct texts, which may differ between processes; compute what the cache lacks."""
        if self._cache_folder is not None:
            return self._read_through(self._cache(prompt), texts, prompt)
        self.num_asked += len(texts)
        return self._computed(texts, prompt)

    def size_missing(self, texts: Sequence[str], *, prompt: str = "") -> int:
        """Estimate how many characters of the texts the cache lacks, of which it makes no folder; 0 only for none.

        Texts after the first round that lacks some count as missing: to look at those of a whole corpus takes long.
        """
        rows: Sequence[int] = range(len(texts))
        num_later = 0
        if self._cache_folder and key_folder(self._cache_folder, self._key_parts(prompt), dtype=self._dtype).is_dir():
            rows = []
            for part in _rounds(texts):
                _, rows = self._missing(texts, part, self._cache(prompt))
                num_later = len(texts) - part.stop
                if rows:
                    break
        sample = take(texts, rows[:: max(1, len(rows) // _SIZES_IN_SAMPLE)])
        size = sum(text_size(text, max_length=self._model.config.max_length) for text in sample)
        return size * (len(rows) + num_later) // max(1, len(sample))

    def _encode_round(self, texts: Sequence[str], rows: range, prompt: str, progress: EncodingProgress) -> None:
        """Encode the rows that the cache lacks; of several processes, each encodes its part of them."""
        cache = self._cache(prompt)
        share = WorkShare(rank(), world_size()) if self._is_shared else WorkShare()
        find_missing = partial(self._missing, texts, rows, cache)
        # All processes use the answer of the first: a file written a moment later would change it.
        num_distinct, missing = broadcast_from_first(find_missing) if self._is_shared else find_missing()
        self.num_asked += num_distinct
        num_later = len(texts) - rows.stop
        names = cache.write_as_computed(self._encoded(texts, missing, prompt, progress, share, num_later))
        if self._is_shared:
            # Wait for the others, and open their files by name: a shared folder may list new files late.
            cache.open_shards(name for written in gather_objects(names) for name in written)

    def _missing(self, texts: Sequence[str], rows: range, cache: FeatureCache) -> tuple[int, list[int]]:
        """Return the number of distinct texts in the rows, and the first row of each one that the cache lacks."""
        digests: list[bytes] = []
        for start in range(rows.start, rows.stop, TEXTS_AT_ONCE):
            digests += [text_digest(text) for text in texts[start : min(start + TEXTS_AT_ONCE, rows.stop)]]
        _, places = np.unique(np.frombuffer(b"".join(digests), dtype="S16"), return_index=True)
        places.sort()
        missing = places[cache.missing([digests[place] for place in places])]
        return len(places), (rows.start + missing).tolist()

    def _read_through(self, cache: FeatureCache, texts: list[str], prompt: str) -> np.ndarray:
        digests = [text_digest(text) for text in texts]
        for _ in range(_MAX_READS):
            if missing := cache.missing(digests):  # pruned, or written by a machine whose files are not visible here
                with self._progress() as progress:
                    cache.write_as_computed(self._encoded(texts, missing, prompt, progress, WorkShare()))
            try:
                return cache.read(digests)
            except KeyError:  # pruned by another process in this moment
                continue
        return self._computed(texts, prompt)  # whoever keeps pruning costs time, and nothing else

    def _computed(self, texts: list[str], prompt: str) -> np.ndarray:
        """Compute the vectors of distinct texts in memory."""
        vectors = np.empty((len(texts), self._dim), dtype=np.float32)
        with self._progress() as progress:
            for batch, computed in self._batches(texts, prompt, progress):
                vectors[batch] = computed
        return vectors

    def _encoded(
        self,
        texts: Sequence[str],
        rows: list[int],
        prompt: str,
        progress: EncodingProgress,
        share: WorkShare,
        num_later: int = 0,
    ) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Encode rows; yield digests and features. Up to `num_later` texts follow in later rounds."""
        for start in range(0, len(rows), TEXTS_AT_ONCE):
            window = take(texts, rows[start : start + TEXTS_AT_ONCE])
            progress.num_upcoming = (len(rows) - start - len(window) + num_later) // share.num_processes
            for batch, features in self._batches(window, prompt, progress, share):
                yield [text_digest(window[position]) for position in batch], features

    def _batches(
        self, texts: list[str], prompt: str, progress: EncodingProgress, share: WorkShare | None = None
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Encode texts in evaluation mode; yield positions and features."""
        if not texts:
            return
        self.num_computed += len(texts)
        device = self._model.device
        limits = self._limits.setdefault(str(device), BatchLimits.of(device))
        if not self._is_padded:
            limits.padding_share = 0.0
        was_training = self._model.training
        self._model.eval()
        try:
            compute = self._make_compute()
            options: Any = {"prompt": prompt, "progress": progress, "share": share, "limits": limits}
            for batch, features in encode_in_batches(self._model, texts, compute=compute, **options):
                yield batch, features.numpy()
        finally:
            self._model.train(was_training)

    def _progress(self) -> EncodingProgress:
        is_first = not self._is_shared or rank() == 0
        return EncodingProgress(is_shown=self._is_shown and is_first)

    def _cache(self, prompt: str) -> FeatureCache:
        if prompt not in self._caches:
            self._caches[prompt] = FeatureCache(
                self._cache_folder or "",
                self._key_parts(prompt),
                feature_dim=self._dim,
                dtype=self._dtype,
                name=self._description,
            )
        return self._caches[prompt]


def _rounds(texts: Sequence[str]) -> Iterator[range]:
    for start in range(0, len(texts), TEXTS_PER_ROUND):
        yield range(start, min(start + TEXTS_PER_ROUND, len(texts)))


class QuickestVectors:
    """Vectors that two functions can compute alike: one that is ready, and a faster one that takes time to prepare.

    The second is used for a lot of text, unless the cache of the first holds much of it, or where its own cache holds
    more. `prepare` returns whether it works here; it is called before the first text is computed by it. Otherwise like
    [`TextVectors`], of which it takes two.
    """

    def __init__(
        self, ready: TextVectors, faster: TextVectors, prepare: Callable[[], bool], *, worth_it: int, is_shared: bool
    ) -> None:
        self._both, self._worth_it, self._is_shared = (ready, faster), worth_it, is_shared
        self._prepare = prepare
        self._is_prepared: bool | None = None

    @property
    def num_asked(self) -> int:
        """Texts so far."""
        return sum(each.num_asked for each in self._both)

    @property
    def num_computed(self) -> int:
        """Texts so far that no cache held."""
        return sum(each.num_computed for each in self._both)

    @property
    def held(self) -> tuple[int, int]:
        """Texts and bytes in the caches that were used."""
        texts, sizes = zip(*(each.held for each in self._both), strict=True)
        return sum(texts), sum(sizes)

    @property
    def are_used(self) -> tuple[bool, bool]:
        """Whether the ready function and the faster one were asked for a vector."""
        ready, faster = self._both
        return ready.num_asked > 0, faster.num_asked > 0

    def fill(self, texts: Sequence[str], *, prompt: str = "") -> None:
        """Fill the cache of the quicker one with the vectors of texts. Without a cache, do nothing."""
        if self._both[0].is_kept:
            self._choose(texts, prompt, is_shared=self._is_shared).fill(texts, prompt=prompt)

    def read(self, texts: list[str], *, prompt: str = "") -> np.ndarray:
        """Return the vectors of distinct texts, which may differ between processes; compute what no cache holds."""
        return self._choose(texts, prompt, is_shared=False).read(texts, prompt=prompt)

    def _choose(self, texts: Sequence[str], prompt: str, *, is_shared: bool) -> TextVectors:
        ready, faster = self._both

        def sizes() -> list[int]:
            return [each.size_missing(texts, prompt=prompt) for each in self._both]

        of_ready, of_faster = broadcast_from_first(sizes) if is_shared else sizes()
        is_little = of_faster >= of_ready and of_ready < self._worth_it
        if of_ready == 0 or is_little or of_faster > _GAIN * of_ready:
            return ready
        if of_faster == 0:
            return faster
        works = gather_objects(self._works_here()) if is_shared else [self._works_here()]
        return faster if all(works) else ready

    def _works_here(self) -> bool:
        if self._is_prepared is None:
            self._is_prepared = self._prepare()
        return self._is_prepared
