"""Tables in Markdown, from a summary; nothing is computed that is not in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .numbers import number_spread, percent, percent_spread, settings_text, small_percent
from .plan import BASELINE
from .statistics import Spread
from .summary import Comparison, Summary
from .verdicts import AIMS, Verdict, best_nowcaster, verdicts

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PROTOCOL_WORDS = {
    "paper": "constant learning rate",
    "fixed": "warm-up and cosine, learning rate not swept",
    "tuned": "the same, everybody at their own best learning rate",
    "robust": "the same, at a quarter of AdamW's best learning rate",
}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells under a head, with a line's end."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


# -- the headline ----------------------------------------------------------------------------------------------------


def headline(summary: Summary, kind: str) -> str:
    """All protocols side by side: steps saved, and in ``robust`` the loss recovered; medians over tasks of the medians
    over seeds, with the range over tasks (over seeds where there is one task)."""
    protocols = _compared(summary, kind)
    head = ["method", *(_column(protocol) for protocol in protocols), "overhead"]
    tasks = {protocol: _tasks(summary, kind, protocol) for protocol in protocols}
    rows = []
    for name, info in summary.methods.items():
        if name == BASELINE or not summary.find(method=name, kind=kind):
            continue
        cells = []
        for protocol in protocols:
            measure = "recovered" if protocol == "robust" else "steps_saved"
            spread = summary.over_tasks(protocol, name, kind, measure)
            good = summary.over_tasks(protocol, name, kind, "steps_saved_for_good") if protocol != "robust" else None
            on = len(summary.find(protocol, name, kind))
            few = f", {_count(on, 'task')}" if spread is not None and on < len(tasks[protocol]) else ""
            cells.append(percent_spread(spread, good) + few)
        overheads = (one.measures.get("overhead") for one in summary.find(method=name, kind=kind))
        worst = Spread.of(spread.median for spread in overheads if spread is not None)
        cells.append("" if worst is None else small_percent(Spread.of([worst.high])))
        rows.append([info.title, *cells])
    return markdown_table(head, rows)


def readme_table(summary: Summary) -> str:
    """The headline for language tasks (else for the first kind that there is), and how to read it."""
    kind = summary.kinds[0]
    protocols = _compared(summary, kind)
    if not protocols:
        return "No method but AdamW was run.\n"
    tasks = list(dict.fromkeys(task for protocol in protocols for task in _tasks(summary, kind, protocol)))
    seeds = {len(comparison.seeds) for one in protocols for comparison in summary.find(one, kind=kind)}
    what = "; ".join(f"`{protocol}`: {PROTOCOL_WORDS[protocol]}" for protocol in protocols)
    recovered = (
        " In `robust`, the loss that AdamW loses there against its best learning rate is what a sweep recovers; the "
        "column says which share of it a method recovers without one."
        if "robust" in protocols
        else ""
    )
    over = (
        f"Median over {len(tasks)} {kind} tasks ({', '.join(tasks)}) of medians over {_seeds(seeds)}, and in brackets "
        "the range over tasks"
        if len(tasks) > 1
        else f"One {kind} task ({', '.join(tasks)}), median over {_seeds(seeds)}, and in brackets their range"
    )
    caption = (
        f"Steps saved on the way to AdamW's final loss, against AdamW of the same protocol; {what}. {over}; in "
        "parentheses the median for the step from which on the loss stayed there. "
        f"`none`: did not get there, or diverged.{recovered} Overhead is the share of training time that nowcasts "
        "take, on the worst task."
    )
    return f"{headline(summary, kind)}\n{caption}\n"


def replace_marked(text: str, table: str) -> str:
    """A Markdown file's text with what is between its markers replaced.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"`readme` must have one line {BEGIN} and one line {END} after it, between which the table goes, found "
            f"{text.count(BEGIN)} and {text.count(END)}"
        )
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}{END}{rest.partition(END)[2]}"


