"""``hf-nino bench`` and what is below it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Device, JsonOption, TrainingDeviceOption

bench_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@bench_app.callback()
def bench(
    context: typer.Context,
    preset: Annotated[
        Literal["smoke", "paper", "tuned", "full"], typer.Option(help="Which tasks, methods and protocols.")
    ] = "smoke",
    tasks: Annotated[str | None, typer.Option(help="Others than the preset's, comma-separated.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Others than the preset's: adamw,spectral:growth=1,nino:PATH,muon+nino:PATH."),
    ] = None,
    protocols: Annotated[str | None, typer.Option(help="Some of paper,fixed,tuned,robust.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Of the runs that count. [default: 0,1,2; smoke: 0]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of a run. [default: the task's]")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at once. [default: one per core; 4 on a GPU]")] = None,
    device: TrainingDeviceOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/bench"),
) -> None:
    """Compare nowcasting with its rivals: tasks x methods x protocols x seeds, one JSON a run, then a report.

    The same command again goes on where it was interrupted, and presets share runs in one folder.

    Example: hf-nino bench --preset tuned --tasks gpt2-64-kjv --methods linear,momentum,muon
    """
    if context.invoked_subcommand is not None:
        return
    from ..commands.bench import bench_training

    bench_training(
        preset,
        out,
        typer.echo,
        tasks=tasks,
        methods=methods,
        protocols=protocols,
        seeds=seeds,
        steps=steps,
        jobs=jobs,
        device=device,
    )


@bench_app.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a benchmark.", metavar="FOLDER")] = Path("runs/bench"),
    readme: Annotated[
        Path | None, typer.Option(help="Markdown file whose marked part is replaced by the headline table.")
    ] = None,
) -> None:
    """Tables and pictures from the runs of a benchmark, finished or not.

    Example: hf-nino bench report runs/bench
    """
    from ..commands.bench import report_training

    report_training(out, typer.echo, readme=readme)


@bench_app.command()
def engine(
    device: Annotated[Device | None, typer.Option(help="Where to compute. [default: cuda where there is one]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: PyTorch's own]")] = None,
    repeats: Annotated[int | None, typer.Option(help="Of every measurement. [default: 3, on cuda 1]")] = None,
    max_parameters: Annotated[
        str | None, typer.Option(help="Of the largest model, such as 100M. [default: 12M, on cuda 10B]")
    ] = None,
    nowcaster: Annotated[
        str | None, typer.Option(help="Folder, repo id or original .pt file. [default: random weights]")
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(help="Checkout of the original release, to compare with (it takes 8 GB and some minutes)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.md, engine.png.")] = Path(
        "runs/bench-engine"
    ),
    json: JsonOption = False,
) -> None:
    """Measure what a nowcast costs on this machine, against parameters: seconds, memory, how close to the floors.

    Every measurement runs in a process of its own; the same command again goes on where it was interrupted.

    Example: hf-nino bench engine --threads 1 --original ./nino
    """
    from ..commands.bench import bench_engine, count

    bench_engine(
        out,
        typer.echo,
        as_json=json,
        device=device,
        threads=threads,
        repeats=repeats,
        max_parameters=count(max_parameters),
        nowcaster=nowcaster,
        original=original,
    )


@bench_app.command()
def scaling(
    measured: Annotated[
        bool, typer.Option("--measured", help="Run a small model on 1, 2 and 4 processes instead, and compare.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """What nowcasts cost on many ranks, on paper: memory, bytes and seconds of 1B, 8B and 70B on 1 to 512 ranks.

    Example: hf-nino bench scaling --measured
    """
    from ..commands.scaling import bench_scaling

    bench_scaling(typer.echo, measured=measured, as_json=json)
