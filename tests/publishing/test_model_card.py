"""Model cards: every number from a file, nothing invented, nothing left out."""

import copy
import importlib.util
import itertools
import json
from pathlib import Path

import jinja2
import pytest
import yaml
from huggingface_hub import ModelCard

from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.results import mean_over_datasets, write_results
from ragcun_hf.publishing.card_check import check_card, check_card_against
from ragcun_hf.publishing.card_content import card_sections
from ragcun_hf.publishing.card_findings import comparison_of_model, verdict
from ragcun_hf.publishing.card_numbers import allowed_numbers, check_card_numbers
from ragcun_hf.publishing.card_sources import read_sources
from ragcun_hf.publishing.model_card import CARD_TEMPLATE, PUBLISHED_FIGURES, join_results, read_published, render_card

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
TEMPLATE, PUBLISHED = CARD_TEMPLATE, PUBLISHED_FIGURES
RECIPES = ("512dim_10k", "jepa_10k", "jepa_iso15_pred12", "pure_isotropy")


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
        "training_arguments": {"lambda_isotropy": 1.5, "learning_rate": 0.0005, "logging_steps": 7777},
        "log_history": [{"loss": 0.9876}],
    }


@pytest.fixture
def published():
    return read_published(PUBLISHED, "jepa_10k")


@pytest.fixture
def card(results, record, published):
    return render_card(template=TEMPLATE, results=results, training_record=record, published=published)


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


