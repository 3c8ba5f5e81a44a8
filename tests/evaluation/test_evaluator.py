"""RetrievalEvaluator: the same figures as eval_beir.py, for every kind of model, in both Trainers."""

import importlib
import json
import pickle

import numpy as np
import pytest
import torch

from ragcun_hf import (
    IsotropicGaussianModel,
    IsotropicGaussianTrainer,
    IsotropicGaussianTrainingArguments,
    RetrievalEvaluator,
    UserError,
)
from ragcun_hf.data.documents import text_digest
from ragcun_hf.evaluation.results import read_results
from ragcun_hf.files import DOCUMENTS_FILE

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

QUERIES = {"q0": "what is bread", "q1": "where is the moon", "q2": "why do fish sleep"}
CORPUS = {
    "d0": "bread is food",
    "d1": {"title": "the moon", "text": "and a star are on the river"},
    "d2": "fish sleep in the water",
    "d3": "a bird does drink water",
}
RELEVANT = {"q0": {"d0"}, "q1": ["d1"], "q2": {"d2": 2, "d3": 1}}


class ByHand:
    """Vectors that rank d0 first for q0, d1 second for q1, and d3, d2 as the last ones for q2."""

    def encode_query(self, texts):
        return np.array([[1, 0, 0, 0], [0, 0.9, 1, 0], [1, 0.9, 0.2, 0.1]], dtype=np.float32)[: len(texts)]

    def encode_document(self, texts):
        return np.eye(4, dtype=np.float32)[: len(texts)]


@pytest.fixture
def evaluator():
    return RetrievalEvaluator(QUERIES, CORPUS, RELEVANT)


