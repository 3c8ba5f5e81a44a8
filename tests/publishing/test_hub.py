"""Pushing a model to a Hub and loading it from there with the real client; refused pushes leave no trace."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import OWNER_TOKEN, READER_TOKEN, HubServer
from huggingface_hub import HfApi

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.errors import UserError
from ragcun_hf.publishing.card import BEGIN_WORDS, render_card
from ragcun_hf.publishing.card_sources import nothing_measured
from ragcun_hf.publishing.hub import (
    check_before_upload,
    check_clean_load,
    describe_plan,
    plan_plain_upload,
    plan_upload,
    prepare_repository,
    upload,
)

ROOT = Path(__file__).resolve().parents[2]
REPO = "org/tiny"
TEXTS = ["sort an array", "the sun is red", "moon"]


@pytest.fixture(scope="module")
def server():
    server = HubServer()
    yield server
    server.stop()


@pytest.fixture
def hub(server, monkeypatch):
    """The server, empty, with this process's client directed at it."""
    server.reset()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address that it was made with
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between retries
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    return server


def _save_model(encoder_folder, folder, *, seed):
    torch.manual_seed(seed)
    model = IsotropicGaussianModel.from_encoder(str(encoder_folder), query_prompt="query: ")
    with torch.no_grad():
        for parameter in model.projection.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model


def _write_toy_set(folder):
    (folder / "qrels").mkdir(parents=True)
    texts = {"d0": "bread is food", "d1": "the moon is on the river", "d2": "fish sleep in the water"}
    queries = {"q0": "what is bread", "q1": "where is the moon", "q2": "why do fish sleep"}
    for name, rows in (("corpus", texts), ("queries", queries)):
        lines = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in rows.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    judgements = "\n".join(f"q{row}\td{row}\t1" for row in range(3))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}", encoding="utf-8")


def _script(name):
    return importlib.import_module(f"ragcun_hf.cli.{name}")


@pytest.fixture(scope="module")
def finished(tiny_encoder_folder, tmp_path_factory):
    """A trained folder as its owner has it: evaluated on a set called scifact, with a card and a checkpoint."""
    place = tmp_path_factory.mktemp("finished")
    folder = place / "tiny"
    _save_model(tiny_encoder_folder, folder, seed=1)
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "optimizer.pt").write_bytes(b"state")
    (folder / "training_args.bin").write_bytes(b"pickle")
    _write_toy_set(place / "beir" / "scifact")
    flags = ["--model_path", str(folder), "--datasets", "scifact", "--data_dir", str(place / "beir")]
    _script("eval_beir").main([*flags, "--output_dir", str(place / "results"), "--encoder_dtype", "float32"])
    results = str(place / "results" / "tiny.json")
    _script("render_card").main(["--model_path", str(folder), "--results", results, "--repo_id", REPO])
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy for one test to change."""
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def _environment(server, tmp_path, token):
    caches = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "home" / "modules")}
    changed = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    return {**os.environ, **caches, **changed}


def _load_elsewhere(hub, tmp_path, script, *words):
    """Run a script, which reads the texts, as a user of the Hub would, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        input=json.dumps(TEXTS),
        env=_environment(hub, tmp_path / "user", OWNER_TOKEN),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOAD_SCRIPT = """
import json, sys
sys.modules["ragcun_hf"] = None
import torch
torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
vectors, texts = {}, json.load(sys.stdin)
for revision in sys.argv[2:]:
    model = AutoModel.from_pretrained(sys.argv[1], revision=revision, trust_remote_code=True)
    vectors[revision] = [model.encode_query(texts).tolist()]
    model = SentenceTransformer(sys.argv[1], revision=revision, trust_remote_code=True, device="cpu")
    vectors[revision].append(model.encode_query(texts).tolist())
print(json.dumps(vectors))
"""


