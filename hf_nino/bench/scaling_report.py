"""Tables of what nowcasts cost on many ranks, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..training.estimate import readable


def paper_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One table for every nowcaster, from :func:`hf_nino.bench.scaling.table`."""
    parts = []
    for nowcaster in dict.fromkeys(row["nowcaster"] for row in rows):
        carries = any(row["carried_bytes"] for row in rows if row["nowcaster"] == nowcaster)
        lines = [
            f"### {nowcaster}",
            "",
            "| model | ranks | history" + (" and memory" if carries else "") + " | at work | sent | seconds |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row["nowcaster"] == nowcaster:
                kept = row["history_bytes"] + row["carried_bytes"]
                sizes = " | ".join(readable(size) for size in (kept, row["working_bytes"], row["sent_bytes"]))
                seconds = float(f"{row['seconds']:.2g}")  # two digits, and no exponent
                lines.append(f"| {row['model']} | {row['ranks']} | {sizes} | {seconds:g} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def measured_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for every measurement of :func:`hf_nino.bench.scaling_measured.measure`."""
    lines = [
        "| nowcaster | processes | history | sums | exchanges | collectives | seconds of work | share | counts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        odd = ", ".join(key for key, value in row["on_paper"].items() if row[key] != value)
        sizes = " | ".join(readable(row[key]) for key in ("history_bytes", "summed_bytes", "exchanged_bytes"))
        lines.append(
            f"| {row['nowcaster']} | {row['ranks']} | {sizes} | {row['collectives']} | {row['seconds']:.2g} | "
            f"{row['share']:.0%} | {odd or 'as on paper'} |"
        )
    return "\n".join(lines) + "\n"
