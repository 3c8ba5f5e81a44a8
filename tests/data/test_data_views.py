"""Masked and split views: the same for the same seed, new in each epoch, and no word is lost."""

import random
import subprocess
import sys
from collections import Counter

import pytest

from ragcun_hf.data.masking import LONGEST_SPAN_WORDS, MaskedViews, mask_spans, mask_words
from ragcun_hf.data.splitting import SplitViews, split_text
from ragcun_hf.data.word_spans import has_two_words, sentence_spans, word_spans
from ragcun_hf.errors import UserError

TEXT = " ".join(f"w{number}" for number in range(60))
TEXTS = [
    "Two words",
    "A sentence here.  Another   one there! And a third? Yes.",
    "line one\nline two\n\nnew paragraph\twith tab",
    "שלום עולם. מה שלומך? טוב",
    "e\u0301 fox 🦊 e\u0301 👩‍👩‍👧 nul\x00 end.",
    'Dr. Smith paid 3.50 euros. He left at 5 p.m. yesterday. "Why?" she asked.',
]
CONTIGUOUS = ["half", "random", "prefix", "suffix"]


def rngs(count):
    return [random.Random(seed) for seed in range(count)]


@pytest.mark.parametrize("mask", [mask_words, mask_spans])
@pytest.mark.parametrize("probability", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("words", [2, 3, 10])
def test_masking_always_masks_one_word_and_keeps_one(mask, probability, words):
    text = " ".join(TEXT.split()[:words])
    for rng in rngs(50):
        kept = mask(text, probability, rng=rng, mask_token="").split()
        assert 0 < len(kept) < words


@pytest.mark.parametrize("mask", [mask_words, mask_spans])
def test_the_share_of_masked_words_is_the_probability(mask):
    for probability in (0.15, 0.5):
        kept = sum(len(mask(TEXT, probability, rng=rng, mask_token="").split()) for rng in rngs(300))
        assert 1 - kept / (300 * 60) == pytest.approx(probability, abs=0.01)


def test_short_texts_have_the_right_share_on_average():
    text = " ".join(TEXT.split()[:8])
    kept = sum(len(mask_words(text, 0.2, rng=rng, mask_token="").split()) for rng in rngs(2000))
    assert 1 - kept / (2000 * 8) == pytest.approx(0.2, abs=0.01)


def test_word_masking_leaves_every_other_character_in_place():
    masked = mask_words("one\ttwo\n\nthree", 0.34, rng=random.Random(1), mask_token="<mask>")
    assert masked in ("<mask>\ttwo\n\nthree", "one\t<mask>\n\nthree", "one\ttwo\n\n<mask>")


def test_removed_words_leave_the_others_in_order():
    kept = mask_words(TEXT, 0.5, rng=random.Random(0), mask_token="").split()
    assert kept == [word for word in TEXT.split() if word in set(kept)]


def test_spans_are_longer_than_single_words_and_bounded():
    lengths = []
    for rng in rngs(200):
        kept = {int(word[1:]) for word in mask_spans(TEXT, 0.1, rng=rng, mask_token="").split()}
        hidden = [number for number in range(60) if number not in kept]
        runs = sum(number - 1 not in hidden for number in hidden)
        lengths.append(len(hidden) / runs)
    assert 1.5 < sum(lengths) / len(lengths) < 4
    assert max(lengths) <= LONGEST_SPAN_WORDS


def test_one_mask_token_replaces_a_whole_span():
    for rng in rngs(50):
        assert "[MASK] [MASK]" not in mask_spans(TEXT, 0.3, rng=rng)


def test_a_text_of_one_word_is_left_alone():
    for text in ("", "word", " word "):
        assert not has_two_words(text)
        assert mask_words(text, 0.5, rng=random.Random(0)) == text


def test_masked_views_repeat_and_change_with_epoch_seed_and_position():
    views = MaskedViews([TEXT, TEXT], "word", 0.2, seed=1)
    first = views[0]
    assert first == views[0] == MaskedViews([TEXT], "word", 0.2, seed=1)[0]
    assert first["positive"] == TEXT and first["negative"] == [] and len(views) == 2
    assert views[1]["query"] != first["query"] == views[-2]["query"]
    views.set_epoch(1)
    assert views[0]["query"] != first["query"]
    views.set_epoch(0)
    assert views[0] == first
    assert MaskedViews([TEXT], "word", 0.2, seed=2)[0] != first


def test_views_are_the_same_in_another_process():
    views = [MaskedViews([TEXT], "span", 0.2, seed=3)[0]["query"], SplitViews([TEXT], "random", seed=3)[0]["query"]]
    code = (
        "from ragcun_hf.data.masking import MaskedViews; from ragcun_hf.data.splitting import SplitViews; import sys; "
        "t = sys.argv[1]; print(MaskedViews([t], 'span', .2, seed=3)[0]['query']); "
        "print(SplitViews([t], 'random', seed=3)[0]['query'])"
    )
    run = subprocess.run([sys.executable, "-c", code, TEXT], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == views


def test_a_for_loop_over_views_ends():
    assert len(list(MaskedViews(TEXTS))) == len(list(SplitViews(TEXTS))) == len(TEXTS)


@pytest.mark.parametrize("probability", [0.0, 1.0, -1, 1.5])
def test_a_probability_outside_its_range_is_refused(probability):
    with pytest.raises(UserError, match="between 0 and 1"):
        MaskedViews(TEXTS, "word", probability)
    with pytest.raises(UserError, match="between 0 and 1"):
        SplitViews(TEXTS, "prefix", fraction=probability)


def test_an_unknown_kind_or_method_lists_the_known_ones():
    with pytest.raises(UserError, match="word, span"):
        MaskedViews(TEXTS, "letter")
    with pytest.raises(UserError, match="half, random, prefix, suffix, sentence"):
        SplitViews(TEXTS, "middle")


@pytest.mark.parametrize("method", [*CONTIGUOUS, "sentence"])
@pytest.mark.parametrize("text", [*TEXTS, TEXT])
def test_no_word_is_lost_and_neither_part_is_empty(method, text):
    for rng in rngs(20):
        query, rest = split_text(text, method, rng=rng)
        assert query and rest
        assert Counter(query.split()) + Counter(rest.split()) == Counter(text.split())


@pytest.mark.parametrize("method", CONTIGUOUS)
def test_two_contiguous_parts_make_up_the_text(method):
    for rng in rngs(20):
        query, rest = split_text(TEXT, method, rng=rng)
        assert TEXT in (f"{query} {rest}", f"{rest} {query}")


def test_each_method_splits_at_its_own_place():
    rng = random.Random(0)
    assert split_text("a b c d e", "half", rng=rng) == ("a b", "c d e")
    assert split_text("a b c d e", "prefix", rng=rng, fraction=0.4) == ("a b", "c d e")
    assert split_text("a b c d e", "suffix", rng=rng, fraction=0.4) == ("d e", "a b c")
    assert split_text("a b", "prefix", rng=rng, fraction=0.99) == ("a", "b")


def test_a_random_split_may_be_anywhere_and_the_shorter_part_is_the_query():
    seen = set()
    for rng in rngs(200):
        query, rest = split_text("a b c d e", "random", rng=rng)
        assert len(query.split()) <= len(rest.split())
        seen.add((query, rest))
    assert seen == {("a", "b c d e"), ("a b", "c d e"), ("d e", "a b c"), ("e", "a b c d")}


def test_a_sentence_split_takes_any_sentence_and_keeps_the_order_of_the_others():
    text = "One is here. Two is there. Three is gone."
    seen = {split_text(text, "sentence", rng=rng) for rng in rngs(50)}
    assert seen == {
        ("One is here.", "Two is there. Three is gone."),
        ("Two is there.", "One is here. Three is gone."),
        ("Three is gone.", "One is here. Two is there."),
    }


def test_a_single_sentence_is_halved():
    assert split_text("only one sentence here", "sentence", rng=random.Random(0)) == ("only one", "sentence here")


def test_a_text_too_short_to_split_is_refused():
    with pytest.raises(UserError, match="at least two words"):
        SplitViews(["word"])[0]


def test_split_views_change_with_the_epoch():
    views = SplitViews([TEXT], "random", seed=0)
    queries = set()
    for epoch in range(10):
        views.set_epoch(epoch)
        queries.add(views[0]["query"])
    assert len(queries) > 5


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Dr. Smith paid 3.14 euros. See Fig. 2. J. Doe et al. agree.", 3),
        ('It costs 5 p.m. or e.g. more. the U.S. Army? "Yes." Good!', 3),
        ("東京は首都です。人口は多い！そうですか？はい。", 4),
        ("你好。“再见。”他说。", 3),
        ("مرحبا. كيف حالك؟ بخير", 3),
        ("राम घर गया। सीता आई।", 2),
        ("No stop at all", 1),
        ("Title without stop\n\nA paragraph... that goes on. End", 3),
        ("", 0),
        (" \n ", 0),
        ("A row of dots " + "." * 200_000 + "x ends it. It is read once.", 2),
    ],
)
def test_sentences_are_counted_correctly(text, sentences):
    spans = sentence_spans(text)
    assert len(spans) == sentences, [text[a:b] for a, b in spans]
    assert "".join("".join(text[a:b] for a, b in spans).split()) == "".join(text.split())


def test_scripts_without_spaces_are_split_and_masked_by_character():
    text = "東京は日本の首都です。人口は多いと言われています。"
    assert len(word_spans(text)) == len(text)
    query, rest = split_text(text, "half", rng=random.Random(0))
    assert query + rest == text
    assert 0 < len(mask_words(text, 0.3, rng=random.Random(0), mask_token="")) < len(text)
    sentence, other = split_text(text, "sentence", rng=random.Random(0))
    assert {sentence, other} == {"東京は日本の首都です。", "人口は多いと言われています。"}


def test_long_words_of_spaced_scripts_stay_whole():
    assert len(word_spans("https://example.org/a/very/long/path Donaudampfschifffahrt")) == 2
