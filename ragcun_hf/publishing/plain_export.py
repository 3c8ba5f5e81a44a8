"""Write a trained model as a folder of sentence-transformers' own modules, which loads without any code of ours.

    Transformer -> Pooling -> [Normalize] -> Dense [-> Dense] [-> Normalize]

The files are those that sentence-transformers 3 to 6 and text-embeddings-inference read. They are written here, not by
that library, whose newest version writes names that older ones do not know.

Shape letters: B = texts, H = encoder width, M = hidden width of the MLP, D = embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError
from ..evaluation.results import write_json
from ..model.sentence_transformers_isotropic_gaussian import sentence_transformers_files, written_settings

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

MODULES_FILE = "modules.json"
_SETTINGS = "config_sentence_transformers.json"
_MADE_WITH = "made_with"
_TYPES = "sentence_transformers.models"  # later versions have other names, and still know these
_TOLERANCE = 1e-5  # of the vectors, whose length is about 1: float32 sums are taken in another order
_IDENTITY, _GELU = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.GELU"
_ACTIVATIONS = {_IDENTITY: nn.Identity, _GELU: nn.GELU}
_POOLINGS = {
    "mean": "mean_tokens",
    "cls": "cls_token",
    "last": "lasttoken",
    "max": "max_tokens",
    "mean_sqrt": "mean_sqrt_len_tokens",
    "weighted_mean": "weightedmean_tokens",
}
_ALL_POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


class DenseLayer(NamedTuple):
    """One Dense module: the activation of `weight` (out, in) times the input plus `bias` (out,), if there is one."""

    weight: Tensor
    bias: Tensor | None
    activation: str


def dense_layers(model: IsotropicGaussianModel) -> list[DenseLayer]:
    """Return the projection, with the scale of the features, as one Dense layer, or as two that contain a GELU.

    gelu(z) - gelu(-z) = z, so the linear part L passes through the GELU of the first layer: with the MLP's layers
    W1 (M, H) and W2 (D, M), the first is [L; -L; W1] and the second [I, -I, W2].

    A `UserError` says if the model has a lexical half, which no Dense layer computes, or embeds documents otherwise.
    """
    if model.config.freeze_documents:
        raise UserError(
            "expected a model that embeds queries and documents alike, got one with --freeze_documents, which these "
            "modules cannot: share the model's own folder, or export it to ONNX"
        )
    if model.lexical is not None:
        raise UserError(
            f"expected a model without a lexical half, got one of {model.config.lexical_dim} directions, which "
            "sentence-transformers cannot compute without code: share the model's own folder, which loads with "
            "trust_remote_code=True, export it to ONNX, or train with --lexical false"
        )
    head, scale = model.projection, model.config.feature_scale
    linear: Any = head.linear
    mlp: Any = head.mlp
    if mlp is not None and linear is not None and not (mlp[-1].weight.any() or mlp[-1].bias.any()):
        mlp = None  # an untrained branch
    if mlp is None:
        return [_layer(linear.weight * scale, linear.bias, _IDENTITY)]
    first, last = mlp[0], mlp[-1]
    if linear is None:
        return [_layer(first.weight * scale, first.bias, _GELU), _layer(last.weight, last.bias, _IDENTITY)]
    weight = torch.cat([linear.weight, -linear.weight, first.weight]) * scale
    bias = torch.cat([linear.bias, -linear.bias, first.bias])
    identity = torch.eye(len(linear.bias), device=weight.device)
    return [
        _layer(weight, bias, _GELU),
        _layer(torch.cat([identity, -identity, last.weight], dim=1), last.bias, _IDENTITY),
    ]


def _layer(weight: Tensor, bias: Tensor | None, activation: str) -> DenseLayer:
    return DenseLayer(weight.detach().float().cpu(), None if bias is None else bias.detach().float().cpu(), activation)


def _layers_of_encoder(model: IsotropicGaussianModel) -> Iterator[DenseLayer | None]:
    """Yield the layers that the encoder's makers put behind its pooling; None stands for Normalize."""
    layers: Any = model.pooled_layers
    for layer in layers or ():
        if layer.normalize_input:
            yield None
        kind = type(layer.activation)
        yield _layer(layer.linear.weight, layer.linear.bias, f"{kind.__module__}.{kind.__name__}")


