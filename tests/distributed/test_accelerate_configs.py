"""The configurations for accelerate launch are what their names say, are shipped, and are launched as documented."""

import fnmatch
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from torch.distributed.run import get_args_parser

from hf_nino.accelerate_configs import config_file, config_names

ROOT = Path(__file__).parents[2]
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def documented():
    """The launch lines of docs/recipes.md, in words, with the path in place of the command that prints it."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "recipes.md").read_text("utf-8"), re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line.startswith(("accelerate launch", "torchrun"))]

    def path(match):
        return str(config_file(match[1]))

    return [shlex.split(re.sub(r"\$\(python -m hf_nino\.accelerate_configs (\w+)\)", path, line)) for line in lines]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_accelerate_reads_a_configuration(name):
    """accelerate's own loader takes the file, as the kind of training that it is named after."""
    config = load_config_from_file(str(config_file(name)))
    assert config.distributed_type == KINDS[name]
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (8, 1, "bf16")
    assert config.fsdp_config.get("fsdp_version") == (2 if name == "fsdp2" else None)
    assert config.deepspeed_config.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(name)


def test_accelerate_refuses_what_is_no_configuration(tmp_path):
    """The control: the loader does not take a file with a key that it does not know."""
    content = yaml.safe_load(config_file("ddp").read_text("utf-8"))
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(content | {"num_bananas": 3}))
    with pytest.raises(ValueError, match="num_bananas"):
        load_config_from_file(str(tmp_path / "odd.yaml"))


def test_the_names_are_those_of_the_files_and_all_are_shipped():
    """Every file has a name to ask for, and is package data."""
    assert set(config_names()) == set(KINDS)
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["hf_nino"].split()
    for name in config_names():
        file = config_file(name).relative_to(ROOT / "hf_nino").as_posix()
        assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def test_python_says_where_a_configuration_is():
    """``python -m hf_nino.accelerate_configs NAME`` writes the path and nothing else; an unknown name fails."""
    command = [sys.executable, "-m", "hf_nino.accelerate_configs"]
    done = subprocess.run([*command, "fsdp2"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{config_file('fsdp2')}\n", "")
    done = subprocess.run([*command, "fsdp3"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert "must be one of ddp, fsdp2, zero2, zero3, got 'fsdp3'" in done.stderr


def test_an_unknown_configuration_is_an_error():
    """Named, with what there is."""
    with pytest.raises(ValueError, match="must be one of ddp, fsdp2, zero2, zero3, got 'tpu'"):
        config_file("tpu")


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_the_documented_launch_lines_start_several_processes(words):
    """accelerate and torchrun read them, and would start more than one process, in the way that the file says."""
    if words[0] == "torchrun":
        assert int(get_args_parser().parse_args(words[1:]).nproc_per_node) > 1
        return
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert args.num_processes > 1
    started = {"MULTI_GPU": args.multi_gpu, "FSDP": args.use_fsdp, "DEEPSPEED": args.use_deepspeed}
    assert [kind for kind, chosen in started.items() if chosen] == [defaults.distributed_type.name]


def test_the_documentation_has_launch_lines():
    """Both launchers, and all kinds but one of ZeRO's."""
    text = " ".join(word for words in documented() for word in words)
    assert "torchrun" in text and all(f"{name}.yaml" in text for name in ("ddp", "fsdp2", "zero3"))
