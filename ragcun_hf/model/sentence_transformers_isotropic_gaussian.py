# Licensed under the Apache License, Version 2.0. This file travels with every published model.
"""Read the sentence-transformers settings of an encoder's folder, and write those of a model's folder."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import cached_file

from .configuration_isotropic_gaussian import SIMILARITIES, IsotropicGaussianConfig, num_positions
from .pooling_isotropic_gaussian import ACTIVATIONS, PooledLayers

logger = logging.getLogger(__name__)

_SETTINGS = "config_sentence_transformers.json"
# The first one is today's; sentence-transformers still reads the others.
_LENGTH_FILES = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

# Names in the order in which sentence-transformers looks for them.
_NAMES_OF_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}

# Options that the transformer's settings pass to its model, tokenizer and configuration, and those of them that change
# no vector here: the length is read, padding is on the right, and the caller chooses code and precision.
_OPTIONS_OF_PARTS = tuple(
    f"{part}_{kind}" for part in ("model", "tokenizer", "processor", "config") for kind in ("args", "kwargs")
)
_OPTIONS_WITHOUT_EFFECT = {
    "add_pooling_layer",
    "attn_implementation",
    "dtype",
    "model_max_length",
    "padding_side",
    "torch_dtype",
    "trust_remote_code",
    "use_fast",
}

AUTO = "auto"  # as a prompt: the one that the encoder's makers publish
_FOR_PASSAGES = "Represent this sentence for searching relevant passages: "
# Of encoders whose files lack them (or did, in some revision): the last part of the name, the prompts of queries and
# of documents. From the makers' model cards on the Hub: each says under "Usage" what to put before a text, and that
# results are worse without.
_PUBLISHED_PROMPTS = (
    (r"(multilingual-)?e5-(small|base|large)(-v2|-unsupervised)?", "query: ", "passage: "),
    (r"bge-(small|base|large)-en(-v1\.5)?", _FOR_PASSAGES, ""),
    (r"(nomic-embed-text-v(1|1\.5|2-moe)|modernbert-embed-base)", "search_query: ", "search_document: "),
    (r"mxbai-embed-(large-v1|xsmall-v1|2d-large-v1)", _FOR_PASSAGES, ""),
    (r"snowflake-arctic-embed-(xs|s|m|m-long|l|m-v1\.5)", _FOR_PASSAGES, ""),
    (r"snowflake-arctic-embed-(m|l)-v2\.0", "query: ", ""),
    (
        r"gte-qwen(1\.5|2)-.*instruct",
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ",
        "",
    ),
)


def sentence_transformers_files(
    config: IsotropicGaussianConfig, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the files that describe the model to sentence-transformers: one module that calls `get_text_features`.

    `settings` are those of `written_settings`, which are kept; by default they follow from the config.

    Without `modules.json`, sentence-transformers computes the same vectors but ignores the prompts and the similarity.
    """
    return {
        _SETTINGS: settings
        or {
            "model_type": "SentenceTransformer",
            "prompts": {"query": config.query_prompt, "document": config.document_prompt},
            "default_prompt_name": config.default_prompt_name,
            "similarity_fn_name": config.similarity_fn_name,
        },
        "modules.json": [
            {
                "idx": 0,
                "name": "0",
                "path": "",
                "type": "sentence_transformers.base.modules.transformer.Transformer",
                # Tell `get_text_features` which side a text is.
                **({"kwargs": ["task"]} if config.freeze_documents else {}),
            }
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "get_text_features", "method_output_name": "pooler_output"}},
            "module_output_name": "sentence_embedding",
        },
    }


def written_settings(folder: Path) -> dict[str, Any] | None:
    """Read the settings that sentence-transformers itself wrote into a model's folder; None if it did not."""
    path = folder / _SETTINGS
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # `save_pretrained` of this model writes the file without versions.
    return settings if "__version__" in settings else None


