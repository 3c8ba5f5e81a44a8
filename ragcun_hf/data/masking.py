"""Masked views: a text with some of its words masked, as a query for the text itself.

Which words are masked depends on the seed, the text's position and the epoch only, so every process
and every run masks alike, and each epoch masks anew. Needs neither torch nor a tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

from ..errors import UserError
from .training_rows import DrawnRows
from .word_spans import word_spans

MaskKind = Literal["word", "span"]
MEAN_SPAN_WORDS = 3.0  # close to the 3.8 subwords (capped at 10) of SpanBERT, arXiv:1907.10529, section 3.1
LONGEST_SPAN_WORDS = 10


def maskable(text: str) -> bool:
    """Tell whether a text has the two words that masking needs."""
    return len(word_spans(text)) >= 2


def mask_words(text: str, probability: float, *, rng: random.Random, mask_token: str = "[MASK]") -> str:
    """Mask single words, each with the same probability.

    Args:
        text: Any text.
        probability: Expected share of words masked, in (0, 1). At least one word is masked and at
            least one kept, so short texts have another share.
        rng: Source of the choice.
        mask_token: What stands for each masked word. Give the tokenizer's own (`tokenizer.mask_token`:
            "[MASK]" for BERT and MiniLM, "<mask>" for MPNet and RoBERTa), or it is read as ordinary
            characters. "" removes the words, which suits every encoder.

    Returns:
        The masked text; the text itself if it has fewer than two words.

    Example:
        >>> mask_words("one two three four", 0.5, rng=random.Random(0))
        '[MASK] two three [MASK]'
    """
    spans = word_spans(text)
    if len(spans) < 2:
        return text
    chosen = set(rng.sample(range(len(spans)), _words_to_mask(len(spans), probability, rng)))
    return _replace(text, spans, chosen, mask_token, one_per_run=False)


def mask_spans(text: str, probability: float, *, rng: random.Random, mask_token: str = "[MASK]") -> str:
    """Mask runs of words; a run's length is geometric with mean 3, at most 10.

    Args:
        text: Any text.
        probability: Expected share of words masked, in (0, 1); at least one is masked and one kept.
        rng: Source of the choice.
        mask_token: As for `mask_words`, but one stands for a whole run, so its length does not show.

    Returns:
        The masked text; the text itself if it has fewer than two words.

    Example:
        >>> mask_spans("one two three four five six", 0.5, rng=random.Random(0))
        'one two three [MASK]'
    """
    spans = word_spans(text)
    if len(spans) < 2:
        return text
    wanted = _words_to_mask(len(spans), probability, rng)
    chosen: set[int] = set()
    while len(chosen) < wanted:
        length = min(_span_length(rng), wanted - len(chosen))
        start = rng.randrange(len(spans) - length + 1)
        chosen.update(range(start, start + length))
    return _replace(text, spans, chosen, mask_token, one_per_run=True)


class MaskedViews(DrawnRows):
    """A map-style dataset of masked texts and their originals, for `torch.utils.data.DataLoader`.

    Args:
        documents: The texts. Those with fewer than two words cannot be masked: leave them out first
            (`maskable`).
        kind: "word" masks single words, "span" runs of words.
        probability: Expected share of words masked, in (0, 1).
        seed: Another seed masks other words.
        mask_token: As for `mask_words`.

    Raises:
        UserError: If the kind is unknown or the probability is not between 0 and 1.

    Example:
        >>> views = MaskedViews(["a red fox ran"], kind="word", probability=0.3, seed=1)
        >>> views[0]
        {'query': 'a red [MASK] [MASK]', 'positive': 'a red fox ran', 'negative': []}
    """

    def __init__(
        self,
        documents: Sequence[str],
        kind: MaskKind = "word",
        probability: float = 0.2,
        seed: int = 0,
        mask_token: str = "[MASK]",
    ) -> None:
        if kind not in get_args(MaskKind):
            raise UserError(f"expected a mask kind of {', '.join(get_args(MaskKind))}, got {kind!r}: name one of them")
        if not 0 < probability < 1:
            raise UserError(f"expected a mask probability between 0 and 1, got {probability}: set it to e.g. 0.2")
        self.documents = documents
        self.kind = kind
        self.probability = probability
        self.seed = seed
        self.mask_token = mask_token
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Mask anew; call before each epoch (workers kept alive by the loader do not notice)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, str | list[str]]:
        text = self.documents[index]
        rng = view_rng(self.seed, self.epoch, index if index >= 0 else index + len(self))
        mask = mask_words if self.kind == "word" else mask_spans
        return {
            "query": mask(text, self.probability, rng=rng, mask_token=self.mask_token),
            "positive": text,
            "negative": [],
        }


def view_rng(seed: int, epoch: int, index: int) -> random.Random:
    """Return the source of chance for one text in one epoch, the same in every process and version.

    Args:
        seed: The run's seed.
        epoch: Counted from 0.
        index: Position of the text, counted from 0.

    Returns:
        A generator of its own, so that the order in which texts are asked for does not matter.

    Example:
        >>> view_rng(0, 1, 2).random() == view_rng(0, 1, 2).random() != view_rng(0, 2, 1).random()
        True
    """
    return random.Random(f"{seed}/{epoch}/{index}")  # strings are seeded through SHA-512, not `hash`


def _words_to_mask(words: int, probability: float, rng: random.Random) -> int:
    # Rounded by chance, so that the expected share is right for short texts, too.
    count = int(words * probability + rng.random())
    return min(max(count, 1), words - 1)


def _span_length(rng: random.Random) -> int:
    length = 1
    while length < LONGEST_SPAN_WORDS and rng.random() > 1 / MEAN_SPAN_WORDS:
        length += 1
    return length


def _replace(text: str, spans: list[tuple[int, int]], chosen: set[int], mask_token: str, *, one_per_run: bool) -> str:
    """Put the mask token for the chosen words; blanks between other words stay as they are."""
    pieces: list[str] = []
    for position, (start, end) in enumerate(spans):
        hidden = not mask_token or (one_per_run and position - 1 in chosen)
        if position in chosen and hidden:
            continue
        gap = text[spans[position - 1][1] : start] if position else ""
        pieces.append((gap if pieces else "") + (mask_token if position in chosen else text[start:end]))
    return "".join(pieces)
