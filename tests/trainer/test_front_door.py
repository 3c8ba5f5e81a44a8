"""The Trainer as a user of transformers meets it: a model, arguments and a dataset, in Python alone."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments
from ragcun_hf.cli import train_contrastive, train_self_supervised
from ragcun_hf.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

QUIET = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}


@pytest.fixture
def make_args(tmp_path):
    def make(recipe=None, **fields):
        fields = {"output_dir": str(tmp_path / "out"), "feature_cache_dir": str(tmp_path / "cache"), **QUIET, **fields}
        if recipe is not None:
            return IsotropicGaussianTrainingArguments.from_recipe(recipe, **fields)
        return IsotropicGaussianTrainingArguments(**{"per_device_train_batch_size": 4, "max_steps": 2, **fields})

    return make


@pytest.fixture
def make_model(tiny_encoder_folder):
    return lambda **fields: IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), **fields)


@pytest.fixture
def pairs(tiny_pairs):
    return [{"query": pair["query"], "positive": pair["positive"]} for pair in tiny_pairs]


def _head(model):
    return {name: weight for name, weight in model.state_dict().items() if not name.startswith("encoder.")}


def _same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _noted_starts(trainer):
    """Return a list that gets the head's weights whenever training begins."""
    starts = []

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            starts.append({name: weight.clone() for name, weight in _head(model).items()})

    trainer.add_callback(Start())
    return starts


# The same as the command


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["adapt", "general", "jepa_10k"])
def test_a_recipe_in_python_gives_the_weights_and_the_record_of_the_command(
    make_model, make_args, pairs, tiny_encoder_folder, tmp_path, monkeypatch, recipe
):
    monkeypatch.chdir(tmp_path)
    Path("pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    length = {"max_steps": 3, "per_device_train_batch_size": 4, "val_fraction": 0.3}
    flags = ["--recipe", recipe, "--base_model", str(tiny_encoder_folder), "--train_data", "pairs.json"]
    flags += ["--max_steps", "3", "--batch_size", "4", "--val_fraction", "0.3", "--output_dir", "command", "--use_cpu"]
    flags += ["--save_strategy", "no", "--feature_cache_dir", "cache", "--logging_steps", "1"]
    train_contrastive.main(flags)
    trainer = IsotropicGaussianTrainer(make_model(), make_args(recipe, **length), train_dataset=pairs)
    trainer.train()
    trainer.save_model()
    of_command = IsotropicGaussianModel.from_pretrained("command")
    assert _same(_head(IsotropicGaussianModel.from_pretrained("out")), _head(of_command))
    records = [json.loads(Path(name, "training_record.json").read_text()) for name in ("command", "out")]
    for name in ("training_arguments", "validation_ndcg@10", "steps", "essential", "blend"):
        assert records[0][name] == records[1][name], name
    assert records[0]["training_arguments"]["max_steps"] == 3
    names = [{path.name for path in Path(name).iterdir() if path.is_file()} for name in ("command", "out")]
    assert names[0] == names[1]


def test_documents_without_labels_are_split_as_by_the_command(
    make_model, make_args, tiny_pairs, tiny_encoder_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    texts = [{"text": pair["positive"]} for pair in tiny_pairs]
    Path("texts.json").write_text(json.dumps(texts), encoding="utf-8")
    flags = ["--base_model", str(tiny_encoder_folder), "--documents", "texts.json", "--max_steps", "2", "--use_cpu"]
    flags += ["--batch_size", "4", "--save_strategy", "no", "--output_dir", "command", "--split_method", "half"]
    train_self_supervised.main([*flags, "--feature_cache_dir", "cache"])
    trainer = IsotropicGaussianTrainer(make_model(), make_args(split_method="half"), train_dataset=texts)
    trainer.train()
    assert _same(_head(trainer.model), _head(IsotropicGaussianModel.from_pretrained("command")))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
def test_five_trainings_in_one_process_leave_the_threads_and_files_of_one_and_equal_models(
    make_model, make_args, pairs
):
    counts, heads = [], []
    for _ in range(5):
        trainer = IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=pairs)
        trainer.train()
        trainer.save_model()
        heads.append(_head(trainer.model))
        counts.append([len(list(Path("/proc/self", name).iterdir())) for name in ("fd", "task")])
    assert counts[1:] == [counts[0]] * 4
    assert all(_same(heads[0], head) for head in heads)


def test_the_seed_of_the_arguments_decides_the_head_of_an_untrained_model(make_model, make_args, pairs):
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(heads))  # of the user, which does not matter
        model = make_model()
        heads.append(_head(IsotropicGaussianTrainer(model, make_args(seed=seed), train_dataset=pairs).model))
    assert _same(heads[0], heads[1])
    assert not _same(heads[0], heads[2])


