"""Model cards: rendered from files, with no figure invented, moved or left out; checked by rendering them again."""

import configparser
import copy
import html
import importlib
import itertools
import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import jinja2
import pytest
import yaml
from huggingface_hub import ModelCard

from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.results import (
    mean_over_datasets,
    read_json_object,
    read_record,
    read_results,
    write_results,
)
from ragcun_hf.model.base_models import DEFAULT_BASE_MODEL
from ragcun_hf.model.embedded_isotropic_gaussian import EMBEDDED_NAME
from ragcun_hf.publishing.card import BEGIN_WORDS, CARD_TEMPLATE, END_WORDS, check_card, render_card, write_card
from ragcun_hf.publishing.card_content import card_sections
from ragcun_hf.publishing.card_findings import (
    compare_with_base,
    format_difference,
    format_figure,
    format_setting,
    verdict,
)
from ragcun_hf.publishing.card_labels import LICENSES_OF_BASES
from ragcun_hf.publishing.card_package import requirement
from ragcun_hf.publishing.card_sources import (
    PUBLISHED_FIGURES,
    join_results,
    nothing_measured,
    read_published,
    read_sources,
)

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
RECIPES = ("512dim_10k", "jepa_10k", "jepa_iso15_pred12", "pure_isotropy")


def _script(name):
    return importlib.import_module(f"ragcun_hf.cli.{name}")


def _comparison(difference, half_width=0.01):
    return {
        "metric": "ndcg@10",
        "difference": difference,
        "p_value": 0.0123,
        "low": difference - half_width,
        "high": difference + half_width,
        "wins": 30,
        "ties": 250,
        "losses": 20,
    }


def _figures(base, projection, predictor):
    values = {"base": base, "projection": projection, "predictor": predictor}
    return {
        "systems": {
            name: {"ndcg@10": value, "map@100": value - 0.05, "recall@10": 0.8, "recall@100": 0.9123, "mrr@10": 0.6}
            for name, value in values.items()
        },
        "comparisons": {name: _comparison(values[name] - base) for name in ("projection", "predictor")},
    }


def _dataset(*values):
    return {"split": "test", "num_queries": 1406, "num_documents": 5183, "num_judgements": 339, **_figures(*values)}


@pytest.fixture
def results():
    datasets = {"scifact": _dataset(0.65571, 0.62012, 0.70003), "my-docs": _dataset(0.33291, 0.3000, 0.33301)}
    datasets["scifact"]["subsets"] = {"unseen_documents": {"num_queries": 1041, **_figures(0.674, 0.6543, 0.675)}}
    return {
        "schema_version": 1,
        "created": "2025-01-01T00:00:00+00:00",
        "command": "python training/eval_beir.py --model_path checkpoints/small --datasets scifact --top_k 150",
        "commit": "0123456789abcdef-dirty",
        "versions": {"torch": "2.13.0", "ragcun_hf": "0.1"},
        "machine": {"processor": "Some CPU @ 2.10GHz", "cores": 2, "python": "3.11.7"},
        "model": {
            "path": "small",
            "name": "small",
            "similarity": "cosine",
            "base_model": "sentence-transformers/all-MiniLM-L6-v2",
            "use_predictor": True,
            "output_dim": 384,
            "projection_init": "identity",
            "projection_kind": "mlp",
            "freeze_base": True,
        },
        "settings": {"max_length": 256, "base_similarity": "cosine", "document_text": "title + ' ' + text"},
        "datasets": datasets,
        "mean": mean_over_datasets(datasets),
        "isotropy": {
            "base": {"effective_rank": 150.25, "sigreg": 0.0312},
            "projection": {"effective_rank": 200.75, "sigreg": 0.0101},
        },
    }


@pytest.fixture
def record():
    return {
        "data": {"script": "train_contrastive", "train": ["beir/scifact"], "split": "train", "rows": 12919},
        "model": {"base_model": "embedded", "dropout": 0.1, "output_dim": None},
        "seconds": {"features": 12.34, "training": 3.21},
        "steps": 1140,
        "essential": ["lambda_isotropy", "learning_rate"],
        "training_arguments": {"seed": 41, "learning_rate": 0.0005, "lambda_isotropy": 1.5, "logging_steps": 7777},
        "log_history": [{"loss": 0.9876}],
    }


@pytest.fixture
def published():
    return read_published(PUBLISHED_FIGURES, "jepa_10k")


@pytest.fixture
def sources(results, record, published, comparison):
    """Everything that a card can be rendered from."""
    return {
        "results": results,
        "training_record": record,
        "published": published,
        "comparison": comparison,
        "repo_id": "org/small",
        "plots": {"A plot": "plot.png"},
        "dataset_ids": ["org/pairs"],
        "license_id": "apache-2.0",
        "languages": ["en"],
    }


@pytest.fixture
def card(results, record, published):
    return render_card(results=results, training_record=record, published=published)


@pytest.fixture
def written(tmp_path, sources):
    """The path of a card that was rendered from the sources."""
    write_card(tmp_path / "README.md", **sources)
    return tmp_path / "README.md"


@pytest.fixture
def comparison(results):
    systems = {"base": 0.4943, "small": 0.4601, "small, predictor": 0.5167, "other": 0.4799}
    systems |= {"other, predictor": 0.4123, "base of other": 0.4321}
    pairs = list(itertools.combinations(systems, 2))

    def entry(shift):
        return {
            "systems": {name: {"ndcg@10": value + shift} for name, value in systems.items()},
            "comparisons": [
                {"system": second, "reference": first, **_comparison(systems[second] - systems[first], 0.0123)}
                for first, second in pairs
            ],
        }

    query = {"id": "q17", "text": "what happened in 1815", "system_value": 0.6309, "reference_value": 0.0}
    one = {"split": "test", "num_queries": 1406, **entry(0.1), "changed_queries": [{"gained": [query], "lost": []}]}
    return {
        "metric": "ndcg@10",
        "command": "python training/eval_beir.py --compare small other --datasets scifact nfcorpus",
        "systems": list(systems),
        "models": {"small": {"model": results["model"]}, "other": {"model": {**results["model"], "output_dim": 512}}},
        "datasets": {"scifact": one, "nfcorpus": {**one, **entry(-0.1)}},
        "overall": entry(0.0),
    }


def test_the_card_shows_the_figures(card):
    for text in ("0.6557", "0.6201", "0.7000", "-0.0356", "-0.0456 to -0.0256", "0.0123", "0.9123"):
        assert text in card
    assert "| mean of the data sets | frozen base | 0.4943 |" in card
    assert "| scifact test (1,406 queries) | projection | 0.6201 | 0.5701 | 0.9123 | 0.6000 | -0.0356 |" in card
    assert "scifact, unseen documents (1,041 queries)" in card
    assert "| effective rank (number of directions in use) | 150.2 | 200.8 |" in card


