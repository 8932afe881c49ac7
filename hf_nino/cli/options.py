"""Options that several commands have, once: same name, same words, same values."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

NowcasterOption = Annotated[str, typer.Option(help="Name, folder or repo id of a nowcaster.")]
PeriodOption = Annotated[int | None, typer.Option(help="Steps between nowcasts. [default: the nowcaster's own]")]
Device = Literal["cpu", "cuda"]
TrainingDeviceOption = Annotated[
    Device | None, typer.Option(help="Where to train. [default: cuda where there is one]")
]
NowcasterDeviceOption = Annotated[
    Device | None, typer.Option(help="Where a nowcaster with weights computes. [default: cpu]")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
