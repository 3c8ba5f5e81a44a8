"""Atomic replacement of files and folders, ownership and checks of output folders, and checksums of weights."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

RECORD_FILE = "training_record.json"
"""File of a training run: data sources, counts, arguments, durations and the log."""

DOCUMENTS_FILE = "training_documents.txt"
"""File with one hexadecimal digest per distinct training document."""

HELD_OUT_FILE = "held_out.jsonl"
"""File with the pairs that a training run held out; it stays on this machine."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
"""Patterns of the names of weight files in a model folder."""

_CHECKED_FILES = (*WEIGHT_FILES, "tokenizer.json")

CHECKSUMS_FILE = "checksums.json"
"""File of a checkpoint, written last, with the checksums of all others."""

LOCK_FILE = ".in_use.lock"
"""File that the process at work in an output folder holds a lock on."""

_LONGEST_NAME = 255  # bytes in the name of a file or a folder

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
# A temporary file names its writer: the machine (and its container), and the process.
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{32}\.tmp")
_ABANDONED_SECONDS = 7 * 24 * 3600  # no writer on another machine is at work on a temporary file of this age
_held: dict[Path, tuple[int, int]] = {}  # folder in use by this process -> its process id, and how often


def temporary_name() -> str:
    """Return a hidden name, not used before, that says which process writes the file."""
    return f".{_machine()}-{os.getpid()}-{uuid.uuid4().hex}.tmp"


@functools.cache
def _machine() -> str:
    """Name the machine and the space of process numbers, which a container has of its own."""
    space = Path("/proc/self/ns/pid")
    number = space.stat().st_ino if space.exists() else 0
    return hashlib.sha256(f"{socket.gethostname()} {number}".encode()).hexdigest()[:8]


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of writers that are dead, or that no longer answer for them."""
    try:
        found = [(path, match) for path in folder.iterdir() if (match := _TEMPORARY.fullmatch(path.name))]
    except OSError:  # not there yet, or not ours to read
        return
    for path, match in found:
        if match[1] == _machine():
            is_abandoned = not _is_alive(int(match[2]))
        else:
            is_abandoned = _changed_at(path) < time.time() - _ABANDONED_SECONDS
        if is_abandoned:
            _remove(path)


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":  # there, a signal of 0 would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's; or no number of a process
        return True
    return True


def _changed_at(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return float("inf")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def owned_folder(folder: Path) -> Iterator[None]:
    """Let this process alone write to an output folder, which is made if it is missing; another one gets a UserError.

    The lock ends with the process, however that ends; on a network folder, it holds where the server keeps locks. A
    folder without locks (some network folders, Windows) is not protected. Within a process, owners may be nested.
    """
    target = folder.resolve()
    process, count = _held.get(target, (0, 0))
    if process == os.getpid():
        _held[target] = (process, count + 1)
        try:
            yield
        finally:
            _held[target] = (process, count)
        return
    made = [path for path in (target, *target.parents) if not path.exists()]
    target.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(target, folder):
            remove_leftovers(target)
            remove_leftovers(target.parent)
            _held[target] = (os.getpid(), 1)
            try:
                yield
            finally:
                del _held[target]
    finally:
        _remove_empty(made)


@contextmanager
def _lock(target: Path, name: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = target / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise UserError(
                    f"expected {name} for one run, got another run that is at work there: wait for its end, or name "
                    "another --output_dir"
                ) from error
        # The owner before may have removed the file between these two calls: then lock the new one.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _remove_empty(made: Sequence[Path]) -> None:
    """Remove folders that were made, innermost first, where nothing was written into them."""
    for path in made:
        with suppress(OSError):
            path.rmdir()


@contextmanager
def replaced_file(path: Path, *, is_synced: bool = True) -> Iterator[Path]:
    """Replace a file, in an existing folder, atomically: yield a temporary path to write to, then rename that file.

    After an exception the old file is unchanged. With `is_synced`, not even a power cut leaves a damaged file.
    """
    _clean_once(path.parent, os.getpid())
    temporary = path.with_name(temporary_name())
    try:
        yield temporary
        if is_synced:
            _sync(temporary)
        temporary.replace(path)
        if is_synced:
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@functools.lru_cache(maxsize=1024)
def _clean_once(folder: Path, process: int) -> None:
    """Remove the leftovers in a folder the first time that a process writes there."""
    remove_leftovers(folder)


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, with line feeds on every system; create the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replaced_folder(folder: Path, *, obsolete: Sequence[str] = (), last: str = "config.json") -> Iterator[Path]:
    """Replace the files of a folder atomically: write the new ones into a new folder, then swap the two.

    On Linux the swap is one system call: a kill or a power cut at any moment leaves all old files or all new ones.
    Where a swap is impossible (other systems, a mount point, the working folder, a file system without hard links),
    the old `last` is removed, the other files are moved one by one, and the new `last` is moved at the end. `last` is
    a file that loading needs: if the process is killed in between, the folder does not load, rather than a mixture.
    If the new files have no `last`, the old one stays, like all others.

    Yields the new folder. After an exception the old folder, if there is one, is unchanged. Old files under other
    names stay, unless their names match the patterns in `obsolete`.
    """
    target = folder.resolve()  # replace the folder behind a link, not the link
    made = [path for path in target.parents if not path.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    can_swap = os.access(target.parent, os.W_OK) and not os.path.ismount(target)
    staging = (target.parent if can_swap else target) / temporary_name()
    remove_leftovers(staging.parent)
    staging.mkdir()
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        if not target.exists():
            staging.rename(target)
        elif not (can_swap and target != Path.cwd() and _exchange(staging, target, obsolete)):
            _move_one_by_one(staging, target, obsolete, last)
        _sync(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)


def _exchange(new: Path, old: Path, obsolete: Sequence[str]) -> bool:
    """Link the files to keep into the new folder, then swap; return False, with nothing changed, if that fails."""
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
        path
        for path in old.iterdir()
        if path.name not in names
        and not any(path.match(each) for each in obsolete if path.name != LOCK_FILE)
        and not _TEMPORARY.fullmatch(path.name)
    ]


def _move_one_by_one(new: Path, old: Path, obsolete: Sequence[str], last: str) -> None:
    kept = {path.name for path in _others(old, new, obsolete)} | {new.name}
    if last not in kept:
        (old / last).unlink(missing_ok=True)
        _sync(old)
    for path in [path for path in old.iterdir() if path.name not in kept and not _TEMPORARY.fullmatch(path.name)]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == last):
        path.rename(old / path.name)


def _sync(path: Path) -> None:
    """Wait until the disk has stored a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not support it
            raise
    finally:
        os.close(descriptor)


