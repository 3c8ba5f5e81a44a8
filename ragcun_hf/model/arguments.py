"""Flags that define the model: the encoder and its head."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from ..command_line import argument
from ..errors import UserError
from .base_models import DEFAULT_BASE_MODEL, load_base_model

if TYPE_CHECKING:
    from .modeling_isotropic_gaussian import IsotropicGaussianModel


@dataclass
class BaseArguments:
    """How an encoder without a head is used."""

    query_prompt: str | None = argument(
        None,
        "With --base_model: text prepended to every query; auto: both prompts as the makers of a well-known encoder "
        "publish them.",
    )
    document_prompt: str | None = argument(None, "With --base_model: text prepended to every document.")
    trust_remote_code: bool = argument(False, "With --base_model: run the code of an encoder that brings its own.")

    def base_fields(self, *, beside: Any = None) -> dict[str, Any]:
        """Return what `load_base_model` takes of these; beside a trained model, any of them is a UserError."""
        given = {each.name: getattr(self, each.name) for each in fields(BaseArguments)}
        given = {name: value for name, value in given.items() if value not in (None, False)}
        if given and beside:
            raise UserError(
                f"--{next(iter(given))} is for --base_model, got a trained model, which has its own: leave it out"
            )
        return given


@dataclass
class ModelArguments:
    """The encoder and the head. Fields that are not set follow the encoder's own settings."""

    base_model: str = argument(
        DEFAULT_BASE_MODEL,
        "The encoder: a Hub id, a folder, or the word embedded (the all-MiniLM-L6-v2 of the demo extra).",
    )
    base_revision: str | None = argument(None, "Branch, tag or commit of the encoder on the Hub.")
    use_predictor: bool = argument(
        False, "Add a predictor, which predicts the document's embedding from the query's.", swept="shape"
    )
    freeze_base: bool = argument(True, "Freeze the encoder. Its features are then computed once per text.")
    freeze_layers: int = argument(0, "With --no_freeze_base: freeze the embeddings and the first k layers.")
    freeze_documents: bool = argument(
        False,
        "Documents keep the vectors of the frozen encoder, so that nothing is indexed again; only queries go through "
        "the head. A lexical half is left out.",
    )
    output_dim: int | None = argument(None, "Width of the embedding. Default: the encoder's.", swept="shape")
    projection_kind: str = argument("mlp", "Kind of projection: mlp or linear.", swept="shape")
    projection_init: str = argument(
        "identity",
        "Initialization of the projection: identity (starts at the encoder's vectors) or random.",
        swept="shape",
    )
    projection_hidden_dim: int | None = argument(
        None, "Hidden width of the projection. Default: twice the encoder's width.", swept="shape"
    )
    predictor_hidden_dim: int | None = argument(
        None, "Hidden width of the predictor. Default: twice the embedding's width.", swept="shape"
    )
    dropout: float = argument(0.1, "Dropout in the projection and the predictor, in [0, 1).", swept="shape")
    pooling: str | None = argument(
        None, "How token states become one vector: mean, cls, last, max, mean_sqrt or weighted_mean."
    )
    normalize_features: bool | None = argument(None, "Normalize pooled vectors to unit length, true or false.")
    similarity_fn_name: str = argument(
        "cosine", "How embeddings are compared: cosine, dot or euclidean.", "--similarity", swept="shape"
    )
    lexical_dim: int = argument(
        0, "Width of the lexical half, which --lexical fits. Default: the encoder's width if there is one."
    )
    lexical_weight: float | None = argument(
        None, "Share of the lexical half in the similarity, in [0, 1). Default: chosen without labels."
    )
    query_prompt: str | None = argument(
        None, "Text prepended to every query; auto: both prompts as the makers of a well-known encoder publish them."
    )
    document_prompt: str | None = argument(None, "Text prepended to every document.")
    max_length: int | None = argument(None, "Maximum number of tokens per text.")

    @classmethod
    def of_config(cls, config: Any) -> Self:
        """Take the fields from a model's configuration."""
        return cls(**{each.name: getattr(config, each.name) for each in fields(cls) if hasattr(config, each.name)})

    def build(self) -> IsotropicGaussianModel:
        """Load the encoder and create the model."""
        return load_base_model(self.base_model, revision=self.base_revision, **self.config_fields())

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of `IsotropicGaussianConfig` that these flags set."""
        from .configuration_isotropic_gaussian import IsotropicGaussianConfig

        names = {field.name for field in fields(self)} & {field.name for field in fields(IsotropicGaussianConfig)}
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def changed_fields(self) -> dict[str, Any]:
        """Return the fields of `IsotropicGaussianConfig` that these flags set to other values than the defaults."""
        defaults = {each.name: each.default for each in fields(self)}
        return {name: value for name, value in self.config_fields().items() if value != defaults[name]}