def test_figures_and_settings_are_written_for_readers():
    assert [format_figure(value) for value in (0.65, 100.46, None)] == ["0.6500", "100.5", "not measured"]
    assert [format_difference(value) for value in (0.01, -0.00001, None)] == ["+0.0100", "+0.0000", "not measured"]
    assert [format_setting(value) for value in (10_000, 0.0005, "a|b\nc")] == ["10,000", "0.0005", "a|b c"]
    assert [format_setting(value) for value in ([True, None], False, [])] == ["yes, not recorded", "no", "none"]


def test_the_card_shows_a_blend(results, record):
    text = render_card(results=results, training_record={**record, "blend": 0.4})
    assert "| blend of the initial with the trained weights (share of the trained ones) | 0.4 |" in text
    assert "blend of the" not in render_card(results=results, training_record=record)


def test_energy_and_held_out_figures_are_shown_or_said_to_be_missing(results, record):
    assert "| energy for encoding and training | not measured |" in render_card(
        results=results, training_record=record
    )
    measured = {"energy": {"kwh": 0.000321, "by": "codecarbon 3.3.2"}, "validation_ndcg@10": {"saved": 0.7125}}
    text = render_card(results=results, training_record={**record, **measured})
    assert "| energy for encoding and training, in kWh, estimated by codecarbon 3.3.2 | 0.000321 |" in text
    assert "| NDCG@10 on held-out pairs, as saved | 0.7125 |" in text


# Documents seen in training


def test_the_card_says_that_no_test_document_was_trained_on_only_where_that_is_recorded(results):
    sentence = "No test query's document was trained on"
    assert sentence not in render_card(results=results)
    results["datasets"]["my-docs"]["num_seen_queries"] = 0
    results["datasets"]["scifact"]["num_seen_queries"] = 365
    text = render_card(results=results)
    assert f"{sentence}: none of the documents that answer the queries of my-docs is, word for word," in text
    assert "scifact, unseen documents (1,041 queries)" in text
    del results["datasets"]["scifact"]
    text = render_card(results=results)
    assert sentence in text
    assert "was fitted to a corpus that may contain them" not in text
    results["model"]["lexical_dim"] = 384
    assert "was fitted to a corpus that may contain them" in render_card(results=results)
    assert "Results for seen and unseen documents: not measured" not in text
    results["datasets"]["my-docs"]["num_seen_queries"] = 1
    assert sentence not in render_card(results=results)


def test_an_evaluation_tells_whether_the_documents_of_its_queries_were_trained_on(
    tiny_encoder_folder, tiny_pairs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, pairs in (("train", tiny_pairs[:5]), ("test", tiny_pairs[5:]), ("both", tiny_pairs[4:])):
        rows = [{"query": pair["query"], "positive": pair["positive"]} for pair in pairs]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--train_data", "train.jsonl", "--base_model", str(tiny_encoder_folder), "--max_steps", "2", "--use_cpu"]
    _script("train_contrastive").main([*flags, "--output_dir", "mine", "--report_to", "none"])
    sentence = "No test query's document was trained on"
    for name, is_said in (("test", True), ("both", False)):
        flags = ["--model_path", "mine", "--pairs", f"{name}.jsonl", "--run_name", name]
        _script("eval_beir").main(flags)
        _script("render_card").main(["--model_path", "mine", "--results", f"results/{name}.json"])
        assert (sentence in Path("mine/README.md").read_text(encoding="utf-8")) is is_said


# Examples


def _example(**changed):
    example = {"query": "what is bread", "document_id": "d7", "document": "Flour.", "score": 0.71239}
    return {**example, "is_relevant": True, **changed}


def test_the_card_shows_the_examples_of_its_results_and_no_others(results, sources, tmp_path):
    assert "### Examples" not in render_card(results=results)
    wrong = _example(query="what is rye", document="A river.", score=0.5, is_relevant=False)
    results["datasets"]["my-docs"]["examples"] = {"q1": _example(), "q2": wrong}
    write_card(tmp_path / "README.md", **sources)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "document that the projection ranks first and its `cosine` score" in text
    assert "| my-docs | what is bread | Flour. | 0.7124 | yes |" in text
    assert "| my-docs | what is rye | A river. | 0.5000 | no |" in text
    check_card(tmp_path / "README.md", sources)
    _refused(tmp_path / "README.md", sources, text.replace("| 0.7124 | yes |", "| 0.9124 | yes |"))
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results


@pytest.mark.parametrize(
    "text",
    [
        "a | b",
        "![x](weights.bin)",
        "[a](b)",
        "<script>",
        BEGIN_WORDS,
        "`code`",
        "**bold**",
        "two\n\n## lines",
        "{{ x }}",
    ],
)
def test_a_text_of_the_corpus_stays_text(results, sources, tmp_path, text):
    results["datasets"]["my-docs"]["examples"] = {"q1": _example(document=text)}
    write_card(tmp_path / "README.md", **sources)
    check_card(tmp_path / "README.md", sources)
    (row,) = [line for line in (tmp_path / "README.md").read_text().splitlines() if "what is bread" in line]
    cells = row.strip("| ").split(" | ")
    assert len(cells) == 5
    assert html.unescape(cells[2]) == " ".join(text.split())
    assert not re.search(r"[<>`*\[\]|]", cells[2])


def test_a_command_keeps_examples_for_the_card_only_if_asked_to(
    tiny_encoder_folder, tiny_pairs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder)).save_pretrained("mine")
    rows = [{"query": pair["query"], "positive": pair["positive"]} for pair in tiny_pairs]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for count in (0, 3):
        flags = ["--model_path", "mine", "--pairs", "test.jsonl", "--examples", str(count)]
        _script("eval_beir").main(flags)
        capsys.readouterr()
        _script("render_card").main(["--model_path", "mine", "--results", "results/mine.json"])
        text, said = Path("mine/README.md").read_text(encoding="utf-8"), capsys.readouterr().out
        assert sum(row["query"] in text for row in rows) == count
        assert ("It shows texts of queries and documents" in said) is bool(count)
    for flags in (
        ["--base_model", str(tiny_encoder_folder), "--examples", "2"],
        ["--model_path", "mine", "--examples", "-1"],
    ):
        with pytest.raises(UserError, match="--examples expects"):
            _script("eval_beir").main([*flags, "--pairs", "test.jsonl"])


# Comparison with other models