def adopt_settings(config: IsotropicGaussianConfig, settings: dict[str, Any]) -> None:
    """Change prompts and similarity of a config to those of sentence-transformers, as far as the config has them."""
    prompts = settings.get("prompts") or {}
    config.query_prompt, config.document_prompt = prompts.get("query") or "", prompts.get("document") or ""
    similarity, default = settings.get("similarity_fn_name"), settings.get("default_prompt_name")
    # Vectors of unit length stay so, and cosine is the dot product of those.
    if similarity == "cosine" or (similarity in ("dot", "euclidean") and not config.has_unit_vectors):
        config.similarity_fn_name = similarity
    config.default_prompt_name = default if default in ("query", "document") else None
    names = ("similarity_fn_name", "default_prompt_name", "truncate_dim")
    asked = {name: settings[name] for name in names if settings.get(name) is not None}
    if config.has_unit_vectors and similarity == "dot":
        del asked["similarity_fn_name"]
    unknown = [f"{name} = {value}" for name, value in asked.items() if value != getattr(config, name, None)]
    if unknown:
        logger.warning("Only sentence-transformers will know these settings of the model: %s.", ", ".join(unknown))


def saved_max_length(name_or_path: str | Path, config: IsotropicGaussianConfig, options: dict[str, Any]) -> int:
    """Return the maximum length of a saved model, that of its tokenizer.

    The two differ if `max_seq_length` was changed in sentence-transformers, which saves it in the tokenizer only. A
    `config.max_length` that was changed while loading is returned as it is.
    """
    tokenizer, saved = (_read(name_or_path, name, options) or {} for name in ("tokenizer_config.json", "config.json"))
    length: Any = tokenizer.get("model_max_length")
    is_limit = isinstance(length, int) and 0 < length < 1_000_000_000  # tokenizers write 1e30 for no limit
    if not is_limit or config.max_length != saved.get("max_length", type(config).max_length):
        return config.max_length
    encoder_config: Any = config.encoder_config
    return min(length, num_positions(encoder_config) or length)


def _read(name_or_path: str | Path, file_name: str, options: dict[str, Any]) -> Any:
    path = cached_file(
        name_or_path,
        file_name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **options,
    )
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def encoder_settings(
    name_or_path: str, tokenizer: Any, encoder_config: Any, options: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """Read pooling, length, normalization, prompts and similarity from an encoder's files, unless they are given."""

    def read(file_name: str) -> Any:
        return _read(name_or_path, file_name, options)

    positions = num_positions(encoder_config) or 512
    # Some tokenizers use a huge length for "no limit". Encoders with a long context use 512 tokens by default.
    settings: dict[str, Any] = {"max_length": min(tokenizer.model_max_length, positions, 512)}
    modules = read("modules.json")
    if modules is None:
        return settings | chosen_prompts(name_or_path, {}, given)
    kinds = [_kind(module) for module in modules]
    _refuse_unknown_modules(name_or_path, kinds)
    settings["normalize_features"] = [kind for kind in kinds if kind != "Dropout"][-1] == "Normalize"
    layers = [_layer(name_or_path, layer, config) for layer, config in _dense_modules(modules, read)]
    if layers and "pooled_layers" not in given:
        settings["pooled_layers"] = layers
    length = _length(name_or_path, modules, tokenizer, read)
    if length is not None:
        settings["max_length"] = min(length, positions)
    described = read(_SETTINGS) or {}
    prompts = chosen_prompts(name_or_path, described.get("prompts") or {}, given)
    default = _role(described.get("default_prompt_name"))
    settings |= prompts | ({"default_prompt_name": default} if default else {})
    if not settings["normalize_features"]:  # else cosine is the dot product
        settings["encoder_similarity"] = _similarity(name_or_path, described.get("similarity_fn_name"))
    for module in modules:
        if _kind(module) == "Pooling":
            pooling = read(f"{module['path']}/config.json") or {}
            has_prompt = any(prompts.values())
            settings["pooling"] = given.get("pooling") or _pooling_name(name_or_path, pooling, has_prompt=has_prompt)
    return settings


def _similarity(name_or_path: str, name: str | None) -> str:
    if name is not None and name not in SIMILARITIES:
        logger.warning(
            "The vectors of %s are meant to be compared by %s, which is not supported: they are compared by cosine.",
            Path(name_or_path).name,
            name,
        )
    return name if name in SIMILARITIES else "cosine"


def _length(name_or_path: str, modules: list[dict[str, Any]], tokenizer: Any, read: Any) -> int | None:
    """Return the maximum length in the transformer's own settings; refuse lower case that the tokenizer lacks."""
    folder = f"{subfolder}/" if (subfolder := _transformer_path(modules)) else ""
    found: dict[str, Any] = next(filter(None, (read(folder + name) for name in _LENGTH_FILES)), {})
    if found.get("do_lower_case") and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]:
        raise ValueError(f"{name_or_path} lowercases texts before its tokenizer does, which is not supported.")
    options = {name: value for key in _OPTIONS_OF_PARTS for name, value in (found.get(key) or {}).items()}
    if others := sorted(options.keys() - _OPTIONS_WITHOUT_EFFECT):
        raise ValueError(f"{name_or_path} loads its encoder or tokenizer with {others[0]}, which is not supported.")
    return found.get("max_seq_length") or options.get("model_max_length")


