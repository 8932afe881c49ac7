"""``hf-nino push``: a nowcaster goes to the Hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .._version import __version__
from ..nowcaster.auto import load_nowcaster
from ..nowcaster.hub import CONFIG_NAME, WEIGHTS_NAME, HubNowcaster
from ..nowcaster.hub_errors import hub_error
from ..nowcaster.source import check_revision

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What was pushed.

    Attributes:
        repo_id: the repository.
        revision: the branch.
        commit: the whole hash of the commit; the last one, where nothing had changed.
        url: its page.
        files: names of the files.
    """

    repo_id: str
    revision: str
    commit: str
    url: str
    files: list[str]


def push_nowcaster(
    nowcaster: str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    license: str | None = None,
) -> Pushed:
    """Push a nowcaster to the Hub, after having loaded it: what does not load is not pushed.

    The repository and the branch are created if need be.  A model card is written where neither the folder nor the
    branch has one.  Nothing else in the folder is pushed.

    Args:
        nowcaster: a folder, or whatever else names a nowcaster with weights.
        repo_id: ``"org/name"``.
        private: of the repository.
        revision: the branch; default ``"main"``.
        message: of the commit.
        token: with the right to write; default: that of ``hf auth login``.
        license: for the model card, if one is written; default mit.

    Raises:
        FileNotFoundError: no such nowcaster.
        ValueError: one without weights or that is malformed; an impossible ``repo_id`` or ``revision``; or
            ``private`` for a repository that is public already.
        OSError: the Hub could not be reached or refused (``PermissionError``).
    """
    check_revision(revision)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"the repository must be of the form 'org/name', got {repo_id!r}: {error}") from error
    model = load_nowcaster(nowcaster)
    if not isinstance(model, HubNowcaster):
        raise ValueError(
            f"there is nothing to push: {nowcaster!r} is a rule without weights, which every run can name as it is"
        )
    branch = revision or "main"
    where = f"repository {repo_id!r}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(nowcaster).expanduser()
        if not folder.is_dir():
            folder = Path(temporary)
            model.save_pretrained(folder)
            (folder / CARD_NAME).unlink()
        try:
            return _push(HfApi(token=token), model, folder, repo_id, branch, private, message, license)
        except _Public:
            raise ValueError(
                f"`private` cannot be had: {where} exists and is public; make it private on the Hub, or choose another"
            ) from None
        except Exception as error:  # the client lets those of its HTTP library through, which have no class in common
            raise hub_error(error, f"{nowcaster!r} to {where}", where, verb="push") from error


class _Public(Exception):
    pass


def _push(
    api: HfApi,
    model: HubNowcaster,
    folder: Path,
    repo_id: str,
    branch: str,
    private: bool,
    message: str | None,
    license: str | None,
) -> Pushed:
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise _Public
    if branch != "main":
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    files: dict[str, str | bytes] = {name: str(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME)}
    if (folder / CARD_NAME).is_file():
        files[CARD_NAME] = str(folder / CARD_NAME)
    elif not api.file_exists(repo_id, CARD_NAME, revision=branch):
        files[CARD_NAME] = model.generate_model_card(repo_id, license).content.encode()
    info = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message=message or f"Push a nowcaster with hf_nino {__version__}",
        revision=branch,
    )
    return Pushed(repo_id, branch, info.oid, info.commit_url, sorted(files))


def push(nowcaster: str, repo_id: str, say: Callable[[str], None], *, as_json: bool, **options) -> None:
    """Push, and say where it is.

    Args:
        options: of :func:`push_nowcaster`.
    """
    pushed = push_nowcaster(nowcaster, repo_id, **options)
    if as_json:
        say(json.dumps(asdict(pushed), indent=2))
    else:
        say(f"{', '.join(pushed.files)} -> {pushed.url}")
        say(f'Runs can name it "{pushed.repo_id}", and this commit of it "{pushed.repo_id}@{pushed.commit}".')
