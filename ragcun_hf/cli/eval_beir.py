"""Evaluate a model on BEIR data sets, with the frozen base, BM25 and their fusion beside it.

    python training/eval_beir.py --model_path checkpoints/jepa_10k --use_predictor --datasets scifact nfcorpus arguana

With --base_model instead of --model_path, an encoder is evaluated without a head. The script prints a table and
writes a results file, TREC run files and, for a trained model, plots.

    python training/eval_beir.py --compare checkpoints/a checkpoints/b --datasets scifact

compares models with each other and with these baselines, query by query.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..command_line import argument, parse_arguments, quiet_libraries, say
from ..commands import command
from ..errors import UserError
from ..evaluation.environment import measurement_facts
from ..evaluation.results import (
    BASE_SYSTEM,
    BASELINES,
    CLOSED_FORM_SYSTEM,
    MAIN_METRIC,
    MOVED_SYSTEM,
    PREDICTOR_SYSTEM,
    PROJECTION_SYSTEM,
    SCHEMA_VERSION,
    format_results_table,
    model_settings,
    remark_on_few_documents,
    write_json,
    write_results,
)
from ..features.arguments import FeatureArguments
from ..files import (
    check_file_name,
    check_writable,
    disk_errors_explained,
    replaced_file,
    replaced_folder,
    weights_digest,
)
from ..model.arguments import BaseArguments
from ..model.base_models import check_base_name, check_model_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..data.beir_folder import BeirDataset

_CALIBRATION_LINE = (
    "{name}: the first document is relevant for {first_is_relevant:.3f} of {num_queries:,} queries, mean probability "
    "{mean_probability:.3f}; expected calibration error {expected_calibration_error:.4f} ({by_chance:.4f} by chance "
    "if all probabilities are true)."
)


@dataclass
class EvaluationArguments(BaseArguments):
    """The model to evaluate, the data sets, and the output folder."""

    model_path: str | None = argument(None, "A trained model: its folder or its Hub id.")
    revision: str | None = argument(None, "Branch, tag or commit of a model or an encoder on the Hub.")
    base_model: str | None = argument(None, "An encoder to evaluate without a head: Hub id, folder, or embedded.")
    compare: list[str] = argument([], "Models to compare with each other and with the first one's frozen base.")
    use_predictor: bool = argument(False, "Also search with the predictor's output as the query vector.")
    datasets: list[str] = argument(
        ["scifact", "nfcorpus", "arguana"], "BEIR data sets, by name; your own is a folder inside --data_dir."
    )
    pairs: str | None = argument(
        None, "Instead of --datasets: query-document pairs, such as the held_out.jsonl beside a trained model."
    )
    corpus: str | None = argument(None, "With --pairs: more documents to search, from any source.")
    data_dir: str = argument("data/beir", "Folder with one BEIR folder per data set; missing ones are downloaded.")
    split: str = argument("test", "Name of the judgements to use.")
    output_dir: str = argument("results", "Folder for the results file, run files and plots.")
    run_name: str | None = argument(None, "Name of the results. Default: the model folder's name.")
    top_k: int = argument(100, "Documents kept per query, at least 100 for the official figures.")
    keep_identical_ids: bool = argument(False, "Keep a document with the query's own id; BEIR drops it.")
    search: Literal["exact", "faiss"] = argument(
        "exact",
        "exact compares every pair; faiss searches only some lists, and reports how much it missed (needs the package "
        "faiss-cpu): for millions of documents and thousands of queries.",
    )
    bm25: bool = argument(
        True, "Also rank by shared words (BM25), and by these and the base together: 5 GiB per million abstracts."
    )
    bm25_language: str = argument(
        "english", "Language of the stems and stop words of BM25, such as german; none compares whole words."
    )
    calibrate: str | None = argument(
        None,
        "Name of other judgements, such as dev. How probable it is that the first document is relevant is fitted to "
        "them, and the calibration error is measured on those of --split.",
    )
    save_calibration: bool = argument(False, "With --calibrate: save what was fitted in the model folder.")
    closed_form: str | None = argument(
        None,
        "Training pairs of the data set (a file, or a BEIR folder with the split train): also rank with the base, "
        "and with the projection of a cosine model, after their documents have moved towards their queries. These "
        "documents count as seen.",
    )
    examples: int = argument(
        0,
        "Test queries to keep in the results file, with the best document that the model finds. They are chosen at "
        "random. Their texts (200 characters at most) are public with a model card that is rendered from this file.",
    )
    faiss_probes: int = argument(32, "With --search faiss: lists that each query searches; more lists find more.")


def main(arguments: list[str] | None = None) -> None:
    """Evaluate one model, or compare several."""
    args, features = parse_arguments(
        [EvaluationArguments, FeatureArguments], description=__doc__ or "", arguments=arguments
    )
    quiet_libraries()
    _check(args)
    from ..data.beir_folder import find_beir_dataset
    from ..distributed import rank
    from ..evaluation.bm25 import Bm25System
    from ..evaluation.closed_form import ClosedForm
    from ..evaluation.ranking import check_trec_ids

    bm25 = Bm25System(args.bm25_language) if args.bm25 else None
    closed_form = ClosedForm.read(args.closed_form, evaluated_split=args.split) if args.closed_form else None
    if args.pairs:
        datasets = [_dataset_of_pairs(args.pairs, args.corpus)]
    else:
        datasets = [find_beir_dataset(name, args.data_dir, args.split) for name in dict.fromkeys(args.datasets)]
    fitted = [find_beir_dataset(dataset.name, args.data_dir, args.calibrate) for dataset in datasets if args.calibrate]
    for dataset in [*datasets, *fitted]:  # before all the work, because run files could not hold such ids
        check_trec_ids(dataset.queries, f"query id of {dataset.name}")
        check_trec_ids(dataset.corpus_ids, f"document id of {dataset.name}")
        if len(dataset.corpus_ids) < 2:
            raise UserError(f"{dataset.name}: expected at least two documents to rank, got one: add documents")
        if closed_form is not None:
            closed_form.check(dataset)
    baselines = {"bm25": bm25, "closed_form": closed_form}
    if args.compare:
        _compare(args, features, datasets, baselines, arguments)
        return
    evaluation, facts = _evaluate(args, features, datasets, baselines, args.model_path, args.run_name, fitted)
    if rank() == 0:
        with disk_errors_explained(Path(args.output_dir)):
            _write(args, evaluation, {**measurement_facts("eval_beir", arguments), **facts})


def _dataset_of_pairs(pairs: str, corpus: str | None) -> BeirDataset:
    from ..data.beir_folder import dataset_of_pairs
    from ..data.documents import document_texts, read_documents
    from ..data.pairs import read_pairs

    texts = [] if corpus is None else document_texts(read_documents(corpus, unique_ids=False))
    dataset = dataset_of_pairs(read_pairs(pairs), texts, name=re.sub(r"[^\w.-]", "_", Path(pairs).stem))
    if remark := remark_on_few_documents(len(dataset.corpus_ids), "--corpus"):
        say(remark)
    return dataset


def _check(args: EvaluationArguments) -> None:
    if args.corpus and not args.pairs:
        raise UserError("--corpus is for --pairs, got --datasets, which have their own: leave it out")
    if sum(map(bool, (args.model_path, args.base_model, args.compare))) != 1:
        raise UserError(
            "expected one of --model_path, --base_model and --compare, got several or none: give one of them"
        )
    args.base_fields(beside=args.model_path or args.compare)
    _check_calibrate(args)
    if args.examples < 0 or (args.examples and not args.model_path):
        raise UserError(
            f"--examples expects a count of at least 0 and --model_path, got {args.examples}: name a trained model"
        )
    if args.top_k < 100:
        raise UserError(f"--top_k must be at least 100 for MAP@100 and recall@100, got {args.top_k}: raise it")
    if args.use_predictor and args.base_model:
        raise UserError("--use_predictor expects a trained model, got --base_model: name one with --model_path")
    if not args.datasets:
        raise UserError("--datasets expects at least one BEIR data set, got none: name one, such as scifact")
    check_writable(args.output_dir)
    if args.run_name is not None:
        check_file_name(args.run_name, "--run_name")
    for path in filter(None, [args.model_path, *args.compare]):
        check_model_path(path)
    if args.base_model:
        check_base_name(args.base_model)


def _check_calibrate(args: EvaluationArguments) -> None:
    if args.save_calibration and not args.calibrate:
        raise UserError("--save_calibration expects --calibrate, got none: name judgements to fit to, such as dev")
    if args.calibrate and (not args.model_path or args.pairs or args.calibrate == args.split):
        raise UserError(
            "--calibrate expects --model_path, --datasets and other judgements than --split, got "
            f"{args.calibrate!r} and other flags: change them"
        )
    if args.save_calibration and (not Path(args.model_path or "").is_dir() or len(set(args.datasets)) != 1):
        raise UserError(
            "--save_calibration expects a model folder and one data set, got others: name them with --model_path and "
            "--datasets"
        )


def _evaluate(
    args: EvaluationArguments,
    features: FeatureArguments,
    datasets: list[Any],
    baselines: dict[str, Any],
    path: str | None,
    name: str | None,
    fitted: Sequence[Any] = (),
) -> tuple[Any, dict[str, Any]]:
    """Evaluate one model; return its evaluation, and the parts `model` and `settings` of the results.

    Calibrations are fitted to the data sets in `fitted`, in the order of `datasets`.
    """
    from ..evaluation.model_evaluation import evaluate_model, evaluation_settings, load_seen_digests

    systems, closed_form = _load_systems(args, features, path), baselines["closed_form"]
    of_head = load_seen_digests(path) if path else set()
    evaluation = evaluate_model(
        systems,
        datasets,
        k=args.top_k,
        drop_identical_ids=not args.keep_identical_ids,
        seen_document_digests=of_head | (closed_form.document_digests() if closed_form else set()),
        num_examples=args.examples,
        **baselines,
    )
    model, store = systems.encoder.model, systems.encoder.store
    say(store.summary())
    if closed_form and of_head:
        _remark_on_head(datasets, evaluation, of_head & closed_form.document_digests())
    settings = {
        **evaluation_settings(
            systems,
            split=args.split,
            k=args.top_k,
            drop_identical_ids=not args.keep_identical_ids,
            bm25=baselines["bm25"],
        ),
        "search": args.search,
        **({f"{system}_gamma": chosen for system, chosen in closed_form.gammas.items()} if closed_form else {}),
        **(_recall(args, systems.search) if args.search == "faiss" else {}),
        **_calibrations(args, systems, datasets, fitted, evaluation.evaluations),
    }
    return evaluation, {"model": _model_facts(args, model, name), "settings": settings}


def _calibrations(
    args: EvaluationArguments, systems: Any, datasets: list[Any], fitted: Sequence[Any], evaluations: list[Any]
) -> dict[str, Any]:
    """Measure the model's calibration on every data set, or fit one for each, measure it, and save it if asked to."""
    from ..evaluation.calibration import first_two, measure_calibration

    measured: dict[str, Any] = {}
    calibration = systems.encoder.model.config.relevance_calibration
    for place, (dataset, evaluation) in enumerate(zip(datasets, evaluations, strict=True)):
        if fitted:
            calibration = _fit(args, systems, fitted[place])
        scores, labels = first_two(evaluation.runs.get(PROJECTION_SYSTEM, {}), dataset.qrels)
        if calibration is not None and len(labels):
            found = measure_calibration(calibration, scores, labels)
            measured[dataset.name] = {**found, "calibration": calibration}
            say(_CALIBRATION_LINE.format(name=dataset.name, **found))
    if args.save_calibration:
        _save_calibration(Path(args.model_path or ""), calibration)
    return {"calibrations": measured} if measured else {}


