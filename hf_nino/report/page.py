"""The page: sections that put words around charts, or say why there is none.  No script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from .._version import __version__
from ..training.estimate import readable
from . import charts
from .facts import ACCEPTED, NOT_TRIED, REFUSED, SHORTENED, TAKEN_BACK, Nowcast, RunFacts, count_fates
from .figure import Figure, draw
from .markup import Markup, element, join, table
from .numbers import percent, seconds, short, signed
from .space import flatten
from .style import CSS

# Rows of a table behind a chart: more are thinned out, and the page says so.
MOST_ROWS = 200
NO_NOWCASTS = "no nowcast was due in this run"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page_of(facts: RunFacts) -> str:
    """The whole page, which is well-formed XML too."""
    sections = [
        ("Loss", _loss),
        ("What each nowcast brought", _gains),
        ("Against the plain run", _plain),
        ("Horizons", _horizons),
        ("Time", _time),
        ("Memory", _memory),
        ("Learning rate", _learning_rate),
        ("Path of the parameters", _space),
    ]
    shown, left_out = [], []
    for title, build in sections:
        content = build(facts)
        if isinstance(content, Markup):
            shown.append(element("section", None, element("h2", None, title), content))
        else:
            left_out.append(element("li", None, element("b", None, title), f": {content}."))
    if left_out:
        shown.append(
            element("section", None, element("h2", None, "Left out"), element("ul", {"class": "plain"}, *left_out))
        )
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, f"{facts.title}: nowcasts"),
        element("style", None, Markup(CSS)),
    )
    body = element(
        "body",
        None,
        element("main", None, _header(facts), _tiles(facts), *shown),
        element("footer", None, f"hf_nino {__version__}; one file, no scripts, nothing loaded from elsewhere."),
    )
    return f"<!DOCTYPE html>\n{element('html', {'lang': 'en'}, head, body)}\n"


def summary(facts: RunFacts) -> dict[str, Any]:
    """The numbers of the page, for programs."""
    judged = [nowcast for nowcast in facts.nowcasts if nowcast.gain is not None]
    return {
        "title": facts.title,
        "kind": facts.kind,
        "settings": dict(facts.settings),
        "steps": facts.steps,
        "max_steps": facts.max_steps,
        "train_loss": facts.train_loss[-1][1] if facts.train_loss else None,
        "eval_loss": facts.eval_loss[-1][1] if facts.eval_loss else None,
        "plain_eval_loss": facts.plain_loss[-1][1] if facts.plain_loss else None,
        "nowcasts": count_fates(facts.nowcasts),
        "gains": [{"step": n.step, "excess": n.gain.excess, "error": n.gain.error} for n in judged],
        "nowcast_seconds": facts.nowcast_seconds,
        "train_seconds": facts.train_seconds,
        "overhead": facts.overhead,
        "memory": [{"what": m.what, "where": m.where, "bytes": m.size} for m in facts.memory],
    }


def _header(facts: RunFacts) -> Markup:
    pairs = join(
        element("div", None, element("dt", None, name), element("dd", None, value)) for name, value in facts.settings
    )
    parts = [element("h1", None, facts.title), element("p", {"class": "kind"}, facts.kind)]
    return element("header", None, *parts, *([element("dl", None, pairs)] if facts.settings else []))


def _tiles(facts: RunFacts) -> Markup:
    counts = count_fates(facts.nowcasts)
    written = counts.get(ACCEPTED, 0) + counts.get(SHORTENED, 0)
    of = f"of {facts.max_steps:,}" if facts.max_steps and facts.max_steps != facts.steps else ""
    tiles = [("optimizer steps", f"{facts.steps:,}", of)]
    if facts.eval_loss:
        against = f"{short(facts.plain_loss[-1][1])} without nowcasts" if facts.plain_loss else ""
        tiles.append(("last evaluation loss", short(facts.eval_loss[-1][1]), against))
    elif facts.train_loss:
        tiles.append(("last training loss", short(facts.train_loss[-1][1]), ""))
    others = [f"{counts[fate]} {fate}" for fate in (SHORTENED, TAKEN_BACK, REFUSED, NOT_TRIED) if fate in counts]
    note = ", ".join(others) if facts.nowcasts else "none was due"
    tiles.append(("nowcasts that stayed", f"{written}", note))
    if facts.overhead is not None and facts.nowcasts:
        tiles.append(("time for nowcasts", percent(facts.overhead), seconds(facts.nowcast_seconds)))
    return element(
        "div",
        {"class": "tiles"},
        *(
            element(
                "div",
                None,
                element("span", None, label),
                element("strong", None, value),
                element("small", None, note),
            )
            for label, value, note in tiles
        ),
    )


def _loss(facts: RunFacts) -> Markup | str:
    figure = charts.loss_chart(facts)
    if figure is None:
        return "no loss was logged"
    words = []
    if any(value > figure.y[1] for curve in figure.curves for _, value in curve.points):
        words.append("The first steps lie above the picture.")
    if any(nowcast.taken_back_at is not None for nowcast in facts.nowcasts):
        words.append("Shaded steps were lost to a nowcast that was taken back.")
    if facts.stopped:
        words.append("Nowcasting was given up before the end: too many nowcasts in a row failed, or cost too much.")
    if facts.nowcasts and facts.eval_loss and len(facts.eval_loss) < 3 * len(facts.nowcasts):
        words.append("Evaluations are rare here: a rise right after a nowcast may lie between two of them.")
    columns = [("training", facts.train_loss), ("evaluation", facts.eval_loss), ("plain run", facts.plain_loss)]
    return _with_table(figure, words, _series_table(columns, "Losses by step"))


def _gains(facts: RunFacts) -> Markup | str:
    figure = charts.gain_chart(facts)
    if figure is None:
        if not facts.nowcasts:
            return NO_NOWCASTS
        return (
            "nobody compared the loss after nowcasts with a forecast; NiNoTrainer does in runs of 300 steps or more, "
            "and this page can if the training loss is logged at least every twelfth of the probation"
        )
    judged = [nowcast for nowcast in facts.nowcasts if nowcast.gain is not None]
    recorded = all(nowcast.gain.recorded for nowcast in judged)
    middle = median(nowcast.gain.excess for nowcast in judged)
    words = [
        "A forecast continues the training loss from before a nowcast as a straight line over the logarithm of the "
        "step. A mark is what came instead, some steps later; its line is one standard error each way.",
        f"Median of {len(judged)}: {signed(middle)}.",
        "Training compared them, step by step."
        if recorded
        else "Compared afterwards, from logged means: training, which sees every step, may have judged otherwise.",
    ]
    rows = [
        (
            f"{n.step:,}",
            n.fate,
            short(n.gain.observed),
            short(n.gain.expected),
            signed(n.gain.excess),
            short(n.gain.error),
        )
        for n in _rows(judged)
    ]
    headers = ("step", "fate", "loss", "forecast", "difference", "standard error")
    return _with_table(figure, words, table(headers, rows, "Loss after nowcasts against the forecast"))


def _plain(facts: RunFacts) -> Markup | str:
    figure = charts.plain_chart(facts)
    if figure is None:
        return "there is no run of the plain optimizer beside this one"
    words = ["The same run without nowcasts: same settings, same seed, same batches."]
    return _with_table(figure, words, None)


def _horizons(facts: RunFacts) -> Markup | str:
    figure = charts.horizon_chart(facts)
    if figure is None:
        return NO_NOWCASTS
    return _with_table(figure, [], _nowcast_table(facts.nowcasts))


def _time(facts: RunFacts) -> Markup | str:
    figure = charts.overhead_chart(facts)
    if figure is None:
        return NO_NOWCASTS if not facts.nowcasts else "no nowcast was tried"
    words = []
    if facts.overhead is not None:
        words.append(
            f"Nowcasting took {seconds(facts.nowcast_seconds)} of {seconds(facts.train_seconds)} "
            f"({percent(facts.overhead)}; {facts.timed})."
        )
    return _with_table(figure, words, None)


def _memory(facts: RunFacts) -> Markup | str:
    if not facts.memory:
        return facts.absent.get("memory", "it was not recorded")
    most = max(memory.size for memory in facts.memory) or 1
    rows = [
        (
            memory.what,
            memory.where,
            readable(memory.size),
            element("span", {"class": "bar", "style": f"width:{100 * memory.size / most:.1f}%"}),
        )
        for memory in facts.memory
    ]
    return table(("what", "where", "size", ""), rows, "What nowcasting keeps while it runs")


def _learning_rate(facts: RunFacts) -> Markup | str:
    figure = charts.learning_rate_chart(facts)
    if figure is None:
        return facts.absent.get("learning rate", "it was not logged")
    words = ["Nowcasts wait for the end of a warm-up, and look no farther than the learning rate that is left allows."]
    return _with_table(figure, words if facts.nowcasts else [], None)


def _space(facts: RunFacts) -> Markup | str:
    flat = flatten(facts.path)
    if flat is None:
        return facts.absent.get("space", "fewer than three states were recorded, or they never moved")
    words = (
        f"{len(flat.places):,} states, as a random projection to {len(flat.places[0].point)} numbers, in the two "
        f"directions that hold most of the spread: {percent(flat.shares[0])} and {percent(flat.shares[1])}. Both have "
        "the same scale. Distances are right to about a fifth."
    )
    return join([charts.space_picture(flat, facts.nowcasts), element("p", {"class": "note"}, words)])


def _with_table(figure: Figure, words: Sequence[str], numbers: Markup | None) -> Markup:
    note = [element("p", {"class": "note"}, " ".join(words))] if words else []
    if numbers is None:
        numbers = _marks_table(figure)
    behind = [element("details", None, element("summary", None, "Numbers"), numbers)]
    return join([draw(figure), *note, *behind])


def _marks_table(figure: Figure) -> Markup:
    if figure.curves:
        points = _rows(figure.curves[0].points)
        return table((figure.x_label, figure.y_label), [(f"{x:,.0f}", short(y)) for x, y in points], figure.title)
    rows = [(f"{mark.x:,.0f}", short(mark.y), mark.tip) for mark in _rows(figure.marks)]
    return table((figure.x_label, figure.y_label, "nowcast"), rows, figure.title)


def _series_table(columns: Sequence[tuple[str, Any]], caption: str) -> Markup:
    given = [(name, dict(series)) for name, series in columns if series]
    steps = sorted({step for _, series in given for step in series})
    rows = [
        (f"{step:,.0f}", *(short(series[step]) if step in series else "" for _, series in given))
        for step in _rows(steps)
    ]
    return table(("step", *(name for name, _ in given)), rows, _thinned(caption, len(steps)))


def _nowcast_table(nowcasts: Sequence[Nowcast]) -> Markup:
    columns: list[tuple[str, Callable[[Nowcast], str]]] = [
        ("step", lambda n: f"{n.step:,}"),
        ("fate", lambda n: n.fate),
        ("horizon (intervals)", lambda n: str(n.horizon)),
        ("moved", lambda n: "" if n.relative_step_norm is None else percent(n.relative_step_norm)),
        ("seconds", lambda n: f"{n.seconds:.2g}"),
        ("why", lambda n: n.reason),
    ]
    rows = [[cell(nowcast) for _, cell in columns] for nowcast in _rows(nowcasts)]
    return table([name for name, _ in columns], rows, _thinned("Nowcasts that were due", len(nowcasts)))


def _rows(items: Sequence[Any]) -> Sequence[Any]:
    stride = -(-len(items) // MOST_ROWS)
    return [*items[:: max(stride, 1)]]


def _thinned(caption: str, count: int) -> str:
    stride = -(-count // MOST_ROWS)
    return f"{caption} (every {stride}th of {count:,})" if stride > 1 else caption
