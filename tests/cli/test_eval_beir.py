"""eval_beir.py from the command line, with a small BEIR folder and a tiny model."""

import copy
import importlib
import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from ragcun_hf.data.documents import text_digest
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.results import read_results
from ragcun_hf.search.exact import exact_search

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

TRAINING = Path(__file__).resolve().parents[2] / "training"

CORPUS = {
    "d0": "bread is food",
    "d1": "the moon and a star are on the river",
    "d2": "fish sleep in the water",
    "d3": "a bird does drink water",
    "d4": "piano music is slow and fast",
    "d5": "the stone is blue",
    "d6": "sort an array in the tree",
    "q4": "is music fast",  # the query of that id, word for word
}
QUERIES = {
    "q0": "what is bread",
    "q1": "where is the moon",
    "q2": "why do fish sleep",
    "q3": "what does a bird drink",
    "q4": "is music fast",
    "q5": "is the stone green",
}
QRELS = {"q0": {"d0": 2, "d6": 1}, "q1": {"d1": 1}, "q2": {"d2": 1}, "q3": {"d3": 1, "d2": 1}, "q4": {"d4": 1}}


def _write_beir(folder, corpus=CORPUS, qrels=QRELS, queries=QUERIES):
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", corpus), ("queries", queries)):
        rows = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    lines = [f"{query}\t{document}\t{gain}" for query, found in qrels.items() for document, gain in found.items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]), encoding="utf-8")


@pytest.fixture
def data_dir(tmp_path):
    _write_beir(tmp_path / "beir" / "toy")
    return tmp_path / "beir"


@pytest.fixture
def trained(tiny_encoder_folder, tmp_path):
    """Save a model with a changed head and return its folder."""
    import torch

    from ragcun_hf import IsotropicGaussianModel

    def save(name="trained", documents=None, **fields):
        torch.manual_seed(1)  # of the hidden layers: figures must not depend on the tests before
        model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), **{"use_predictor": True, **fields})
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / name)
        if documents is not None:
            digests = "\n".join(sorted(text_digest(text).hex() for text in documents))
            (tmp_path / name / "training_documents.txt").write_text(digests + "\n", encoding="utf-8")
        return tmp_path / name

    return save


@pytest.fixture
def evaluate(monkeypatch, data_dir, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module("ragcun_hf.cli.eval_beir")

    def run(*flags, datasets=("toy",), output="results", with_plots=False, read=read_results):
        if not with_plots:  # they take most of the time
            for name in ("plot_comparison", "plot_isotropy"):
                monkeypatch.setattr(f"ragcun_hf.evaluation.plots.{name}", lambda *args, **kwargs: None)
        common = ["--datasets", *datasets, "--data_dir", str(data_dir), "--output_dir", output]
        script.main([*(str(flag) for flag in flags), *common, "--encoder_dtype", "float32"])
        (path,) = (tmp_path / output).glob("*.json")
        return read(path)

    return run


def _ndcg_by_hand(queries, documents):
    """NDCG@10 by cosine, from vectors by id: linear gain, logarithmic discount, the query's own id left out."""

    def unit(vector):
        return vector / np.linalg.norm(vector)

    figures = []
    for query, judged in QRELS.items():
        scores = {key: float(unit(queries[query]) @ unit(vector)) for key, vector in documents.items() if key != query}
        ranking = sorted(scores, key=lambda key: -scores[key])[:10]
        gained = sum(judged.get(key, 0) / math.log2(place + 2) for place, key in enumerate(ranking))
        best = sum(gain / math.log2(place + 2) for place, gain in enumerate(sorted(judged.values(), reverse=True)))
        figures.append(gained / best)
    return sum(figures) / len(figures)


def _vectors(model, kind, **options):
    encode = {"query": model.encode_query, "document": model.encode_document}[kind]
    texts = QUERIES if kind == "query" else CORPUS
    return dict(zip(texts, encode(list(texts.values()), **options), strict=True))


def test_every_system_has_the_figure_worked_out_by_hand(evaluate, trained, tiny_encoder_folder):
    from ragcun_hf import IsotropicGaussianModel
    from ragcun_hf.model.base_models import load_trained_model

    folder = trained()
    results = evaluate("--model_path", folder, "--use_predictor")
    systems = results["datasets"]["toy"]["systems"]
    assert list(systems) == ["base", "bm25", "fusion", "projection", "predictor"]
    base = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder))  # its head is the identity
    model = load_trained_model(str(folder))
    by_hand = {
        "base": _ndcg_by_hand(_vectors(base, "query"), _vectors(base, "document")),
        "projection": _ndcg_by_hand(_vectors(model, "query"), _vectors(model, "document")),
        "predictor": _ndcg_by_hand(_vectors(model, "query", use_predictor=True), _vectors(model, "document")),
    }
    assert len({round(figure, 6) for figure in by_hand.values()}) == 3  # the systems differ
    for system, figure in by_hand.items():
        assert systems[system]["ndcg@10"] == pytest.approx(figure, abs=1e-6)
    assert results["mean"]["projection"]["ndcg@10"] == systems["projection"]["ndcg@10"]
    assert results["datasets"]["toy"]["num_queries"] == 5  # the unjudged one is left out
    assert results["datasets"]["toy"]["comparisons"].keys() == {"bm25", "fusion", "projection", "predictor"}


