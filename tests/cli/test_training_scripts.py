"""The training commands, run as a user runs them, on small files and a tiny encoder."""

import argparse
import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ragcun_hf.data.documents import text_digest
from ragcun_hf.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "training"
RECIPES = sorted(
    set((ROOT / "ragcun_hf" / "cli" / "recipes").glob("*.yaml"))
    - {ROOT / "ragcun_hf" / "cli" / "recipes" / "unlabelled.yaml"}
)  # of pairs
SCRIPTS = sorted(TRAINING.glob("*.py"))
COMMANDS = [path for path in SCRIPTS if (ROOT / "ragcun_hf" / "cli" / path.name).is_file()]

DOCUMENTS = [
    "a bird does sleep in the tree . the moon is on the river .",
    "fish drink water in the river . fish are fast .",
    "the piano is slow music . music and light are in the star .",
    "bread is food . red bread and green food are on the stone .",
    "sort an array and the list . the mean is the sum of an array .",
    "the sun is red light . the moon is blue light .",
]


@pytest.fixture
def script():
    """Import a command by its name."""
    return lambda name: importlib.import_module(f"ragcun_hf.cli.{name}")


@pytest.fixture
def run(script, tiny_encoder_folder, tmp_path, monkeypatch):
    """Run a command in an empty folder; return the folder of the model that it saved."""
    monkeypatch.chdir(tmp_path)

    def start(name, *flags, output="out"):
        flags = [str(flag) for flag in flags]
        if "--base_model" not in flags:
            flags += ["--base_model", str(tiny_encoder_folder)]
        if output is not None:
            flags += ["--output_dir", output]
        script(name).main([*flags, "--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1"])
        return tmp_path / (output or "checkpoints")

    return start


@pytest.fixture
def pairs_file(tiny_pairs, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(tiny_pairs), encoding="utf-8")
    return path


@pytest.fixture
def documents_file(tmp_path):
    path = tmp_path / "documents.json"
    path.write_text(json.dumps(DOCUMENTS), encoding="utf-8")
    return path


@pytest.fixture
def xy_file(tmp_path):
    path = tmp_path / "xy_masked_documents.json"
    rows = [{"x": text, "y": text.replace("the", "[MASK]").replace("is", "[MASK]")} for text in DOCUMENTS]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _record(folder):
    return json.loads((folder / "training_record.json").read_text(encoding="utf-8"))


def _load(folder):
    from ragcun_hf.model.base_models import load_trained_model

    return load_trained_model(str(folder))


def _difference(left, right):
    left, right = _load(left).state_dict(), _load(right).state_dict()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def _seen(folder):
    return set((folder / "training_documents.txt").read_text(encoding="utf-8").split())


def _digests(texts):
    return {text_digest(text).hex() for text in texts}


def _logged(folder, key):
    return [entry[key] for entry in _record(folder)["log_history"] if key in entry]


# The three published command lines


def test_the_published_contrastive_command_runs(run, pairs_file, tiny_pairs, capsys):
    flags = "--use_predictor --freeze_base --output_dim 8 --epochs 3 --batch_size 4 --lambda_contrastive 1.0"
    weights = "--lambda_isotropy 1.5 --lambda_predictive 1.2"
    folder = run("train_contrastive", "--train_data", pairs_file, *flags.split(), *weights.split())
    model = _load(folder)
    assert (model.config.output_dim, model.config.use_predictor, model.config.freeze_base) == (8, True, True)
    assert model.encode_query("what is bread").shape == (8,)
    record = _record(folder)
    counts = {"rows": 8, "distinct_queries": 8, "distinct_positives": 8, "negatives": 1, "validation_rows": 0}
    assert counts.items() <= record["data"].items()
    assert record["data"]["train"] == ["train.json"]  # the folder above it may have the name of a user
    assert record["steps"] == 6
    assert record["training_arguments"]["lambda_isotropy"] == 1.5
    assert record["training_arguments"]["num_train_epochs"] == 3
    assert len(_logged(folder, "loss")) == 6
    for loss, *terms in zip(
        *(_logged(folder, key) for key in ("loss", "loss/contrastive", "loss/isotropy", "loss/predictive")),
        strict=True,
    ):
        assert loss == pytest.approx(terms[0] + 1.5 * terms[1] + 1.2 * terms[2], abs=2e-3)
    negatives = [pair.get("negative", []) for pair in tiny_pairs]
    seen = [pair["positive"] for pair in tiny_pairs]
    seen += [text for part in negatives for text in ([part] if isinstance(part, str) else part)]
    assert _seen(folder) == _digests(seen)
    assert not list(folder.parent.glob(".*.tmp"))
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2] == "Saved the model, its tokenizer and its training record in out."
    assert shown[-1] == (
        f"Next: ragcun search --model_path out --use_predictor --corpus {pairs_file} --text_column positive"
    )


def test_the_published_masked_command_runs(run, xy_file):
    folder = run("train_xy_masked", "--input_xy_pairs", xy_file, "--use_predictor", "--epochs", "3")
    record = _record(folder)
    assert record["data"]["rows"] == 6
    assert record["steps"] == 3  # six rows are less than one batch of 32: it is kept
    assert record["training_arguments"]["lambda_contrastive"] == 0.0  # purely predictive, as published
    assert not _logged(folder, "loss/contrastive")
    assert len(_logged(folder, "loss/predictive")) == 3
    assert _seen(folder) == _digests(DOCUMENTS)  # the original is the document, the masked text the query
    assert _load(folder).predictor is not None


