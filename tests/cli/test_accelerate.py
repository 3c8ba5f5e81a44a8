"""Several processes on one machine, with `accelerate launch`, do the work of one process with all their rows."""

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.features.feature_cache import list_cached_encoders

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TRAINING, LAUNCH_FILES = ROOT / "training", ROOT / "ragcun_hf" / "cli" / "accelerate"

# Plain gradient descent, because Adam enlarges rounding errors of gradients near 0. Every step uses all rows, so that
# it does not matter which process has which.
TRAIN = "--use_cpu --disable_tqdm true --logging_steps 1 --epochs 3 --dropout 0 --use_predictor --bidirectional"
DESCENT = "--optim sgd --learning_rate 0.01 --warmup_steps 0 --encoder_dtype float32"

# Runs train_contrastive.py, but one process fails in the second step.
FAILING = """
import os, sys
sys.path.insert(0, {training!r})
from ragcun_hf.cli import train_contrastive
from ragcun_hf.command_line import run_script
from ragcun_hf import IsotropicGaussianTrainer
step = IsotropicGaussianTrainer.training_step
def fail(self, *args, **kwargs):
    if self.state.global_step == 1 and os.environ["RANK"] == "1":
        raise RuntimeError("this process fails")
    return step(self, *args, **kwargs)
IsotropicGaussianTrainer.training_step = fail
run_script(train_contrastive.main, shares_work=True)
"""


# Runs train_contrastive.py sharded on CPUs. For that, accelerate takes them for GPUs when it decides how to shard;
# the rest is its own work. The script records what was sharded, how, and the types of embeddings and losses.
SHARDING = """
import json, os, sys
sys.path.insert(0, {training!r})
from ragcun_hf.cli import train_contrastive
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from ragcun_hf.command_line import run_script
from ragcun_hf.objective.terms import Objective
from ragcun_hf import IsotropicGaussianTrainer
decide, step, measure = AcceleratorState.__init__, IsotropicGaussianTrainer.training_step, Objective.terms
seen = {{"dtypes": []}}
def decide_as_for_gpus(self, *args, **kwargs):
    if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    decide(self, *args, **kwargs)
def note_units(self, model, *args, **kwargs):
    policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy
    seen["units"] = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    trained = [each for group in self.optimizer.param_groups for each in group["params"]]
    seen["own_share"] = sum(each.to_local().numel() for each in trained)  # what is not sharded has no such method
    seen["reduced_in"] = str(policy and policy.reduce_dtype)
    seen["rates"] = [[group["lr"], len(group["params"])] for group in self.optimizer.param_groups]
    return step(self, model, *args, **kwargs)
def note_dtypes(self, outputs, *args, **kwargs):
    terms = measure(self, outputs, *args, **kwargs)
    seen["dtypes"] = sorted({{*seen["dtypes"], *(str(each.dtype) for each in terms.values())}})
    seen["embeddings"] = str(outputs.embeddings.dtype)
    return terms
AcceleratorState.__init__ = decide_as_for_gpus
IsotropicGaussianTrainer.training_step, Objective.terms = note_units, note_dtypes
def main():
    train_contrastive.main()
    with open(f"seen_{{os.environ['RANK']}}.json", "w") as file:
        json.dump(seen, file)
run_script(main, shares_work=True)
"""

# Checks a sharded model in which only the second process has a weight that is not finite.
NOT_FINITE = """
import os, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from ragcun_hf.command_line import run_script
from ragcun_hf.errors import UserError
from ragcun_hf.trainer.record import check_finite
def main():
    dist.init_process_group("gloo")
    model = torch.nn.Linear(3, 4)
    model.weight.data[3, 0] = float("nan")
    fully_shard(model)
    try:
        check_finite(model)
    except UserError as error:
        open(f"said_{os.environ['RANK']}", "w").write(str(error))
run_script(main, shares_work=True)
"""

