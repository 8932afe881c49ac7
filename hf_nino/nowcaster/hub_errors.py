"""What the client of the Hub raises -> one error that says what failed and what to do."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]  # of the client's HTTP library, which depends on its version
_LOG_IN = "log in with `hf auth login`, or give a `token`"


def hub_error(error: Exception, what: str, where: str, *, verb: str = "download", missing: str = "") -> Exception:
    """The error to raise instead of ``error``.

    Args:
        error: whatever the client raised: its own errors, those of its HTTP library (which are no ``OSError``), or
            those of the operating system.
        what: the thing that failed, such as ``"config.json of repository 'org/name'"``.
        where: repository and revision, such as ``"repository 'org/name' at revision 'v1'"``.
        verb: what was to be done with ``what``.
        missing: the sentence for a file that the repository lacks.

    Returns:
        ``FileNotFoundError`` for a repository, revision or file that does not exist (or is not shown to this token),
        ``PermissionError`` for a token that is wrong or may not, ``ValueError`` for an impossible name, ``OSError``
        for everything else.
    """
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if verb != "download" and status in (401, 403):
        return _not_allowed(f"could not {verb} {what}", status)
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{where} is gated: ask for access on its page on the Hub, then {_LOG_IN}")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(f"the Hub has no {where}, or it is private and needs a `token`: {_LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"the Hub has no {where}: the revision does not exist; give a branch, a tag or a whole commit"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return OSError(f"{what} is not in the local cache, and {_why_not_online(error)}")
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError(missing or f"could not {verb} {what}: there is no such file")
    if status in (401, 403):
        return _not_allowed(f"could not {verb} {what}", status)
    if isinstance(error, HFValidationError):
        return ValueError(f"could not {verb} {what}: that is no name of a repository ({_line(error)})")
    return OSError(f"could not {verb} {what}: {_reason(error)}")


def _not_allowed(sentence: str, status: int) -> PermissionError:
    reason = "there is no token, or it is not valid" if status == 401 else "the token does not allow it"
    return PermissionError(f"{sentence}: {reason} ({status}); {_LOG_IN}")


def _why_not_online(error: LocalEntryNotFoundError) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it, or load the same once while online"
    cause = error.__cause__
    if cause is None:
        return "`local_files_only` is set: unset it, or load the same once without"
    return _reason(cause)


def _reason(error: BaseException) -> str:
    """Why, and what to do about it, in one line."""
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {error.response.status_code}: try again later ({_line(error)})"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, _HTTPError | ConnectionError | TimeoutError):
        return f"{constants.ENDPOINT} cannot be reached, or the connection broke: try again ({_line(error)})"
    # The client says which file it could not upload, and the reason is behind that.
    behind = "" if error.__cause__ is None else f" ({_reason(error.__cause__)})"
    return _line(error) + behind


def _line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else text[:297] + "..."
