"""Pseudo-queries: where they come from, what is left of the document, and the views of both."""

import pytest

from ragcun_hf.data.pseudo_queries import PseudoQueryViews, draw_pseudo_queries

DOCUMENTS = [
    "The red fox sleeps near the river. It drinks water in the morning light. At night it runs fast through the wood.",
    "Bread is food for the bird. The bird sings near the river every morning, and the fox listens to its long song.",
    "One sentence without an end",
    "短い文です。長い文もあります。" * 3,
    "x",
    "",
]
COUNTS = {"sentence": 2, "span": 2, "keywords": 2}


def _of(queries, kind, document=None):
    return [each for each in queries if each.kind == kind and document in (None, each.document)]


def test_sentences_and_spans_come_from_their_document_and_leave_the_rest():
    queries = draw_pseudo_queries(DOCUMENTS, COUNTS, seed=1)
    for each in [*_of(queries, "sentence"), *_of(queries, "span")]:
        document = DOCUMENTS[each.document]
        assert each.text in document
        assert each.text.strip() == each.text != ""
        assert each.rest.strip()
        # By letters, as a sentence may stand in its document twice.
        assert sorted("".join((each.rest + each.text).split())) == sorted("".join(document.split()))


def test_spans_have_five_to_twelve_words():
    long = " ".join(f"w{number}" for number in range(40))
    lengths = {len(each.text.split()) for each in draw_pseudo_queries([long], {"span": 200}, seed=0)}
    assert lengths == set(range(5, 13))


def test_keywords_are_rare_words_of_the_document_in_its_order_each_once():
    queries = _of(draw_pseudo_queries(DOCUMENTS, COUNTS, seed=3), "keywords")
    assert {each.document for each in queries} == {0, 1}
    for each in queries:
        words = each.text.split()
        places = [DOCUMENTS[each.document].index(word) for word in words]
        assert places == sorted(places)
        assert len({word.lower() for word in words}) == len(words)
        assert each.rest is None
        # A word that no other document has, such as "sleeps", may be a misprint.
        assert {word.lower() for word in words} <= {
            "the",
            "red",
            "fox",
            "near",
            "river",
            "morning",
            "it",
            "bird",
            "its",
        }


def test_documents_too_short_for_a_kind_yield_none_of_it():
    queries = draw_pseudo_queries(DOCUMENTS, COUNTS, seed=0)
    assert not _of(queries, "sentence", 2)
    assert not [each for each in queries if each.document in (4, 5)]


def test_the_same_seed_draws_the_same_queries_and_another_one_others():
    first, again, other = (draw_pseudo_queries(DOCUMENTS, COUNTS, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_only_the_kinds_asked_for_are_drawn():
    assert {each.kind for each in draw_pseudo_queries(DOCUMENTS, {"span": 1})} == {"span"}


@pytest.mark.parametrize("documents", [[], [""], ["a", "b"]])
def test_documents_without_usable_text_yield_no_queries(documents):
    assert draw_pseudo_queries(documents, COUNTS) == []


def test_views_pair_each_query_with_its_whole_document():
    queries = draw_pseudo_queries(DOCUMENTS, COUNTS, seed=1)
    views = PseudoQueryViews(DOCUMENTS, queries)
    assert len(views) == len(queries)
    assert views.documents == DOCUMENTS
    row = views[3]
    assert row == {"query": queries[3].text, "positive": DOCUMENTS[queries[3].document], "negative": []}