@pytest.mark.slow
def test_another_process_loads_a_pushed_model_by_branch_and_by_commit(
    hub, folder, tiny_encoder_folder, tmp_path, capsys
):
    _script("push_to_hub").main(["--model_path", str(folder), "--repo_id", REPO, "--private"])
    repository = hub.repositories[REPO]
    (first,) = repository.history
    assert first in capsys.readouterr().out
    assert repository.private
    # A later model on a branch of its own, and yet another on main: the first commit stays what it was.
    api, models = HfApi(), {first: IsotropicGaussianModel.from_pretrained(folder)}
    for seed, branch in ((2, "wider"), (3, "main")):
        later = tmp_path / f"later{seed}"
        models[branch] = _save_model(tiny_encoder_folder, shutil.copytree(folder, later), seed=seed)
        prepare_repository(api, REPO, revision=branch)
        upload(api, plan_upload(later), REPO, revision=branch)
    found = _load_elsewhere(hub, tmp_path, LOAD_SCRIPT, REPO, *models)
    assert set(found) == set(models)
    for revision, (by_auto_model, by_sentence_transformers) in found.items():
        expected = models[revision].encode_query(TEXTS)
        np.testing.assert_allclose(by_auto_model, expected, atol=1e-6)
        np.testing.assert_allclose(by_sentence_transformers, expected, atol=1e-5)


def test_results_of_any_name_go_with_the_card_that_shows_them_and_other_code_only_on_request(folder):
    sources = folder / "card_sources.json"
    (folder / "results" / "tiny.json").rename(folder / "results" / "tiny (2) + more.json")
    text = sources.read_text(encoding="utf-8")
    sources.write_text(text.replace("results/tiny.json", "results/tiny (2) + more.json"), encoding="utf-8")
    (folder / "helper.py").write_text("VALUE = 1\n", encoding="utf-8")
    plan = plan_upload(folder)
    assert "results/tiny (2) + more.json" in plan.files
    assert "helper.py" in plan.left_out
    assert "helper.py" in plan_upload(folder, foreign_code=True).files


def test_the_model_goes_in_one_commit_without_files_of_the_run(hub, folder):
    (folder / "results" / "older.json").write_text("{}", encoding="utf-8")
    plan, api = plan_upload(folder), HfApi()
    prepare_repository(api, REPO)
    oid = upload(api, plan, REPO).oid
    assert hub.repositories[REPO].history == [oid]
    sent = set(hub.repositories[REPO].commits[oid]) - {".gitattributes"}
    assert sent == set(plan.files)
    assert sent >= {"README.md", "results/tiny.json", ".eval_results/scifact.yaml", "isotropy.png", "tokenizer.json"}
    assert sent >= {
        "model.safetensors",
        "modeling_isotropic_gaussian.py",
        "sentence_transformers_isotropic_gaussian.py",
    }
    assert set(plan.left_out) == {"checkpoint-7/optimizer.pt", "training_args.bin", "results/older.json"}
    text = describe_plan(plan, REPO)
    for name in [*plan.files, *plan.left_out]:
        assert name in text


def test_pushing_the_same_files_again_sends_and_commits_nothing(hub, folder):
    api = HfApi()
    prepare_repository(api, REPO)
    first = upload(api, plan_upload(folder), REPO).oid
    hub.requests.clear()
    prepare_repository(api, REPO)
    assert upload(api, plan_upload(folder), REPO).oid == first
    assert hub.repositories[REPO].history == [first]
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_a_push_to_a_branch_leaves_main_alone(hub, folder):
    api = HfApi()
    prepare_repository(api, REPO, revision="v2")
    oid = upload(api, plan_upload(folder), REPO, revision="v2").oid
    assert hub.repositories[REPO].branches["v2"] == oid
    assert hub.repositories[REPO].branches["main"] != oid


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "valid token.*Invalid user token.*hf auth login"),
        (False, "valid token.*or none.*hf auth login"),
        (READER_TOKEN, "may write.*no write access"),
    ],
)
def test_a_wrong_missing_or_read_only_token_is_reported(hub, token, message):
    with pytest.raises(UserError, match=message):
        prepare_repository(HfApi(token=token), REPO)
    assert not hub.repositories


def test_a_namespace_of_another_owner_is_reported(hub):
    with pytest.raises(UserError, match="may write to google/tiny"):
        prepare_repository(HfApi(), "google/tiny")


def test_a_missing_repository_is_reported(hub, folder):
    with pytest.raises(UserError, match=r"found none.*--repo_id"):
        upload(HfApi(), plan_upload(folder), "org/nowhere")


