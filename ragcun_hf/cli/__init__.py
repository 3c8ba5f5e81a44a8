"""The commands: flags in, calls of the rooms, lines for the person at the terminal out."""

import importlib
from typing import NoReturn

from ..command_line import run_script

_SHARE_WORK = ("eval_beir", "train_contrastive", "train_self_supervised", "train_xy_masked")


def run(name: str) -> NoReturn:
    """Run the command of that name with `sys.argv`, and exit with the code that its outcome deserves."""
    run_script(importlib.import_module(f"{__name__}.{name}").main, shares_work=name in _SHARE_WORK)