@pytest.mark.slow
def test_a_run_writes_all_files_and_a_second_run_writes_the_same(evaluate, trained, tmp_path, capsys):
    folder = trained()
    first = evaluate("--model_path", folder, "--use_predictor", output="first", with_plots=True)
    shown = capsys.readouterr().out
    second = evaluate("--model_path", folder, "--use_predictor", output="second")
    names = {path.name for path in (tmp_path / "first" / "trained").iterdir()}
    runs = {f"toy.{system}.trec" for system in ("base", "bm25", "fusion", "projection", "predictor")}
    assert names == runs | {"comparison.png", "isotropy.png"}
    for name in runs:
        written = (tmp_path / "first" / "trained" / name).read_bytes()
        assert written == (tmp_path / "second" / "trained" / name).read_bytes()
        if name != "toy.bm25.trec":  # which finds only documents with a word of the query
            assert len(written.splitlines()) == 5 * 8 - 1  # five queries, eight documents, one with the query's id
    assert {key: first[key] for key in ("datasets", "mean", "isotropy")} == {
        key: second[key] for key in ("datasets", "mean", "isotropy")
    }
    assert "toy" in shown
    assert "Wrote first/trained.json" in shown
    assert f"ragcun card --model_path {folder} --results first/trained.json" in shown


def test_the_results_describe_settings_and_model(evaluate, trained):
    results = evaluate("--model_path", trained(max_length=16, similarity_fn_name="dot"))
    expected = {"split": "test", "max_length": 16, "identical_ids_dropped": True, "top_k": 100}
    assert expected.items() <= results["settings"].items()
    assert results["settings"]["encoder_dtype"] == "float32"
    assert (results["model"]["name"], results["model"]["similarity"]) == ("trained", "dot")
    assert "ragcun eval-beir " in results["command"]


def test_the_base_encodes_queries_with_the_model_s_prompt(evaluate, trained):
    plain = evaluate("--model_path", trained("plain"), output="a")
    prompted = evaluate("--model_path", trained("prompted", query_prompt="query: search "), output="b")
    assert plain["datasets"]["toy"]["systems"]["base"] != prompted["datasets"]["toy"]["systems"]["base"]


def test_features_are_computed_once_for_all_runs(evaluate, trained, tmp_path, monkeypatch):
    from ragcun_hf.features import text_vectors

    flags = ["--model_path", trained(), "--feature_cache_dir", tmp_path / "features"]
    first = evaluate(*flags, output="a")
    asked = []
    real = text_vectors.encode_in_batches
    monkeypatch.setattr(
        text_vectors,
        "encode_in_batches",
        lambda model, texts, **options: asked.extend(texts) or real(model, texts, **options),
    )
    second = evaluate(*flags, output="b")
    assert not asked
    assert first["datasets"] == second["datasets"]
    third = evaluate(*flags, "--no_feature_cache", output="c")
    assert len(asked) == len(QUERIES) - 1 + len(CORPUS)  # the unjudged query is not encoded
    assert third["datasets"]["toy"]["systems"] == second["datasets"]["toy"]["systems"]