def test_evaluating_a_missing_model_reports_its_name(hub, tmp_path):
    _write_toy_set(tmp_path / "toy")
    flags = ["--model_path", "org/nowhere", "--datasets", "toy", "--data_dir", str(tmp_path)]
    with pytest.raises(UserError, match="org/nowhere"):
        _script("eval_beir").main(flags)


def test_a_broken_connection_commits_nothing_and_the_next_push_continues(hub, folder):
    plan, api = plan_upload(folder), HfApi()
    prepare_repository(api, REPO)
    hub.cut_uploads = 1_000  # more often than the client retries
    with pytest.raises(UserError, match="connection broke.*nothing was committed.*again"):
        upload(api, plan, REPO)
    assert not hub.repositories[REPO].history
    hub.cut_uploads = 0
    oid = upload(api, plan, REPO).oid
    assert hub.repositories[REPO].history == [oid]
    assert set(hub.repositories[REPO].commits[oid]) >= set(plan.files)


def test_the_client_recovers_from_a_short_break(hub, folder):
    api = HfApi()
    prepare_repository(api, REPO)
    hub.cut_uploads = 1
    upload(api, plan_upload(folder), REPO)
    assert hub.cut_uploads == 0
    assert len(hub.repositories[REPO].history) == 1


def test_an_unreachable_hub_is_reported(hub, monkeypatch):
    with pytest.raises(UserError, match="connection broke"):
        prepare_repository(HfApi(endpoint="http://127.0.0.1:9"), REPO)


def test_offline_mode_is_reported(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        prepare_repository(HfApi(), REPO)


def test_an_impossible_id_is_reported(hub):
    with pytest.raises(UserError, match="organisation/name"):
        prepare_repository(HfApi(), "org/a name")


@pytest.mark.slow
def test_a_dry_run_checks_everything_and_sends_nothing(hub, folder, capsys):
    _script("push_to_hub").main(["--model_path", str(folder), "--repo_id", REPO, "--dry_run"])
    said = capsys.readouterr().out
    assert "model.safetensors" in said
    assert "Nothing was sent" in said
    assert not hub.requests


def _replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def _invent_a_figure(folder):
    with (folder / "README.md").open("a", encoding="utf-8") as file:
        file.write("\nNDCG@10 on all of the web: 0.9731\n")


def _change_the_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["projection.linear.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _change_results(folder):
    results = json.loads((folder / "results" / "tiny.json").read_text(encoding="utf-8"))
    results["datasets"]["scifact"]["systems"]["projection"]["ndcg@10"] = 0.99
    (folder / "results" / "tiny.json").write_text(json.dumps(results), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_invent_a_figure, "expected '.*' as rendered from the sources, got '.*all of the web"),
        (_change_the_weights, "expected figures of the weights in"),
        (_change_results, "expected what the results files say"),
        (
            lambda folder: _replace(folder / ".eval_results" / "scifact.yaml", "value: ", "value: 9"),
            "results files say",
        ),
        (lambda folder: _replace(folder / "README.md", "## Limits", "NDCG@10: 0.1234"), "expected '## Limits"),
        (lambda folder: _replace(folder / "README.md", BEGIN_WORDS, f"{BEGIN_WORDS}\n9"), "without digits, got '9'"),
        (lambda folder: _replace(folder / "config.json", "isotropic_gaussian", "bert"), "isotropic_gaussian model"),
        (lambda folder: (folder / "results" / "tiny.json").unlink(), "results file"),
        (lambda folder: (folder / "README.md").unlink(), "README.md"),
        (lambda folder: (folder / "card_sources.json").unlink(), "ragcun card --model_path"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights"),
        (lambda folder: _replace(folder / "card_sources.json", REPO, "org/other"), f"--repo_id {REPO}"),
    ],
)
def test_a_folder_that_does_not_fit_its_card_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        plan_upload(folder)
        check_before_upload(folder, REPO)


@pytest.mark.slow
def test_a_folder_that_others_could_not_load_is_refused(folder):
    _replace(folder / "modeling_isotropic_gaussian.py", "import json\n", "import json\nimport ragcun_hf\n")
    with pytest.raises(UserError, match="clean process.*ragcun_hf"):
        check_clean_load(folder)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="--model_path"):
        plan_upload(tmp_path / "none")
    with pytest.raises(UserError, match="config.json"):
        plan_upload(tmp_path)


