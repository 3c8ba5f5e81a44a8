"""The proof that a model folder works for everybody: it is loaded by a process that has transformers only."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..errors import UserError

_SCRIPT = """
import sys
sys.modules["ragcun_hf"] = None  # whoever loads the model does not have the package
import numpy as np
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
texts = ["how do vaccines work?", "Vaccines train the immune system to recognise a germ."]
vectors = np.stack([model.encode_query(texts), model.encode_document(texts)])
if vectors.shape != (2, 2, model.config.output_dim):
    sys.exit(f"expected two vectors of {model.config.output_dim}, got the shape {vectors.shape}")
if not np.isfinite(vectors).all() or np.allclose(vectors[:, 0], vectors[:, 1]):
    sys.exit("expected finite vectors that differ between texts, got others")
"""
_SECONDS = 600


def check_clean_load(folder: Path) -> None:
    """Load a model folder where neither this package nor a network nor any cache is, and embed two texts.

    Args:
        folder: The model's folder.

    Raises:
        UserError: With the last line of what went wrong there.
    """
    with tempfile.TemporaryDirectory() as empty:
        caches = {name: empty for name in ("HF_HOME", "HF_MODULES_CACHE", "HF_HUB_CACHE")}
        left_out = ("HUGGINGFACE_HUB_CACHE", "PYTHONPATH", "TRANSFORMERS_CACHE")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _SCRIPT, str(folder.resolve())],
                env={**kept, **caches, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
                cwd=empty,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"expected {folder} to load within {_SECONDS} seconds, got no end: try again") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"expected {folder} to load with AutoModel in a clean process, got {reason!r}: train or save it again, so "
            "that code, tokenizer and weights lie in it"
        )
