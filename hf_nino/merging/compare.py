"""All ways of merging the same models, evaluated: a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..nowcaster import Nowcaster
from .models import merge_models
from .reading import Model, check_count

Row = dict[str, Any]


def compare_merges(
    base: Model,
    fine_tuned: Sequence[Model] | Mapping[str, Model],
    nowcasters: Mapping[str, str | os.PathLike | Nowcaster],
    evaluate: Callable[[Any], Mapping[str, float]],
    *,
    scales: Sequence[float] = (0.4,),
    nowcast_scales: Sequence[float] = (1.0,),
    **options: Any,
) -> list[Row]:
    """Evaluate base, task models, their average, task arithmetic and the nowcasters' merges.

    The same evaluation for all, no setting chosen by it: whoever picks the best of several scales from this table
    should evaluate the choice on other data.

    Args:
        base: see :func:`merge_models`.
        fine_tuned: the task models, by name if it is a mapping.
        nowcasters: {label: nowcaster}.
        evaluate: given a model (whatever :func:`merge_models` returns for this base), returns {metric: number}.
        scales: of task arithmetic.
        nowcast_scales: of nowcasts.
        options: other arguments of :func:`merge_models`: ``rotate``, ``keep``, ``graph`` and so on.

    Returns:
        One row each, ``{"method": label, **metrics}``: base, task models, average, task arithmetic, nowcasters.
    """
    names = list(fine_tuned) if isinstance(fine_tuned, Mapping) else None
    tasks = check_count(list(fine_tuned.values()) if isinstance(fine_tuned, Mapping) else fine_tuned)
    names = names or [f"model {number}" for number in range(1, len(tasks) + 1)]
    rows = [{"method": "base", **evaluate(base)}]
    rows += [{"method": name, **evaluate(task)} for name, task in zip(names, tasks, strict=True)]
    common = {"keep": options.get("keep", ())}
    rows.append({"method": "average", **evaluate(merge_models(base, tasks, method="average", **common))})
    for scale in scales:
        merged = merge_models(base, tasks, method="task-arithmetic", scale=scale, **common)
        rows.append({"method": f"task arithmetic, scale {scale:g}", **evaluate(merged)})
    for label, nowcaster in nowcasters.items():
        for scale in nowcast_scales:
            merged = merge_models(base, tasks, nowcaster, scale=scale, **options)
            named = label if len(nowcast_scales) == 1 else f"{label}, scale {scale:g}"
            rows.append({"method": named, **evaluate(merged)})
    return rows


def as_markdown(rows: Sequence[Row], digits: int = 4) -> str:
    """The rows as a table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column, ""), digits) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