def write_plain(model: IsotropicGaussianModel, folder: Path, texts: Sequence[str]) -> list[DenseLayer]:
    """Write the folder, compare its head with the model's on texts, and return its Dense layers.

    The folder exists and is empty. The predictor is left out: no module of sentence-transformers has a place for it. A
    `UserError` says if the model has a lexical half, or the vectors of the Dense layers differ from the model's.
    """
    layers = dense_layers(model)
    _check(model, layers, texts)
    config = model.config
    _write_encoder(model, folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    behind: list[DenseLayer | None] = [*_layers_of_encoder(model)]  # None: Normalize
    behind += [*([None] if config.normalize_features else []), *layers, *([None] if config.has_unit_vectors else [])]
    for layer in behind:
        kind = "Normalize" if layer is None else "Dense"
        modules.append((f"{len(modules)}_{kind}", kind))
        if layer is not None:
            _write_dense(layer, folder / modules[-1][0])
    pooling = {f"pooling_mode_{name}": name == _POOLINGS[config.pooling] for name in _ALL_POOLINGS}
    (folder / "1_Pooling").mkdir()
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": config.encoder_config.get_text_config().hidden_size,
            **pooling,
            "include_prompt": True,
        },
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": config.max_length, "do_lower_case": False})
    write_json(folder / _SETTINGS, _settings(model))
    names = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_TYPES}.{kind}"}
        for number, (path, kind) in enumerate(modules)
    ]
    write_json(folder / MODULES_FILE, names)
    return layers


def is_plain_folder(folder: Path) -> bool:
    """Return whether `write_plain` wrote a folder; another one of sentence-transformers may be someone's encoder."""
    path = folder / _SETTINGS
    return path.is_file() and f'"{_MADE_WITH}"' in path.read_text(encoding="utf-8", errors="replace")


def describe(model: IsotropicGaussianModel, layers: Sequence[DenseLayer]) -> str:
    """Return lines that say what a plain folder holds, what it leaves out, and who can serve it."""
    widths = " and ".join(f"{layer.weight.shape[1]} -> {layer.weight.shape[0]}" for layer in layers)
    lines = [f"the encoder, its pooling, and the head as Dense {widths}."]
    if model.predictor is not None:
        lines.append("Without the predictor, for which sentence-transformers has no module.")
    every = [*filter(None, _layers_of_encoder(model)), *layers]
    if any(not layer.activation.endswith(("Identity", "Tanh")) for layer in every):
        lines.append(
            "text-embeddings-inference has no GELU in a Dense module: for it, train --projection_kind linear."
        )
    elif model.config.normalize_features and any(layer.bias is not None and layer.bias.any() for layer in layers):
        lines.append("text-embeddings-inference would skip the Normalize before the head: its vectors would differ.")
    return "\n".join(lines)


def _write_encoder(model: IsotropicGaussianModel, folder: Path) -> None:
    """Write the encoder as AutoModel reads it, in transformers 4, too."""
    from ..model.modeling_isotropic_gaussian import encoder_class

    config = model.config.encoder_config
    encoder = encoder_class(config).from_config(config).float()
    # The model has dropped the unused pooler; without one, older versions say that the model needs training.
    missing = encoder.load_state_dict(model.encoder.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        for name in missing:
            encoder.get_parameter(name).zero_()
    encoder.config.dtype = torch.float32
    encoder.save_pretrained(folder)
    tokenizer = model.tokenizer
    tokenizer.model_max_length = model.config.max_length
    tokenizer.save_pretrained(folder)
    _make_readable_to_transformers_4(folder / "tokenizer_config.json")


def _make_readable_to_transformers_4(path: Path) -> None:
    """Change what transformers 5 writes and 4 does not know: the name of a class, and a list that was a dictionary."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    write_json(path, values)


def _write_dense(layer: DenseLayer, folder: Path) -> None:
    folder.mkdir()
    width_out, width_in = layer.weight.shape
    description = {"in_features": width_in, "out_features": width_out, "bias": layer.bias is not None}
    write_json(folder / "config.json", {**description, "activation_function": layer.activation})
    weights = {"linear.weight": layer.weight.contiguous()}
    if layer.bias is not None:
        weights["linear.bias"] = layer.bias.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _settings(model: IsotropicGaussianModel) -> dict[str, Any]:
    """Return prompts, similarity and the like: those that sentence-transformers wrote, or those of the config."""
    settings = written_settings(Path(model.name_or_path or ""))
    if settings is None:
        settings = sentence_transformers_files(model.config)[_SETTINGS]
    # The versions are those of another folder, and older ones do not know the type.
    kept = {name: value for name, value in settings.items() if name not in ("__version__", "model_type")}
    return {**kept, _MADE_WITH: "ragcun_hf"}


@torch.no_grad()
def _check(model: IsotropicGaussianModel, layers: Sequence[DenseLayer], texts: Sequence[str]) -> None:
    tokens = {name: values.to(model.device) for name, values in model.tokenize(list(texts)).items()}
    vectors = model.compute_features(**tokens)
    expected = model.search_vectors(model(features=vectors).embeddings)
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.to(vectors)
        vectors = _ACTIVATIONS[layer.activation]()(nn.functional.linear(vectors, layer.weight.to(vectors), bias))
    length = float(expected.norm(dim=1).mean())
    difference = float((model.search_vectors(vectors) - expected).abs().max()) / max(length, 1e-12)
    if not difference < _TOLERANCE:  # also refuses NaN
        raise UserError(
            f"expected Dense layers within {_TOLERANCE:g} of the model, got a difference of {difference:.1e} "
            f"(its weights are {model.dtype}): nothing was written; save the model in float32"
        )