@pytest.fixture
def train(tiny_encoder_folder, tiny_pairs, tmp_path):
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps(tiny_pairs), encoding="utf-8")
    flags = [
        "--base_model",
        str(tiny_encoder_folder),
        "--train_data",
        str(pairs),
        "--batch_size",
        "4",
        "--epochs",
        "2",
    ]
    flags += ["--output_dir", str(tmp_path / "trained"), "--feature_cache_dir", str(tmp_path / "features")]
    flags += ["--encoder_dtype", "float32", "--logging_steps", "1"]

    def run(*more):
        _script("train_contrastive").main([*flags, *more])
        return tmp_path / "trained"

    return run


@pytest.mark.slow
def test_training_pushes_one_commit_and_the_evaluated_model_is_pushed_in_the_next(hub, train, tmp_path, monkeypatch):
    monkeypatch.setattr("ragcun_hf.publishing.hub.check_clean_load", lambda folder, **_: None)  # has a test of its own
    folder = train("--push_to_hub", "--hub_model_id", "org/trained", "--val_fraction", "0.25")
    repository = hub.repositories["org/trained"]
    (oid,) = repository.history  # no checkpoint, no card by the Trainer
    sent = repository.commits[oid]
    assert {"model.safetensors", "modeling_isotropic_gaussian.py", "learning_curves.png"} <= set(sent)
    assert "training_documents.txt" in sent
    assert "a digest of each training document" in sent["README.md"].decode()
    assert not [path for path in sent if path.startswith("checkpoint")]
    card = sent["README.md"].decode()
    assert "Retrieval: not measured" in card
    assert "NDCG@10 on held-out pairs, as saved" in card
    assert 'AutoModel.from_pretrained("org/trained"' in card
    _write_toy_set(tmp_path / "beir" / "toy")
    flags = ["--model_path", str(folder), "--datasets", "toy", "--data_dir", str(tmp_path / "beir")]
    _script("eval_beir").main([*flags, "--output_dir", str(tmp_path / "results"), "--encoder_dtype", "float32"])
    results = str(tmp_path / "results" / "trained.json")
    _script("render_card").main(["--model_path", str(folder), "--results", results, "--repo_id", "org/trained"])
    _script("push_to_hub").main(["--model_path", str(folder), "--repo_id", "org/trained"])
    assert len(repository.history) == 2
    assert "toy test (3 queries)" in repository.commits[repository.history[-1]]["README.md"].decode()


@pytest.mark.slow
def test_the_trainer_pushes_model_and_card_in_one_commit_without_texts_of_the_user(
    hub, tiny_encoder_folder, tiny_pairs, tmp_path, monkeypatch
):
    from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments

    monkeypatch.setattr("ragcun_hf.publishing.hub.check_clean_load", lambda folder, **_: None)
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), base_model_name="org/encoder")
    options = {"output_dir": str(tmp_path / "mine"), "hub_model_id": "org/mine", "max_steps": 2, "use_cpu": True}
    options |= {"save_strategy": "no", "disable_tqdm": True, "report_to": "none"}
    args = IsotropicGaussianTrainingArguments(**options, hub_training_digests=False)
    trainer = IsotropicGaussianTrainer(model, args, train_dataset=tiny_pairs[:6], eval_dataset=tiny_pairs[6:])
    trainer.train()
    assert not hub.repositories  # nothing is sent before it is asked for
    commit = trainer.push_to_hub("My first head", private=True, license="mit", language="en")
    repository = hub.repositories["org/mine"]
    (oid,) = repository.history
    assert commit.oid == oid
    assert repository.private
    sent = repository.commits[oid]
    assert {"model.safetensors", "README.md", "training_record.json", "learning_curves.png"} <= set(sent)
    kept = ["held_out.jsonl", "training_documents.txt"]
    assert not sent.keys() & set(kept)
    assert all((tmp_path / "mine" / name).is_file() for name in kept)
    card = huggingface_hub.ModelCard(sent["README.md"].decode())
    assert "Retrieval: not measured" in card.text
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    with pytest.raises(TypeError, match="one commit"):
        trainer.push_to_hub(blocking=False)


