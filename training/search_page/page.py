"""A page on which a person types a query and sees the frozen base and the trained model side by side.

Gradio serves it. Nothing on it is fetched from elsewhere, and every text that is not ours is escaped.
"""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ragcun_hf.errors import UserError

if TYPE_CHECKING:
    from gradio import Blocks
    from matplotlib.axes import Axes
    from search_page.index import Comparison, Hit, SearchIndex, Spread

_SCORES = {"cosine": "cosine similarity", "dot": "dot product", "euclidean": "distance"}
_FAR = 100  # a document that stands behind this rank on the other side is new, or gone
_TITLE_CHARACTERS, _SNIPPET_CHARACTERS, _TEXT_CHARACTERS = 90, 170, 6_000
_INTRODUCTION = (
    '<header class="sp-top"><h1>Search before and after</h1><p>{num_documents:,} documents, ranked by the base '
    "encoder as it is and by the model trained on it. Each badge says how a document moved from one to the other; "
    "new and gone mean from and to a rank behind {far}.</p></header>"
)
_INK = "#010203"  # of figures; becomes the colour of the page's text, dark or light


@dataclass(frozen=True)
class Change:
    """What became of a document's rank from the base to the trained model.

    Args:
        kind: `up`, `down`, `same`, `new` or `gone`.
        sign: One character that shows it without colour.
        words: The same in words, with the other rank.
    """

    kind: str
    sign: str
    words: str


