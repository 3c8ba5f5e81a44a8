"""Flags of the encoder's features: precision, backend and cache."""

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
    """How the encoder's features are computed and cached."""

    feature_cache: bool = argument(True, "Compute the features of each text once and cache them on disk.")
    feature_cache_dir: str | None = argument(
        None, "Folder of the feature cache. Default: a folder inside HF_HOME.", recorded="never"
    )
    feature_dtype: Literal["float32", "float16"] = argument(
        "float32", "Type of cached features: float32, or float16 (half the disk space, about three decimal digits)."
    )
    encoder_dtype: str = argument(
        "auto",
        "Precision of the encoder: float32, bfloat16, float16 (for a GPU; more exact than bfloat16, but large numbers "
        "overflow), or auto (float16 on a GPU, else bfloat16, where they are fast and safe).",
    )
    encoder_backend: Literal["auto", "torch", "openvino"] = argument(
        "auto",
        "Library that runs the encoder: torch, openvino (CPU only), or auto (openvino where installed and faster).",
    )

    def needs_store(self) -> bool:
        """Return whether a flag has a value that only cached features support."""
        of_encoder = self.encoder_backend == "openvino" or self.encoder_dtype.endswith("16")
        return of_encoder or self.feature_dtype != "float32"

    def value_flags(self) -> dict[str, str]:
        """Return the flags that change the values of features."""
        names = ("encoder_dtype", "encoder_backend", "feature_dtype")
        return {name: getattr(self, name) for name in names}

    def store(
        self, model: IsotropicGaussianModel, *, show_progress: bool = True, is_interactive: bool = False
    ) -> FeatureStore:
        """Create the feature store of a model, shared by all processes; without the cache it keeps no features."""
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
            is_interactive=is_interactive,
        )
