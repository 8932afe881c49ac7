"""What a user of a release gets: builds it, looks inside, installs it elsewhere, and runs the demo from there.

    python .ci/wheel.py [DIST]

leaves an sdist and the wheel that was built from it in DIST (``dist``).  Needs only Python: it makes an environment to
build in and an empty one to install into, both temporary.  Packages come from pip's cache where that has them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A build sees the tree without what earlier builds left, which would hide that a file is missing from setup.cfg.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", ".cache", "*.egg-info", "__pycache__", "build", "dist", "runs", "docs"
)


def main(dist: Path) -> None:
    dist.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hf_nino-wheel-") as temporary:
        folder = Path(temporary)
        wheel, sdist = timed("build", lambda: build(folder))
        check_content(wheel, sdist)
        for old in dist.glob("hf_nino-*"):
            old.unlink()
        wheel, _ = (Path(shutil.copy(path, dist)).resolve() for path in (wheel, sdist))
        python = timed("install", lambda: install(wheel, folder / "user"))
        timed("demo", lambda: try_out(python, folder / "away"))
    print(f"Wheel: {wheel}")


def timed(what: str, do: Callable):
    """What ``do`` returns; says how long it took."""
    start = time.perf_counter()
    found = do()
    print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def environment(folder: Path) -> Path:
    """The interpreter of a new, empty virtual environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str | Path) -> None:
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *arguments], check=True, cwd=python.parent)


def build(folder: Path) -> tuple[Path, Path]:
    """(wheel, sdist), the wheel built from the sdist, as for a release."""
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    python = environment(folder / "builder")
    pip(python, "install", "--quiet", "build>=1.2")
    out = folder / "dist"
    command = [python, "-m", "build", "--outdir", out, folder / "source"]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def check_content(wheel: Path, sdist: Path) -> None:
    """Every file of the package is in both: modules, JSON, weights, configurations, py.typed; the wheel has no more.

    Raises:
        SystemExit: a file is missing, or does not belong there.
    """
    files = (path for path in (ROOT / "hf_nino").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    package = {path.relative_to(ROOT).as_posix() for path in files}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    of_wheel = {name for name in in_wheel if ".dist-info/" not in name}
    wanted = package | {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"}
    problems = {
        "missing from the wheel (see [options.package_data] of setup.cfg)": package - in_wheel,
        "missing from the sdist": wanted - in_sdist,
        "in the wheel, but not in the package": of_wheel - package,
        "tests in the sdist": {name for name in in_sdist if name.startswith("tests/")},
    }
    for what, names in problems.items():
        if names:
            raise SystemExit(f"{what}: {', '.join(sorted(names))}")
    data = sorted(name for name in package if not name.endswith(".py"))
    print(f"content: {len(package)} files in wheel and sdist, of which data: {', '.join(data)}", flush=True)


def install(wheel: Path, folder: Path) -> Path:
    """The interpreter of an empty environment that got the wheel and what its extra ``demo`` asks for."""
    python = environment(folder)
    pip(python, "install", "--quiet", "-c", ROOT / "constraints" / "ci.txt", f"{wheel}[demo]")
    pip(python, "check")
    return python


def try_out(python: Path, away: Path) -> None:
    """Run the demo in a folder that has nothing to do with the checkout.

    Raises:
        SystemExit: it is not the wheel that runs, or the demo left no report.
    """
    away.mkdir()
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    alone |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(away / "home")}
    where = [python, "-c", "import hf_nino; print(hf_nino.__file__)"]
    found = subprocess.run(where, check=True, cwd=away, env=alone, capture_output=True, text=True).stdout.strip()
    if not Path(found).is_relative_to(python.parents[1]):
        raise SystemExit(f"the wheel must be what runs, but hf_nino is {found}")
    command = [python.with_name("hf-nino"), "demo", "--smoke", "--out", "out"]
    done = subprocess.run(command, cwd=away, env=alone, capture_output=True, text=True)
    if done.returncode or not (away / "out" / "report.md").is_file():
        raise SystemExit(f"hf-nino demo --smoke failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"))