@pytest.fixture
def files(tmp_path, results, record, card):
    """A card and its files as they lie in model_cards/."""
    write_results(tmp_path / "results" / "jepa_10k.json", results)
    (tmp_path / "results" / "jepa_10k.training.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "jepa_10k.md").write_text(card, encoding="utf-8")
    return tmp_path


def _check(folder, name="jepa_10k", **options):
    check_card(
        folder / f"{name}.md",
        folder / "results" / f"{name}.json",
        training_path=folder / "results" / f"{name}.training.json",
        published_path=PUBLISHED,
        template=TEMPLATE,
        **options,
    )


def _edit(folder, old, new):
    path = folder / "jepa_10k.md"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_figures_stand_in_the_card(card):
    for text in ("0.6557", "0.6201", "0.7000", "-0.0356", "-0.0456 to -0.0256", "0.0123", "0.9123"):
        assert text in card
    assert "| mean of the data sets | frozen base | 0.4943 |" in card
    assert "| scifact test (1,406 queries) | projection | 0.6201 | 0.5701 | 0.9123 | 0.6000 | -0.0356 |" in card
    assert "scifact, unseen documents (1,041 queries)" in card
    assert "| effective rank (directions really used) | 150.2 | 200.8 |" in card


def test_a_blend_stands_in_the_card(results, record):
    text = render_card(template=TEMPLATE, results=results, training_record={**record, "blend": 0.4})
    assert "| share of the way from the start to the trained weights | 0.4 |" in text
    assert "share of the way" not in render_card(template=TEMPLATE, results=results, training_record=record)


def test_energy_and_held_out_figures_are_shown_or_said_to_be_missing(results, record):
    assert "| energy | not measured |" in render_card(results=results, training_record=record)
    measured = {"energy": {"kwh": 0.000321, "by": "codecarbon 3.3.2"}, "validation_ndcg@10": {"saved": 0.7125}}
    text = render_card(results=results, training_record={**record, **measured})
    assert "| kWh for encoding and training, an estimate by codecarbon 3.3.2 | 0.000321 |" in text
    assert "| NDCG@10 on held-out pairs, as saved | 0.7125 |" in text


# Beside other models


def test_a_comparison_stands_in_the_card_and_in_its_check(tmp_path, files, results, record, published, comparison):
    options = {"training_record": record, "published": published}
    text = render_card(template=TEMPLATE, results=results, comparison=comparison, **options)
    assert "### Beside other models" in text
    row = "| other | small | 0.4799 | 0.4601 | +0.0198 | +0.0075 to +0.0321 | 0.0123 | 30 / 250 / 20 |"
    assert row in text
    assert "| other | small, predictor | 0.4799 | 0.5167 | -0.0368 |" in text
    assert "on scifact test, nfcorpus test, the same queries" in text
    assert "0.4123" not in text  # another model's predictor
    assert "base of other" not in text
    assert "| small | base |" not in text  # stands under the results, data set by data set
    assert "python training/eval_beir.py --compare small other" in text
    (tmp_path / "comparison.json").write_text(json.dumps(comparison), encoding="utf-8")
    (tmp_path / "jepa_10k.md").write_text(text, encoding="utf-8")
    _check(files, comparison_path=tmp_path / "comparison.json")
    _edit(files, row, row.replace("0.4601", "0.4799"))  # a number of the files, in a wrong place
    with pytest.raises(UserError, match="expected a table row as rendered"):
        _check(files, comparison_path=tmp_path / "comparison.json")
    with pytest.raises(UserError, match="got 0.5167"):
        _check(files)  # without the file nothing vouches for its numbers


def test_a_comparison_of_one_data_set_shows_its_figures(results, comparison):
    del comparison["datasets"]["nfcorpus"]
    text = render_card(template=TEMPLATE, results=results, comparison=comparison)
    assert "| other | small | 0.5799 | 0.5601 | +0.0198 |" in text


def test_numbers_of_the_compared_queries_do_not_vouch_for_the_card(results, comparison):
    compared = comparison_of_model(comparison, results["model"])
    with pytest.raises(UserError, match="got 0.6309"):
        check_card_numbers("a score of 0.6309", allowed_numbers(results, comparison=compared))
    with pytest.raises(UserError, match="got 1815"):
        check_card_numbers("it was 1815", allowed_numbers(results, comparison=compared))


def test_a_comparison_of_other_models_is_refused(results, comparison):
    facts = comparison["models"].pop("small")
    with pytest.raises(UserError, match="expects a file with the model 'small' as in --results .*, got other"):
        render_card(template=TEMPLATE, results=results, comparison=comparison)
    comparison["models"]["small"] = {"model": {**facts["model"], "output_dim": 768}}
    with pytest.raises(UserError, match="expects a file with the model 'small' as in --results"):
        render_card(template=TEMPLATE, results=results, comparison=comparison)
    with pytest.raises(UserError, match="expects a file that eval_beir.py --compare wrote"):
        render_card(template=TEMPLATE, results=results, comparison=results)


def test_training_settings_and_counts_stand_in_the_card(card):
    for row in (
        "| training pairs | 12,919 |",
        "| `lambda_isotropy` | 1.5 |",
        "| `learning_rate` | 0.0005 |",
        "| `lambda_contrastive` | the package's default |",
        "| optimizer steps | 1,140 |",
    ):
        assert row in card
    assert "7777" not in card  # how often it logged is nobody's concern
    assert "0.9876" not in card


def test_losses_against_the_base_are_said_in_words(card):
    assert (
        "NDCG@10 of the projection is below the frozen base on scifact (0.6201 against 0.6557, -0.0356) and "
        "my-docs (0.3000 against 0.3329, -0.0329)." in card
    )
    assert "NDCG@10 of the predictor is above the frozen base on scifact" in card
    assert "NDCG@10 of the predictor cannot be told from the frozen base" in card
    assert "no relevant document among the training documents, NDCG@10 of the projection is below" in card
    assert "wins on some of what was measured here and loses on some" in card


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ((-0.1, -0.1), "the frozen base alone retrieves better"),
        ((0.1, 0.1), "this model retrieves better"),
        ((0.0, 0.0), "cannot be told"),
        ((-0.1, 0.0), "on some it is worse"),
        ((0.1, 0.0), "worse on none"),
    ],
)
def test_verdict_follows_the_figures(differences, words):
    entry = _dataset(0.5, 0.5 + differences[0], 0.5 + differences[1])
    assert words in verdict({"datasets": {"scifact": entry}})


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ((None, None), "No difference from the frozen base was tested here"),
        ((-0.1, None), "Not every difference from the frozen base was tested here"),
        ((0.1, None), "Not every difference from the frozen base was tested here"),
        ((0.1, -0.1), "wins on some of what was measured here and loses on some"),
    ],
)
def test_verdict_claims_nothing_of_untested_differences(differences, words):
    entry = _dataset(0.5, *(0.55 if difference is None else 0.5 + difference for difference in differences))
    for system, difference in zip(("projection", "predictor"), differences, strict=True):
        if difference is None:
            del entry["comparisons"][system]
    assert words in verdict({"datasets": {"scifact": entry}})


