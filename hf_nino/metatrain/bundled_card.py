"""The model card of a bundled nowcaster: how it was made, how it does beside its rivals, and what it is not for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..bench.training.numbers import settings_text
from ..bench.training.plan import BASELINE
from ..bench.training.summary import Summary
from ..bench.training.tables import PROTOCOL_WORDS, headline, markdown_table
from ..nowcaster.card import TAGS, nowcaster_card
from ..nowcaster.configuration import NowcasterConfig

if TYPE_CHECKING:
    from .remake import Making

_PARTS = {"runs": "further runs of the same tasks", "tasks": "tasks that no run of which it has seen"}


def bundled_card(
    name: str, config: NowcasterConfig, making: Making, made: Mapping[str, Any], benchmark: Summary
) -> str:
    """Markdown with its metadata.

    Args:
        made: what was written down when it was bundled.
        benchmark: runs with it, and with its rivals.
    """
    tags = "".join(f"- {tag}\n" for tag in TAGS)
    more = "\n".join((_making(name, making, made), _held_out(made), _benchmark(name, benchmark), _limits()))
    text = nowcaster_card(config, name, made["parameters"], bundled=True, more=more)
    return f"---\nlicense: mit\nlibrary_name: hf_nino\ntags:\n{tags}---\n\n{text}"


def _making(name: str, making: Making, made: Mapping[str, Any]) -> str:
    record, hours, hardware = making.record, made["hours"], made["hardware"]
    settings = ", ".join(f"{key} {_plain(value)}" for key, value in making.settings.items())
    tasks = ", ".join(f"`{task}`" for task in record["tasks"])
    software = ", ".join(f"{package} {version}" for package, version in made["software"].items())
    return f"""## How it was made

```bash
hf-nino remake {name} --out runs/{name}
```

records {record["runs"]} runs of each of these tasks, {record["steps"]:,} steps long, and meta-trains on them:
{tasks}. Learning rates (over two decades), schedules, warm-up, weight decay, batch sizes, AdamW or
SGD with momentum, and initialisations differ from run to run. Of the runs,
{made["data"]["trajectories"]} were learned from; the others were held out.

| | |
|---|---|
| meta-training | {made["steps"]:,} steps, {len(made["skipped_steps"])} of them skipped as not finite; {settings} |
| texts | WordNet (WordNet licence), Python's standard library (PSF licence), Fashion-MNIST (MIT) |
| hardware | {hardware["device"]}, {hardware["processes"]} process with {hardware["threads"]} thread(s) |
| time | {hours["record"]:.2f} h to record, {hours["meta_train"]:.2f} h to meta-train |
| commit of hf_nino | `{made["commit"]}` |
| software | {software} |
| licence | MIT |
"""


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


def _held_out(made: Mapping[str, Any]) -> str:
    rows = []
    for part, words in _PARTS.items():
        found = made["held_out"].get(part)
        if found:
            names = ("persistence", "linear", "nowcaster")
            rows.append([words, *(f"{100 * found[f'relative_{method}']:.1f}%" for method in names)])
    table = markdown_table(["held out", "last state", "straight line, best factor of each horizon", "nowcaster"], rows)
    return f"""## On held-out trajectories

Mean absolute error of the predicted parameters, in percent of what standing still costs (median over slices, mean over
horizons).

{table}"""


def _benchmark(name: str, benchmark: Summary) -> str:
    parts = [
        "## In training\n",
        "On models and texts that no recorded run came from; medians over seeds, and in brackets the range over tasks "
        "(over seeds, where there is one task). Steps saved on the way to AdamW's final loss, against AdamW of the "
        "same protocol: "
        + "; ".join(f"`{protocol}`: {PROTOCOL_WORDS[protocol]}" for protocol in benchmark.protocols)
        + ".\n",
    ]
    parts += [f"{kind.capitalize()}:\n\n{headline(benchmark, kind)}" for kind in benchmark.kinds]
    rows = [
        [
            one.protocol,
            one.task,
            benchmark.methods[one.method].title,
            settings_text(one.settings),
            f"{one.learning_rate:g}",
            str(len(one.seeds)),
            _loss(one.measures.get("final_loss")),
        ]
        for one in benchmark.comparisons
        if one.method == BASELINE or one.method.endswith(name)
    ]
    head = ["protocol", "task", "method", "settings", "learning rate", "seeds", "final loss"]
    return "\n".join([*parts, markdown_table(head, rows)])


def _loss(spread: Any) -> str:
    return "" if spread is None else f"{spread.median:.3f} [{spread.low:.3f}..{spread.high:.3f}]"


def _limits() -> str:
    return """## Limits

It has seen models of some ten thousand parameters, trained for 1,000 steps. It is no better than its table: where the
rule `"spectral"`, which has no weights and is what hf_nino uses if nothing else is named, saves more steps there, use
that. It has seen neither 16-bit nor quantised training, nor runs longer than those it was made of.
"""
