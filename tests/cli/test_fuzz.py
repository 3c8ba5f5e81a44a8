"""Generated inputs for every reader: each is read, or refused in one line, and none hangs.

The seed is fixed. `make test` tries a few hundred inputs, `make fuzz` ten thousand (FUZZ_INPUTS sets the number), and
prints how many of each kind were read and refused.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from ragcun_hf.cli.training import parse_training_arguments
from ragcun_hf.command_line import parse_arguments
from ragcun_hf.data.beir_folder import load_beir_folder
from ragcun_hf.data.documents import read_documents
from ragcun_hf.data.pairs import read_pairs, read_xy_pairs
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.ranking import check_trec_ids, read_trec_run
from ragcun_hf.evaluation.results import SCHEMA_VERSION, format_results_table, read_results
from ragcun_hf.features.feature_cache import list_cached_encoders
from ragcun_hf.files import check_file_name, check_writable
from ragcun_hf.model.base_models import load_trained_model
from ragcun_hf.publishing.card import render_card
from ragcun_hf.publishing.card_sources import join_results, nothing_measured, read_manifest, read_published
from ragcun_hf.publishing.hub import check_code
from ragcun_hf.sweep.records import SweepRecords, TrialRecord
from ragcun_hf.trainer.record import check_output_folder, open_checkpoint

NUM_INPUTS = int(os.environ.get("FUZZ_INPUTS", "600"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
_SECONDS = 60  # an input that takes longer hangs

ODD_TEXTS = [
    "", " ", "\0", "a\0b", "\ufeff", "\u2028", "\u202e", "\r", "\n\n", "\t\t\t", '"', '""', "'", ",", "\\", "[", "{",
    "]}",
    "NaN", "Infinity", "-0", "1e999", "9" * 25, "9" * 5000, "0x10", "1_0", "true", "null", "\\ud800", "é" * 300,
    "x" * 300,
    "../../etc/passwd", "/dev/null", "/dev/zero", "a/b", "~", "$HOME", "--help", "-1", "hf_" + "a" * 30, "٣",
    "\x1b[31m",
    "*a", "&a", "<<: *a", "!!python/object/apply:os.system [id]", "2024-99-99", "%s%n", "<script>", "{{x}}", "&a [*a]",
    "[" * 3_000, "[" * 200_000, '{"a":' * 100_000, "a" * 1_000_000, "- " * 3_000,
]  # fmt: skip
ODD_VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), [], {}, [[]],
    [None],
    {"": None}, {"a": {"b": []}}, *ODD_TEXTS[:50],
]  # fmt: skip
PAIRS = [{"query": f"what is {word}", "positive": f"{word} is good", "negative": ["no"]} for word in "abcdef"]


def _mutate_bytes(draw, content):
    """Flip, cut, lose, repeat and insert pieces."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4])):
        place = draw.randrange(len(content) + 1)
        kind = draw.randrange(6)
        if kind == 0 and content:
            content[place - 1] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            del content[place : place + draw.randrange(1, 40)]
        elif kind == 3:
            content[place:place] = content[place : place + draw.randrange(1, 200)]
        elif kind == 4:
            content[place:place] = draw.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
        else:
            content[place:place] = draw.randbytes(draw.randrange(1, 12))
    return bytes(content)