def test_a_recipe_shapes_the_head_except_for_what_the_model_was_made_with(make_model, make_args, pairs):
    shapes = []
    for fields in ({}, {"projection_hidden_dim": 12}):
        model = IsotropicGaussianTrainer(make_model(**fields), make_args("adapt"), train_dataset=pairs).model
        shapes.append(model.config.projection_hidden_dim)
    assert shapes == [2048, 12]


def test_a_trained_model_keeps_its_head(make_model, make_args, pairs, tmp_path):
    IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=pairs).model.save_pretrained(tmp_path / "model")
    model = IsotropicGaussianModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.projection.linear.weight += 0.1
    before = {name: weight.clone() for name, weight in _head(model).items()}
    trainer = IsotropicGaussianTrainer(model, make_args("adapt", seed=7), train_dataset=pairs)
    assert _same(before, _head(trainer.model))


def test_training_twice_goes_on_from_the_weights_of_the_first_time(make_model, make_args, pairs):
    trainer = IsotropicGaussianTrainer(make_model(), make_args(blend=0.5), train_dataset=pairs)
    assert trainer.train().global_step == 2
    first = {name: weight.clone() for name, weight in _head(trainer.model).items()}
    starts = _noted_starts(trainer)
    trainer.train()
    assert _same(first, starts[0])
    assert not _same(first, _head(trainer.model))


def test_a_resumed_training_gives_the_weights_of_an_uninterrupted_one(make_model, make_args, pairs, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = IsotropicGaussianTrainer(make_model(), make_args(**fields), train_dataset=pairs)
    whole.train()
    args = make_args(**{**fields, "output_dir": str(tmp_path / "resumed")})

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        IsotropicGaussianTrainer(make_model(), args, train_dataset=pairs, callbacks=[Stop()]).train()
    resumed = IsotropicGaussianTrainer(make_model(), args, train_dataset=pairs)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    assert _same(_head(whole.model), _head(resumed.model))


# Datasets of every form


def _forms(pairs):
    table = datasets.Dataset.from_list(pairs)
    numbered = [{**pair, "negative_1": "the sun is red", "negative_2": None} for pair in pairs]
    return {
        "list": pairs,
        "dataset": table,
        "dictionary": {"first": table.select(range(3)), "second": table.select(range(3, len(pairs)))},
        "dataset dictionary of one split": datasets.DatasetDict(train=table),
        "more columns": [{**pair, "source": 1} for pair in pairs],
        "numbered negatives": datasets.Dataset.from_list(numbered),
    }


@pytest.mark.parametrize("form", _forms([{"query": "a", "positive": "b"}] * 4))
def test_datasets_of_every_form_train(make_model, make_args, pairs, form):
    trainer = IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=_forms(pairs)[form])
    assert trainer.train().global_step == 2
    assert trainer.data.facts["rows"] == len(pairs)
    assert trainer.data.facts["negatives"] == (len(pairs) if form == "numbered negatives" else 0)


def test_the_same_rows_in_another_form_give_the_same_weights(make_model, make_args, pairs):
    heads = []
    for form in ("list", "dataset", "dictionary"):
        trainer = IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=_forms(pairs)[form])
        trainer.train()
        heads.append(_head(trainer.model))
    assert _same(heads[0], heads[1])
    assert _same(heads[0], heads[2])


def test_a_stream_is_read_during_training(make_model, make_args, pairs):
    stream = datasets.Dataset.from_list(pairs).to_iterable_dataset()
    trainer = IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=stream)
    assert trainer.plan.facts.num_rows is None
    assert trainer.train().global_step == 2


@pytest.mark.parametrize(
    "text",
    [
        lambda text: text,
        lambda text: {"text": text},
        lambda text: {"text": text, "id": text},
        lambda text: {"text": text, "id": "shared by all passages"},
    ],
)
def test_texts_are_documents_without_labels(make_model, make_args, tiny_pairs, text):
    documents = [text(f"{pair['positive']} {number}") for number, pair in enumerate(tiny_pairs)]
    trainer = IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=documents)
    assert trainer.data.facts["split_method"] == "sentence"
    assert trainer.train().global_step == 2


