"""The ``hf-nino`` command: thin, every command calls one function of the library.

Commands are declared in the modules beside, by what they are given: a model, a run, something to make a nowcaster of.
The order here is the order in ``hf-nino --help``.
"""

from __future__ import annotations

import sys

import typer

from .._version import __version__
from .benchmark import bench_app
from .models import estimate, graph, merge
from .nowcasters import ablate, convert, meta_train, push, record, remake
from .runs import demo, nowcast, report

__all__ = ["app", "main"]

app = typer.Typer(
    name="hf-nino",
    help="Nowcasting for Hugging Face training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def version() -> None:
    """Print the version.

    Example: hf-nino version
    """
    typer.echo(__version__)


for command in (
    demo,
    convert,
    graph,
    estimate,
    record,
    meta_train,
    remake,
    ablate,
    report,
    nowcast,
    merge,
    push,
    version,
):
    app.command()(command)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point: an expected error ends with one line and exit code 1, anything else with its traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"hf-nino: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