def test_the_card_shows_a_comparison_with_other_models(results, comparison):
    text = render_card(results=results, comparison=comparison)
    assert "### Comparison with other models" in text
    assert "| other | small | 0.4799 | 0.4601 | +0.0198 | +0.0075 to +0.0321 | 0.0123 | 30 / 250 / 20 |" in text
    assert "| other | small, predictor | 0.4799 | 0.5167 | -0.0368 |" in text
    assert "on scifact test, nfcorpus test, averaged over data sets" in text
    assert "0.4123" not in text  # another model's predictor
    assert "base of other" not in text
    assert "| small | base |" not in text  # is in the table of results, data set by data set
    assert "python training/eval_beir.py --compare small other" in text
    for words in ("1815", "q17", "0.6309"):  # a query and its figure
        assert words not in text


def test_a_comparison_of_one_data_set_shows_its_figures(results, comparison):
    del comparison["datasets"]["nfcorpus"]
    text = render_card(results=results, comparison=comparison)
    assert "| other | small | 0.5799 | 0.5601 | +0.0198 |" in text


def test_a_comparison_of_other_models_is_refused(results, comparison):
    facts = comparison["models"].pop("small")
    with pytest.raises(UserError, match="expects a file with the model 'small' as in --results .*, got other"):
        render_card(results=results, comparison=comparison)
    comparison["models"]["small"] = {"model": {**facts["model"], "output_dim": 768}}
    with pytest.raises(UserError, match="expects a file with the model 'small' as in --results"):
        render_card(results=results, comparison=comparison)
    with pytest.raises(UserError, match="expects a file that ragcun eval-beir --compare wrote"):
        render_card(results=results, comparison=results)


def test_the_card_shows_training_settings_and_counts(card):
    for row in ("| training pairs | 12,919 |", "| `seed` | 41 |", "| optimizer steps | 1,140 |"):
        assert row in card
    assert "7777" not in card  # how often it logged says nothing about the model
    assert "0.9876" not in card


def test_the_arguments_that_the_record_calls_essential_come_first(results, record, card):
    rows = ["| `lambda_isotropy` | 1.5 |", "| `learning_rate` | 0.0005 |", "| `seed` | 41 |"]
    assert "\n".join(rows) in card
    del record["essential"]  # a record of an earlier version
    assert "\n".join([rows[2], rows[1], rows[0]]) in render_card(results=results, training_record=record)


def test_losses_against_the_base_are_written_out(card):
    assert (
        "NDCG@10 of the projection is below the frozen base on scifact (0.6201 against 0.6557, -0.0356) and "
        "my-docs (0.3000 against 0.3329, -0.0329)." in card
    )
    assert "NDCG@10 of the predictor is above the frozen base on scifact" in card
    assert "NDCG@10 of the predictor does not differ significantly from the frozen base" in card
    assert "no relevant document among the training documents, NDCG@10 of the projection is below" in card
    assert "wins in some of the measurements made here and loses in others" in card


def test_bm25_stands_beside_the_model_and_decides_no_verdict(results, record):
    without = verdict(compare_with_base(results["datasets"]))
    for value, entry in zip((0.69, 0.1), results["datasets"].values(), strict=True):
        base = entry["systems"]["base"]["ndcg@10"]
        entry["systems"]["bm25"] = {"ndcg@10": value, "recall@100": 0.8999}
        entry["comparisons"]["bm25"] = _comparison(value - base)
        entry["systems"]["fusion"] = {"ndcg@10": value + 0.005}
        entry["comparisons"]["fusion"] = _comparison(value + 0.005 - base)
    results["settings"] |= {"bm25": "lucene, english stems", "fusion": "0.7 and 0.3"}
    card = render_card(results=results, training_record=record)
    assert verdict(compare_with_base(results["datasets"])) == without
    assert "BM25 ranks by the words that document and query share (lucene, english stems)." in card
    assert "The fusion ranks by both (0.7 and 0.3)." in card
    assert "| scifact test (1,406 queries) | BM25 | 0.6900 |" in card
    assert "| scifact test (1,406 queries) | fusion of both | 0.6950 |" in card
    assert "which needs no training, is above that of the projection" in card
    assert "above that of the projection (not tested for significance) on scifact (0.6900 against 0.6201)." in card
    assert "above that of the predictor" not in card
    named = [each.metric_name for each in ModelCard(card).data.eval_results]
    assert not [name for name in named if "bm25" in name or "fusion" in name]


def test_a_comparison_shows_the_model_against_bm25(results, comparison):
    for entry in (*comparison["datasets"].values(), comparison["overall"]):
        entry["systems"]["bm25"] = {"ndcg@10": 0.4567}
        against = {"reference": "bm25", **_comparison(0.0034)}
        entry["comparisons"] += [{"system": name, **against} for name in ("small", "other")]
    card = render_card(results=results, training_record=None, comparison=comparison)
    assert "| small | bm25 | 0.4601 | 0.4567 | +0.0034 |" in card
    assert "| other | bm25 |" not in card


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ((-0.1, -0.1), "the frozen base alone retrieves better"),
        ((0.1, 0.1), "this model retrieves better"),
        ((0.0, 0.0), "does not differ significantly"),
        ((-0.1, 0.0), "is worse than its frozen base; on none is it better"),
        ((0.1, 0.0), "is better than its frozen base; on none is it worse"),
    ],
)
def test_verdict_follows_the_figures(differences, words):
    entry = _dataset(0.5, 0.5 + differences[0], 0.5 + differences[1])
    assert words in verdict(compare_with_base({"scifact": entry}))


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ((None, None), "No difference from the frozen base was tested for significance"),
        ((-0.1, None), "Some differences from the frozen base were not tested for significance"),
        ((0.1, None), "Some differences from the frozen base were not tested for significance"),
        ((0.1, -0.1), "wins in some of the measurements made here and loses in others"),
    ],
)
def test_verdict_claims_nothing_about_untested_differences(differences, words):
    entry = _dataset(0.5, *(0.55 if difference is None else 0.5 + difference for difference in differences))
    for system, difference in zip(("projection", "predictor"), differences, strict=True):
        if difference is None:
            del entry["comparisons"][system]
    assert words in verdict(compare_with_base({"scifact": entry}))


def test_published_figures_are_marked(card):
    section = card[card.index("## Published figures") :]
    assert "As published, not measured here." in section
    for figure in ("0.4779", "0.6401", "0.3158", "0.6557", "0.3329"):
        assert figure in section


def test_published_figures_of_another_base_are_not_to_be_compared(card, results, published):
    assert "cannot be compared with the results above" in card
    results["model"]["base_model"] = published["base_model"]
    card = render_card(results=results, published=published)
    assert "cannot be compared" not in card


def test_without_published_figures_there_is_no_such_section(results):
    assert "Published" not in render_card(results=results)