def test_a_card_made_in_python_of_an_evaluation_in_python_may_be_pushed(
    tiny_encoder_folder, tiny_pairs, tmp_path, monkeypatch
):
    from ragcun_hf import IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments, RetrievalEvaluator

    monkeypatch.setattr("ragcun_hf.publishing.hub.check_clean_load", lambda folder, **_: None)  # has a test of its own
    folder = tmp_path / "mine"
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), base_model_name="org/encoder")
    options = {"output_dir": str(folder), "hub_model_id": REPO, "max_steps": 2, "use_cpu": True, "report_to": "none"}
    args = IsotropicGaussianTrainingArguments(**options, save_strategy="no", disable_tqdm=True)
    trainer = IsotropicGaussianTrainer(model, args, train_dataset=tiny_pairs)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(language=["en", "de"], license="mit")
    check_before_upload(folder, REPO)
    data = huggingface_hub.ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert (data.license, data.language) == ("mit", ["en", "de"])
    trainer.create_model_card()
    assert huggingface_hub.ModelCard((folder / "README.md").read_text(encoding="utf-8")).data.license is None
    report = RetrievalEvaluator.from_pairs(tiny_pairs, show_progress_bar=False)(trainer.model)
    report.save(tmp_path / "results.json")
    flags = ["--model_path", str(folder), "--results", str(tmp_path / "results.json"), "--repo_id", REPO]
    _script("render_card").main(flags)
    assert f"{report['ndcg@10']:.4f}" in (folder / "README.md").read_text(encoding="utf-8")
    check_before_upload(folder, REPO)
    trainer.train()
    trainer.save_model()
    with pytest.raises(UserError, match="expected figures of the weights in"):
        check_before_upload(folder, REPO)


def test_a_bad_token_is_refused_before_training(hub, train, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="valid token for org/trained"):
        train("--push_to_hub", "--hub_model_id", "org/trained")
    with pytest.raises(UserError, match="--hub_strategy checkpoint"):
        train("--push_to_hub", "--hub_strategy", "checkpoint")


@pytest.mark.slow
def test_training_without_an_id_pushes_under_the_name_of_the_folder(hub, train, monkeypatch):
    monkeypatch.setattr("ragcun_hf.publishing.hub.check_clean_load", lambda folder, **_: None)  # has a test of its own
    train("--push_to_hub")
    assert set(hub.repositories) == {"me/trained"}


@pytest.mark.parametrize("is_private", [True, False, None])
def test_save_pretrained_creates_a_public_or_private_repository_as_asked(
    hub, tiny_encoder_folder, tmp_path, is_private
):
    model = _save_model(tiny_encoder_folder, tmp_path / "tiny", seed=1)
    options = {} if is_private is None else {"private": is_private}
    model.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id=REPO, **options)
    repository = hub.repositories[REPO]
    assert repository.private is bool(is_private)
    assert set(repository.commits[repository.branches["main"]]) >= {"model.safetensors", "modules.json"}