def test_a_corpus_on_disk_has_the_same_results_as_one_in_memory(evaluate, trained, tmp_path, monkeypatch):
    import datasets

    from ragcun_hf.data import beir_folder
    from ragcun_hf.evaluation import model_evaluation
    from ragcun_hf.features import text_vectors
    from ragcun_hf.search import memory_maps

    monkeypatch.setattr(model_evaluation, "HEAD_ROWS", 2)
    flags = ["--model_path", trained(documents=[CORPUS["d0"]]), "--use_predictor"]
    small = evaluate(*flags, "--feature_cache_dir", tmp_path / "features", output="small")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(beir_folder, "LARGEST_IN_MEMORY", 0)
    monkeypatch.setattr(memory_maps, "LARGEST_IN_MEMORY", 0)
    for module in (text_vectors, model_evaluation):
        monkeypatch.setattr(module, "TEXTS_AT_ONCE", 4)
    large = evaluate(*flags, "--feature_cache_dir", tmp_path / "features", output="large")
    assert large["datasets"] == small["datasets"]
    assert large["isotropy"] == small["isotropy"]
    assert large["datasets"]["toy"]["subsets"]["seen_documents"]["num_queries"] == 1
    runs = [sorted((tmp_path / output / "trained").glob("*.trec")) for output in ("small", "large")]
    assert [path.read_bytes() for path in runs[0]] == [path.read_bytes() for path in runs[1]]
    assert not [path.name for path in (tmp_path / "large").iterdir() if path.name.startswith("tmp")]


def test_too_little_room_for_vectors_is_a_user_error_that_says_how_much_is_needed(tmp_path):
    import resource

    from ragcun_hf.search.memory_maps import new_matrix

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(UserError, match=r"expected room for 0\.2 GiB of vectors in .*name another --output_dir"):
            new_matrix(65_536, 768, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "new").iterdir())


def test_faiss_reports_its_recall(evaluate, trained, capsys):
    pytest.importorskip("faiss")
    folder = trained()
    exact = evaluate("--model_path", folder, output="exact")
    found = evaluate("--model_path", folder, "--search", "faiss", output="faiss")
    assert exact["settings"]["search"] == "exact"
    assert (found["settings"]["search"], found["settings"]["recall_of_exact_search"]) == ("faiss", 1.0)
    assert "1.0000 of what an exact search finds" in capsys.readouterr().out
    assert found["datasets"]["toy"]["systems"] == exact["datasets"]["toy"]["systems"]


def test_the_encoder_alone_can_be_evaluated(evaluate, trained, tiny_encoder_folder, tmp_path):
    alone = evaluate("--base_model", tiny_encoder_folder, output="alone")
    beside = evaluate("--model_path", trained(), output="beside")
    assert list(alone["datasets"]["toy"]["systems"]) == ["base", "bm25", "fusion"]
    assert alone["datasets"]["toy"]["systems"]["base"] == beside["datasets"]["toy"]["systems"]["base"]
    assert alone["model"]["name"] == "base-bert"
    written = sorted(path.name for path in (tmp_path / "alone" / "base-bert").iterdir())
    assert written == ["toy.base.trec", "toy.bm25.trec", "toy.fusion.trec"]


def test_bm25_can_be_switched_off_and_changes_no_other_figure(evaluate, trained, tmp_path):
    folder = trained()
    with_it, without = (
        evaluate("--model_path", folder, output="a"),
        evaluate("--model_path", folder, "--no_bm25", output="b"),
    )
    found = with_it["datasets"]["toy"]["systems"]
    assert found.pop("bm25")["ndcg@10"] > 0
    assert found.pop("fusion")["ndcg@10"] > 0
    assert without["datasets"]["toy"]["systems"] == found
    assert not {"bm25", "fusion"} & without["settings"].keys()
    assert with_it["settings"]["bm25"] == "lucene, k1 1.5, b 0.75, english stems, without stop words"
    assert not [
        *(tmp_path / "b" / "trained").glob("toy.bm25.trec"),
        *(tmp_path / "b" / "trained").glob("toy.fusion.trec"),
    ]


def test_the_message_names_only_files_that_were_written(evaluate, trained, tiny_encoder_folder, capsys):
    evaluate("--base_model", tiny_encoder_folder, output="alone")
    assert "and run files in alone/base-bert." in capsys.readouterr().out
    evaluate("--model_path", trained(), output="beside")
    assert "and run files and plots in beside/trained." in capsys.readouterr().out


