"""Search a corpus with a trained model and a faiss index, which is built once and kept on disk.

    python training/examples/faiss_index.py --model_path checkpoints/mine --corpus your_documents.jsonl --query "sort"

The model's `config.similarity_fn_name` decides the metric: L2 for euclidean, else the inner product, which is the
cosine for the vectors of a cosine model. A second run finds the index on disk and embeds only the query.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from example_arguments import StoreArguments, check_arguments, facts_of, load_model_and_documents, store_folder

from ragcun_hf.command_line import parse_arguments, run_script, say
from ragcun_hf.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """Build or reload the index, search, and print the best documents."""
    (args,) = parse_arguments([StoreArguments], description=__doc__ or "", arguments=arguments)
    check_arguments(args, "faiss", "faiss-cpu")
    folder = store_folder(args, "faiss")
    model, ids, texts = load_model_and_documents(args)
    facts = facts_of(args, model, ids, texts)
    similarity = facts["similarity"]
    index = None if args.overwrite else read_index(folder, facts)
    if index is None:
        say(f"Embedding {len(texts)} documents.")
        index = build_index(model.encode_document(texts, show_progress_bar=True), similarity)
        write_index(index, folder, facts)
    query = model.encode_query([args.query], use_predictor=args.use_predictor)
    scores, found = search(index, query, similarity, args.top_k)
    for score, row in zip(scores[0], found[0], strict=True):
        say(f"{score:9.4f}  {ids[row]}  {' '.join(texts[row].split())[:80]}")


def build_index(vectors: np.ndarray, similarity: str) -> Any:
    """Put document vectors (N, D) into an exact index."""
    import faiss

    index = (faiss.IndexFlatL2 if similarity == "euclidean" else faiss.IndexFlatIP)(vectors.shape[1])
    index.add(vectors)
    return index


def search(index: Any, queries: np.ndarray, similarity: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's scores, larger is better, and the rows of the documents, each (Q, k)."""
    scores, rows = index.search(queries, min(k, index.ntotal))
    # IndexFlatL2 returns squared distances, smallest first.
    return (-np.sqrt(np.maximum(scores, 0)) if similarity == "euclidean" else scores), rows


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

    from ragcun_hf.files import disk_errors_explained, replaced_file, write_whole

    with disk_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "facts.json").unlink(missing_ok=True)
        with replaced_file(folder / "vectors.faiss") as temporary:
            faiss.write_index(index, str(temporary))
        write_whole(folder / "facts.json", json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
