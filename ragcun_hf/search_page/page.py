"""The search page: a query, and the rankings of the frozen base and of the trained model side by side.

Gradio serves the page. It fetches nothing from other hosts, and every text of a query or a document is escaped.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .batches import Batches

if TYPE_CHECKING:
    from gradio import Blocks
    from matplotlib.axes import Axes

    from .index import BothRankings, Hit, SearchIndex, Spread

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
INK = "#010203"  # text colour in figures; replaced by the page's text colour, dark or light
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # Unicode's category Cc
_SCORES = {"cosine": "cosine similarity", "dot": "dot product", "euclidean": "distance"}
_LARGEST_BATCH = 16  # queries that are encoded and searched together; more gain little
_MOST_AT_ONCE = 2 * _LARGEST_BATCH  # one batch is answered while the next one gathers; Gradio takes up to 40
_LONGEST_QUEUE = 200  # queries that wait; further ones are told to try again
_FAR = 100  # a document with a rank beyond this in the other ranking is new, or gone
_TITLE_CHARACTERS, _SNIPPET_CHARACTERS, _TEXT_CHARACTERS = 90, 170, 6_000
_INTRODUCTION = (
    '<header class="sp-top"><h1>Search before and after</h1><p>{num_documents:,} documents, ranked by the base '
    "encoder and by the model trained on it. Each badge says how a document moved from the first ranking to the "
    "second; new and gone mean from and to a rank beyond {far}.</p></header>"
)


@dataclass(frozen=True)
class Change:
    """How a document's rank changed from the base to the trained model."""

    kind: str  # `up`, `down`, `same`, `new` or `gone`
    sign: str  # one character that shows the kind without colour
    words: str  # the change in words, with the other rank


def describe_change(rank: int, other_rank: int, *, is_trained: bool) -> Change:
    """Describe how a document's rank changed from the base to the trained model.

    `rank` is that in the list that shows the document, which is the trained model's if `is_trained`. A document is new
    or gone if its other rank is beyond 100.

    >>> describe_change(5, 12, is_trained=True).words, describe_change(2, 1_204, is_trained=False).words
    ('up 7 (from 12)', 'gone (to 1,204)')
    """
    other = f"({'from' if is_trained else 'to'} {other_rank:,})"
    if rank == other_rank:
        return Change("same", "=", "same rank")
    if other_rank > _FAR >= rank:
        return Change("new", "+", f"new {other}") if is_trained else Change("gone", "×", f"gone {other}")
    steps = other_rank - rank if is_trained else rank - other_rank
    return Change("up", "↑", f"up {steps:,} {other}") if steps > 0 else Change("down", "↓", f"down {-steps:,} {other}")