def test_missing_figures_are_not_measured(results):
    del results["datasets"]["my-docs"]
    del results["datasets"]["scifact"]["subsets"]
    del results["datasets"]["scifact"]["systems"]["projection"]["mrr@10"]
    results["isotropy"] = {}
    card = render_card(results=results)
    assert "| scifact test (1,406 queries) | projection | 0.6201 | 0.5701 | 0.9123 | not measured |" in card
    assert "Isotropy: not measured." in card
    assert "Results for seen and unseen documents: not measured" in card
    assert "Data and settings: not recorded." in card


def test_a_card_without_any_result_says_so(results):
    results["datasets"] = results["mean"] = {}
    card = render_card(results=results)
    assert "Retrieval: not measured." in card
    assert "was not measured" in card


def test_metadata_round_trips(card):
    data = ModelCard(card).data
    assert data.library_name == "sentence-transformers"  # whose snippet on the Hub embeds texts
    assert data.pipeline_tag == "sentence-similarity"
    assert data.license == "apache-2.0"
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    libraries = {"sentence-transformers", "transformers"}
    assert {*libraries, "isotropic-gaussian", "feature-extraction", "retrieval", "jepa"} == set(data.tags)
    found = {
        (result.dataset_type, result.metric_type, result.metric_name): result.metric_value
        for result in data.eval_results
    }
    assert len(found) == 16  # two data sets, two systems, four metrics
    assert found["BeIR/scifact", "ndcg_at_10", "NDCG@10 (projection)"] == 0.6201
    assert found["my-docs", "ndcg_at_10", "NDCG@10 (predictor)"] == 0.333


@pytest.mark.parametrize(
    "path", ["/home/jane/disk", "~/jane/disk", "C:\\Users\\jane\\disk", "/jane/disk/", "disk", "./disk"]
)
def test_what_is_no_hub_id_is_not_claimed(results, path):
    results["model"]["base_model"] = path
    text = render_card(results=results, dataset_ids=["org/pairs"])
    data = ModelCard(text).data
    assert data.base_model is None
    assert data.datasets == ["org/pairs"]
    assert "disk`" in text
    assert "jane" not in text


def test_no_path_of_a_setting_is_in_the_card(results, record):
    path = "/home/jane/place"
    results["settings"] |= {"document_text": path, "cache": [path, {"in": path}]}
    record["data"] |= {"train": [path], "documents": path}
    record["training_arguments"] |= {"resume_from_checkpoint": path, "deepspeed": path}
    text = render_card(results=results, training_record=record)
    assert text.count("place") > 6
    assert "jane" not in text


@pytest.mark.parametrize("start", ["absolute", "relative"])
def test_a_local_base_is_no_id_in_the_card_of_its_model(tiny_encoder_folder, tiny_pairs, tmp_path, monkeypatch, start):
    """`models/encoder` has the form of a Hub id, and the folder above it may have a user's name."""
    base = tmp_path / "jane" / "encoder"
    shutil.copytree(tiny_encoder_folder, base)
    monkeypatch.chdir(tmp_path)
    pairs = tmp_path / "jane" / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs), encoding="utf-8")
    monkeypatch.chdir(tmp_path if start == "relative" else "/")
    model = IsotropicGaussianModel.from_encoder("jane/encoder" if start == "relative" else str(base))
    options = {"output_dir": str(tmp_path / "mine"), "max_steps": 2, "use_cpu": True, "report_to": "none"}
    args = IsotropicGaussianTrainingArguments(**options, save_strategy="no", disable_tqdm=True)
    trainer = IsotropicGaussianTrainer(model, args, train_dataset=tiny_pairs)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    assert "![Loss terms during training](learning_curves.png)" in text  # of two steps, without validation
    assert (tmp_path / "mine" / "learning_curves.png").is_file()
    assert ModelCard(text).data.base_model is None
    assert "`encoder`" in text
    assert "jane" not in text


