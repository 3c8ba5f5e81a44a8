"""Load one trained model in the libraries of others, old and new: does it load, with which vectors, how does it rank?

    python training/benchmarks/libraries.py --model_path checkpoints/mine --data_dir data/beir

Each library embeds a BEIR dataset in a process of its own that has no ragcun_hf; older ones are installed into
`--packages_dir` first, beside the other packages of this environment. Printed are the largest difference to the
model's own vectors, as a share of their length, and NDCG@10 by the library's default metric. The model must have no
lexical half, so that its plain folder (`ragcun export --format sentence-transformers`) can be made.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from comparison import BenchmarkArguments
from quantized_search import ndcg

from ragcun_hf.command_line import argument, format_table, parse_arguments, quiet_libraries, run_script, say
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.environment import environment_facts
from ragcun_hf.evaluation.results import write_json

_K = 10
# Which packages, beside those of this environment, read the model's own folder ("own") or its plain one.
_OLD = ["transformers==4.41.2", "huggingface_hub==0.23.4", "tokenizers==0.19.1", "datasets==2.19.2"]
_LAST_OF_4 = ["transformers==4.57.3", "huggingface_hub==0.36.0", "tokenizers==0.22.1", "datasets==4.0.0"]
ENVIRONMENTS: dict[str, tuple[str, list[str]]] = {
    "transformers 4.57.3, AutoModel": ("own", _LAST_OF_4),
    "transformers here, AutoModel": ("own", []),
    "sentence-transformers 3.0.1, transformers 4.41.2": (
        "plain",
        [*_OLD, "sentence-transformers==3.0.1", "pyarrow_hotfix==0.7"],
    ),
    "sentence-transformers 5.7.0, transformers 4.57.3": ("plain", [*_LAST_OF_4, "sentence-transformers==5.7.0"]),
    "sentence-transformers here, plain folder": ("plain", []),
    "sentence-transformers here, own folder": ("own, by sentence-transformers", []),
}
_CHILD = """
import json, sys
sys.modules["ragcun_hf"] = None
import numpy as np
kind, folder, texts_file, output = sys.argv[1:]
texts = json.load(open(texts_file, encoding="utf-8"))
if kind == "own":
    from transformers import AutoModel
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    encode = {"query": model.encode_query, "document": model.encode_document}
else:
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(folder, device="cpu", trust_remote_code=kind != "plain")
    encode = {name: lambda part, name=name: model.encode(part, prompt_name=name) for name in ("query", "document")}