def up_to_date(text: str, summary: Summary) -> bool:
    """Whether a Markdown file has, between its markers, what :func:`readme_table` makes of a summary.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    return replace_marked(text, readme_table(summary)) == text


# -- aims ------------------------------------------------------------------------------------------------------------


def aims_table(summary: Summary) -> str:
    """Every aim, for the best nowcaster on AdamW, with its numbers; then all of them for the other nowcasters."""
    best = best_nowcaster(summary)
    if best is None:
        return "No nowcaster on AdamW was measured.\n"
    rows = [[verdict.aim.text, found(verdict), _word(verdict)] for verdict in verdicts(summary, best).values()]
    text = (
        f"The best nowcaster on AdamW, one for all aims: **{summary.methods[best].title}** (most aims reached, then "
        "most steps saved in `fixed`).\n\n" + markdown_table(["aim", "found (medians over seeds)", ""], rows)
    )
    others = [name for name in summary.nowcasters if name != best and summary.find(method=name)]
    if others:
        rows = [
            [summary.methods[name].title, *(_short(verdict) for verdict in verdicts(summary, name).values())]
            for name in others
        ]
        head = ["nowcaster", *(aim.short for aim in AIMS.values())]
        text += f"\nThe other nowcasters on AdamW (median task, or the worst case):\n\n{markdown_table(head, rows)}"
    return text


def found(verdict: Verdict) -> str:
    """The numbers behind a verdict, task by task; of aims about every case, the worst three."""
    if not verdict.values:
        return ""
    text = _one_digit if verdict.aim.most is not None else percent
    listed = sorted(verdict.values.items(), key=lambda item: item[1], reverse=True)
    if verdict.aim.most is not None:
        worst = ", ".join(f"{task} {text(value)}" for task, value in listed[:3])
        return f"worst of {_count(len(listed), 'task')}: {worst}"
    count = f"{verdict.passing} of {_count(len(listed), 'task')}"
    return f"{count}: " + ", ".join(f"{task} {text(value)}" for task, value in listed)


def _short(verdict: Verdict) -> str:
    if not verdict.values:
        return "not measured"
    if verdict.aim.most is not None:
        return f"{_one_digit(max(verdict.values.values()))}, {_word(verdict)}"
    middle = Spread.of(verdict.values.values())
    return f"{percent_spread(middle)}, {_word(verdict)}"


def _one_digit(value: float) -> str:
    return f"{100 * value + 0.0:.1f}%" if math.isfinite(value) else "without end"


def _word(verdict: Verdict) -> str:
    return "**fail**" if verdict.passed is False else verdict.word


# -- one protocol ----------------------------------------------------------------------------------------------------


def methods_by_tasks(summary: Summary, protocol: str, kind: str, measure: str) -> str:
    """One share (such as ``"steps_saved"``, which has ``steps_saved_for_good`` beside it in parentheses) of every
    method on every task of a kind for which there is any; empty if there is none."""
    found = summary.find(protocol, kind=kind)
    tasks = list(dict.fromkeys(one.task for one in found if measure in one.measures))
    rows = []
    for name, info in summary.methods.items():
        cells = [summary.get(protocol, task, name) for task in tasks]
        spreads = [None if one is None else one.measures.get(measure) for one in cells]
        if any(spread is not None for spread in spreads):
            aside = [None if one is None else one.measures.get(f"{measure}_for_good") for one in cells]
            rows.append([info.title, *(percent_spread(*pair) for pair in zip(spreads, aside, strict=True))])
    return markdown_table(["method", *tasks], rows) if rows else ""


def task_table(summary: Summary, protocol: str, task: str) -> str:
    """Everything about every method on one task in one protocol."""
    info = summary.tasks[task]
    found = [one for one in summary.find(protocol) if one.task == task]
    measured = {name for one in found for name in one.measures}
    head = ["method", "settings", "learning rate", "seeds", "final loss", "minus AdamW's", "steps saved", "for good"]
    head += ["time saved", "overhead", "nowcasts"]
    if "accuracy" in measured:
        head.append("final accuracy, %")
    if info.target is not None:
        head += [f"steps to {100 * info.target:g}%", "of these saved"]
    rows = []
    for one in found:
        get = one.measures.get
        row = [
            summary.methods[one.method].title,
            settings_text(one.settings),
            f"{one.learning_rate:g}",
            str(len(one.seeds)) + (f", {len(one.diverged)} diverged" if one.diverged else ""),
            number_spread(get("final_loss"), alone=2),
            number_spread(get("loss_difference"), alone=2, signed=True),
            *(percent_spread(get(name)) for name in ("steps_saved", "steps_saved_for_good", "time_saved")),
            small_percent(get("overhead")),
            _nowcasts(one),
        ]
        if "accuracy" in measured:
            row.append(_accuracy(get("accuracy")))
        if info.target is not None:
            row += [
                number_spread(get("target_steps"), alone=-1, most=0),
                percent_spread(get("target_steps_saved")),
            ]
        rows.append(row)
    return markdown_table(head, rows)


def _accuracy(spread: Spread | None) -> str:
    """In percent, with digits that the spread supports."""
    if spread is None:
        return ""
    scaled = Spread(*(100 * value for value in (spread.median, spread.low, spread.high)), spread.count, spread.missed)
    return number_spread(scaled, alone=0, most=1)


def _nowcasts(one: Comparison) -> str:
    written, back = one.measures.get("written"), one.measures.get("taken_back")
    if written is None or back is None:
        return ""
    return _range(written) + (f", {_range(back)} taken back" if back.high else "")


def _range(spread: Spread) -> str:
    """Of whole numbers, over seeds."""
    return f"{spread.low:.0f}" + (f" to {spread.high:.0f}" if spread.high > spread.low else "")


# -- choices ---------------------------------------------------------------------------------------------------------


def settings_table(summary: Summary) -> str:
    """Settings of every method that has any, by protocol; where kinds of tasks differ, each of them."""
    rows = []
    for name, info in summary.methods.items():
        cells = []
        for protocol in summary.protocols:
            by_text: dict[str, list[str]] = {}
            for one in summary.find(protocol, name):
                by_text.setdefault(settings_text(one.settings), []).append(one.task)
            several = len(by_text) > 1
            cells.append(
                "; ".join(f"{text} ({', '.join(tasks)})" if several else text for text, tasks in by_text.items())
            )
        if any(cell not in ("", "default") for cell in cells):
            rows.append([info.title, *cells])
    return markdown_table(["method", *(f"`{protocol}`" for protocol in summary.protocols)], rows) if rows else ""


def learning_rates_table(summary: Summary) -> str:
    """What was swept: the best learning rate of every method on every task; and what the other protocols gave all."""
    rows = []
    for protocol in summary.protocols:
        if protocol == "tuned":
            continue
        rates = [summary.get(protocol, task, BASELINE) for task in summary.tasks]
        rows.append([f"`{protocol}`, all", *("" if one is None else f"{one.learning_rate:g}" for one in rates)])
    for name, info in summary.methods.items():
        if summary.find("tuned", name):
            rates = [summary.get("tuned", task, name) for task in summary.tasks]
            rows.append(
                [f"`tuned`, {info.title}", *("" if one is None else f"{one.learning_rate:g}" for one in rates)]
            )
    return markdown_table(["", *summary.tasks], rows)


def _tasks(summary: Summary, kind: str, protocol: str | None = None) -> list[str]:
    return list(dict.fromkeys(one.task for one in summary.find(protocol, kind=kind)))


def _compared(summary: Summary, kind: str) -> list[str]:
    """Protocols in which there is something beside AdamW."""
    found = (one for one in summary.find(kind=kind) if one.method != BASELINE)
    return list(dict.fromkeys(one.protocol for one in found))


def _column(protocol: str) -> str:
    return "`robust`: loss recovered" if protocol == "robust" else f"`{protocol}`: steps saved"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _seeds(counts: Iterable[int]) -> str:
    found = sorted(counts)
    return _count(found[0], "seed") if len(found) == 1 else f"{found[0]} to {found[-1]} seeds"