def test_save_pretrained_passes_every_option_on_to_the_hub(hub, tiny_encoder_folder, tmp_path, monkeypatch):
    model = _save_model(tiny_encoder_folder, tmp_path / "tiny", seed=1)
    monkeypatch.setenv("HF_TOKEN", READER_TOKEN)  # so that only the token passed may write
    options = {"push_to_hub": True, "repo_id": REPO, "token": OWNER_TOKEN, "private": True}
    model.save_pretrained(
        tmp_path / "again", **options, revision="v2", commit_message="second", commit_description="of two"
    )
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.messages == {repository.branches["v2"]: ("second", "of two")}
    before = dict(repository.branches)
    model.save_pretrained(tmp_path / "again", **options, create_pr=True)
    assert {name: repository.branches[name] for name in before} == before
    assert "model.safetensors" in repository.commits[repository.branches["refs/pr/1"]]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_the_python_snippets_of_a_card_run_and_their_index_ranks_like_the_model(
    similarity, tiny_encoder_folder, tmp_path, monkeypatch
):
    pytest.importorskip("sentence_transformers")
    torch.manual_seed(5)
    folder = tmp_path / "me" / "tiny"
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), similarity_fn_name=similarity)
    with torch.no_grad():
        for parameter in model.projection.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    card = render_card(results=nothing_measured("tiny", config), repo_id="me/tiny")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert [name for name in ("AutoModel", "faiss", "SentenceTransformer") if name in "".join(snippets)]
    monkeypatch.chdir(tmp_path)  # the id is a folder's path there
    names = {}
    for snippet in snippets:
        # Three documents, so that there is something to rank.
        snippet = snippet.replace('["Vaccines', '["the sun is red", "music and bread", "Vaccines')
        exec(compile(snippet, "README.md", "exec"), names)  # noqa: S102 (our own card)
    documents = model.encode_document(["the sun is red", "music and bread", "Vaccines train the immune system"])
    query = model.encode_query(["how do vaccines work?"])[0]
    scores = {
        "cosine": documents @ query / np.linalg.norm(documents, axis=1),
        "dot": documents @ query,
        "euclidean": -np.linalg.norm(documents - query, axis=1),
    }[similarity]
    assert names["rows"].tolist() == [[int(np.argmax(scores))]]
    assert names["scores"].shape == (1, 2)


PLAIN_LOAD_SCRIPT = """
import json, sys
sys.modules["ragcun_hf"] = None
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
print(json.dumps([model.encode(json.load(sys.stdin), prompt_name="query").tolist(), model.prompts]))
"""


@pytest.mark.slow
def test_a_plain_push_loads_without_remote_code_and_has_a_card_of_its_own(hub, folder, tmp_path, capsys):
    _script("push_to_hub").main(["--model_path", str(folder), "--repo_id", "org/tiny-plain", "--plain"])
    assert 'SentenceTransformer("org/tiny-plain", revision=' in capsys.readouterr().out
    repository = hub.repositories["org/tiny-plain"]
    (commit,) = repository.history
    files = set(repository.commits[commit])
    assert not any(name.endswith((".py", ".bin")) for name in files)
    assert {"modules.json", "1_Pooling/config.json", "results/tiny.json", "README.md"} <= files
    vectors, _ = _load_elsewhere(hub, tmp_path, PLAIN_LOAD_SCRIPT, "org/tiny-plain")
    expected = IsotropicGaussianModel.from_pretrained(folder).encode_query(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    card = huggingface_hub.hf_hub_download("org/tiny-plain", "README.md", cache_dir=tmp_path / "cache")
    text = Path(card).read_text(encoding="utf-8")
    assert 'SentenceTransformer("org/tiny-plain")' in text
    assert "trust_remote_code" not in text


def test_a_plain_push_takes_no_file_from_outside_the_folder(folder, tmp_path):
    target = tmp_path / "elsewhere" / "plain"
    target.mkdir(parents=True)
    (folder.parent / "secret.png").write_bytes(b"secret")
    _replace(folder / "README.md", BEGIN_WORDS, f"{BEGIN_WORDS}\n![mine](../secret.png) ![web](https://a.b/c.png)")
    plan = plan_plain_upload(folder, target, "org/plain", TEXTS)
    assert "results/tiny.json" in plan.files
    assert not [name for name in plan.files if "secret" in name]
    assert not (target.parent / "secret.png").exists()


def test_a_plain_push_never_replaces_the_model_itself(hub, folder):
    with pytest.raises(UserError, match=f"repository of its own for a plain folder, got {REPO}"):
        _script("push_to_hub").main(["--model_path", str(folder), "--repo_id", REPO, "--plain", "--dry_run"])


def test_a_plain_push_of_a_card_that_was_changed_is_refused(hub, folder):
    _invent_a_figure(folder)
    with pytest.raises(UserError, match="as rendered from the sources"):
        _script("push_to_hub").main(["--model_path", str(folder), "--repo_id", "org/plain", "--plain", "--dry_run"])
    assert not hub.requests
