"""Serve a page that searches a corpus with a trained model and with its frozen base, side by side.

    python training/search_demo.py --model_path checkpoints/mine --corpus documents.jsonl

The encoder runs once over the documents; its features stay on disk, so that the next start takes seconds. The page
shows how each document moved from one ranking to the other, and how evenly the vectors of both spread. Ctrl-C ends it.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, say
from ragcun_hf.errors import UserError
from ragcun_hf.features.arguments import FeatureArguments

_MOST_RESULTS, _MOST_EXAMPLES = 100, 8

# Colours and borders that are named with -- are those of Gradio's theme, dark or light as the reader's system is.
_STYLE = """
:root { --sp-quiet: #5a6270; --sp-line: #d9dde3 }
.dark { --sp-quiet: #a9b1bf; --sp-line: #3a404c }
.gradio-container { max-width: 1180px !important; min-width: 0 !important; margin: 0 auto; padding: 0 !important }
.gradio-container > .main { padding: 36px 28px 48px !important }
.gradio-container .html-container { padding: 0 !important }
.sp-top h1 { font-size: 1.75rem; font-weight: 650; letter-spacing: -.015em; margin: 0 0 .25rem }
.sp-top p, .sp-spread > p, .sp-note, .sp-lists header p { color: var(--sp-quiet); margin: 0 }
.sp-top p { max-width: 46rem }
.sp-ask { gap: 10px }
.sp-ask button { align-self: flex-start; min-height: 42px }
.sp-box, .form:has(> .sp-box) { border: 0 !important; padding: 0 !important; background: none !important }
.sp-lists { display: grid; grid-template-columns: 1fr 1fr; gap: 28px; margin-top: 14px }
.sp-lists section { min-width: 0; scroll-margin-top: 8px }
.sp-lists header { display: grid; grid-template-columns: 1fr auto; border-bottom: 2px solid var(--body-text-color) }
.sp-lists header { padding-bottom: 8px }
.sp-lists h2, .sp-spread h2 { font-size: 1.15rem; font-weight: 650; margin: 0 }
.sp-lists header p { grid-column: 1 / -1; font-size: .85rem; line-height: 1.45; overflow-wrap: anywhere }
.sp-lists ol { list-style: none; margin: 0; padding: 0 }
.sp-hit { display: grid; grid-template-columns: 2.1rem minmax(0, 1fr); padding: 14px 0; overflow: hidden }
.sp-hit { border-bottom: 1px solid var(--sp-line); overflow-wrap: anywhere }
.sp-rank { font-size: 1.05rem; font-variant-numeric: tabular-nums; color: var(--sp-quiet) }
.sp-hit h3 { font-size: 1rem; font-weight: 600; line-height: 1.35; margin: 0 }
.sp-hit p { margin: 6px 0 0; line-height: 1.5; font-size: .92rem }
.sp-facts { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; font-variant-numeric: tabular-nums }
.sp-score { color: var(--sp-quiet); font-size: .85rem }
.sp-change { padding: 1px 9px; border-radius: 99px; font-size: .82rem; font-weight: 600; white-space: nowrap }
.sp-change { background: #eceef1; color: #3d4450 }
.sp-up, .sp-new { background: #dff3e6; color: #0a5a31 }
.sp-down, .sp-gone { background: #fde9dc; color: #8a3a06 }
.dark .sp-change { background: #2b303a; color: #d5dae3 }
.dark .sp-up, .dark .sp-new { background: #12402a; color: #9ce8bd }
.dark .sp-down, .dark .sp-gone { background: #4d2810; color: #ffc59f }
.sp-new, .sp-gone { outline: 1px solid currentColor; outline-offset: -1px }
.sp-hit summary { cursor: pointer; font-size: .85rem; margin-top: 6px; color: var(--sp-quiet) }
.sp-hit div:has(> details[open]) > .sp-snippet, .sp-jump { display: none }
.sp-spread { margin-top: 24px; padding-top: 20px; border-top: 1px solid var(--sp-line) }
.sp-spread table { border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; font-size: .95rem }
.sp-spread th, .sp-spread td { text-align: left; font-weight: 400; padding: 6px 28px 6px 0; vertical-align: top }
.sp-spread thead th { font-weight: 600 }
.sp-spread td { white-space: nowrap }
.sp-spread th span { display: block; font-size: .82rem; color: var(--sp-quiet) }
.sp-figures { display: grid; grid-template-columns: 1fr 1fr; gap: 28px }
.sp-figures figure { margin: 0; min-width: 0; display: flex; flex-direction: column-reverse }
.sp-figures svg { width: 100%; max-width: 460px; height: auto }
.sp-figures svg text { font-family: inherit !important }
.sp-figures figcaption { font-size: .92rem; font-weight: 600 }
@media (max-width: 760px) {
  .gradio-container > .main { padding: 20px 16px 32px !important }
  .gradio-container .gallery:has(> .gallery-item) { flex-wrap: nowrap; overflow-x: auto; width: calc(100vw - 32px) }
  .gradio-container .gallery-item { flex: none; max-width: 75vw }
  .sp-spread th, .sp-spread td { padding-right: 16px }
  .sp-lists, .sp-figures { grid-template-columns: minmax(0, 1fr) }
  .sp-jump { display: inline; font-size: .85rem; align-self: center }
}
"""


@dataclass
class SearchDemoArguments:
    """What is searched with what, and where the page is served."""

    model_path: str | None = argument(None, "A trained model: its folder or its Hub id.")
    revision: str | None = argument(None, "Branch, tag or commit of the model on the Hub.")
    corpus: str | None = argument(
        None, "The documents: a file (JSON, JSON Lines, CSV, TSV, Parquet, text), a BEIR folder, or a Hub dataset id."
    )
    split: str = argument("train", "Part of a Hub dataset.")
    text_column: str = argument("text", "Column with a document's text.")
    title_column: str = argument("title", "Column with its title; may be absent.")
    limit: int | None = argument(None, "Read only so many rows of the corpus.")
    queries: str | None = argument(None, "Example queries to click: a file, of which the first eight are shown.")
    query_column: str = argument("text", "Column with the text of an example query.")
    use_predictor: bool = argument(False, "Search with the predictor's output from the start; a box changes it.")
    top_k: int = argument(10, "Documents shown of each system, 1 to 100.")
    host: str = argument("127.0.0.1", "Address to serve on; 0.0.0.0 lets other machines in.")
    port: int = argument(7860, "Port to serve on; 0 takes any free one.")
    share: bool = argument(False, "Ask Gradio's own servers for a public address too.")


def main(arguments: list[str] | None = None) -> None:
    """Check, read, encode what is new, and serve until Ctrl-C."""
    args, features = parse_arguments(
        [SearchDemoArguments, FeatureArguments], description=__doc__ or "", arguments=arguments
    )
    quiet_libraries()
    _check(args)
    port = _free_port(args.host, args.port)
    page = make_page_of(args, features)
    serve(page, args, port)


def _check(args: SearchDemoArguments) -> None:
    """Tell what is wrong before anything is loaded."""
    if not args.model_path:
        raise UserError("--model_path expects a trained model, got none: name its folder or its Hub id")
    if not args.corpus:
        raise UserError("--corpus expects the documents to search, got none: name a file, a BEIR folder or a Hub id")
    if not 1 <= args.top_k <= _MOST_RESULTS:
        raise UserError(f"--top_k must be between 1 and {_MOST_RESULTS}, got {args.top_k}: change it")
    if not 0 <= args.port <= 65_535:
        raise UserError(f"--port must be between 0 and 65535, got {args.port}: change it, or leave it out")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the search page expects Gradio, which is not installed: run pip install 'ragcun_hf[demo]'")


def _free_port(host: str, port: int) -> int:
    """Return the port to serve on, if this machine lets us have it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            if os.name == "posix":  # as servers do there: a port that was closed a moment ago is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host and --port expect an address of this machine and a free port, got {host} and {port} "
            f"({getattr(error, 'strerror', None) or error}): name another --port, or 0 for any free one"
        ) from error


def make_page_of(args: SearchDemoArguments, features: FeatureArguments) -> Any:
    """Load the model, read the documents, encode what is new, and build the page."""
    from accelerate import PartialState
    from search_page.index import SearchIndex
    from search_page.page import make_page

    from ragcun_hf.data.documents import read_documents
    from ragcun_hf.model.base_models import load_trained_model

    examples = _example_queries(args) if args.queries else []
    model = load_trained_model(args.model_path or "", revision=args.revision)
    if args.use_predictor and model.predictor is None:
        raise UserError("--use_predictor expects a model with a predictor, got one without: leave the flag out")
    documents = read_documents(
        args.corpus or "", split=args.split, text_column=args.text_column, title_column=args.title_column,
        limit=args.limit,
    )  # fmt: skip
    say(f"Read {len(documents):,} documents from {args.corpus}.")
    index = SearchIndex(model.to(PartialState().device), documents, features=features)
    say(index.summary())
    return make_page(
        index, heads=_heads(args, index), top_k=args.top_k, examples=examples, use_predictor=args.use_predictor
    )


def _example_queries(args: SearchDemoArguments) -> list[str]:
    from itertools import islice

    from ragcun_hf.data.sources import open_source

    rows = islice(open_source(args.queries or "").rows(), _MOST_EXAMPLES)
    return list(dict.fromkeys(row.text(args.query_column) for row in rows))


def _heads(args: SearchDemoArguments, index: Any) -> list[tuple[str, str]]:
    """Name both systems; a folder of this machine by its last part."""
    config = index.model.config
    base, path = config.base_model_name or "encoder", Path(args.model_path or "")
    names = (
        Path(base).name if Path(base).is_absolute() else base,
        path.resolve().name if path.is_dir() else str(path),
    )
    details = [f"{name}, {width} dimensions" for name, width in zip(names, index.widths, strict=True)]
    return [("Frozen base" if config.freeze_base else "Untrained base", details[0]), ("Trained model", details[1])]


def serve(page: Any, args: SearchDemoArguments, port: int) -> None:
    """Serve the page until Ctrl-C, which is how it is meant to end."""
    import gradio

    # Gradio asks its own address whether it answers; that is no matter for a proxy.
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "localhost", "127.0.0.1", args.host]))
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # none to fetch
    theme = gradio.themes.Default(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "Consolas", "monospace"])
    theme.set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
    host = f"[{args.host}]" if ":" in args.host else args.host
    try:
        _, address, public_address = page.launch(
            server_name=host, server_port=port, share=args.share, theme=theme, head=f"<style>{_STYLE}</style>",
            prevent_thread_lock=True, quiet=True, footer_links=[], enable_monitoring=False, run_history=False,
            ssr_mode=False, pwa=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"expected to serve on {args.host}, port {port}, got: {error} Name another --port") from error
    say(f"Serving on {address} (Ctrl-C ends it)." + (f" Public: {public_address}" if public_address else ""))
    sys.stdout.flush()  # a file or a pipe would not show the address before the end
    try:
        while True:
            time.sleep(3_600)
    except KeyboardInterrupt:
        say("Stopped.")
    finally:
        page.close(verbose=False)
