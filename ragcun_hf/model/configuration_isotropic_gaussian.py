# Licensed under the Apache License, Version 2.0. This file travels with every published model.
"""Configuration of the isotropic-Gaussian retrieval model."""

import math
from typing import Any

try:
    from huggingface_hub.dataclasses import strict
    from transformers import AutoConfig, PreTrainedConfig
except ImportError as error:
    import transformers

    raise ImportError(
        "This model needs transformers 5.20 or newer (and, for SentenceTransformer, sentence-transformers 6), got "
        f"transformers {transformers.__version__}: run pip install -U transformers sentence-transformers, or ask for "
        "the model as a plain sentence-transformers folder (ragcun export --format sentence-transformers)."
    ) from error

from .pooling_isotropic_gaussian import ACTIVATIONS, POOLINGS, pooled_width

SIMILARITIES = ("cosine", "dot", "euclidean")
_CHOICES = {
    "pooling": POOLINGS,
    "projection_kind": ("mlp", "linear"),
    "projection_init": ("identity", "random"),
    "similarity_fn_name": SIMILARITIES,
    "encoder_similarity": SIMILARITIES,
    "default_prompt_name": (None, "query", "document"),
}

# These families number positions from pad_token_id + 1, so the first rows of the position table are unused.
_FAMILIES_WITH_POSITION_OFFSET = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