WRONG = {
    "no dataset": (None, "train_dataset: expected a Dataset, an IterableDataset or a list of rows"),
    "a file name": ("pairs.json", "got str: load files with datasets.load_dataset"),
    "empty": ([], "train_dataset: expected rows, got an empty dataset"),
    "empty dictionary": ({}, "train_dataset: expected a dataset, got an empty dictionary"),
    "one empty of two": ({"a": [{"query": "a", "positive": "b"}], "b": []}, "b: expected rows"),
    "another column": (
        [{"question": "a", "positive": "b"}] * 2,
        "row index 0, field 'query': expected a text, got no",
    ),
    "another type": ([{"query": "a", "positive": "b"}, {"query": 3, "positive": "b"}], "row index 1, field 'query'"),
    "a blank text": ([{"query": "a", "positive": "b"}, {"query": "a", "positive": " "}], "row index 1, field 'posit"),
    "no row": ([{"query": "a", "positive": "b"}, 3], "row index 1: expected a dictionary or a text, got 3"),
    "one row": ([{"query": "a", "positive": "b"}], "at least two training rows, got 1"),
    "negatives of a type": ([{"query": "a", "positive": "b", "negative_1": 3}] * 2, "field 'negative_1'"),
}


def test_splits_and_queries_without_documents_are_no_training_rows(make_model, make_args, pairs):
    table = datasets.Dataset.from_list(pairs)
    wrong = {
        "expected one split, got train, test": datasets.DatasetDict(train=table, test=table),
        "field 'positive': expected a text": [{"query": "a", "text": "b"}] * 2,
        "expected only streams or none": {"a": table.to_iterable_dataset(), "b": table},
    }
    for message, rows in wrong.items():
        with pytest.raises(UserError, match=message):
            IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=rows)


def test_what_cannot_work_is_refused_at_construction(make_model, make_args, pairs):
    model, documents = make_model(), {"pairs": pairs, "documents": _documents()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong = {
        "expected parameters of the model": (model, {}, {"train_dataset": pairs, "optimizers": (optimizer, None)}),
        "expected held-out pairs beside evaluator": (model, {}, {"train_dataset": pairs, "evaluator": len}),
        "got both: give one": (model, {"val_fraction": 0.5}, {"train_dataset": pairs, "eval_dataset": pairs}),
        "--documents beside pairs give a projection": (
            make_model(use_predictor=True),
            {},
            {"train_dataset": documents},
        ),
        "in one process": (model, {"feature_cache": False}, {"train_dataset": documents}),
    }
    for message, (own, fields, data) in wrong.items():
        with pytest.raises(UserError, match=message):
            IsotropicGaussianTrainer(own, make_args(**fields), **data)
    trainer = IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=pairs)
    with pytest.raises(UserError, match="evaluate expects held-out pairs"):
        trainer.evaluate()
    with pytest.raises(UserError, match="predict has no labels"):
        trainer.predict(pairs)


def test_gradient_checkpointing_is_refused_at_construction_for_an_encoder_without_it(
    make_model, make_args, pairs, tiny_mpnet_folder
):
    args = make_args(activation_checkpointing=True)  # the name of today for gradient_checkpointing
    assert args.gradient_checkpointing
    for fields in ({}, {"freeze_base": False}):
        model = IsotropicGaussianModel.from_encoder(str(tiny_mpnet_folder), **fields)
        with pytest.raises(UserError, match="needs an encoder that supports it, got MPNetModel, .*: leave it out"):
            IsotropicGaussianTrainer(model, args, train_dataset=pairs)
    assert IsotropicGaussianTrainer(make_model(), args, train_dataset=pairs).train().global_step == 2


def test_arguments_that_are_changed_before_training_count(make_model, make_args, pairs):
    trainer = IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=pairs)
    trainer.args.max_steps, trainer.args.learning_rate = 3, 0.5
    assert trainer.train().global_step == 3
    assert trainer.record()["training_arguments"]["learning_rate"] == 0.5


