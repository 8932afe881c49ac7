"""Commands that are given models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..defaults import NOWCASTER
from .options import JsonOption, NowcasterDeviceOption, NowcasterOption, OverwriteOption, PeriodOption


def graph(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder or config.json, a model type such as llama, or a repository on the Hub.",
            metavar="MODEL_OR_PATH",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the two pictures. [default: the current folder; none with --json]")
    ] = None,
    format: Annotated[Literal["png", "svg", "pdf"], typer.Option(help="Format of the pictures.")] = "png",
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Whether to draw the pictures.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    meta: Annotated[bool, typer.Option("--meta", help="Never make weights, however small the model is.")] = False,
) -> None:
    """Build the neural graph of a model, say what is in it, and draw it twice: as a diagram and as a matrix.

    The configuration is enough: a graph does not depend on weights, so none are loaded or downloaded.

    Example: hf-nino graph llama --out pictures
    """
    from ..commands.graph import show_graph

    folder = out or (None if json else Path())
    show_graph(
        model,
        folder if plot else None,
        typer.echo,
        picture_format=format,
        as_json=json,
        meta=meta,
    )


def estimate(
    model: Annotated[str, typer.Argument(help="A folder, config.json, model type or repo id.", metavar="MODEL")],
    nowcaster: NowcasterOption = NOWCASTER,
    period: PeriodOption = None,
    history_device: Annotated[str, typer.Option(help="Where snapshots live: cpu, model or disk:PATH.")] = "cpu",
    history_dtype: Annotated[str, typer.Option(help="Dtype of snapshots.")] = "float32",
    batch_tokens: Annotated[int, typer.Option(help="Tokens of an optimizer step, to guess its length.")] = 32768,
    step_seconds: Annotated[float | None, typer.Option(help="Length of an optimizer step, if you know it.")] = None,
    json: JsonOption = False,
) -> None:
    """Say what nowcasts would cost a model on this machine: memory of snapshots, seconds, share of training time.

    The model is built from its configuration, without weights; a nowcast is timed on a small matrix.

    Example: hf-nino estimate ./my-model --period 1000
    """
    from ..commands.estimate import as_json, as_table, estimate_model

    name, found = estimate_model(
        model,
        nowcaster,
        period=period,
        history_device=history_device,
        history_dtype=history_dtype,
        batch_tokens=batch_tokens,
        seconds_per_step=step_seconds,
    )
    typer.echo(as_json(name, found) if json else as_table(name, nowcaster, found))


def merge(
    base: Annotated[str, typer.Argument(help="Checkpoint that the others were fine-tuned from.", metavar="BASE")],
    fine_tuned: Annotated[list[str], typer.Argument(help="Two or more of them.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    nowcaster: Annotated[str | None, typer.Option(help="Name, folder or repo id, for the method nowcast.")] = None,
    method: Annotated[Literal["nowcast", "average", "task-arithmetic"], typer.Option(help="How.")] = "nowcast",
    scale: Annotated[float | None, typer.Option(help="Of the step. [default: 1; task arithmetic: 0.4]")] = None,
    horizons: Annotated[
        str | None, typer.Option(help="Whose nowcasts are averaged. [default: 1,2,3,4,5, as far as it goes]")
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="Which model each snapshot is, 0 the base, such as 0,1,2,2,1.")
    ] = None,
    rotate: Annotated[
        bool | None, typer.Option(help="Average over all rotations of the models. [default: with rules]")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Pattern of parameters that stay the base's; may be repeated.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, config.json, model type or repo id. [default: the base's]")
    ] = None,
    device: NowcasterDeviceOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Merge models that were fine-tuned from one base: with a nowcaster, by averaging, or by task arithmetic.

    A nowcaster takes base and models for a trajectory. Published results beat averaging in some cases only: compare.

    Example: hf-nino merge base math code --nowcaster ./nino-no-posw --out merged
    """
    from ..commands.merge import merge as merge_checkpoints

    merge_checkpoints(
        base,
        fine_tuned,
        out,
        typer.echo,
        nowcaster=nowcaster,
        method=method,
        scale=scale,
        horizons=horizons,
        order=order,
        rotate=rotate,
        keep=keep or (),
        model=model,
        device=device,
        overwrite=overwrite,
        as_json=json,
    )
