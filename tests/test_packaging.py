"""The package as others see it: its metadata, what importing it costs, what a wheel holds."""

import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hf_nino

ROOT = Path(__file__).parents[1]

if sys.version_info >= (3, 11):
    import tomllib


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def lines(text: str) -> list[str]:
    """The lines that are neither empty nor comments nor references to another extra."""
    return [line for line in map(str.strip, text.splitlines()) if line and line[0] not in "#%"]


def requirements(config: configparser.ConfigParser) -> dict[str, Requirement]:
    """What setup.cfg requires, its extras included, by name."""
    extras = config["options.extras_require"]
    texts = [config["options"]["install_requires"], *(extras.get(name, raw=True) for name in extras)]
    found = [Requirement(line) for text in texts for line in lines(text)]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def pins(name: str) -> dict[str, str]:
    """``{package: version}`` of a constraints file."""
    text = (ROOT / "constraints" / name).read_text("utf-8")
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines(text)}


def test_importing_the_package_does_not_import_torch():
    """Both the package and its version module cost nothing; a name that needs torch imports it (the control)."""
    code = "import sys, hf_nino, hf_nino._version; print('torch' in sys.modules); hf_nino.NeuralGraph; "
    code += "print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("name", hf_nino.__all__)
def test_every_exported_name_exists(name):
    """``__all__`` promises nothing that is not there, and ``dir()`` shows it."""
    assert getattr(hf_nino, name) is not None
    assert name in dir(hf_nino)


def test_an_unknown_name_is_an_attribute_error():
    """Lazy exports fail as eager ones do."""
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = hf_nino.no_such_name


def test_the_lowest_promised_versions_are_the_ones_that_are_tested(setup_cfg):
    """Every lower end in setup.cfg is a pin in constraints/lowest.txt, but for torch, as that file explains."""
    lowest = pins("lowest.txt")
    for name, requirement in requirements(setup_cfg).items():
        floors = [Version(spec.version) for spec in requirement.specifier if spec.operator == ">="]
        if name == "torch":
            assert requirement.specifier.contains(lowest[name])
        elif floors and name != "deepspeed":
            assert [Version(lowest[name])] == floors, name


def test_the_pins_of_continuous_integration_are_within_the_promised_ranges(setup_cfg):
    """No pin contradicts setup.cfg, and torch is pinned, or pip would take a build with CUDA."""
    required = requirements(setup_cfg)
    for name, version in pins("ci.txt").items():
        if name in required:
            assert required[name].specifier.contains(version), name
    assert pins("ci.txt")["torch"] == pins("lowest.txt")["torch"] == "2.13.0"


def test_warnings_are_errors_and_are_ignored_by_name_only(setup_cfg):
    """The first filter makes every warning an error; an exception names a message or a third party's module."""
    filters = lines(setup_cfg["tool:pytest"]["filterwarnings"])
    assert filters[0] == "error"
    for line in filters[1:]:
        action, message, _, module, *_ = [*line.split(":"), "", "", ""]
        assert action == "ignore" and (message or module) and "hf_nino" not in line, line


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is part of Python from 3.11 on")
def test_pyproject_holds_only_the_build_backend_and_ruff():
    """Metadata lives in setup.cfg; a [project] table would make setuptools ignore it."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert set(content) == {"build-system", "tool"}
    assert set(content["tool"]) == {"ruff"}


def test_the_citation_names_this_version_and_the_paper():
    """CITATION.cff is YAML with this version and the arXiv number of the method."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == hf_nino.__version__
    paper = citation["preferred-citation"]
    assert paper["title"] == "Accelerating Training with Neuron Interaction and Nowcasting Networks"
    assert "2409.04434" in paper["url"]
    assert len(paper["authors"]) == 5


def test_the_changelog_has_an_entry_for_this_version():
    """No release without a word about it."""
    assert f"## {hf_nino.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path):
    """All modules and py.typed are in it, tests and examples are not, and the command is declared."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_nino", source / "hf_nino", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("hf_nino-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "hf-nino = hf_nino.cli:main" in archive.read(entry_points).decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_nino").rglob("*.py")}
    assert modules | {"hf_nino/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hf_nino"}


def test_every_import_is_of_a_declared_requirement(setup_cfg):
    """Whatever hf_nino imports is Python's own, or in install_requires or in an extra of setup.cfg."""
    declared = {name.replace("-", "_") for name in requirements(setup_cfg)}
    modules = {"yaml": "pyyaml"}
    imported = set()
    for path in (ROOT / "hf_nino").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    theirs = {modules.get(name, name) for name in imported - set(sys.stdlib_module_names)}
    assert "torch" in theirs
    assert theirs <= declared
