"""What the model card of a trained model says about nowcasts: a pure function of what happened in the run.

:class:`~hf_nino.training.trainer.NiNoTrainer` adds it to its cards.  With a callback, add it yourself::

    trainer.create_model_card()
    update_card("out/README.md", callback.nowcasting, trainer.state.log_history)
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .._version import __version__
from ..nowcaster.card import CITATION
from ..nowcaster.source import NowcasterSource
from .nowcasting import Nowcasting

TAGS = ("nino", "nowcasting")

# Around the section, so that it can be replaced.
_BEGIN, _END = "<!-- hf_nino: nowcasts -->", "<!-- hf_nino: end -->"
_SECTION = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)
_BASE = re.compile(r"is a fine-tuned version of\s+\[(?P<name>[^\]\n]*)\]\(https://huggingface\.co/(?P=name)\)")
# More horizons than this are not listed one by one.
LISTED = 12


@dataclass(frozen=True)
class NowcastFacts:
    """What is told about a run's nowcasts.

    Attributes:
        nowcaster: its name: a rule with its settings, a repository, a bundled nowcaster, or the class of an object;
            of a local path only the last part.
        source: where it was loaded from, if it has weights.
        period, interval: optimizer steps between nowcasts, and between snapshots.
        horizon: the policy, or the number of intervals.
        steps: optimizer steps of the run.
        horizons: of the nowcasts that were written, in order, in intervals.
        written: nowcasts that were written into the model; some were taken back later.
        taken_back: those that were, also together with an earlier one.
        refused: nowcasts that failed or that the guard refused.
        shortened: nowcasts of which some steps were too long and shortened; ``None`` if that is not known.
        overhead: what snapshots and nowcasts took, as a share of training time; ``None`` if that is not known.
        stopped: whether nowcasting was given up before the end.
        observe_only: whether nowcasts were only measured.
    """

    nowcaster: str
    source: NowcasterSource | None
    period: int
    interval: int
    horizon: str
    steps: int
    horizons: tuple[int, ...] = ()
    written: int = 0
    taken_back: int = 0
    refused: int = 0
    shortened: int | None = None
    overhead: float | None = None
    stopped: bool = False
    observe_only: bool = False


def facts_of(nowcasting: Nowcasting, log_history: Sequence[Mapping[str, Any]]) -> NowcastFacts:
    """The facts of a run.

    Args:
        nowcasting: of the run.
        log_history: of the trainer's state, which a resumed run takes over from the one before; ``nino_*`` numbers and
            ``train_runtime`` are read.
    """
    events = [entry for entry in log_history if "nino_horizon" in entry]
    accepted = [entry for entry in events if entry.get("nino_accepted")]
    told = [entry["nino_shortened"] for entry in accepted if "nino_shortened" in entry]
    source = getattr(nowcasting.nowcaster, "source", None)
    return NowcastFacts(
        nowcaster=_public_name(source.name if source is not None else nowcasting.spec),
        source=source,
        period=nowcasting.period,
        interval=nowcasting.interval,
        horizon=str(nowcasting.outlook.horizon.policy),
        steps=nowcasting.step_count,
        horizons=tuple(int(entry["nino_horizon"]) for entry in accepted),
        written=nowcasting.nowcasts,
        taken_back=max(nowcasting.taken_back, _undone(events)),
        refused=nowcasting.rejected,
        shortened=sum(bool(count) for count in told) if told else None,
        overhead=_overhead(nowcasting, log_history, events),
        stopped=nowcasting.stopped,
        observe_only=nowcasting.observe_only,
    )


def update_card(
    path: str | os.PathLike, nowcasting: Nowcasting | None, log_history: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Add the section to the card in a file, or replace it; nothing is done where there is no such file.

    Args:
        nowcasting: of the run; ``None`` only corrects the base model.
        log_history: of the trainer's state.
    """
    path = Path(path)
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    facts = None if nowcasting is None else facts_of(nowcasting, log_history)
    path.write_text(card_with(text, facts), encoding="utf-8")


def card_with(text: str, facts: NowcastFacts | None) -> str:
    """A card with the section at its end, instead of an earlier one, tags of ours, and no base model that is none.

    Idempotent.  ``Trainer`` calls a model that was trained from scratch a fine-tuned version of ``[]``; that is put
    right, and so is a link to a folder.
    """
    card = ModelCard(text, ignore_metadata_errors=True)
    bases = card.data.get("base_model")
    if not isinstance(bases, list) and "base_model" in card.data.to_dict() and not _is_repository(bases):
        del card.data.base_model
    card.text = _SECTION.sub("\n", _BASE.sub(_right_base, card.text))
    if facts is not None:
        tags = card.data.get("tags") or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        card.data.tags = tags + [tag for tag in TAGS if tag not in tags]
        card.text = f"{card.text.rstrip()}\n\n{_BEGIN}\n{section(facts)}\n{_END}\n"
    return card.content


