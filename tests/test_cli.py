"""The hf-nino command: every command does what its help says, and fails in one line."""

import json
import subprocess
import sys

import pytest
import typer
from transformers import GPT2Config
from typer.testing import CliRunner

from hf_nino import __version__, cli, load_nowcaster

COMMANDS = [
    "demo",
    "report",
    "nowcast",
    "merge",
    "push",
    "convert",
    "graph",
    "estimate",
    "record",
    "meta-train",
    "remake",
    "ablate",
    "version",
    "bench",
    "bench report",
    "bench engine",
    "bench scaling",
]


def run(*arguments: str) -> str:
    """What a command that succeeds prints."""
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fail(monkeypatch, capsys, *arguments: str) -> str:
    """What a command that fails as expected prints; its exit code is 1."""
    monkeypatch.setattr(sys, "argv", ["hf-nino", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    return capsys.readouterr().err


def gpt2_folder(path):
    GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    """The help of each command shows how it is called."""
    assert f"Example: hf-nino {command}" in run(*command.split(), "--help")


def test_the_list_of_commands_is_complete():
    """Nothing is tested here that does not exist, and nothing exists that is not tested here."""

    def names(group, before=""):
        for name, command in group.commands.items():
            yield before + name
            yield from names(command, f"{before}{name} ") if hasattr(command, "commands") else ()

    assert sorted(names(typer.main.get_command(cli.app))) == sorted(COMMANDS)


def test_help_does_not_wait_for_torch():
    """Reading the options imports nothing that takes seconds; what commands do, does (the control)."""
    code = "import sys; from hf_nino import cli; print('torch' in sys.modules); "
    code += "import hf_nino.commands.graph; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (("demo", "--arch", "bert"), ("gpt2", "llama")),
        (("record", "--device", "tpu"), ("cpu", "cuda")),
        (("merge", "a", "b", "c", "--out", "d", "--method", "vote"), ("nowcast", "average", "task-arithmetic")),
    ],
)
def test_a_value_that_is_no_choice_is_refused_with_the_choices(arguments, choices):
    """Before anything is done, with the exit code of wrong usage."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 2
    assert all(f"'{choice}'" in result.output for choice in choices)


def test_version_prints_the_version():
    """And nothing else."""
    assert run("version").strip() == __version__


def test_convert_writes_a_folder_that_loads_as_a_nowcaster(shared, tmp_path):
    """A checkpoint of the original release becomes config.json and model.safetensors, which load_nowcaster takes."""
    output = run("convert", str(shared / "upstream" / "nino_mlp_h32.pt"), str(tmp_path / "mlp"))
    assert "5,160 parameters" in output
    assert {path.name for path in (tmp_path / "mlp").iterdir()} >= {"config.json", "model.safetensors"}
    nowcaster = load_nowcaster(tmp_path / "mlp")
    assert sum(p.numel() for p in nowcaster.parameters()) == 5160


def test_graph_summarizes_a_folder_and_draws_it_twice(tmp_path):
    """From a configuration alone: the parameters that the model has (tied ones once), a diagram and a matrix."""
    from transformers import GPT2LMHeadModel

    folder = gpt2_folder(tmp_path / "model")
    parameters = sum(p.numel() for p in GPT2LMHeadModel(GPT2Config.from_pretrained(folder)).parameters())
    output = run("graph", str(folder), "--out", str(tmp_path / "pictures"))
    assert f"{parameters:,} parameters" in output
    for kind in ("diagram", "matrix"):
        picture = tmp_path / "pictures" / f"model-{kind}.png"
        assert f"{kind.capitalize()}: {picture}" in output
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_graph_draws_into_the_current_folder_unless_told_otherwise(tmp_path, monkeypatch):
    """In the format that was asked for; nowhere with --no-plot, nor with --json unless a folder is given."""
    folder = gpt2_folder(tmp_path / "model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run("graph", str(folder), "--no-plot")
    found = json.loads(run("graph", str(folder / "config.json"), "--json", "--meta"))
    assert not list((tmp_path / "here").iterdir())
    assert (found["model"], found["pictures"]) == ("model: GPT2LMHeadModel", {})
    assert sum(group["size"] * group["count"] for group in found["groups"]) == found["nodes"]
    run("graph", str(folder), "--format", "svg")
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"model-diagram.svg", "model-matrix.svg"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("graph", "no-such-folder"), "no-such-folder"),
        (("convert", "no-such-file.pt", "out"), "no-such-file.pt"),
        (("demo", "--steps", "1"), "`steps` must be at least 10"),
        (("demo", "--smoke", "--nowcaster", "no-such-nowcaster"), "no-such-nowcaster"),
        (("demo", "--smoke", "--nowcaster", "linear:no_such_setting=1"), "no_such_setting"),
    ],
)
def test_an_expected_error_is_one_line_that_names_the_cause(monkeypatch, capsys, tmp_path, arguments, reason):
    """Exit code 1, one line, no traceback, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    error = fail(monkeypatch, capsys, *arguments)
    (line,) = [line for line in error.splitlines() if line.startswith("hf-nino: ")]
    assert reason in line
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    """A defect is not dressed up as a user's mistake."""

    def broken(*arguments, **options):
        raise RuntimeError("a defect")

    monkeypatch.setattr("hf_nino.demo.run_demo", broken)
    monkeypatch.setattr(sys, "argv", ["hf-nino", "demo", "--smoke"])
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main()