def write_checksums(folder: Path) -> None:
    """Write a file with the checksum of every other file in a folder, once the disk has stored all of them."""
    remove_leftovers(folder)
    for path in folder.rglob("*"):
        _sync(path)
    digests = {name: _digest(folder / name) for name in _names_of_files(folder)}
    write_whole(folder / CHECKSUMS_FILE, json.dumps(digests, indent=1) + "\n")
    _sync(folder.parent)


def damaged_file(folder: Path) -> str | None:
    """Name a file of a folder with checksums that is missing or differs from its checksum; None if all are whole."""
    try:
        digests = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        if not isinstance(digests, dict):
            return CHECKSUMS_FILE
    except (OSError, ValueError, RecursionError):
        return CHECKSUMS_FILE
    for name, digest in digests.items():
        try:
            if _digest(folder / name) != digest:
                return str(name)
        except (OSError, ValueError):
            return str(name)
    return None


def _names_of_files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != CHECKSUMS_FILE)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files of a model folder whose damage nothing else would show."""
    return {path.name: _digest(path) for pattern in _CHECKED_FILES for path in sorted(folder.glob(pattern))}


def damaged_model_file(folder: Path) -> str | None:
    """Name a file of a model folder that differs from its checksum in the training record; None without these."""
    try:
        known = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["checksums"].items()
        found = model_digests(folder) if known else {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return next((name for name, digest in known if found.get(name, digest) != digest), None)


def weights_digest(folder: Path) -> str | None:
    """Return the SHA-256 of a folder's safetensors file, as the Hub shows it; None if there is no such file.

    Several files have one digest: that of their digests, in the order of their names.
    """
    digests = [_digest(path) for path in sorted(folder.glob("*.safetensors"))]
    if len(digests) <= 1:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def source_name(source: str) -> str:
    """Return how a record names a source: an existing path by its last parts, a Hub id unchanged.

    These are two of a path in the working folder, and one of another, or below a user's own folder: the folder above
    may be a user's name.
    """
    path = Path(source)
    if not path.exists():
        return source
    parts = path_below(path).parts[-2:]
    homes = {Path.home().name, *(each.name for each in Path.home().parents)} - {""}
    is_in_home = len(parts) == 2 and (parts[0] in homes or path.resolve().parent.parent.name in ("home", "Users"))
    return "/".join(parts[is_in_home:]) or "."


def encoder_name(source: str) -> str:
    """Return how a record names an encoder: a folder by its last part, as two look like a Hub id; an id unchanged."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def check_hub_answers() -> None:
    """Raise a ConnectionError if nothing answers at the Hub's address: its client would try for 25 seconds a file.

    Behind a proxy, only the client knows what answers; and if `HF_HUB_OFFLINE` is set, it does not try.
    """
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or {address.scheme, "all"} & getproxies().keys():
        return
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=constants.HF_HUB_ETAG_TIMEOUT).close()
    except OSError as error:
        reason = error.strerror or error
        raise ConnectionError(
            f"nothing of that name is here, and {constants.ENDPOINT} does not answer: {reason}"
        ) from error