def test_a_local_base_and_local_pairs_are_no_paths_in_the_card_of_a_command(
    tiny_encoder_folder, tiny_pairs, tmp_path, monkeypatch
):
    shutil.copytree(tiny_encoder_folder, tmp_path / "jane" / "encoder")
    pairs = tmp_path / "jane" / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs), encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    flags = ["--base_model", "../jane/encoder", "--train_data", str(pairs), "--max_steps", "2", "--use_cpu"]
    _script("train_contrastive").main([*flags, "--output_dir", "mine", "--report_to", "none"])
    flags = ["--model_path", "mine", "--pairs", "../jane/pairs.jsonl", "--run_name", "mine"]
    _script("eval_beir").main(flags)
    _script("render_card").main(["--model_path", "mine", "--results", "results/mine.json"])
    text = Path("mine/README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.base_model is None
    assert "encoder" in text
    assert "pairs.jsonl" in text
    assert "jane" not in text
    assert "![Loss terms during training](learning_curves.png)" in text
    assert Path("mine/learning_curves.png").is_file()


def test_a_card_names_no_license_that_nobody_named(results):
    results["model"]["base_model"] = "org/encoder"
    text = render_card(results=results)
    assert ModelCard(text).data.license is None
    assert "- The model: not stated; ask whoever published it." in text
    text = render_card(results=results, license_id="cc-by-nc-4.0")
    assert ModelCard(text).data.license == "cc-by-nc-4.0"
    assert "- The model: `cc-by-nc-4.0`, named by whoever published it." in text


def test_the_license_of_a_known_base_is_that_of_the_model_unless_another_is_named(results):
    for base, license_of_base in LICENSES_OF_BASES.items():
        results["model"]["base_model"] = base
        text = render_card(results=results)
        assert ModelCard(text).data.license == license_of_base
        assert f"- The model: `{license_of_base}`, that of its base." in text
    assert {DEFAULT_BASE_MODEL, EMBEDDED_NAME} <= set(LICENSES_OF_BASES)
    assert ModelCard(render_card(results=results, license_id="other")).data.license == "other"


@pytest.mark.parametrize("license_id", ["MIT", "Apache 2.0", "", "mit\ntags: [best]", "no license"])
def test_a_license_that_the_hub_would_refuse_is_refused(results, license_id):
    with pytest.raises(UserError, match="--license expects an id of the Hub such as apache-2.0 or mit, got"):
        render_card(results=results, license_id=license_id)


def test_languages_are_in_the_metadata_as_they_were_named(results):
    assert ModelCard(render_card(results=results)).data.language is None
    languages = ["no", "zh-Hant", "multilingual"]  # plain, `no` would be a YAML false
    assert ModelCard(render_card(results=results, languages=languages)).data.language == languages
    for wrong in ("English", "e", "en de", ""):
        with pytest.raises(UserError, match="--language expects codes such as en, de or multilingual, got"):
            render_card(results=results, languages=["en", wrong])


def test_a_card_names_the_versions_that_the_package_requires(card):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    required = setup["options"]["install_requires"].split()
    (transformers,) = (line for line in required if line.startswith("transformers>"))
    (torch,) = (line for line in required if line.startswith("torch>"))
    (others,) = (line for line in setup["options.extras_require"]["mteb"].split() if line.startswith("sentence"))
    assert f'pip install "{torch}" "{transformers}"' in card
    assert f"`AutoModel` needs `{transformers}`; `SentenceTransformer` also needs `{others}`." in card
    assert setup["options.extras_require"]["faiss"].strip() in card


def test_without_an_installed_package_a_card_says_what_to_do(results, monkeypatch):
    monkeypatch.setattr("ragcun_hf.publishing.card_package.PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"expected the installed package .* run pip install -e"):
        render_card(results=results)
    with pytest.raises(UserError, match="to require no-such-package, got no such requirement"):
        monkeypatch.undo()
        requirement("no-such-package")


def test_a_card_cites_library_and_paper_by_the_facts_of_the_checkout(card):
    block = card[card.index("```bibtex") : card.index("## Reproduce")]
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    metadata, (paper,) = setup["metadata"], cff["references"]
    assert cff["authors"] == [{"name": metadata["author"]}]
    assert (cff["version"], cff["license"]) == (metadata["version"], metadata["license_expression"])
    software, article = block.split("@misc")
    for fact in (cff["title"], metadata["description"], cff["authors"][0]["name"]):
        assert f"{fact}".replace("_", r"\_") in software
    assert "version = {0.1}" in software  # of the package that measured the figures
    names = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    facts = (paper["title"], names, str(paper["year"]), paper["identifiers"][0]["value"].removeprefix("arXiv:"))
    for fact in facts:
        assert f"= {{{fact}}}" in article.replace("{{LeJEPA}", "{LeJEPA")
    assert "http" not in block


def test_a_card_without_figures_cites_no_version(results):
    empty = nothing_measured("small", {"base_model_name": "org/encoder"})
    assert "version = " not in render_card(results=empty)


def test_repo_id_and_plots_are_used(results):
    card = render_card(results=results, repo_id="org/name", plots={"A plot": "plot.png"})
    assert 'AutoModel.from_pretrained("org/name", trust_remote_code=True)' in card
    assert "![A plot](plot.png)" in card
    assert card.count("# name\n") == 1


def test_the_address_of_a_plot_is_that_of_its_file_whatever_its_name(results):
    name = "a #1? 50% (b) [c].png"
    (address,) = re.findall(
        r"^!\[A plot\]\((.*)\)$", render_card(results=results, plots={"A plot": name}), re.MULTILINE
    )
    assert not set(address) & set(" ?#()[]")
    assert unquote(address) == name


def test_tables_are_unbroken(card):
    lines = card.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|---"):
            assert line.count("|") == lines[number - 1].count("|") == lines[number + 1].count("|")
    assert "\n\n\n" not in card


@pytest.mark.parametrize("is_plain", [False, True])
def test_the_template_names_only_what_the_renderer_gives(results, record, published, comparison, is_plain):
    joined = join_results([results])
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    template = environment.from_string(CARD_TEMPLATE.read_text(encoding="utf-8"))
    context = {"card_data": "", "name": "n", "model_id": "n", "plots": {}, "license": (None, "")}
    context["is_plain"] = is_plain
    template.render(**context, **card_sections(joined, record, published, comparison))


def test_the_template_itself_holds_no_figure():
    text = CARD_TEMPLATE.read_text(encoding="utf-8")
    assert not re.findall(r"\d\.\d|\b\d{3,}", text.replace("@100", ""))


# The check


def test_a_card_as_rendered_passes(written, sources):
    check_card(written, sources)


def _replaced(text, old, new):
    assert old in text
    return text.replace(old, new, 1)


def _refused(path, sources, changed):
    assert changed != path.read_text(encoding="utf-8")
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md, line \d+: expected .* as rendered .*: render the card again"):
        check_card(path, sources)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0.6201", "0.6557"),  # base and head, everywhere
        ("| frozen base | 0.6557", "| projection | 0.6201"),
        ("value: 0.6201\n", "value: 0.7\n"),  # projection and predictor in the metadata
        ("- NDCG@10 of the projection is below", "- NDCG@10 of the predictor is above"),
        ("## Limits", "## Training\n"),
    ],
)
def test_parts_of_a_card_cannot_be_swapped(written, sources, one, other):
    text = written.read_text(encoding="utf-8")
    assert one in text
    assert other in text
    _refused(written, sources, text.replace(one, "\0").replace(other, one).replace("\0", other))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Text
        ("(0.6201 against 0.6557, -0.0356)", "(0.6557 against 0.6201, -0.0356)"),
        ("(0.6201 against 0.6557, -0.0356)", "(0.6201 against 0.6557, +0.0356)"),
        ("is below the frozen base on scifact", "is fine on scifact"),
        ("and loses in others", "and never loses"),
        ("## Limits", "It is the best.\n\n## Limits"),
        ("not measured here.**", "measured.**"),
        ("# small", "# small "),
        ("org/small", "org/other"),
        ("](plot.png)", "](better.png)"),
        ("torch 2.13.0", "torch 2.14.0"),
        # Tables
        ("| projection | 0.6201 |", "| projection | 0.6557 |"),
        ("| 0.4799 | 0.4601 |", "| 0.4601 | 0.4799 |"),
        ("| mean of", "| best | small | 0.9 |\n| mean of"),
        ("| 12,919 |", "| 45,000 |"),
        # Metadata
        ("value: 0.6201", "value: 0.7201"),
        ("- jepa\n", "- jepa\n- best\n"),
        ("license: apache-2.0\n", ""),
        ("license: apache-2.0\n", "license: mit\n"),
        ("language:\n- en\n", "language:\n- de\n"),
    ],
)
def test_no_part_of_a_card_can_be_changed(written, sources, old, new):
    _refused(written, sources, _replaced(written.read_text(encoding="utf-8"), old, new))


@pytest.mark.parametrize(
    "start",
    ["| my-docs test (1,406 queries) | projection", "- NDCG@10 of the projection is below", "- For queries with no"],
)
def test_a_loss_cannot_be_left_out(written, sources, start):
    lines = written.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(start)]
    _refused(written, sources, "".join(kept))


@pytest.mark.slow
def test_no_line_can_be_left_out(tmp_path, results):
    path = tmp_path / "README.md"
    write_card(path, results=results)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) > 150
    for number in range(0, len(lines), 8):
        path.write_text("".join(lines[:number] + lines[number + 1 :]), encoding="utf-8")
        with pytest.raises(UserError):
            check_card(path, {"results": results})


@pytest.mark.parametrize("more", ["\n", "The best of the web\n", " "])
def test_nothing_can_follow_a_card(written, sources, more):
    _refused(written, sources, written.read_text(encoding="utf-8") + more)