# Encodes texts by the back end that both processes choose, once where it works in both, then where it fails in one.
CHOOSING = """
import os, sys
import torch.distributed as dist
from ragcun_hf import IsotropicGaussianModel, UserError
from ragcun_hf.command_line import run_script
from ragcun_hf.features import encoder_backends, feature_store
def fail(*args):
    raise UserError("no graph here")
def break_down(*args):
    raise ImportError("no library here")
def main():
    dist.init_process_group("gloo")
    encoder, *texts = sys.argv[1:]
    feature_store.WORTH_A_GRAPH = 100
    model, make_graph = IsotropicGaussianModel.from_encoder(encoder), encoder_backends._openvino_function
    for case, failing in (("works", make_graph), ("fails", fail), ("breaks", break_down)):
        options = {"backend": "auto", "dtype": "bfloat16", "show_progress": False, "is_shared": True}
        store = feature_store.FeatureStore(model, cache_folder=case, **options)
        if dist.get_rank() == 0:
            store.read(texts[:9])  # alone, as processes may
        encoder_backends._openvino_function = failing if dist.get_rank() == 1 else make_graph
        store.encode(texts)
        print(case, dist.get_rank(), store.backend, len(store.read(texts).vectors))
run_script(main, shares_work=True)
"""


# Waits for jobs and runs each script in forks of itself, as if `accelerate launch` had just started them: a real start
# takes seconds, most of them for imports.
WAITING = """
import contextlib, gc, json, os, runpy, sys, traceback
from pathlib import Path
import torch.distributed.fsdp
import transformers
import ragcun_hf.cli.eval_beir
from ragcun_hf import IsotropicGaussianTrainer, RetrievalEvaluator
gc.freeze()  # no collection walks through all imported modules

def run(job, rank):
    if job["processes"] > 1:
        os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(job["cwd"])
    sys.argv, code = job["command"], 0
    output = Path(job["output"])
    with open(output / f"stdout_{rank}", "w") as out, open(output / f"stderr_{rank}", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
    return code

for line in sys.stdin:
    job, ranks = json.loads(line), {}
    for rank in range(job["processes"]):
        child = os.fork()
        if child == 0:
            os._exit(run(job, rank))
        ranks[child] = rank
    while ranks:
        child, status = os.wait()
        file = Path(job["output"]) / f"code_{ranks.pop(child)}"
        file.with_suffix(".tmp").write_text(str(os.waitstatus_to_exitcode(status)))
        file.with_suffix(".tmp").rename(file)
"""
LONGEST_WAIT = 1_800  # seconds; processes that wait for each other forever are a failure


def _free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _launch_command(launch, processes):
    config, port = LAUNCH_FILES / f"{launch[0]}.yaml", _free_port()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *launch[1:]]
    return [*command, "--num_processes", str(processes), "--main_process_port", str(port)]


def _environment():
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _run(processes, script, *flags, cwd, launch=("two_cpu_processes",)):
    return subprocess.run(
        [*_launch_command(launch, processes), str(script), *(str(flag) for flag in flags)],
        capture_output=True,
        text=True,
        timeout=LONGEST_WAIT,
        cwd=cwd,
        env=_environment(),
    )


