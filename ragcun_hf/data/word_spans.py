"""Find the words and sentences of a text in any script, as spans: pairs of start and end positions."""

from __future__ import annotations

import re

# Scripts written without spaces: Thai, Lao, Myanmar, Khmer, kana, Chinese and Japanese ideographs.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_LONGEST_UNSPACED_WORD = 12
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof sr jr st vs etc al cf e.g i.e eg ie fig figs eq eqs sec ch no nos vol pp p ed eds approx ca "
    "inc ltd co corp dept univ gen col lt sgt capt rev hon jan feb mar apr jun jul aug sep sept oct nov dec a.m p.m "
    "u.s u.k u.n z.b d.h bzw usw bspw vgl nr abb hr fr bl av p.ex env".split()
)
_STOP = r"[.!?\u2026\u061f\u06d4\u0964\u0965\u1362\u17d4]"
# A sentence may end at a stop, with closing quotes or brackets, if whitespace follows; Chinese and Japanese stops and
# paragraph breaks need no whitespace. A run of stops is tried only from its start: a million dots would take hours.
_POSSIBLE_END = re.compile(
    rf"""(?<!{_STOP})(?P<stop>{_STOP}+)["'\u201d\u2019\u00bb)\]]*(?=\s)"""
    r"""|[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\u201d\u2019\uff09"')]*"""
    r"""|(?<=\S)(?=\s*\n\s*\n)"""
)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return the spans of the words in order; everything between them is whitespace.

    A word is a run without whitespace, punctuation included. In scripts without spaces, a run of more than 12
    characters may be a whole sentence: there, each character counts as a word.

    >>> [text[a:b] for text in ["Two words."] for a, b in word_spans(text)]
    ['Two', 'words.']
    """
    spans: list[tuple[int, int]] = []
    for match in re.finditer(r"\S+", text):
        start, end = match.span()
        unspaced = len(_UNSPACED.findall(match[0])) if end - start > _LONGEST_UNSPACED_WORD else 0
        if 2 * unspaced > end - start:
            spans.extend((position, position + 1) for position in range(start, end))
        else:
            spans.append((start, end))
    return spans


def has_two_words(text: str) -> bool:
    """Return whether a text can be masked or split."""
    return len(word_spans(text)) >= 2


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return the spans of the sentences in order, without surrounding whitespace, judged by punctuation alone.

    A stop ends a sentence if whitespace follows and the next word does not start in lower case, but not after a common
    abbreviation or an initial. A paragraph break always ends a sentence.

    >>> text = "Dr. Smith paid 3.50 euros. Why? See Fig. 2."
    >>> [text[a:b] for a, b in sentence_spans(text)]
    ['Dr. Smith paid 3.50 euros.', 'Why?', 'See Fig. 2.']
    """
    ends = [match.end() for match in _POSSIBLE_END.finditer(text) if not match["stop"] or _ends_sentence(text, match)]
    spans = []
    start = 0
    for end in [*ends, len(text)]:
        piece = text[start:end]
        if piece.strip():
            leading = len(piece) - len(piece.lstrip())
            spans.append((start + leading, start + len(piece.rstrip())))
        start = end
    return spans


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    following = re.match(r"\s+[\"'\u201c\u2018\u00ab(\[]*(\S)", text[match.end() : match.end() + 40])
    if following and following[1].islower():
        return False
    if match["stop"] != ".":
        return True
    before = text[max(0, match.start() - 40) : match.start()].split()
    word = before[-1].lstrip("\"'\u201c\u2018\u00ab([") if before else ""
    is_initial = len(word) == 1 and word.isupper()
    return not is_initial and word.lower() not in _ABBREVIATIONS