def test_the_end_of_a_card_cannot_be_left_out(written, sources):
    text = written.read_text(encoding="utf-8")
    _refused(written, sources, text[: text.index("## Published")])
    written.write_text(text, encoding="utf-8")
    _refused(written, sources, text.removesuffix("\n"))


def test_the_message_shows_what_differs(written, sources):
    text = written.read_text(encoding="utf-8")
    written.write_text(text.replace("(0.6201 against", "(0.7201 against"), encoding="utf-8")
    line = text.splitlines().index(next(line for line in text.splitlines() if "(0.6201 against" in line)) + 1
    with pytest.raises(UserError, match=rf"line {line}: expected '.*scifact \(0\.6201 .*, got '.*scifact \(0\.7201 "):
        check_card(written, sources)


@pytest.mark.parametrize("part", ["results", "training_record", "published", "comparison", "repo_id", "dataset_ids"])
def test_a_card_of_other_sources_is_refused(written, sources, part):
    if part == "results":
        sources["results"]["datasets"]["scifact"]["systems"]["projection"]["ndcg@10"] = 0.61
    else:
        sources[part] = () if part == "dataset_ids" else None
    with pytest.raises(UserError, match="render the card again"):
        check_card(written, sources)


# The user's own words


def _with_words(path, words):
    text = path.read_text(encoding="utf-8")
    path.write_text(_replaced(text, f"{BEGIN_WORDS}\n", f"{BEGIN_WORDS}\n{words}"), encoding="utf-8")


@pytest.mark.parametrize(
    "words",
    [
        "For questions about *our* manuals.\n",
        "\n## What it is for\n\n- manuals\n- [an address](https://example.org/a)\n\n![a picture](picture.png)\n\n",
        "Better than ninety percent of the rest, {{ name }} {% if %}, \\g & more; a < b.\n",
        "适合一般的中文问题。\r\n",
    ],
)
def test_words_without_digits_pass_and_are_kept(written, sources, words):
    _with_words(written, words)
    check_card(written, sources)
    before = written.read_text(encoding="utf-8")
    assert words.replace("\r", "") in before
    sources["results"]["datasets"]["scifact"]["systems"]["projection"]["ndcg@10"] = 0.61
    write_card(written, **sources)
    assert before != written.read_text(encoding="utf-8")
    assert words.replace("\r", "") in written.read_text(encoding="utf-8")
    check_card(written, sources)


@pytest.mark.parametrize(
    ("words", "digit"),
    [
        ("NDCG@10 of .9", "1"),
        ("９", "９"),  # full-width
        ("٩٠", "٩"),  # Arabic
        ("९", "९"),  # Devanagari
        ("𝟗", "𝟗"),  # mathematical
        ("x²", "²"),
        ("Ⅸ", "Ⅸ"),
        ("½", "½"),
        ("⑨", "⑨"),
        ("〇", "〇"),
        ("&#57;", "5"),
        ("&half; of it", "½"),
        ("| projection | 9 |", "9"),
        ("![a plot](plot9.png)", "9"),
        ("`9`", "9"),
    ],
)
def test_a_digit_in_the_words_is_refused(written, sources, words, digit):
    _with_words(written, f"Fine.\n{words}\n")
    line = written.read_text(encoding="utf-8").splitlines().index(words) + 1
    message = rf"README\.md, line {line}: expected your own words without digits, got {re.escape(repr(digit))}"
    with pytest.raises(UserError, match=message):
        check_card(written, sources)
    before = written.read_bytes()
    with pytest.raises(UserError, match=message):
        write_card(written, **sources)
    assert written.read_bytes() == before


@pytest.mark.parametrize("words", ["<details>", "<!-- ", "</p>", "a <div hidden>", "```", "  ~~~text", "<?php", "<!X"])
def test_words_that_could_hide_the_rest_are_refused(written, sources, words):
    _with_words(written, f"{words}\n")
    with pytest.raises(UserError, match="expected plain Markdown.* could hide the rest"):
        check_card(written, sources)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (BEGIN_WORDS, f"{BEGIN_WORDS}\n{END_WORDS}\n{BEGIN_WORDS}"),
        (BEGIN_WORDS, f"{BEGIN_WORDS}\n{BEGIN_WORDS}"),
        (END_WORDS, f"{END_WORDS}\n{END_WORDS}"),
        (END_WORDS, ""),
        (BEGIN_WORDS, ""),
        (f"{BEGIN_WORDS}\n{END_WORDS}", f"{END_WORDS}\n{BEGIN_WORDS}"),
        (f"{BEGIN_WORDS}\n{END_WORDS}", f"{BEGIN_WORDS}{END_WORDS}"),
        (f"{BEGIN_WORDS}\n{END_WORDS}", f"{BEGIN_WORDS}\n    {END_WORDS}"),
        (f"{BEGIN_WORDS}\n{END_WORDS}", f"{BEGIN_WORDS} words\n{END_WORDS}"),
    ],
)
def test_a_section_that_is_doubled_or_open_is_refused(written, sources, old, new):
    written.write_text(_replaced(written.read_text(encoding="utf-8"), old, new), encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md: expected your own words between one line"):
        check_card(written, sources)
    with pytest.raises(UserError, match=r"README\.md: expected your own words between one line"):
        write_card(written, **sources)  # which would lose words


def test_the_section_cannot_be_elsewhere(written, sources):
    text = written.read_text(encoding="utf-8").replace(f"{BEGIN_WORDS}\n{END_WORDS}\n\n", "")
    written.write_text(text.replace("## Limits", f"{BEGIN_WORDS}\n{END_WORDS}\n\n## Limits"), encoding="utf-8")
    with pytest.raises(UserError, match="as rendered from the sources"):
        check_card(written, sources)


def test_a_card_of_an_older_form_must_be_rendered_again_and_can_be(written, sources):
    text = written.read_text(encoding="utf-8").replace(f"{BEGIN_WORDS}\n{END_WORDS}\n\n", "")
    written.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="got one of an older form: render the card again"):
        check_card(written, sources)
    write_card(written, **sources)
    check_card(written, sources)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_card_that_cannot_be_read_is_named(written, sources, content):
    written.unlink() if content is None else written.write_bytes(content)
    with pytest.raises(UserError, match=r"expected a model card, could not read .*README\.md"):
        check_card(written, sources)


