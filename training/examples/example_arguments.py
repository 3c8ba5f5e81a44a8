"""Shared code of the vector store examples: their flags, the checks of the flags, and loading model and documents."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragcun_hf.command_line import argument, quiet_libraries
from ragcun_hf.errors import UserError


@dataclass
class SearchArguments:
    """The model, the documents, and the query."""

    model_path: str | None = argument(None, "A trained model: its folder or its Hub id.")
    corpus: str | None = argument(
        None, "Documents: a file of rows with a text, a .txt file with one per line, or a BEIR folder."
    )
    query: str | None = argument(None, "The query.")
    use_predictor: bool = argument(False, "Search with the predictor's output as the query vector.")
    top_k: int = argument(5, "Documents shown.")


@dataclass
class StoreArguments(SearchArguments):
    """The same, and where the vectors are kept."""

    output_dir: str | None = argument(None, "Folder of the vectors. Default: results/<store>/<model>-<corpus>.")
    overwrite: bool = argument(False, "Embed the documents again.")


def check_arguments(args: SearchArguments, module: str, package: str) -> None:
    """Refuse missing values, and name the package to install if its module is missing."""
    for name in ("model_path", "corpus", "query"):
        if not (getattr(args, name) or "").strip():
            raise UserError(f"--{name} expects a value, got none: give one")
    if args.top_k < 1:
        raise UserError(f"--top_k must be at least 1, got {args.top_k}: raise it")
    if importlib.util.find_spec(module) is None:
        raise UserError(f"expected {module} to be installed, found none: run pip install {package}")


def store_folder(args: StoreArguments, store: str) -> Path:
    """Return the folder of the vectors, which can be written."""
    from ragcun_hf.files import check_writable

    name = f"{Path(str(args.model_path)).absolute().name}-{Path(str(args.corpus)).absolute().stem}"
    folder = Path(args.output_dir or f"results/{store}/{name}")
    check_writable(folder)
    return folder


def load_model_and_documents(args: SearchArguments) -> tuple[Any, list[str], list[str]]:
    """Return the model, and the documents' ids and texts."""
    quiet_libraries()
    from ragcun_hf.data.documents import document_texts, read_documents
    from ragcun_hf.model.base_models import load_trained_model

    # Without ragcun_hf: AutoModel.from_pretrained(model_path, trust_remote_code=True)
    model = load_trained_model(str(args.model_path))
    if args.use_predictor and model.predictor is None:
        raise UserError("--use_predictor expects a model with a predictor, got one without: leave the flag out")
    rows = read_documents(args.corpus)
    return model, list(rows["id"]), document_texts(rows)


def facts_of(args: SearchArguments, model: Any, ids: list[str], texts: list[str]) -> dict[str, str]:
    """Identify the model and the documents, so that no other ones are searched later."""
    from ragcun_hf.data.documents import text_digest
    from ragcun_hf.files import weights_digest

    return {
        "weights": weights_digest(Path(str(args.model_path))) or str(args.model_path),
        "similarity": model.config.similarity_fn_name,
        "documents": text_digest(*ids, *texts).hex(),
    }
