"""Time encoding, search and head training on a card beside what it could do and beside sentence-transformers.

    python training/benchmarks/gpu.py
    python training/benchmarks/gpu.py --texts_file texts.txt --shapes MiniLM-L6
    python training/benchmarks/gpu.py --device cpu --quick
    python training/benchmarks/gpu.py --parts evaluation --num_passages 1000000
    python training/benchmarks/gpu.py --parts quality --data_dir data/beir/scifact

It downloads nothing. After --minutes, it starts no further part, and says which are left. MiniLM-L6 is the embedded
model where it is installed; the other encoders have its shape, or those of MPNet-base and BERT-base, with random
weights, whose speed is the same. Without --texts_file, the texts are words in a random order, about as many as in
SciFact's documents. Every part is timed once; our loop comes before all others, with its first run too.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from comparison import BenchmarkArguments, at_least, at_most, describe, figure, report, set_threads
from exact_search import random_rows, write_documents
from gpu_pipeline import evaluation, quality, two_processes
from head_training import RandomStore, trainer_run
from many_heads import time_heads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script, say
from ragcun_hf.errors import UserError

SHAPES = {  # name -> model type, width, layers
    "MiniLM-L6": ("bert", 384, 6),
    "MPNet-base": ("mpnet", 768, 12),
    "BERT-base": ("bert", 768, 12),
}
PARTS = ("encoding", "search", "head", "sweep", "encoder", "evaluation", "quality", "processes")
_WORDS = (
    "the of and in to a with for that is was by are on as from these cells protein expression human patients results "
    "study activity gene treatment disease response levels mice cancer associated increased role risk factor binding "
    "clinical immune tissue growth signaling receptor analysis function induced specific between data however during "
    "significantly regulation molecular evidence mutations randomized transcription"
).split()
_MEDIAN_WORDS = 190  # of a document of SciFact
_VOCABULARY = 30_522
_WIDE = 768  # of such encoders, the matrix products take longer than tokenizing
_BARE_BATCH = 512  # texts
_NUM_COMPARED = 1_000  # texts
_PEER_BATCHES = (32, 128, 512)  # texts, in bfloat16; at its defaults, it takes 32
_NUM_RESULTS = 100
_SWEEP = "24, by the sweep"


@dataclass
class Arguments(BenchmarkArguments):
    """The device, and what to time there."""

    device: str = argument("cuda", "Device of the models: cuda, cuda:1, or cpu.")
    parts: list[str] = argument(list(PARTS), "What to time.")
    quick: bool = argument(False, "Time small sizes, to see that the script runs; the figures mean nothing.")
    shapes: list[str] = argument(list(SHAPES), "Encoders to time.")
    texts_file: str | None = argument(None, "Texts to encode, one a line. Default: random words.")
    num_texts: int = argument(5_183, "Texts to encode.")
    max_length: int = argument(256, "Tokens per text, at most.")
    num_documents: int = argument(1_000_000, "Documents to search.")
    num_queries: int = argument(1_000, "Queries to search with.")
    num_pairs: int = argument(10_000, "Pairs to train a head on.")
    epochs: int = argument(3, "Passes over them.")
    batch_size: int = argument(128, "Pairs per step.")
    repeats: int = argument(2, "Timed rounds of the sweep; one round is not warmed up.")
    encoder_steps: int = argument(60, "Steps that train the encoder too.")
    encoder_batch_size: int = argument(64, "Pairs in each of them.")
    num_passages: int = argument(100_000, "Passages of an evaluation from texts to figures.")
    minutes: float = argument(3.5, "Start no further part after so many minutes; 0: run all.")
    data_dir: str | None = argument(None, "BEIR folder of one data set, for NDCG@10 beside that of the processor.")


def main(arguments: list[str] | None = None) -> None:
    """Time every part once, and print its figures with their targets."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    import torch

    for flag, given, known in (("shapes", args.shapes, SHAPES), ("parts", args.parts, PARTS)):
        if unknown := sorted(set(given) - set(known)) or ["none"] * (not given):
            raise UserError(
                f"--{flag} expects names of {', '.join(known)}, got {unknown[0]!r}: use one of these names"
            )
    args.device = see_one_card(args.device)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        say("No CUDA device here: run this script on a machine with one, or see it run with --device cpu --quick.")
        return
    if args.quick:
        args = _shrunk(args)
    set_threads(args.threads)
    details: dict[str, Any] = {
        "device": device_name(args.device),
        "quick": args.quick,
        "seconds": {},
        "failed": {},
        "left": [],
    }
    say(f"On {details['device']}")
    claims = time_everything(args, details)
    report(args, "gpu", claims, details=details)
    if failed := details["failed"]:
        raise UserError(
            f"expected every part to run, got {'; '.join(failed.values())}: run --parts {' '.join(failed)}"
        )