def describe_change(rank: int, other_rank: int, *, is_trained: bool) -> Change:
    """Say in words how a document's rank changed, always from the base to the trained model.

    Args:
        rank: Where it stands in the list that shows it, from 1.
        other_rank: Where it stands in the other one.
        is_trained: Whether the list that shows it is the trained model's.

    Returns:
        The change; `new` or `gone` where the other rank lies behind 100.

    Example:
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
    r"""Put a text on one line and cut it at a blank, with three dots.

    Args:
        text: Any text; blanks and control characters become single blanks.
        length: Most characters kept.

    Returns:
        One line.

    Example:
        >>> shorten_text("one two\n three", 9), shorten_text("one", 9)
        ('one two…', 'one')
    """
    # Not more than can be needed is looked at: a document may be a book.
    start = text[: 4 * length + 64]
    line = " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in start).split())
    if len(line) <= length and len(start) == len(text):
        return line
    words = line[: length + 1].rpartition(" ")[0]
    return (words if len(words) > length // 2 else line[:length]).rstrip(" ,;:.") + "…"


def render_hit(hit: Hit, *, score_name: str, is_trained: bool) -> str:
    """Show one document as an item of a list.

    Args:
        hit: What was found.
        score_name: What its score is called.
        is_trained: Whether the list is the trained model's.

    Returns:
        HTML in which everything of the document is escaped.
    """
    change = describe_change(hit.rank, hit.other_rank, is_trained=is_trained)
    whole, title = shorten_text(hit.text, _TEXT_CHARACTERS), shorten_text(hit.title, 2 * _TITLE_CHARACTERS)
    rest = whole
    if not title:
        title = shorten_text(whole, _TITLE_CHARACTERS)
        # What stands in the title's place is not said again.
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


def render_comparison(found: Comparison, *, heads: Sequence[tuple[str, str]], similarity: str, note: str = "") -> str:
    """Show both lists side by side.

    Args:
        found: What both systems found.
        heads: What stands over the base's list and over the trained model's: a name, and what it is.
        similarity: How the trained model compares.
        note: A sentence put behind the summary.

    Returns:
        HTML.
    """
    lists = ""
    compared = ("cosine", similarity)
    for place, hits in enumerate((found.base, found.trained)):
        (name, detail), score_name = heads[place], _SCORES[compared[place]]
        side, jump = "base", '<a class="sp-jump" href="#sp-trained">Trained model ↓</a>'
        if place:
            side, jump = "trained", '<a class="sp-jump" href="#sp-base">Base ↑</a>'
        order = "smaller is better" if compared[place] == "euclidean" else "larger is better"
        items = "".join(render_hit(hit, score_name=score_name, is_trained=bool(place)) for hit in hits)
        lists += (
            f'<section id="sp-{side}" aria-labelledby="sp-{side}-name"><header><h2 id="sp-{side}-name">{escape(name)}'
            f"</h2>{jump}<p>{escape(detail)}<br>{score_name}, {order}</p></header><ol>{items}</ol></section>"
        )
    shared = sum(hit.other_rank <= len(found.base) for hit in found.trained)
    summary = f"{shared} of these {len(found.trained)} documents are on both sides. {note}".strip()
    return f'<p class="sp-note" role="status">{escape(summary)}</p><div class="sp-lists">{lists}</div>'


def render_spread(base: Spread, trained: Spread) -> str:
    """Show how evenly the vectors of both systems fill their space: a table and two figures.

    Args:
        base: Of the frozen base.
        trained: Of the trained model.

    Returns:
        HTML with both figures inside it as SVG.
    """
    rows = ""
    for name, key, form, hint in (
        ("Effective rank", "effective_rank", "{:.0f} of {}", "directions in use"),
        ("IsoScore", "iso_score", "{:.2f}", "0 to 1, larger is evener"),
        ("Mean cosine", "mean_cosine", "{:.2f}", "of two documents; even vectors have 0"),
    ):
        cells = (form.format(spread.measures[key], len(spread.eigenvalues)) for spread in (base, trained))
        rows += f"<tr><th scope='row'>{name} <span>{hint}</span></th><td>{'</td><td>'.join(cells)}</td></tr>"

    def draw_spectrum(axes: Axes, spread: Spread, **line: Any) -> None:
        relative = spread.eigenvalues / max(spread.eigenvalues.mean(), 1e-30)
        shown = relative[relative > 1e-7]
        axes.plot(range(1, len(shown) + 1), shown, **line)
        axes.set(yscale="log", xlabel="principal direction", ylabel="variance / mean variance")

    def draw_cosines(axes: Axes, spread: Spread, **line: Any) -> None:
        axes.hist(spread.cosines, bins=60, density=True, histtype="step", **line)
        axes.set(xlabel="cosine of two documents", ylabel="density")

    return (
        '<section class="sp-spread" aria-labelledby="sp-spread-name"><h2 id="sp-spread-name">How evenly the vectors '
        f"spread</h2><p>Measured on {base.num_documents:,} documents. Vectors that are alike in all directions have a "
        "flat spectrum and cosines around 0.</p><table><thead><tr><td></td><th scope='col'>Base</th>"
        f"<th scope='col'>Trained</th></tr></thead><tbody>{rows}</tbody></table><div class='sp-figures'>"
        + _figure("spectrum", "Spectrum: flat is even", draw_spectrum, base, trained)
        + _figure("cosines", "Cosines of random pairs: narrow around 0 is even", draw_cosines, base, trained)
        + "</div></section>"
    )


def _figure(name: str, caption: str, draw: Callable[..., None], base: Spread, trained: Spread) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from ragcun_hf.evaluation.plots import BLUE, GREY, label_axes

    ink: Any = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    file = io.StringIO()
    with rc_context({**dict.fromkeys(ink, _INK), "svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        axes = figure.subplots()
        draw(axes, base, color=GREY, linestyle="--", linewidth=2, label="base")
        draw(axes, trained, color=BLUE, linestyle="-", linewidth=2, label="trained")
        label_axes(axes, axes.get_xlabel(), axes.get_ylabel())
        axes.legend(frameon=False)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Two drawings in one page must not share names of their parts.
    for mark in ('id="', 'href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}sp-{name}-")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{caption}, base and trained"', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def answer_query(
    index: SearchIndex, query: str, *, heads: Sequence[tuple[str, str]], top_k: int, use_predictor: bool
) -> str:
    """Search, and show what was found or why nothing was.

    Args:
        index: What is searched.
        query: As it was typed.
        heads: As for `render_comparison`.
        top_k: Documents shown of each system.
        use_predictor: Let the trained model search with the predictor's output.

    Returns:
        HTML.
    """
    try:
        found = index.search(query, top_k=top_k, use_predictor=use_predictor)
    except UserError as error:
        return f'<p class="sp-note" role="status">{escape(str(error))}</p>'
    note = f"Only the first {index.model.config.max_length} tokens of the query count." if found.is_cut else ""
    return render_comparison(found, heads=heads, similarity=index.similarity, note=note)


def make_page(
    index: SearchIndex, *, heads: Sequence[tuple[str, str]], top_k: int, examples: Sequence[str], use_predictor: bool
) -> Blocks:
    """Build the page; nothing is served yet.

    Args:
        index: What is searched.
        heads: As for `render_comparison`.
        top_k: Documents shown of each system.
        examples: Queries to click.
        use_predictor: Whether the box for the predictor starts ticked; there is none without a predictor.

    Returns:
        The page, to be launched.
    """
    # Read by Gradio when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    def answer(query: str | None, with_predictor: bool) -> str:
        return answer_query(index, query or "", heads=heads, top_k=top_k, use_predictor=with_predictor)

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
                concurrency_id="search", concurrency_limit=1,
            )  # fmt: skip
    return page
