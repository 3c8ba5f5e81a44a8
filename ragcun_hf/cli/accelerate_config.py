r"""Print the path of a launch file for several processes, for `accelerate launch --config_file`.

    ragcun accelerate-config one_machine_gpus
    accelerate launch --config_file "$(ragcun accelerate-config one_machine_gpus)" --num_processes 4 \
        -m ragcun_hf.cli train-contrastive --recipe adapt --train_data pairs.jsonl

Without a name, all launch files are listed; each begins with a description.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..command_line import argument, parse_arguments, say, shipped_file, shipped_names


@dataclass
class LaunchFileArguments:
    """The launch file."""

    name: str | None = argument(None, "Name of a launch file; it may also be the first word of the command line.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one path, or the names."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--name")
    (args,) = parse_arguments([LaunchFileArguments], description=__doc__ or "", arguments=words)
    say(str(shipped_file("accelerate", args.name)) if args.name else "\n".join(shipped_names("accelerate")))
