"""Files and folders that are replaced whole or not at all, and what tells one file of weights from another."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

RECORD_FILE = "training_record.json"
"""Data sources and counts, arguments, seconds, steps, and the log of a training run."""

DOCUMENTS_FILE = "training_documents.txt"
"""One hexadecimal digest per distinct training document."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
"""Patterns of the names under which a model folder has its weights."""

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextmanager
def replaced_file(path: Path, *, is_synced: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside a file; what is written there replaces the file at once, or not at all.

    Args:
        path: The file, in a folder that is there.
        is_synced: Wait until the disk has it, so that a power cut leaves the old or the new file. Not worth the wait
            for what can be made again.

    Raises:
        OSError: If the disk refuses; nothing half-written stays.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if is_synced:
            _sync(temporary)
        temporary.replace(path)
        if is_synced:
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text, whose lines end in a line feed on every system; its folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replaced_folder(folder: Path, *, obsolete: Sequence[str] = (), last: str = "config.json") -> Iterator[Path]:
    """Yield a new folder; what is written into it takes the place of the old files as a whole, or not at all.

    On Linux the two folders change places in one step, so that a kill or a power cut at any moment leaves the old
    files or the new ones. Where that cannot be (another system, a mount point, the folder one stands in, a file system
    without links), files are moved one by one, the old `last` first and the new one in the end: what a kill leaves in
    between does not load, rather than load as a mixture.

    Args:
        folder: Need not exist yet. What lies there under other names stays, unless it is obsolete.
        obsolete: Patterns of names that go although the new folder does not have them.
        last: The file without which nothing loads from the folder.

    Raises:
        OSError: If the disk refuses; the old folder stays as it was.
    """
    target = folder.resolve()  # the folder that a link names is what is replaced
    made = [path for path in target.parents if not path.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    is_alone = os.access(target.parent, os.W_OK) and not os.path.ismount(target)
    staging = (target.parent if is_alone else target) / f".{uuid.uuid4().hex}.tmp"
    staging.mkdir()
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        if not target.exists():
            staging.rename(target)
        elif not (is_alone and target != Path.cwd() and _exchange(staging, target, obsolete)):
            _move_one_by_one(staging, target, obsolete, last)
        _sync(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()


def _exchange(new: Path, old: Path, obsolete: Sequence[str]) -> bool:
    """Let two folders change places in one step, what is kept linked into the new one before; False if that fails."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    linked = []
    try:
        for path in _others(old, new, obsolete):
            linked.append(new / path.name)
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, linked[-1], symlinks=True, copy_function=os.link)
            else:
                os.link(path, linked[-1], follow_symlinks=False)
        _sync(new)
        is_done = rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0
    except (OSError, shutil.Error):
        is_done = False
    for path in () if is_done else linked:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return is_done


def _others(old: Path, new: Path, obsolete: Sequence[str]) -> list[Path]:
    names = {path.name for path in new.iterdir()} | {new.name}
    return [
        path for path in old.iterdir() if path.name not in names and not any(path.match(each) for each in obsolete)
    ]


def _move_one_by_one(new: Path, old: Path, obsolete: Sequence[str], last: str) -> None:
    (old / last).unlink(missing_ok=True)
    _sync(old)
    kept = {path.name for path in _others(old, new, obsolete)} | {new.name}
    for path in [path for path in old.iterdir() if path.name not in kept]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == last):
        path.rename(old / path.name)


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have nothing to wait for
            raise
    finally:
        os.close(descriptor)


def weights_digest(folder: Path) -> str | None:
    """Tell the weights in a model folder from all others.

    Args:
        folder: With `*.safetensors` files; their order is that of their names.

    Returns:
        The SHA-256 of the one file (the Hub shows the same), or of the several files' digests; None without any.
    """
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) <= 1:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def source_name(source: str) -> str:
    """Name a data source by its last two parts, without the folders of this machine; a Hub id stays whole."""
    path = Path(source)
    return "/".join(path.absolute().parts[-2:]) if path.exists() else source


def check_writable(folder: Path) -> None:
    """Refuse an output folder in which nothing can be written, before any work is done.

    Args:
        folder: Need not exist yet.

    Raises:
        UserError: If it is a file, lies below one, or may not be written.
    """
    present = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not present.is_dir():
        raise UserError(f"--output_dir expects a folder, got {folder}, where {present} is a file: name another")
    if not os.access(present, os.W_OK):
        raise UserError(f"--output_dir expects a folder that can be written, got {folder}: name another")


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn what libraries raise when the disk takes no more into one line.

    Args:
        folder: Where is written.

    Raises:
        UserError: If the disk is full or refuses.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_disk_error(error):
            raise
        raise UserError(
            f"expected to be able to write to {folder}, got {error}: free some space, or name another --output_dir"
        ) from error


def _is_disk_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
    # safetensors and torch.save have no type of their own for it.
    return any(words in str(error) for words in ("I/O error", "inline_container", "PytorchStreamWriter"))