def _set_by_launch(file, *flags):
    """Return the variables that `accelerate launch` sets for one of our files."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    command = ["--config_file", str(LAUNCH_FILES / f"{file}.yaml"), *flags, "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    found = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


class WaitingProcess:
    """One process, of which forks run one script after another."""

    def __init__(self, folder):
        script, self._outputs = folder / "waiting.py", folder / "outputs"
        script.write_text(WAITING, encoding="utf-8")
        # If this process dies, the pipe closes, which ends the other.
        pipe = {"stdin": subprocess.PIPE, "text": True, "start_new_session": True}
        self._process = subprocess.Popen([sys.executable, str(script)], cwd=folder, env=_environment(), **pipe)

    def run(self, processes, script, *flags, cwd, launch=("two_cpu_processes",)):
        """Run a script in so many processes; return the exit code and output as `subprocess.run` does."""
        output = self._outputs / str(len(list(self._outputs.glob("*"))))
        output.mkdir(parents=True)
        job = {"command": [str(script), *(str(flag) for flag in flags)], "cwd": str(cwd), "output": str(output)}
        sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        job |= {"processes": processes, "environment": {**_set_by_launch(*launch), **sizes, **place}}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        ends = time.monotonic() + LONGEST_WAIT
        while len(list(output.glob("code_?"))) < processes:
            assert self._process.poll() is None, "the process has ended"
            assert time.monotonic() < ends, "the processes wait for each other"
            time.sleep(0.02)
        code, stdout, stderr = (
            [(output / f"{name}_{rank}").read_text(encoding="utf-8") for rank in range(processes)]
            for name in ("code", "stdout", "stderr")
        )
        return subprocess.CompletedProcess(
            job["command"], max(map(abs, map(int, code))), *map("".join, (stdout, stderr))
        )

    def stop(self):
        """End it, and what a failed test has left running."""
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def waiting(tmp_path_factory):
    process = WaitingProcess(tmp_path_factory.mktemp("waiting"))
    yield process
    process.stop()


@pytest.fixture
def folder(tmp_path, tiny_pairs):
    (tmp_path / "pairs.json").write_text(json.dumps(tiny_pairs), encoding="utf-8")
    (tmp_path / "texts.json").write_text(json.dumps([pair["positive"] for pair in tiny_pairs]), encoding="utf-8")
    return tmp_path


@pytest.fixture
def train(folder, waiting, monkeypatch):
    """Train with all eight rows in each step, in two processes or in this one; return the output and the folder."""
    monkeypatch.chdir(folder)

    def start(encoder, script, processes, *flags):
        output = folder / f"of_{processes}"
        flags = [str(flag) for flag in (*_common(encoder, output, processes), *flags)]
        if processes == 1:
            importlib.import_module(f"ragcun_hf.cli.{script}").main(flags)
            return None, output
        done = waiting.run(2, TRAINING / f"{script}.py", *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done, output

    return start


def _common(encoder, output, processes):
    size = ["--batch_size", 8 // processes]
    return [*TRAIN.split(), *DESCENT.split(), "--base_model", encoder, *size, "--output_dir", output]


def _train_sharded(run, folder, encoder, *flags, precision="no", output="sharded"):
    """Train contrastively on two processes with FSDP2; return the model's folder and the notes of each process."""
    script = folder / "sharding.py"
    script.write_text(SHARDING.format(training=str(TRAINING)), encoding="utf-8")
    flags = [*_common(encoder, folder / output, 2), "--no_freeze_base", *flags]
    launch = ("fsdp2_trainable_encoder", "--mixed_precision", precision)
    done = run(2, script, *flags, cwd=folder, launch=launch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved the model") == 1
    return folder / output, [json.loads((folder / f"seen_{rank}.json").read_text()) for rank in range(2)]


def _without_dropout(encoder, folder):
    copy = shutil.copytree(encoder, folder / "without_dropout")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def _write_many_pairs(folder, tiny_pairs):
    texts = [pair["positive"] for pair in tiny_pairs]
    pairs = [{"query": query, "positive": text} for query, text in itertools.product([*texts[:4]], texts)]
    (folder / "many.json").write_text(json.dumps(pairs), encoding="utf-8")


def _weights(output):
    from ragcun_hf.model.base_models import load_trained_model

    return load_trained_model(str(output)).state_dict()


def _check_alike(one, two, encoder):
    from ragcun_hf import IsotropicGaussianModel

    start = IsotropicGaussianModel.from_encoder(str(encoder), use_predictor=True).state_dict()
    first, second = _weights(one), _weights(two)
    assert float((first["projection.linear.weight"] - start["projection.linear.weight"]).abs().max()) > 1e-3
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def _record(output):
    return json.loads((output / "training_record.json").read_text(encoding="utf-8"))


def test_two_processes_train_the_weights_of_one_with_all_their_rows(folder, train, tiny_encoder_folder):
    recipe = {"train_data": ["pairs.json"], "val_data": "pairs.json"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    flags = ["--config", "recipe.yaml"]
    done, two = train(tiny_encoder_folder, "train_contrastive", 2, *flags)
    _, one = train(tiny_encoder_folder, "train_contrastive", 1, *flags)
    _check_alike(one, two, tiny_encoder_folder)
    # One model, announced once.
    assert done.stdout.count("Saved the model") == 1
    assert len(re.findall(r"^Next: .*eval.beir.* --pairs .*held_out.jsonl$", done.stdout, re.M)) == 1
    assert _record(two)["steps"] == _record(one)["steps"] == 3
    assert not list(two.parent.glob(".*.tmp"))
    # Logged figures are also of all rows.
    names = ["loss", "loss/contrastive", "loss/isotropy", "loss/predictive", "sigreg"]
    names += ["eval_loss", "eval_loss/contrastive", "eval_loss/isotropy", "eval_loss/predictive", "eval_ndcg@10"]
    for name in names:
        logged = [[entry[name] for entry in _record(output)["log_history"] if name in entry] for output in (one, two)]
        assert len(logged[0]) == (4 if name.startswith("eval") else 3)  # the start is evaluated, too
        # A validation batch of one process is as large as the two batches of two: other candidates, another loss.
        if not name.startswith("eval_loss"):
            assert logged[1] == pytest.approx(logged[0], rel=1e-3), name


def test_two_processes_train_the_encoder_with_several_batches_per_step_as_one_does(
    folder, train, tiny_pairs, tiny_encoder_folder
):
    _write_many_pairs(folder, tiny_pairs)
    encoder = _without_dropout(tiny_encoder_folder, folder)
    # Tokens, not features, and four batches in each of eight steps.
    flags = ["--train_data", "many.json", "--no_freeze_base", "--gradient_accumulation_steps", "4", "--epochs", "8"]
    flags += ["--encoder_learning_rate", "0.01"]
    _, two = train(encoder, "train_contrastive", 2, *flags)
    _, one = train(encoder, "train_contrastive", 1, *flags)
    _check_alike(one, two, encoder)
    assert _record(two)["steps"] == _record(one)["steps"] == 8
    name = "encoder.encoder.layer.0.attention.self.query.weight"
    start = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder)).state_dict()[name]
    assert float((_weights(one)[name] - start).abs().max()) > 1e-3


