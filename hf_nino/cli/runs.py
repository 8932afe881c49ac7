"""Commands around a run: one to try, one that is finished, one that goes on from a nowcast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..defaults import NOWCASTER
from .options import JsonOption, NowcasterDeviceOption, NowcasterOption, OverwriteOption, PeriodOption


def demo(
    arch: Annotated[Literal["gpt2", "llama"], typer.Option(help="Which architecture to train.")] = "gpt2",
    nowcaster: NowcasterOption = NOWCASTER,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each of the two runs.")] = 4000,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. [default: runs/demo-ARCH]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the parameters and of the data order.")] = 0,
    period: PeriodOption = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    lr_scheduler: Annotated[
        Literal["linear", "cosine", "constant_with_warmup"], typer.Option(help="Schedule after the warm-up.")
    ] = "linear",
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny version, to see that everything works.")] = False,
) -> None:
    """Train a small language model with and without nowcasts, and compare.

    The same command again resumes what was interrupted.

    Example: hf-nino demo --arch llama --nowcaster momentum --out runs/momentum
    """
    from ..demo import DemoSettings, run_demo

    settings = DemoSettings(
        arch=arch,
        nowcaster=nowcaster,
        steps=steps,
        seed=seed,
        period=period,
        learning_rate=learning_rate,
        lr_scheduler=lr_scheduler,
    )
    out = out or Path("runs") / f"demo-{arch}"
    run_demo(settings.smoke() if smoke else settings, out, typer.echo)
    typer.echo(f"Report: {out / 'report.md'}")


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a Trainer or of the demo, or a run's JSON of the benchmark.")],
    out: Annotated[
        Path | None, typer.Option(help="The page. [default: nino_report.html in RUN; NAME.html beside a file]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Turn a run into one page: loss with nowcasts, what each brought, horizons, time, memory, the parameters' path.

    The page is one HTML file that loads nothing. What a run did not record is left out, and the page says so.

    Example: hf-nino report runs/trainer --out report.html
    """
    from ..commands.report import report_run

    report_run(run, typer.echo, out=out, as_json=json)


def nowcast(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="A run's folder, or its checkpoints, oldest first.", metavar="RUN_OR_CHECKPOINTS"),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new checkpoint.")],
    nowcaster: NowcasterOption = "linear",
    horizon: Annotated[
        int | None, typer.Option(help="Intervals ahead; one is the spacing of the checkpoints. [default: one period]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, config.json, model type or repo id. [default: the last checkpoint's]")
    ] = None,
    device: NowcasterDeviceOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Predict a checkpoint from the last ones of a run; training resumes from it.

    Folders of Trainer and of accelerate, sharded or not, and files (.safetensors, .pt, .bin) will do. Of a run's
    folder the newest equally spaced checkpoints are taken. Nothing is written if the nowcast is implausible.

    Example: hf-nino nowcast runs/trainer --nowcaster linear --horizon 3 --out runs/nowcast
    """
    from ..commands.nowcast import nowcast as nowcast_run

    nowcast_run(
        checkpoints,
        out,
        typer.echo,
        nowcaster=nowcaster,
        horizon=horizon,
        model=model,
        device=device,
        overwrite=overwrite,
        as_json=json,
    )