def _fit(args: EvaluationArguments, systems: Any, dataset: BeirDataset) -> dict[str, float]:
    from ..evaluation.calibration import first_two, fit_calibration
    from ..evaluation.model_evaluation import evaluate_model

    is_dropped = not args.keep_identical_ids
    evaluation = evaluate_model(systems, [dataset], k=args.top_k, drop_identical_ids=is_dropped).evaluations[0]
    scores, labels = first_two(evaluation.runs[PROJECTION_SYSTEM], dataset.qrels)
    calibration = fit_calibration(scores, labels, num_documents=len(dataset.corpus_ids))
    if calibration is None:
        raise UserError(
            f"--calibrate expects at least 100 queries, got {len(labels)} in {args.calibrate} of {dataset.name}: name "
            "judgements of more"
        )
    return calibration


def _save_calibration(folder: Path, calibration: Any) -> None:
    from ..distributed import rank
    from ..evaluation.results import read_json_object

    if rank() == 0:
        path = folder / "config.json"
        with disk_errors_explained(folder):
            write_json(path, {**read_json_object(path), "relevance_calibration": calibration})
        say(f"Saved the calibration in {path}.")


def _remark_on_head(datasets: list[Any], evaluation: Any, digests: set[str]) -> None:
    """Say so if the head is behind the closed form on the queries of documents that both have seen."""
    from ..evaluation.metrics.retrieval.trec_scores import average_scores
    from ..evaluation.model_evaluation import seen_document_ids
    from ..evaluation.retrieval import select_queries, split_queries_by_seen_documents

    for dataset, found in zip(datasets, evaluation.evaluations, strict=True):
        judged = {query: dataset.qrels[query] for query in found.per_query[BASE_SYSTEM]}
        queries = split_queries_by_seen_documents(judged, seen_document_ids(dataset, digests))["seen_documents"]
        per_query = select_queries(found.per_query, queries) if queries else {}
        figures = {system: average_scores(values)[MAIN_METRIC] for system, values in per_query.items()}
        heads = [figures[system] for system in (PROJECTION_SYSTEM, PREDICTOR_SYSTEM) if system in figures]
        if heads and max(heads) < figures[CLOSED_FORM_SYSTEM]:
            say(
                f"{dataset.name}: the head is behind the closed form on documents it has seen ({MAIN_METRIC.upper()} "
                f"{max(heads):.4f} against {figures[CLOSED_FORM_SYSTEM]:.4f}, {len(queries)} queries)."
            )