def test_two_processes_use_each_query_once_as_one_does(folder, train, tiny_pairs, tiny_encoder_folder):
    more = [{**tiny_pairs[0], "positive": pair["positive"]} for pair in tiny_pairs[1:]]
    (folder / "many.json").write_text(json.dumps([*tiny_pairs, *more]), encoding="utf-8")
    flags = ["--train_data", "many.json", "--balance_queries"]
    _, two = train(tiny_encoder_folder, "train_contrastive", 2, *flags)
    _, one = train(tiny_encoder_folder, "train_contrastive", 1, *flags)
    _check_alike(one, two, tiny_encoder_folder)
    assert _record(two)["steps"] == _record(one)["steps"] == 3  # of eight queries, not fifteen rows


def test_two_processes_mask_anew_in_each_epoch_as_one_does(folder, train, tiny_encoder_folder):
    recipe = {"documents": "texts.json", "feature_cache": False, "lambda_contrastive": 1.0}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    flags = ["--config", "recipe.yaml"]
    _, two = train(tiny_encoder_folder, "train_xy_masked", 2, *flags)
    _, one = train(tiny_encoder_folder, "train_xy_masked", 1, *flags)
    _check_alike(one, two, tiny_encoder_folder)


def test_a_yaml_file_trains_the_same_in_two_processes(folder, train, tiny_encoder_folder):
    recipe = {"documents": "texts.json", "split_method": "half", "val_data": "pairs.json"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    script, flags = "train_self_supervised", ["--config", "recipe.yaml", "--feature_cache_dir", "features"]
    done, two = train(tiny_encoder_folder, script, 2, *flags, "--disable_tqdm", "false")
    _, one = train(tiny_encoder_folder, script, 1, *flags)
    _check_alike(one, two, tiny_encoder_folder)
    assert done.stdout.count("Features: ") == done.stdout.count("Saved the model") == 1
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if " 3/3 " in line]
    assert len({line.split("3/3")[0] for line in bars}) == 1
    assert [path.name for path in two.glob("*.safetensors")] == ["model.safetensors"]
    figures = [_record(output)["validation_ndcg@10"] for output in (one, two)]
    assert figures[0]
    assert figures[1] == pytest.approx(figures[0], abs=1e-6)


@pytest.mark.parametrize("script", ["sweep", "prepare_data"])
def test_a_command_that_cannot_share_its_work_refuses_several_processes(folder, waiting, script):
    done = waiting.run(2, TRAINING / f"{script}.py", "--output_dir", "out", cwd=folder)
    assert done.returncode != 0
    assert done.stderr.count(f"{script}.py: expected one process, got 2: this command cannot share its work") == 1
    assert not (folder / "out").exists()


