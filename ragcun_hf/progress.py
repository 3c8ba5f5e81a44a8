"""One readable line per log, beside the Trainer's own progress bar and its time left."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback

_LABELS = {
    "loss": "loss",
    "loss/contrastive": "contrastive",
    "loss/isotropy": "isotropy",
    "loss/predictive": "predictive",
    "embedding_std": "std",
    "effective_rank": "rank",
    "sigreg": "sigreg",
    "eval_loss": "eval loss",
    "eval_ndcg@10": "eval NDCG@10",
    "eval_ndcg@10_predictor": "by predictor",
    "train_runtime": "training seconds",
}


class TermsProgressCallback(ProgressCallback):
    """Show the terms and collapse measures of each log; the whole of it stays in the training record."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line above the bar."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        parts = [f"{label} {logs[key]:.4g}" for key, label in _LABELS.items() if key in logs]
        if parts:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts))