def test_a_folder_with_a_space_in_its_name_is_evaluated(evaluate, trained, tmp_path, capsys):
    folder = trained("my model")
    evaluate("--model_path", folder, output="my results")
    lines = (tmp_path / "my results" / "my model" / "toy.base.trec").read_text(encoding="utf-8").splitlines()
    assert {line.split(" ")[5] for line in lines} == {"my_model.base"}
    (next_step,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: "))
    assert shlex.split(next_step)[3:] == ["--model_path", str(folder), "--results", "my results/my model.json"]


def test_run_files_of_systems_that_are_not_measured_again_go_and_other_files_stay(evaluate, trained, tmp_path):
    folder = trained()
    evaluate("--model_path", folder, "--use_predictor")
    (runs,) = (path.parent for path in tmp_path.rglob("toy.predictor.trec"))
    for name in ("toy.mine.trec", "other.predictor.trec"):
        (runs / name).write_text("", encoding="utf-8")
    evaluate("--model_path", folder, "--no_bm25")
    assert {path.name for path in runs.glob("*.trec")} == {
        "toy.base.trec", "toy.projection.trec", "toy.mine.trec", "other.predictor.trec",
    }  # fmt: skip


def test_the_table_is_shown_even_where_run_files_fail(evaluate, trained, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise UserError("no run files in this test")

    monkeypatch.setattr("ragcun_hf.evaluation.ranking.write_trec_run", fail)
    with pytest.raises(UserError, match="no run files"):
        evaluate("--model_path", trained())
    assert "projection" in capsys.readouterr().out


def test_queries_with_documents_seen_in_training_have_figures_of_their_own(evaluate, trained):
    seen = evaluate("--model_path", trained(documents=[CORPUS["d0"], CORPUS["d2"], "of another corpus"]))
    subsets = seen["datasets"]["toy"]["subsets"]
    # d0 answers q0; d2 answers q2 and q3.
    assert {name: part["num_queries"] for name, part in subsets.items()} == {
        "seen_documents": 3,
        "unseen_documents": 2,
    }
    whole = seen["datasets"]["toy"]["systems"]["projection"]["ndcg@10"]
    parts = [part["num_queries"] * part["systems"]["projection"]["ndcg@10"] for part in subsets.values()]
    assert sum(parts) / 5 == pytest.approx(whole)


def test_the_closed_form_stands_beside_a_head_and_says_if_the_head_is_behind(
    evaluate, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ragcun_hf.evaluation.closed_form.GAMMAS", (1.0,))
    known = {"d0": "q0", "d1": "q1", "d2": "q2"}
    rows = [{"query": QUERIES[query], "positive": CORPUS[key]} for key, query in known.items()]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    folder = trained(documents=[CORPUS["d0"], CORPUS["d1"], CORPUS["d3"]])
    results = evaluate("--model_path", folder, "--closed_form", tmp_path / "pairs.jsonl", "--no_bm25")
    entry = results["datasets"]["toy"]
    assert list(entry["systems"]) == ["base", "closed_form", "projection", "projection_closed_form"]
    for system in ("closed_form", "projection_closed_form"):
        assert results["settings"][f"{system}_gamma"] == {"toy": 1.0}
    # d0 answers q0, d1 q1, d2 q2 and q3, d3 q3: these were seen by one of them, and two queries by both.
    assert entry["subsets"]["seen_documents"]["num_queries"] == 4
    runs = {
        system: (tmp_path / "results" / "trained" / f"toy.{system}.trec").read_text().splitlines()
        for system in ("base", "closed_form", "projection", "projection_closed_form")
    }
    means = {system: sum(_ndcg_of_run(lines, query) for query in ("q0", "q1")) / 2 for system, lines in runs.items()}
    line = (
        "toy: the head is behind the closed form on documents it has seen (NDCG@10 "
        f"{means['projection']:.4f} against {means['closed_form']:.4f}, 2 queries)."
    )
    assert (line in capsys.readouterr().out) is (means["projection"] < means["closed_form"])
    assert means["closed_form"] > means["base"]
    assert means["projection_closed_form"] > means["projection"]


def _ndcg_of_run(lines, query):
    ranking = [line.split()[2] for line in lines if line.split()[0] == query][:10]
    gained = sum(QRELS[query].get(key, 0) / math.log2(place + 2) for place, key in enumerate(ranking))
    best = sorted(QRELS[query].values(), reverse=True)
    return gained / sum(gain / math.log2(place + 2) for place, gain in enumerate(best))


def test_pairs_of_another_data_set_are_an_error_before_the_model_is_loaded(evaluate, tmp_path, monkeypatch):
    from ragcun_hf.model import base_models

    monkeypatch.setattr(base_models, "load_trained_model", lambda *args, **kwargs: 1 / 0)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": "who", "positive": "of another corpus"}))
    with pytest.raises(
        UserError, match="toy: expected documents of the corpus in the pairs of --closed_form, got none"
    ):
        evaluate("--model_path", "anything", "--closed_form", tmp_path / "pairs.jsonl")


def test_there_are_no_subsets_if_no_document_was_seen(evaluate, trained):
    assert "subsets" not in evaluate("--model_path", trained(), output="a")["datasets"]["toy"]
    others = trained("others", documents=["of another corpus"])
    assert "subsets" not in evaluate("--model_path", others, output="b")["datasets"]["toy"]


def test_a_document_with_the_query_s_id_is_dropped_unless_kept_by_flag(evaluate, trained, tmp_path):
    folder = trained()
    dropped = evaluate("--model_path", folder, output="a")
    kept = evaluate("--model_path", folder, "--keep_identical_ids", output="b")
    runs = [(tmp_path / name / "trained" / "toy.base.trec").read_text(encoding="utf-8") for name in ("a", "b")]
    assert ["q4 Q0 q4" in run for run in runs] == [False, True]
    assert [results["settings"]["identical_ids_dropped"] for results in (dropped, kept)] == [True, False]
    base = [results["datasets"]["toy"]["systems"]["base"]["ndcg@10"] for results in (dropped, kept)]
    assert base[1] < base[0]  # the copy of the query comes first


def test_a_trained_encoder_is_compared_with_the_untrained_one(evaluate, trained):
    frozen = evaluate("--model_path", trained("frozen"), output="a")
    free = evaluate("--model_path", trained("free", freeze_base=False), output="b")
    systems = [results["datasets"]["toy"]["systems"] for results in (frozen, free)]
    assert systems[0]["base"] == systems[1]["base"]
    assert systems[0]["projection"] != systems[1]["projection"]
    assert free["model"]["freeze_base"] is False


def test_the_untrained_base_uses_its_own_prompts(evaluate, trained, monkeypatch):
    from ragcun_hf.features import feature_store
    from ragcun_hf.model import base_models

    load = base_models.load_untrained_base

    def load_with_prompts(model):
        base = load(model)
        base.config.query_prompt, base.config.document_prompt = "query: ", "document: "
        return base

    folder = trained(freeze_base=False)
    plain = evaluate("--model_path", folder, output="a")
    asked = set()
    read = feature_store.FeatureStore.read

    def listen(store, texts, *, prompt="", **options):
        asked.add((texts[0], prompt))
        return read(store, texts, prompt=prompt, **options)

    monkeypatch.setattr(base_models, "load_untrained_base", load_with_prompts)
    monkeypatch.setattr(feature_store.FeatureStore, "read", listen)
    prompted = evaluate("--model_path", folder, output="b")
    queries, documents = QUERIES["q0"], CORPUS["d0"]
    assert asked == {(queries, ""), (documents, ""), (queries, "query: "), (documents, "document: ")}
    systems = [results["datasets"]["toy"]["systems"] for results in (plain, prompted)]
    assert systems[0]["base"] != systems[1]["base"]
    assert systems[0]["projection"] == systems[1]["projection"]


def test_data_sets_are_averaged_and_one_named_twice_counts_once(evaluate, trained, data_dir):
    qrels = copy.deepcopy(QRELS)
    qrels.pop("q0")
    _write_beir(data_dir / "other", qrels=qrels)
    results = evaluate("--model_path", trained(), datasets=("toy", "other", "toy"))
    assert list(results["datasets"]) == ["toy", "other"]
    figures = [results["datasets"][name]["systems"]["projection"]["ndcg@10"] for name in ("toy", "other")]
    assert results["mean"]["projection"]["ndcg@10"] == pytest.approx(sum(figures) / 2)


# Errors of the user


def test_a_model_without_a_predictor_cannot_be_evaluated_with_one(evaluate, trained):
    with pytest.raises(UserError, match="--use_predictor expects a model with a predictor, got one without"):
        evaluate("--model_path", trained(use_predictor=False), "--use_predictor")


def test_a_missing_data_set_without_network_is_an_error_after_few_requests(evaluate, trained, data_dir, monkeypatch):
    import requests

    requested = []

    def refuse(*args, **kwargs):
        requested.append(args)
        raise requests.ConnectionError("no network in this test")

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(requests.Session, "request", refuse)
    folder = trained()
    with pytest.raises(UserError, match=r"expected the BEIR collection 'scifact' in .*unpack the collection there"):
        evaluate("--model_path", folder, datasets=("scifact",))
    assert len(requested) <= 2
    assert [path.name for path in data_dir.iterdir()] == ["toy"]  # no partial download remains


def test_a_missing_data_set_is_an_error_before_the_model_is_loaded(evaluate, monkeypatch):
    from ragcun_hf.model import base_models

    monkeypatch.setattr(base_models, "load_trained_model", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UserError, match="expected judgements of the split 'dev', got the splits test"):
        evaluate("--model_path", "anything", "--split", "dev")


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("query id of spaced without spaces .* got 'q 0'", {"queries": {"q 0": "is"}, "qrels": {"q 0": {"d0": 1}}}),
        ("document id of spaced without spaces .* got 'd 9'", {"corpus": {**CORPUS, "d 9": "is"}}),
    ],
    ids=["query", "document"],
)
def test_an_id_with_a_space_is_an_error_before_the_model_is_loaded(evaluate, data_dir, monkeypatch, what, parts):
    from ragcun_hf.model import base_models

    _write_beir(data_dir / "spaced", **parts)
    monkeypatch.setattr(base_models, "load_trained_model", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UserError, match=what):
        evaluate("--model_path", "anything", datasets=("toy", "spaced"))


def test_a_relevant_document_with_the_query_s_id_is_an_error_before_anything_is_encoded(
    evaluate, trained, data_dir, monkeypatch
):
    from ragcun_hf.features.feature_store import FeatureStore

    _write_beir(data_dir / "numbered", qrels={**QRELS, "q4": {"q4": 1}})
    folder = trained()
    with monkeypatch.context() as patched:
        patched.setattr(FeatureStore, "features", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(UserError, match=r"numbered test: .*'q4'.*--keep_identical_ids"):
            evaluate("--model_path", folder, datasets=("toy", "numbered"))
    kept = evaluate("--model_path", folder, "--keep_identical_ids", datasets=("numbered",))
    assert kept["datasets"]["numbered"]["systems"]["base"]["ndcg@10"] > 0


def test_help_says_where_to_put_an_own_data_set(evaluate, capsys):
    with pytest.raises(SystemExit):
        evaluate("--help")
    assert "a folder inside --data_dir" in " ".join(capsys.readouterr().out.split())


def test_an_output_folder_that_is_a_file_is_an_error_before_anything_is_done(evaluate, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/below"):
        with pytest.raises(UserError, match="--output_dir expects a folder"):
            evaluate("--model_path", "anything", datasets=("nowhere",), output=output)


@pytest.mark.slow
def test_the_untrained_head_of_the_real_encoder_ranks_like_its_base(evaluate, embedded_folder, tmp_path):
    from ragcun_hf.model.base_models import load_base_model

    model = load_base_model("embedded")
    model.save_pretrained(tmp_path / "untrained")
    results = evaluate("--model_path", tmp_path / "untrained")
    systems = results["datasets"]["toy"]["systems"]
    assert systems["projection"]["ndcg@10"] == pytest.approx(systems["base"]["ndcg@10"], abs=1e-6)
    assert results["model"]["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"


# --compare


@pytest.mark.slow
def test_compared_models_have_the_figures_of_their_own_evaluation(evaluate, trained, data_dir, tmp_path, capsys):
    """Two data sets, two models, one of which has seen a document."""
    _write_beir(data_dir / "other", qrels={"q0": {"d0": 1}, "q5": {"d5": 1}})
    first = trained("first", documents=["bread is food"])
    second = trained("second", use_predictor=False)
    options = {"datasets": ("toy", "other")}
    comparison = evaluate(
        "--compare",
        first,
        second,
        "--use_predictor",
        **options,
        output="compared",
        read=lambda path: json.loads(path.read_text()),
    )
    printed = capsys.readouterr().out
    assert (tmp_path / "compared" / "comparison.png").is_file()
    assert comparison["systems"] == ["base", "bm25", "fusion", "first", "first, predictor", "second"]
    assert "second" in printed
    alone = evaluate("--model_path", first, "--use_predictor", **options, output="alone")
    for name in ("toy", "other"):
        systems, expected = comparison["datasets"][name]["systems"], alone["datasets"][name]["systems"]
        for system, single in (
            ("base", "base"),
            ("bm25", "bm25"),
            ("fusion", "fusion"),
            ("first", "projection"),
            ("first, predictor", "predictor"),
        ):
            assert systems[system] == pytest.approx(expected[single])
    assert set(comparison["datasets"]["toy"]["subsets"]) == {"seen_documents", "unseen_documents"}
    assert len(comparison["overall"]["comparisons"]) == 15


@pytest.mark.slow
def test_every_compared_model_reports_the_recall_of_its_own_searches(evaluate, trained, monkeypatch):
    pytest.importorskip("faiss")
    from ragcun_hf.search.approximate import MeasuredSearch

    recalls = iter([1.0, 0.25])
    monkeypatch.setattr("ragcun_hf.search.approximate.recall_of", lambda found, exact: next(recalls))
    real = MeasuredSearch.__call__

    def first_of_each_model(self, *args, **options):
        # Base and projection are searched in turn; one figure for each model will do.
        return real(self, *args, **options) if not self.recalls else exact_search(*args, **options)

    monkeypatch.setattr(MeasuredSearch, "__call__", first_of_each_model)
    flags = ["--compare", trained("first"), trained("second"), "--search", "faiss"]
    comparison = evaluate(*flags, read=lambda path: json.loads(path.read_text()))
    found = {name: each["settings"]["recall_of_exact_search"] for name, each in comparison["models"].items()}
    assert found == {"first": 1.0, "second": 0.25}


@pytest.mark.parametrize("other", [["--model_path", "x"], ["--base_model", "x"]])
def test_a_comparison_accepts_no_other_model(evaluate, other):
    with pytest.raises(UserError, match="one of --model_path, --base_model and --compare"):
        evaluate("--compare", "a", "b", *other)


# The probability that a first document is relevant


@pytest.fixture
def many(data_dir):
    """A folder with 110 judged queries in dev, and the toy's in test; one document answers all of dev's."""
    queries = {f"v{number}": f"what is {'bread ' * (number % 9 + 1)}" for number in range(110)}
    _write_beir(data_dir / "many", queries={**QUERIES, **queries})
    lines = [f"{query}\td0\t1" for query in queries]
    (data_dir / "many" / "qrels" / "dev.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    return "many"


def test_a_calibration_is_fitted_to_one_split_measured_on_another_and_saved_if_asked_for(
    evaluate, trained, many, capsys
):
    folder = trained()
    before = (folder / "config.json").read_text()
    results = evaluate("--model_path", folder, "--calibrate", "dev", datasets=(many,))
    figures = results["settings"]["calibrations"][many]
    assert figures["num_queries"] == 5 and figures["calibration"]["num_queries"] == 110
    assert figures["first_is_relevant"] * 5 == pytest.approx(round(figures["first_is_relevant"] * 5))
    shown = capsys.readouterr().out
    assert f"expected calibration error {figures['expected_calibration_error']:.4f}" in shown
    assert (folder / "config.json").read_text() == before
    evaluate("--model_path", folder, "--calibrate", "dev", "--save_calibration", datasets=(many,))
    saved = json.loads((folder / "config.json").read_text())
    assert saved.pop("relevance_calibration") == figures["calibration"]
    assert saved == {name: value for name, value in json.loads(before).items() if name != "relevance_calibration"}
    again = evaluate("--model_path", folder, datasets=(many,))  # measures what is saved
    assert again["settings"]["calibrations"] == results["settings"]["calibrations"]


def test_too_few_queries_and_flags_that_do_not_fit_are_refused(evaluate, trained, data_dir, many):
    folder = trained()
    with pytest.raises(UserError, match="--calibrate expects at least 100 queries, got 5 in test of many"):
        evaluate("--model_path", folder, "--calibrate", "test", "--split", "dev", datasets=(many,))
    for flags, message in (
        (["--save_calibration"], "--save_calibration expects --calibrate"),
        (["--calibrate", "test"], "other judgements than --split"),
        (["--calibrate", "dev", "--save_calibration"], "expects a model folder and one data set"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate("--model_path", folder, *flags, datasets=(many, "toy"))


def _dots(queries, documents):
    return np.array([[query @ document for document in documents.values()] for query in queries.values()])


def test_a_base_for_dot_products_is_ranked_by_them(evaluate, base_for_dot_products, tmp_path):
    from ragcun_hf import IsotropicGaussianModel

    results = evaluate("--base_model", base_for_dot_products, "--no_bm25")
    assert results["settings"]["base_similarity"] == "dot"
    model = IsotropicGaussianModel.from_encoder(str(base_for_dot_products))
    options = {"normalize_embeddings": False}
    scores = _dots(_vectors(model, "query", **options), _vectors(model, "document", **options))
    lines = (tmp_path / "results" / "base-dot-base" / "toy.base.trec").read_text().splitlines()
    found = {(line.split()[0], line.split()[2]): float(line.split()[4]) for line in lines}
    expected = {
        (query, document): scores[row, column]
        for row, query in enumerate(QUERIES)
        for column, document in enumerate(CORPUS)
        if (query, document) in found
    }
    assert len(found) == len(QRELS) * len(CORPUS) - 1
    assert found == pytest.approx(expected, rel=1e-4)
    # By cosine, the best documents are others.
    plain = IsotropicGaussianModel.from_encoder(str(base_for_dot_products), encoder_similarity="cosine")
    cosines = plain.similarity(plain.encode_query([*QUERIES.values()]), plain.encode_document([*CORPUS.values()]))
    assert (cosines.numpy().argmax(1) != scores.argmax(1)).any()


def test_so_are_the_base_of_a_trained_model_its_fusion_and_its_closed_form(
    evaluate, base_for_dot_products, tmp_path, monkeypatch
):
    from ragcun_hf import IsotropicGaussianModel

    model = IsotropicGaussianModel.from_encoder(str(base_for_dot_products))
    model.save_pretrained(tmp_path / "mine")
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"query": QUERIES["q0"], "positive": CORPUS["d1"]}]), encoding="utf-8")
    alone = evaluate("--base_model", base_for_dot_products, output="alone")["datasets"]["toy"]["systems"]
    results = evaluate("--model_path", tmp_path / "mine", "--closed_form", pairs, output="beside")
    beside = results["datasets"]["toy"]["systems"]
    assert [beside[name] for name in ("base", "fusion")] == [alone[name] for name in ("base", "fusion")]
    assert results["settings"]["base_similarity"] == "dot"
    # A document that moved keeps its length: what it scores for other queries stays of the order of the others.
    runs = tmp_path / "beside" / "mine"
    moved, before = (
        {line.split()[2]: float(line.split()[4]) for line in (runs / f"toy.{name}.trec").read_text().splitlines()[:8]}
        for name in ("closed_form", "base")
    )
    assert {key for key in moved if moved[key] != before[key]} <= {"d1"}
    assert moved["d1"] > 0.5 * before["d1"]


def test_prompts_of_a_base_are_flags_and_belong_to_no_trained_model(evaluate, trained, tiny_encoder_folder, tmp_path):
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "e5-small")
    plain = evaluate("--base_model", folder, output="a")["datasets"]["toy"]["systems"]["base"]
    published = evaluate("--base_model", folder, "--query_prompt", "auto", output="b")
    same = ("--query_prompt", "query: ", "--document_prompt", "passage: ")
    by_hand = evaluate("--base_model", folder, *same, output="c")["datasets"]["toy"]["systems"]["base"]
    assert published["datasets"]["toy"]["systems"]["base"] == by_hand != plain
    with pytest.raises(UserError, match="--document_prompt is for --base_model, got a trained model"):
        evaluate("--model_path", trained(), "--document_prompt", "")
    with pytest.raises(UserError, match="`query_prompt` auto takes the prompts that an encoder's makers publish"):
        evaluate("--base_model", tiny_encoder_folder, "--query_prompt", "auto")


def test_the_untrained_base_has_published_prompts_if_the_model_has_them(evaluate, tiny_encoder_folder, tmp_path):
    from ragcun_hf import IsotropicGaussianModel
    from ragcun_hf.model.base_models import load_untrained_base

    folder = str(shutil.copytree(tiny_encoder_folder, tmp_path / "e5-small"))
    for prompt, expected in (("auto", "query: "), ("", "")):
        model = IsotropicGaussianModel.from_encoder(folder, query_prompt=prompt, freeze_base=False)
        assert load_untrained_base(model).config.query_prompt == expected
