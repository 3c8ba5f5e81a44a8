"""Convert a checkpoint of the original project (a .pt file) to a model folder that AutoModel loads.

    python training/convert_checkpoint.py best_model.pt --base_model sentence-transformers/all-mpnet-base-v2

The file is read as data: no code in the pickle is run, and keys that the original does not have are refused. Before
the model is written, its vectors are compared with the original's formula on a few texts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..command_line import argument, parse_arguments, quiet_libraries, say
from ..commands import command
from ..errors import UserError

_TEXTS = [
    "how do vaccines work?",
    "Vaccines train the immune system to recognise a germ.",
    "The quick brown fox jumps over the lazy dog.",
    "Ein Satz in einer anderen Sprache, mit Umlauten: äöü.",
]
_TOLERANCE = 1e-4  # of a standard deviation: float32 sums are taken in another order


@dataclass
class ConversionArguments:
    """The checkpoint, its encoder, and the model to write."""

    checkpoint: str | None = argument(None, "The .pt file; it may also be the first word of the command line.")
    base_model: str = argument(
        "sentence-transformers/all-mpnet-base-v2", "Its encoder: a Hub id, a folder, or the word embedded."
    )
    output_dir: str | None = argument(None, "Folder of the model. Default: checkpoints/<name of the file>.")
    overwrite: bool = argument(False, "Replace a model in --output_dir.")


def main(arguments: list[str] | None = None) -> None:
    """Read, convert and compare the checkpoint, write the model, and print the next command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--checkpoint")
    (args,) = parse_arguments([ConversionArguments], description=__doc__ or "", arguments=words)
    from ..files import (
        DOCUMENTS_FILE,
        HELD_OUT_FILE,
        RECORD_FILE,
        WEIGHT_FILES,
        check_writable,
        disk_errors_explained,
        owned_folder,
        replaced_folder,
    )
    from ..model.original_checkpoint import convert_original, difference_to_original, read_original_checkpoint

    quiet_libraries()
    if not args.checkpoint:
        raise UserError("expected the checkpoint to convert, got none: name the .pt file")
    folder = Path(args.output_dir or f"checkpoints/{Path(args.checkpoint).stem}")
    if (folder / "model.safetensors").exists() and not args.overwrite:
        raise UserError(f"{folder} holds a model: name another --output_dir, or replace it with --overwrite")
    check_writable(folder)
    state = read_original_checkpoint(args.checkpoint)
    model, is_frozen = convert_original(state, args.base_model)
    difference = difference_to_original(model, state, _TEXTS)
    if not difference < _TOLERANCE:
        raise UserError(
            f"expected the vectors of the original, got a difference of {difference:.1e} standard deviations: nothing "
            "was written, check --base_model"
        )
    of_another_model = (*WEIGHT_FILES, RECORD_FILE, DOCUMENTS_FILE, HELD_OUT_FILE)
    with (
        disk_errors_explained(folder),
        owned_folder(folder),
        replaced_folder(folder, obsolete=of_another_model) as new,
    ):
        model.save_pretrained(new)
    encoder = "the frozen encoder of --base_model" if is_frozen else "an encoder that was trained too"
    say(f"Wrote {folder}: {encoder}, {model.config.output_dim} dimensions; within {difference:.1e} of the original.")
    predictor = ["--use_predictor"] if model.config.use_predictor else []
    say(f"Next: {command('eval_beir', '--model_path', folder, *predictor, '--datasets', 'YOUR_DATASET')}")