def test_an_interrupted_training_records_no_blend_and_keeps_its_weights(make_model, make_args, pairs):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = make_model()
    trainer = IsotropicGaussianTrainer(model, make_args(blend=0.4), train_dataset=pairs, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.record()["blend"] == 1.0
    weights = {name: weight.clone() for name, weight in _head(model).items()}
    assert _same(weights, _head(IsotropicGaussianTrainer(model, make_args(), train_dataset=pairs).model))


def test_a_loaded_model_falls_back_to_its_own_encoder(make_model, make_args, pairs, tmp_path):
    make_model(pooling="cls", max_length=7, query_prompt="a ").save_pretrained(tmp_path / "model")
    model = IsotropicGaussianModel.from_pretrained(tmp_path / "model")
    model.reset_head(projection_kind="linear")
    kept = (model.config.pooling, model.config.max_length, model.config.query_prompt, model.config.output_dim)
    assert kept == ("cls", 7, "a ", 16)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_dataset_is_one_error_at_construction(make_model, make_args, name):
    rows, message = WRONG[name]
    with pytest.raises(UserError) as error:
        IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=rows)
    assert message in str(error.value)


def test_the_place_of_a_wrong_row_far_down_is_named(make_model, make_args):
    rows = datasets.Dataset.from_list(
        [{"query": f"q{n}", "positive": None if n == 4_999 else f"p{n}"} for n in range(5_000)]
    )
    with pytest.raises(UserError, match="row index 4999, field 'positive'"):
        IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=rows)


def test_wrong_arguments_and_models_are_named(make_model, make_args, pairs, tmp_path):
    with pytest.raises(UserError, match="expected IsotropicGaussianTrainingArguments, got TrainingArguments"):
        IsotropicGaussianTrainer(make_model(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=pairs)
    with pytest.raises(UserError, match="expected an IsotropicGaussianModel, got Linear"):
        IsotropicGaussianTrainer(torch.nn.Linear(2, 2), make_args(), train_dataset=pairs)


def test_recipes_and_their_arguments_are_checked_by_name(tmp_path):
    from_recipe = IsotropicGaussianTrainingArguments.from_recipe
    with pytest.raises(UserError, match="lambda_iso"):
        from_recipe("adapt", output_dir=str(tmp_path), lambda_iso=1.0)
    with pytest.raises(UserError, match="no_such_recipe"):
        from_recipe("no_such_recipe", output_dir=str(tmp_path))
    args = from_recipe("jepa_10k", output_dir=str(tmp_path), epochs=2, similarity="dot")
    assert (args.num_train_epochs, args.model_fields["similarity_fn_name"]) == (2, "dot")
    file = tmp_path / "own.yaml"
    file.write_text("epochs: 7\nbatch_size: 9\noutput_dim: 8\n", encoding="utf-8")
    args = from_recipe(str(file), output_dir=str(tmp_path), batch_size=5)
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.model_fields) == (7.0, 5, {"output_dim": 8})


# Validation


def test_held_out_pairs_choose_the_checkpoint_and_the_corpus_is_searched(
    make_model, make_args, pairs, tiny_pairs, capsys
):
    corpus = [{"text": f"the red river {number}"} for number in range(30)]
    args = make_args(save_strategy="steps", eval_steps=1)
    options = {"train_dataset": pairs[:6], "eval_dataset": pairs[6:], "corpus": corpus}
    trainer = IsotropicGaussianTrainer(make_model(), args, **options)
    trainer.train()
    assert trainer.args.load_best_model_at_end
    assert trainer.state.best_metric is not None
    assert "searching 32 documents: frozen base" in capsys.readouterr().out
    figures = trainer.evaluate()
    assert {"eval_loss", "eval_ndcg@10", "eval_loss/contrastive"} <= figures.keys()
    assert trainer.evaluate(pairs[:3])["eval_ndcg@10"] != figures["eval_ndcg@10"]
    assert trainer.evaluate().items() >= {"eval_ndcg@10": figures["eval_ndcg@10"]}.items()


def test_metrics_evaluators_and_callbacks_work_as_in_transformers(make_model, make_args, pairs):
    seen, logged = [], []

    def compute_metrics(prediction):
        queries, documents = prediction.predictions
        query_ids, document_ids = prediction.label_ids
        seen.append((queries.shape, documents.shape, query_ids.shape, document_ids.shape))
        return {"mine": float((queries * documents).sum())}

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    trainer = IsotropicGaussianTrainer(
        make_model(),
        make_args(eval_steps=1, metric_for_best_model="eval_mine", greater_is_better=True),
        train_dataset=pairs[:5],
        eval_dataset=pairs[5:],
        compute_metrics=compute_metrics,
        evaluator=lambda model: {"width": float(model.config.output_dim)},
        callbacks=[Log()],
    )
    trainer.train()
    assert seen[0] == ((3, 16), (3, 16), (3,), (3,))
    evaluated = [logs for logs in logged if "eval_mine" in logs]
    assert len(evaluated) == 3  # the start, and after each step
    assert all(logs["eval_width"] == 16 for logs in evaluated)