@pytest.fixture
def moved(tiny_model):
    """A model whose head changes the ranking."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tiny_model


def _write_beir(folder):
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("queries", QUERIES), ("corpus", CORPUS)):
        rows = [{"_id": key, **({"text": text} if isinstance(text, str) else text)} for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lines = ["q0\td0\t1", "q1\td1\t1", "q2\td2\t2", "q2\td3\t1", "q1\tnot in the corpus\t1"]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_the_figure_of_any_encoder_is_that_worked_out_by_hand(evaluator):
    report = evaluator(ByHand())
    last = (2 / np.log2(4) + 1 / np.log2(5)) / (2 + 1 / np.log2(3))
    assert report["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3) + last) / 3)
    assert report["recall@100"] == 1.0
    assert list(report.results["datasets"]["data"]["systems"]) == ["bm25", "model"]
    assert report.results["datasets"]["data"]["comparisons"].keys() == {"model"}
    assert "vs bm25" in str(report)
    assert str(report).splitlines()[2].split()[3] == "bm25"


@pytest.mark.slow
def test_the_figures_are_those_of_eval_beir_to_the_last_digit(moved, tmp_path, monkeypatch):
    folder = _write_beir(tmp_path / "beir" / "toy")
    moved.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    flags = ["--model_path", "model", "--use_predictor", "--datasets", "toy", "--data_dir", "beir"]
    importlib.import_module("ragcun_hf.cli.eval_beir").main(flags)
    expected = read_results("results/model.json")
    report = RetrievalEvaluator.from_beir(folder)(moved)
    assert report.results["datasets"] == expected["datasets"]
    assert report.results["isotropy"] == expected["isotropy"]
    assert {key: expected["settings"][key] for key in report.results["settings"]} == report.results["settings"]
    systems = expected["datasets"]["toy"]["systems"]
    assert report["ndcg@10"] == systems["projection"]["ndcg@10"] != report["base_ndcg@10"]
    assert report["base_recall@100"] == systems["base"]["recall@100"]
    assert report["bm25_mrr@10"] == systems["bm25"]["mrr@10"]
    assert report["fusion_mrr@10"] == systems["fusion"]["mrr@10"]
    assert report["predictor_ndcg@10"] == systems["predictor"]["ndcg@10"]
    report.save("saved/model.json")
    assert read_results("saved/model.json") == report.results
    for run in (tmp_path / "results" / "model").glob("*.trec"):
        assert run.read_bytes() == (tmp_path / "saved" / "model" / run.name).read_bytes()


def test_every_system_is_searched_on_the_device_of_the_model(evaluator, moved, searched_on):
    evaluator(moved)
    assert searched_on == ["cpu:0"] * 3  # base, projection and predictor


def test_the_model_keeps_its_mode_and_its_weights(evaluator, moved):
    before = {name: tensor.clone() for name, tensor in moved.state_dict().items()}
    for is_training in (True, False):
        moved.train(is_training)
        evaluator(moved)
        assert moved.training is is_training
    assert all(torch.equal(tensor, before[name]) for name, tensor in moved.state_dict().items())


def _move(module, seed):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))


def test_the_baselines_are_searched_once_and_the_head_each_time(evaluator, moved, monkeypatch):
    from ragcun_hf.evaluation import retrieval
    from ragcun_hf.evaluation.bm25 import Bm25Index

    searched = []

    def counted(search, shard):
        return lambda *args, **options: searched.append(1) or search(*args, **options)

    monkeypatch.setattr(retrieval, "search_shards", counted)
    first = evaluator(moved)
    assert len(searched) == 3  # base, projection and predictor
    monkeypatch.setattr(Bm25Index, "search", lambda *args, **options: pytest.fail("searched again"))
    _move(moved.projection, seed=3)
    again = evaluator(moved)
    assert len(searched) == 3 + 2
    assert again["base_ndcg@10"] == first["base_ndcg@10"]
    assert again["ndcg@10"] != first["ndcg@10"]
    _move(moved.encoder, seed=5)  # another encoder has another base
    other = evaluator(moved)
    assert len(searched) == 3 + 2 + 3
    monkeypatch.undo()
    assert dict(other) == dict(RetrievalEvaluator(QUERIES, CORPUS, RELEVANT)(moved))


def test_a_sentence_transformer_of_ours_is_evaluated_as_the_model_it_holds(evaluator, moved, tmp_path):
    from sentence_transformers import SentenceTransformer

    moved.save_pretrained(tmp_path / "model")
    wrapped = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")
    assert dict(evaluator(wrapped)) == dict(evaluator(moved))
    wrapped.truncate_dim = 4  # other vectors than those of the model
    report = evaluator(wrapped)
    assert list(report.results["datasets"]["data"]["systems"]) == ["bm25", "model"]


@pytest.mark.slow
def test_an_evaluator_selects_the_checkpoint_of_our_trainer(moved, tiny_pairs, tmp_path):
    evaluator = RetrievalEvaluator(QUERIES, CORPUS, RELEVANT, name="mine", show_progress_bar=False)
    args = IsotropicGaussianTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        use_cpu=True,
        per_device_train_batch_size=8,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = IsotropicGaussianTrainer(moved, args, tiny_pairs, tiny_pairs, evaluator=evaluator)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if f"eval_{evaluator.primary_metric}" in entry]
    assert len(logged) >= 2
    assert {entry["eval_mine_base_ndcg@10"] for entry in logged} == {evaluator(moved)["mine_base_ndcg@10"]}
    assert trainer.evaluate()["eval_mine_ndcg@10"] == evaluator(trainer.model)["mine_ndcg@10"]


def test_our_trainer_refuses_figures_that_would_replace_others(evaluator, tiny_model, tiny_pairs, tmp_path):
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = IsotropicGaussianTrainingArguments(**options, per_device_train_batch_size=8)
    named = RetrievalEvaluator(QUERIES, CORPUS, RELEVANT, name="mine", show_progress_bar=False)
    for given in (evaluator, [named, evaluator], [named, named]):
        with pytest.raises(UserError, match="expected one figure of each name, got (mine_)?ndcg@10 twice: name"):
            IsotropicGaussianTrainer(tiny_model, args, tiny_pairs, tiny_pairs, evaluator=given)
    # Only a call shows what a function returns.
    trainer = IsotropicGaussianTrainer(
        tiny_model, args, tiny_pairs, tiny_pairs, evaluator=[named, lambda model: {"ndcg@10": 1.0}]
    )
    with pytest.raises(UserError, match="got eval_ndcg@10 twice: .* or rename the figure"):
        trainer.evaluate()


def test_an_evaluator_works_in_sentence_transformers_trainer(evaluator, tiny_encoder_folder, tiny_pairs, tmp_path):
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    model = SentenceTransformer(str(tiny_encoder_folder), device="cpu")
    rows = Dataset.from_list([{"anchor": row["query"], "positive": row["positive"]} for row in tiny_pairs])
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        load_best_model_at_end=True,
        metric_for_best_model=evaluator.primary_metric,
    )
    trainer = SentenceTransformerTrainer(
        model, args, rows, loss=losses.MultipleNegativesRankingLoss(model), evaluator=evaluator
    )
    trainer.train()
    figures = [entry["eval_ndcg@10"] for entry in trainer.state.log_history if "eval_ndcg@10" in entry]
    assert len(figures) == 2
    assert trainer.state.best_metric == max(figures)
    (written,) = (tmp_path / "eval").glob("retrieval_step_2.json")
    assert read_results(written)["datasets"]["data"]["systems"]["model"]["ndcg@10"] == figures[-1]
    assert model.model_card_data.eval_results_dict[evaluator]["ndcg@10"] in figures


def test_pairs_are_queries_documents_and_judgements_and_equal_texts_one_document():
    pairs = [
        {"query": "a", "positive": "one", "negative": "three"},
        {"query": "a", "positive": "two"},
        {"query": "b", "positive": "two "},
    ]
    seen = {}

    class Recorder:
        def encode_query(self, texts):
            seen["queries"] = texts
            return np.eye(2, 4, dtype=np.float32)

        def encode_document(self, texts):
            seen["documents"] = texts
            return np.eye(4, dtype=np.float32)

    report = RetrievalEvaluator.from_pairs(pairs, ["two", {"title": "", "text": "four"}])(Recorder())
    assert seen == {"queries": ["a", "b"], "documents": ["one", "three", "two", "four"]}
    entry = report.results["datasets"]["data"]
    assert (entry["num_queries"], entry["num_documents"], entry["num_judgements"]) == (2, 4, 3)


@pytest.mark.parametrize("given", [["two", "four"], [{"text": "two"}, {"text": "four"}]], ids=["texts", "rows"])
def test_a_corpus_may_be_texts_or_rows(given):
    assert RetrievalEvaluator.from_pairs([{"query": "a", "positive": "one"}], given)


@pytest.mark.parametrize(
    ("queries", "corpus", "relevant", "message"),
    [
        ({}, CORPUS, RELEVANT, r"queries: expected at least one entry, got an empty dictionary"),
        (["q"], CORPUS, RELEVANT, r"queries: expected a dictionary by id, got list: .*from_pairs"),
        ({1: "text"}, CORPUS, RELEVANT, r"queries: expected ids that are texts, got 1: convert"),
        ({**QUERIES, "q9": " "}, CORPUS, RELEVANT, r"queries\['q9'\]: expected a text, got ' '"),
        (QUERIES, {"d0": "only"}, {"q0": {"d0"}}, r"corpus: expected at least two documents, got 1"),
        (QUERIES, {**CORPUS, "d9": 3}, RELEVANT, r"corpus\['d9'\]: expected a text or a dictionary .* got 3"),
        (QUERIES, {**CORPUS, "d9": {"text": 3}}, RELEVANT, r"corpus\['d9'\]: expected texts as title and text"),
        (QUERIES, CORPUS, {"q0": "d0"}, r"relevant_docs\['q0'\]: expected a set of document ids.* got 'd0'"),
        (QUERIES, CORPUS, {"q0": {"d0": 0.5}}, r"\['q0'\]\['d0'\]: expected an integer as gain, got 0\.5"),
        (QUERIES, CORPUS, {"q0": set()}, r"relevant_docs: expected a relevant document for some query, got none"),
        (QUERIES, CORPUS, {"q0": {"x"}, "q1": {"y"}}, r"only ids of corpus, got 'x' and 1 more: add the missing"),
        (QUERIES, CORPUS, {"x": {"d0"}}, r"relevant_docs: expected only ids of queries, got 'x': add"),
    ],
)
def test_wrong_data_are_a_user_error_when_the_evaluator_is_made(queries, corpus, relevant, message):
    with pytest.raises(UserError, match=message):
        RetrievalEvaluator(queries, corpus, relevant)


def test_other_wrong_arguments_are_a_user_error_too():
    with pytest.raises(UserError, match="expected k of at least 100"):
        RetrievalEvaluator(QUERIES, CORPUS, RELEVANT, k=10)
    with pytest.raises(UserError, match="no relevant document with its query's own id"):
        RetrievalEvaluator({"d0": "x"}, CORPUS, {"d0": {"d0"}}, drop_identical_ids=True)
    with pytest.raises(UserError, match="expected a BEIR folder"):
        RetrievalEvaluator.from_beir("nowhere")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (object(), "expected a model with encode_query and encode_document, got object"),
        (type("Odd", (ByHand,), {"similarity_fn_name": "manhattan"})(), "compares by cosine, dot, euclidean"),
        (type("Flat", (ByHand,), {"encode_query": lambda self, texts: np.zeros(3)})(), "one vector of the same width"),
    ],
    ids=["no encoder", "unknown similarity", "no matrix"],
)
def test_a_model_of_no_known_kind_is_a_user_error(evaluator, model, message):
    with pytest.raises(UserError, match=message):
        evaluator(model)


def test_a_name_is_in_front_of_every_figure():
    evaluator = RetrievalEvaluator(QUERIES, CORPUS, RELEVANT, name="mine")
    assert evaluator.primary_metric == "mine_ndcg@10"
    assert evaluator.greater_is_better
    assert all(figure.startswith("mine_") for figure in evaluator(ByHand()))


def test_a_report_is_shown_in_notebooks_and_can_be_sent_to_other_processes(evaluator):
    report = evaluator(ByHand())
    assert report._repr_markdown_().count("\n") == 3
    report.results["datasets"] = {"<b>": report.results["datasets"]["data"]}
    assert "&lt;b&gt;" in report._repr_html_()
    sent = pickle.loads(pickle.dumps(report))
    assert (dict(sent), str(sent)) == (dict(report), str(report))


def test_the_card_takes_a_report(evaluator, moved, tmp_path):
    from ragcun_hf.publishing.card import render_card
    from ragcun_hf.publishing.card_sources import join_results

    for model in (moved, ByHand()):
        report = evaluator(model)
        card = render_card(results=join_results([report.results]), training_record=None)
        assert f"{report['ndcg@10']:.4f}" in card
        assert f"{report['bm25_ndcg@10']:.4f}" in card


def test_a_report_names_the_weights_only_while_the_model_has_those_of_its_folder(evaluator, moved, tmp_path):
    from ragcun_hf.files import weights_digest

    def digest(model):
        return evaluator(model).results["model"]["weights_sha256"]

    moved.save_pretrained(tmp_path / "model")
    saved = weights_digest(tmp_path / "model")
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path / "model")
    assert digest(loaded) == saved is not None
    _move(loaded.projection, seed=2)
    assert digest(loaded) is None
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path / "model")
    loaded.reset_head(use_predictor=False)
    assert digest(loaded) is None
    assert digest(moved) is None  # of no folder
    moved.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path / "parts")
    assert digest(loaded) == weights_digest(tmp_path / "parts")


def test_seen_and_unseen_documents_are_reported_separately_if_the_folder_has_their_digests(evaluator, moved, tmp_path):
    moved.save_pretrained(tmp_path)
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path)
    assert "subsets" not in evaluator(loaded).results["datasets"]["data"]
    (tmp_path / DOCUMENTS_FILE).write_text(f"{text_digest('bread is food').hex()}\n", encoding="utf-8")
    report = evaluator(loaded)
    subsets = report.results["datasets"]["data"]["subsets"]
    assert {name: part["num_queries"] for name, part in subsets.items()} == {
        "seen_documents": 1,
        "unseen_documents": 2,
    }
    assert "seen documents (1)" in str(report)
    assert "unseen documents (2)" in str(report)
    with torch.no_grad():
        next(loaded.projection.parameters()).add_(0.1)  # trained further: with more documents, perhaps
    assert "subsets" not in evaluator(loaded).results["datasets"]["data"]


def test_a_model_that_our_trainer_saved_knows_the_documents_it_has_seen(tiny_model, tmp_path):
    rows = [{"query": f"what is {text}", "positive": text} for text in ("bread is food", "fish sleep in the water")]
    options = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    trainer = IsotropicGaussianTrainer(tiny_model, IsotropicGaussianTrainingArguments(**options), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    report = RetrievalEvaluator(QUERIES, CORPUS, RELEVANT)(tiny_model)
    assert "unseen documents (1)" in str(report)


def test_a_trained_encoder_is_compared_with_the_untrained_one(tiny_encoder_folder):
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), freeze_base=False)
    evaluator = RetrievalEvaluator(QUERIES, CORPUS, RELEVANT)
    before = evaluator(model)
    assert before["ndcg@10"] == before["base_ndcg@10"]
    _move(model.encoder, seed=6)
    after = evaluator(model)
    assert after["base_ndcg@10"] == before["base_ndcg@10"]
    assert after.results["isotropy"]["projection"] != before.results["isotropy"]["projection"]


def test_a_model_that_a_trainer_left_in_training_mode_is_measured_without_dropout(tiny_model):
    from ragcun_hf.evaluation.model_evaluation import apply_head

    torch.nn.init.normal_(tiny_model.projection.mlp[-1].weight)
    features = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    expected = apply_head(tiny_model.eval(), features)[0]
    assert np.array_equal(apply_head(tiny_model.train(), features)[0], expected)
    assert tiny_model.training
