"""The demo's report in Markdown, from its metrics; nothing is computed that is not in them."""

from __future__ import annotations

from typing import Any

from .measures import Curve, Race, race


def number(value: float | None, unit: str = "") -> str:
    """A number for a table; "not reached" for ``None``."""
    return "not reached" if value is None else f"{value:,.0f}{unit}"


def change(saving: float | None) -> str:
    """What a saving means for the run with nowcasts, such as "21% fewer" or "3% more"."""
    if saving is None or round(saving, 2) == 0:
        return "-"
    return f"{abs(saving):.0%} {'fewer' if saving >= 0 else 'more'}"


def race_table(result: Race) -> str:
    """Steps and seconds to one evaluation loss, side by side."""
    return (
        "| | plain | with nowcasts | saved |\n|---|---|---|---|\n"
        f"| steps, first time | {number(result.plain_steps)} | {number(result.nowcast_steps)} "
        f"| {change(result.steps_saved)} |\n"
        f"| steps, for good | {number(result.plain_steps_for_good)} | {number(result.nowcast_steps_for_good)} "
        f"| {change(result.steps_saved_for_good)} |\n"
        f"| training seconds, first time | {number(result.plain_seconds)} | {number(result.nowcast_seconds)} "
        f"| {change(result.seconds_saved)} |\n"
    )


def events_table(events: list[dict[str, Any]]) -> str:
    """One row for every nowcast."""
    if not events:
        return "No nowcast happened: the run was too short for one.\n"
    rows = []
    for event in events:
        written = "yes" if event["accepted"] else f"no: {event['reason']}"
        rows.append(f"| {event['step']} | {event['horizon']} | {event['seconds']:.2f} | {written} |\n")
    return "| step | horizon (intervals) | seconds | written |\n|---|---|---|---|\n" + "".join(rows)


def write_report(metrics: dict[str, Any], plain: Curve, nowcast: Curve) -> str:
    """The whole report.

    Args:
        metrics: what metrics.json holds: ``settings``, ``machine``, ``parameters`` and the two runs.
        plain, nowcast: the evaluation curves of the two runs.
    """
    runs = metrics["runs"]
    to_plain, to_nowcast = race(plain, nowcast, plain.losses[-1]), race(plain, nowcast, nowcast.losses[-1])
    seconds, nowcasting = runs["nowcast"]["train_seconds"], runs["nowcast"]["nowcast_seconds"]
    short = metrics["settings"]["steps"] < 1000
    return TEMPLATE.format(
        **metrics["settings"],
        caution="**A run this short shows that the parts work, and nothing else.**\n\n" if short else "",
        parameters=metrics["parameters"],
        cores=metrics["machine"]["cores"],
        written=sum(event["accepted"] for event in runs["nowcast"]["events"]),
        plain_loss=plain.losses[-1],
        nowcast_loss=nowcast.losses[-1],
        plain_seconds=runs["plain"]["train_seconds"],
        seconds=seconds,
        nowcasting=nowcasting,
        share=nowcasting / seconds,
        race_to_plain=race_table(to_plain),
        race_to_nowcast=race_table(to_nowcast),
        bolder=3 * metrics["settings"]["learning_rate"],
        events=events_table(runs["nowcast"]["events"]),
    )


TEMPLATE = """\
# {arch} with and without nowcasts

{caution}![Evaluation loss over steps](loss_curve.png)

A {arch} of {parameters:,} parameters ({layers} layers, width {width}) learned the King James Bible twice from seed
{seed}: same initial parameters, same batches in the same order, AdamW (weight decay {weight_decay:g}), {warmup_steps}
steps of warm-up to a learning rate of {learning_rate:g}, then the `{lr_scheduler}` schedule; {steps:,} steps of
{batch_size} x {block_length} tokens. One of the two runs was given {written} nowcasts of `{nowcaster}`. One seed, one
machine: expect other numbers from others.

| | plain | with nowcasts |
|---|---|---|
| final evaluation loss (nats per token) | {plain_loss:.4f} | {nowcast_loss:.4f} |
| training seconds in all | {plain_seconds:.1f} | {seconds:.1f} |
| of these nowcasting | 0 | {nowcasting:.1f} ({share:.1%}) |

## To the plain run's final loss, {plain_loss:.4f}

{race_to_plain}
## To the final loss of the run with nowcasts, {nowcast_loss:.4f}

{race_to_nowcast}
A loss counts as reached when an evaluation is at or below it (one every {evaluate_every} steps, straight lines in
between), and for good when none is above it afterwards: right after a nowcast the loss may rise for some steps, and
whoever stops then has not got there. Seconds are those of training on this machine ({cores} cores), nowcasts and
snapshots included, evaluation not; other work on the machine moves them, steps it does not.

## What this does not show

A better learning rate is the cheap rival. Neither run had its learning rate tuned: both used the peak of
{learning_rate:g} and the `{lr_scheduler}` schedule that this demo was told to use. Much of what nowcasts save at a
cautious learning rate, a bolder one saves for free, so the figures above are a gain *at this learning rate* and no
more. To see it: `hf-nino demo --arch {arch} --learning-rate {bolder:g} --out OTHER_FOLDER`.

## Every nowcast

{events}"""
