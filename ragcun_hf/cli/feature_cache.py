"""List and prune the features that frozen encoders have left on disk.

    python training/feature_cache.py
    python training/feature_cache.py --prune_days 30 --dry_run

Features are kept by encoder and text, and every script uses them. Pruned features are computed again when needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command_line import argument, format_table, parse_arguments, say
from ..errors import UserError


@dataclass
class CacheArguments:
    """The cache, and what to remove from it."""

    feature_cache_dir: str | None = argument(None, "Folder of the feature cache. Default: inside HF_HOME.")
    prune_days: float | None = argument(None, "Remove features not used for this many days, >= 0; 0 removes all.")
    check: bool = argument(
        False, "Compare every file with its checksums; a damaged one is set aside, and its texts are encoded again."
    )
    prune_keys: list[str] = argument([], "Remove these keys, given in full or by their first characters.")
    dry_run: bool = argument(False, "Say what would be removed, and remove nothing.")


def main(arguments: list[str] | None = None) -> None:
    """Prune what the flags name, and list what is left."""
    (args,) = parse_arguments([CacheArguments], description=__doc__ or "", arguments=arguments)
    from ..features.feature_cache import list_cached_encoders, remove_abandoned_files, remove_cached_encoder
    from ..features.feature_store import default_cache_folder

    folder = Path(args.feature_cache_dir) if args.feature_cache_dir else default_cache_folder()
    if args.check:
        _check(folder, dry_run=args.dry_run)
    entries = list_cached_encoders(folder)
    to_remove = _entries_to_remove(args, entries)
    if to_remove:
        say(f"{'Would remove' if args.dry_run else 'Removing'}:\n{_table(to_remove)}")
    if not args.dry_run:
        for entry in to_remove:
            remove_cached_encoder(entry)
        if args.prune_days is not None or args.prune_keys:
            remove_abandoned_files(folder)
    if to_remove:
        freed = sum(entry.num_bytes for entry in to_remove) / 2**20
        say(f"{'Would free' if args.dry_run else 'Freed'} {freed:,.1f} MiB; left:")
    left = [entry for entry in entries if entry not in to_remove]
    mebibytes = sum(entry.num_bytes for entry in left) / 2**20
    total = f"{sum(entry.num_texts for entry in left):,} texts, {mebibytes:,.1f} MiB in {folder}"
    say(f"{_table(left)}\n{total}" if left else total)


def _check(folder: Path, *, dry_run: bool) -> None:
    from ..features.feature_cache import check_cache, set_aside

    num_whole, damaged = check_cache(folder)
    for path in damaged:
        aside = None if dry_run else set_aside(path)
        say(f"Damaged: {path}" + (f", set aside as {aside.name}" if aside else ""))
    say(f"Checked {num_whole + len(damaged):,} files: {num_whole:,} whole, {len(damaged):,} damaged.")


def _entries_to_remove(args: CacheArguments, entries: list[Any]) -> list[Any]:
    if args.prune_days is not None and not args.prune_days >= 0:
        raise UserError(f"--prune_days must be at least 0, got {args.prune_days}: set it to e.g. 30")
    for key in args.prune_keys:
        matches = [entry for entry in entries if key and entry.folder.name.startswith(key)]
        if len(matches) != 1:
            raise UserError(
                f"--prune_keys expects keys of this cache, got {key!r}, the beginning of {len(matches)} keys: call "
                "without flags to see them"
            )
    oldest = time.time() - args.prune_days * 86_400 if args.prune_days is not None else float("-inf")
    keys = tuple(args.prune_keys)
    return [entry for entry in entries if entry.last_used <= oldest or (keys and entry.folder.name.startswith(keys))]


def _table(entries: list[Any]) -> str:
    rows = [["key", "last used", "encoder and settings", "texts", "MiB"]]
    for entry in entries:
        parts = entry.parts
        settings = [f"{parts.get('max_length')} tokens", *map(parts.get, ("pooling", "dtype", "backend"))]
        if parts.get("feature_dtype") != "float32":
            settings.append(f"stored in {parts.get('feature_dtype')}")
        if parts.get("prompt"):
            settings.append(f"prompt {parts['prompt']!r}")
        encoder = ", ".join(map(str, [parts.get("name") or parts.get("encoder"), *settings]))
        used = time.strftime("%Y-%m-%d", time.localtime(entry.last_used))
        rows.append([entry.folder.name[:12], used, encoder, f"{entry.num_texts:,}", f"{entry.num_bytes / 2**20:,.1f}"])
    return format_table(rows, num_names=3)
