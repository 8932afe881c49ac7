"""`make wheel`: what it says of wheels and sdists that lack something, or hold too much."""

import io
import runpy
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ["LICENSE", "README.md", "pyproject.toml", "setup.cfg"]


@pytest.fixture(scope="module")
def check():
    return runpy.run_path(str(ROOT / ".ci" / "wheel.py"))["check_content"]


@pytest.fixture(scope="module")
def package() -> list[str]:
    """The files of the package in the tree."""
    files = [path for path in (ROOT / "hf_nino").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [path.relative_to(ROOT).as_posix() for path in files]


def archives(folder: Path, in_wheel: list[str], in_sdist: list[str]) -> tuple[Path, Path]:
    """A wheel and an sdist with these names in them."""
    wheel, sdist = folder / "hf_nino.whl", folder / "hf_nino.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*in_wheel, "hf_nino-0.1.0.dist-info/METADATA"]:
            archive.writestr(name, "")
    with tarfile.open(sdist, "w:gz") as archive:
        for name in in_sdist:
            archive.addfile(tarfile.TarInfo(f"hf_nino-0.1.0/{name}"), io.BytesIO())
    return wheel, sdist


def test_archives_with_the_whole_package_pass(check, package, tmp_path, capsys):
    """And the data files among it are listed."""
    check(*archives(tmp_path, package, [*package, *TOP]))
    assert "hf_nino/py.typed" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["hf_nino/py.typed", "hf_nino/bench/training/methods/l2o.json"])
def test_a_data_file_that_setup_cfg_forgets_is_named(check, package, tmp_path, lost):
    """In the wheel, which would work in the checkout and nowhere else, and in the sdist."""
    rest = [name for name in package if name != lost]
    with pytest.raises(SystemExit, match=rf"missing from the wheel .*: {lost}$"):
        check(*archives(tmp_path, rest, [*package, *TOP]))
    with pytest.raises(SystemExit, match=f"missing from the sdist: {lost}$"):
        check(*archives(tmp_path, package, [*rest, *TOP]))


def test_what_does_not_belong_there_is_named(check, package, tmp_path):
    """A file that is no longer in the tree, from an old build; tests, of which setuptools would take some."""
    with pytest.raises(SystemExit, match=r"not in the package: hf_nino/gone\.py$"):
        check(*archives(tmp_path, [*package, "hf_nino/gone.py"], [*package, *TOP]))
    with pytest.raises(SystemExit, match=r"tests in the sdist: tests/test_cli\.py$"):
        check(*archives(tmp_path, package, [*package, *TOP, "tests/test_cli.py"]))