def chosen_prompts(name_or_path: str, in_files: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, str]:
    """Return `query_prompt` and `document_prompt`: as given, or those of the files, or, for `auto`, published ones."""
    own = {
        role: next(filter(None, (in_files.get(name) for name in names)), "")
        for role, names in _NAMES_OF_PROMPTS.items()
    }
    published = own if any(own.values()) else published_prompts(name_or_path)
    asked = {role: given.get(f"{role}_prompt") for role in own}
    if asked["query"] is None and not any(own.values()):
        _say_what_is_not_used(name_or_path, published, [name for name, prompt in in_files.items() if prompt])
    if asked["query"] == AUTO and asked["document"] is None:
        asked["document"] = AUTO
    if AUTO in asked.values() and published is None:
        raise ValueError(
            f"`query_prompt` auto takes the prompts that an encoder's makers publish, and those of {name_or_path} are "
            "not known: write the prompt itself, or leave it out."
        )
    sources: dict[Any, dict[str, str]] = {None: own, AUTO: published or own}
    return {f"{role}_prompt": sources[text][role] if text in sources else str(text) for role, text in asked.items()}


def published_prompts(name_or_path: str) -> dict[str, str] | None:
    """Return the prompts that the makers of a well-known encoder publish outside its files, or None.

    >>> published_prompts("intfloat/e5-base-v2")
    {'query': 'query: ', 'document': 'passage: '}
    """
    # `models--owner--name/snapshots/commit` is a folder of the Hub's cache.
    names = [part.rsplit("--", 1)[-1].lower() for part in Path(name_or_path).parts[-3:]]
    for pattern, query, document in _PUBLISHED_PROMPTS:
        if re.fullmatch(pattern, names[-1]) or (names[1:2] == ["snapshots"] and re.fullmatch(pattern, names[0])):
            return {"query": query, "document": document}
    return None


def _say_what_is_not_used(name_or_path: str, published: Mapping[str, str] | None, others: list[str]) -> None:
    name = Path(name_or_path).name
    if published is not None:
        quoted = " and ".join(f"{prompt!r} before {role} texts" for role, prompt in published.items() if prompt)
        logger.warning(
            "The makers of %s put %s; its files do not say so, and nothing is put there: set query_prompt "
            "(--query_prompt) to auto for that, or to '' for nothing.",
            name,
            quoted,
        )
    elif others:
        logger.warning(
            "%s has prompts of other names than query and document (%s), and none is used: set query_prompt "
            "(--query_prompt) to the text of the right one, or to '' for nothing.",
            name,
            ", ".join(others),
        )


def _role(prompt_name: str | None) -> str | None:
    return next((role for role, names in _NAMES_OF_PROMPTS.items() if prompt_name in names), None)


def _kind(module: dict[str, Any]) -> str:
    return module["type"].rsplit(".", 1)[-1]


def _refuse_unknown_modules(name_or_path: str, kinds: list[str]) -> None:
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize", "Dropout", "Dense")]
    if unknown:
        raise ValueError(
            f"{name_or_path} has a module {unknown[0]}, which is not supported: only Transformer, Pooling, Dense, "
            "Normalize and Dropout are. Take another encoder, or its plain transformer alone."
        )


