"""Evaluate a model on BEIR data sets, with the frozen base beside it.

    python training/eval_beir.py --model_path checkpoints/jepa_10k --use_predictor --datasets scifact nfcorpus arguana

Without --model_path, the encoder that --base_model names is evaluated as it is. Writes a table to the screen, a
results file, TREC run files and, for a trained model, plots.

    python training/eval_beir.py --compare checkpoints/a checkpoints/b --datasets scifact

compares models with each other and with the frozen base, query by query.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from datetime import UTC
from pathlib import Path
from typing import Any, Literal

from ..command_line import argument, parse_arguments, portable_command, quiet_libraries, say
from ..features.arguments import FeatureArguments


@dataclass
class EvaluationArguments:
    """What to evaluate, on what, and where the figures go."""

    model_path: str | None = argument(None, "A trained model: its folder or its Hub id.")
    revision: str | None = argument(None, "Branch, tag or commit of a model or an encoder on the Hub.")
    base_model: str | None = argument(
        None, "An encoder to evaluate without a head: a Hub id, a folder, or the word embedded."
    )
    compare: list[str] = argument(
        [], "Models to compare with each other and with the frozen base of the first: folders or Hub ids."
    )
    use_predictor: bool = argument(False, "Also search with the predictor's output as the query vector.")
    datasets: list[str] = argument(
        ["scifact", "nfcorpus", "arguana"], "BEIR data sets, by name; your own is a folder inside --data_dir."
    )
    data_dir: str = argument("data/beir", "Folder with one BEIR folder per data set; missing ones are downloaded.")
    split: str = argument("test", "Which judgements to use.")
    output_dir: str = argument(
        "results", "Where the results file, the run files and, for a trained model, the plots go."
    )
    run_name: str | None = argument(None, "Name of the results. Default: the model folder's name.")
    top_k: int = argument(100, "Documents kept per query, at least 100 for the official figures.")
    keep_identical_ids: bool = argument(
        False, "Keep a document that has the query's own id in its ranking; BEIR drops it."
    )
    search: Literal["exact", "faiss"] = argument(
        "exact",
        "exact compares every pair; faiss looks into some lists only, and reports what it missed (needs the "
        "extra of that name): for millions of documents with thousands of queries.",
    )
    faiss_probes: int = argument(32, "With --search faiss: lists that each query looks into; more find more.")


def main(arguments: list[str] | None = None) -> None:
    """Parse, evaluate, write, and say what was written."""
    args, features = parse_arguments(
        [EvaluationArguments, FeatureArguments], description=__doc__ or "", arguments=arguments
    )
    quiet_libraries()
    _check(args)
    from ..data.beir_folder import find_beir_dataset
    from ..distributed import rank
    from ..files import disk_errors_explained

    datasets = [find_beir_dataset(name, args.data_dir, args.split) for name in dict.fromkeys(args.datasets)]
    _check_ids(datasets)
    if args.compare:
        _compare(args, features, datasets, arguments)
        return
    search = _search(args)
    model, store, evaluation = _evaluate(args, features, datasets, search)
    facts = _search_facts(args, search)
    if rank() == 0:
        with disk_errors_explained(Path(args.output_dir)):
            _write(args, model, store, facts, evaluation, arguments)


def _evaluate(args: EvaluationArguments, features: FeatureArguments, datasets: list[Any], search: Any) -> Any:
    """Load the model, search all data sets with it, and return it with its features and figures."""
    from ..evaluation.model_evaluation import evaluate_model, load_seen_digests

    model, base_model = _load(args)
    store = _store(features, model)
    evaluation = evaluate_model(
        model,
        datasets,
        store=store,
        base_store=None if base_model is None else _store(features, base_model),
        base_prompts=_prompts(base_model),
        base_only=args.model_path is None,
        # In a comparison the models that have none do without.
        use_predictor=args.use_predictor and not (args.compare and model.predictor is None),
        drop_identical_ids=not args.keep_identical_ids,
        k=args.top_k,
        seen_document_digests=load_seen_digests(args.model_path) if args.model_path else (),
        search=search,
        folder=args.output_dir,
    )
    say(store.summary())
    return model, store, evaluation


def _compare(
    args: EvaluationArguments, features: FeatureArguments, datasets: list[Any], arguments: list[str] | None
) -> None:
    """Evaluate every model, compare all pairs, write, draw, and say so."""
    from ..distributed import rank
    from ..evaluation.comparison_report import format_comparison, plot_comparison_of_models
    from ..evaluation.model_comparison import compare_models, gather, system_names
    from ..evaluation.model_evaluation import load_seen_digests
    from ..evaluation.results import write_json
    from ..files import disk_errors_explained

    evaluations, settings = {}, {}
    for name, path in zip(system_names(args.compare), args.compare, strict=True):
        say(f"Evaluating {name}")
        search = _search(args)  # one for each model, for it remembers what it missed
        model, store, evaluations[name] = _evaluate(replace(args, model_path=path), features, datasets, search)
        facts = _search_facts(args, search)
        settings[name] = {"model": _model_facts(args, model, name), "settings": _settings(args, model, store, facts)}
    seen = {name: load_seen_digests(path) for name, path in zip(evaluations, args.compare, strict=True)}
    comparison = compare_models(gather(datasets, evaluations, seen))
    if rank() != 0:
        return
    folder, name = Path(args.output_dir), args.run_name or "comparison"
    with disk_errors_explained(folder):
        write_json(folder / f"{name}.json", {**_facts(arguments), "models": settings, **comparison})
        plot_comparison_of_models(comparison, folder / f"{name}.png")
    say(f"{format_comparison(comparison)}\n\nWrote {folder / name}.json and {folder / name}.png.")


def _check(args: EvaluationArguments) -> None:
    from ..errors import UserError
    from ..files import check_writable

    if sum(map(bool, (args.model_path, args.base_model, args.compare))) != 1:
        raise UserError(
            "expected one of --model_path, --base_model and --compare, got several or none: give one of them"
        )
    if args.top_k < 100:
        raise UserError(f"--top_k must be at least 100 for MAP@100 and recall@100, got {args.top_k}: raise it")
    if args.use_predictor and args.base_model:
        raise UserError("--use_predictor expects a trained model, got --base_model: name one with --model_path")
    if not args.datasets:
        raise UserError("--datasets expects at least one BEIR data set, got none: name one, such as scifact")
    check_writable(Path(args.output_dir))


def _check_ids(datasets: list[Any]) -> None:
    """Tell now what the run files could not hold after all the work."""
    from ..evaluation.ranking import check_trec_ids

    for dataset in datasets:
        check_trec_ids(dataset.queries, f"query id of {dataset.name}")
        check_trec_ids(dataset.corpus_ids, f"document id of {dataset.name}")


def _load(args: EvaluationArguments) -> tuple[Any, Any]:
    """Return the model and, where its encoder was trained too, the untrained base to stand beside it."""
    from ..model.base_models import load_base_model, load_trained_model, load_untrained_base

    if args.base_model:
        return load_base_model(args.base_model, revision=args.revision), None
    model = load_trained_model(args.model_path or "", revision=args.revision)
    return model, None if model.config.freeze_base else load_untrained_base(model)


def _prompts(base_model: Any) -> tuple[str, str]:
    return ("", "") if base_model is None else (base_model.config.query_prompt, base_model.config.document_prompt)


def _store(features: FeatureArguments, model: Any) -> Any:
    from accelerate import PartialState

    model.to(PartialState().device)
    return features.store(model)


def _search(args: EvaluationArguments) -> Any:
    from ..search.approximate import MeasuredSearch, require_faiss
    from ..search.exact import exact_search

    if args.search == "exact":
        return exact_search
    require_faiss()
    return MeasuredSearch(num_probes=args.faiss_probes)


def _search_facts(args: EvaluationArguments, search: Any) -> dict[str, Any]:
    from ..distributed import gather_objects

    if args.search == "exact":
        return {"search": "exact"}
    recalls = [recall for part in gather_objects(search.recalls) for recall in part]
    recall = sum(recalls) / len(recalls)
    say(f"Searched with faiss: {recall:.4f} of what an exact search finds, on a sample of the queries.")
    return {"search": "faiss", "faiss_probes": args.faiss_probes, "recall_of_exact_search": round(recall, 4)}


def _write(
    args: EvaluationArguments,
    model: Any,
    store: Any,
    search_facts: dict[str, Any],
    evaluation: Any,
    arguments: list[str] | None,
) -> None:
    from ..evaluation.results import format_results_table, write_results

    name = args.run_name or _run_name(args, model)
    results = {
        **_facts(arguments),
        "model": _model_facts(args, model, name),
        "settings": _settings(args, model, store, search_facts),
        "datasets": evaluation.datasets,
        "mean": evaluation.mean,
        "isotropy": evaluation.isotropy,
    }
    folder = Path(args.output_dir)
    results_path = folder / f"{name}.json"
    write_results(results_path, results)
    say(format_results_table(results))
    _write_runs(folder / name, name, evaluation)
    if not args.model_path:
        say(f"\nWrote {results_path}, and run files in {folder / name}.")
        return
    _draw(folder / name, results, evaluation)
    say(f"\nWrote {results_path}, and run files and plots in {folder / name}.")
    paths = f"--model_path {shlex.quote(args.model_path)} --results {shlex.quote(str(results_path))}"
    say(f"Next: python training/render_card.py {paths}")


def _facts(arguments: list[str] | None) -> dict[str, Any]:
    from datetime import datetime

    from ..evaluation.results import SCHEMA_VERSION, environment_facts

    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": portable_command("training/eval_beir.py", arguments),
        **environment_facts(),
    }


def _settings(args: EvaluationArguments, model: Any, store: Any, search_facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "split": args.split,
        "max_length": model.config.max_length,
        "document_text": "title + ' ' + text",
        "identical_ids_dropped": not args.keep_identical_ids,
        "top_k": args.top_k,
        **store.settings(),
        "base_similarity": "cosine",
        **search_facts,
    }


def _write_runs(folder: Path, name: str, evaluation: Any) -> None:
    from ..evaluation.ranking import write_trec_run

    for dataset in evaluation.evaluations:
        for system, run in dataset.runs.items():
            tag = re.sub(r"\s+", "_", f"{name}.{system}")
            write_trec_run(folder / f"{dataset.name}.{system}.trec", run, tag=tag)


def _draw(folder: Path, results: dict[str, Any], evaluation: Any) -> None:
    from ..evaluation.plots import plot_comparison, plot_isotropy

    plot_comparison(results, folder / "comparison.png")
    plot_isotropy(evaluation.samples["base"], evaluation.samples["projection"], folder / "isotropy.png")


def _run_name(args: EvaluationArguments, model: Any) -> str:
    if args.model_path:
        path = Path(args.model_path)
        return path.resolve().name if path.is_dir() else args.model_path.replace("/", "__")
    return "base-" + (model.config.base_model_name or "encoder").rstrip("/").split("/")[-1]


def _model_facts(args: EvaluationArguments, model: Any, name: str) -> dict[str, Any]:
    from ..files import weights_digest

    config = model.config
    return {
        "path": name if args.model_path is None or Path(args.model_path).is_dir() else args.model_path,
        "name": name,
        "similarity": config.similarity_fn_name,
        "base_model": config.base_model_name,
        "use_predictor": config.use_predictor,
        "output_dim": config.output_dim,
        "projection_init": config.projection_init,
        "projection_kind": config.projection_kind,
        "freeze_base": config.freeze_base,
        "weights_sha256": weights_digest(Path(args.model_path)) if args.model_path else None,
    }