def _load_systems(args: EvaluationArguments, features: FeatureArguments, path: str | None) -> Any:
    """Load a trained model, with its untrained base if training changed the encoder, or an encoder without a head."""
    from accelerate import PartialState

    from ..evaluation.model_evaluation import ModelSystems, TextEncoder
    from ..model.base_models import load_base_model, load_trained_model, load_untrained_base
    from ..search.approximate import MeasuredSearch, require_faiss
    from ..search.exact import exact_search

    search: Any = exact_search
    if args.search == "faiss":
        require_faiss()
        search = MeasuredSearch(num_probes=args.faiss_probes)

    def encoder_of(model: Any) -> TextEncoder:
        model.to(PartialState().device)
        return TextEncoder(model, features.store(model))

    if not path:
        encoder = encoder_of(load_base_model(args.base_model or "", revision=args.revision, **args.base_fields()))
        return ModelSystems(encoder, heads=(), search=search, folder=args.output_dir)
    model = load_trained_model(path, revision=args.revision)
    heads = [PROJECTION_SYSTEM]
    # In a comparison, models without a predictor are evaluated without it.
    if args.use_predictor and not (args.compare and model.predictor is None):
        heads.append(PREDICTOR_SYSTEM)
    base = None if model.config.freeze_base else encoder_of(load_untrained_base(model))
    return ModelSystems(encoder_of(model), base, heads=tuple(heads), search=search, folder=args.output_dir)


