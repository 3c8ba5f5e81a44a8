"""Serve a page that searches a corpus with a trained model and with its frozen base, side by side.

    python training/search_demo.py --model_path checkpoints/mine --corpus documents.jsonl

The encoder runs once over the documents, and its features are kept on disk, so the next start takes seconds. The page
shows how each document moved from one ranking to the other, and how evenly the vectors of both systems spread. Press
Ctrl-C to stop.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command_line import argument, parse_arguments, quiet_libraries, say
from ..errors import UserError
from ..features.arguments import FeatureArguments

_MOST_RESULTS, _MOST_EXAMPLES = 100, 8


@dataclass
class SearchDemoArguments:
    """The model, the documents, and the address of the page."""

    model_path: str | None = argument(None, "A trained model: its folder or its Hub id.")
    revision: str | None = argument(None, "Branch, tag or commit of the model on the Hub.")
    corpus: str | None = argument(
        None, "The documents: a file (JSON, JSON Lines, CSV, TSV, Parquet, text), a BEIR folder, or a Hub dataset id."
    )
    split: str = argument("train", "Part of a Hub dataset.")
    text_column: str = argument("text", "Column with a document's text.")
    title_column: str = argument("title", "Column with its title; may be absent.")
    limit: int | None = argument(None, "Read only this many rows of the corpus.")
    queries: str | None = argument(None, "A file of example queries to click; the first eight are shown.")
    query_column: str = argument("text", "Column with the text of an example query.")
    use_predictor: bool = argument(False, "Search with the predictor's output at the start; a checkbox changes it.")
    top_k: int = argument(10, "Documents shown for each system, 1 to 100.")
    host: str = argument("127.0.0.1", "Address to serve on; 0.0.0.0 lets other machines connect.")
    allowed_hosts: list[str] = argument(
        [], "More names that the page answers under, such as that of a proxy before it."
    )
    port: int = argument(7860, "Port to serve on; 0 uses any free one.")
    share: bool = argument(False, "Get a public address from Gradio's servers too.")


def main(arguments: list[str] | None = None) -> None:
    """Check the arguments, read and encode the documents, and serve until Ctrl-C."""
    args, features = parse_arguments(
        [SearchDemoArguments, FeatureArguments], description=__doc__ or "", arguments=arguments
    )
    quiet_libraries()
    if not args.model_path:
        raise UserError("--model_path expects a trained model, got none: name its folder or its Hub id")
    if not args.corpus:
        raise UserError("--corpus expects the documents to search, got none: name a file, a BEIR folder or a Hub id")
    if not 1 <= args.top_k <= _MOST_RESULTS:
        raise UserError(f"--top_k must be between 1 and {_MOST_RESULTS}, got {args.top_k}: change it")
    if not 0 <= args.port <= 65_535:
        raise UserError(f"--port must be between 0 and 65535, got {args.port}: change it, or leave it out")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the search page expects Gradio, which is not installed: run pip install gradio")
    port = _free_port(args.host, args.port)  # before the model is loaded
    _serve(_load_page(args, features), args, port)


def _free_port(host: str, port: int) -> int:
    """Return the port to serve on, after binding it once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            if os.name == "posix":  # as servers do there: a port that was closed a moment ago counts as free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host and --port expect an address of this machine and a free port, got {host} and {port} "
            f"({getattr(error, 'strerror', None) or error}): name another --port, or 0 for any free one"
        ) from error


def _load_page(args: SearchDemoArguments, features: FeatureArguments) -> Any:
    """Load the model, read the documents, encode new ones, and build the page."""
    from accelerate import PartialState

    from ..data.documents import read_documents
    from ..data.sources import open_source
    from ..model.base_models import load_trained_model
    from ..search_page.index import SearchIndex
    from ..search_page.page import make_page

    examples: list[str] = []
    if args.queries:
        rows = itertools.islice(open_source(args.queries).rows(), _MOST_EXAMPLES)
        examples = list(dict.fromkeys(row.text(args.query_column) for row in rows))
    model = load_trained_model(args.model_path or "", revision=args.revision)
    if args.use_predictor and model.predictor is None:
        raise UserError("--use_predictor expects a model with a predictor, got one without: leave the flag out")
    documents = read_documents(
        args.corpus or "", split=args.split, text_column=args.text_column, title_column=args.title_column,
        limit=args.limit, unique_ids=False,
    )  # fmt: skip
    say(f"Read {len(documents):,} documents from {args.corpus}.")
    index = SearchIndex(model.to(PartialState().device), documents, features=features)
    say(index.summary())
    # A folder is named by its last part only.
    base, path = model.config.base_model_name or "encoder", Path(args.model_path or "")
    names = (
        Path(base).name if Path(base).is_absolute() else base,
        path.resolve().name if path.is_dir() else str(path),
    )
    titles = ("Frozen base" if model.config.freeze_base else "Untrained base", "Trained model")
    headings = [
        (title, f"{name}, {width} dimensions") for title, name, width in zip(titles, names, index.widths, strict=True)
    ]
    return make_page(index, headings=headings, top_k=args.top_k, examples=examples, use_predictor=args.use_predictor)


def _serve(page: Any, args: SearchDemoArguments, port: int) -> None:
    """Serve the page until Ctrl-C."""
    import gradio
    from starlette.middleware import Middleware

    from ..search_page.guard import PageGuard
    from ..search_page.page import STYLE

    # Gradio checks whether its own address answers, and must not ask a proxy.
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "localhost", "127.0.0.1", args.host]))
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # none that must be downloaded
    theme = gradio.themes.Default(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "Consolas", "monospace"])
    theme.set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
    # A public address of Gradio's has a name that only Gradio knows.
    own = socket.gethostname().lower()
    known = {"localhost", args.host.lower(), own, f"{own}.local", *map(str.lower, args.allowed_hosts)}
    names = None if args.share else known
    host = f"[{args.host}]" if ":" in args.host else args.host
    try:
        _, address, public_address = page.launch(
            server_name=host, server_port=port, share=args.share, theme=theme, head=f"<style>{STYLE}</style>",
            prevent_thread_lock=True, quiet=True, footer_links=[], enable_monitoring=False, run_history=False,
            ssr_mode=False, pwa=False, app_kwargs={"middleware": [Middleware(PageGuard, hosts=names)]},
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"expected to serve on {args.host}, port {port}, got: {error} Name another --port") from error
    say(f"Serving on {address} (Ctrl-C ends it)." + (f" Public: {public_address}" if public_address else ""))
    sys.stdout.flush()  # otherwise a file or a pipe gets the address only at the end
    try:
        while True:
            time.sleep(1)  # not longer: an interruption that another thread takes wakes no sleeper
    except KeyboardInterrupt:
        say("Stopped.")
    finally:
        # Do not wait for the answers to waiting queries, nor show where they break off.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        page.server.force_exit = True
        page.close(verbose=False)
