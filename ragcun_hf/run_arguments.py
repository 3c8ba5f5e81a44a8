"""The flags that every training script has, by what they are about."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .command_line import argument
from .errors import UserError
from .features.base_models import DEFAULT_BASE_MODEL, load_base_model
from .run_output import source_name

if TYPE_CHECKING:
    from .features.feature_store import FeatureStore
    from .modeling_isotropic_gaussian import IsotropicGaussianModel
    from .training_arguments import IsotropicGaussianTrainingArguments


@dataclass
class ModelArguments:
    """The encoder and the head that is trained on it; unset fields follow the encoder's own settings."""

    base_model: str = argument(
        DEFAULT_BASE_MODEL,
        "The encoder: a Hub id, a folder, or the word embedded (the all-MiniLM-L6-v2 of the demo extra).",
    )
    base_revision: str | None = argument(None, "Branch, tag or commit of the encoder on the Hub.")
    use_predictor: bool = argument(False, "Add a predictor of the document's embedding.")
    freeze_base: bool = argument(True, "Keep the encoder fixed; its features are then computed once per text.")
    freeze_layers: int = argument(0, "With --no_freeze_base: keep the embeddings and the first k layers fixed.")
    output_dim: int | None = argument(None, "Width of the embedding. Default: the encoder's.")
    projection_kind: str = argument("mlp", "mlp or linear.")
    projection_init: str = argument("identity", "identity (start at the encoder's vectors) or random.")
    whitening: float = argument(
        0.0, "Partial whitening of an identity start, in [0, 0.5]: 0 none, 0.5 nearly full; 0.1 to 0.3 can help."
    )
    projection_hidden_dim: int | None = argument(None, "Width inside the projection. Default: twice the encoder's.")
    predictor_hidden_dim: int | None = argument(None, "Width inside the predictor. Default: twice the embedding's.")
    dropout: float = argument(0.1, "Dropout inside projection and predictor, in [0, 1).")
    pooling: str | None = argument(None, "mean, cls or last.")
    normalize_features: bool | None = argument(None, "Scale pooled vectors to unit length, true or false.")
    similarity_fn_name: str = argument(
        "cosine", "How embeddings are compared: cosine, dot or euclidean.", "--similarity"
    )
    query_prompt: str | None = argument(None, "Text put before every query.")
    document_prompt: str | None = argument(None, "Text put before every document.")
    max_length: int | None = argument(None, "Tokens kept per text.")

    def build(self) -> IsotropicGaussianModel:
        """Load the encoder and put the head on it."""
        self.check_values()
        chosen = self.config_fields()
        if self.freeze_base and Path(self.base_model).is_dir():
            # A frozen base is never loaded again: its name is enough, and says nothing of this machine's folders.
            chosen["base_model_name"] = source_name(self.base_model)
        return load_base_model(self.base_model, revision=self.base_revision, **chosen)

    def check_values(self) -> None:
        """Raise UserError where the start cannot be; the config checks the other values."""
        if not 0 <= self.whitening <= 0.5:
            raise UserError(f"--whitening must be in [0, 0.5], got {self.whitening}: set it to e.g. 0.2")
        if self.whitening and self.projection_init != "identity":
            raise UserError(
                f"--whitening {self.whitening} needs --projection_init identity, got {self.projection_init}: "
                "a random start has nothing to whiten"
            )

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of the model's config that these flags set."""
        names = {field.name for field in fields(self)} - {"base_model", "base_revision", "whitening"}
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class FeatureArguments:
    """How the encoder's features are computed and kept."""

    feature_cache: bool = argument(True, "Compute the features of each text once and keep them on disk.")
    feature_cache_dir: str | None = argument(None, "Folder of the feature cache. Default: inside HF_HOME.")
    feature_dtype: Literal["float32", "float16"] = argument(
        "float32", "Of the features on disk: float32, or float16 for half the room and about three decimal digits."
    )
    encoder_dtype: str = argument(
        "auto", "Arithmetic of the encoder: float32, bfloat16, or auto: bfloat16 where the processor has it."
    )
    encoder_backend: Literal["torch", "openvino"] = argument(
        "torch", "What runs the encoder: torch, or openvino (CPU only, faster, needs the extra of that name)."
    )

    def needs_store(self) -> bool:
        """Tell whether a flag asks for what only precomputed features can have."""
        return (self.feature_dtype, self.encoder_backend) != ("float32", "torch") or self.encoder_dtype == "bfloat16"

    def store(self, model: IsotropicGaussianModel, *, show_progress: bool = True) -> FeatureStore:
        """Make a feature store for a model, which all processes use alike; without the cache it keeps nothing."""
        from .features.feature_store import FeatureStore, default_cache_folder

        folder = Path(self.feature_cache_dir) if self.feature_cache_dir else default_cache_folder()
        return FeatureStore(
            model,
            cache_folder=folder if self.feature_cache else None,
            dtype=self.encoder_dtype,
            backend=self.encoder_backend,
            feature_dtype=self.feature_dtype,
            show_progress=show_progress,
            is_shared=True,
        )


@dataclass
class ValidationArguments:
    """What is held out to choose the checkpoint by."""

    val_data: str | None = argument(
        None,
        "Held-out query-document pairs: eval_loss and NDCG@10 after every epoch (or --eval_steps), best checkpoint "
        "kept, unless --blend goes back from the last one.",
    )
    val_split: str | None = argument(None, "Split of --val_data. Default: as --split.")
    val_fraction: float = argument(
        0.0, "Without --val_data: share of the documents held out (with their queries), in [0, 1)."
    )


@dataclass
class ParsedArguments:
    """All arguments of a training script, by what they are about."""

    data: Any
    validation: ValidationArguments
    model: ModelArguments
    features: FeatureArguments
    run: RunArguments
    training: IsotropicGaussianTrainingArguments

    @property
    def uses_cached_features(self) -> bool:
        """Whether the head trains on features computed once; else every step runs the encoder."""
        return self.model.freeze_base and self.features.feature_cache


@dataclass
class RunArguments:
    """What happens around the training itself."""

    overwrite: bool = argument(False, "Replace the model that an earlier run left in the output folder.")
    blend: float = argument(
        1.0,
        "How far from the start to the trained weights the saved head lies, in [0, 1]: 1 all the way, less keeps more "
        "of the frozen base.",
    )
    measure_energy: bool = argument(
        False, "Estimate the energy of encoding and training for record and card; needs the extra energy."
    )
