"""From facts to figures: what each chart shows.  A function gives a figure, or ``None`` if there is nothing in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .facts import ACCEPTED, NOT_TRIED, OBSERVED, REFUSED, SHORTENED, TAKEN_BACK, Nowcast, RunFacts, count_fates
from .figure import Band, Curve, Figure, Mark, draw_path
from .markup import Markup
from .numbers import difference, padded, percent, seconds, short, signed, thin, value_at
from .space import Flat

SIGNS = {
    ACCEPTED: ("circle", "accepted"),
    SHORTENED: ("diamond", "shortened"),
    TAKEN_BACK: ("down", "taken-back"),
    REFUSED: ("cross", "refused"),
    OBSERVED: ("ring", "observed"),
    NOT_TRIED: ("ring", "not-tried"),
}
# Up to this share of the run the loss falls so fast that the rest would be flat in the picture.
_EARLY = 0.1


def tip(nowcast: Nowcast) -> str:
    """What a tooltip says about a nowcast."""
    parts = [f"step {nowcast.step:,}: {nowcast.fate}"]
    if nowcast.horizon:
        ahead = f"{nowcast.horizon} interval{'s' if nowcast.horizon > 1 else ''} ahead"
        parts.append(f"{ahead} ({nowcast.horizon_steps:,} steps)" if nowcast.horizon_steps else ahead)
    if nowcast.relative_step_norm is not None:
        parts.append(f"parameters moved by {percent(nowcast.relative_step_norm)}")
    if nowcast.gain is not None:
        gain = nowcast.gain
        parts.append(f"loss {short(gain.observed)} where {short(gain.expected)} was foretold")
    if nowcast.loss_before is not None and nowcast.loss_after is not None:
        parts.append(f"loss on fixed batches {short(nowcast.loss_before)} to {short(nowcast.loss_after)}")
    if nowcast.taken_back_at is not None:
        parts.append(f"taken back at step {nowcast.taken_back_at:,}")
    return "; ".join(parts + ([nowcast.reason] if nowcast.reason else []))


def fate_legend(nowcasts: Sequence[Nowcast]) -> tuple[tuple[str, str, str], ...]:
    """Legend entries of the fates that occur."""
    return tuple((*SIGNS[fate], f"{fate} ({count})") for fate, count in count_fates(nowcasts).items())


def loss_chart(facts: RunFacts) -> Figure | None:
    """Loss over steps, with every nowcast that was due marked on it."""
    given = [
        ("train", "training loss", facts.train_loss),
        ("plain", "evaluation loss without nowcasts", facts.plain_loss),
        ("eval", "evaluation loss", facts.eval_loss),
    ]
    shown = [(style, label, series) for style, label, series in given if series]
    if not shown:
        return None
    end = _end(facts)
    late = [value for _, _, series in shown for step, value in series if step >= _EARLY * end]
    y = padded(late or [value for _, _, series in shown for _, value in series])
    on = facts.eval_loss or facts.train_loss
    marks = tuple(
        Mark(nowcast.step, value_at(on, nowcast.step), *SIGNS[nowcast.fate], tip(nowcast))
        for nowcast in facts.nowcasts
    )
    taken = [nowcast for nowcast in facts.nowcasts if nowcast.taken_back_at is not None]
    bands = tuple(
        Band(n.step, n.taken_back_at, "lost", f"steps {n.step:,} to {n.taken_back_at:,} were taken back")
        for n in taken
    )
    lines = tuple(("line", style, label) for style, label, _ in shown)
    return Figure(
        name="loss",
        title="Loss over optimizer steps, with nowcasts marked",
        description=f"From {short(on[0][1])} to {short(on[-1][1])}; {describe(facts.nowcasts)}.",
        x=(0, end),
        y=y,
        x_label="optimizer steps",
        y_label="loss",
        curves=tuple(Curve(thin(series), style, label) for style, label, series in shown),
        marks=marks,
        bands=bands,
        height=300,
        legend=lines + fate_legend(facts.nowcasts),
    )


def describe(nowcasts: Sequence[Nowcast]) -> str:
    """Counts in words."""
    counts = count_fates(nowcasts)
    return ", ".join(f"{count} {fate}" for fate, count in counts.items()) if counts else "no nowcasts"


def gain_chart(facts: RunFacts) -> Figure | None:
    """Loss after each nowcast minus the forecast of the optimizer alone, with its standard error."""
    judged = [nowcast for nowcast in facts.nowcasts if nowcast.gain is not None]
    if not judged:
        return None
    reach = [nowcast.gain.excess + sign * nowcast.gain.error for nowcast in judged for sign in (-1, 1)]
    marks = tuple(
        Mark(
            nowcast.step,
            nowcast.gain.excess,
            *SIGNS[nowcast.fate],
            f"{signed(nowcast.gain.excess)} ± {short(nowcast.gain.error)}; {tip(nowcast)}",
            nowcast.gain.excess - nowcast.gain.error,
            nowcast.gain.excess + nowcast.gain.error,
        )
        for nowcast in judged
    )
    better = sum(nowcast.gain.excess < 0 for nowcast in judged)
    return Figure(
        name="gain",
        title="Training loss after each nowcast, minus the forecast of the optimizer alone",
        description=f"{better} of {len(judged)} below the forecast.",
        x=(0, _end(facts)),
        y=padded([0.0, *reach]),
        x_label="optimizer steps",
        y_label="loss minus forecast (below 0: gained)",
        marks=marks,
        zero=True,
        legend=fate_legend(judged),
    )


def plain_chart(facts: RunFacts) -> Figure | None:
    """Evaluation loss minus that of the plain run, at equal steps."""
    apart = difference(facts.eval_loss, facts.plain_loss)
    if len(apart) < 2:
        return None
    late = [value for step, value in apart if step >= _EARLY * _end(facts)] or [value for _, value in apart]
    return Figure(
        name="plain",
        title="Evaluation loss minus that of the plain optimizer at the same step",
        description=f"At the end {signed(apart[-1][1])}.",
        x=(0, _end(facts)),
        y=padded([0.0, *late]),
        x_label="optimizer steps",
        y_label="loss minus the plain run's (below 0: gained)",
        curves=(Curve(thin(apart), "eval"),),
        zero=True,
    )


def horizon_chart(facts: RunFacts) -> Figure | None:
    """How far each nowcast looked ahead."""
    if not facts.nowcasts:
        return None
    in_steps = all(nowcast.horizon_steps is not None for nowcast in facts.nowcasts)

    def ahead(nowcast: Nowcast) -> int:
        return nowcast.horizon_steps if in_steps else nowcast.horizon

    high = max(max(ahead(nowcast) for nowcast in facts.nowcasts), 1)
    return Figure(
        name="horizon",
        title="How far each nowcast looked ahead",
        description=f"At most {high} {'steps' if in_steps else 'intervals'}.",
        x=(0, _end(facts)),
        y=(-0.06 * high, 1.1 * high),
        x_label="optimizer steps",
        y_label="horizon (optimizer steps)" if in_steps else "horizon (intervals)",
        marks=tuple(Mark(n.step, ahead(n), *SIGNS[n.fate], tip(n)) for n in facts.nowcasts),
        height=180,
        legend=fate_legend(facts.nowcasts),
    )


def overhead_chart(facts: RunFacts) -> Figure | None:
    """Seconds of each nowcast."""
    if not facts.nowcasts:
        return None
    tried = [nowcast for nowcast in facts.nowcasts if nowcast.horizon]
    if not tried:
        return None
    high = max(nowcast.seconds for nowcast in tried) or 1.0
    factor, unit = (1000, "ms") if high < 0.1 else (1, "s")
    return Figure(
        name="overhead",
        title="Time of each nowcast",
        description=f"At most {seconds(high)}.",
        x=(0, _end(facts)),
        y=(-0.06 * high * factor, 1.1 * high * factor),
        x_label="optimizer steps",
        y_label=f"one nowcast ({unit})",
        marks=tuple(
            Mark(n.step, n.seconds * factor, *SIGNS[n.fate], f"{seconds(n.seconds)}; {tip(n)}") for n in tried
        ),
        height=180,
        legend=fate_legend(tried),
    )


def learning_rate_chart(facts: RunFacts) -> Figure | None:
    """The learning rate, with the nowcasts below it."""
    if len(facts.learning_rate) < 2:
        return None
    high = max(value for _, value in facts.learning_rate) or 1.0
    marks = tuple(Mark(n.step, value_at(facts.learning_rate, n.step), *SIGNS[n.fate], tip(n)) for n in facts.nowcasts)
    return Figure(
        name="learning-rate",
        title="Learning rate over optimizer steps, with nowcasts marked",
        description=f"At most {short(high)}.",
        x=(0, _end(facts)),
        y=(-0.06 * high, 1.1 * high),
        x_label="optimizer steps",
        y_label="learning rate",
        curves=(Curve(thin(facts.learning_rate), "eval"),),
        marks=marks,
        height=180,
        legend=fate_legend(facts.nowcasts),
    )


def space_picture(flat: Flat, nowcasts: Sequence[Nowcast]) -> Markup:
    """The path of the parameters and the jumps on it."""
    fates = {nowcast.step: nowcast for nowcast in nowcasts if nowcast.accepted}
    walks, jumps, marks = [], [], []
    last = flat.points[0]
    walk = [last]
    for place, point in zip(flat.places[1:], flat.points[1:], strict=True):
        if place.arrived == "training":
            walk.append(point)
        else:
            walks.append(walk)
            back = place.arrived == "taken back"
            nowcast = fates.get(place.step)
            kind, style = ("down", "taken-back") if back else SIGNS[nowcast.fate if nowcast else ACCEPTED]
            jumps.append(Curve([last, point], f"jump {style}{' back' if back else ''}"))
            words = f"step {place.step:,}: back to the state before" if back else tip(nowcast) if nowcast else ""
            if not back:
                marks.append(Mark(*point, kind, style, words))
            walk = [point]
        last = point
    walks.append(walk)
    paths = [Curve(walk, "walk") for walk in walks if len(walk) > 1]
    ends = [
        Mark(*flat.points[0], "ring", "start", f"step {flat.places[0].step:,}: the beginning of the record"),
        Mark(*flat.points[-1], "square", "end", f"step {flat.places[-1].step:,}: the end of the record"),
    ]
    return draw_path(
        "space",
        "The path of the parameters, projected to the plane",
        f"{len(flat.places)} states, {len(jumps)} jumps; the two directions hold {percent(sum(flat.shares))} of the "
        "spread.",
        [*paths, *jumps],
        [*marks, *ends],
        _space_legend(jumps),
    )


def _space_legend(jumps: Iterable[Curve]) -> list[tuple[str, str, str]]:
    styles = {jump.style for jump in jumps}
    words = {
        "jump accepted": "a nowcast",
        "jump shortened": "a shortened nowcast",
        "jump taken-back": "a nowcast that was taken back",
        "jump taken-back back": "the way back",
    }
    return [
        ("line", "walk", "training"),
        *(("line", style, text) for style, text in words.items() if style in styles),
        ("ring", "start", "beginning"),
        ("square", "end", "end"),
    ]


def _end(facts: RunFacts) -> float:
    """Of the x axes: all have the same."""
    series = (facts.train_loss, facts.eval_loss, facts.plain_loss, facts.learning_rate)
    return max([1.0, facts.steps, *(points[-1][0] for points in series if points)])