@pytest.mark.slow
def test_an_automatic_recipe_chooses_for_documents(make_model, make_args, capsys):
    words = "bread food music river moon sun bird fish tree stone".split()
    texts = [
        f"The {a} is {b}. A {c} number {n}."
        for n, (a, b, c) in enumerate(zip(words * 30, words[3:] * 43, words[5:] * 60, strict=False))
    ]
    args = make_args("unlabelled", per_device_train_batch_size=64, max_steps=-1)
    trainer = IsotropicGaussianTrainer(make_model(), args, train_dataset=texts[:300])
    trainer.train()
    assert "pseudo-NDCG@10" in capsys.readouterr().out
    chosen = trainer.record()["data"]["chosen"]
    assert (trainer.args.blend, trainer.args.whitening) == (chosen["blend"], chosen["whitening"])
    assert trainer.model.config.projection_kind == chosen["projection_kind"]


def test_embeddings_that_can_be_cut_start_at_the_principal_directions(make_model, make_args, pairs):
    trainer = IsotropicGaussianTrainer(make_model(), make_args(matryoshka_dims=[2, 4]), train_dataset=pairs)
    features = trainer.model.encode([pair[name] for name in ("query", "positive") for pair in pairs])
    energy = (features**2).sum(axis=0)
    assert list(energy) == sorted(energy, reverse=True)
    assert trainer.train().global_step == 2
    with pytest.raises(UserError, match="narrower than the embedding"):
        IsotropicGaussianTrainer(make_model(), make_args(matryoshka_dims=[16]), train_dataset=pairs)


def test_an_early_stopping_of_the_user_stays_when_training_begins_again(make_model, make_args, pairs):
    fields = {"eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6, "learning_rate": 1e-9}
    trainer = IsotropicGaussianTrainer(
        make_model(),
        make_args(**fields, num_train_epochs=9),
        train_dataset=pairs[:5],
        eval_dataset=pairs[5:],
        callbacks=[EarlyStoppingCallback(2)],
    )
    # Nothing gets better at such a rate; the first evaluation after a step is the one to beat.
    assert trainer.train().global_step == 3
    assert trainer.train().global_step == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"num_train_epochs": 2.5},
        {"per_device_train_batch_size": 3, "dataloader_drop_last": False, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 9},
    ],
    ids=str,
)
def test_a_schedule_that_fails_at_the_last_step_is_refused_before_the_first(make_model, make_args, pairs, fields):
    fields = {"max_steps": -1, "num_train_epochs": 2, **fields}
    trainer = IsotropicGaussianTrainer(make_model(), make_args(**fields), train_dataset=pairs)
    num_steps = trainer.train().global_step
    fields |= {"lr_scheduler_type": "polynomial", "warmup_steps": num_steps}
    with pytest.raises(UserError, match=f"--lr_scheduler_type polynomial .* in {num_steps} steps of training .*zero"):
        IsotropicGaussianTrainer(make_model(), make_args(**fields), train_dataset=pairs)


def test_a_blend_of_zero_trains_nothing(make_model, make_args, pairs):
    trainer = IsotropicGaussianTrainer(make_model(), make_args(blend=0.0), train_dataset=pairs)
    before = {name: weight.clone() for name, weight in _head(trainer.model).items()}
    assert trainer.train().global_step == 0
    assert _same(before, _head(trainer.model))


# Pairs and documents together, and the way back


def _documents():
    words = "bread food music river moon sun bird fish tree stone".split()
    three = zip(words * 30, words[3:] * 43, words[5:] * 60, strict=False)
    return [f"The {a} is {b}. A {c} number {n}." for n, (a, b, c) in enumerate(three)][:300]


@pytest.mark.slow
def test_documents_without_labels_give_the_head_its_start_and_are_searched(make_model, make_args, pairs, capsys):
    data = {"pairs": pairs[:5], "documents": _documents()}
    trainer = IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=data, eval_dataset=pairs[5:])
    starts = _noted_starts(trainer)
    trainer.train()
    shown = capsys.readouterr().out
    assert "First, a head is trained on 300 documents without labels." in shown
    assert "pseudo-NDCG@10" in shown
    assert "searching 303 documents" in shown
    assert trainer.record()["data"]["documents_without_labels"] == 300
    untrained = IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=pairs).model
    # If documents do not help, pairs are trained from the start that they would have had without.
    assert _same(starts[-1], _head(untrained)) == (trainer.record()["data"]["documents_chosen"]["blend"] == 0)