# Templates


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.md"
    path.write_text(CARD_TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def _append(path, text):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


@pytest.mark.parametrize("line", ["Up to 0.9999 NDCG@10.", "{{ 0.9 }}", "½"])
def test_a_template_with_figures_of_its_own_is_refused(template, results, line):
    _append(template, f"\n{line}\n")
    with pytest.raises(UserError, match=rf"template\.md, line \d+: expected digits only .*{re.escape(line)}"):
        render_card(template=template, results=results)


def test_a_card_of_another_template_is_written_and_does_not_pass(template, tmp_path, results):
    _append(template, "\nThe end.\n")
    write_card(tmp_path / "README.md", template=template, results=results)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").endswith("The end.\n")
    with pytest.raises(UserError, match="render the card again, without --template"):
        check_card(tmp_path / "README.md", {"results": results})


def test_a_template_needs_the_section_of_own_words_once(template, results):
    text = template.read_text(encoding="utf-8")
    section = f"{BEGIN_WORDS}\n{END_WORDS}\n"
    for changed in (text.replace(section, ""), text.replace(section, section * 2)):
        template.write_text(changed, encoding="utf-8")
        with pytest.raises(UserError, match="expected the lines .* once in the card"):
            render_card(template=template, results=results)


def test_a_value_cannot_bring_a_second_section(results):
    results["model"]["base_model"] = f"x`\n{BEGIN_WORDS}\n{END_WORDS}\n`"
    card = render_card(results=results)
    assert (card.count(BEGIN_WORDS), card.count(END_WORDS)) == (1, 1)


def test_a_broken_template_is_the_users_to_change(template, results):
    template.write_text("---\n{{ card_data }}\n---\n{% if %}", encoding="utf-8")
    with pytest.raises(UserError, match="expected a Jinja template"):
        render_card(template=template, results=results)


# Sources


def test_results_of_one_model_are_joined(results):
    first, second = copy.deepcopy(results), copy.deepcopy(results)
    del first["datasets"]["my-docs"], second["datasets"]["scifact"]
    joined = join_results([first, second])
    assert joined["mean"] == results["mean"]
    assert len(joined["measurements"]) == 2
    with pytest.raises(UserError, match="each data set once, got 'scifact' twice"):
        join_results([results, first])
    second["model"]["output_dim"] = 512
    with pytest.raises(UserError, match="files of one model"):
        join_results([first, second])


def test_published_figures_are_those_of_the_published_table():
    expected = {"jepa_10k": 0.4779, "512dim_10k": 0.4726, "jepa_iso15_pred12": 0.4610, "pure_isotropy": 0.4562}
    found = {name: read_published(PUBLISHED_FIGURES, name)["figures"][0]["value"] for name in RECIPES}
    assert found == expected
    assert read_published(PUBLISHED_FIGURES, "no_such_recipe") is None


def test_committed_cards_are_what_their_sources_are_rendered_to():
    assert sorted(path.stem for path in CARDS.glob("*.md") if path.name != "README.md") == list(RECIPES)
    for name in RECIPES:
        sources = {
            "results": read_results(CARDS / "results" / f"{name}.json"),
            "training_record": read_json_object(CARDS / "results" / f"{name}.training.json"),
            "published": read_published(PUBLISHED_FIGURES, name),
            "comparison": read_json_object(CARDS / "results" / "comparison.json"),
        }
        check_card(CARDS / f"{name}.md", sources)


# The command


@pytest.fixture
def script():
    return _script("render_card")


@pytest.fixture
def model_folder(tmp_path, results, record):
    write_results(tmp_path / "results" / "small.json", results)
    (tmp_path / "results" / "small").mkdir()
    (tmp_path / "results" / "small" / "comparison.png").write_bytes(b"png")
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "training_record.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"output_dim": 384, "use_predictor": True}), encoding="utf-8")
    return folder


def _flags(folder, *more):
    return ["--model_path", str(folder), "--results", str(folder.parent / "results" / "small.json"), *more]


def test_script_writes_the_card_into_the_model_folder(script, model_folder, capsys):
    script.main(_flags(model_folder, "--recipe", "jepa_10k", "--repo_id", "org/small"))
    text = (model_folder / "README.md").read_text(encoding="utf-8")
    assert "12,919" in text
    assert "0.4779" in text
    assert "](comparison.png)" in text
    assert sorted(path.name for path in model_folder.iterdir()) == [
        ".eval_results",
        "README.md",
        "card_sources.json",
        "comparison.png",
        "config.json",
        "results",
        "training_record.json",
    ]
    entries = yaml.safe_load((model_folder / ".eval_results" / "scifact.yaml").read_text(encoding="utf-8"))
    assert entries[0]["dataset"] == {"id": "mteb/scifact", "task_id": "SciFact_default_test"}
    assert entries[0]["value"] == 62.012  # of the projection; of a set that no leaderboard has there is no file
    assert [path.name for path in (model_folder / ".eval_results").iterdir()] == ["scifact.yaml"]
    said = capsys.readouterr().out
    assert "Wrote" in said
    assert "Next: ragcun push --model_path " in said


@pytest.mark.parametrize(
    "more", [[], ["--comparison", "--dataset_ids", "--training_record", "--license", "--language"]]
)
def test_the_kept_sources_are_rendered_to_the_same_card_again(script, model_folder, comparison, record, more):
    file, other_record = model_folder.parent / "results" / "beside.json", model_folder.parent / "other.json"
    for entry in comparison["datasets"].values():
        entry["changed_queries"] = [{"query": "q1", "text": "a text that stays at home"}]
    file.write_text(json.dumps(comparison), encoding="utf-8")
    other_record.write_text(json.dumps({**record, "steps": 7}), encoding="utf-8")
    values = {"--comparison": str(file), "--dataset_ids": "org/pairs", "--training_record": str(other_record)}
    values |= {"--license": "mit", "--language": "en"}
    flags = [word for flag in more for word in (flag, values[flag])]
    script.main(_flags(model_folder, "--recipe", "jepa_10k", "--repo_id", "org/small", *flags))
    sources = read_sources(model_folder)
    assert "stays at home" not in json.dumps(sources)
    text = (model_folder / "README.md").read_text(encoding="utf-8")
    assert ("| optimizer steps | 7 |" in text) is bool(more)
    data = ModelCard(text).data
    assert (data.license, data.language) == (("mit", ["en"]) if more else ("apache-2.0", None))
    assert render_card(**sources) == text
    check_card(model_folder / "README.md", sources)


def test_the_sources_of_a_card_elsewhere_are_not_kept(script, model_folder):
    script.main(_flags(model_folder, "--output", str(model_folder.parent / "elsewhere.md")))
    assert (model_folder.parent / "elsewhere.md").is_file()
    assert not list(model_folder.parent.rglob("card_sources.json"))


def test_script_keeps_the_users_words(script, model_folder):
    script.main(_flags(model_folder))
    _with_words(model_folder / "README.md", "For our manuals.\n")
    script.main(_flags(model_folder, "--repo_id", "org/small"))
    text = (model_folder / "README.md").read_text(encoding="utf-8")
    assert f"{BEGIN_WORDS}\nFor our manuals.\n{END_WORDS}\n" in text
    check_card(model_folder / "README.md", read_sources(model_folder))


def test_a_training_record_that_comes_later_is_not_in_the_card(script, model_folder, record):
    (model_folder / "training_record.json").unlink()
    script.main(_flags(model_folder))
    (model_folder / "training_record.json").write_text(json.dumps(record), encoding="utf-8")
    check_card(model_folder / "README.md", read_sources(model_folder))
    assert "Data and settings: not recorded." in (model_folder / "README.md").read_text(encoding="utf-8")


def test_script_shows_the_comparison_and_its_plot(script, model_folder, comparison):
    file = model_folder.parent / "results" / "beside.json"
    file.write_text(json.dumps(comparison), encoding="utf-8")
    file.with_suffix(".png").write_bytes(b"a plot")
    script.main(_flags(model_folder, "--comparison", str(file)))
    text = (model_folder / "README.md").read_text(encoding="utf-8")
    assert "| other | small | 0.4799 | 0.4601 | +0.0198 |" in text
    assert "![Differences between the compared models](models.png)" in text
    assert (model_folder / "models.png").read_bytes() == b"a plot"
    with pytest.raises(UserError, match="could not read"):
        script.main(_flags(model_folder, "--comparison", "no/such/file"))


def test_script_draws_the_log_of_the_training_record(script, model_folder, record):
    card = model_folder.parent / "cards" / "small.md"
    script.main(_flags(model_folder, "--output", str(card)))
    assert "Loss terms" not in card.read_text(encoding="utf-8")  # the record's log has no step
    record["log_history"] = [{"loss": 1.5, "step": 1}, {"loss": 1.25, "step": 2}]
    (model_folder / "training_record.json").write_text(json.dumps(record), encoding="utf-8")
    script.main(_flags(model_folder, "--output", str(card)))
    assert "![Loss terms during training](small-learning_curves.png)" in card.read_text(encoding="utf-8")
    assert (card.parent / "small-learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "1.25" not in card.read_text(encoding="utf-8")


def test_script_links_plots_that_lie_below_the_card(script, model_folder):
    card = model_folder.parent / "small.md"
    script.main(_flags(model_folder, "--output", str(card)))
    assert "](results/small/comparison.png)" in card.read_text(encoding="utf-8")
    assert not (model_folder / "README.md").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "no_such"], "--recipe expects"),
        (["--repo_id", "name"], "--repo_id expects"),
        (["--license", "MIT"], "--license expects"),
        (["--language", "German"], "--language expects"),
        (["--template", "no/such/file"], "expected a card template"),
        (["--results", "no/such/file"], "expected a results file"),
        (["--model_path", "no/such/folder"], "--model_path expects"),
        (["--training_record", "no/such/file"], "expected a JSON file"),
    ],
)
def test_script_says_what_to_change(script, model_folder, more, message):
    with pytest.raises(UserError, match=message):
        script.main(_flags(model_folder, *more))
    assert not (model_folder / "README.md").exists()