np.savez(output, **{name: encode[name](texts[name]) for name in encode})
"""


@dataclass
class Arguments(BenchmarkArguments):
    """The model, the dataset, and a folder for packages."""

    model_path: str | None = argument(None, "A trained model without a lexical half: its folder.")
    data_dir: str = argument("data/beir", "Folder with the BEIR datasets.")
    dataset: str = argument("scifact", "Name of the BEIR dataset.")
    num_documents: int | None = argument(
        None, "Search only so many documents: those that answer a query, then the first others. Default: all."
    )
    packages_dir: str = argument("build/libraries", "Folder for older packages, the plain folder and vectors.")


@dataclass(frozen=True)
class Row:
    """Says how a library loads the model, and how it ranks with it."""

    library: str
    needs_remote_code: bool | None  # None: no code of the model takes part
    difference: float | None  # None: it did not load, or has no vectors of its own
    ndcg: float | None
    remark: str = ""


def main(arguments: list[str] | None = None) -> None:
    """Embed and search with each library, and print one row each."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    if not args.model_path or not Path(args.model_path).is_dir():
        raise UserError(f"--model_path expects the folder of a trained model, got {args.model_path!r}: check it")
    quiet_libraries()
    from ragcun_hf.data.beir_folder import find_beir_dataset
    from ragcun_hf.model.base_models import load_trained_model

    dataset = of_size(find_beir_dataset(args.dataset, args.data_dir), args.num_documents)
    model = load_trained_model(args.model_path)
    work = Path(args.packages_dir)
    work.mkdir(parents=True, exist_ok=True)
    texts = {"query": list(dataset.queries.values()), "document": list(dataset.corpus_texts)}
    (work / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    own = {"query": model.encode_query(texts["query"]), "document": model.encode_document(texts["document"])}
    export = importlib.import_module("ragcun_hf.cli.export")
    flags = ["--model_path", args.model_path]
    export.main([*flags, "--format", "sentence-transformers", "--output_dir", str(work / "plain")])
    export.main([*flags, "--output_dir", str(work / "onnx"), "--precision", "float32"])
    rows = []
    for row in all_rows(args, model, dataset, own, texts, work):
        rows.append(row)
        say(json.dumps(vars(row)))
    names = ("library", "remote code", "largest difference", "NDCG@10", "")
    say(format_table([names, *map(_cells, rows)], num_names=2))
    size = {"dataset": args.dataset, "documents": len(dataset.corpus_ids)}
    contents = {"environment": environment_facts(), **size, "rows": [vars(row) for row in rows]}
    write_json(Path(args.output_dir) / "libraries.json", contents)


def of_size(dataset: Any, num_documents: int | None) -> Any:
    """Return a dataset with the documents that answer a query, and others up to a number."""
    if num_documents is None:
        return dataset
    wanted = {name for judged in dataset.qrels.values() for name in judged}
    order = sorted(range(len(dataset.corpus_ids)), key=lambda row: dataset.corpus_ids[row] not in wanted)
    rows = order[: max(num_documents, len(wanted))]
    ids, texts = [dataset.corpus_ids[row] for row in rows], [dataset.corpus_texts[row] for row in rows]
    return replace(dataset, corpus_ids=ids, corpus_texts=texts)


def all_rows(
    args: Arguments, model: Any, dataset: Any, own: dict[str, np.ndarray], texts: dict[str, list[str]], work: Path
) -> Any:
    """Yield the row of every library."""
    yield Row("this package, exact search", None, 0.0, ndcg(dataset, exact(own)))
    for name, (kind, packages) in ENVIRONMENTS.items():
        folder = work / "plain" if kind == "plain" else Path(str(args.model_path))
        yield in_environment(name, kind, packages, folder, dataset, own, work)
    yield by_onnx(work / "onnx", dataset, own, texts)
    for name, search in stores(model, dataset, own).items():
        yield Row(name, None, None, ndcg(dataset, search()))


def exact(vectors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the rows (Q, K) of the best documents by inner product, which is the cosine here."""
    scores = vectors["query"] @ vectors["document"].T
    return np.argsort(-scores, axis=1, kind="stable")[:, : _K + 1]


def in_environment(
    name: str, kind: str, packages: list[str], folder: Path, dataset: Any, own: dict[str, np.ndarray], work: Path
) -> Row:
    """Embed in a process with other packages."""
    target = work / name.replace(" ", "_").replace(",", "")
    if packages and not target.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--target", str(target), *packages], check=True)
    vectors = work / "vectors.npz"
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, kind, str(folder.resolve()), str(work / "texts.json"), str(vectors)],
        env={**os.environ, "PYTHONPATH": str(target.resolve()), "HF_MODULES_CACHE": str((work / "code").resolve())},
        capture_output=True,
        text=True,
    )
    needs_code = kind != "plain"
    if done.returncode:
        return Row(name, needs_code, None, None, done.stderr.strip().splitlines()[-1][:120])
    found = dict(np.load(vectors))
    return Row(name, needs_code, difference(found, own), ndcg(dataset, exact(found)))


def difference(found: dict[str, np.ndarray], own: dict[str, np.ndarray]) -> float:
    """Return the largest difference of a coordinate, as a share of the vectors' mean length."""
    length = np.linalg.norm(own["document"], axis=1).mean()
    return max(float(np.abs(found[name] - own[name]).max()) for name in own) / float(length)


def by_onnx(folder: Path, dataset: Any, own: dict[str, np.ndarray], texts: dict[str, list[str]]) -> Row:
    """Embed with onnxruntime, by the class of this package, which needs neither PyTorch nor the model's code."""
    from ragcun_hf.publishing.onnx_export import OnnxEncoder

    encoder, found = OnnxEncoder(folder), {}
    for name, part in texts.items():
        prompt = encoder.config["prompts"][name]
        order = sorted(range(len(part)), key=lambda row: len(part[row]))
        vectors = np.empty_like(own[name])
        for start in range(0, len(part), 32):
            rows = order[start : start + 32]
            tokens = encoder.tokenize([prompt + part[row] for row in rows])
            vectors[rows] = encoder.run(*tokens)["embeddings"]
        found[name] = vectors
    return Row("onnxruntime", None, difference(found, own), ndcg(dataset, exact(found)))


def stores(model: Any, dataset: Any, own: dict[str, np.ndarray]) -> dict[str, Callable[[], np.ndarray]]:
    """Return name -> search of stores with their default metric; each takes the model's vectors as they are."""
    places = {name: row for row, name in enumerate(dataset.corpus_ids)}
    num_found = _K + 1

    def in_faiss() -> np.ndarray:
        import faiss

        index = faiss.IndexFlatL2(own["document"].shape[1])
        index.add(own["document"])
        return index.search(own["query"], num_found)[1]

    def in_chroma() -> np.ndarray:
        import chromadb
        from chromadb.config import Settings

        collection = chromadb.EphemeralClient(Settings(anonymized_telemetry=False)).create_collection("documents")
        for start in range(0, len(places), 1_000):
            part = slice(start, start + 1_000)
            collection.add(ids=dataset.corpus_ids[part], embeddings=list(own["document"][part]))
        found = collection.query(query_embeddings=list(own["query"]), n_results=num_found)["ids"]
        return np.array([[places[name] for name in names] for names in found])

    def in_langchain() -> np.ndarray:
        from chromadb.config import Settings
        from langchain_chroma import Chroma
        from langchain_core.embeddings import FakeEmbeddings

        store = Chroma("langchain", FakeEmbeddings(size=1), client_settings=Settings(anonymized_telemetry=False))
        for start in range(0, len(places), 1_000):
            part = slice(start, start + 1_000)
            store._collection.add(
                ids=dataset.corpus_ids[part],
                embeddings=list(own["document"][part]),
                documents=dataset.corpus_texts[part],
            )
        found = [store.similarity_search_by_vector(list(map(float, query)), k=num_found) for query in own["query"]]
        return np.array([[places[document.id] for document in documents] for documents in found])

    def in_llama_index() -> np.ndarray:
        from llama_index.core.schema import TextNode
        from llama_index.core.vector_stores import SimpleVectorStore
        from llama_index.core.vector_stores.types import VectorStoreQuery

        store = SimpleVectorStore()
        store.add(
            [
                TextNode(id_=name, text="-", embedding=vector.tolist())
                for name, vector in zip(places, own["document"], strict=True)
            ]
        )
        found = [
            store.query(VectorStoreQuery(query_embedding=query.tolist(), similarity_top_k=num_found)).ids
            for query in own["query"]
        ]
        return np.array([[places[name] for name in names or []] for names in found])

    def in_beir() -> np.ndarray:
        from ragcun_hf.evaluation.beir_search import beir_retriever

        corpus = {
            name: {"title": "", "text": text}
            for name, text in zip(dataset.corpus_ids, dataset.corpus_texts, strict=True)
        }
        run = beir_retriever(model, batch_size=32).retrieve(corpus, dataset.queries)
        ranked = [sorted(run[query].items(), key=lambda item: -item[1])[:num_found] for query in dataset.queries]
        return np.array([[places[name] for name, _ in found] for found in ranked])

    return {
        "faiss, IndexFlatL2": in_faiss,
        "Chroma at its defaults (L2)": in_chroma,
        "LangChain with Chroma at its defaults (L2)": in_langchain,
        "LlamaIndex at its defaults": in_llama_index,
        "beir, DenseRetrievalExactSearch": in_beir,
    }


def _cells(row: Row) -> tuple[str, ...]:
    code = {None: "none", True: "yes", False: "no"}[row.needs_remote_code]
    shown = [
        "-" if value is None else form.format(value)
        for form, value in (("{:.1e}", row.difference), ("{:.4f}", row.ndcg))
    ]
    return (row.library, code, *shown, row.remark)


if __name__ == "__main__":
    run_script(main)