def test_two_processes_share_a_stream_and_continue_where_they_stopped(folder, train, tiny_encoder_folder):
    flags = ["--train_data", "pairs.json", "--streaming", "--no_feature_cache", "--max_steps", "3"]
    halved = [*flags, "--batch_size", "2", "--logging_steps", "2"]  # two steps a pass
    _, two = train(
        tiny_encoder_folder, "train_contrastive", 2, *halved, "--save_steps", "1", "--save_total_limit", "9"
    )
    _, one = train(tiny_encoder_folder, "train_contrastive", 1, *flags, "--batch_size", "4")
    _check_alike(one, two, tiny_encoder_folder)
    resume = ["--resume_from_checkpoint", two / "checkpoint-1", "--output_dir", "resumed"]
    train(tiny_encoder_folder, "train_contrastive", 2, *halved, *resume)
    first, second = _weights(two), _weights(folder / "resumed")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert _log(two) == _log(folder / "resumed")  # its first line is due in the middle of two


def _log(output):
    return [
        {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second"))}
        for entry in _record(output)["log_history"]
    ]


def test_a_failure_of_one_process_ends_all_of_them(folder, tiny_encoder_folder):
    (folder / "failing.py").write_text(FAILING.format(training=str(TRAINING)), encoding="utf-8")
    flags = [*TRAIN.split(), "--train_data", "pairs.json", "--base_model", tiny_encoder_folder, "--batch_size", "4"]
    done = _run(2, folder / "failing.py", *flags, "--output_dir", "out", cwd=folder)
    assert done.returncode != 0
    assert "this process fails" in done.stderr
    assert not (folder / "out" / "model.safetensors").exists()


def test_a_bad_input_ends_all_processes_with_its_message(folder, waiting, tiny_encoder_folder):
    flags = ["--use_cpu", "--train_data", "nowhere.json", "--base_model", tiny_encoder_folder]
    done = waiting.run(2, TRAINING / "train_contrastive.py", *flags, cwd=folder)
    assert done.returncode != 0
    assert "train_contrastive.py: expected an existing file or folder" in done.stderr
    assert not (folder / "checkpoints").exists()


def test_two_processes_can_overwrite_an_earlier_run(folder, train, tiny_encoder_folder):
    flags = ["--train_data", "pairs.json", "--save_steps", "1"]
    _, output = train(tiny_encoder_folder, "train_contrastive", 2, *flags)
    _, output = train(tiny_encoder_folder, "train_contrastive", 2, *flags, "--overwrite", "--epochs", "1")
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]


# Runs eval_beir.py with blocks of six documents: of eleven documents, the first of three processes gets none.
EVALUATING = """
import sys
sys.path.insert(0, {training!r})
from ragcun_hf.cli import eval_beir
from ragcun_hf.command_line import run_script
from ragcun_hf.data import beir_folder
from ragcun_hf.evaluation import model_evaluation
from ragcun_hf.features import text_vectors
from ragcun_hf.search import memory_maps
model_evaluation.HEAD_ROWS = 6
text_vectors.TEXTS_AT_ONCE = 3
text_vectors.TEXTS_PER_ROUND = model_evaluation.TEXTS_AT_ONCE = 6  # the corpus in two rounds
memory_maps.LARGEST_IN_MEMORY = beir_folder.LARGEST_IN_MEMORY = 0  # and on the disk
run_script(eval_beir.main, shares_work=True)
"""


