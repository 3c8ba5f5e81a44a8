"""Settings chosen by pseudo-queries: the measure, the rule, blending, and the commands end to end."""

import importlib
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.data.pseudo_queries import PseudoQuery
from ragcun_hf.errors import UserError
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.model.base_models import load_trained_model
from ragcun_hf.sweep import automatic
from ragcun_hf.sweep.automatic import Candidate, CandidateScore, choose_candidate, format_scores
from ragcun_hf.sweep.pseudo_validation import PseudoValidation
from ragcun_hf.trainer.record import blend_weights

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

ROOT = Path(__file__).resolve().parents[2]
WORDS = "sun moon star fish bird tree bread water music stone river light food piano array list red blue green".split()


# Blending


@pytest.fixture
def moved(tiny_encoder_folder):
    """A model at its start, and the weights of its head before and after a random change."""
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), use_predictor=True)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    generator = torch.Generator().manual_seed(1)
    trained = {name: weight + 0.3 * torch.randn(weight.shape, generator=generator) for name, weight in start.items()}
    return model, start, trained


def _projection(model, weights, features):
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return model(features=features).embeddings


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_blended_projection_interpolates_between_start_and_trained_outputs(moved, share):
    model, start, trained = moved
    features = torch.randn(7, 16)
    first, last = _projection(model, start, features), _projection(model, trained, features)
    between = _projection(model, blend_weights(start, trained, share), features)
    torch.testing.assert_close(between, (1 - share) * first + share * last, atol=1e-4, rtol=1e-4)


# The measure


def _slow_ndcg(queries, rests, documents, own):
    """One query at a time, with cosines in float64."""

    def unit(x):
        return x / np.linalg.norm(x)

    values = []
    for query, rest, row in zip(queries, rests, own, strict=True):
        mine = unit(query) @ unit(rest)
        place = sum(unit(query) @ unit(other) > mine for number, other in enumerate(documents) if number != row)
        values.append(1 / math.log2(place + 2) if place < 10 else 0.0)
    return np.array(values)


def test_pseudo_queries_search_for_the_rest_of_their_document_among_all_others(tiny_model):
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=8)) for _ in range(40)]
    queries = [
        PseudoQuery(number, ("sentence", "span")[number % 3 == 0], text[:15], text[15:])
        for number, text in enumerate(documents)
    ]
    store = FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False)
    validation = PseudoValidation(documents, queries, store, ("", ""))
    scores = validation.scores(tiny_model)
    encode = tiny_model.encode_query
    expected = _slow_ndcg(
        encode([each.text for each in queries]), encode([each.rest for each in queries]), encode(documents), range(40)
    )
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert 0 < scores.mean() < 1
    kinds = np.array([each.kind for each in queries])
    for kind in ("sentence", "span"):
        assert validation.weights[kinds == kind].sum() == pytest.approx(0.5)


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_other_similarities_find_a_document_that_is_its_own_rest_first(tiny_encoder_folder, similarity):
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), similarity_fn_name=similarity)
    documents = ["the sun", "bread and water", "a bird in the tree"]
    queries = [PseudoQuery(number, "span", text, text) for number, text in enumerate(documents)]
    store = FeatureStore(model, cache_folder=None, dtype="float32", show_progress=False)
    scores = PseudoValidation(documents, queries, store, ("", "")).scores(model)
    assert scores.max() == 1.0
    if similarity == "euclidean":
        assert (scores == 1.0).all()


# The rule


def _scores(*gains_and_errors):
    return [
        CandidateScore(Candidate(0.1 * number, "linear", 3.0), 0.5, 0.5 + gain, gain, error)
        for number, (gain, error) in enumerate(gains_and_errors)
    ]


@pytest.mark.parametrize(
    ("gains", "place"),
    [
        ([(0, 0), (0.02, 0.005), (0.03, 0.005)], 2),
        ([(0, 0), (0.01, 0.004)], 0),  # less than three standard errors
        ([(0, 0), (-0.01, 0.001)], 0),
        ([(0, 0)], 0),
    ],
)
def test_the_best_is_chosen_if_its_gain_is_significant(gains, place):
    scores = _scores(*gains)
    chosen = choose_candidate(scores)
    assert chosen is scores[place]
    (marked,) = [line for line in format_scores(scores, chosen).splitlines() if line.startswith("*")]
    assert f"{scores[place].gain:+.4f}" in marked


