"""Convert checkpoints of the original project (github.com/ctn/ragcun) to models of this package.

The `.pt` file holds a state dict, either alone or as `model_state_dict` of a training checkpoint:

    base.0.auto_model.*           the encoder, inside a SentenceTransformer
    projection.{0,3}.weight/bias  Linear(H, hidden), GELU, Dropout, Linear(hidden, D)
    predictor.{0,3}.weight/bias   the same, D to D; absent without a predictor
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .base_models import load_base_model

if TYPE_CHECKING:
    from .modeling_isotropic_gaussian import IsotropicGaussianModel

_STATE = "model_state_dict"
_ENCODER = "base.0.auto_model."
_HEAD_KEY = re.compile(r"(projection|predictor)\.([03])\.(weight|bias)")
# Saved by some versions of transformers, and not used by a sentence encoder.
_IDLE_KEY = re.compile(re.escape(_ENCODER) + r"(pooler\..*|.*position_ids|.*token_type_ids)")


def read_original_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a `.pt` checkpoint, in float32 on the CPU, without running any code in the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"expected a checkpoint, could not read {path} ({error.strerror}): check the path") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: expected tensors and plain values written by torch.save, got something else ({reason}): none "
            "of its code was run; save only the model's state dict"
        ) from error
    state = content.get(_STATE, content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: expected a state dict, got {type(state).__name__}: save model.state_dict()")
    return {
        key: _checked(path, key, value)
        for key, value in state.items()
        if not (isinstance(key, str) and _IDLE_KEY.fullmatch(key))
    }


def _checked(path: str | Path, key: Any, value: Any) -> Tensor:
    is_known = isinstance(key, str) and (key.startswith(_ENCODER) or _HEAD_KEY.fullmatch(key) is not None)
    if not is_known:
        raise UserError(
            f"{path}: expected keys {_ENCODER}*, projection.0/3.* and predictor.0/3.*, got {key!r}: this "
            "is not a checkpoint of the original project"
        )
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{path}: expected a floating-point tensor under {key!r}, got {kind}: save it again")
    if not bool(value.isfinite().all()):
        raise UserError(f"{path}: expected finite weights, got NaN or infinity under {key!r}: take another checkpoint")
    return value.float()


def convert_original(state: Mapping[str, Tensor], base_model: str) -> tuple[IsotropicGaussianModel, bool]:
    """Load weights from `read_original_checkpoint` into a model that is built around the encoder `base_model`.

    Returns the model in evaluation mode, and whether its encoder has the weights of `base_model`. If not, the model is
    marked as one with a trained encoder, so that evaluation compares it with the untrained one. Missing weights and
    weights that do not fit the encoder are a UserError.
    """
    heads = {key: value for key, value in state.items() if not key.startswith(_ENCODER)}
    encoder = {key.removeprefix(_ENCODER): value for key, value in state.items() if key.startswith(_ENCODER)}
    fields = {**_head_fields(heads), "projection_init": "random", "projection_kind": "mlp"}
    # The original fed unit vectors to the projection and ranked by Euclidean distance.
    fields |= {"normalize_features": True, "feature_scale": 1.0, "similarity_fn_name": "euclidean"}
    model = load_base_model(base_model, **fields)
    _check_encoder(encoder, model)
    is_frozen = all(torch.equal(value, encoder[name]) for name, value in model.encoder.state_dict().items())
    if not is_frozen:
        model.config.freeze_base = False
        model.apply_freezing()
    _fill(model.encoder, encoder, _ENCODER)
    _fill(model.projection.mlp, _head_state(heads, "projection"), "projection.")
    if model.predictor is not None:
        _fill(model.predictor.mlp, _head_state(heads, "predictor"), "predictor.")
    return model.eval(), is_frozen


def _head_fields(heads: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the widths from the shapes."""
    fields: dict[str, Any] = {"use_predictor": any(key.startswith("predictor.") for key in heads)}
    for head in ("projection", *(["predictor"] if fields["use_predictor"] else [])):
        missing = [f"{head}.{layer}.{part}" for layer in (0, 3) for part in ("weight", "bias")]
        missing = [key for key in missing if key not in heads]
        if missing:
            raise UserError(
                f"expected the key {missing[0]!r} in the checkpoint, got none: the checkpoint is incomplete"
            )
        weight = heads[f"{head}.0.weight"]
        if weight.ndim != 2:
            raise UserError(
                f"expected a matrix under {head}.0.weight, got shape {tuple(weight.shape)}: take another checkpoint"
            )
        fields[f"{head}_hidden_dim"] = weight.shape[0]
    fields["output_dim"] = heads["projection.3.bias"].numel()
    return fields


def _check_encoder(encoder: Mapping[str, Tensor], model: IsotropicGaussianModel) -> None:
    expected = model.encoder.state_dict()
    for key in expected.keys() ^ encoder.keys():
        where = "in the checkpoint" if key in expected else "in the encoder"
        raise UserError(
            f"expected the encoder of the checkpoint to be that of --base_model, got no {_ENCODER + key!r} {where}: "
            "name the encoder that the checkpoint started from"
        )


def _head_state(heads: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in heads.items() if key.startswith(f"{name}.")}


def _fill(module: Any, state: Mapping[str, Tensor], prefix: str) -> None:
    for key, value in module.state_dict().items():
        if value.shape != state[key].shape:
            raise UserError(
                f"expected shape {tuple(value.shape)} under {prefix + key!r}, got {tuple(state[key].shape)}: name the "
                "encoder that the checkpoint started from"
            )
    module.load_state_dict(state)


def difference_to_original(model: IsotropicGaussianModel, state: Mapping[str, Tensor], texts: list[str]) -> float:
    """Return the largest difference between a model's vectors and the original's formula, in standard deviations."""
    tokens = model.tokenize(texts)
    with torch.no_grad():
        unit = nn.functional.normalize(model.compute_features(**tokens), dim=-1)
        embeddings = _original_head(unit, state, "projection")
        pairs: list[tuple[Tensor, Any]] = [
            (embeddings, model.encode_document(texts, convert_to_tensor=True, normalize_embeddings=False))
        ]
        if model.predictor is not None:
            predictions = _original_head(embeddings, state, "predictor")
            pairs.append(
                (
                    predictions,
                    model.encode_query(texts, use_predictor=True, convert_to_tensor=True, normalize_embeddings=False),
                )
            )
    return max(float((ours - theirs).abs().max() / theirs.std().clamp_min(1e-12)) for theirs, ours in pairs)


def _original_head(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    hidden = nn.functional.gelu(x @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"])
    return hidden @ state[f"{name}.3.weight"].T + state[f"{name}.3.bias"]