def time_everything(args: Arguments, details: dict[str, Any]) -> list[dict[str, Any]]:
    """Time all parts; note the seconds in the details, and return the claims."""
    seconds, claims = details["seconds"], []
    with tempfile.TemporaryDirectory() as temporary:
        folder, texts = Path(temporary), _texts(args)
        path = encoder_folder(args.shapes[0], folder / "encoder")
        timed: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "encoding": lambda: [
                claim for name in args.shapes for claim in encoding(args, name, texts, folder / name, seconds)
            ],
            "search": lambda: searching(args, folder / "documents.npy", seconds),
            "head": lambda: head_training(args, path, seconds),
            "sweep": lambda: sweeping(args, seconds),
            "encoder": lambda: encoder_training(args, path, texts, folder / "trained", seconds),
            "evaluation": lambda: evaluation(path, _WORDS, args.num_passages, args.num_queries, args.device),
            "quality": lambda: quality(path, Path(args.data_dir), args.device) if args.data_dir else [],
            "processes": lambda: two_processes(path, texts, args.device),
        }
        started, asked = time.perf_counter(), [part for part in PARTS if part in args.parts]
        for place, part in enumerate(asked):
            if place and 0 < args.minutes * 60 < time.perf_counter() - started:
                details["left"] = asked[place:]
                say(f"After {args.minutes:g} minutes, some parts are left: run --parts {' '.join(asked[place:])}")
                break
            claims += (found := _found(part, timed[part], details["failed"]))
            for claim in found:  # a later part may be stopped
                say(f"  {describe(claim)}")
    return claims


def _found(part: str, run: Callable[[], list[dict[str, Any]]], failed: dict[str, str]) -> list[dict[str, Any]]:
    """Return the claims of a part; of one that fails, note the error, as the other parts are worth their time."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 (of any library; the run ends with it)
        traceback.print_exc()
        failed[part] = f"{type(error).__name__} in {part}"
        return []


def see_one_card(device: str) -> str:
    """Hide all cards but one, before CUDA starts, as the peer's Trainer would use all of them; return its name."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return device
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = {str(place): name for place, name in enumerate(seen.split(","))} if seen is not None else {}
    os.environ["CUDA_VISIBLE_DEVICES"] = cards.get(number or "0", "" if cards else number or "0")
    return kind


def _shrunk(args: Arguments) -> Arguments:
    args.num_texts, args.max_length, args.shapes = min(args.num_texts, 8), 24, args.shapes[:1]
    args.num_documents, args.num_queries, args.num_pairs, args.epochs = 2_000, 20, 64, 1
    args.batch_size = 16
    args.encoder_steps, args.encoder_batch_size, args.repeats = 1, 2, 1
    args.num_passages = 200
    return args


def device_name(device: str) -> str:
    """Return the name of a card, or of the processor."""
    import torch

    from ragcun_hf.evaluation.environment import environment_facts

    is_card = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if is_card else environment_facts()["machine"]["processor"]


def _texts(args: Arguments) -> list[str]:
    if args.texts_file:
        texts = [line.strip() for line in Path(args.texts_file).read_text(encoding="utf-8").splitlines()]
        texts = list(dict.fromkeys(filter(None, texts)))[: args.num_texts]
        if not texts:
            raise UserError(f"--texts_file expects a text per line, got none in {args.texts_file}: name another file")
        return texts
    generator = random.Random(0)
    lengths = [int(generator.lognormvariate(np.log(_MEDIAN_WORDS), 0.4)) for _ in range(args.num_texts)]
    return [" ".join(generator.choices(_WORDS, k=max(5, length))) for length in lengths]