def test_fields_of_the_head_that_were_named_are_never_replaced_by_chosen_ones(make_model, make_args, pairs):
    named = {"projection_kind": "mlp"}, {"projection_hidden_dim": 12}
    with_documents = {"pairs": pairs, "documents": _documents()}
    for fields in named:
        name = next(iter(fields))
        for model, args in (
            (make_model(**fields), make_args("unlabelled", max_steps=-1)),
            (make_model(), make_args("unlabelled", max_steps=-1, **fields)),
        ):
            with pytest.raises(UserError, match=f"--automatic chooses kind and width .*, got --{name}: leave"):
                IsotropicGaussianTrainer(model, args, train_dataset=_documents())
        with pytest.raises(UserError, match=f"--documents beside pairs choose kind and width .* with --{name}: leave"):
            IsotropicGaussianTrainer(make_model(**fields), make_args(), train_dataset=with_documents)


def test_what_documents_may_replace_of_a_recipe_is_said_and_the_rest_is_kept(make_model, make_args, pairs):
    args = make_args("adapt", output_dim=8, dropout=0.3)
    data = {"pairs": pairs, "documents": _documents()}
    trainer = IsotropicGaussianTrainer(make_model(), args, train_dataset=data)
    (warning,) = [each for each in trainer.plan.warnings if "documents" in each]
    assert "projection_hidden_dim 2048, whitening 0.2 of this run do not count" in warning
    of_documents, _ = trainer._of_documents
    assert of_documents.model_fields == {"output_dim": 8, "dropout": 0.3}
    alone = IsotropicGaussianTrainer(make_model(), args, train_dataset=pairs)
    assert not [each for each in alone.plan.warnings if "documents" in each]


def test_a_head_that_does_not_help_falls_back_to_the_base(make_model, make_args, pairs):
    queries = [pair["query"] for pair in pairs]
    base = make_model(projection_kind="linear").encode(queries)
    harmful = {"learning_rate": 1.0, "max_steps": 4, "fall_back": True, "eval_steps": 4}
    # The base finds a text by itself, which nothing can improve.
    held_out = [{"query": pair["positive"], "positive": pair["positive"]} for pair in pairs[4:]]
    options = {"train_dataset": pairs[:4], "eval_dataset": held_out}
    trainer = IsotropicGaussianTrainer(make_model(), make_args(**harmful), **options)
    trainer.train()
    figures = trainer.record()["validation_ndcg@10"]
    assert figures["saved"] == figures["base"] == 1.0 >= figures["trained"]
    torch.testing.assert_close(torch.tensor(trainer.model.encode(queries)), torch.tensor(base))
    with pytest.raises(UserError, match="fall_back needs held-out pairs"):
        IsotropicGaussianTrainer(make_model(), make_args(fall_back=True), train_dataset=pairs)
    with pytest.raises(UserError, match="fall_back needs held-out pairs"):
        IsotropicGaussianTrainer(make_model(output_dim=8), make_args(fall_back=True), **options)


def test_a_lexical_half_is_fitted_to_all_documents_and_trained_on(make_model, make_args, pairs, tmp_path):
    args, model = make_args(lexical=True, val_fraction=0.3), make_model()
    trainer = IsotropicGaussianTrainer(model, args, pairs, corpus=["another red bird"])
    assert model.lexical.is_fitted and model.config.output_dim == model.config.encoder_dim
    assert not torch.equal(model.projection.linear.weight, torch.eye(*model.projection.linear.weight.shape))
    trainer.train()
    trainer.save_model()
    record = json.loads((tmp_path / "out" / "training_record.json").read_text())
    texts = {*(pair["positive"] for pair in pairs), "another red bird"}
    assert record["data"]["lexical_documents"] == len(texts)
    assert record["data"]["lexical_weight"] == pytest.approx(model.config.lexical_weight, abs=1e-4)
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path / "out")
    assert _same(_head(loaded), _head(model))
    # The base is the encoder alone.
    args = make_args(val_fraction=0.3, output_dir=str(tmp_path / "plain"))
    plain = IsotropicGaussianTrainer(make_model(), args, pairs, corpus=["another red bird"])
    plain.train()
    bases = [each.record()["validation_ndcg@10"]["base"] for each in (trainer, plain)]
    assert bases[0] == bases[1]


