"""Commands that make nowcasters, and pass them on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import JsonOption, TrainingDeviceOption


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt file of the original release.", metavar="FILE.pt")],
    folder: Annotated[Path, typer.Argument(help="Where to write config.json and model.safetensors.")],
) -> None:
    """Convert a checkpoint of the original NiNo release into a folder that every nowcaster option takes.

    Example: hf-nino convert nino_no_posw.pt nino-no-posw && hf-nino demo --nowcaster ./nino-no-posw
    """
    from ..nowcaster import convert_original

    model = convert_original(checkpoint)
    model.save_pretrained(folder)
    typer.echo(f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters -> {folder}")


def record(
    tasks: Annotated[
        str,
        typer.Option(help="Comma-separated: smoke, language, language-kjv, images, all, or gpt2-2x32-h4-v512-kjv."),
    ] = "smoke",
    out: Annotated[Path, typer.Option(help="Folder for the trajectories: a dataset with its card.")] = Path(
        "runs/trajectories"
    ),
    runs: Annotated[int, typer.Option(help="Runs of each task, with settings drawn for each.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of a run. [default: the task's]")] = None,
    every: Annotated[int, typer.Option(help="Steps between snapshots.")] = 10,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the snapshots.")] = "float32",
    max_rows: Annotated[int, typer.Option(help="Rows kept of a larger embedding; 0 for all.")] = 1024,
    moments: Annotated[bool, typer.Option("--moments", help="Record the optimizers' moments too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the distribution that settings are drawn from.")] = 0,
    stack: Annotated[int | None, typer.Option(help="Models trained at once. [default: 8; 64 on a GPU]")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes. [default: one per core; 1 on a GPU]")] = None,
    device: TrainingDeviceOption = None,
) -> None:
    """Train many small models and record how their parameters move, to train nowcasters on.

    The same command again goes on where it was interrupted; with more --runs it adds to them.

    Example: hf-nino record --tasks language-kjv,images --runs 16 --out runs/trajectories
    """
    from ..commands.record import record as record_tasks

    record_tasks(
        tasks,
        out,
        typer.echo,
        every=every,
        dtype=dtype,
        max_rows=max_rows,
        moments=moments,
        runs=runs,
        steps=steps,
        seed=seed,
        stack=stack,
        jobs=jobs,
        device=device,
    )


def meta_train(
    trajectories: Annotated[str, typer.Argument(help="Folder that hf-nino record left.", metavar="TRAJECTORIES")],
    out: Annotated[Path, typer.Option(help="Folder for the nowcaster, checkpoints and the evaluation.")] = Path(
        "runs/nowcaster"
    ),
    initial: Annotated[str | None, typer.Option(help="Nowcaster to begin with: a folder, or an original .pt.")] = None,
    kind: Annotated[
        Literal["nino", "wnn"] | None, typer.Option(help="On the graph, or each parameter alone. [default: nino]")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width of the nowcaster.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Message-passing layers, as the paper counts.")] = None,
    context: Annotated[int | None, typer.Option(help="Snapshots that it reads.")] = None,
    max_horizon: Annotated[int | None, typer.Option(help="Largest horizon, in intervals.")] = None,
    period: Annotated[int | None, typer.Option(help="Steps between nowcasts that it is made for.")] = None,
    horizon_input: Annotated[bool, typer.Option("--horizon-input", help="The horizon as an input.")] = False,
    rate_input: Annotated[bool, typer.Option("--rate-input", help="Learning rates as inputs.")] = False,
    intervals: Annotated[
        str | None, typer.Option(help="Steps between snapshots, such as 25-100. [default: around period / context]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Meta-training steps.")] = 20_000,
    batch_size: Annotated[int, typer.Option(help="Trajectories per step and process.")] = 4,
    slices: Annotated[int, typer.Option(help="Slices of each of them.")] = 4,
    horizons: Annotated[int, typer.Option(help="Horizons of each slice, with either of the inputs.")] = 4,
    target_neighbours: Annotated[
        int, typer.Option(help="Recorded snapshots on each side that targets are averaged with.")
    ] = 0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    held_out_tasks: Annotated[
        str | None, typer.Option(help="Patterns of tasks to keep out, or none. [default: a tenth]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, samples and what is held out.")] = 0,
    report_to: Annotated[str, typer.Option(help="Trackers, comma-separated.")] = "none",
    device: TrainingDeviceOption = None,
) -> None:
    """Train a nowcaster on recorded trajectories, and compare it with its rivals on held-out ones.

    The same command again goes on where it was interrupted.

    Example: hf-nino meta-train runs/trajectories --hidden-size 64 --steps 5000 --out runs/my-nowcaster
    """
    from ..commands.meta_train import train_nowcaster

    train_nowcaster(
        trajectories,
        out,
        typer.echo,
        initial=initial,
        kind=kind,
        hidden_size=hidden_size,
        num_layers=num_layers,
        context=context,
        max_horizon=max_horizon,
        period=period,
        horizon_input=horizon_input,
        rate_input=rate_input,
        intervals=intervals,
        held_out_tasks=held_out_tasks,
        report_to=report_to,
        device=device,
        steps=steps,
        batch_size=batch_size,
        slices=slices,
        horizons=horizons,
        target_neighbours=target_neighbours,
        learning_rate=learning_rate,
        seed=seed,
    )


def remake(
    name: Annotated[str, typer.Argument(help="Of a bundled nowcaster.")],
    out: Annotated[Path | None, typer.Option(help="Folder for all of it. [default: runs/NAME]")] = None,
    trajectories: Annotated[
        Path | None, typer.Option(help="Folder that another remake left, to learn from the same. [default: in --out]")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes that record. [default: one per core; 1 on a GPU]")
    ] = None,
    device: TrainingDeviceOption = None,
) -> None:
    """Make a bundled nowcaster again, as its recipe says: record trajectories, and meta-train on them.

    The same command again goes on where it was interrupted.

    Example: hf-nino remake nino-small --out runs/nino-small
    """
    from ..commands.remake import remake_bundled

    remake_bundled(name, out, typer.echo, trajectories=trajectories, jobs=jobs, device=device)


def ablate(
    name: Annotated[str, typer.Argument(help="Of a bundled nowcaster, whose recipe it is.")],
    trajectories: Annotated[Path, typer.Option(help="Folder of recorded runs, such as `hf-nino remake` leaves.")],
    out: Annotated[Path | None, typer.Option(help="Folder for all of it. [default: runs/ablation-NAME]")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each meta-training. [default: the recipe's]")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    only: Annotated[str | None, typer.Option(help="Some of the parts, comma-separated. [default: all]")] = None,
    device: TrainingDeviceOption = None,
) -> None:
    """What each part of a bundled nowcaster's recipe is worth: meta-train without it, and measure on held-out runs.

    The same command again goes on where it was interrupted.

    Example: hf-nino ablate nino-base --trajectories runs/nino-base/trajectories --steps 500
    """
    from ..commands.remake import ablate_bundled

    ablate_bundled(name, trajectories, out, typer.echo, steps=steps, seeds=seeds, only=only, device=device)


def push(
    nowcaster: Annotated[
        str, typer.Argument(help="A folder, or another name of a nowcaster with weights.", metavar="FOLDER_OR_NAME")
    ],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub.", metavar="ORG/NAME")],
    private: Annotated[bool, typer.Option("--private", help="For nobody else to see.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", "--branch", help="Branch. [default: main]")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    token: Annotated[str | None, typer.Option(help="With the right to write. [default: of hf auth login]")] = None,
    license: Annotated[str | None, typer.Option(help="For the model card, if one is written. [default: mit]")] = None,
    json: JsonOption = False,
) -> None:
    """Push a nowcaster to the Hub: configuration, weights, and a model card, written where there is none.

    It is loaded before: what does not load is not pushed. Prints the commit, which runs can name for good.

    Example: hf-nino push runs/nowcaster me/my-nowcaster --private
    """
    from ..commands.push import push as push_to_hub

    push_to_hub(
        nowcaster,
        repo_id,
        typer.echo,
        as_json=json,
        private=private,
        revision=revision,
        message=message,
        token=token,
        license=license,
    )