# The commands


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A file with 300 documents of three sentences."""
    monkeypatch.setattr(automatic, "LEAST_HELD_OUT", 20)
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    sentences = [[" ".join(rng.choices(WORDS, k=6)).capitalize() + "." for _ in range(3)] for _ in range(300)]
    Path("documents.json").write_text(json.dumps([" ".join(each) for each in sentences]), encoding="utf-8")


def _run(script, folder, *flags, output="out"):
    recipe = str(ROOT / "ragcun_hf" / "cli" / "recipes" / "unlabelled.yaml")
    common = ["--config", recipe, "--documents", "documents.json", "--base_model", str(folder), "--output_dir", output]
    importlib.import_module(f"ragcun_hf.cli.{script}").main(
        [*common, "--batch_size", "64", "--use_cpu", "--disable_tqdm", "true", *flags]
    )
    return json.loads(Path(output, "training_record.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "lexical", "counts"),
    [("train_self_supervised", "false", (1, 2, 3, 3, 2, 2)), ("train_xy_masked", "true", (1, 2, 2, 2))],
)
def test_the_choice_is_recorded_and_its_model_is_saved(corpus, tiny_encoder_folder, script, lexical, counts, capsys):
    record = _run(script, tiny_encoder_folder, "--lexical", lexical)
    chosen, tried = record["data"]["chosen"], record["data"]["tried"]
    assert chosen in tried
    assert tried[0]["gain"] == 0
    assert record["blend"] == chosen["blend"]
    assert len(tried) == sum(counts)
    assert "pseudo-NDCG@10" in capsys.readouterr().out
    model = load_trained_model("out")
    assert model.config.projection_kind == chosen["projection_kind"]
    assert (model.lexical is not None) == (lexical == "true")
    seen = Path("out/training_documents.txt").read_text(encoding="utf-8").split()
    assert len(seen) == 300  # the held-out documents too: the final head is made from all


@pytest.mark.slow
def test_if_nothing_helps_the_model_is_the_unchanged_base(corpus, tiny_encoder_folder, monkeypatch, capsys):
    monkeypatch.setattr(automatic, "REQUIRED_Z", math.inf)
    record = _run("train_self_supervised", tiny_encoder_folder, "--lexical", "false")
    assert "No candidate beats the frozen base by more" in capsys.readouterr().out
    assert record["steps"] == 0
    texts = ["the sun is red", "bread and water"]
    model = load_trained_model("out")
    with torch.no_grad():
        output = model(**model.tokenize(texts))
    torch.testing.assert_close(output.embeddings, output.features * model.config.feature_scale, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_if_nothing_helps_exact_words_stay(corpus, tiny_encoder_folder, monkeypatch, capsys):
    monkeypatch.setattr(automatic, "REQUIRED_Z", math.inf)
    record = _run("train_self_supervised", tiny_encoder_folder)
    assert "No candidate beats the frozen base with exact words by more" in capsys.readouterr().out
    assert record["steps"] == 0
    model, texts = load_trained_model("out"), json.loads(Path("documents.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        output = model(**model.tokenize(texts))
    # The principal directions keep what they can of the similarities of both halves.
    ours, exact = (torch.nn.functional.normalize(each) for each in (output.embeddings, output.features))
    ours, exact = ours @ ours.T, exact @ exact.T
    base = torch.nn.functional.normalize(model.encoder_part(output.features))
    assert (ours - exact).square().mean() < 0.2 * (base @ base.T - exact).square().mean()


@pytest.mark.slow
def test_a_second_run_chooses_the_same(corpus, tiny_encoder_folder):
    first = _run("train_self_supervised", tiny_encoder_folder, output="a")
    second = _run("train_self_supervised", tiny_encoder_folder, output="b")
    assert first["data"]["tried"] == second["data"]["tried"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_fraction", "0.2"], "holds documents out itself"),
        (["--whitening", "0.2"], "chooses initialization and blend"),
        (["--use_predictor"], "chooses initialization and blend"),
        (["--blend", "0.5"], "chooses initialization and blend"),
        (["--projection_init", "random"], "chooses initialization and blend"),
        (["--no_feature_cache"], "cached features"),
        (["--epochs", "7"], "length of training"),
        (["--max_steps", "7"], "length of training"),
        (["--projection_kind", "linear"], "kind and width of the projection"),
        (["--projection_hidden_dim", "32"], "kind and width of the projection"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps"),
        (["--limit", "30"], "at least 20 held-out documents"),
    ],
)
def test_flags_that_contradict_an_automatic_choice_are_refused(corpus, tiny_encoder_folder, flags, message):
    with pytest.raises(UserError, match=message):
        _run("train_self_supervised", tiny_encoder_folder, *flags)


def test_documents_without_a_common_word_give_no_keywords_to_train_on(corpus, tiny_encoder_folder):
    texts = [f"One{number}a two{number}a. Three{number}a four{number}a." for number in range(100)]
    Path("documents.json").write_text(json.dumps(texts), encoding="utf-8")
    with pytest.raises(UserError, match="expects pseudo-queries of keywords, got 0"):
        _run("train_xy_masked", tiny_encoder_folder)


def test_an_automatic_run_needs_the_contrastive_term(corpus, tiny_encoder_folder):
    with pytest.raises(UserError, match="trains the contrastive term"):
        _run("train_xy_masked", tiny_encoder_folder, "--lambda_contrastive", "0")
