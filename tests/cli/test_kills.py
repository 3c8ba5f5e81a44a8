"""A kill at any file event leaves the old files or the new ones, never a mixture, and never a half that loads."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments
from ragcun_hf.data.writing import write_beir_folder, write_json_rows
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.results import write_json
from ragcun_hf.features.feature_cache import FeatureCache
from ragcun_hf.files import LOCK_FILE, owned_folder, remove_leftovers
from ragcun_hf.publishing.card import check_card, write_card
from ragcun_hf.publishing.card_sources import keep_sources, nothing_measured, read_sources
from ragcun_hf.sweep.records import SweepRecords, TrialRecord
from ragcun_hf.trainer.record import open_checkpoint

pytestmark = [
    pytest.mark.usefixtures("quick_garbage_collection"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

_KILLED = 9
_OF_COMMANDS = 1 if int(os.environ.get("FUZZ_INPUTS", "0")) >= 10_000 else 8  # each kill costs a whole command
# What Python reports before it changes files. Between two of these events, files change inside of temporary ones only.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.utime"}
_CHANGES |= {"os.truncate", "shutil.rmtree", "ctypes.dlsym"}  # the last comes before two folders are exchanged


def _is_change(event, arguments, root):
    if event == "open":
        _, mode, flags = arguments
        is_written = any(letter in (mode or "") for letter in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))
    else:
        is_written = event in _CHANGES
    path = str(arguments[0]) if arguments else ""
    return is_written and (event == "ctypes.dlsym" or path.startswith(root))


def _run_child(operation, root, fatal):
    """Run an operation in a forked child, which ends at its change number `fatal`; return the number of changes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            if _is_change(event, arguments, root):
                count += 1
                if count == fatal:
                    os._exit(_KILLED)

        sys.addaudithook(hook)
        code = 1
        try:
            operation()
            code = 0
        finally:
            os.write(writer, str(count).encode())
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        count = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _KILLED), f"change {fatal}: exit code {code}"
    return int(count) if code == 0 else None


def _kill_everywhere(prepare, operation, check, tmp_path, every=1):
    """Run `operation(folder)` with a kill at each of its changes; `check(folder, is_done)` after each.

    With `every` above 1, only at some of them.
    """
    folder = tmp_path / "0" / "work"
    prepare(folder)
    total = _run_child(lambda: operation(folder), str(tmp_path), 0)
    check(folder, True)
    for fatal in range(1, total + 1, every):
        folder = tmp_path / str(fatal) / "work"
        prepare(folder)
        assert _run_child(lambda folder=folder: operation(folder), str(tmp_path), fatal) is None
        check(folder, False)
        operation(folder)  # the next run puts it right, and removes what the dead one left
        check(folder, True)
        remove_leftovers(folder)
        remove_leftovers(folder.parent)
        assert not [path for path in folder.parent.rglob(".*") if path.name.endswith((".tmp", LOCK_FILE))]
        shutil.rmtree(folder.parent)
    print(f"{len(range(0, total, every))} kills")  # noqa: T201 (shown by make fuzz)
    return total


def _content(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if not any(part.endswith(".tmp") for part in path.parts)
    }


def _kill_while_replacing(write, tmp_path, every):
    """Let `write(folder, "second")` replace what "first" wrote, with kills: all files are those of one of the two."""
    write(tmp_path / "old", "first")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    write(tmp_path / "new", "second")
    old, new = _content(tmp_path / "old"), _content(tmp_path / "new")
    assert old != new

    def check(folder, is_done):
        content = _content(folder)
        assert content == new or (content == old and not is_done)

    _kill_everywhere(
        lambda folder: shutil.copytree(tmp_path / "old", folder),
        lambda folder: write(folder, "second"),
        check,
        tmp_path / "kills",
        every=every,
    )


