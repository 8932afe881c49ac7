"""One script, unchanged, under python, torchrun and accelerate launch with the configurations that ship; on CPUs."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import torch

from hf_nino.accelerate_configs import config_file

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]
# A global batch of 8 examples; nowcasts at steps 5 and 10.
COMMON = ["--nowcaster", "linear", "--nowcast_period", "5", "--max_steps", "12", "--characters", "60000"]
COMMON += ["--warmup_steps", "0", "--lr_scheduler_type", "constant"]
LOOP = [*COMMON, "--eval_steps", "12", "--gradient_accumulation_steps", "1"]
TRAINER = [*COMMON, "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "6"]
# accelerate shards on accelerators only; the processes are told that this is one, the script is not.
PRETENCE = """from accelerate.state import DistributedType, PartialState

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
"""
SHARDED = {"ddp": False, "fsdp2": True, "zero2": True, "zero3": True}
deepspeed = [pytest.mark.deepspeed, pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")]


class Found(NamedTuple):
    """What a run said and left."""

    processes: int
    nowcasts: int
    loss: float
    files: frozenset[str]


def launched(command: list[str], folder: str, **environment: str) -> str:
    """Standard output of a command that succeeds."""
    (Path(folder) / "site").mkdir()
    if environment.pop("pretence", ""):
        (Path(folder) / "site" / "sitecustomize.py").write_text(PRETENCE)
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
    paths = os.pathsep.join([f"{folder}/site", str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launcher(kind: str) -> list[str]:
    """The words before the script."""
    if kind == "python":
        return []
    if kind == "torchrun":
        return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    return ["-m", "accelerate.commands.launch", "--config_file", str(config_file(kind)), *options]


@cache
def loop(kind: str) -> Found:
    """examples/pretrain_accelerate.py."""
    with TemporaryDirectory() as folder:
        batch = ["--batch_size", "8" if kind == "python" else "4"]
        words = ["examples/pretrain_accelerate.py", "--output_dir", f"{folder}/out", *LOOP, *batch]
        if not SHARDED.get(kind):
            words.append("--use_cpu")
        special = {"pretence": "yes"} if SHARDED.get(kind) else {}
        if kind.startswith("zero"):
            special["DS_ACCELERATOR"] = "cpu"
        output = launched([*launcher(kind), *words], folder, **special)
        processes = int(re.search(r"number of processes: (\d+)", output)[1])
        loss, nowcasts = re.search(r"step 12: evaluation loss (\S+), (\d+) nowcasts", output).groups()
        return Found(processes, int(nowcasts), float(loss), frozenset(os.listdir(f"{folder}/out")))


@cache
def trainer(kind: str) -> Found:
    """examples/run_clm.py; each rank's part of the history is in the checkpoint, which says how many there were."""
    with TemporaryDirectory() as folder:
        batch = ["--per_device_train_batch_size", "8" if kind == "python" else "4"]
        words = ["examples/run_clm.py", "--output_dir", f"{folder}/out", *TRAINER, *batch]
        if kind != "fsdp2":
            words.append("--use_cpu")
        special = {"pretence": "yes"} if kind == "fsdp2" else {}
        if kind.startswith("zero"):
            special["DS_ACCELERATOR"] = "cpu"
        launched([*launcher(kind), *words], folder, **special)
        files = frozenset(os.listdir(f"{folder}/out/checkpoint-6"))
        processes = sum(name.startswith("nino_history") for name in files)
        log = json.loads(Path(folder, "out", "trainer_state.json").read_text())["log_history"]
        nowcasts = sum(entry.get("nino_accepted", 0) for entry in log)
        loss = json.loads(Path(folder, "out", "eval_results.json").read_text())["eval_loss"]
        return Found(processes, int(nowcasts), loss, files)


KINDS = ["torchrun", "ddp", "fsdp2", pytest.param("zero2", marks=deepspeed)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_ones_own_is_the_same_under_every_launcher(kind):
    """Two processes, two nowcasts, and the loss of plain DDP to 1e-3, however the script was started; and the model is
    in the folder, whole."""
    found = loop(kind)
    assert found.processes == 2
    assert found.nowcasts == 2
    assert found.loss == pytest.approx(loop("torchrun").loss, abs=1e-3)
    assert "model.safetensors" in found.files


def test_one_process_trains_the_same_script():
    """Plain python: one process (which the count can tell from two), as many nowcasts, a loss close by."""
    found = loop("python")
    assert (found.processes, found.nowcasts) == (1, 2)
    assert found.loss == pytest.approx(loop("torchrun").loss, abs=0.1)
    assert trainer("python").processes == 1 and trainer("python").nowcasts == 2


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("zero3", marks=deepspeed)])
def test_a_trainer_is_the_same_under_every_launcher(kind):
    """The same with NiNoTrainer, and each of the two ranks has written its history; the backend is the one that was
    asked for, by what it leaves in a checkpoint.  ZeRO-3 draws other initial weights, hence ends near by only."""
    found = trainer(kind)
    assert found.processes == 2
    assert found.nowcasts == 2
    assert found.loss == pytest.approx(trainer("torchrun").loss, abs=0.1 if kind == "zero3" else 1e-3)
    left = {"fsdp2": {"pytorch_model_fsdp.bin"}, "zero2": {"global_step6"}, "zero3": {"global_step6"}}
    assert set().union(*left.values()) & found.files == left.get(kind, set())


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path):
    """torchrun without ``--use_cpu`` where there is no accelerator: an error that says so, not two runs apart."""
    if torch.accelerator.is_available():
        pytest.skip("accelerate finds the other processes here without being told")
    words = ["examples/pretrain_accelerate.py", "--output_dir", str(tmp_path / "out"), *LOOP]
    with pytest.raises(AssertionError, match="without a GPU, pass --use_cpu"):
        launched([*launcher("torchrun"), *words], str(tmp_path))
