"""Files and folders are replaced as a whole: old or new after a kill at any system call, never a mixture."""

import subprocess
import sys
from pathlib import Path

import pytest

from ragcun_hf import files
from ragcun_hf.errors import UserError
from ragcun_hf.files import disk_errors_explained, replaced_file, replaced_folder, write_whole

OLD = {"config.json": "old", "model-1-of-2.safetensors": "old", "tokenizer.json": "old", "checkpoint-7/state": "kept"}
NEW = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new"}
AFTER = {**NEW, "checkpoint-7/state": "kept"}

# Ends itself, as a kill would, at the N-th call of the system that changes or waits for files.
KILLED = """
import os, sys
from pathlib import Path
from ragcun_hf import files
folder, fatal, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if how == "one by one":
    files.ctypes.CDLL = lambda name: None  # a system without the exchange
count = 0
def counted(call):
    def wrapped(*args, **kwargs):
        global count
        count += 1
        if count == fatal:
            os._exit(9)
        return call(*args, **kwargs)
    return wrapped
with files.replaced_folder(folder, obsolete=files.WEIGHT_FILES) as new:
    for name in ("fsync", "rename", "link", "unlink", "mkdir", "open", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    for name in %r:
        (new / name).write_text("new", encoding="utf-8")
print(count)
""" % list(NEW)  # noqa: UP031 (braces of the script)


def _fill(folder, content):
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


def _replace(folder, fatal, how="exchanged"):
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(fatal), how], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exchanged", "one by one"])
def test_a_kill_at_any_call_leaves_the_old_folder_or_the_new_one_or_one_that_does_not_load(tmp_path, how):
    _fill(tmp_path / "whole", OLD)
    done = _replace(tmp_path / "whole", 0, how)
    assert _content(tmp_path / "whole") == AFTER, done.stderr
    num_calls, found = int(done.stdout), set()
    assert num_calls > 10
    for fatal in range(1, num_calls + 1):
        folder = tmp_path / str(fatal) / "model"
        _fill(folder, OLD)
        assert _replace(folder, fatal, how).returncode == 9
        content = _content(folder)
        if how == "exchanged":
            assert content in (OLD, AFTER)
        else:
            assert content in (OLD, AFTER) or "config.json" not in content
        found.add(content.get("config.json"))
        assert _replace(folder, 0, how).returncode == 0  # and the next run puts it right
        assert _content(folder) == AFTER
    assert {"old", "new"} <= found


def test_an_error_while_writing_leaves_everything_as_it_was(tmp_path):
    _fill(tmp_path / "model", OLD)
    write_whole(tmp_path / "text", "old")
    with pytest.raises(OSError, match="full"), replaced_folder(tmp_path / "model") as new:
        (new / "config.json").write_text("new", encoding="utf-8")
        raise OSError("the disk is full")
    with pytest.raises(OSError, match="full"), replaced_file(tmp_path / "text") as new:
        new.write_text("new", encoding="utf-8")
        raise OSError("the disk is full")
    assert _content(tmp_path / "model") == OLD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text"]
    assert (tmp_path / "text").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("place", ["link", "working folder", "new", "parent that cannot be written"])
def test_a_folder_is_replaced_wherever_it_lies(tmp_path, monkeypatch, place):
    folder = tmp_path / "model"
    if place != "new":
        _fill(folder, OLD)
    if place == "link":
        (tmp_path / "named").symlink_to(folder)
    elif place == "working folder":
        monkeypatch.chdir(folder)
    elif place == "parent that cannot be written":  # for root every folder can be
        monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != tmp_path)
    target = {"link": tmp_path / "named", "working folder": Path()}.get(place, folder)
    with replaced_folder(target, obsolete=files.WEIGHT_FILES) as new:
        _fill(new, NEW)
    assert _content(folder) == (NEW if place == "new" else AFTER)
    assert not list(tmp_path.rglob(".*.tmp"))
    if place == "working folder":
        assert sorted(path.name for path in Path().iterdir()) == sorted({name.split("/")[0] for name in AFTER})


def test_all_that_is_old_can_be_named_obsolete(tmp_path):
    _fill(tmp_path / "model", OLD)
    with replaced_folder(tmp_path / "model", obsolete=("*",)) as new:
        _fill(new, NEW)
    assert _content(tmp_path / "model") == NEW


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_a_folder_in_the_place_of_a_file_and_the_reverse_are_one_line(tmp_path, taken):
    path = tmp_path / "taken"
    path.mkdir() if taken == "folder" else path.write_text("a file", encoding="utf-8")
    target = path if taken == "folder" else path / "text"
    with pytest.raises(UserError, match="choose another --output_dir"), disk_errors_explained(tmp_path):
        with replaced_file(target) as new:
            new.write_text("new", encoding="utf-8")


def test_a_file_that_loading_needs_stays_if_no_new_one_replaces_it(tmp_path, monkeypatch):
    _fill(tmp_path / "model", OLD)
    monkeypatch.chdir(tmp_path / "model")  # the working folder is not swapped
    with replaced_folder(Path()) as new:
        _fill(new, {"toy.trec": "a run of an evaluation"})
    assert _content(tmp_path / "model") == {**OLD, "toy.trec": "a run of an evaluation"}