def path_below(path: Path) -> Path:
    """Return a path as seen from the working folder; of one outside it, only the last part."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()  # noqa: PTH100 (resolve would follow links)
    return absolute.relative_to(here) if absolute.is_relative_to(here) else Path(absolute.name)


def check_file_name(name: str, flag: str) -> None:
    """Raise UserError, before any work is done, if a name cannot be that of a file, with a suffix behind it."""
    if not name.strip(". ") or re.search(r"[/\\\x00-\x1f]", name) or len(os.fsencode(name)) > _LONGEST_NAME - 55:
        raise UserError(
            f"{flag} expects a name of a file, without slashes and of at most {_LONGEST_NAME - 55} bytes, got "
            f"{name[:40]!r}: choose another"
        )


def check_writable(folder: Path | str) -> None:
    """Raise UserError, before any work is done, if an output folder (which may not exist yet) cannot be written."""
    if not str(folder) or "\0" in str(folder):
        raise UserError(f"--output_dir expects a folder, got {str(folder)!r}: name one, or leave the flag out")
    whole = Path(folder).absolute()
    try:
        too_long = next((part for part in whole.parts if len(os.fsencode(part)) > _LONGEST_NAME), None)
        broken = next((path for path in (whole, *whole.parents) if path.is_symlink() and not path.exists()), None)
        present = next(path for path in (whole, *whole.parents) if path.exists())
    except (OSError, ValueError) as error:  # a loop of links, or a character that no name can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--output_dir expects a folder, got {str(folder)[:80]!r} ({reason}): choose another"
        ) from error
    if too_long is not None:
        raise UserError(
            f"--output_dir expects names of at most {_LONGEST_NAME} bytes, got {too_long[:40]!r}...: choose another"
        )
    if broken is not None:
        raise UserError(
            f"--output_dir expects a folder, got {folder}, where {broken} is a link to nothing: choose another"
        )
    if not present.is_dir():
        raise UserError(f"--output_dir expects a folder, got {folder}, where {present} is a file: choose another")
    if not os.access(present, os.W_OK):
        raise UserError(f"--output_dir expects a writable folder, got {folder}: choose another")


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn the exceptions of a full or read-only disk, and of a folder in the place of a file, into a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError):
            full, taken = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EISDIR, errno.ENOTDIR)
            is_of_disk = error.errno in (*full, *taken, errno.EROFS, errno.EACCES)
        else:  # safetensors and torch.save have no exception type for it
            words = ("I/O error", "inline_container", "PytorchStreamWriter")
            is_of_disk = any(word in str(error) for word in words)
        if not is_of_disk:
            raise
        raise UserError(
            f"expected to write to {folder}, got {error}: free some space, or choose another --output_dir"
        ) from error