def _recall(args: EvaluationArguments, search: Any) -> dict[str, Any]:
    """Report how much faiss found, averaged over the searches of all processes."""
    from ..distributed import gather_objects

    recalls = [recall for part in gather_objects(search.recalls) for recall in part]
    recall = sum(recalls) / len(recalls)
    say(f"Searched with faiss: {recall:.4f} of what an exact search finds, on a sample of the queries.")
    return {"faiss_probes": args.faiss_probes, "recall_of_exact_search": round(recall, 4)}


def _model_facts(args: EvaluationArguments, model: Any, name: str | None) -> dict[str, Any]:
    config, path = model.config, args.model_path
    is_folder = path is not None and Path(path).is_dir()
    if not name and path:
        name = Path(path).resolve().name if is_folder else path.replace("/", "__")
    name = name or "base-" + (config.base_model_name or "encoder").rstrip("/").split("/")[-1]
    return {
        "path": name if path is None or is_folder else path,
        "name": name,
        **model_settings(config),
        "weights_sha256": weights_digest(Path(path)) if path else None,
    }


def _write(args: EvaluationArguments, evaluation: Any, facts: dict[str, Any]) -> None:
    """Print the table, write the results file, the run files and the plots, all or none, and say where they are."""
    figures = {"datasets": evaluation.datasets, "mean": evaluation.mean, "isotropy": evaluation.isotropy}
    results = {"schema_version": SCHEMA_VERSION, **facts, **figures}
    name = facts["model"]["name"]
    folder = Path(args.output_dir) / name
    results_path = Path(args.output_dir) / f"{name}.json"
    say(format_results_table(results))
    folder.parent.mkdir(parents=True, exist_ok=True)
    systems = (*BASELINES, PROJECTION_SYSTEM, PREDICTOR_SYSTEM, MOVED_SYSTEM)
    old = [f"{glob.escape(each.name)}.{system}.trec" for each in evaluation.evaluations for system in systems]
    with replaced_file(results_path) as finished, replaced_folder(folder, obsolete=old) as new:
        write_results(finished, results)
        _write_runs(evaluation, new, name)
        if args.model_path:
            _plot(evaluation, results, new)
        results_path.unlink(missing_ok=True)  # whoever finds it has the run files of the same evaluation, too
    if not args.model_path:
        say(f"\nWrote {results_path}, and run files in {folder}.")
        return
    say(f"\nWrote {results_path}, and run files and plots in {folder}.")
    say(f"Next: {command('render_card', '--model_path', args.model_path, '--results', results_path)}")


