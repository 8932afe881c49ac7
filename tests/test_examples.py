"""The examples and the README run as they are written."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hf_nino import cli
from hf_nino.bench.training.report import read_summary
from hf_nino.bench.training.tables import up_to_date

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SMALL = ["--max_steps", "12", "--characters", "60000"]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Standard output and error of a command that succeeds, with warnings of ours as errors."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error:::hf_nino", *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def blocks(language: str) -> list[str]:
    """The README's code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def test_the_trainer_example_trains_nowcasts_and_saves(tmp_path):
    """Two nowcasts in twelve steps with a period of five are in the saved log, and the model is in the folder."""
    options = ["--output_dir", tmp_path, "--nowcast_period", "5", "--warmup_steps", "0"]
    options += ["--lr_scheduler_type", "constant", "--logging_steps", "1"]
    run("examples/train_with_trainer.py", *options, *SMALL)
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if entry.get("nino_accepted") == 1] == [5, 10]
    assert (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] > 0


def test_the_callback_example_trains_nowcasts_and_saves(tmp_path):
    """The same with an ordinary Trainer and a callback."""
    options = ["--output_dir", tmp_path, "--period", "5", "--warmup_steps", "0"]
    run("examples/train_with_callback.py", *options, *SMALL)
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if entry.get("nino_accepted") == 1] == [5, 10]
    assert (tmp_path / "model.safetensors").exists()


def test_the_accelerate_example_trains_and_saves(tmp_path):
    """The loop of one's own nowcasts at step 5; at step 10 the learning rate that is left allows none."""
    options = ["--output_dir", tmp_path, "--period", "5", "--warmup_steps", "0"]
    output = run("examples/train_with_accelerate.py", *options, *SMALL)
    assert re.search(r"step 12: evaluation loss \d+\.\d+, 1 nowcasts so far", output)
    assert (tmp_path / "model.safetensors").exists()


def test_every_example_is_tested_here():
    """A new example comes with a test."""
    source = Path(__file__).read_text("utf-8")
    examples = [path.name for path in (ROOT / "examples").glob("*.py")]
    assert examples and all(f"examples/{name}" in source for name in examples)


def test_the_readmes_python_runs(tmp_path):
    """All Python blocks, one after the other, as a reader would type them."""
    code = blocks("python")
    assert len(code) >= 3
    (tmp_path / "readme.py").write_text("\n".join(code))
    run("readme.py", cwd=tmp_path)


@pytest.mark.parametrize("command", [line for block in blocks("bash") for line in block.splitlines() if line.strip()])
def test_the_readmes_shell_commands_exist(command):
    """Targets are in the Makefile, sub-commands and options in hf-nino, scripts in the tree."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.M)
        arguments = [word.removeprefix("ARGS=") for word in words[2:]]
        assert options(["demo"]) >= {word for word in " ".join(arguments).split() if word.startswith("--")}
    elif words[0] == "hf-nino":
        assert options(words[1:]) >= {word for word in words if word.startswith("--")}
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in {"git", "cd", "pip"}


def options(words: list[str]) -> set[str]:
    """The options of the command of hf-nino that a command line begins with: ``graph``, or ``bench report``."""
    command = typer.main.get_command(cli.app)
    depth = 0
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command, depth = command.commands[word], depth + 1
    assert depth, f"hf-nino has no command {words[0]}"
    return {"--help"} | {option for parameter in command.params for option in parameter.opts}


def test_the_readmes_table_of_methods_is_the_benchmarks():
    """It is what the benchmark's numbers, which are in the tree, make; with another number it would not be."""
    summary = read_summary(ROOT / "docs" / "benchmark" / "summary.json")
    assert up_to_date(README, summary)
    first = re.search(r"\d+% \(", README[README.index("<!-- bench:begin -->") :])[0]
    assert not up_to_date(README.replace(first, "99% (", 1), summary)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?://|#)([^)]+)\)", README))))
def test_the_readmes_links_lead_somewhere(target):
    """Pictures and files that the README points to are in the tree."""
    assert (ROOT / target).exists()
