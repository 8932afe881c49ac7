"""The report of a benchmark: what it measured, in words, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path

from .pictures import draw_curves, draw_overview, draw_sweeps
from .pictures.style import groups
from .plan import BASELINE
from .results import Results, load_results
from .statistics import MEASURES
from .summary import Summary, summarise
from .tables import (
    PROTOCOL_WORDS,
    aims_table,
    learning_rates_table,
    methods_by_tasks,
    readme_table,
    replace_marked,
    settings_table,
    task_table,
)

REPORT, SUMMARY, PICTURES = "report.md", "summary.json", "pictures"


def write_report(out: Path, *, readme: Path | None = None) -> Path:
    """Leave ``report.md``, ``summary.json`` (every number of the report) and ``pictures/`` in a benchmark's folder.

    Args:
        readme: a Markdown file; what is between its markers is replaced by the headline table.

    Returns:
        The report's path.

    Raises:
        ValueError: there are no runs, or no choices; or ``readme`` is no file with one pair of markers.
        ImportError: matplotlib is missing.
    """
    results = load_results(out)
    summary = summarise(results)
    if readme is not None:
        try:
            text = readme.read_text("utf-8")
        except OSError as error:
            raise ValueError(f"`readme` must be a Markdown file, but {readme} cannot be read ({error})") from error
        readme.write_text(replace_marked(text, readme_table(summary)), "utf-8")
    pictures = draw(results, summary, out / PICTURES)
    (out / SUMMARY).write_text(json.dumps(summary.to_json(), separators=(",", ":")) + "\n", "utf-8")
    path = out / REPORT
    path.write_text(markdown(summary, pictures), "utf-8")
    return path


def read_summary(path: Path) -> Summary:
    """A ``summary.json`` that :func:`write_report` left."""
    return Summary.from_json(json.loads(path.read_text("utf-8")))


def draw(results: Results, summary: Summary, folder: Path) -> list[str]:
    """All pictures; the names of their files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [name for kind in summary.kinds if draw_overview(summary, kind, folder / (name := f"overview-{kind}.png"))]
    found += [
        name
        for kind in summary.kinds
        for group in groups(summary)
        if draw_sweeps(results, summary, group, kind, folder / (name := f"learning-rate-{kind}-{group.name}.png"))
    ]
    for protocol, task in dict.fromkeys((one.protocol, one.task) for one in summary.comparisons):
        found.append(name := f"curves-{protocol}-{task}.png")
        draw_curves(results, summary, protocol, task, folder / name)
    return found


def markdown(summary: Summary, pictures: list[str]) -> str:
    """The report's text."""

    def shown(prefix: str) -> str:
        return "".join(f"![{name[:-4]}]({PICTURES}/{name})\n\n" for name in pictures if name.startswith(prefix))

    parts = [
        "# What nowcasts bring\n",
        _what_was_run(summary),
        readme_table(summary),
        shown("overview-"),
        "## Aims\n",
        aims_table(summary),
    ]
    if sweeps := shown("learning-rate-"):
        parts += ["## Final loss against learning rate\n", SWEEP_WORDS, sweeps]
    for protocol in summary.protocols:
        parts.append(f"## `{protocol}`: {PROTOCOL_WORDS[protocol]}\n")
        for kind in summary.kinds:
            if not summary.find(protocol, kind=kind):
                continue
            parts.append(f"### {kind.capitalize()}\n")
            for measure, words in SHARES.items():
                if table := methods_by_tasks(summary, protocol, kind, measure):
                    parts += [f"{words}:\n", table]
            for task in dict.fromkeys(one.task for one in summary.find(protocol, kind=kind)):
                parts += [
                    f"<details><summary>{task}: all numbers and the curves</summary>\n",
                    task_table(summary, protocol, task),
                    shown(f"curves-{protocol}-{task}.png") + "</details>\n",
                ]
    parts += ["## What was chosen\n", CHOICE_WORDS]
    if settings := settings_table(summary):
        parts.append(settings)
    parts += ["Learning rates, in AdamW's units:\n", learning_rates_table(summary)]
    parts += ["## What did not work\n", _losses(summary), "## How to read this\n", HOW_TO_READ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _what_was_run(summary: Summary) -> str:
    counts = sorted({len(one.seeds) for one in summary.comparisons})
    seeds = "1 seed" if counts == [1] else f"{counts[0]} to {counts[-1]} seeds" if counts[1:] else f"{counts[0]} seeds"
    tasks = "; ".join(
        f"{name} ({info.kind}, {info.parameters:,} parameters, {info.steps:,} steps)"
        for name, info in summary.tasks.items()
    )
    alone = " **What has one seed cannot be told from luck.**" if counts[0] == 1 else ""
    devices = ", ".join(summary.devices) or "unknown devices"
    return f"{len(summary.methods)} methods, {seeds}, on {devices}: {tasks}.{alone}\n"


def _losses(summary: Summary) -> str:
    """Everything that diverged, failed or is missing."""
    diverged: dict[tuple[str, str], list[str]] = {}
    for one in summary.comparisons:
        if one.diverged:
            seeds = f"{one.task} (seed {', '.join(map(str, one.diverged))})"
            diverged.setdefault((one.method, one.protocol), []).append(seeds)
    lines = [
        f"* diverged: {summary.methods[method].title}, `{protocol}`: {', '.join(tasks)}"
        for (method, protocol), tasks in diverged.items()
    ]
    lines += [f"* missing: {text}" for text in summary.missing]
    lines += [f"* failed: {text}" for text in summary.failed]
    if BASELINE not in summary.methods:
        lines.append("* AdamW was not run: there is nothing to compare with")
    return "\n".join(lines) or "No run that counts diverged, failed or is missing."


SHARES = {
    "recovered": "Share of the loss that a sweep recovers, recovered without one",
    "steps_saved": "Steps saved to AdamW's final loss, for the first time and (in parentheses) for good",
    "target_steps_saved": "Steps saved to the task's target accuracy",
}
SWEEP_WORDS = """\
All runs of the sweeps, with the settings of `tuned`. Lines are the seed that swept, dots the others. A cross at the
top is a learning rate at which the run diverged; a line that leaves the picture does so because the loss does.
"""
CHOICE_WORDS = """\
Settings were chosen by final evaluation loss on another task and another seed, where the benchmark has such a task for
the kind, and are a method's defaults where not. Best learning rates were chosen by the median final loss of
the seeds that count: for AdamW as for everybody else.
"""
HOW_TO_READ = f"""\
Every number compares a run with AdamW's run of the same task, protocol and seed: same initial parameters, same
batches. In `tuned`, each method at its own best learning rate with AdamW at its own best. What is shown is the median
over seeds, with the lowest and the highest in brackets. A run that diverged or never got there is worse than any that
did; there is a median only if more than half of the seeds got there. A few seeds say little about luck: differences
within the brackets are none. Where AdamW itself diverged, its seed cannot be compared with.

{"".join(f"* {name.replace('_', ' ')}: {text}" + chr(10) for name, text in MEASURES.items())}
A loss counts as reached when an evaluation is at or below it, on straight lines between evaluations. *Behind in loss*
is the median difference of final losses as a share of AdamW's. *Behind in steps* is `steps behind`: at AdamW's final
loss if the method got there, else at the method's own final loss, which AdamW reached earlier.
"""
