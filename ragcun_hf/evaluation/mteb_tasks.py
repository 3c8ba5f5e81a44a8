"""Evaluate saved models with MTEB: its own tasks by name, and BEIR folders as MTEB tasks.

The model is loaded by sentence-transformers, as by everybody who runs MTEB on it. So these figures also check the
saved folder: its prompts, its similarity and its code.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..command_line import format_table
from ..data.beir_folder import BeirDataset, load_beir_folder
from ..data.documents import text_digest
from ..errors import UserError
from ..model.base_models import register_auto_classes
from .retrieval import check_identical_ids

if TYPE_CHECKING:
    from mteb.abstasks import AbsTaskRetrieval
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_SUBSET = "default"  # MTEB's name for the only part of a task in one language
_MODEL_TYPE = "isotropic_gaussian"


def require_mteb() -> None:
    """Raise a UserError with the install command if mteb or sentence-transformers is missing."""
    for name in ("mteb", "sentence_transformers"):  # mteb accepts any version of the second
        if importlib.util.find_spec(name) is None:
            raise UserError(f"expected {name} to be installed, found none: run pip install mteb sentence-transformers")


def task_from_beir_folder(
    folder: str | os.PathLike[str], split: str = "test", *, language: str = "eng-Latn", drop_identical_ids: bool = True
) -> AbsTaskRetrieval:
    """Make an MTEB retrieval task from a BEIR folder, named after it and with NDCG@10 as its main score.

    `language` has MTEB's form (ISO 639-3 and ISO 15924), such as `deu-Latn`. BEIR drops the document with the query's
    own id, and so does MTEB for ArguAna.
    """
    require_mteb()
    from mteb.abstasks import AbsTaskRetrieval

    dataset = load_beir_folder(folder, split)
    if drop_identical_ids:
        check_identical_ids(dataset)
    task_metadata = _metadata(dataset, language)

    class BeirFolderTask(AbsTaskRetrieval):
        """The documents, queries and judgements of one BEIR folder."""

        metadata = task_metadata
        ignore_identical_ids = drop_identical_ids

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            """Set the data that was read; MTEB calls this again after it has unloaded the data."""
            from datasets import Dataset

            queries = {"id": list(dataset.queries), "text": list(dataset.queries.values())}
            parts: Any = {
                "corpus": Dataset.from_dict({"id": list(dataset.corpus_ids), "text": list(dataset.corpus_texts)}),
                "queries": Dataset.from_dict(queries),
                "relevant_docs": {query: dict(judgements) for query, judgements in dataset.qrels.items()},
                "top_ranked": None,
            }
            self.dataset = {_SUBSET: {dataset.split: parts}}
            self.data_loaded = True

    task = BeirFolderTask()
    task.load_data()
    return task


def _metadata(dataset: BeirDataset, language: str) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.languages import check_language_code

    try:
        check_language_code(language)
    except ValueError as error:
        raise UserError(
            f"--language expects one that MTEB knows, such as eng-Latn, got {language!r}: change it"
        ) from error
    judgements = (
        f"{query}\t{document}\t{gain}" for query, row in dataset.qrels.items() for document, gain in row.items()
    )
    texts = (*dataset.corpus_ids, *dataset.corpus_texts, *dataset.queries.values(), *judgements)
    return TaskMetadata(
        name=dataset.name,
        description=f"The BEIR folder {dataset.name}, read from the disk.",
        # MTEB records the revision of its data; a local folder has a digest of its content instead of a commit.
        dataset={"path": dataset.name, "revision": text_digest(*texts).hex()},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=[dataset.split],
        eval_langs=[language],
        main_score="ndcg_at_10",
        is_public=False,
    )


def tasks_by_name(names: Sequence[str]) -> list[Any]:
    """Look up MTEB's own tasks, by exact names such as `NFCorpus`; their data is downloaded when they run."""
    require_mteb()
    import mteb

    try:
        return [mteb.get_task(name) for name in names]
    except KeyError as error:
        raise UserError(
            f"--tasks expects names of MTEB's tasks, got one it does not have ({error.args[0]}): see "
            "`mteb available-tasks`, or give a BEIR folder with --beir_folders"
        ) from error


