"""The picture that the demo leaves: two loss curves, and where the nowcasts happened."""

from __future__ import annotations

from pathlib import Path

from .measures import Curve, Race

PLAIN = "#6b7280"
NOWCAST = "#d9480f"


def plot_losses(plain: Curve, nowcast: Curve, events: list[int], race: Race, title: str, path: Path) -> None:
    """Draw both evaluation losses over steps and write a PNG.

    Args:
        events: steps at which a nowcast was written into the model.
        race: to the plain run's final loss; its saving is drawn as an arrow if there is one.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the demo's picture needs matplotlib; run `pip install hf_nino[demo]`") from error

    figure = Figure(figsize=(7.2, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    last = plain.steps[-1]
    tail = [loss for curve in (plain, nowcast) for loss in curve.losses[len(curve.losses) // 5 :]]
    low, high = min(tail), max(tail)
    axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    axes.set_xlim(0, last)
    axes.plot(plain.steps, plain.losses, color=PLAIN, linewidth=1.8, label="plain")
    axes.plot(nowcast.steps, nowcast.losses, color=NOWCAST, linewidth=1.8, label="with nowcasts")
    for number, step in enumerate(events):
        axes.axvline(step, ymax=0.04, color=NOWCAST, linewidth=1.0, label="a nowcast" if number == 0 else None)
    if race.nowcast_steps is not None and race.plain_steps is not None and race.nowcast_steps < race.plain_steps:
        ends = {"xy": (race.nowcast_steps, race.target), "xytext": (race.plain_steps, race.target)}
        axes.annotate("", arrowprops={"arrowstyle": "<->", "color": "black", "shrinkA": 0, "shrinkB": 0}, **ends)
        axes.annotate(
            f"{race.plain_steps - race.nowcast_steps:.0f} steps",
            (race.nowcast_steps, race.target),
            xytext=(-4, -2),
            textcoords="offset points",
            ha="right",
            va="top",
        )
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("evaluation loss (nats per token)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
