"""Search a corpus with a trained model in LangChain, with the vectors in a Chroma store in memory.

    python training/examples/langchain_store.py --model_path checkpoints/mine --corpus docs.jsonl --query "sort"

Every vector store of LangChain takes the object that `embeddings_of` makes. The store here keeps its default metric,
L2. It ranks as the cosine, because a cosine model's vectors have unit length. No data leaves this machine.
"""

from __future__ import annotations

import math
from typing import Any

from example_arguments import SearchArguments, check_arguments, load_model_and_documents

from ragcun_hf.command_line import parse_arguments, run_script, say
from ragcun_hf.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """Fill the store, search, and print the best documents."""
    (args,) = parse_arguments([SearchArguments], description=__doc__ or "", arguments=arguments)
    check_arguments(args, "langchain_chroma", "langchain-chroma")
    model, ids, texts = load_model_and_documents(args)
    store = fill_store(model, ids, texts, use_predictor=args.use_predictor)
    similarity = model.config.similarity_fn_name
    for document, distance in store.similarity_search_with_score(args.query, k=min(args.top_k, len(ids))):
        say(f"{score_of(distance, similarity):9.4f}  {document.id}  {' '.join(document.page_content.split())[:80]}")


def embeddings_of(model: Any, *, use_predictor: bool = False) -> Any:
    """Make LangChain's embeddings from a model, with its own methods for documents and for queries."""
    from langchain_core.embeddings import Embeddings

    class ModelEmbeddings(Embeddings):
        """Embeds with a trained model."""

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            """Embed documents."""
            return model.encode_document(texts).tolist()

        def embed_query(self, text: str) -> list[float]:
            """Embed one query."""
            return model.encode_query(text, use_predictor=use_predictor).tolist()

    return ModelEmbeddings()


def fill_store(model: Any, ids: list[str], texts: list[str], *, use_predictor: bool = False) -> Any:
    """Embed documents into a Chroma store with default settings; give `persist_directory` to keep it on disk."""
    from chromadb.config import Settings
    from langchain_chroma import Chroma

    if model.config.similarity_fn_name == "dot":
        raise UserError(
            "expected a model with the similarity cosine or euclidean for Chroma's default metric, got dot: pass "
            'Chroma collection_configuration={"hnsw": {"space": "ip"}}'
        )
    settings = Settings(anonymized_telemetry=False)
    embeddings = embeddings_of(model, use_predictor=use_predictor)
    return Chroma.from_texts(texts, embeddings, ids=ids, client_settings=settings)


def score_of(distance: float, similarity: str) -> float:
    """Turn the squared L2 distance into the model's score, larger is better."""
    return -math.sqrt(max(distance, 0.0)) if similarity == "euclidean" else 1.0 - distance / 2


if __name__ == "__main__":
    run_script(main)
