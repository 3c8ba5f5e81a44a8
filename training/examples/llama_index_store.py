"""Search a corpus with a trained model in LlamaIndex, with the vectors in its own store in memory.

    python training/examples/llama_index_store.py --model_path checkpoints/mine --corpus docs.jsonl --query "sort"

Every index of LlamaIndex takes the object that `embed_model_of` makes. The store here keeps its default metric, the
cosine. No data leaves this machine.
"""

from __future__ import annotations

from typing import Any

from example_arguments import SearchArguments, check_arguments, load_model_and_documents

from ragcun_hf.command_line import parse_arguments, run_script, say
from ragcun_hf.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """Fill the index, search, and print the best documents."""
    (args,) = parse_arguments([SearchArguments], description=__doc__ or "", arguments=arguments)
    check_arguments(args, "llama_index", "llama-index-core")
    model, ids, texts = load_model_and_documents(args)
    index = fill_index(model, ids, texts, use_predictor=args.use_predictor)
    for found in index.as_retriever(similarity_top_k=args.top_k).retrieve(args.query):
        say(f"{found.score:9.4f}  {found.node_id}  {' '.join(found.text.split())[:80]}")


def embed_model_of(model: Any, *, use_predictor: bool = False) -> Any:
    """Make LlamaIndex's embedding from a model, with its own methods for documents and for queries."""
    from llama_index.core.base.embeddings.base import BaseEmbedding

    class ModelEmbedding(BaseEmbedding):
        """Embeds with a trained model."""

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return model.encode_document(texts).tolist()

        def _get_text_embedding(self, text: str) -> list[float]:
            return model.encode_document(text).tolist()

        def _get_query_embedding(self, query: str) -> list[float]:
            return model.encode_query(query, use_predictor=use_predictor).tolist()

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return self._get_query_embedding(query)

    return ModelEmbedding(model_name=model.name_or_path or "ragcun_hf", embed_batch_size=256)


def fill_index(model: Any, ids: list[str], texts: list[str], *, use_predictor: bool = False) -> Any:
    """Embed documents into an index with the default store; `index.storage_context.persist` keeps it on disk."""
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    similarity = model.config.similarity_fn_name
    if similarity != "cosine":
        raise UserError(
            f"expected a model with the similarity cosine for LlamaIndex's own store, got {similarity}: use another "
            "store, and set its metric"
        )
    # Metadata would be embedded in front of the text.
    nodes = [TextNode(id_=name, text=text) for name, text in zip(ids, texts, strict=True)]
    return VectorStoreIndex(nodes, embed_model=embed_model_of(model, use_predictor=use_predictor))


if __name__ == "__main__":
    run_script(main)
