"""The ``hf-nino`` command: thin, every command calls one function of the library."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ._version import __version__

app = typer.Typer(
    name="hf-nino",
    help="Nowcasting for Hugging Face training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Arch(str, Enum):
    gpt2 = "gpt2"
    llama = "llama"


class Schedule(str, Enum):
    linear = "linear"
    cosine = "cosine"
    constant_with_warmup = "constant_with_warmup"


@app.command()
def demo(
    arch: Annotated[Arch, typer.Option(help="Which architecture to train.")] = Arch.gpt2,
    nowcaster: Annotated[str, typer.Option(help="Name, folder or repo id of a nowcaster.")] = "linear",
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
    model: Annotated[Path, typer.Argument(help="A folder or a config.json of transformers.", metavar="FOLDER|CONFIG")],
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the graph to this PNG.")] = None,
) -> None:
    """Build the neural graph of a model and say what is in it.

    The model is built from its configuration with random parameters: a graph does not depend on their values.

    Example: hf-nino graph ./my-model --plot graph.png
    """
    import transformers

    from . import NeuralGraph

    if not model.exists():
        raise ValueError(f"FOLDER|CONFIG must be an existing folder or config.json, got {model}")
    config = transformers.AutoConfig.from_pretrained(model)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    built = NeuralGraph.from_model(named(config) if named else transformers.AutoModel.from_config(config))
    typer.echo(repr(built))
    for line in built.report:
        typer.echo(f"  {line}")
    if plot is not None:
        built.plot(plot)
        typer.echo(f"Picture: {plot}")


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