def seconds_of(device: str, run: Callable[[], Any]) -> float:
    """Run once, and wait for the card."""
    import torch

    is_card = torch.device(device).type == "cuda"
    if is_card:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if is_card:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@dataclass
class Encoders:
    """One encoder in a folder, loaded by us and by sentence-transformers, and the seconds of every run."""

    args: Arguments
    texts: list[str]
    folder: str
    model: Any
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Kind of the encoder."""
        return self.model.config.encoder_config.model_type

    def time(self, name: str, run: Callable[[], Any]) -> None:
        """Run once, and note the seconds."""
        self.seconds[name] = seconds_of(self.args.device, run)

    def time_ours(self) -> None:
        """Run our loop twice, as the second run meets the shapes of the first, and in bfloat16."""
        import torch

        from ragcun_hf.features.encoder_backends import choose_dtype, feature_function
        from ragcun_hf.features.encoder_loop import encode_in_batches

        def encode(dtype: Any = None) -> None:
            dtype = dtype or choose_dtype("auto", self.model.device, family=self.family)
            for _ in encode_in_batches(self.model, self.texts, compute=feature_function(self.model, dtype=dtype)):
                pass

        for name in ("ours, first run", "ours, second run"):
            self.time(name, encode)
        self.time("ours, bfloat16", lambda: encode(torch.bfloat16))

    def least_cosines(self) -> dict[str, float]:
        """Compare features in half precision with those in float32."""
        import torch

        from ragcun_hf.features.encoder_backends import feature_function
        from ragcun_hf.features.encoder_loop import encode_in_batches

        def features(dtype: Any) -> Any:
            compute = feature_function(self.model, dtype=dtype)
            parts = list(encode_in_batches(self.model, self.texts[:_NUM_COMPARED], compute=compute))
            order = [row for rows, _ in parts for row in rows]
            return torch.cat([part for _, part in parts])[np.argsort(order)]

        exact = features(torch.float32)
        cosine = torch.nn.functional.cosine_similarity
        kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        return {name: float(cosine(exact, features(dtype)).min()) for name, dtype in kinds.items()}

    def time_parts(self) -> None:
        """Run the tokenizer alone, and then the encoder alone on what it returned."""
        import torch

        from ragcun_hf.features.encoder_backends import attention_of, choose_dtype

        device, tokenizer = self.model.device, self.model.tokenizer
        options = {"truncation": True, "max_length": self.args.max_length}
        self.time("tokenizing alone", lambda: tokenizer(self.texts, **options))
        ids = sorted(tokenizer(self.texts, **options)["input_ids"], key=len, reverse=True)
        parts = [{"input_ids": ids[start : start + _BARE_BATCH]} for start in range(0, len(ids), _BARE_BATCH)]
        batches = [tokenizer.pad(part, return_tensors="pt").to(device) for part in parts]
        encoder = self.model.encoder.to(choose_dtype("auto", device, family=self.family))

        @torch.inference_mode()
        def encode() -> None:
            with attention_of(device):
                for batch in batches:
                    encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

        encode()
        self.time("bare encoder", encode)

    def time_peer(self) -> None:
        """Run `SentenceTransformer.encode` at its defaults, and in bfloat16 with several sizes of batches."""
        import torch
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(self.folder, device=self.args.device)
        peer.max_seq_length = self.args.max_length
        peer.encode(self.texts[:64])
        self.time("sentence-transformers, float32", lambda: peer.encode(self.texts))
        peer.to(torch.bfloat16)
        for size in _PEER_BATCHES[: 1 if self.args.quick else None]:
            run = lambda size=size: peer.encode(self.texts, batch_size=size, convert_to_tensor=True)  # noqa: E731
            peer.encode(self.texts[: 2 * size], batch_size=size, convert_to_tensor=True)
            self.time(f"sentence-transformers, bfloat16, batches of {size}", run)


def encoding(
    args: Arguments, name: str, texts: list[str], folder: Path, seconds: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Encode the same texts with one encoder in every way."""
    from ragcun_hf import IsotropicGaussianModel

    path = encoder_folder(name, folder)
    model = IsotropicGaussianModel.from_encoder(path, max_length=args.max_length).to(args.device).eval()
    model.encode(texts[:2])  # starts the device and its libraries
    encoders = Encoders(args, texts, path, model)
    encoders.time_ours()
    cosines = [
        figure(f"{name}: least cosine of features in {kind} to those in float32", value, "")
        for kind, value in encoders.least_cosines().items()
    ]
    encoders.time_peer()
    encoders.time_parts()  # casts the encoder, so it is last
    seconds[name] = found = encoders.seconds
    for what, each in found.items():
        say(f"  {name}, {what}: {each:.2f} s, {len(texts) / each:,.0f} texts/s")
    return encoding_claims(name, found) + cosines