def test_several_processes_write_the_same_run_files_as_one(folder, waiting, tiny_encoder_folder):
    torch.manual_seed(3)
    model = IsotropicGaussianModel.from_encoder(
        str(tiny_encoder_folder), use_predictor=True, similarity_fn_name="euclidean"
    )
    with torch.no_grad():
        for parameter in [*model.projection.parameters(), *model.predictor.parameters()]:
            parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "model")
    words = "bread is food and music on the river of stone".split()
    (folder / "beir" / "toy" / "qrels").mkdir(parents=True)
    written_texts = {}
    for name, count, shift in (("corpus", 11, 0), ("queries", 5, 3)):
        texts = [" ".join(words[(row + shift) % 7 : (row + shift) % 7 + 1 + row % 4]) for row in range(count)]
        written_texts[name] = texts
        lines = [json.dumps({"_id": f"{name[0]}{row}", "title": "", "text": text}) for row, text in enumerate(texts)]
        (folder / "beir" / "toy" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    judgements = "\n".join(f"q{row}\tc{2 * row}\t1" for row in range(5))
    (folder / "beir" / "toy" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}")
    pairs = [
        {"query": written_texts["queries"][row % 5], "positive": written_texts["corpus"][row]} for row in range(10)
    ]
    (folder / "known.json").write_text(json.dumps(pairs), encoding="utf-8")
    script = folder / "evaluating.py"
    script.write_text(EVALUATING.format(training=str(TRAINING)), encoding="utf-8")
    recipe = {"model_path": "model", "datasets": ["toy"], "data_dir": "beir", "use_predictor": True}
    recipe["closed_form"] = "known.json"
    (folder / "evaluation.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    flags = ["--config", "evaluation.yaml"]
    written = {}
    for processes in (1, 3):
        output = folder / f"of_{processes}"
        caches = ["--feature_cache_dir", folder / f"features_{processes}", "--encoder_dtype", "float32"]
        done = waiting.run(processes, script, *flags, *caches, "--output_dir", output, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Wrote ") == 1
        assert "15 texts encoded" in done.stdout  # one is there twice
        results = json.loads((output / "model.json").read_text(encoding="utf-8"))
        runs = {path.name: path.read_bytes() for path in sorted((output / "model").glob("*.trec"))}
        gamma = results["settings"]["closed_form_gamma"]
        written[processes] = (runs, results["datasets"], results["isotropy"], gamma)
        assert len(list((folder / f"features_{processes}").rglob("*.features"))) > processes  # each its own shards
    assert len(written[1][0]) == 6
    assert written[1][3] != {"toy": 0.0}
    assert written[3] == written[1]


RECORDS = {"training_record.json", "training_documents.txt", "held_out.jsonl"}


def _logged(output, name):
    return [entry[name] for entry in _record(output)["log_history"] if name in entry]


def test_two_processes_that_shard_the_encoder_train_the_weights_of_one(folder, train, tiny_pairs, tiny_encoder_folder):
    _write_many_pairs(folder, tiny_pairs)
    encoder = _without_dropout(tiny_encoder_folder, folder)
    # Four batches a step, clipped gradients, held-out pairs that choose the checkpoint, a frozen first layer.
    flags = ["--train_data", "many.json", "--gradient_accumulation_steps", "4", "--epochs", "5"]
    flags += ["--freeze_layers", "1", "--val_data", "pairs.json", "--encoder_learning_rate", "0.02"]
    two, seen = _train_sharded(_run, folder, encoder, *flags)
    _, one = train(encoder, "train_contrastive", 1, "--no_freeze_base", *flags)
    _check_alike(one, two, encoder)
    assert _logged(two, "grad_norm") == pytest.approx(_logged(one, "grad_norm"), rel=1e-4)
    assert _logged(two, "eval_ndcg@10") == pytest.approx(_logged(one, "eval_ndcg@10"))
    weights = _saved_weights(two)
    start = IsotropicGaussianModel.from_encoder(str(encoder)).state_dict()
    moved = {name for name, weight in start.items() if float((weights[name] - weight).abs().max()) > 1e-3}
    assert "encoder.encoder.layer.1.attention.self.value.weight" in moved
    fixed = ("encoder.embeddings", "encoder.encoder.layer.0")
    assert not any(name.startswith(fixed) for name in moved)
    # The files are whole and name the model's own class, and the folders hold the same files.
    of_two, of_one = ({path.name for path in output.iterdir() if path.is_file()} for output in (two, one))
    assert of_two == of_one
    assert all(of_one - {path.name for path in each.iterdir()} == RECORDS for each in two.glob("checkpoint-*"))
    assert (two / "config.json").read_text() == (one / "config.json").read_text()
    # The model was sharded, not only copied to both.
    units = ["", "encoder.embeddings.word_embeddings", "encoder.encoder.layer.0", "encoder.encoder.layer.1"]
    assert all(each["units"] == units for each in seen)
    trained = sum(weight.numel() for name, weight in weights.items() if not name.startswith(fixed))
    assert sum(each["own_share"] for each in seen) == trained


def test_two_processes_choose_the_same_back_end_even_if_it_fails_in_one(folder, waiting, tiny_encoder_folder):
    pytest.importorskip("openvino")
    script = folder / "choosing.py"
    script.write_text(CHOOSING, encoding="utf-8")
    words = "bread food music river stone sun moon star tree fish".split()
    done = waiting.run(2, script, tiny_encoder_folder, *(f"what is {word}" for word in words), cwd=folder)
    assert done.returncode == 0, done.stderr
    chosen = {
        "works 1 openvino 10",
        "fails 1 torch 10",
        "breaks 1 torch 10",
    }  # the first process has read some before, alone
    assert chosen < set(done.stdout.splitlines()), done.stdout
    listed = {case: list_cached_encoders(folder / case) for case in ("works", "fails", "breaks")}
    kept = {case: [entry.parts["backend"] for entry in listed[case] if entry.num_texts == 10] for case in listed}
    assert kept == {"works": ["openvino"], "fails": ["torch"], "breaks": ["torch"]}


def test_all_processes_refuse_a_weight_that_is_not_finite_in_one_of_them(folder, waiting):
    (folder / "not_finite.py").write_text(NOT_FINITE, encoding="utf-8")
    done = waiting.run(2, folder / "not_finite.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert all("infinity in weight" in (folder / f"said_{rank}").read_text() for rank in range(2))


def test_a_sharded_run_resumes_to_the_last_digit_and_keeps_the_rate_of_the_encoder(folder, waiting, tiny_mpnet_folder):
    # MPNet's layers are sharded although transformers does not name their class.
    flags = ["--train_data", "pairs.json", "--epochs", "2", "--save_strategy", "epoch", "--optim", "adamw_torch"]
    flags += ["--lr_scheduler_type", "constant", "--learning_rate", "0.003", "--encoder_learning_rate", "0.0001"]
    whole, seen = _train_sharded(waiting.run, folder, tiny_mpnet_folder, *flags)
    for path in whole.iterdir():
        if path.is_file():
            path.rename(folder / path.name)
    shutil.rmtree(whole / "checkpoint-2")
    flags += ["--resume_from_checkpoint", "last"]
    resumed, _ = _train_sharded(waiting.run, folder, tiny_mpnet_folder, *flags)
    assert _record(resumed)["steps"] == 2
    first, again = _saved_weights(folder), _saved_weights(resumed)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    model = IsotropicGaussianModel.from_encoder(str(tiny_mpnet_folder), use_predictor=True, freeze_base=False)
    of_encoder = len(list(model.encoder.parameters()))
    rates = {rate: sum(count for other, count in seen[0]["rates"] if other == rate) for rate, _ in seen[0]["rates"]}
    assert rates == {0.003: len(list(model.parameters())) - of_encoder, 0.0001: of_encoder}
    assert {"encoder.encoder.layer.0", "encoder.encoder.layer.1"} < set(seen[0]["units"])


def _saved_weights(output):
    from safetensors.torch import load_file

    return load_file(output / "model.safetensors")


def test_a_sharded_run_in_bfloat16_keeps_weights_sums_and_losses_in_float32(
    folder, train, waiting, tiny_encoder_folder
):
    encoder = _without_dropout(tiny_encoder_folder, folder)
    flags = ["--train_data", "pairs.json", "--epochs", "5", "--encoder_learning_rate", "0.01"]
    two, seen = _train_sharded(waiting.run, folder, encoder, *flags, precision="bf16")
    _, one = train(encoder, "train_contrastive", 1, "--no_freeze_base", *flags)
    assert {weight.dtype for weight in _saved_weights(two).values()} == {torch.float32}
    for each in seen:
        assert (each["embeddings"], each["dtypes"]) == ("torch.bfloat16", ["torch.float32"])
        assert each["reduced_in"] == "torch.float32"
    assert _logged(two, "loss") == pytest.approx(_logged(one, "loss"), rel=0.04)
    assert _logged(two, "loss")[-1] < 0.9 * _logged(two, "loss")[0]


FILES = sorted(LAUNCH_FILES.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_shipped_files_and_they_say_how_to_use_them(path, tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    said = path.read_text(encoding="utf-8")
    assert f'accelerate launch --config_file "$(ragcun accelerate-config {path.stem})"' in said
    assert "-m ragcun_hf.cli train-contrastive" in said
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert config.fsdp_config.keys() <= known.keys()  # which accelerate does not check
    (tmp_path / "wrong.yaml").write_text(path.read_text(encoding="utf-8") + "mixed_precison: bf16\n", encoding="utf-8")
    with pytest.raises(ValueError, match="mixed_precison"):
        load_config_from_file(str(tmp_path / "wrong.yaml"))


def test_the_file_for_a_trainable_encoder_asks_for_fsdp2_in_bfloat16(monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin

    environment = _set_by_launch("fsdp2_trainable_encoder")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for name in (each for each in environment if each.startswith("FSDP_")):
        monkeypatch.setenv(name, environment[name])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading
