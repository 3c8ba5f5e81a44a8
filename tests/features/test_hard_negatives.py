"""Hard negatives: near the query, but not its answer."""

import json

import pytest
import torch

from ragcun_hf.cli import mine_negatives, train_contrastive
from ragcun_hf.data.pairs import read_pairs
from ragcun_hf.data.writing import write_beir_folder
from ragcun_hf.errors import UserError
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.features.hard_negatives import mine_hard_negatives

WORDS = "bread food music river moon sun bird fish tree stone piano light".split()
CORPUS = [f"the {first} is a {second}" for first in WORDS for second in WORDS if first != second]


@pytest.fixture
def store(tiny_model):
    return FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False)


@pytest.fixture
def pairs():
    rows = [{"query": f"what is {word}", "positive": f"the {word} is a stone"} for word in WORDS[:6]]
    return read_pairs([*rows, {"query": "what is bread", "positive": "the bread is a food", "negative": "the sun"}])


def _mined(pairs, model, store, **options):
    return mine_hard_negatives(pairs, CORPUS, model, store, **{"range_min": 0, "range_max": 40, **options})


def _scores(model, query, documents):
    queries = model.encode_query([query], convert_to_tensor=True)
    return torch.nn.functional.cosine_similarity(queries, model.encode_document(documents, convert_to_tensor=True))


def _best_as_positives(pairs, model):
    """Let each query's document be the one that the model ranks first, so that others are below it."""
    best = {query: CORPUS[int(_scores(model, query, CORPUS).argmax())] for query in pairs["query"][:]}
    return read_pairs([{**row, "positive": best[row["query"]]} for row in pairs])


def test_negatives_are_near_but_below_the_own_document_and_answer_no_pair_of_the_query(pairs, tiny_model, store):
    pairs = _best_as_positives(pairs, tiny_model)
    mined = _mined(pairs, tiny_model, store, num_negatives=3, relative_margin=0.02)
    assert mined["query"][:] == pairs["query"][:]
    num_added = 0
    for row, before in zip(mined, pairs, strict=True):
        assert row["negative"][: len(before["negative"])] == before["negative"]
        added = row["negative"][len(before["negative"]) :]
        num_added += len(added)
        answers = {pair["positive"] for pair in pairs if pair["query"] == row["query"]}
        assert not answers & set(added)
        own = float(_scores(tiny_model, row["query"], [row["positive"]])[0])
        ranking = sorted(
            _scores(tiny_model, row["query"], [*dict.fromkeys([*CORPUS, *pairs["positive"][:]])]).tolist()
        )
        for score in _scores(tiny_model, row["query"], added).tolist() if added else []:
            assert score <= own - 0.02 * abs(own) + 1e-5
            assert score >= ranking[-40] - 1e-5
    assert num_added >= 3


def test_the_search_runs_on_the_device_of_the_model(pairs, tiny_model, store, searched_on):
    _mined(pairs, tiny_model, store)
    assert searched_on == ["cpu:0"]


def test_the_first_ranks_are_spared(pairs, tiny_model, store):
    whole = _mined(pairs, tiny_model, store, num_negatives=40, relative_margin=-10.0)
    late = _mined(pairs, tiny_model, store, num_negatives=40, relative_margin=-10.0, range_min=5)
    for first, second in zip(whole, late, strict=True):
        assert set(second["negative"]) < set(first["negative"])
        assert len(first["negative"]) - len(second["negative"]) >= 3  # of five, some are answers


def test_the_same_seed_draws_the_same_negatives(pairs, tiny_model, store):
    options = {"num_negatives": 2, "relative_margin": -10.0}
    first, again, other = (_mined(pairs, tiny_model, store, seed=seed, **options)["negative"][:] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("options", [{"range_min": 40}, {"num_negatives": 0}, {"range_min": -1}])
def test_impossible_ranks_are_refused(pairs, tiny_model, store, options):
    with pytest.raises(UserError, match="expected ranks"):
        _mined(pairs, tiny_model, store, **options)


def test_the_command_writes_a_file_for_training(pairs, tiny_encoder_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.json").write_text(json.dumps([dict(row) for row in pairs]), encoding="utf-8")
    (tmp_path / "documents.json").write_text(json.dumps(CORPUS), encoding="utf-8")
    flags = ["--train_data", "pairs.json", "--corpus", "documents.json", "--base_model", str(tiny_encoder_folder)]
    flags += ["--output", "mined.jsonl", "--feature_cache_dir", "cache", "--range_min", "0", "--relative_margin", "0"]
    mine_negatives.main(flags)
    mined = read_pairs("mined.jsonl")
    assert len(mined) == len(pairs)
    assert sum(map(len, mined["negative"])) > 1
    assert "to 7 pairs: wrote mined.jsonl" in capsys.readouterr().out
    train = ["--train_data", "mined.jsonl", "--base_model", str(tiny_encoder_folder), "--max_steps", "1", "--use_cpu"]
    train_contrastive.main([*train, "--feature_cache_dir", "cache", "--output_dir", "out"])
    assert "Features: 0 texts encoded" in capsys.readouterr().out  # mining has cached them
    with pytest.raises(UserError, match="mined.jsonl"):
        mine_negatives.main(flags)
    with pytest.raises(UserError, match="--train_data and --output"):
        mine_negatives.main(["--output", "other.jsonl"])


def test_the_corpus_of_a_beir_folder_is_searched_without_being_named(
    tiny_encoder_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    documents = {"d0": ("", "bread is food"), "d1": ("", "fish sleep"), "d2": ("food", "red bread is food")}
    write_beir_folder("set", documents, {"q0": "bread is food"}, {"train": {"q0": {"d0": 1}}})
    flags = ["--train_data", "set", "--base_model", str(tiny_encoder_folder), "--range_min", "0"]
    flags += ["--relative_margin", "-1", "--num_negatives", "5", "--feature_cache_dir", "cache", "--overwrite"]
    mine_negatives.main([*flags, "--output", "mined.jsonl"])
    assert "Searching the 3 documents of set, and those of the pairs." in capsys.readouterr().out
    (row,) = read_pairs("mined.jsonl")
    assert sorted(row["negative"]) == ["fish sleep", "food red bread is food"]
    mine_negatives.main([*flags, "--train_data", "mined.jsonl", "--output", "again.jsonl"])
    assert "Searching only the documents of the pairs: name all documents with --corpus." in capsys.readouterr().out
