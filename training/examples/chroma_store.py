"""Search a corpus with a trained model and a Chroma store, which is filled once and kept on disk.

    python training/examples/chroma_store.py --model_path checkpoints/mine --corpus your_documents.jsonl --query "sort"

The model's `config.similarity_fn_name` decides the metric: `cosine`, `ip` or `l2`. A second run finds the store on
disk and embeds only the query. No data leaves this machine.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from example_arguments import StoreArguments, check_arguments, facts_of, load_model_and_documents, store_folder

from ragcun_hf.command_line import parse_arguments, run_script, say
from ragcun_hf.errors import UserError

if TYPE_CHECKING:
    from chromadb import Documents, Embeddings

_SPACES = {"cosine": "cosine", "dot": "ip", "euclidean": "l2"}
_COLLECTION = "documents"
# A graph for the dot product is badly connected, because a vector may be more similar to others than to itself: with
# Chroma's defaults, 16 links and 100 candidates, one query in fifty lost documents among only two hundred.
_GRAPH = {"max_neighbors": 48, "ef_construction": 400, "ef_search": 400}


def main(arguments: list[str] | None = None) -> None:
    """Fill or reopen the store, search, and print the best documents."""
    (args,) = parse_arguments([StoreArguments], description=__doc__ or "", arguments=arguments)
    check_arguments(args, "chromadb", "chromadb")
    folder = store_folder(args, "chroma")
    model, ids, texts = load_model_and_documents(args)
    graph = " ".join(f"{name} {number}" for name, number in _GRAPH.items())
    facts = {**facts_of(args, model, ids, texts), "graph": graph}
    embed = embedding_function(model, use_predictor=args.use_predictor)
    collection = open_collection(folder, embed, facts, ids, texts, overwrite=args.overwrite)
    answer = collection.query(query_texts=[args.query], n_results=min(args.top_k, len(ids)))
    for name, text, distance in zip(answer["ids"][0], answer["documents"][0], answer["distances"][0], strict=True):
        say(f"{score_of(distance, facts['similarity']):9.4f}  {name}  {' '.join(text.split())[:80]}")


def embedding_function(model: Any, *, use_predictor: bool = False) -> Any:
    """Make the embedding function that Chroma calls, with the model's own methods for documents and for queries."""
    from chromadb import EmbeddingFunction

    space = _SPACES[model.config.similarity_fn_name]

    class ModelEmbedding(EmbeddingFunction):
        """Embeds with a trained model."""

        def __init__(self) -> None:
            """Do nothing; Chroma requires a constructor."""

        def __call__(self, input: Documents) -> Embeddings:
            """Embed documents."""
            return list(model.encode_document(input))

        def embed_query(self, input: Documents) -> Embeddings:
            """Embed queries."""
            return list(model.encode_query(input, use_predictor=use_predictor))

        @staticmethod
        def name() -> str:
            """Return the name that Chroma keeps; it refuses to open the store with another function."""
            return "ragcun_hf"

        def get_config(self) -> dict[str, Any]:
            """Return a description, which Chroma keeps with the vectors."""
            return {"space": space}

        @staticmethod
        def build_from_config(config: dict[str, Any]) -> ModelEmbedding:
            """Return the function again, with the model that is already loaded."""
            return ModelEmbedding()

        def supported_spaces(self) -> list[str]:
            """Allow only the metric that the model was trained for."""
            return [space]

    return ModelEmbedding()


def open_collection(
    folder: Path, embed: Any, facts: dict[str, str], ids: list[str], texts: list[str], *, overwrite: bool
) -> Any:
    """Open the store of this model and these documents; fill it if there is none, or only an unfinished one."""
    import chromadb
    from chromadb.config import Settings
    from chromadb.errors import ChromaError
    from tqdm.auto import tqdm

    try:
        # Absolute, because Chroma keeps clients by path as long as the process lives.
        client = chromadb.PersistentClient(str(folder.absolute()), settings=Settings(anonymized_telemetry=False))
        present = [collection.name for collection in client.list_collections()]
    except ChromaError as error:
        raise UserError(
            f"expected a store that can be read, got {folder} ({error}): remove it, or name another --output_dir"
        ) from error
    if _COLLECTION in present:
        collection = client.get_collection(_COLLECTION, embedding_function=embed)
        kept = collection.metadata or {}
        different = ", ".join(name for name in facts if kept.get(name) != facts[name])
        if not (overwrite or different) and collection.count() == len(ids):
            return collection
        if different and not overwrite:
            raise UserError(
                f"expected a store of this model and corpus, got {folder} with other {different}: replace it with "
                "--overwrite, or name another --output_dir"
            )
        client.delete_collection(_COLLECTION)
    space = _SPACES[facts["similarity"]]
    say(f"Embedding {len(ids)} documents for the space {space!r}.")
    collection = client.create_collection(
        _COLLECTION,
        embedding_function=embed,
        metadata=dict(facts),
        configuration={"hnsw": {"space": space, **_GRAPH}},
    )
    step = min(256, client.get_max_batch_size())
    for start in tqdm(range(0, len(ids), step)):
        collection.add(ids=ids[start : start + step], documents=texts[start : start + step])
    return collection


def score_of(distance: float, similarity: str) -> float:
    """Turn Chroma's distance into the model's score, larger is better."""
    # Chroma's distance is 1 - cosine, 1 - dot product, or the squared L2 distance.
    return -math.sqrt(max(distance, 0.0)) if similarity == "euclidean" else 1.0 - distance


if __name__ == "__main__":
    run_script(main)
