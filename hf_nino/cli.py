"""The ``hf-nino`` command: thin, every command calls one function of the library."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ._version import __version__
from .defaults import NOWCASTER

app = typer.Typer(
    name="hf-nino",
    help="Nowcasting for Hugging Face training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")


class Arch(str, Enum):
    gpt2 = "gpt2"
    llama = "llama"


class Schedule(str, Enum):
    linear = "linear"
    cosine = "cosine"
    constant_with_warmup = "constant_with_warmup"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class Preset(str, Enum):
    smoke = "smoke"
    paper = "paper"
    tuned = "tuned"
    full = "full"


class Kind(str, Enum):
    nino = "nino"
    wnn = "wnn"


class RecordedDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class MergeMethod(str, Enum):
    nowcast = "nowcast"
    average = "average"
    task_arithmetic = "task-arithmetic"


class PictureFormat(str, Enum):
    png = "png"
    svg = "svg"
    pdf = "pdf"


@app.command()
def demo(
    arch: Annotated[Arch, typer.Option(help="Which architecture to train.")] = Arch.gpt2,
    nowcaster: Annotated[str, typer.Option(help="Name, folder or repo id of a nowcaster.")] = NOWCASTER,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each of the two runs.")] = 4000,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. [default: runs/demo-ARCH]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the parameters and of the data order.")] = 0,
    period: Annotated[int | None, typer.Option(help="Steps between nowcasts. [default: the nowcaster's own]")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    lr_scheduler: Annotated[Schedule, typer.Option(help="Schedule after the warm-up.")] = Schedule.linear,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny version, to see that everything works.")] = False,
) -> None:
    """Train a small language model with and without nowcasts, and compare.

    The same command again resumes what was interrupted.

    Example: hf-nino demo --arch llama --nowcaster momentum --out runs/momentum
    """
    from .demo import DemoSettings, run_demo

    settings = DemoSettings(
        arch=arch.value,
        nowcaster=nowcaster,
        steps=steps,
        seed=seed,
        period=period,
        learning_rate=learning_rate,
        lr_scheduler=lr_scheduler.value,
    )
    out = out or Path("runs") / f"demo-{arch.value}"
    run_demo(settings.smoke() if smoke else settings, out, typer.echo)
    typer.echo(f"Report: {out / 'report.md'}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt file of the original release.", metavar="FILE.pt")],
    folder: Annotated[Path, typer.Argument(help="Where to write config.json and model.safetensors.")],
) -> None:
    """Convert a checkpoint of the original NiNo release into a folder that every nowcaster option takes.

    Example: hf-nino convert nino_no_posw.pt nino-no-posw && hf-nino demo --nowcaster ./nino-no-posw
    """
    from . import convert_original

    model = convert_original(checkpoint)
    model.save_pretrained(folder)
    typer.echo(f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters -> {folder}")


@app.command()
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
    format: Annotated[PictureFormat, typer.Option(help="Format of the pictures.")] = PictureFormat.png,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Whether to draw the pictures.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    meta: Annotated[bool, typer.Option("--meta", help="Never make weights, however small the model is.")] = False,
) -> None:
    """Build the neural graph of a model, say what is in it, and draw it twice: as a diagram and as a matrix.

    The configuration is enough: a graph does not depend on weights, so none are loaded or downloaded.

    Example: hf-nino graph llama --out pictures
    """
    from .commands.graph import show_graph

    folder = out or (None if json else Path())
    show_graph(
        model,
        folder if plot else None,
        typer.echo,
        picture_format=format.value,
        as_json=json,
        meta=meta,
    )


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="A folder, config.json, model type or repo id.", metavar="MODEL")],
    nowcaster: Annotated[str, typer.Option(help="Name, folder or repo id of a nowcaster.")] = NOWCASTER,
    period: Annotated[int | None, typer.Option(help="Steps between nowcasts. [default: the nowcaster's own]")] = None,
    history_device: Annotated[str, typer.Option(help="Where snapshots live: cpu, model or disk:PATH.")] = "cpu",
    history_dtype: Annotated[str, typer.Option(help="Dtype of snapshots.")] = "float32",
    batch_tokens: Annotated[int, typer.Option(help="Tokens of an optimizer step, to guess its length.")] = 32768,
    step_seconds: Annotated[float | None, typer.Option(help="Length of an optimizer step, if you know it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what nowcasts would cost a model on this machine: memory of snapshots, seconds, share of training time.

    The model is built from its configuration, without weights; a nowcast is timed on a small matrix.

    Example: hf-nino estimate ./my-model --period 1000
    """
    from .commands.estimate import as_json, as_table, estimate_model

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