def test_published_figures_are_marked(card):
    section = card[card.index("## Published figures") :]
    assert "As published, not measured here." in section
    for figure in ("0.4779", "0.6401", "0.3158", "0.6557", "0.3329"):
        assert figure in section


def test_published_figures_of_another_base_are_not_to_be_compared(card, results, published):
    assert "cannot be compared with the results above" in card
    results["model"]["base_model"] = published["base_model"]
    card = render_card(template=TEMPLATE, results=results, published=published)
    assert "cannot be compared" not in card


def test_a_version_in_the_hub_id_is_no_figure(results):
    assert "# name-v1.5" in render_card(template=TEMPLATE, results=results, repo_id="org/name-v1.5")


def test_without_published_figures_there_is_no_such_section(results):
    assert "Published" not in render_card(template=TEMPLATE, results=results)


def test_missing_figures_are_not_measured(results):
    del results["datasets"]["my-docs"]
    del results["datasets"]["scifact"]["subsets"]
    del results["datasets"]["scifact"]["systems"]["projection"]["mrr@10"]
    results["isotropy"] = {}
    card = render_card(template=TEMPLATE, results=results)
    assert "| scifact test (1,406 queries) | projection | 0.6201 | 0.5701 | 0.9123 | not measured |" in card
    assert "Isotropy: not measured." in card
    assert "apart: not measured" in card
    assert "Data and settings: not recorded." in card


def test_a_card_without_any_result_says_so(results):
    results["datasets"] = results["mean"] = {}
    card = render_card(template=TEMPLATE, results=results)
    assert "Retrieval: not measured." in card
    assert "was not measured" in card


def test_metadata_round_trips(card):
    data = ModelCard(card).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "sentence-similarity"
    assert data.license == "apache-2.0"
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert {"isotropic-gaussian", "sentence-transformers", "feature-extraction", "retrieval", "jepa"} == set(data.tags)
    found = {
        (result.dataset_type, result.metric_type, result.metric_name): result.metric_value
        for result in data.eval_results
    }
    assert len(found) == 16  # two data sets, two systems, four metrics
    assert found["BeIR/scifact", "ndcg_at_10", "NDCG@10 (projection)"] == 0.6201
    assert found["my-docs", "ndcg_at_10", "NDCG@10 (predictor)"] == 0.333


def test_what_is_no_hub_id_is_not_claimed(results):
    results["model"]["base_model"] = "/somewhere/on/a/disk"
    data = ModelCard(render_card(template=TEMPLATE, results=results, dataset_ids=["org/pairs"])).data
    assert data.base_model is None
    assert data.datasets == ["org/pairs"]


def test_repo_id_and_plots_are_used(results):
    card = render_card(template=TEMPLATE, results=results, repo_id="org/name", plots={"A plot": "plot.png"})
    assert 'AutoModel.from_pretrained("org/name", trust_remote_code=True)' in card
    assert "![A plot](plot.png)" in card
    assert card.count("# name\n") == 1


def test_tables_are_unbroken(card):
    lines = card.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|---"):
            assert line.count("|") == lines[number - 1].count("|") == lines[number + 1].count("|")
    assert "\n\n\n" not in card


def test_the_template_names_only_what_the_renderer_gives(results, record, published, comparison):
    joined = join_results([results])
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text(encoding="utf-8"))
    context = {"card_data": "", "name": "n", "model_id": "n", "plots": {}, "has_record": True, "published": published}
    template.render(
        **context,
        model=joined["model"],
        settings=joined["settings"],
        **card_sections(joined, record, published, comparison_of_model(comparison, results["model"])),
    )


def test_the_template_itself_holds_no_number():
    check_card_numbers(TEMPLATE.read_text(encoding="utf-8"), allowed_numbers({}))


