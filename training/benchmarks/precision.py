"""Compare NDCG@10 of the frozen base in float32 with that of each faster precision.

    python training/benchmarks/precision.py --data_dir data/beir

`make benchmark` leaves it out, because without cached features it takes half an hour on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comparison import BenchmarkArguments, at_most, figure, report, set_threads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script

_KINDS = (("float32", "torch"), ("bfloat16", "torch"), ("bfloat16", "openvino"))


@dataclass
class Arguments(BenchmarkArguments):
    """Datasets and the feature cache."""

    data_dir: str = argument("data/beir", "Folder with the BEIR datasets.")
    datasets: list[str] = argument(["scifact", "nfcorpus", "arguana"], "Names of the BEIR datasets.")
    feature_cache_dir: str | None = argument(None, "Folder of the feature cache. Default: inside HF_HOME.")


def main(arguments: list[str] | None = None) -> None:
    """Evaluate the frozen base in each precision and compare it with float32."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    set_threads(args.threads)
    from ragcun_hf.data.beir_folder import find_beir_dataset
    from ragcun_hf.model.base_models import load_base_model

    model = load_base_model("embedded")
    datasets = [find_beir_dataset(name, args.data_dir) for name in args.datasets]
    found = {f"{dtype}, {backend}": evaluate(args, model, datasets, dtype, backend) for dtype, backend in _KINDS}
    slow, *fast = found
    claims = []
    for name in args.datasets:
        claims.append(figure(f"NDCG@10 of {name}, {slow}", found[slow][name], ""))
        for kind in fast:
            difference = found[kind][name] - found[slow][name]
            claims.append(at_most(f"NDCG@10 of {name}, {kind}: {difference:+.4f}", abs(difference), 0.001, ""))
    report(args, "precision", claims, details={"ndcg@10": found})


def evaluate(args: Arguments, model: Any, datasets: list[Any], dtype: str, backend: str) -> dict[str, float]:
    """Return the base's NDCG@10 on each dataset."""
    from ragcun_hf.evaluation.model_evaluation import ModelSystems, TextEncoder, evaluate_model
    from ragcun_hf.evaluation.results import BASE_SYSTEM, MAIN_METRIC
    from ragcun_hf.features.feature_store import FeatureStore, default_cache_folder

    folder = args.feature_cache_dir or default_cache_folder()
    store = FeatureStore(model, cache_folder=folder, dtype=dtype, backend=backend)
    evaluation = evaluate_model(ModelSystems(TextEncoder(model, store), heads=()), datasets)
    return {name: entry["systems"][BASE_SYSTEM][MAIN_METRIC] for name, entry in evaluation.datasets.items()}


if __name__ == "__main__":
    run_script(main)
