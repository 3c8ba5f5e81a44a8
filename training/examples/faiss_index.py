"""Search a corpus with a trained model and a faiss index, which is built once and kept on disk.

    python training/examples/faiss_index.py --model_path checkpoints/mine --corpus your_documents.jsonl --query "sort"

The model's `config.similarity_fn_name` decides the metric: inner product for dot, inner product of vectors of unit
length for cosine, L2 for euclidean. A second run finds the index on disk and embeds only the query.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script, say
from ragcun_hf.errors import UserError

_METRICS = {
    "cosine": "IndexFlatIP, vectors of unit length",
    "dot": "IndexFlatIP",
    "euclidean": "IndexFlatL2",
}


@dataclass
class ExampleArguments:
    """The model, the documents, and the query."""

    model_path: str | None = argument(None, "A trained model: its folder or its Hub id.")
    corpus: str | None = argument(
        None, "Documents: a file of rows with a text, a .txt file with one per line, or a BEIR folder."
    )
    query: str | None = argument(None, "The query.")
    use_predictor: bool = argument(False, "Search with the predictor's output as the query vector.")
    top_k: int = argument(5, "Documents shown.")
    output_dir: str | None = argument(None, "Folder of the index. Default: results/faiss/<model>-<corpus>.")
    overwrite: bool = argument(False, "Build the index again.")


def main(arguments: list[str] | None = None) -> None:
    """Build or reload the index, search, and print the best documents."""
    (args,) = parse_arguments([ExampleArguments], description=__doc__ or "", arguments=arguments)
    folder = _checked_folder(args)
    quiet_libraries()
    from ragcun_hf.data.documents import document_texts, read_documents
    from ragcun_hf.files import disk_errors_explained
    from ragcun_hf.model.base_models import load_trained_model

    # Without ragcun_hf: AutoModel.from_pretrained(model_path, trust_remote_code=True)
    model = load_trained_model(args.model_path)
    if args.use_predictor and model.predictor is None:
        raise UserError("--use_predictor expects a model with a predictor, got one without: leave the flag out")
    rows = read_documents(args.corpus)
    ids, texts = list(rows["id"]), document_texts(rows)
    similarity = model.config.similarity_fn_name
    facts = _facts(args.model_path, similarity, ids, texts)
    index = None if args.overwrite else read_index(folder, facts)
    if index is None:
        say(f"Embedding {len(texts)} documents for {_METRICS[similarity]}.")
        index = build_index(model.encode_document(texts, show_progress_bar=True), similarity)
        with disk_errors_explained(folder):
            write_index(index, folder, facts)
    query = model.encode_query([args.query], use_predictor=args.use_predictor)
    scores, found = search(index, query, similarity, args.top_k)
    for score, row in zip(scores[0], found[0], strict=True):
        say(f"{score:9.4f}  {ids[row]}  {' '.join(texts[row].split())[:80]}")


def build_index(vectors: np.ndarray, similarity: str) -> Any:
    """Put document vectors (N, D) into an exact index."""
    import faiss

    index = (faiss.IndexFlatL2 if similarity == "euclidean" else faiss.IndexFlatIP)(vectors.shape[1])
    index.add(_prepared(vectors, similarity))
    return index


def search(index: Any, queries: np.ndarray, similarity: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's scores, larger is better, and the rows of the documents, each (Q, k)."""
    scores, rows = index.search(_prepared(queries, similarity), min(k, index.ntotal))
    # IndexFlatL2 returns squared distances, smallest first.
    return (-np.sqrt(np.maximum(scores, 0)) if similarity == "euclidean" else scores), rows


def _prepared(vectors: np.ndarray, similarity: str) -> np.ndarray:
    vectors = np.array(vectors, dtype=np.float32, order="C")  # a copy, because faiss normalises in place
    if similarity == "cosine":
        import faiss

        faiss.normalize_L2(vectors)
    return vectors


def read_index(folder: Path, facts: dict[str, str]) -> Any:
    """Reload an index of this model and these documents; None if there is none."""
    import faiss

    try:
        kept = dict(json.loads((folder / "facts.json").read_text(encoding="utf-8")))
        index = faiss.read_index(str(folder / "vectors.faiss"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"expected an index that can be read, got {folder}, which is damaged: replace it with --overwrite"
        ) from error
    different = ", ".join(name for name in facts if kept.get(name) != facts[name])
    if different:
        raise UserError(
            f"expected an index of this model and corpus, got {folder} with other {different}: replace it with "
            "--overwrite, or name another --output_dir"
        )
    return index


def write_index(index: Any, folder: Path, facts: dict[str, str]) -> None:
    """Write an index; its facts are removed first and written last, so that they never describe another one."""
    import faiss

    from ragcun_hf.files import replaced_file, write_whole

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "facts.json").unlink(missing_ok=True)
    with replaced_file(folder / "vectors.faiss") as temporary:
        faiss.write_index(index, str(temporary))
    write_whole(folder / "facts.json", json.dumps(facts, indent=2) + "\n")


def _facts(model_path: str, similarity: str, ids: list[str], texts: list[str]) -> dict[str, str]:
    """Identify the model and the documents."""
    from ragcun_hf.data.documents import text_digest
    from ragcun_hf.files import weights_digest

    weights = weights_digest(Path(model_path)) or model_path
    return {"weights": weights, "similarity": similarity, "documents": text_digest(*ids, *texts).hex()}


def _checked_folder(args: ExampleArguments) -> Path:
    """Check the flags and return the folder of the index."""
    from ragcun_hf.files import check_writable

    for name in ("model_path", "corpus", "query"):
        if not (getattr(args, name) or "").strip():
            raise UserError(f"--{name} expects a value, got none: give one")
    if args.top_k < 1:
        raise UserError(f"--top_k must be at least 1, got {args.top_k}: raise it")
    if importlib.util.find_spec("faiss") is None:
        raise UserError("expected faiss to be installed, found none: run pip install faiss-cpu")
    name = f"{Path(str(args.model_path)).absolute().name}-{Path(str(args.corpus)).absolute().stem}"
    folder = Path(args.output_dir or f"results/faiss/{name}")
    check_writable(folder)
    return folder


if __name__ == "__main__":
    run_script(main)