def test_a_template_with_an_invented_number_is_refused(tmp_path, results):
    path = tmp_path / "template.md"
    path.write_text(TEMPLATE.read_text(encoding="utf-8") + "\nUp to 0.9999 NDCG@10.\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"got 0\.9999 in 'Up to"):
        render_card(template=path, results=results)


def test_a_broken_template_is_the_users_to_change(tmp_path, results):
    path = tmp_path / "template.md"
    path.write_text("---\n{{ card_data }}\n---\n{% if %}", encoding="utf-8")
    with pytest.raises(UserError, match="expected a Jinja template"):
        render_card(template=path, results=results)


def test_an_untouched_card_passes(files):
    _check(files)


def test_a_reworded_card_passes(files):
    _edit(
        files,
        "## Limits",
        "On scifact the projection has 0.6201, which is 0.0356 less; see torch 2.13.0.\n\n## Limits",
    )
    _check(files)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.6201", "0.7201", r"got 0\.7201"),
        ("## Limits", "It reaches .9 on scifact.\n\n## Limits", r"line \d+: .*got \.9 "),
        ("## Limits", "NDCG@10=0.77 on scifact.\n\n## Limits", r"got 0\.77 "),
        ("## Limits", "12 % better than the base.\n\n## Limits", r"got 12 % "),
        ("## Limits", "Trained on 45,000 pairs.\n\n## Limits", "got 45,000 "),
        ("## Limits", "Measured with torch 2.14.0.\n\n## Limits", r"got 2\.14"),
        ("(0.6201 against 0.6557, -0.0356)", "(0.6201 against 0.6557, +0.0356)", r"got \+0\.0356"),
        ("## Limits", "```\nNDCG@10 0.9876\n```\n\n## Limits", r"got 0\.9876"),
    ],
)
def test_a_tampered_number_is_refused(files, old, new, message):
    _edit(files, old, new)
    with pytest.raises(UserError, match=message):
        _check(files)


def test_figures_cannot_change_places(files):
    _edit(files, "| projection | 0.6201 |", "| projection | 0.6557 |")
    with pytest.raises(UserError, match="expected a table row as rendered"):
        _check(files)


def test_a_loss_cannot_be_left_out(files):
    path = files / "jepa_10k.md"
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("| my-docs test (1,406 queries) | projection")]
    assert len(kept) == len(lines) - 1
    path.write_text("\n".join(kept), encoding="utf-8")
    with pytest.raises(UserError, match="expected the table row"):
        _check(files)


@pytest.mark.parametrize("words", ["is below the frozen base on scifact", "and loses on some"])
def test_a_loss_cannot_be_talked_away(files, words):
    _edit(files, words, "is fine on scifact")
    with pytest.raises(UserError, match="expected the sentence"):
        _check(files)


def test_metadata_is_checked_too(files):
    _edit(files, "value: 0.6201", "value: 0.7")
    with pytest.raises(UserError, match=r"metadata: expected 0\.6201"):
        _check(files)


def test_results_that_changed_refuse_the_old_card(files, results):
    results["datasets"]["scifact"]["systems"]["projection"]["ndcg@10"] = 0.61
    write_results(files / "results" / "jepa_10k.json", results)
    with pytest.raises(UserError, match=r"jepa_10k\.md"):
        _check(files)


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
    assert {name: read_published(PUBLISHED, name)["figures"][0]["value"] for name in RECIPES} == expected
    assert read_published(PUBLISHED, "no_such_recipe") is None


def test_committed_cards_show_what_their_files_hold():
    cards = sorted(path.stem for path in CARDS.glob("*.md") if path.name != "README.md")
    assert cards in ([], list(RECIPES))  # none until they are rendered, then all four
    for name in cards:
        _check(CARDS, name, comparison_path=CARDS / "results" / "comparison.json")


@pytest.fixture
def script():
    return importlib.import_module("ragcun_hf.cli.render_card")


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
    assert "push_to_hub.py" in said


def test_the_sources_are_rendered_to_the_same_card_again(script, model_folder, comparison):
    file = model_folder.parent / "results" / "beside.json"
    changed = [{"query": "q1", "text": "a text that stays at home"}]
    for entry in comparison["datasets"].values():
        entry["changed_queries"] = changed
    file.write_text(json.dumps(comparison), encoding="utf-8")
    script.main(_flags(model_folder, "--recipe", "jepa_10k", "--repo_id", "org/small", "--comparison", str(file)))
    sources = read_sources(model_folder)
    assert "stays at home" not in json.dumps(sources)
    text = (model_folder / "README.md").read_text(encoding="utf-8")
    plots = {"Difference to the frozen base on each data set": "comparison.png"}
    assert render_card(**sources, repo_id="org/small", plots=plots) == text
    check_card_against(model_folder / "README.md", sources, repo_id="org/small")
    script.main(_flags(model_folder, "--output", str(model_folder.parent / "elsewhere.md")))
    assert not (model_folder.parent / "card_sources.json").exists()


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