def encoding_claims(name: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Relate our first run to the other contenders; wide encoders are held to the bare encoder alone."""
    ours, bare = seconds["ours, first run"], seconds["bare encoder"]
    claims = [at_most(f"{name}: our first run relative to the second", ours / seconds["ours, second run"], 1.15)]
    if SHAPES[name][1] >= _WIDE:
        return [*claims, at_least(f"{name}: our speed as a share of the bare encoder's", bare / ours, 0.6, "")]
    peer = seconds["sentence-transformers, float32"]
    best = min(value for what, value in seconds.items() if what.startswith("sentence-transformers, bfloat16"))
    bound = max(seconds["tokenizing alone"], bare)
    return [
        *claims,
        at_most(f"{name}: our first run relative to the larger of tokenizing and the bare encoder", ours / bound, 1.3),
        at_least(f"{name}: our speed relative to sentence-transformers in float32", peer / ours, 4),
        at_least(f"{name}: our speed relative to its best in bfloat16", best / ours, 2),
    ]


def encoder_folder(name: str, folder: Path) -> str:
    """Return the folder of the embedded model, or make one with random weights of a shape."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from ragcun_hf.model.embedded_isotropic_gaussian import embedded_model_folder

    try:
        embedded = str(embedded_model_folder())
    except ImportError:
        embedded = None
        say(f"  {name} has random weights: the package of the embedded model is not installed")
    if embedded and name == "MiniLM-L6":
        return embedded
    kind, width, layers = SHAPES[name]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 12}
    places = {"max_position_embeddings": 514, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=_VOCABULARY, intermediate_size=4 * width, **sizes, **places)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(embedded) if embedded else _word_tokenizer()
    tokenizer.save_pretrained(folder)
    return str(folder)


