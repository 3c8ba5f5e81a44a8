"""MTEB on a saved model: its own tasks by name, and BEIR folders as tasks of its kind.

The model goes through sentence-transformers, as it does for everybody who runs MTEB on it, so these figures check the
saved folder itself: its prompts, its similarity and the code that travels with it.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Sequence
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

_SUBSET = "default"  # how MTEB calls the one part of a task in one language
_MODEL_TYPE = "isotropic_gaussian"


def require_mteb() -> None:
    """Tell early where mteb is not installed.

    Raises:
        UserError: With the command that installs it.
    """
    # mteb brings sentence-transformers, but asks for any version.
    for name in ("mteb", "sentence_transformers"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"expected {name} to be installed, found none: run pip install 'ragcun_hf[mteb]'")


def task_from_beir_folder(
    folder: str | os.PathLike[str],
    split: str = "test",
    *,
    language: str = "eng-Latn",
    drop_identical_ids: bool = True,
) -> AbsTaskRetrieval:
    """Make an MTEB retrieval task of a BEIR folder; nothing is downloaded.

    Documents are joined from title and text as everywhere in this package, and the main score is NDCG@10.

    Args:
        folder: With corpus.jsonl, queries.jsonl and qrels/; its name becomes the task's.
        split: Name of the qrels file, without `.tsv`.
        language: Of the texts, as MTEB writes it: ISO 639-3 and ISO 15924, such as `deu-Latn`.
        drop_identical_ids: Drop the document with the query's id from its ranking, as BEIR does and as MTEB does for
            ArguAna.

    Returns:
        The task, its data loaded.

    Raises:
        UserError: If mteb is not installed, the folder is not whole, the language is unknown to MTEB, or a document
            to be dropped is relevant.
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
            """Hand over what was read; also after MTEB has put the data away."""
            self.dataset = {_SUBSET: {dataset.split: _split_data(dataset)}}
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
        # MTEB records which data it was; a local folder has a digest of its content instead of a commit.
        dataset={"path": dataset.name, "revision": text_digest(*texts).hex()},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=[dataset.split],
        eval_langs=[language],
        main_score="ndcg_at_10",
        is_public=False,
    )


def _split_data(dataset: BeirDataset) -> Any:
    from datasets import Dataset

    queries = {"id": list(dataset.queries), "text": list(dataset.queries.values())}
    return {
        "corpus": Dataset.from_dict({"id": list(dataset.corpus_ids), "text": list(dataset.corpus_texts)}),
        "queries": Dataset.from_dict(queries),
        "relevant_docs": {query: dict(judgements) for query, judgements in dataset.qrels.items()},
        "top_ranked": None,
    }


def tasks_by_name(names: Sequence[str]) -> list[Any]:
    """Find tasks of MTEB's own collection; their data is fetched from the Hub when they run.

    Args:
        names: Such as `NFCorpus`; upper and lower case matter.

    Returns:
        One task per name, in that order.

    Raises:
        UserError: If mteb is not installed, or has no such task.
    """
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
    """Load a model as MTEB loads it, by sentence-transformers.

    A model of this package's type always runs the installed classes, never the code that lies beside its weights:
    what a config claims to be is no reason to trust the folder.

    Args:
        path: A folder or a Hub id of any sentence-transformers model, such as the base to compare with.
        revision: Branch, tag or commit on the Hub.
        device: Where it runs; None takes a GPU if there is one.
        trust_remote_code: Run the code that lies beside a model of another type.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: If mteb is not installed, or there is no model of sentence-transformers that can be loaded.
    """
    require_mteb()
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from transformers import PretrainedConfig
    from transformers.utils import cached_file

    register_auto_classes()
    options = {"revision": revision} if revision else {}
    try:
        config, _ = PretrainedConfig.get_config_dict(path, **options)
        # Without this file sentence-transformers makes up a pooling of its own.
        cached_file(path, "modules.json", **options)
        runs_code = trust_remote_code and config.get("model_type") != _MODEL_TYPE
        model = SentenceTransformer(path, revision=revision, trust_remote_code=runs_code, device=device)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(_load_advice(path, error)) from error
    return model.eval()


def _load_advice(path: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"--model_path expects a model without code of its own, got {path!r}, which brings some: read it, and add "
            "--trust_remote_code to run it; models of type isotropic_gaussian need none"
        )
    return (
        "--model_path expects a folder written by save_pretrained or the Hub id of a sentence-transformers model, "
        f"got {path!r} ({_first_line(error)}): check the path, the id and the network"
    )


def run_task(
    model: SentenceTransformer, task: Any, *, batch_size: int = 32, show_progress: bool = False
) -> dict[str, Any]:
    """Evaluate a model on one task with `mteb.evaluate`.

    MTEB's cache of results is neither read nor written: it knows models by name, and a folder's weights change.

    Args:
        model: From `load_sentence_transformer`.
        task: From `task_from_beir_folder` or `tasks_by_name`.
        batch_size: Texts per batch.
        show_progress: Draw a bar while texts are encoded.

    Returns:
        The name of the `task`, its `type`, the `revision` of the data, `main_metric`, `main_score` (the mean over
        splits and subsets) and `scores`: split -> subset -> MTEB's name of a metric -> value. Scores are None where
        MTEB has NaN.

    Raises:
        UserError: If the task's data cannot be fetched.
    """
    import mteb

    name = task.metadata.name
    logger.info("running %s", name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MTEB calls sentence-transformers by names of the past
            result = mteb.evaluate(
                model,
                task,
                cache=None,
                co2_tracker=False,  # it would ask the network where this machine stands
                show_progress_bar=False,
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress},
            )
    except OSError as error:  # of `datasets` and `huggingface_hub`, where the Hub or the data set cannot be reached
        raise _unfetched(name, error) from error
    if result.exceptions:  # MTEB's own answer where a task's data is private
        raise _unfetched(name, result.exceptions[0].exception)
    return _entry(task, result.task_results[0])


def _unfetched(name: str, reason: object) -> UserError:
    return UserError(
        f"expected the data of the MTEB task {name}, could not fetch it ({_first_line(reason)}): check the network, "
        "or give a BEIR folder with --beir_folders"
    )


def _entry(task: Any, result: Any) -> dict[str, Any]:
    return {
        "task": result.task_name,
        "type": task.metadata.type,
        "revision": result.dataset_revision,
        "main_metric": task.metadata.main_score,
        "main_score": result.get_score(),
        "scores": {split: {row["hf_subset"]: _numbers(row) for row in rows} for split, rows in result.scores.items()},
    }


def _numbers(row: dict[str, Any]) -> dict[str, float | None]:
    return {key: _finite(value) for key, value in row.items() if isinstance(value, (int, float))}


def _finite(value: float) -> float | None:
    # MTEB has NaN where a measure of its own is not defined, and JSON has none.
    return value if math.isfinite(value) else None


def format_mteb_table(entries: Sequence[dict[str, Any]]) -> str:
    """Lay out the main score of each task, split and subset for the terminal, and recall@100 where there is one.

    Args:
        entries: From `run_task`.

    Returns:
        A table under 100 columns for names of usual length.
    """
    rows = [("task", "split", "subset", "metric", "score", "R@100")]
    for entry in entries:
        for split, subsets in entry["scores"].items():
            for subset, scores in subsets.items():
                score, recall = scores.get("main_score"), scores.get("recall_at_100")
                rows.append((entry["task"], split, subset, entry["main_metric"], _figure(score), _figure(recall)))
    return format_table(rows, num_names=4)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _first_line(reason: object) -> str:
    return " ".join(str(reason).split())[:200]