@app.command()
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
    dtype: Annotated[RecordedDtype, typer.Option(help="Of the snapshots.")] = RecordedDtype.float32,
    max_rows: Annotated[int, typer.Option(help="Rows kept of a larger embedding; 0 for all.")] = 1024,
    moments: Annotated[bool, typer.Option("--moments", help="Record the optimizers' moments too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the distribution that settings are drawn from.")] = 0,
    stack: Annotated[int | None, typer.Option(help="Models trained at once. [default: 8; 64 on a GPU]")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes. [default: one per core; 1 on a GPU]")] = None,
    device: Annotated[Device | None, typer.Option(help="Where to train. [default: cuda where there is one]")] = None,
) -> None:
    """Train many small models and record how their parameters move, to train nowcasters on.

    The same command again goes on where it was interrupted; with more --runs it adds to them.

    Example: hf-nino record --tasks language-kjv,images --runs 16 --out runs/trajectories
    """
    from .commands.record import record as record_tasks

    record_tasks(
        tasks,
        out,
        typer.echo,
        every=every,
        dtype=dtype.value,
        max_rows=max_rows,
        moments=moments,
        runs=runs,
        steps=steps,
        seed=seed,
        stack=stack,
        jobs=jobs,
        device=device.value if device else None,
    )


@app.command()
def meta_train(
    trajectories: Annotated[str, typer.Argument(help="Folder that hf-nino record left.", metavar="TRAJECTORIES")],
    out: Annotated[Path, typer.Option(help="Folder for the nowcaster, checkpoints and the evaluation.")] = Path(
        "runs/nowcaster"
    ),
    initial: Annotated[str | None, typer.Option(help="Nowcaster to begin with: a folder, or an original .pt.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="On the graph, or each parameter alone. [default: nino]")] = None,
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
    device: Annotated[Device | None, typer.Option(help="Where to train. [default: cuda where there is one]")] = None,
) -> None:
    """Train a nowcaster on recorded trajectories, and compare it with its rivals on held-out ones.

    The same command again goes on where it was interrupted.

    Example: hf-nino meta-train runs/trajectories --hidden-size 64 --steps 5000 --out runs/my-nowcaster
    """
    from .commands.meta_train import train_nowcaster

    train_nowcaster(
        trajectories,
        out,
        typer.echo,
        initial=initial,
        kind=kind.value if kind else None,
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
        device=device.value if device else None,
        steps=steps,
        batch_size=batch_size,
        slices=slices,
        horizons=horizons,
        target_neighbours=target_neighbours,
        learning_rate=learning_rate,
        seed=seed,
    )


@bench_app.callback()
def bench(
    context: typer.Context,
    preset: Annotated[Preset, typer.Option(help="Which tasks, methods and protocols.")] = Preset.smoke,
    tasks: Annotated[str | None, typer.Option(help="Others than the preset's, comma-separated.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Others than the preset's, such as adamw,linear,nino:PATH,muon+nino:PATH.")
    ] = None,
    protocols: Annotated[str | None, typer.Option(help="Some of paper,fixed,tuned,robust.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Of the runs that count. [default: 0,1,2; smoke: 0]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of a run. [default: the task's]")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at once. [default: one per core; 4 on a GPU]")] = None,
    device: Annotated[Device | None, typer.Option(help="Where to train. [default: cuda where there is one]")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/bench"),
) -> None:
    """Compare nowcasting with its rivals: tasks x methods x protocols x seeds, one JSON a run, then a report.

    The same command again goes on where it was interrupted, and presets share runs in one folder.

    Example: hf-nino bench --preset tuned --tasks gpt2-64-kjv --methods linear,momentum,muon
    """
    if context.invoked_subcommand is not None:
        return
    from .commands.bench import bench_training

    bench_training(
        preset.value,
        out,
        typer.echo,
        tasks=tasks,
        methods=methods,
        protocols=protocols,
        seeds=seeds,
        steps=steps,
        jobs=jobs,
        device=device.value if device else None,
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
    from .commands.bench import report_training

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
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what a nowcast costs on this machine, against parameters: seconds, memory, how close to the floors.

    Every measurement runs in a process of its own; the same command again goes on where it was interrupted.

    Example: hf-nino bench engine --threads 1 --original ./nino
    """
    from .commands.bench import bench_engine, count

    bench_engine(
        out,
        typer.echo,
        as_json=json,
        device=device.value if device else None,
        threads=threads,
        repeats=repeats,
        max_parameters=count(max_parameters),
        nowcaster=nowcaster,
        original=original,
    )


@app.command("report")
def run_report(
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
    from .commands.report import report_run

    report_run(run, typer.echo, out=out, as_json=json)


@app.command()
def nowcast(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="A run's folder, or its checkpoints, oldest first.", metavar="RUN_OR_CHECKPOINTS"),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new checkpoint.")],
    nowcaster: Annotated[str, typer.Option(help="Name, folder or repo id of a nowcaster.")] = "linear",
    horizon: Annotated[
        int | None, typer.Option(help="Intervals ahead; one is the spacing of the checkpoints. [default: one period]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, config.json, model type or repo id. [default: the last checkpoint's]")
    ] = None,
    device: Annotated[
        Device | None, typer.Option(help="Where a nowcaster with weights computes. [default: cpu]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict a checkpoint from the last ones of a run; training resumes from it.

    Folders of Trainer and of accelerate, sharded or not, and files (.safetensors, .pt, .bin) will do. Of a run's
    folder the newest equally spaced checkpoints are taken. Nothing is written if the nowcast is implausible.

    Example: hf-nino nowcast runs/trainer --nowcaster linear --horizon 3 --out runs/nowcast
    """
    from .commands.nowcast import nowcast as nowcast_run

    nowcast_run(
        checkpoints,
        out,
        typer.echo,
        nowcaster=nowcaster,
        horizon=horizon,
        model=model,
        device=device.value if device else None,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Checkpoint that the others were fine-tuned from.", metavar="BASE")],
    fine_tuned: Annotated[list[str], typer.Argument(help="Two or more of them.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    nowcaster: Annotated[str | None, typer.Option(help="Name, folder or repo id, for the method nowcast.")] = None,
    method: Annotated[MergeMethod, typer.Option(help="How.")] = MergeMethod.nowcast,
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
    device: Annotated[
        Device | None, typer.Option(help="Where a nowcaster with weights computes. [default: cpu]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge models that were fine-tuned from one base: with a nowcaster, by averaging, or by task arithmetic.

    A nowcaster takes base and models for a trajectory. Published results beat averaging in some cases only: compare.

    Example: hf-nino merge base math code --nowcaster ./nino-no-posw --out merged
    """
    from .commands.merge import merge as merge_checkpoints

    merge_checkpoints(
        base,
        fine_tuned,
        out,
        typer.echo,
        nowcaster=nowcaster,
        method=method.value,
        scale=scale,
        horizons=horizons,
        order=order,
        rotate=rotate,
        keep=keep or (),
        model=model,
        device=device.value if device else None,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
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
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Push a nowcaster to the Hub: configuration, weights, and a model card, written where there is none.

    It is loaded before: what does not load is not pushed. Prints the commit, which runs can name for good.

    Example: hf-nino push runs/nowcaster me/my-nowcaster --private
    """
    from .commands.push import push as push_to_hub

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


@app.command()
def version() -> None:
    """Print the version.

    Example: hf-nino version
    """
    typer.echo(__version__)


def main() -> None:
    """Entry point: an expected error ends with one line and exit code 1, anything else with its traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"hf-nino: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