def _write_runs(evaluation: Any, folder: Path, name: str) -> None:
    from ..evaluation.ranking import write_trec_run

    for dataset in evaluation.evaluations:
        for system, run in dataset.runs.items():
            tag = re.sub(r"\s+", "_", f"{name}.{system}")
            write_trec_run(folder / f"{dataset.name}.{system}.trec", run, tag=tag)


def _plot(evaluation: Any, results: dict[str, Any], folder: Path) -> None:
    from ..evaluation.plots import plot_comparison, plot_isotropy

    plot_comparison(results, folder / "comparison.png")
    samples = evaluation.samples
    plot_isotropy(samples[BASE_SYSTEM], samples[PROJECTION_SYSTEM], folder / "isotropy.png")


def _compare(
    args: EvaluationArguments,
    features: FeatureArguments,
    datasets: list[Any],
    baselines: dict[str, Any],
    arguments: list[str] | None,
) -> None:
    """Evaluate every model, compare all pairs of systems, write the file and the plot, and print the table."""
    from ..distributed import rank
    from ..evaluation import model_comparison
    from ..evaluation.model_evaluation import load_seen_digests

    evaluations, models = {}, {}
    for name, path in zip(model_comparison.system_names(args.compare), args.compare, strict=True):
        say(f"Evaluating {name}")
        evaluations[name], models[name] = _evaluate(args, features, datasets, baselines, path, name)
    closed_form = baselines["closed_form"]
    seen = set().union(*(load_seen_digests(path) for path in args.compare))
    seen |= closed_form.document_digests() if closed_form else set()
    comparison = model_comparison.compare_models(model_comparison.gather_systems(datasets, evaluations, seen))
    if rank() != 0:
        return
    folder, name = Path(args.output_dir), args.run_name or "comparison"
    facts = {"schema_version": SCHEMA_VERSION, **measurement_facts("eval_beir", arguments)}
    with disk_errors_explained(folder):
        model_comparison.plot_model_comparison(comparison, folder / f"{name}.png")
        write_json(folder / f"{name}.json", {**facts, "models": models, **comparison})
    say(f"{model_comparison.format_comparison(comparison)}\n\nWrote {folder / name}.json and {folder / name}.png.")