@strict
class IsotropicGaussianConfig(PreTrainedConfig):
    """Configuration of an [`IsotropicGaussianModel`]: a (frozen) encoder, a projection, an optional predictor.

    Widths: H is that of the encoder's vectors, L that of the lexical half (0 without one), D that of the embedding.

    Args:
        encoder_config: Configuration of the encoder, as an object or a dict with `model_type`; any encoder that
            `AutoModel` supports. Default: MPNet base.
        base_model_name: Where the encoder's weights came from. Loading a model reads nothing from there. Evaluating
            one with a trained encoder does, for the row of the untrained one.
        base_model_revision: Its branch, tag or commit on the Hub, if one was given.
        pooling: How token states become one vector: `mean` of the attended tokens, `cls` (the first attended token),
            `last` (the last attended token, for decoder-style encoders), `max`, `mean_sqrt` (the sum divided by the
            square root of their number) or `weighted_mean` (later tokens weigh more).
        pooled_layers: Dense layers that the encoder's makers put behind the pooling, in order. Each is a dictionary of
            `out_dim`, `bias`, `activation` (`identity`, `tanh`, `gelu` or `relu`) and `normalize_input` (to unit
            length). They belong to the encoder: frozen with it, and part of its features.
        normalize_features: Normalize the encoder's vectors to unit length, as most sentence encoders do.
        encoder_similarity: How the encoder's makers compare its vectors: `cosine`, `dot` or `euclidean`. The untrained
            encoder is ranked so wherever it is compared with the model.
        lexical_dim: L, the width of the lexical half, which holds exact words; 0 for none. See
            [`~IsotropicGaussianModel.fit_lexical`].
        lexical_weight: Its share of the cosine similarity of two features, in [0, 1).
        lexical_scale: The length of the lexical half before weighting: that of the encoder's features.
        feature_scale: Factor applied to the features before the projection. Default: sqrt(H) for unit-length features,
            which gives coordinates about unit variance, as N(0, I) has; 1 otherwise.
        output_dim: D, the width of the embedding. Default: H.
        projection_kind: `mlp` or `linear`.
        projection_init: `identity` starts at the encoder's own vectors: the linear part is the identity (orthonormal
            directions if D differs from H) and ignores the lexical half, and the MLP is a residual branch whose last
            layer starts at zero. `random` is a randomly initialized MLP (Linear, GELU, Dropout, Linear) or a single
            random linear layer.
        projection_hidden_dim: Hidden width of the projection's MLP. Default: 2 * H.
        dropout: Dropout in the MLPs of the projection and the predictor, in [0, 1).
        use_predictor: Add a predictor D -> D that predicts the document's embedding from the query's.
        predictor_hidden_dim: Hidden width of the predictor's MLP. Default: 2 * D.
        similarity_fn_name: How embeddings are compared in search: `cosine`, `dot` or `euclidean`. With `cosine`, the
            vectors of `encode*`, sentence-transformers and exports have unit length, so that every metric of a vector
            store ranks alike; those of `forward` never do.
        query_prompt: Text prepended to every query.
        document_prompt: Text prepended to every document.
        default_prompt_name: Which prompt `encode` adds if none is named: `query`, `document`, or None for no prompt.
        max_length: Maximum number of tokens per text, special tokens included.
        relevance_calibration: How the probability that the best document is relevant follows from scores: the sigmoid
            of `bias` + `score` * its score + `margin` * its distance from the second score. Also how it was fitted:
            `num_queries`, `num_documents`. None if that is not known.
        freeze_base: Freeze the whole encoder: no gradient and no dropout, in training and after loading.
        freeze_layers: With `freeze_base=False`, freeze the embeddings and the first k layers.
        freeze_documents: Documents keep the vectors of the frozen encoder, so that an index of these stays as it is;
            only queries go through the head. The model has no lexical half, and embeddings are as wide as the encoder.

    Raises:
        ValueError: If a value is out of range. The message names the field.

    Example:
        >>> from ragcun_hf import IsotropicGaussianConfig
        >>> config = IsotropicGaussianConfig(output_dim=512, use_predictor=True)
        >>> config.encoder_dim, config.output_dim
        (768, 512)
    """

    model_type = "isotropic_gaussian"
    sub_configs = {"encoder_config": AutoConfig}

    encoder_config: dict | PreTrainedConfig | None = None
    base_model_name: str | None = None
    base_model_revision: str | None = None
    pooling: str = "mean"
    pooled_layers: list | None = None
    normalize_features: bool = True
    encoder_similarity: str = "cosine"
    lexical_dim: int = 0
    lexical_weight: int | float = 0.3
    lexical_scale: int | float = 1.0
    feature_scale: int | float | None = None
    output_dim: int | None = None
    projection_kind: str = "mlp"
    projection_init: str = "identity"
    projection_hidden_dim: int | None = None
    dropout: int | float = 0.1
    use_predictor: bool = False
    predictor_hidden_dim: int | None = None
    similarity_fn_name: str = "cosine"
    query_prompt: str = ""
    document_prompt: str = ""
    default_prompt_name: str | None = None
    max_length: int = 384
    relevance_calibration: dict | None = None
    freeze_base: bool = True
    freeze_layers: int = 0
    freeze_documents: bool = False
    initializer_range: int | float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the nested configuration, fill in the default widths, and check every value."""
        self.encoder_config = _as_config(self.encoder_config)
        self._check_pooled_layers()
        if self.output_dim is None:
            self.output_dim = self.encoder_dim
        if self.projection_hidden_dim is None:
            self.projection_hidden_dim = 2 * self.encoder_dim
        if self.predictor_hidden_dim is None:
            self.predictor_hidden_dim = 2 * self.output_dim
        if self.feature_scale is None:
            self.feature_scale = math.sqrt(self.encoder_dim) if self.normalize_features else 1.0
        super().__post_init__(**kwargs)
        self._check_values()

    @property
    def encoder_dim(self) -> int:
        """H, the width of the encoder's vectors."""
        return pooled_width(self.encoder_config.get_text_config().hidden_size, self.pooled_layers)

    @property
    def feature_dim(self) -> int:
        """H + L, the width of a feature, which is the projection's input."""
        return self.encoder_dim + self.lexical_dim

    @property
    def has_unit_vectors(self) -> bool:
        """Whether vectors leave the model for search with unit length."""
        return self.similarity_fn_name == "cosine"

    @property
    def hidden_size(self) -> int:
        """D, under the name that other libraries expect."""
        return self.output_dim

    def _check_values(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}."
                )
        for name in ("output_dim", "projection_hidden_dim", "predictor_hidden_dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}.")
        if self.lexical_dim < 0 or not 0 <= self.lexical_weight < 1:
            raise ValueError(
                f"`lexical_dim` must be at least 0 and `lexical_weight` in [0, 1), got {self.lexical_dim} and "
                f"{self.lexical_weight}."
            )
        if not (self.feature_scale > 0 and math.isfinite(self.feature_scale)):
            raise ValueError(f"`feature_scale` must be a finite number above 0, got {self.feature_scale}.")
        self._check_calibration()
        self._check_lengths_and_layers()
        if self.freeze_documents:
            self._check_frozen_documents()

    def _check_frozen_documents(self) -> None:
        """Refuse what would give documents other vectors than those of the frozen encoder."""
        if self.output_dim != self.encoder_dim:
            raise ValueError(
                f"`freeze_documents` needs an `output_dim` of the encoder's {self.encoder_dim}, as documents keep its "
                f"vectors, got {self.output_dim}: leave one of them out."
            )
        if self.lexical_dim or not self.freeze_base:
            raise ValueError(
                "`freeze_documents` needs a frozen encoder without a lexical half, whose vectors documents keep, got "
                f"`lexical_dim` {self.lexical_dim} and `freeze_base` {self.freeze_base}: leave one of them out."
            )
        if self.feature_scale != 1 and not self.has_unit_vectors:
            raise ValueError(
                f"`freeze_documents` needs `similarity_fn_name` cosine, got {self.similarity_fn_name}: documents "
                f"would have {self.feature_scale:.4g} times the length of the encoder's vectors."
            )

    def _check_pooled_layers(self) -> None:
        for layer in self.pooled_layers or ():
            is_whole = isinstance(layer, dict) and layer.keys() == {"out_dim", "bias", "activation", "normalize_input"}
            if not is_whole or layer["activation"] not in ACTIVATIONS:
                raise ValueError(
                    "`pooled_layers` must be dictionaries of out_dim, bias, activation (one of "
                    f"{', '.join(ACTIVATIONS)}) and normalize_input, got {layer!r}."
                )

    def _check_calibration(self) -> None:
        found = self.relevance_calibration
        if found is None:
            return
        are_numbers = all(type(value) in (int, float) and math.isfinite(value) for value in found.values())
        if not are_numbers or not {"bias", "score", "margin"} <= found.keys():
            raise ValueError(
                f"`relevance_calibration` must have the finite numbers bias, score and margin, got {found!r}."
            )

    def _check_lengths_and_layers(self) -> None:
        positions = num_positions(self.encoder_config)
        if positions is not None and self.max_length > positions:
            raise ValueError(
                f"`max_length` must be at most the encoder's {positions} positions, got {self.max_length}."
            )
        num_layers = self.encoder_config.get_text_config().num_hidden_layers
        if not 0 <= self.freeze_layers <= num_layers:
            raise ValueError(
                f"`freeze_layers` must be between 0 and the encoder's {num_layers}, got {self.freeze_layers}."
            )
        if self.freeze_base and self.freeze_layers:
            raise ValueError(
                f"`freeze_layers` needs `freeze_base=False` (all layers are frozen already), got {self.freeze_layers}."
            )


def num_positions(encoder_config: PreTrainedConfig) -> int | None:
    """Return the maximum number of tokens of an encoder, or None if its configuration has no limit."""
    text_config = encoder_config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and positions < 1:  # XLNet's -1 is no limit
        return None
    if positions is not None and text_config.model_type in _FAMILIES_WITH_POSITION_OFFSET:
        positions -= text_config.pad_token_id + 1
    return positions


def _as_config(encoder_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(encoder_config, PreTrainedConfig):
        return encoder_config
    values = dict(encoder_config or {})
    model_type = values.pop("model_type", "mpnet")
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise ValueError(
            f"`encoder_config` has a `model_type` that transformers does not know: {model_type!r}."
        ) from error


IsotropicGaussianConfig.register_for_auto_class()