def _word_tokenizer() -> Any:
    """Make a tokenizer that knows the words of the made-up texts, and splits all others into letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **special)


def searching(args: Arguments, path: Path, seconds: dict[str, Any]) -> list[dict[str, Any]]:
    """Search documents in a memory map, and compare with a copy of all to the device, the product and topk."""
    import torch

    from ragcun_hf.search.exact import exact_search

    documents = np.load(write_documents(path, args.num_documents), mmap_mode="r")
    queries = random_rows(args.num_queries, seed=1)
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = exact_search(queries, documents, k=_NUM_RESULTS, device=args.device).indices

    def plain() -> None:
        given = (torch.from_numpy(np.array(rows)).to(args.device) for rows in (queries, documents))
        queries_QD, documents_ND = (torch.nn.functional.normalize(rows, dim=1) for rows in given)
        found["plain"] = (queries_QD @ documents_ND.T).topk(_NUM_RESULTS).indices.cpu().numpy()

    plain()
    ours()
    seconds["search"] = taken = {"plain": seconds_of(args.device, plain), "ours": seconds_of(args.device, ours)}
    same = np.mean([len(np.intersect1d(*rows)) for rows in zip(found["ours"], found["plain"], strict=True)])
    size = f"top-{_NUM_RESULTS} of {args.num_queries:,} queries, {args.num_documents:,} documents"
    return [
        figure(size, taken["ours"], "s"),
        at_most("the same relative to copy, product and topk", taken["ours"] / taken["plain"], 2.0),
        figure("share of its results among ours", float(same) / _NUM_RESULTS, ""),
    ]


def head_training(args: Arguments, path: str, seconds: dict[str, Any]) -> list[dict[str, Any]]:
    """Train a head on random features, as the training commands do."""
    import torch

    from ragcun_hf import IsotropicGaussianModel
    from ragcun_hf.objective.inputs import FeaturePairs

    model = IsotropicGaussianModel.from_encoder(path, use_predictor=True)
    queries, documents = ([f"{kind}{row}" for row in range(args.num_pairs)] for kind in "qd")
    store = RandomStore(args.num_pairs, model.config.feature_dim)
    pairs = FeaturePairs(queries, documents, [[]] * args.num_pairs, store=store)
    use_cpu = torch.device(args.device).type == "cpu"
    train = trainer_run(args, pairs, model, use_cpu=use_cpu)
    train()  # starts the libraries
    seconds["head training"] = spent = seconds_of(args.device, train)
    num_steps = args.epochs * (args.num_pairs // args.batch_size)
    return [
        at_most(f"head training, {args.num_pairs:,} pairs x {args.epochs} epochs", spent, 2.0, "s"),
        figure("milliseconds per step", 1e3 * spent / num_steps, "ms"),
    ]


def sweeping(args: Arguments, seconds: dict[str, Any]) -> list[dict[str, Any]]:
    """Train 24 heads at once, and one."""
    import torch

    from ragcun_hf.model.embedded_isotropic_gaussian import has_embedded_model

    if not has_embedded_model():
        return []
    found = time_heads(args, torch.device(args.device))
    seconds["sweep"] = found.seconds
    return [
        at_most("24 heads by a sweep relative to one by the Trainer", found.ratio(_SWEEP, "one, by the Trainer"), 2.0),
        at_most("24 heads by a sweep relative to one by a sweep", found.ratio(_SWEEP, "one, by the sweep"), 2.0),
        figure("24 heads by a sweep", found.median(_SWEEP), "s"),
    ]


def encoder_training(
    args: Arguments, path: str, texts: list[str], folder: Path, seconds: dict[str, Any]
) -> list[dict[str, Any]]:
    """Train the encoder too, on pairs of the two halves of each text, and with sentence-transformers."""
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    halves = (halves * (args.encoder_steps * args.encoder_batch_size // len(halves) + 1))[
        : args.encoder_steps * args.encoder_batch_size
    ]
    kinds = {"ours": _our_training(args, path, halves, folder), "its peer": _peer_training(args, path, halves, folder)}
    if not args.quick:
        kinds["ours, compiled"] = _our_training(args, path, halves, folder, torch_compile=True)
    seconds["encoder training"] = found = {}
    claims = []
    for name, train in kinds.items():
        found[name] = seconds_of(args.device, train)
        found[f"{name}, again"] = seconds_of(args.device, train)
        speed = args.encoder_steps / found[f"{name}, again"]
        claims.append(figure(f"steps per second that train the encoder, {name}", speed, "steps/s"))
    return claims


def _training_options(args: Arguments, folder: Path) -> dict[str, Any]:
    import torch

    is_card = torch.device(args.device).type == "cuda"
    sizes = {"per_device_train_batch_size": args.encoder_batch_size, "max_steps": args.encoder_steps}
    kinds = {"bf16": is_card, "use_cpu": not is_card, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    return {"output_dir": str(folder / "out"), **sizes, **kinds, "logging_steps": args.encoder_steps}


def _our_training(
    args: Arguments, path: str, halves: list[tuple[str, str]], folder: Path, **options: Any
) -> Callable[[], None]:
    from transformers import PrinterCallback

    from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainingArguments
    from ragcun_hf.objective.inputs import TextPairCollator
    from ragcun_hf.trainer.loss_trainer import LossTrainer

    rows = [{"query": query, "positive": document} for query, document in halves]

    def train() -> None:
        model = IsotropicGaussianModel.from_encoder(path, max_length=args.max_length, freeze_base=False)
        collator = TextPairCollator(model.tokenizer, max_length=args.max_length)
        arguments = IsotropicGaussianTrainingArguments(**_training_options(args, folder), **options)
        trainer = LossTrainer(model=model, args=arguments, data_collator=collator, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    return train


def _peer_training(args: Arguments, path: str, halves: list[tuple[str, str]], folder: Path) -> Callable[[], None]:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from transformers import PrinterCallback

    rows = Dataset.from_list([{"anchor": query, "positive": document} for query, document in halves])

    def train() -> None:
        model = SentenceTransformer(path, device=args.device)
        model.max_seq_length = args.max_length
        arguments = SentenceTransformerTrainingArguments(**_training_options(args, folder))
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    return train


if __name__ == "__main__":
    run_script(main)