def test_the_published_self_supervised_command_runs(run, documents_file):
    folder = run("train_self_supervised", "--documents", documents_file, "--use_predictor", "--split_method", "half")
    record = _record(folder)
    assert {"documents": 6, "rows": 6, "too_short": 0, "split_method": "half"}.items() <= record["data"].items()
    # The whole documents count as seen, not only the half that is the positive.
    assert _seen(folder) == _digests(DOCUMENTS)
    assert _load(folder).predictor is not None


def test_passages_that_share_the_id_of_their_document_are_trained_on_and_searched(run, tmp_path, pairs_file, caplog):
    path = tmp_path / "passages.json"
    path.write_text(json.dumps([{"id": "one", "text": text} for text in DOCUMENTS]), encoding="utf-8")
    folder = run("train_self_supervised", "--documents", path, "--split_method", "half")
    assert _record(folder)["data"]["documents"] == len(DOCUMENTS)
    assert "passages.json: 5 documents have the id of an earlier one" in caplog.text
    run("train_contrastive", "--train_data", pairs_file, "--val_data", pairs_file, "--val_corpus", path, output="next")


@pytest.mark.parametrize("method", ["half", "random", "prefix", "suffix", "sentence"])
def test_every_split_method_trains(run, documents_file, method):
    folder = run("train_self_supervised", "--documents", documents_file, "--split_method", method, "--epochs", "1")
    assert _record(folder)["data"]["split_method"] == method
    assert _load(folder).predictor is None


@pytest.mark.parametrize("kind", ["word", "span"])
def test_documents_are_masked_with_the_token_of_the_tokenizer(run, documents_file, monkeypatch, kind):
    from ragcun_hf.objective.inputs import FeaturePairs

    asked = []
    real = FeaturePairs.__init__

    def spy(self, queries, positives, *args, **kwargs):
        asked.append((list(queries), list(positives)))
        real(self, queries, positives, *args, **kwargs)

    monkeypatch.setattr(FeaturePairs, "__init__", spy)
    flags = ["--mask_kind", kind, "--mask_probability", "0.4", "--epochs", "1", "--use_predictor"]
    folder = run("train_xy_masked", "--documents", documents_file, *flags)
    ((queries, positives),) = asked
    assert positives == DOCUMENTS
    assert all("[MASK]" in query for query in queries)
    facts = {"mask_kind": kind, "mask_probability": 0.4, "documents": 6, "rows": 6}
    assert facts.items() <= _record(folder)["data"].items()


def test_without_cached_features_masks_change_from_epoch_to_epoch(run, documents_file, monkeypatch):
    from ragcun_hf.objective.inputs import TextPairCollator

    queries = []
    real = TextPairCollator.__call__

    def spy(self, rows):
        queries.append({row["positive"]: row["query"] for row in rows})
        return real(self, rows)

    monkeypatch.setattr(TextPairCollator, "__call__", spy)
    run("train_xy_masked", "--documents", documents_file, "--no_feature_cache", "--use_predictor", "--epochs", "3")
    assert len(queries) == 3
    assert all(batch.keys() == set(DOCUMENTS) for batch in queries)
    assert all(queries[0][text] != queries[1][text] for text in DOCUMENTS[:3])
    assert len({json.dumps(batch, sort_keys=True) for batch in queries}) == 3


def test_training_without_the_cache_gives_the_same_head_and_leaves_no_features(run, pairs_file, tmp_path):
    flags = ["--train_data", pairs_file, "--batch_size", "4", "--epochs", "2", "--encoder_dtype", "float32"]
    cached = run("train_contrastive", *flags, "--feature_cache_dir", tmp_path / "features", output="cached")
    assert list((tmp_path / "features").glob("*/*.features"))
    flags += ["--no_feature_cache", "--feature_cache_dir", tmp_path / "none"]
    fresh = run("train_contrastive", *flags, output="fresh")
    assert not (tmp_path / "none").exists()
    assert _difference(cached, fresh) < 1e-5


def test_a_blend_interpolates_from_the_start_and_is_recorded(run, pairs_file):
    flags = ["--train_data", pairs_file, "--batch_size", "4", "--epochs", "3", "--learning_rate", "1e-2"]
    whole, half, none = (run("train_contrastive", *flags, "--blend", b, output=f"b{b}") for b in ("1", "0.5", "0"))
    assert _record(half)["blend"] == 0.5
    assert _record(none)["steps"] == 0
    name = "projection.linear.weight"
    start, between, end = (_load(folder).state_dict()[name] for folder in (none, half, whole))
    torch.testing.assert_close(start, torch.eye(16))
    torch.testing.assert_close(between, (start + end) / 2)
    assert float((end - start).abs().max()) > 1e-3


def test_a_blended_model_is_measured_on_the_held_out_pairs(run, pairs_file, capsys):
    flags = ["--train_data", pairs_file, "--val_data", pairs_file, "--batch_size", "4", "--learning_rate", "1e-2"]
    folder = run("train_contrastive", *flags, "--epochs", "3", "--eval_steps", "3", "--blend", "0.5")
    figures = _logged(folder, "eval_ndcg@10")
    assert len(figures) == 3  # before training, after three and six steps
    from ragcun_hf.evaluation.validation import RetrievalValidation

    pairs = json.loads(pairs_file.read_text(encoding="utf-8"))
    texts = [[pair[name] for pair in pairs] for name in ("query", "positive")]
    negatives = [pair.get("negative", []) for pair in pairs]
    distractors = [text for part in negatives for text in ([part] if isinstance(part, str) else part)]
    expected = RetrievalValidation(*texts, distractors=distractors)(_load(folder))["ndcg@10"]
    record = _record(folder)
    saved = pytest.approx(expected, abs=1e-6)
    # The start is the identity, so it is the base.
    assert record["validation_ndcg@10"] == {"base": figures[0], "start": figures[0], "saved": saved}
    assert record["seconds"]["training"] > 0
    shown = capsys.readouterr().out
    assert f"searching 9 documents: frozen base {figures[0]:.4f}, start of the head {figures[0]:.4f}" in shown
    assert f"saved model {expected:.4f}." in shown
    assert "With fewer than 500 documents to search" in shown


