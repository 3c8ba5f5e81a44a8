"""List and prune the features that the frozen encoders left on disk.

    python training/feature_cache.py
    python training/feature_cache.py --prune_days 30 --dry_run

Features are kept by encoder and text, for every script. Pruned ones are computed again when they are needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command_line import argument, parse_arguments, say


@dataclass
class CacheArguments:
    """Which cache, and what to remove from it."""

    feature_cache_dir: str | None = argument(None, "Folder of the feature cache. Default: inside HF_HOME.")
    prune_days: float | None = argument(None, "Remove what was not used for so many days, >= 0; 0 removes all.")
    prune_keys: list[str] = argument([], "Remove these: keys, or beginnings of keys, as the list shows them.")
    dry_run: bool = argument(False, "Say what would be removed, and remove nothing.")


def main(arguments: list[str] | None = None) -> None:
    """List, or prune what the flags name and list what is left."""
    (args,) = parse_arguments([CacheArguments], description=__doc__ or "", arguments=arguments)
    from ..features.cached_encoders import list_cached_encoders, remove_abandoned_files, remove_cached_encoder
    from ..features.feature_store import default_cache_folder

    folder = Path(args.feature_cache_dir) if args.feature_cache_dir else default_cache_folder()
    entries = list_cached_encoders(folder)
    doomed = _doomed(args, entries)
    for entry in doomed:
        say(f"{'Would remove' if args.dry_run else 'Removing'} {_line(entry)}")
        if not args.dry_run:
            remove_cached_encoder(entry)
    if not args.dry_run and (args.prune_days is not None or args.prune_keys):
        remove_abandoned_files(folder)
    left = [entry for entry in entries if entry not in doomed]
    if doomed:
        freed = sum(entry.num_bytes for entry in doomed) / 2**20
        say(f"{'Would free' if args.dry_run else 'Freed'} {freed:,.1f} MiB; what stays:")
    _show(left, folder)


def _doomed(args: CacheArguments, entries: list[Any]) -> list[Any]:
    from ..errors import UserError

    if args.prune_days is not None and not args.prune_days >= 0:
        raise UserError(f"--prune_days must be at least 0, got {args.prune_days}: set it to e.g. 30")
    for key in args.prune_keys:
        matches = [entry for entry in entries if key and entry.key.startswith(key)]
        if len(matches) != 1:
            raise UserError(
                f"--prune_keys expects keys of this cache, got {key!r}, which {len(matches)} begin with: call without "
                "flags to see them"
            )
    oldest = time.time() - args.prune_days * 86_400 if args.prune_days is not None else float("-inf")
    keys = tuple(args.prune_keys)
    return [entry for entry in entries if entry.last_used <= oldest or (keys and entry.key.startswith(keys))]


def _show(entries: list[Any], folder: Path) -> None:
    if entries:
        say(f"{'key':12}  {'texts':>10}  {'MiB':>9}  {'last used':10}  encoder, and how it is used")
    for entry in entries:
        say(_line(entry))
    mebibytes = sum(entry.num_bytes for entry in entries) / 2**20
    say(f"{sum(entry.num_texts for entry in entries):,} texts, {mebibytes:,.1f} MiB in {folder}")


def _line(entry: Any) -> str:
    parts = entry.parts
    used = time.strftime("%Y-%m-%d", time.localtime(entry.last_used))
    settings = [f"{parts.get('max_length')} tokens", parts.get("pooling"), parts.get("dtype"), parts.get("backend")]
    if parts.get("feature_dtype") != "float32":
        settings.append(f"kept in {parts.get('feature_dtype')}")
    if parts.get("prompt"):
        settings.append(f"prompt {parts['prompt']!r}")
    name = parts.get("name") or parts.get("encoder")
    size = f"{entry.num_texts:>10,}  {entry.num_bytes / 2**20:>9,.1f}"
    return f"{entry.key[:12]}  {size}  {used}  {name}, {', '.join(str(setting) for setting in settings)}"