def _state(facts):
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _unsynced(operation, root):
    """Run an operation in a forked child; return what it renamed before the disk had it, and folders left unsynced."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        synced, faults, folders, fsync = set(), [], set(), os.fsync

        def recorded(descriptor):
            fsync(descriptor)
            synced.add(_state(os.fstat(descriptor)))
            folders.discard(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

        def hook(event, arguments):
            if event == "os.rename" and str(arguments[0]).startswith(root):
                renamed = [Path(os.fsdecode(arguments[0]))]
                folders.add(os.path.realpath(Path(os.fsdecode(arguments[1])).parent))
            elif event == "ctypes.dlsym" and arguments[1] == "renameat2":  # before a new folder and an old are swapped
                renamed = list(Path(root).rglob("*.tmp"))
                folders.update(os.path.realpath(each.parent) for each in renamed)
            else:
                return
            for path in [each for top in renamed for each in (top, *top.rglob("*"))]:
                if not path.is_dir() and _state(path.lstat()) not in synced:
                    faults.append(f"{event} of {path.name}")

        os.fsync = recorded
        sys.addaudithook(hook)
        code = 1
        try:
            operation()
            code = 0
        finally:
            os.write(writer, "\n".join([*faults, *(f"folder {each}" for each in folders)]).encode())
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        found = file.read().decode()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return found.splitlines()


@pytest.fixture
def trainer(tiny_encoder_folder, tiny_pairs, tmp_path):
    args = IsotropicGaussianTrainingArguments(
        output_dir=str(tmp_path / "trainer"), use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=4, feature_cache_dir=str(tmp_path / "features"), report_to="none",
        val_fraction=0.3,
    )  # fmt: skip
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder))
    trainer = IsotropicGaussianTrainer(model, args, train_dataset=tiny_pairs)
    trainer.train()
    return trainer


def test_saving_a_model_over_another(trainer, tmp_path):
    trainer.save_model(str(tmp_path / "old"))
    (tmp_path / "old" / "README.md").write_text("own words", encoding="utf-8")
    (tmp_path / "old" / "checkpoint-1").mkdir()
    (tmp_path / "old" / "checkpoint-1" / "state").write_text("kept", encoding="utf-8")
    with torch.no_grad():
        trainer.model.projection.linear.weight += 1
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    trainer.save_model(str(tmp_path / "new"))
    old, new = _content(tmp_path / "old"), _content(tmp_path / "new")
    assert old != new
    seen = set()

    def check(folder, is_done):
        content = _content(folder)
        assert content == new or (content == old and not is_done)
        seen.add(content == new)

    total = _kill_everywhere(
        lambda folder: shutil.copytree(tmp_path / "old", folder),
        lambda folder: trainer.save_model(str(folder)),
        check,
        tmp_path / "kills",
    )
    assert total > 30
    assert seen == {True, False}


@pytest.mark.slow
def test_saving_a_first_model(trainer, tmp_path):
    trainer.save_model(str(tmp_path / "new"))
    new = _content(tmp_path / "new")

    def check(folder, is_done):
        content = _content(folder) if folder.exists() else {}
        assert content == new or (not content and not is_done)

    _kill_everywhere(
        lambda folder: folder.parent.mkdir(parents=True),
        lambda folder: trainer.save_model(str(folder)),
        check,
        tmp_path / "kills",
    )


def test_a_checkpoint_that_replaces_the_one_before(trainer, tmp_path):
    trainer.create_optimizer_and_scheduler(4)
    trainer.args.save_total_limit = 1

    def save(folder, step):
        trainer.args.output_dir, trainer.state.global_step = str(folder), step
        trainer._save_checkpoint(trainer.model, None)

    save(tmp_path / "first", 1)

    def check(folder, is_done):
        step = open_checkpoint(folder, "last").step
        assert step == 2 or (step == 1 and not is_done)

    total = _kill_everywhere(
        lambda folder: shutil.copytree(tmp_path / "first", folder),
        lambda folder: save(folder, 2),
        check,
        tmp_path / "kills",
    )
    assert total > 20


def _card(folder, repo_id):
    results = nothing_measured("work", json.loads((folder / "config.json").read_text(encoding="utf-8")))
    write_card(folder / "README.md", results=results, training_record=None, repo_id=repo_id)
    keep_sources(folder, repo_id=repo_id)


def test_a_card_with_its_sources(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    _card(tmp_path / "model", "org/old")

    def check(folder, is_done):
        text = (folder / "README.md").read_text(encoding="utf-8")
        named = json.loads((folder / "card_sources.json").read_text(encoding="utf-8"))["repo_id"]
        is_of_one = ("org/new" in text) == (named == "org/new")
        with contextlib.nullcontext() if is_of_one else pytest.raises(UserError):
            check_card(folder / "README.md", read_sources(folder))  # so that half a card is never pushed
        assert not is_done or (is_of_one and named == "org/new")

    _kill_everywhere(
        lambda folder: shutil.copytree(tmp_path / "model", folder),
        lambda folder: _card(folder, "org/new"),
        check,
        tmp_path / "kills",
    )


def test_results_and_rows_and_folders_of_data(tmp_path):
    def prepare(folder):
        write_all(folder, "old")

    def write_all(folder, word):
        write_json(folder / "results.json", {"word": word})
        write_json_rows([{"word": word}] * 3, folder / "rows.jsonl")
        write_beir_folder(folder / "beir", {"d": ("", word)}, {"q": word}, {"test": {"q": {"d": 1}}})

    def check(folder, is_done):
        files = {name: (folder / name).read_text(encoding="utf-8") for name in ("results.json", "rows.jsonl")}
        beir = "".join(path.read_text(encoding="utf-8") for path in sorted((folder / "beir").glob("*.jsonl")))
        for content in (*files.values(), beir):
            assert ("old" in content) != ("new" in content)
            assert not is_done or "new" in content
        assert files["rows.jsonl"].count("\n") == 3

    _kill_everywhere(prepare, lambda folder: write_all(folder, "new"), check, tmp_path / "kills")


def test_the_feature_cache(tmp_path):
    digests = [f"{row:016d}".encode() for row in range(50)]
    features = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)

    def operation(folder):
        cache = FeatureCache(folder, {"a": 1}, feature_dim=8)
        batches = [(digests[start : start + 10], features[start : start + 10]) for start in range(0, 50, 10)]
        for batch in batches:
            cache.write(*batch)

    def check(folder, is_done):
        cache = FeatureCache(folder, {"a": 1}, feature_dim=8)
        missing = cache.missing(digests)
        kept = [row for row in range(50) if row not in missing]
        np.testing.assert_array_equal(cache.read([digests[row] for row in kept]), features[kept])
        assert len(missing) % 10 == 0
        assert not (is_done and missing)

    _kill_everywhere(lambda folder: folder.mkdir(parents=True), operation, check, tmp_path / "kills")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_power_cut_after_a_rename_loses_nothing_that_was_renamed(trainer, tmp_path):
    """A file has reached the disk before it gets its final name, and its folder does so after."""
    trainer.create_optimizer_and_scheduler(4)
    trainer.save_model(str(tmp_path / "power" / "model"))

    def checkpoint():
        trainer.args.output_dir = str(tmp_path / "power" / "out")
        trainer._save_checkpoint(trainer.model, None)
        assert open_checkpoint(tmp_path / "power" / "out", "last")

    folder = tmp_path / "power"
    texts = {"d": ("", "bread"), "e": ("", "food")}
    operations = {
        "a first model": lambda: trainer.save_model(str(folder / "other")),
        "a model over another": lambda: trainer.save_model(str(folder / "model")),
        "a card": lambda: _card(folder / "model", "org/model"),
        "results": lambda: write_json(folder / "results.json", {"a": 1}),
        "rows": lambda: write_json_rows([{"a": 1}], folder / "rows.jsonl"),
        "a folder": lambda: write_beir_folder(folder / "beir", texts, {"q": "a"}, {"test": {"q": {"d": 1}}}),
        "sweep": lambda: SweepRecords(folder / "sweep", {"a": 1}).add(
            [TrialRecord({"learning_rate": 0.1}, 0, 0, 5, {"ndcg@10": 0.5}, 1.0)]
        ),
        "a checkpoint": checkpoint,
    }  # fmt: skip
    found = {name: _unsynced(operation, str(folder)) for name, operation in operations.items()}
    assert found == {name: [] for name in operations}


def test_the_records_of_a_sweep(tmp_path):
    def operation(folder):
        records = SweepRecords(folder, {"a": 1})
        for seed in range(3):
            record = TrialRecord({"learning_rate": 0.1}, seed, 0, 5, {"ndcg@10": 0.5}, 1.0)
            if record.key not in records:
                records.add([record])

    def check(folder, is_done):
        records = SweepRecords(folder, {"a": 1})
        kept = [seed for seed in range(3) if TrialRecord({"learning_rate": 0.1}, seed, 0, 5, {}, 1.0).key in records]
        assert kept == list(range(len(kept)))
        assert not is_done or len(kept) == 3

    _kill_everywhere(lambda folder: folder.mkdir(parents=True), operation, check, tmp_path / "kills")


def test_one_run_owns_a_folder_until_it_ends_or_is_killed(tmp_path):
    folder, (reader, writer) = tmp_path / "out", os.pipe()
    child = os.fork()
    if child == 0:
        with owned_folder(folder):
            (folder / "half").mkdir()
            os.write(writer, b"x")
            os.read(os.pipe()[0], 1)  # waits for ever
    os.read(reader, 1)
    with pytest.raises(UserError, match="out for one run, got another run that is at work there.*--output_dir"):
        with owned_folder(folder):
            raise AssertionError("two owners")
    os.kill(child, 9)
    os.waitpid(child, 0)
    with owned_folder(folder), owned_folder(Path(folder, "..", "out")):  # the same process may nest
        assert (folder / "half").is_dir()
    assert not (folder / LOCK_FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("sentence-transformers", "sentence_transformers"),
        pytest.param("onnx", "onnxscript", marks=pytest.mark.skipif(_OF_COMMANDS > 1, reason="minutes: make fuzz")),
    ],
)
def test_exporting_over_another_export(tiny_model, tmp_path, kind, package):
    pytest.importorskip(package)
    from ragcun_hf.cli import export

    tiny_model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        tiny_model.projection.linear.weight += 1
    tiny_model.save_pretrained(tmp_path / "second")
    (tmp_path / "texts.txt").write_text("bread is food\nthe moon is on the river\n", encoding="utf-8")

    def write(folder, source):
        flags = ["--model_path", str(tmp_path / source), "--output_dir", str(folder)]
        export.main([*flags, "--format", kind, "--check_texts", str(tmp_path / "texts.txt")])

    _kill_while_replacing(write, tmp_path, every=4 if kind == "onnx" else _OF_COMMANDS)


@pytest.mark.slow
def test_evaluating_over_an_earlier_evaluation(tiny_model, tmp_path, monkeypatch):
    """Results, run files and plots are of one evaluation; for a moment there may be no results."""
    from ragcun_hf.cli import eval_beir

    tiny_model.save_pretrained(tmp_path / "first" / "model")
    with torch.no_grad():
        tiny_model.projection.linear.weight.copy_(torch.randn(tiny_model.projection.linear.weight.shape))
    tiny_model.save_pretrained(tmp_path / "second" / "model")
    texts = {"d0": ("", "bread is food"), "d1": ("", "the moon is on the river"), "d2": ("", "fish sleep in water")}
    queries = {"q0": "what is bread", "q1": "where is the moon"}
    write_beir_folder(tmp_path / "beir" / "toy", texts, queries, {"test": {"q0": {"d0": 1}, "q1": {"d1": 1}}})

    def write(folder, source):
        flags = ["--model_path", str(tmp_path / source / "model"), "--datasets", "toy"]
        eval_beir.main([*flags, "--data_dir", str(tmp_path / "beir"), "--output_dir", str(folder), "--no_bm25"])

    write(tmp_path / "old", "first")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    write(tmp_path / "new", "second")

    def scores(folder):
        return [(folder / "model" / f"toy.{system}.trec").read_text("utf-8") for system in ("base", "projection")]

    def weights(folder):
        path = folder / "model.json"
        return json.loads(path.read_text("utf-8"))["model"]["weights_sha256"] if path.exists() else None

    old, new = ((scores(tmp_path / name), weights(tmp_path / name)) for name in ("old", "new"))
    assert old[0] != new[0]
    assert old[1] != new[1]

    def check(folder, is_done):
        found, digest = scores(folder), weights(folder)
        assert found in (old[0], new[0])
        assert digest in (None, (old if found == old[0] else new)[1])
        assert not is_done or (found, digest) == new

    _kill_everywhere(
        lambda folder: shutil.copytree(tmp_path / "old", folder),
        lambda folder: write(folder, "second"),
        check,
        tmp_path / "kills",
        every=_OF_COMMANDS,
    )


@pytest.mark.slow
def test_converting_over_an_earlier_conversion(tiny_encoder_folder, tmp_path):
    from transformers import AutoModel

    from ragcun_hf.cli import convert_checkpoint

    encoder = AutoModel.from_pretrained(tiny_encoder_folder).state_dict()
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        head = {"projection.0.weight": (24, 16), "projection.0.bias": (24,)}
        head |= {"projection.3.weight": (10, 24), "projection.3.bias": (10,)}
        state = {key: torch.randn(shape) for key, shape in head.items()}
        state |= {f"base.0.auto_model.{key}": value for key, value in encoder.items()}
        torch.save(state, tmp_path / f"{name}.pt")

    def write(folder, source):
        flags = ["--checkpoint", str(tmp_path / f"{source}.pt"), "--base_model", str(tiny_encoder_folder)]
        convert_checkpoint.main([*flags, "--output_dir", str(folder), "--overwrite"])

    _kill_while_replacing(write, tmp_path, every=_OF_COMMANDS)