@pytest.mark.slow
def test_held_out_pairs_are_kept_beside_the_model_and_evaluated_by_the_next_command(run, tiny_pairs, tmp_path, capsys):
    from ragcun_hf.cli import eval_beir

    rows = [{"query": pair["query"], "positive": pair["positive"]} for pair in tiny_pairs]
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "all.json").write_text(json.dumps(DOCUMENTS), encoding="utf-8")
    flags = ["--val_fraction", "0.4", "--val_corpus", "all.json", "--epochs", "2", "--batch_size", "4"]
    folder = run("train_contrastive", "--train_data", "pairs.json", *flags, "--feature_cache_dir", "cache")
    held_out = [json.loads(line) for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(held_out) == _record(folder)["data"]["validation_rows"] > 1
    assert all(row["query"] in {pair["query"] for pair in rows} for row in held_out)
    following = capsys.readouterr().out.splitlines()[-1].removeprefix("Next: ")
    assert "eval-beir" in following
    words = shlex.split(following)[2:]
    assert words == ["--model_path", "out", "--pairs", "out/held_out.jsonl", "--corpus", "all.json"]
    eval_beir.main([*words, "--feature_cache_dir", "cache"])
    assert "these figures are far higher than in a real collection" in capsys.readouterr().out
    results = json.loads((tmp_path / "results" / "out.json").read_text(encoding="utf-8"))
    figure = results["datasets"]["held_out"]["systems"]["projection"]["ndcg@10"]
    assert figure == pytest.approx(_record(folder)["validation_ndcg@10"]["saved"], abs=1e-6)
    with pytest.raises(UserError, match="--corpus is for --pairs"):
        eval_beir.main(["--model_path", "out", "--corpus", "all.json"])


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_the_recorded_figure_is_of_the_weights_that_are_saved(run, pairs_file, tmp_path, strategy):
    rows = [{"query": text[: len(text) // 2], "positive": text} for text in DOCUMENTS]
    (tmp_path / "val.json").write_text(json.dumps(rows), encoding="utf-8")
    flags = ["--batch_size", "8", "--epochs", "4", "--learning_rate", "1", "--dropout", "0"]
    flags += ["--val_data", "val.json", "--save_strategy", strategy]
    folder = run("train_contrastive", "--train_data", pairs_file, *flags)
    figures = _logged(folder, "eval_ndcg@10")[1:]
    assert max(figures) > figures[-1]
    # Without checkpoints the last weights are saved, with them the best.
    saved = _record(folder)["validation_ndcg@10"]["saved"]
    assert saved == pytest.approx(figures[-1] if strategy == "no" else max(figures), abs=1e-6)


def test_a_blended_model_is_saved_in_float32_after_evaluations_in_bfloat16(run, pairs_file):
    flags = ["--val_data", pairs_file, "--batch_size", "4", "--epochs", "1", "--blend", "0.5", "--bf16_full_eval"]
    folder = run("train_contrastive", "--train_data", pairs_file, *flags)
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_blend_uses_the_last_weights_instead_of_the_best(run, pairs_file, tmp_path):
    rows = [{"query": text[: len(text) // 2], "positive": text} for text in DOCUMENTS]
    (tmp_path / "val.json").write_text(json.dumps(rows), encoding="utf-8")
    flags = ["--train_data", pairs_file, "--batch_size", "8", "--epochs", "4", "--learning_rate", "1"]
    flags += ["--dropout", "0", "--encoder_dtype", "float32", "--blend", "0.5", "--save_strategy", "epoch"]
    with_validation = run("train_contrastive", *flags, "--val_data", "val.json", output="with")
    figures = _logged(with_validation, "eval_ndcg@10")[1:]
    assert max(figures) > figures[-1]
    assert _difference(with_validation, run("train_contrastive", *flags, output="without")) < 1e-3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--blend", "1.5"], r"in \[0, 1\]"),
        (["--blend", "0.5", "--projection_init", "random"], "--projection_init identity"),
        (["--blend", "0.5", "--no_freeze_base"], "frozen encoder"),
        (["--blend", "0.5", "--early_stopping_patience", "2", "--val_fraction", "0.3"], "--early_stopping_patience"),
    ],
)
def test_an_impossible_blend_is_a_user_error(run, pairs_file, flags, message):
    with pytest.raises(UserError, match=message):
        run("train_contrastive", "--train_data", pairs_file, *flags)


@pytest.mark.parametrize(
    "flags", [["--encoder_dtype", "bfloat16"], ["--encoder_backend", "openvino"], ["--feature_dtype", "float16"]]
)
def test_flags_for_cached_features_are_refused_without_a_cache(run, pairs_file, flags):
    with pytest.raises(UserError, match="for cached features"):
        run("train_contrastive", "--train_data", pairs_file, "--no_feature_cache", *flags)


def test_a_free_encoder_is_trained_and_saved(run, pairs_file, tiny_encoder_folder):
    from transformers import AutoModel

    flags = ["--no_freeze_base", "--encoder_learning_rate", "1e-3", "--epochs", "2", "--freeze_layers", "1"]
    folder = run("train_contrastive", "--train_data", pairs_file, *flags)
    before, after = AutoModel.from_pretrained(tiny_encoder_folder).state_dict(), _load(folder).encoder.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any(name.startswith("encoder.layer.1.") for name in moved)
    assert not any(name.startswith("encoder.layer.0.") for name in moved)


# Validation


def test_validation_pairs_choose_the_checkpoint(run, pairs_file, tmp_path, tiny_pairs):
    (tmp_path / "val.json").write_text(json.dumps(tiny_pairs[:3]), encoding="utf-8")
    flags = ["--val_data", tmp_path / "val.json", "--epochs", "2", "--use_predictor"]
    folder = run("train_contrastive", "--train_data", pairs_file, *flags)
    for key in ("eval_loss", "eval_loss/contrastive", "eval_ndcg@10", "eval_ndcg@10_predictor"):
        assert len(_logged(folder, key)) == 3  # the start, and each epoch
    record = _record(folder)
    assert record["data"]["validation_rows"] == 3
    assert record["training_arguments"]["load_best_model_at_end"] is True
    assert record["training_arguments"]["metric_for_best_model"] == "eval_ndcg@10"


@pytest.mark.parametrize("cache", ["--feature_cache", "--no_feature_cache"])
@pytest.mark.parametrize("name", ["train_contrastive", "train_xy_masked", "train_self_supervised"])
def test_a_fraction_of_the_documents_is_held_out(run, name, cache, tmp_path):
    words = "tree bird fish river stone music piano water light sun moon star sleep drink food bread".split()
    texts = [f"{first} and {second} are in the {first}" for first, second in zip(words, words[1:], strict=False)]
    rows = [{"query": f"what is {text}", "positive": text} for text in texts]
    rows = rows if name == "train_contrastive" else texts
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    flag = "--train_data" if name == "train_contrastive" else "--documents"
    options = ["--val_fraction", "0.3", "--epochs", "1", "--lambda_contrastive", "1", cache]
    folder = run(name, flag, tmp_path / "data.json", *options)
    assert 0 < len(_seen(folder)) < 15
    assert _seen(folder) < _digests(texts)
    assert len(_logged(folder, "eval_ndcg@10")) == 2  # the start, and the epoch


def test_the_best_checkpoint_is_kept_with_evaluations_every_few_steps(run, pairs_file):
    flags = ["--val_data", pairs_file, "--eval_strategy", "steps", "--eval_steps", "2", "--batch_size", "4"]
    folder = run("train_contrastive", "--train_data", pairs_file, *flags, "--epochs", "3")
    state = json.loads(max(folder.glob("checkpoint-*")).joinpath("trainer_state.json").read_text(encoding="utf-8"))
    figures = _logged(folder, "eval_ndcg@10")
    assert len(figures) == 4  # the start, which is no checkpoint, and three times while training
    assert state["best_model_checkpoint"] is not None
    assert state["best_metric"] == max(figures[1:])


def test_a_loss_chosen_as_metric_is_minimized(run, pairs_file):
    flags = ["--val_data", pairs_file, "--metric_for_best_model", "eval_loss/contrastive", "--epochs", "2"]
    folder = run("train_contrastive", "--train_data", pairs_file, *flags)
    state = json.loads(max(folder.glob("checkpoint-*")).joinpath("trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_metric"] == min(_logged(folder, "eval_loss/contrastive")[1:])


def test_a_run_that_diverged_saves_nothing(run, pairs_file, tmp_path):
    with pytest.raises(UserError, match="expected finite weights.*learning_rate"):
        run("train_contrastive", "--train_data", pairs_file, "--learning_rate", "1e30", "--warmup_steps", "0")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_warning_says_that_the_start_was_better(run, pairs_file, caplog, tmp_path):
    rows = [{"query": text[: len(text) // 2], "positive": text} for text in DOCUMENTS]
    (tmp_path / "val.json").write_text(json.dumps(rows), encoding="utf-8")
    flags = ["--val_data", "val.json", "--learning_rate", "100", "--warmup_steps", "0", "--epochs", "1"]
    run("train_contrastive", "--train_data", pairs_file, *flags)
    assert "the untrained start is the better choice" in " ".join(caplog.text.split())


def test_resuming_with_another_model_is_refused(run, pairs_file):
    run("train_contrastive", "--train_data", pairs_file, "--epochs", "1")
    flags = ["--resume_from_checkpoint", "last", "--epochs", "2"]
    with pytest.raises(UserError, match="similarity_fn_name 'dot' where .* has 'cosine'"):
        run("train_contrastive", "--train_data", pairs_file, *flags, "--similarity", "dot")
    with pytest.raises(UserError, match="output_dim 8 where .* has 16"):
        run("train_contrastive", "--train_data", pairs_file, *flags, "--output_dim", "8")


def test_resuming_elsewhere_does_not_replace_the_model_there(run, pairs_file, tmp_path):
    run("train_contrastive", "--train_data", pairs_file, "--epochs", "1")
    other = run("train_contrastive", "--train_data", pairs_file, "--epochs", "1", "--seed", "7", output="other")
    before = (other / "model.safetensors").read_bytes()
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    with pytest.raises(UserError, match="holds an earlier run"):
        flags = ["--resume_from_checkpoint", checkpoint, "--epochs", "2"]
        run("train_contrastive", "--train_data", pairs_file, *flags, output="other")
    assert (other / "model.safetensors").read_bytes() == before


def test_a_local_base_leaves_no_path_of_the_machine_in_the_files(run, pairs_file, tiny_encoder_folder):
    folder = run("train_contrastive", "--train_data", pairs_file, "--epochs", "1")
    for name in ("config.json", "training_record.json"):
        assert str(tiny_encoder_folder) not in (folder / name).read_text(encoding="utf-8")
    assert _load(folder).config.base_model_name == Path(tiny_encoder_folder).name


def test_a_trained_model_is_no_base_model(run, pairs_file):
    folder = run("train_contrastive", "--train_data", pairs_file, "--epochs", "1")
    with pytest.raises(UserError, match="expects an encoder.*trained model of this package"):
        run("train_contrastive", "--train_data", pairs_file, "--base_model", folder, output="again")


def test_a_finished_run_that_is_resumed_trains_no_further_step(run, pairs_file):
    flags = ["--train_data", pairs_file, "--batch_size", "4", "--max_steps", "3", "--save_steps", "1"]  # of two a pass
    flags += ["--lr_scheduler_type", "constant", "--warmup_steps", "0", "--use_predictor"]
    whole = run("train_contrastive", *flags, output="whole")
    resumed = run("train_contrastive", *flags, "--resume_from_checkpoint", whole / "checkpoint-3", output="resumed")
    assert _record(resumed)["steps"] == 3
    assert _difference(whole, resumed) == 0


def test_one_of_several_gpus_trains_in_one_process(run, pairs_file, monkeypatch, caplog):
    from transformers import Trainer, TrainingArguments

    # torch's DataParallel would split a batch, and each half would be treated as the whole batch.
    set_up = vars(TrainingArguments)["_setup_devices"].func

    def two_gpus(self):
        if "_device" not in vars(self):
            self._device, self._n_gpu = set_up(self), 2
        return self._device

    seen, init = [], Trainer.__init__
    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(two_gpus))
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, *args, **kwargs: init(self, *args, **kwargs) or seen.append(self)
    )
    run("train_contrastive", "--train_data", pairs_file)
    assert {trainer.args.n_gpu for trainer in seen} == {1}
    assert "One of 2 GPUs trains: start with accelerate launch --config_file" in caplog.text


def test_early_stopping_ends_training(run, pairs_file):
    flags = ["--val_data", pairs_file, "--early_stopping_patience", "1", "--learning_rate", "1e-9", "--epochs", "5"]
    folder = run("train_contrastive", "--train_data", pairs_file, *flags)
    assert _record(folder)["steps"] == 2  # nothing is learnt at this rate


@pytest.mark.slow
def test_a_resumed_run_stops_early_where_the_uninterrupted_one_did(run, pairs_file):
    flags = ["--train_data", pairs_file, "--val_data", pairs_file, "--learning_rate", "1e-9", "--epochs", "9"]
    flags += ["--early_stopping_patience", "3", "--save_total_limit", "9"]
    whole = run("train_contrastive", *flags, output="whole")
    record = _record(whole)
    assert record["steps"] == 4
    for step in (1, 2, 3, 4):
        resume = ("--resume_from_checkpoint", whole / f"checkpoint-{step}", "--overwrite")
        resumed = _record(run("train_contrastive", *flags, *resume, output="resumed"))
        assert resumed["steps"] == 4
        assert resumed["validation_ndcg@10"]["start"] == record["validation_ndcg@10"]["start"]


# Streams, recipes, folders


@pytest.mark.parametrize("width", ["16", "8"])
def test_rows_are_streamed(run, tmp_path, tiny_pairs, width):
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(pair) for pair in tiny_pairs), encoding="utf-8")
    flags = ["--streaming", "--max_steps", "5", "--no_feature_cache", "--batch_size", "4", "--output_dim", width]
    folder = run("train_contrastive", "--train_data", file, *flags)
    record = _record(folder)
    assert (record["steps"], record["data"]["streamed"]) == (5, True)
    assert not _seen(folder)  # not walked through a second time
    assert _load(folder).config.output_dim == int(width)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no_feature_cache"], "a stream needs --max_steps"),
        (["--max_steps", "5"], "add --no_feature_cache"),
        (["--max_steps", "5", "--no_feature_cache", "--val_fraction", "0.1"], "cannot hold out a --val_fraction"),
    ],
)
def test_a_stream_needs_flags_that_do_without_its_length(run, pairs_file, flags, message):
    with pytest.raises(UserError, match=message):
        run("train_contrastive", "--train_data", pairs_file, "--streaming", *flags)


@pytest.mark.parametrize("flags", [[], ["--no_feature_cache"]])
def test_a_balanced_epoch_has_as_many_rows_as_queries(run, tmp_path, tiny_pairs, flags):
    more = [{**tiny_pairs[0], "positive": pair["positive"]} for pair in tiny_pairs[1:]]
    (tmp_path / "many.json").write_text(json.dumps([*tiny_pairs, *more]))
    options = ["--balance_queries", "--epochs", "3", "--batch_size", "4", *flags]
    record = _record(run("train_contrastive", "--train_data", "many.json", *options))
    assert record["data"]["rows"] == 15
    assert record["steps"] == 3 * 2
    assert record["training_arguments"]["balance_queries"] is True


def test_a_single_query_cannot_be_balanced(run, tmp_path, tiny_pairs):
    rows = [{**tiny_pairs[0], "positive": pair["positive"]} for pair in tiny_pairs]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="at least two different queries"):
        run("train_contrastive", "--train_data", "one.json", "--balance_queries")


def test_balanced_queries_refuse_rows_that_are_drawn_during_training(run, pairs_file, documents_file):
    stream = ["--streaming", "--max_steps", "2", "--no_feature_cache", "--batch_size", "4"]
    with pytest.raises(UserError, match="--balance_queries needs pairs that are known"):
        run("train_contrastive", "--train_data", pairs_file, "--balance_queries", *stream)
    with pytest.raises(UserError, match="--balance_queries needs pairs that are known"):
        run("train_self_supervised", "--documents", documents_file, "--balance_queries", "--no_feature_cache")


def test_flags_win_over_the_recipe_file(run, pairs_file, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"train_data: {pairs_file}\nuse_predictor: true\noutput_dim: 8\nepochs: 7\nlearning_rate: 1e-4\n"
    )
    folder = run("train_contrastive", "--config", recipe, "--epochs", "2", "--output_dim", "4")
    settings = _record(folder)["training_arguments"]
    assert (settings["num_train_epochs"], settings["learning_rate"]) == (2, 1e-4)
    assert (_load(folder).config.output_dim, _load(folder).config.use_predictor) == (4, True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_for_two_steps(run, path, pairs_file, tmp_path):
    flags = ["--config", path, "--train_data", pairs_file, "--max_steps", "2", "--batch_size", "4"]
    run("train_contrastive", *flags, output=None)
    folder = tmp_path / "checkpoints" / path.stem  # named after the recipe
    assert _record(folder)["steps"] == 2
    width = {"jepa_10k": 768, "jepa_iso15_pred12": 768, "512dim_10k": 512, "pure_isotropy": 512}.get(path.stem, 16)
    assert _load(folder).encode_document(["bread", "the sun"]).shape == (2, width)


def test_without_a_recipe_the_folder_is_named_after_the_script(run, documents_file, xy_file, pairs_file, tmp_path):
    run("train_self_supervised", "--documents", documents_file, "--epochs", "1", output=None)
    run("train_xy_masked", "--input_xy_pairs", xy_file, "--epochs", "1", output=None)
    run("train_contrastive", "--train_data", pairs_file, "--epochs", "1", output=None)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"train_self_supervised", "train_xy_masked", "train_contrastive"}


def test_a_second_run_does_not_touch_the_first_unless_told_to(run, pairs_file):
    flags = ["--train_data", pairs_file, "--batch_size", "4", "--save_steps", "1"]
    folder = run("train_contrastive", *flags, "--epochs", "3")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="out holds an earlier run.*--resume_from_checkpoint last.*--overwrite"):
        run("train_contrastive", *flags, "--epochs", "1")
    # Even when told to, it first checks that it can begin.
    with pytest.raises(UserError, match="nowhere.json"):
        run("train_contrastive", "--train_data", "nowhere.json", "--overwrite")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    run("train_contrastive", *flags, "--epochs", "1", "--overwrite", "--seed", "5")
    assert _record(folder)["steps"] == 2
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_resuming_the_last_checkpoint_gives_the_weights_of_an_uninterrupted_run(
    run, pairs_file, monkeypatch, tmp_path
):
    from ragcun_hf.trainer import trainer

    flags = ["--train_data", pairs_file, "--batch_size", "4", "--epochs", "3", "--use_predictor", "--dropout", "0.3"]
    flags += ["--save_steps", "2", "--projection_init", "random"]
    whole = run("train_contrastive", *flags, output="whole")

    class Interrupted(trainer.IsotropicGaussianTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "IsotropicGaussianTrainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("train_contrastive", *flags)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    resumed = run("train_contrastive", *flags, "--resume_from_checkpoint", "last")
    assert _record(resumed)["steps"] == 6
    assert _difference(whole, resumed) == 0


def test_duplicate_rows_are_dropped_and_counted(run, tiny_pairs, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(tiny_pairs), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(tiny_pairs[:3]), encoding="utf-8")
    folder = run("train_contrastive", "--train_data", "a.json", "b.json", "--epochs", "1")
    facts = {"rows": 8, "duplicate_rows_dropped": 3, "duplicate_rows": 0}
    assert facts.items() <= _record(folder)["data"].items()


@pytest.mark.parametrize("same", ["query", "positive"])
def test_pairs_without_contrast_cause_a_warning(run, tiny_pairs, tmp_path, caplog, same):
    rows = [{"query": pair["query"], "positive": pair["positive"], same: "bread is food"} for pair in tiny_pairs]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    folder = run("train_contrastive", "--train_data", "a.json", "--epochs", "1")
    assert "the contrastive term is 0" in caplog.text
    assert _logged(folder, "loss/contrastive") == [0]


def test_pairs_with_contrast_cause_no_warning(run, pairs_file, caplog):
    run("train_contrastive", "--train_data", pairs_file, "--epochs", "1")
    assert "contrastive term" not in caplog.text


@pytest.mark.parametrize("stream", [[], ["--streaming", "--max_steps", "2", "--no_feature_cache"]])
def test_validation_documents_are_no_negatives_in_training(run, pairs_file, tmp_path, monkeypatch, stream):
    (tmp_path / "val.json").write_text(json.dumps([{"query": "what is red", "positive": "the sun is red"}] * 2))
    seen = []

    def read_and_stop(model, args, data):
        seen.extend(data.train)
        raise KeyboardInterrupt

    monkeypatch.setattr("ragcun_hf.trainer.trainer.IsotropicGaussianTrainer", read_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run("train_contrastive", "--train_data", pairs_file, "--val_data", "val.json", *stream)
    assert len(seen) == 8
    assert not any(row["negative"] for row in seen)


def test_other_column_names_and_a_limit(run, tmp_path, tiny_pairs):
    lines = ["question\tanswer", *(f"{pair['query']}\t{pair['positive']}" for pair in tiny_pairs)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    flags = ["--query_column", "question", "--positive_column", "answer", "--limit", "4", "--epochs", "1"]
    folder = run("train_contrastive", "--train_data", "pairs.tsv", *flags)
    assert _record(folder)["data"]["rows"] == 4


def test_a_beir_folder_gives_its_training_pairs(run, tmp_path):
    folder = tmp_path / "toy"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{row}", "title": "", "text": text} for row, text in enumerate(DOCUMENTS)]
    queries = [{"_id": f"q{row}", "text": f"what is {text[:12]}"} for row, text in enumerate(DOCUMENTS)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "q0\td0\t1\nq1\td1\t1\nq2\td2\t0\n")
    output = run("train_contrastive", "--train_data", folder, "--epochs", "1")
    assert _record(output)["data"]["rows"] == 2
    assert _seen(output) == _digests(DOCUMENTS[:2])


# Help


def _dataclasses(module):
    return [value for value in vars(module).values() if dataclasses.is_dataclass(value) and isinstance(value, type)]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_flag_of_a_script_has_help(script, path):
    from transformers import TrainingArguments

    from ragcun_hf.cli import training
    from ragcun_hf.objective.arguments import IsotropicGaussianTrainingArguments

    own = [value for value in _dataclasses(script(path.stem)) if value.__module__ == f"ragcun_hf.cli.{path.stem}"]
    assert own
    shared = [value for value in _dataclasses(training) if value is not training.ParsedArguments]
    assert len(shared) >= 6
    shared.append(IsotropicGaussianTrainingArguments)
    for arguments in [*own, *shared]:
        for field in dataclasses.fields(arguments):
            if not field.init:
                continue
            # Fields of the parent have its own help, in older versions only in its docstring.
            inherited = field.name in {each.name for each in dataclasses.fields(TrainingArguments)}
            assert field.metadata.get("help") or inherited, f"{arguments.__name__}.{field.name}"


def test_the_help_of_a_training_script_shows_every_flag_of_ours_with_its_help(script, capsys):
    with pytest.raises(SystemExit) as end:
        script("train_contrastive").main(["--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("--train_data", "--use_predictor", "--lambda_isotropy", "--epochs", "--batch_size", "--val_data"):
        assert text in shown
    assert "Weight of the isotropy term, >= 0; 0 skips the term." in shown
    assert argparse.SUPPRESS not in shown


def _help(script, capsys, flag="--help"):
    with pytest.raises(SystemExit) as end:
        script("train_contrastive").main([flag])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_groups_the_flags_with_the_user_s_data_first(script, capsys):
    shown = _help(script, capsys)
    titles = [line for line in shown.splitlines() if line.endswith(":") and line[0] not in " -"]
    assert titles == [
        "Sources of the pairs:",
        "Held-out data, by which the best checkpoint is chosen:",
        "The encoder and the head:",
        "The loss terms, the start of the head, and what is made of data and weights:",
        "Length of training, batches, learning rate and output:",
        "How the encoder's features are computed and cached:",
        "Settings of a run besides the training itself:",
        "This command:",
    ]


def test_the_flags_of_transformers_are_shown_by_help_all_only(script, capsys):
    short, long = _help(script, capsys), _help(script, capsys, "--help_all")
    flags = [set(re.findall(r"^  (--\w+)", text, flags=re.M)) for text in (short, long)]
    assert flags[0] < flags[1]
    assert {"--max_steps", "--fsdp", "--push_to_hub"} <= flags[1] - flags[0]
    for text in (short, long):
        names = re.findall(r"^  (--\w+)", text, flags=re.M)
        assert len(names) == len(set(names))
    assert "TrainingArguments of transformers:" in long
    assert len(short.splitlines()) < 250


def test_every_flag_is_in_help_all(script, capsys, monkeypatch):
    from ragcun_hf import command_line

    made = []
    make = command_line._make_parser
    monkeypatch.setattr(command_line, "_make_parser", lambda *args, **kw: made.append(make(*args, **kw)) or made[-1])
    shown = _help(script, capsys, "--help_all")
    assert all(f"--{action.dest}" in shown for action in made[-1]._actions)


@pytest.mark.parametrize("name", [path.stem for path in COMMANDS])
def test_help_imports_neither_torch_nor_transformers(name):
    program = (
        f"import sys\nfrom ragcun_hf.cli import run\nsys.argv[1:] = ['--help']\n"
        f"try:\n    run({name!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print('heavy:', [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr


# What comes next


def _next(run, capsys, name, *flags):
    run(name, *flags, "--max_steps", "1", "--overwrite")
    return capsys.readouterr().out.splitlines()[-1]


def _beir_folder(folder, splits):
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": f"d{number}", "title": "", "text": text} for number, text in enumerate(DOCUMENTS)]
    queries = [{"_id": f"q{number}", "text": "where is bread"} for number in range(4)]
    for name, content in (("corpus", rows), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    for split in splits:
        lines = "".join(f"q{number}\td{number}\t1\n" for number in range(4))
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("splits", "split"),
    [(["train", "test"], ""), (["train", "dev"], " --split dev"), (["train"], " --split train")],
)
def test_after_training_on_a_beir_folder_the_next_command_evaluates_on_it(run, capsys, tmp_path, splits, split):
    _beir_folder(tmp_path / "data" / "mine", splits)
    said = _next(run, capsys, "train_contrastive", "--train_data", "data/mine", "--use_predictor")
    flags = f"--model_path out --use_predictor --datasets mine --data_dir data{split}"
    assert said == f"Next: ragcun eval-beir {flags}"
    from ragcun_hf.cli import eval_beir

    eval_beir.main(flags.split())
    assert (tmp_path / "results" / "out.json").is_file()


def _distinct_queries(folder):
    queries = [{"_id": f"q{number}", "text": f"where is {text}"} for number, text in enumerate(DOCUMENTS)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)), encoding="utf-8")


def test_held_out_pairs_of_a_beir_folder_search_its_corpus(run, capsys, tmp_path, monkeypatch, documents_file):
    _distinct_queries(_beir_folder(tmp_path / "data" / "mine", ["train", "dev"]))
    flags = ["--train_data", "data/mine", "--max_steps", "1", "--overwrite", "--feature_cache_dir", "cache"]
    run("train_contrastive", *flags, "--val_fraction", "0.4")
    shown = capsys.readouterr().out
    assert "Validation searches 6 documents of data/mine/corpus.jsonl; --val_corpus names others." in shown
    assert "searching 6 documents: frozen base" in shown
    run("train_contrastive", *flags, "--val_data", "data/mine", "--val_split", "dev")
    assert "searching 6 documents: frozen base" in capsys.readouterr().out
    documents_file.write_text(json.dumps(["one more", "and one more"]), encoding="utf-8")
    for more in (["--documents", "data/mine", "--show_plan"], ["--val_corpus", str(documents_file)]):
        run("train_contrastive", *flags, "--val_fraction", "0.4", *more)
        assert "Validation searches" not in capsys.readouterr().out
    monkeypatch.setattr("ragcun_hf.cli.training._MOST_SEARCHED", 5)
    run("train_contrastive", *flags, "--val_fraction", "0.4")
    assert "Validation searches 5 of 6 documents of data/mine/corpus.jsonl" in capsys.readouterr().out
    run("train_contrastive", *flags, "--val_fraction", "0.4", "--no_freeze_base")
    assert "Validation searches" not in capsys.readouterr().out


def test_a_sweep_on_a_beir_folder_searches_its_corpus(run, capsys, tmp_path):
    _distinct_queries(_beir_folder(tmp_path / "mine", ["train"]))
    run("sweep", "--train_data", "mine", "--val_fraction", "0.4", "--max_steps", "1", "--batch_size", "2")
    assert "Validation searches 6 documents of mine/corpus.jsonl" in capsys.readouterr().out


def test_validation_data_in_beir_s_layout_are_evaluated_before_training_data(run, capsys, tmp_path, pairs_file):
    _beir_folder(tmp_path / "held out", ["test"])
    flags = ["--train_data", pairs_file, "--val_data", "held out", "--val_split", "test"]
    said = _next(run, capsys, "train_contrastive", *flags)
    assert said == "Next: ragcun eval-beir --model_path out --datasets 'held out' --data_dir ."


def test_without_judgements_the_next_command_searches_the_user_s_texts(
    run, capsys, pairs_file, documents_file, xy_file
):
    search = "Next: ragcun search --model_path out"
    said = _next(run, capsys, "train_self_supervised", "--documents", documents_file)
    assert said == f"{search} --corpus {documents_file}"
    said = _next(run, capsys, "train_xy_masked", "--input_xy_pairs", xy_file)
    assert said == f"{search} --corpus {xy_file} --text_column x"
    said = _next(run, capsys, "train_contrastive", "--train_data", pairs_file)
    assert said == f"{search} --corpus {pairs_file} --text_column positive"


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_ends_with_zero(path):
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout
    assert "--config" in done.stdout


# Real processes and the real encoder


@pytest.mark.slow
def test_an_interrupted_process_ends_with_130_and_can_be_resumed(script, tiny_encoder_folder, pairs_file, tmp_path):
    flags = ["--train_data", str(pairs_file), "--base_model", str(tiny_encoder_folder), "--use_cpu"]
    flags += ["--output_dir", str(tmp_path / "out"), "--batch_size", "4", "--save_steps", "50", "--max_steps"]
    command = [sys.executable, str(TRAINING / "train_contrastive.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([*command, "1000000"], **options) as process:
        deadline = time.monotonic() + 1_800  # a training that writes no checkpoint never ends
        while not list(tmp_path.glob("out/checkpoint-*/checksums.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=1_800)  # nor does a process that ignores the signal
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert "interrupted: finished checkpoints and cached features are kept" in shown
    assert not (tmp_path / "out" / "model.safetensors").exists()
    step = max(int(path.parent.name.split("-")[1]) for path in tmp_path.glob("out/checkpoint-*/checksums.json"))
    (tmp_path / "out" / f"checkpoint-{step + 50}").mkdir()  # an interruption while a checkpoint was written
    resume = [str(step + 2), "--resume_from_checkpoint", "last", "--save_strategy", "no"]
    script("train_contrastive").main([*flags, *resume])
    assert _record(tmp_path / "out")["steps"] == step + 2


@pytest.mark.slow
def test_the_real_encoder_learns_from_the_embedded_folder(run, embedded_folder, tmp_path):
    rows = [
        {"query": f"what is said about {topic}", "positive": f"{topic} is what this text is about, and nothing else"}
        for topic in ("bread", "rivers", "sorting", "the moon", "birds", "pianos", "stones", "sleep")
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    flags = ["--base_model", "embedded", "--train_data", "pairs.json", "--use_predictor", "--epochs", "5"]
    # At the default temperature, the loss of these eight pairs is near 0 from the start.
    folder = run("train_contrastive", *flags, "--batch_size", "8", "--temperature", "1")
    losses = _logged(folder, "loss/contrastive")
    assert losses[-1] < losses[0]
    model = _load(folder)
    assert model.config.base_model_name == "sentence-transformers/all-MiniLM-L6-v2"
    assert model.encode_query("where is bread").shape == (384,)