def load_sentence_transformer(
    path: str, *, revision: str | None = None, device: str | None = None, trust_remote_code: bool = False
) -> SentenceTransformer:
    """Load a folder or Hub id with sentence-transformers, as MTEB does; raises a UserError if that fails.

    A model of this package's type always runs the installed classes, never the code beside its weights;
    `trust_remote_code` runs the code of a model of another type.
    """
    require_mteb()
    from sentence_transformers import SentenceTransformer
    from transformers import PretrainedConfig
    from transformers.utils import cached_file

    register_auto_classes()
    options = {"revision": revision} if revision else {}
    try:
        config, _ = PretrainedConfig.get_config_dict(path, **options)
        # Without this file sentence-transformers would add a pooling of its own.
        cached_file(path, "modules.json", **options)
        runs_code = trust_remote_code and config.get("model_type") != _MODEL_TYPE
        model = SentenceTransformer(path, revision=revision, trust_remote_code=runs_code, device=device)
    except Exception as error:  # noqa: BLE001 (of damaged files, both libraries raise any type)
        if "trust_remote_code" in str(error):
            advice = (
                f"--model_path expects a model without code of its own, got {path!r}, which has some: read it, and "
                "add --trust_remote_code to run it; models of type isotropic_gaussian need none"
            )
        else:
            advice = (
                "--model_path expects a folder written by save_pretrained or the Hub id of a sentence-transformers "
                f"model, got {path!r} ({_one_line(error)}): check the path, the id and the network"
            )
        raise UserError(advice) from error
    return model.eval()


def run_task(
    model: SentenceTransformer, task: Any, *, batch_size: int = 32, show_progress: bool = False
) -> dict[str, Any]:
    """Evaluate a model on one task with `mteb.evaluate`.

    MTEB's cache of results is not used: it identifies models by name, and a folder's weights change. The entry has the
    name of the `task`, its `type`, the `revision` of the data, `main_metric`, `main_score` (the mean over splits and
    subsets) and `scores`: split -> subset -> MTEB's name of a metric -> value, or None if MTEB does not define it.
    """
    import mteb

    name = task.metadata.name
    logger.info("running %s", name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MTEB uses deprecated names of sentence-transformers
            result = mteb.evaluate(
                model,
                task,
                cache=None,
                co2_tracker=False,  # it would ask the network for this machine's location
                show_progress_bar=False,
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress},
            )
    except OSError as error:  # from `datasets` and `huggingface_hub`, if the Hub or the data set cannot be reached
        raise _missing_data(name, error) from error
    if result.exceptions:  # MTEB's way to report that a task's data is private
        raise _missing_data(name, result.exceptions[0].exception)
    (found,) = result.task_results
    return {
        "task": found.task_name,
        "type": task.metadata.type,
        "revision": found.dataset_revision,
        "main_metric": task.metadata.main_score,
        "main_score": found.get_score(),
        "scores": {split: {row["hf_subset"]: _numbers(row) for row in rows} for split, rows in found.scores.items()},
    }


def _missing_data(name: str, reason: object) -> UserError:
    return UserError(
        f"expected the data of the MTEB task {name}, could not fetch it ({_one_line(reason)}): check the network, or "
        "give a BEIR folder with --beir_folders"
    )


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:200]


def _numbers(row: Mapping[str, Any]) -> dict[str, float | None]:
    # MTEB gives NaN for undefined measures of its own, and JSON has no NaN.
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def format_mteb_table(entries: Sequence[dict[str, Any]]) -> str:
    """Format entries of `run_task` for the terminal: main score and recall@100 of each task, split and subset."""
    rows = [("task", "split", "subset", "metric", "score", "R@100")]
    for entry in entries:
        for split, subsets in entry["scores"].items():
            for subset, scores in subsets.items():
                figures = (scores.get("main_score"), scores.get("recall_at_100"))
                cells = ("-" if figure is None else f"{figure:.4f}" for figure in figures)
                rows.append((entry["task"], split, subset, entry["main_metric"], *cells))
    return format_table(rows, num_names=4)