def _mutate_value(draw, value):
    """Replace, remove, rename or add a part somewhere inside a value of JSON."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key, kind = draw.choice(sorted(value)), draw.randrange(8)
        if kind == 0:
            return {name: each for name, each in value.items() if name != key}
        if kind == 1:
            return {**value, draw.choice(ODD_TEXTS[:50]): draw.choice(ODD_VALUES)}
        return {**value, key: _mutate_value(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        return [*value[:place], _mutate_value(draw, value[place]), *value[place + 1 :]]
    return draw.choice(ODD_VALUES)


def _write_json(draw, path, value):
    """Write JSON with parts of other types, or with damaged bytes."""
    if draw.random() < 0.6:
        value = _mutate_value(draw, value)
    content = json.dumps(value).encode()
    path.write_bytes(_mutate_bytes(draw, content) if draw.random() < 0.5 else content)


def _json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _write_rows(draw, path, rows):
    if draw.random() < 0.5:
        rows = [_mutate_value(draw, row) if draw.random() < 0.3 else row for row in rows]
    content = _json_lines(rows)
    path.write_bytes(_mutate_bytes(draw, content) if draw.random() < 0.6 else content)


def _read_any(draw, source):
    reader = draw.choice([read_pairs, lambda name: read_documents(name, unique_ids=False), read_xy_pairs])
    return len(list(reader(str(source))))


def fuzz_json(draw, folder):
    path = folder / draw.choice(["rows.jsonl", "rows.json", "rows.ndjson"])
    if path.suffix == ".json":
        _write_json(draw, path, PAIRS)
    else:
        _write_rows(draw, path, PAIRS)
    _read_any(draw, path)


def fuzz_tables(draw, folder):
    path = folder / draw.choice(["rows.csv", "rows.tsv", "rows.txt", "rows.csv.gz"])
    separator = "\t" if path.suffix == ".tsv" else ","
    lines = [["query", "positive"], *([row["query"], f'"{row["positive"]}"'] for row in PAIRS)]
    content = "\n".join(separator.join(line) for line in lines).encode()
    path.write_bytes(_mutate_bytes(draw, content))
    _read_any(draw, path)


_TYPES = [
    pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.int64(), pyarrow.float64(), pyarrow.bool_(),
    pyarrow.timestamp("ms"), pyarrow.timestamp("s", tz="Mars/Base"), pyarrow.date64(), pyarrow.list_(pyarrow.string()),
    pyarrow.decimal128(30, 5), pyarrow.null(), pyarrow.duration("ns"), pyarrow.struct([("a", pyarrow.int8())]),
]  # fmt: skip


def _odd_column(draw, kind):
    if kind == pyarrow.string() and draw.random() < 0.5:
        offsets = pyarrow.array(range(len(PAIRS) + 1), pyarrow.int32()).buffers()[1]
        return pyarrow.Array.from_buffers(kind, len(PAIRS), [None, offsets, pyarrow.py_buffer(draw.randbytes(64))])
    if pyarrow.types.is_temporal(kind):
        return pyarrow.array([10**15] * len(PAIRS), pyarrow.int64()).cast(kind)
    return pyarrow.nulls(len(PAIRS), kind)


def fuzz_parquet(draw, folder):
    path, columns = folder / "rows.parquet", {name: [row[name] for row in PAIRS] for name in ("query", "positive")}
    if draw.random() < 0.7:
        columns[draw.choice(["query", "positive", "other", "_id"])] = _odd_column(draw, draw.choice(_TYPES))
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    if draw.random() < 0.5:
        path.write_bytes(_mutate_bytes(draw, path.read_bytes()))
    _read_any(draw, path)


def fuzz_beir(draw, folder):
    corpus = [{"_id": f"d{row}", "title": "", "text": each["positive"]} for row, each in enumerate(PAIRS)]
    queries = [{"_id": f"q{row}", "text": each["query"]} for row, each in enumerate(PAIRS)]
    judgements = ["query-id\tcorpus-id\tscore", *(f"q{row}\td{row}\t1" for row in range(len(PAIRS)))]
    (folder / "qrels").mkdir()
    chosen = draw.choice(["corpus", "queries", "qrels", "all"])
    for name, rows in (("corpus", corpus), ("queries", queries)):
        path = folder / f"{name}.jsonl"
        _write_rows(draw, path, rows) if chosen in (name, "all") else path.write_bytes(_json_lines(rows))
    content = "\n".join(judgements).encode()
    content = _mutate_bytes(draw, content) if chosen in ("qrels", "all") else content
    (folder / "qrels" / "test.tsv").write_bytes(content)
    dataset = load_beir_folder(folder)
    check_trec_ids(dataset.queries, "query id")
    check_trec_ids(dataset.corpus_ids, "document id")


def fuzz_runs(draw, folder):
    path = folder / "run.trec"
    path.write_bytes(_mutate_bytes(draw, b"q1 Q0 d1 1 0.5 x\nq1 Q0 d2 2 0.25 x\nq2 Q0 d1 1 1e-3 x\n"))
    read_trec_run(path)


FLAGS = {"epochs": 2, "batch_size": 8, "learning_rate": 0.1, "matryoshka_dims": [4, 8], "train_data": ["a", "b"]}


def _parse(arguments):
    from ragcun_hf.cli.train_contrastive import PairDataArguments

    parse_training_arguments(
        PairDataArguments, description="", arguments=arguments, defaults={"output_dir": "out"}
    )  # fmt: skip


def fuzz_yaml(draw, folder):
    path, value = folder / "flags.yaml", FLAGS
    if draw.random() < 0.5:
        value = _mutate_value(draw, FLAGS)
    content = yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace")
    path.write_bytes(_mutate_bytes(draw, content) if draw.random() < 0.7 else content)
    _parse(["--config", str(path)])


def fuzz_flags(draw, folder):
    from ragcun_hf.objective.arguments import IsotropicGaussianTrainingArguments

    names = sorted(IsotropicGaussianTrainingArguments.__dataclass_fields__)
    words = [f"--{draw.choice(names)}={draw.choice(ODD_TEXTS[:52])}" for _ in range(draw.choice([1, 1, 2]))]
    _parse(["--train_data", "a", *words])


def fuzz_words(draw, folder):
    """Words of a command line in any order, for the commands that start quickly."""
    from ragcun_hf.cli.eval_beir import EvaluationArguments
    from ragcun_hf.cli.feature_cache import CacheArguments
    from ragcun_hf.cli.table import TableArguments

    kind = draw.choice([EvaluationArguments, CacheArguments, TableArguments])
    words = [f"--{name}" for name in kind.__dataclass_fields__] + ODD_TEXTS[:50]
    arguments = [word for word in draw.choices(words, k=4) if word not in ("--help", "-h")]
    parse_arguments([kind], description="", arguments=arguments)


def fuzz_paths(draw, folder):
    names = [draw.choice([*ODD_TEXTS[:51], "a", "file", "loop", "nothing"]) for _ in range(draw.choice([1, 2]))]
    (folder / "file").write_text("", encoding="utf-8")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "nothing").symlink_to("nowhere")
    name = "/".join(names)
    draw.choice([check_writable, lambda name: check_file_name(name, "--run_name"), read_pairs, _model_of])(name)


def _model_of(name):
    load_trained_model(str(name))


RESULTS = {
    "schema_version": SCHEMA_VERSION,
    **{"created": "2026-01-01T00:00:00+00:00", "command": "ragcun eval-beir", "commit": None},
    **{
        "versions": {"torch": "2"},
        "machine": {"cores": 2, "processor": "x", "python": "3"},
        "settings": {"split": "test"},
    },
    "model": {
        **{"name": "m", "path": "m", "similarity": "cosine", "base_model": "b", "use_predictor": False},
        **{"output_dim": 4, "projection_init": "identity", "projection_kind": "mlp", "freeze_base": True},
    },
    "datasets": {
        "mini": {
            **{"split": "test", "num_queries": 2, "num_documents": 5, "num_judgements": 3, "comparisons": {}},
            "systems": {"base": {"ndcg@10": 0.5}, "projection": {"ndcg@10": 0.6}},
        }
    },
    "mean": {"base": {"ndcg@10": 0.5}, "projection": {"ndcg@10": 0.6}},
    "isotropy": {"base": {"iso_score": 0.1}},
}


def fuzz_results(draw, folder):
    path = folder / "results.json"
    _write_json(draw, path, RESULTS)
    results = read_results(path)
    format_results_table(results)
    render_card(results=join_results([results]), training_record=None)


RECORD = {
    "model": {"base_model": "b"}, "seconds": {"features": 1.0, "training": 2.0}, "steps": 3, "blend": 1.0,
    "training_arguments": {"learning_rate": 0.1, "lambda_isotropy": 1.0}, "essential": ["learning_rate"],
    "data": {"train": ["pairs.jsonl"], "num_train_rows": 5}, "log_history": [{"loss": 1.0, "step": 1}],
    "features": {"encoder_dtype": "float32"}, "energy": None, "validation_ndcg@10": {"base": 0.5, "saved": 0.6},
}  # fmt: skip


def fuzz_records(draw, folder):
    from ragcun_hf.evaluation.results import read_record
    from ragcun_hf.publishing.card_plots import draw_learning_curves

    path = folder / "training_record.json"
    _write_json(draw, path, RECORD)
    record = read_record(path)
    results = nothing_measured("m", {"base_model_name": "b"})
    render_card(results=results, training_record=record, plots=draw_learning_curves(record, folder / "README.md"))


def fuzz_published(draw, folder):
    from ragcun_hf.publishing.hub import plan_upload as plan

    manifest = {"results": [], "training_record": None, "comparison": None, "published": None, "repo_id": "a/b"}
    manifest |= {"plots": {}, "dataset_ids": [], "license_id": None, "languages": []}
    _write_json(draw, folder / "card_sources.json", manifest)
    _write_json(draw, folder / "published.json", {"recipes": {"a": {"figures": [], "source": "s", "remark": "r"}}})
    for name in ("config.json", "modeling_isotropic_gaussian.py", "tokenizer_config.json", "README.md"):
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_text("", encoding="utf-8")
    draw.choice([read_manifest, plan, check_code, lambda _: read_published(folder / "published.json", "a")])(folder)


def fuzz_sweep_state(draw, folder):
    record = {"setting": {"learning_rate": 0.1}, "seed": 1, "round_number": 0, "steps": 3, "seconds": 1.0}
    record["figures"] = {"ndcg@10": 0.5}
    spec = {"settings": [{"learning_rate": 0.1}], "seeds": [1]}
    _write_json(draw, folder / "sweep.json", spec)
    _write_rows(draw, folder / "trials.jsonl", [record, {**record, "seed": 2}])
    records = SweepRecords(folder, spec)
    records.summaries("ndcg@10")
    records.total_seconds()
    assert TrialRecord(**record).key is not None


def fuzz_checkpoints(draw, folder):
    class Arguments:
        output_dir = str(folder)
        resume_from_checkpoint = "last"

    checkpoint = folder / draw.choice(["checkpoint-1", "checkpoint-x", "checkpoint-" + "9" * 30, "checkpoint-²"])
    checkpoint.mkdir()
    names = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"]
    for name in draw.sample(names, k=draw.choice([4, 5, 5, 5])):
        (checkpoint / name).write_bytes(b"")
    from ragcun_hf.files import write_checksums

    _write_json(draw, checkpoint / "trainer_state.json", {"global_step": 1, "stateful_callbacks": {}})
    if draw.random() < 0.7:
        write_checksums(checkpoint)
    if draw.random() < 0.3:
        path = checkpoint / "checksums.json"
        path.write_bytes(_mutate_bytes(draw, path.read_bytes() if path.exists() else b"{}"))
    open_checkpoint(folder, draw.choice(["last", str(checkpoint), "x"]))
    check_output_folder(Arguments, overwrite=False)


def fuzz_caches(draw, folder):
    (folder / ("a" * 24)).mkdir()
    _write_json(draw, folder / ("a" * 24) / "key.json", {"name": "x", "max_length": 3, "pooling": "mean"})
    list_cached_encoders(folder)


@pytest.fixture(scope="module")
def model_files(tiny_encoder_folder, tmp_path_factory):
    from ragcun_hf import IsotropicGaussianModel

    folder = tmp_path_factory.mktemp("fuzzed") / "model"
    IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder)).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".py"}


def _fuzz_models(files):
    def fuzz_models(draw, folder):
        for name, content in files.items():
            (folder / name).write_bytes(content)
        name = draw.choice(sorted(files))
        if name.endswith(".json"):
            _write_json(draw, folder / name, json.loads(files[name]))
        else:
            (folder / name).write_bytes(_mutate_bytes(draw, files[name]))
        load_trained_model(str(folder)).encode(["bread"])

    return fuzz_models


READERS = {name.removeprefix("fuzz_"): value for name, value in list(globals().items()) if name.startswith("fuzz_")}


class _HangError(Exception):
    """An input took too long."""


def _raise_hang(*_):
    raise _HangError


def _outcome(reader, number, name, folder):
    """Read one generated input; return `read` or `refused`, or what is wrong with how it ended."""
    draw = random.Random(f"{SEED} {name} {number}")
    signal.alarm(_SECONDS)
    try:
        reader(draw, folder)
    except UserError as error:
        text = str(error)
        return "refused" if 0 < len(text) < 2_000 else f"a message of {len(text)} characters"
    except SystemExit as error:
        return f"exit {error.code}"
    except BaseException as error:  # noqa: BLE001 (whatever it is, it is wrong)
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    return "read"


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs an alarm")
def test_every_generated_input_is_read_or_refused_in_one_line(model_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "SIGALRM", signal.SIGALRM)
    signal.signal(signal.SIGALRM, _raise_hang)
    monkeypatch.chdir(tmp_path)
    readers, counts, wrong = {**READERS, "models": _fuzz_models(model_files)}, Counter(), []
    names, started = sorted(readers), time.monotonic()
    for number in range(NUM_INPUTS):
        name = names[number % len(names)]
        folder = Path(tmp_path, str(number))
        folder.mkdir()
        outcome = _outcome(readers[name], number, name, folder)
        is_right = outcome in ("read", "refused")
        counts[name, outcome if is_right else "wrong"] += 1
        if not is_right:
            wrong.append(f"{name} {number}: {outcome}")
    table = [
        f"{name:14}" + "".join(f"{counts[name, each]:>9}" for each in ("read", "refused", "wrong")) for name in names
    ]
    with capsys.disabled():
        print(f"\n{'reader':14}{'read':>9}{'refused':>9}{'wrong':>9}", *table, sep="\n")  # noqa: T201
        print(f"{NUM_INPUTS} inputs, {len(wrong)} wrong, {time.monotonic() - started:.0f} s, seed {SEED}")  # noqa: T201
    assert not wrong, "\n".join(wrong[:40])
