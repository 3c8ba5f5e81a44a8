"""Flags of how features are computed and kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..command_line import argument

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from .feature_store import FeatureStore


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
        from .feature_store import FeatureStore, default_cache_folder

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