def shorten_text(text: str, length: int) -> str:
    r"""Put a text on one line, without control characters, and cut it at a space, with three dots.

    >>> shorten_text("one two\n three", 9), shorten_text("one", 9)
    ('one two…', 'one')
    """
    # Read no more than can be needed: a document may be a book.
    start = text[: 4 * length + 64]
    line = " ".join(_CONTROL_CHARACTERS.sub(" ", start).split())
    if len(line) <= length and len(start) == len(text):
        return line
    words = line[: length + 1].rpartition(" ")[0]
    return (words if len(words) > length // 2 else line[:length]).rstrip(" ,;:.") + "…"


def render_hit(hit: Hit, *, score_name: str, is_trained: bool) -> str:
    """Render one document as a list item; all of its text is escaped."""
    change = describe_change(hit.rank, hit.other_rank, is_trained=is_trained)
    whole, title = shorten_text(hit.text, _TEXT_CHARACTERS), shorten_text(hit.title, 2 * _TITLE_CHARACTERS)
    rest = whole
    if not title:
        title = shorten_text(whole, _TITLE_CHARACTERS)
        # Words used as the title are not repeated.
        rest = "" if title == whole else "…" + whole[len(title) - 1 :].lstrip(" ,;:.")
    snippet = shorten_text(rest, _SNIPPET_CHARACTERS)
    body = f'<p class="sp-snippet" dir="auto">{escape(snippet)}</p>' if snippet else ""
    if snippet != rest:
        body += f'<details><summary>Whole text</summary><p dir="auto">{escape(whole)}</p></details>'
    return (
        f'<li class="sp-hit"><span class="sp-rank">{hit.rank}</span><div><h3 dir="auto">{escape(title)}</h3>'
        f'<p class="sp-facts"><span class="sp-change sp-{change.kind}"><span aria-hidden="true">{change.sign}</span> '
        f'{change.words}</span> <span class="sp-score">{score_name} {hit.score:.3f}</span></p>{body}</div></li>'
    )


def render_rankings(
    found: BothRankings, *, headings: Sequence[tuple[str, str]], similarities: tuple[str, str], note: str = ""
) -> str:
    """Render both rankings side by side, with a heading (name, description) and a similarity each, and a note."""
    lists = ""
    for place, hits in enumerate((found.base, found.trained)):
        (name, detail), score_name = headings[place], _SCORES[similarities[place]]
        side, jump = "base", '<a class="sp-jump" href="#sp-trained">Trained model ↓</a>'
        if place:
            side, jump = "trained", '<a class="sp-jump" href="#sp-base">Base ↑</a>'
        order = "smaller is better" if similarities[place] == "euclidean" else "larger is better"
        items = "".join(render_hit(hit, score_name=score_name, is_trained=bool(place)) for hit in hits)
        lists += (
            f'<section id="sp-{side}" aria-labelledby="sp-{side}-name"><header><h2 id="sp-{side}-name">{escape(name)}'
            f"</h2>{jump}<p>{escape(detail)}<br>{score_name}, {order}</p></header><ol>{items}</ol></section>"
        )
    shared = sum(hit.other_rank <= len(found.base) for hit in found.trained)
    summary = f"{shared} of these {len(found.trained)} documents are on both sides. {note}".strip()
    return f'<p class="sp-note" role="status">{escape(summary)}</p><div class="sp-lists">{lists}</div>'


def render_spread(base: Spread, trained: Spread) -> str:
    """Render how evenly the vectors of both systems fill their space: a table and two SVG figures."""
    from ..evaluation.plots import draw_spectrum

    rows = ""
    for name, key, form, hint in (
        ("Effective rank", "effective_rank", "{:.0f} of {}", "directions in use"),
        ("IsoScore", "iso_score", "{:.2f}", "0 to 1, larger is more even"),
        ("Mean cosine", "mean_cosine", "{:.2f}", "of two documents; 0 for even vectors"),
    ):
        cells = (form.format(spread.measures[key], len(spread.eigenvalues)) for spread in (base, trained))
        rows += f"<tr><th scope='row'>{name} <span>{hint}</span></th><td>{'</td><td>'.join(cells)}</td></tr>"

    def draw_eigenvalues(axes: Axes, spread: Spread, **line: Any) -> None:
        draw_spectrum(axes, spread.eigenvalues, **line)
        axes.set(yscale="log", xlabel="principal direction", ylabel="variance / mean variance")

    def draw_cosines(axes: Axes, spread: Spread, **line: Any) -> None:
        axes.hist(spread.cosines, bins=60, density=True, histtype="step", **line)
        axes.set(xlabel="cosine of two documents", ylabel="density")

    return (
        '<section class="sp-spread" aria-labelledby="sp-spread-name"><h2 id="sp-spread-name">How evenly the vectors '
        f"spread</h2><p>Measured on {base.num_documents:,} documents. Vectors that spread equally in all directions "
        "have a flat spectrum and cosines around 0.</p><table><thead><tr><td></td><th scope='col'>Base</th>"
        f"<th scope='col'>Trained</th></tr></thead><tbody>{rows}</tbody></table><div class='sp-figures'>"
        + _figure("spectrum", "Spectrum: flat is even", draw_eigenvalues, base, trained)
        + _figure("cosines", "Cosines of random pairs: narrow around 0 is even", draw_cosines, base, trained)
        + "</div></section>"
    )


def _figure(name: str, caption: str, draw: Callable[..., None], base: Spread, trained: Spread) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from ..evaluation.plots import BLUE, GREY, label_axes

    ink: Any = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    file = io.StringIO()
    with rc_context({**dict.fromkeys(ink, INK), "svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        axes = figure.subplots()
        draw(axes, base, color=GREY, linestyle="--", linewidth=2, label="base")
        draw(axes, trained, color=BLUE, linestyle="-", linewidth=2, label="trained")
        label_axes(axes, axes.get_xlabel(), axes.get_ylabel())
        axes.legend(frameon=False)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Two drawings on one page must not share ids.
    for mark in ('id="', 'href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}sp-{name}-")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{caption}, base and trained"', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def answer_query(
    index: SearchIndex, query: str, *, headings: Sequence[tuple[str, str]], top_k: int, use_predictor: bool
) -> str:
    """Search, and render the best `top_k` documents of each system, or the reason why there are none."""
    return answer_queries(index, [(query, use_predictor)], headings=headings, top_k=top_k)[0]


def answer_queries(
    index: SearchIndex, queries: Sequence[tuple[str, bool]], *, headings: Sequence[tuple[str, str]], top_k: int
) -> list[str]:
    """Answer several queries as `answer_query` does, each with its own choice of the predictor."""
    return [
        _render_reason(found) if isinstance(found, UserError) else _render_answer(index, found, headings)
        for found in index.search_all(queries, top_k=top_k)
    ]


def _render_reason(error: UserError) -> str:
    return f'<p class="sp-note" role="status">{escape(str(error))}</p>'


def _render_answer(index: SearchIndex, found: BothRankings, headings: Sequence[tuple[str, str]]) -> str:
    note = f"Only the first {index.model.config.max_length} tokens of the query count. " if found.is_cut else ""
    if found.probability is not None and found.probability < 0.5:
        note += (
            "Probably nothing relevant: the trained model's first document is relevant with probability "
            f"{found.probability:.2f}."
        )
    return render_rankings(found, headings=headings, similarities=(index.base_similarity, index.similarity), note=note)


def make_page(
    index: SearchIndex,
    *,
    headings: Sequence[tuple[str, str]],
    top_k: int,
    examples: Sequence[str],
    use_predictor: bool,
) -> Blocks:
    """Build the page, without serving it.

    `examples` are queries to click. A model with a predictor gets a checkbox for it, ticked at first if
    `use_predictor`.
    """
    # Gradio reads these when it is imported, and when a page is made. It would sum up all events after each one.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.update(GRADIO_ANALYTICS_MAX_EVENTS="1", GRADIO_ANALYTICS_CACHE_FREQUENCY=str(sys.maxsize))
    import gradio

    batches = Batches(partial(answer_queries, index, headings=headings, top_k=top_k), most=_LARGEST_BATCH)

    async def answer(query: str | None, with_predictor: bool) -> str:
        try:
            return await asyncio.wrap_future(batches.submit((query or "", with_predictor)))
        except UserError as error:
            return _render_reason(error)

    def show(content: str) -> Any:
        return gradio.HTML(content, apply_default_css=False, js_on_load=None)

    has_predictor = index.model.predictor is not None
    with gradio.Blocks(title="Search before and after", analytics_enabled=False) as page:
        show(_INTRODUCTION.format(num_documents=len(index), far=_FAR))
        with gradio.Row(elem_classes="sp-ask"):
            hint = "What are you looking for?"
            query = gradio.Textbox(
                label="Query", show_label=False, container=False, placeholder=hint, max_lines=4, autofocus=True
            )
            button = gradio.Button("Search", variant="primary", scale=0, min_width=110)
        label = "Search with the predictor's output"
        box = gradio.Checkbox(
            use_predictor and has_predictor, label=label, visible=has_predictor, container=False, elem_classes="sp-box"
        )
        triggers = [query.submit, button.click, box.input]
        if examples:
            rows = [[text] for text in examples]
            triggers.append(gradio.Examples(rows, [query], cache_examples=False).load_input_event.then)
        found = show('<p class="sp-note" role="status">Type a query to see both rankings.</p>')
        if index.base_spread is not None and index.trained_spread is not None:
            show(render_spread(index.base_spread, index.trained_spread))
        for trigger in triggers:
            trigger(
                answer, [query, box], found, show_progress="minimal", api_visibility="private",
                concurrency_id="search", concurrency_limit=_MOST_AT_ONCE,
            )  # fmt: skip
    return page.queue(max_size=_LONGEST_QUEUE)
