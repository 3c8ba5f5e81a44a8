"""The built distributions are complete, and the wheel works where there is no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("ragcun_hf", "tests", "training", "model_cards")
FILES = ("CITATION.cff", "CONTRIBUTING.md", "EXPERIMENTS.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
         "constraints.txt", "pyproject.toml", "setup.cfg")  # fmt: skip
# setuptools replaces sys.argv.
BUILD = "from setuptools import build_meta as b; import sys; to = sys.argv[1]; b.build_wheel(to); b.build_sdist(to)"


def _listed(folder):
    """List the files of a checkout's folder, without what running them leaves behind."""
    files = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in files if not any(part.startswith((".", "__pycache__")) for part in path.parts)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build wheel and source distribution from a copy, without a network."""
    source, target = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("built")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    done = subprocess.run([sys.executable, "-c", BUILD, str(target)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert "Deprecat" not in done.stderr, done.stderr[-2_000:]
    return target


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Install the wheel alone into an environment that borrows the dependencies, but not the package, from ours."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    ours = [path for path in map(Path, sys.path) if path.name == "site-packages"]
    # Only .pth files of the environment's own folder are read, so that an editable install of ours stays out.
    (site / "dependencies.pth").write_text("\n".join(map(str, ours)), encoding="utf-8")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, "--ignore-installed", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]
    return folder


@pytest.fixture
def ragcun(installed, tmp_path, monkeypatch):
    """Run `ragcun` in an empty folder, with nothing of the checkout on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{installed / 'bin'}{os.pathsep}{environment['PATH']}"

    def run(line, *, code=0):
        done = subprocess.run(
            ["bash", "-e", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr[-3_000:]
        return done

    return run


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "ragcun = " in wheel.read(entry_points).decode()
        assert any("LICENSE" in name for name in wheel.namelist())
    assert names == _listed("ragcun_hf")


def test_the_source_distribution_holds_what_make_test_needs(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = set().union(*map(_listed, SOURCES), FILES)
    assert wanted <= names, wanted - names
    assert not [name for name in names if "__pycache__" in name]


def test_the_metadata_name_license_pythons_and_no_address(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        head = wheel.read(name).decode().partition("\n\n")[0]
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.11", "Classifier: Typing :: Typed"):
        assert f"\n{line}" in head
    assert "\nAuthor: " in head
    assert "://" not in head


def test_the_installed_command_answers_without_the_checkout(ragcun, installed):
    assert re.fullmatch(r"ragcun \d+\.\d+\.\d+\n", ragcun("ragcun --version").stdout)
    assert "train-contrastive" in ragcun("ragcun").stdout
    where = ragcun("python -c 'import ragcun_hf; print(ragcun_hf.__file__)'").stdout
    assert Path(where).is_relative_to(installed)
    launch_file = Path(ragcun("ragcun accelerate-config one_machine_gpus").stdout.strip())
    assert launch_file.is_relative_to(installed)
    assert launch_file.is_file()
    assert "--blend" in ragcun("ragcun train-contrastive --help").stdout
    failed = ragcun("ragcun train-contrastive --blendd 1", code=2)
    assert failed.stderr.startswith("ragcun train-contrastive: expected flags of this command, got --blendd 1")


def test_each_next_line_is_a_command_that_runs_from_training_to_the_upload(ragcun, tmp_path, tiny_encoder_folder):
    texts = ["bread is food", "fish sleep in the water", "the sun is red", "piano music is slow"] * 2
    folder = tmp_path / "data" / "mine"
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (
        (
            "corpus",
            [{"_id": f"d{row}", "title": "", "text": f"{text} a" * (row + 1)} for row, text in enumerate(texts)],
        ),
        ("queries", [{"_id": f"q{row}", "text": f"what is {text}"} for row, text in enumerate(texts)]),
    ):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for split in ("train", "test"):
        lines = [f"q{row}\td{row}\t1" for row in range(8)]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines))
    line = f"ragcun train-contrastive --train_data data/mine --base_model {tiny_encoder_folder} --use_predictor"
    starts = []
    for _ in range(3):
        said = ragcun(line + (" --epochs 1 --use_cpu --output_dir out" if "train-" in line else "")).stdout
        line = said.strip().splitlines()[-1].removeprefix("Next: ").replace("organisation/name", "me/out")
        starts.append(" ".join(line.split()[:2]))
    assert starts == ["ragcun eval-beir", "ragcun card", "ragcun push"]
    results = json.loads((tmp_path / "results" / "out.json").read_text(encoding="utf-8"))
    assert results["command"].startswith("ragcun eval-beir --model_path out --use_predictor --datasets mine")
    assert "ragcun eval-beir" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_launcher_starts_two_processes_of_the_installed_command(ragcun, tmp_path, tiny_encoder_folder, tiny_pairs):
    (tmp_path / "pairs.json").write_text(json.dumps(tiny_pairs), encoding="utf-8")
    launch = 'python -m accelerate.commands.launch --config_file "$(ragcun accelerate-config two_cpu_processes)"'
    flags = f"--train_data pairs.json --base_model {tiny_encoder_folder} --batch_size 4 --epochs 1 --use_cpu"
    said = ragcun(f"{launch} --main_process_port 0 -m ragcun_hf.cli train-contrastive {flags} --output_dir out").stdout
    assert said.count("Saved the model") == 1
    assert said.strip().splitlines()[-1].startswith("Next: python -m ragcun_hf.cli search --model_path out")
    assert json.loads((tmp_path / "out" / "training_record.json").read_text())["steps"] == 1