def test_width_and_weight_of_the_lexical_half_can_be_named(make_model, make_args, pairs):
    model = make_model(lexical_weight=0.4)
    IsotropicGaussianTrainer(model, make_args("adapt", lexical=True, lexical_dim=3), pairs)
    assert (model.config.lexical_dim, model.config.lexical_weight) == (3, 0.4)
    assert model.lexical.table.shape[1] == 3
    # A width alone asks for the half, too.
    model = make_model(lexical_dim=3)
    IsotropicGaussianTrainer(model, make_args(), pairs)
    assert model.lexical is None or model.lexical.is_fitted


def test_a_model_that_was_fitted_before_is_not_fitted_again(make_model, make_args, pairs):
    model = make_model()
    model.fit_lexical([pair["positive"] for pair in pairs], weight=0.2, num_start_texts=0)
    table = model.lexical.table.clone()
    trainer = IsotropicGaussianTrainer(model, make_args("adapt", lexical=True, lexical_weight=0.5, max_steps=2), pairs)
    trainer.train()
    assert torch.equal(model.lexical.table, table) and model.config.lexical_weight == 0.2


def test_a_head_that_was_trained_without_a_lexical_half_goes_on_without(make_model, make_args, pairs, caplog):
    trainer = IsotropicGaussianTrainer(make_model(), make_args(), pairs)
    trainer.train()
    IsotropicGaussianTrainer(trainer.model, make_args(lexical=True), pairs)
    assert trainer.model.lexical is None and "goes on without one" in caplog.text


def test_a_lexical_half_needs_documents_before_a_stream_begins(make_model, make_args, pairs):
    stream = datasets.Dataset.from_list(pairs).to_iterable_dataset()
    args = make_args(lexical=True, feature_cache=False)
    with pytest.raises(UserError, match="documents that are known before training"):
        IsotropicGaussianTrainer(make_model(), args, stream)


def test_the_command_with_a_lexical_half_gives_the_model_of_python(
    tiny_encoder_folder, make_model, make_args, pairs, tmp_path
):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = ["--base_model", str(tiny_encoder_folder), "--train_data", str(path), "--lexical", "--max_steps", "2"]
    flags += ["--batch_size", "4", "--output_dir", str(tmp_path / "command"), "--use_cpu", "--save_strategy", "no"]
    train_contrastive.main([*flags, "--feature_cache_dir", str(tmp_path / "cache")])
    args = make_args(lexical=True, max_steps=2, per_device_train_batch_size=4)
    trainer = IsotropicGaussianTrainer(make_model(), args, pairs)
    trainer.train()
    command = IsotropicGaussianModel.from_pretrained(tmp_path / "command")
    assert command.lexical is not None and _same(_head(command), _head(trainer.model))


# The probability that a first document is relevant


def _held_out(number):
    words = ["fish", "bread", "moon", "star", "water", "bird", "music", "stone", "tree", "sun", "river", "piano"]
    texts = [f"{left} {right}" for left in words for right in words][:number]
    return [{"query": f"what is {text}", "positive": f"the {text} does sleep"} for text in texts]


@pytest.mark.parametrize(("number", "is_fitted"), [(99, False), (100, True)])
def test_a_hundred_held_out_queries_are_needed_to_tell_relevance(make_model, make_args, pairs, number, is_fitted):
    trainer = IsotropicGaussianTrainer(make_model(), make_args(), train_dataset=pairs, eval_dataset=_held_out(number))
    trainer.train()
    trainer.save_model()
    saved = IsotropicGaussianModel.from_pretrained(trainer.args.output_dir)
    found = saved.config.relevance_calibration
    assert (found is not None) == is_fitted
    if is_fitted:
        assert (found["num_queries"], found["num_documents"]) == (100, 100)
        queries, documents = ([row[name] for row in _held_out(number)] for name in ("query", "positive"))
        scores = saved.similarity(saved.encode_query(queries), saved.encode_document(documents))
        is_first = scores.argmax(1) == torch.arange(100)
        assert float(saved.relevance_probability(scores).mean()) == pytest.approx(
            float(is_first.float().mean()), abs=0.02
        )
        # Training again without held-out pairs leaves nothing that belongs to other weights.
        again = IsotropicGaussianTrainer(saved, make_args(), train_dataset=pairs)
        again.train()
        assert again.model.config.relevance_calibration is None


def test_pseudo_queries_of_documents_do_not_tell_relevance(make_model, make_args):
    texts = [{"text": f"{row['positive']}. {row['query']}."} for row in _held_out(144)]
    trainer = IsotropicGaussianTrainer(make_model(), make_args(val_fraction=0.9), train_dataset=texts)
    assert trainer.data.validation.num_rows >= 100
    trainer.train()
    assert trainer.model.config.relevance_calibration is None


def test_a_resumed_run_has_the_lexical_half_of_its_checkpoint(make_model, make_args, pairs, monkeypatch):
    fields = {"lexical": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = IsotropicGaussianTrainer(make_model(), make_args(**fields), pairs)
    whole.train()
    monkeypatch.setattr(IsotropicGaussianModel, "fit_lexical", None)  # must not be fitted again
    model = make_model()
    resumed = IsotropicGaussianTrainer(model, make_args(**fields, resume_from_checkpoint="last"), pairs)
    assert torch.equal(model.lexical.table, whole.model.lexical.table)
    resumed.train()
    assert _same(_head(model), _head(whole.model))


def test_documents_beside_pairs_start_from_the_lexical_half_of_the_run(make_model, make_args, pairs, monkeypatch):
    from ragcun_hf.sweep import automatic

    monkeypatch.setattr(automatic, "LEAST_HELD_OUT", 1)
    documents = [{"text": f"{pair['positive']} {pair['query']}. {pair['positive']}"} for pair in pairs]
    for weight in (0.0, 0.3):
        model, args = make_model(lexical_weight=weight), make_args("adapt", lexical=True, max_steps=1)
        trainer = IsotropicGaussianTrainer(model, args, {"pairs": pairs, "documents": documents})
        trainer.train()
        assert (model.lexical is None) == (weight == 0.0)
        assert model.config.feature_dim == model.projection.linear.in_features


def test_a_trained_head_keeps_its_configuration_where_a_lexical_half_is_asked_for(
    make_model, make_args, pairs, tmp_path
):
    trainer = IsotropicGaussianTrainer(make_model(), make_args(), pairs)
    trainer.train()
    args = make_args("adapt", lexical=True, lexical_dim=3, max_steps=1, output_dir=str(tmp_path / "again"))
    again = IsotropicGaussianTrainer(trainer.model, args, pairs)
    again.train()
    again.save_model()
    assert IsotropicGaussianModel.from_pretrained(tmp_path / "again").lexical is None


def test_a_corpus_serves_the_lexical_half_without_held_out_pairs(make_model, make_args, pairs):
    model = make_model()
    trainer = IsotropicGaussianTrainer(model, make_args(lexical=True), pairs, corpus=["another red bird"])
    assert trainer.data.facts["lexical_documents"] == len({pair["positive"] for pair in pairs}) + 1


def test_falling_back_with_exact_words_is_the_base(make_model, make_args, pairs, tmp_path):
    args = make_args(lexical=True, val_fraction=0.3, fall_back=True, learning_rate=10.0)
    model = make_model()
    plain = make_model().encode(["red fish", "a star"], normalize_embeddings=True)
    trainer = IsotropicGaussianTrainer(model, args, pairs)
    trainer.train()
    if trainer.record()["validation_ndcg@10"].get("trained") is not None:  # the head was no better
        assert torch.allclose(
            torch.tensor(model.encode(["red fish", "a star"], normalize_embeddings=True)),
            torch.tensor(plain),
            atol=1e-5,
        )
    width = model.config.encoder_dim + 3
    with pytest.raises(UserError, match="as wide as the encoder"):
        wide = make_args(lexical=True, val_fraction=0.3, fall_back=True)
        IsotropicGaussianTrainer(make_model(output_dim=width, lexical_dim=3), wide, pairs)


@pytest.mark.parametrize(
    ("max_steps", "logging", "num_logged"),
    [
        (3, {"logging_steps": 10}, 3),
        (24, {"logging_steps": 100}, 8),
        (4, {"logging_steps": 2}, 2),
        (3, {"logging_strategy": "no"}, 0),
    ],
)
def test_a_run_that_ends_before_its_first_log_line_has_a_curve(
    make_model, make_args, pairs, max_steps, logging, num_logged
):
    trainer = IsotropicGaussianTrainer(make_model(), make_args(max_steps=max_steps, **logging), train_dataset=pairs)
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == num_logged
