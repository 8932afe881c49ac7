"""Where a nowcaster came from, in a way that names the same one again."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

_REVISION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")


@dataclass(frozen=True)
class NowcasterSource:
    """Where a nowcaster was loaded from.  ``str()`` of it names the same nowcaster again.

    Attributes:
        name: repository, bundled nowcaster or folder.
        revision: branch, tag or commit of the repository that was asked for; ``None``: its default branch.
        commit: the commit that this was; ``None`` for what is not from the Hub.
    """

    name: str
    revision: str | None = None
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and logs."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}" if self.commit else self.name


def split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """``"org/name@v1"`` -> ``("org/name", "v1")``; a name without ``@`` goes with ``revision``.

    Raises:
        ValueError: an impossible revision, or two different ones.
    """
    name, at, named = name.partition("@")
    if at and revision not in (None, named):
        raise ValueError(f"`revision` must be given once, got {named!r} in the name and {revision!r}")
    revision = named if at else revision
    check_revision(revision)
    return name, revision


def check_revision(revision: str | None) -> None:
    """Raise ``ValueError`` unless it can be a branch, a tag or a commit, and nothing that leads out of a folder."""
    if revision is None:
        return
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision:
        raise ValueError(f"`revision` must be a branch, a tag or a commit, such as 'main' or 'v1.0', got {revision!r}")