def transformer_options(name_or_path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that load an encoder and its tokenizer, which in old folders lie in one of their own."""
    subfolder = _transformer_path(_read(name_or_path, "modules.json", options) or [])
    return {**options, **({"subfolder": subfolder} if subfolder else {})}


def adapted_encoder(name_or_path: str, options: dict[str, Any]) -> str | None:
    """Return the name of the encoder that an adapter's folder is for; None if the folder has an encoder of its own."""
    options = {key: value for key, value in options.items() if key != "trust_remote_code"}
    if _read(name_or_path, "config.json", options) is not None:
        return None
    return (_read(name_or_path, "adapter_config.json", options) or {}).get("base_model_name_or_path")


def place_of(file: str, name_or_path: str, adapted: str | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where a file of an encoder is, and the options to read it: of an adapter without it, its encoder's."""
    if adapted is None or _read(name_or_path, file, options) is not None:
        return name_or_path, options
    return adapted, {}


def _transformer_path(modules: list[dict[str, Any]]) -> str:
    return next((module["path"] for module in modules if _kind(module) == "Transformer"), "")


def _dense_modules(modules: list[dict[str, Any]], read: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield `(module, its config.json)` of the Dense modules; `normalized` says if a Normalize stands before one."""
    is_normalized = False
    for module in modules:
        kind = _kind(module)
        if kind == "Dense":
            yield {**module, "normalized": is_normalized}, read(f"{module['path']}/config.json") or {}
        if kind != "Dropout":
            is_normalized = kind == "Normalize"


def _layer(name_or_path: str, module: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of `config.pooled_layers`."""
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1].lower()
    is_whole = config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    if activation not in ACTIVATIONS or config.get("use_residual") or not is_whole or "out_features" not in config:
        raise ValueError(
            f"{name_or_path} has a Dense module in {module['path']} that is not supported ({config}): the activations "
            f"{', '.join(ACTIVATIONS)} are, without a residual connection."
        )
    return {
        "out_dim": config["out_features"],
        "bias": bool(config.get("bias", True)),
        "activation": activation,
        "normalize_input": module["normalized"],
    }


def load_pooled_layers(layers: PooledLayers, name_or_path: str, options: dict[str, Any]) -> None:
    """Copy the weights of an encoder's Dense modules."""
    modules = _read(name_or_path, "modules.json", options) or []
    paths = [module["path"] for module in modules if _kind(module) == "Dense"]
    for layer, path in zip(layers, paths, strict=True):
        file: Any = cached_file(
            name_or_path, f"{path}/model.safetensors", _raise_exceptions_for_missing_entries=False, **options
        )
        if file is None:
            file = cached_file(name_or_path, f"{path}/pytorch_model.bin", **options)
            weights = torch.load(file, map_location="cpu", weights_only=True)
        else:
            weights = load_file(file)
        try:
            layer.load_state_dict({name: weight.float() for name, weight in weights.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{name_or_path} has a Dense module in {path} whose weights do not fit: {reason}"
            ) from error


def _pooling_name(name_or_path: str, pooling: dict[str, Any], *, has_prompt: bool) -> str:
    if pooling.get("include_prompt") is False and has_prompt:
        raise ValueError(
            f"{name_or_path} has prompts and leaves them out of its pooling (include_prompt), which is not supported."
        )
    names = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last"}
    names |= {"max": "max", "max_tokens": "max", "mean_sqrt_len_tokens": "mean_sqrt"}
    names |= {"weightedmean": "weighted_mean", "weightedmean_tokens": "weighted_mean"}
    # One name or several; older folders have one boolean per mode instead.
    modes = pooling.get("pooling_mode")
    if modes is None:
        modes = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    chosen = [mode.removeprefix("pooling_mode_") for mode in ([modes] if isinstance(modes, str) else modes)]
    if len(chosen) != 1 or chosen[0] not in names:
        raise ValueError(
            f"{name_or_path} uses the pooling {' and '.join(chosen) or 'of no known name'}; one of mean, cls, "
            f"last, max, mean_sqrt and weighted_mean is supported: pass it as `pooling`."
        )
    return names[chosen[0]]