def test_script_refuses_results_of_another_model(script, model_folder):
    (model_folder / "config.json").write_text(json.dumps({"output_dim": 768}), encoding="utf-8")
    with pytest.raises(UserError, match="output_dim 384 instead of 768"):
        script.main(_flags(model_folder))


_HOSTILE = [
    "x</td><script>alert(1)</script> ![p](https://evil.example/p.png) [c](javascript:alert(1)) | b | `a` <!-- x",
    "x\n\n# Heading\n```\n<img src=x onerror=alert(1)>\n~~~\n---\nlicense: evil\n| a | b |\n",
    "# Heading {{ 7*7 }}{% for %} \u202etxt\u2028# Heading",
]


def _with_texts(value, text, kept=()):
    """Replace every text and every free key in a value of JSON."""
    if isinstance(value, dict):
        return {key: item if key in kept else _with_texts(item, text, kept) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_texts(item, text, kept) for item in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("text", _HOSTILE)
def test_files_of_others_bring_no_markdown_html_or_metadata_into_a_card(text, tmp_path):
    clean = {"results": read_results(CARDS / "results" / "jepa_10k.json")}
    clean["training_record"] = read_record(CARDS / "results" / "jepa_10k.training.json")
    clean["comparison"] = read_json_object(CARDS / "results" / "comparison.json")
    hostile = {name: _with_texts(content, text, kept=("model", "systems", "system", "reference", "metric"))
               for name, content in clean.items()}  # fmt: skip
    settings = {**hostile["results"]["settings"], text: text}
    entry = hostile["results"]["datasets"].pop("scifact")
    hostile["results"] |= {"settings": settings, "versions": {text: text, "torch": text}}
    hostile["results"]["datasets"] = {text: entry, **hostile["results"]["datasets"]}
    hostile["results"]["model"] = {**hostile["results"]["model"], "base_model": text}
    compared = hostile["comparison"]["models"]["jepa_10k"]
    compared["model"] = {**compared["model"], "base_model": text}
    hostile["comparison"]["models"]["other" + text] = {}
    (tmp_path / "results.json").write_text(json.dumps(hostile["results"]), encoding="utf-8")
    hostile["results"] = read_results(tmp_path / "results.json")
    plots = {text: f"//evil.example/a.png)\n{text}", "b": "https://evil.example/p.png"}
    card, expected = (ModelCard(render_card(**each, repo_id="org/jepa_10k", plots=shown))
                      for each, shown in ((hostile, plots), (clean, {"a": "a.png", "b": "b.png"})))  # fmt: skip
    assert card.data.license != "evil"
    text, known = (re.sub("^```.*?^```$", "(code)", each.text, flags=re.MULTILINE | re.DOTALL)
                   for each in (card, expected))  # fmt: skip
    for markup in ("<script", "<img", "![p]", "[c](", "](https:", "](//", "```"):
        assert markup not in text
    lines, of_clean = ([re.match("#+|[|]?---|[(]code", line) for line in each.splitlines()] for each in (text, known))
    assert [each[0] for each in lines if each] == [each[0] for each in of_clean if each]
    assert max(line.count("|") for line in text.splitlines()) == max(line.count("|") for line in known.splitlines())
    assert all(line.count("`") % 2 == 0 for line in text.splitlines())


@pytest.mark.parametrize("key", ["command", "examples"])
@pytest.mark.parametrize("place", ["settings", "versions", "model", "data"])
def test_a_setting_with_the_name_of_what_is_written_elsewhere_is_escaped_too(results, record, key, place):
    content = {"results": copy.deepcopy(results), "training_record": copy.deepcopy(record)}
    for each in content.values():
        each.setdefault(place, {})[key] = "<b>text</b> [link](https://evil.example)"
    card = render_card(**content)
    assert f"{key}" in card
    assert "<b>" not in card
    assert "[link]" not in card