def section(facts: NowcastFacts) -> str:
    """The section in Markdown: what it was trained with, what nowcasts did, what they cost, and the paper."""
    rows = [
        ("nowcaster", _link(facts)),
        ("a nowcast every", f"{_steps(facts.period)}, from snapshots every {_steps(facts.interval)}"),
        ("horizon", f"{_policy(facts.horizon)}; {_horizons(facts)}"),
        ("optimizer steps", f"{facts.steps:,}"),
        ("nowcasts accepted", f"{facts.written - facts.taken_back}"),
    ]
    if facts.shortened is not None:
        rows.append(("of those written, shortened", f"{facts.shortened}"))
    rows += [("nowcasts taken back", f"{facts.taken_back}"), ("nowcasts refused", f"{facts.refused}")]
    if facts.overhead is not None:
        percent = 100 * facts.overhead
        rows.append(("overhead", f"{percent:{'.2g' if percent < 10 else '.0f'}}% of training time"))
    notes = []
    if facts.observe_only:
        notes.append("Nowcasts were only measured in this run, none was written.")
    if facts.stopped:
        notes.append("Nowcasting was given up before the end of the run, which went on with the optimizer alone.")
    table = "\n".join(["| | |", "|---|---|", *(f"| {label} | {text} |" for label, text in rows)])
    return "\n\n".join(
        [
            "## Nowcasts",
            "During training, a nowcaster predicted every now and then where the parameters would be many steps "
            "later, and the predictions were written into the model "
            f"([NiNo](https://arxiv.org/abs/2409.04434), `hf_nino` {__version__}).",
            table,
            *notes,
            f"```bibtex\n{CITATION}\n```",
        ]
    )


def _undone(events: Sequence[Mapping[str, Any]]) -> int:
    """Nowcasts that were taken back: with one, all that were written since."""
    undone: set[float] = set()
    for event in events:
        back = event.get("nino_taken_back_to")
        if back is not None:
            steps = (entry["nino_step"] for entry in events if entry.get("nino_accepted"))
            undone.update(step for step in steps if back <= step < event["nino_step"])
    return len(undone)


def _overhead(
    nowcasting: Nowcasting, log_history: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> float | None:
    """Seconds of nowcasting over those of the last ``train()``, of which alone the log says how long it took."""
    runtimes = [entry["train_runtime"] for entry in log_history if "train_runtime" in entry]
    if not runtimes or not runtimes[-1] > 0:
        return None
    seconds = nowcasting.seconds
    first = nowcasting.events[0].step if nowcasting.events else nowcasting.step_count + 1
    before = [entry["nino_total_seconds"] for entry in events if entry["nino_step"] < first]
    if before:  # resumed: what was spent until the last nowcast before is of another process
        seconds -= before[-1]
    return seconds / runtimes[-1]


def _public_name(name: str) -> str:
    """Of a path only the last part: where it lies on somebody's machine is nobody's business."""
    path = Path(name).expanduser()
    return path.name if path.exists() or path.is_absolute() or path.suffix == ".pt" else name


def _link(facts: NowcastFacts) -> str:
    source = facts.source
    if source is None or source.commit is None:
        return f"`{facts.nowcaster}`"
    page = f"https://huggingface.co/{source.name}/tree/{source.commit}"
    asked = "" if source.revision in (None, source.commit) else f" (`{source.revision}`)"
    return f"[{source.name}](https://huggingface.co/{source.name}) at commit [`{source.commit}`]({page}){asked}"


def _policy(horizon: str) -> str:
    return f"{_intervals(int(horizon))}" if horizon.isdecimal() else f"`{horizon}`"


def _horizons(facts: NowcastFacts) -> str:
    used = facts.horizons
    if not used:
        return "none was written"
    if len(set(used)) == 1:
        return f"looked {_intervals(used[0])} ahead"
    if len(used) <= LISTED:
        return f"looked {', '.join(map(str, used))} intervals ahead"
    return f"looked {min(used)} to {max(used)} intervals ahead, {sorted(used)[len(used) // 2]} in the median"


def _intervals(count: int) -> str:
    return "1 interval" if count == 1 else f"{count:,} intervals"


def _steps(count: int) -> str:
    return "optimizer step" if count == 1 else f"{count:,} optimizer steps"


def _is_repository(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and name != "None" and not os.path.exists(name)


def _right_base(match: re.Match[str]) -> str:
    name = match["name"]
    if _is_repository(name):
        return match[0]
    return "is a fine-tuned version of a local model" if name else "was trained from scratch"
