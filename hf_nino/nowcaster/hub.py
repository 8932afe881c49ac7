"""Nowcasters as folders of config.json and model.safetensors: local, bundled or on the Hub.  Never pickle."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    HfApi,
    ModelCard,
    PyTorchModelHubMixin,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import logging
from typing_extensions import Self

from .card import nowcaster_card
from .configuration import NowcasterConfig
from .hub_errors import hub_error
from .source import NowcasterSource, split_revision

logger = logging.get_logger(__name__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
BUNDLED = Path(__file__).parent / "bundled"

MAX_WEIGHTS = 2**28
"""A nowcaster with more weights (1 GiB in float32) is refused: the largest of the original release has 7 million."""

CONFIG_BYTES = 2**20
"""Largest config.json; the header of the weights may take as much."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HINT = f"a nowcaster is {CONFIG_NAME} and {WEIGHTS_NAME}, pickle files are never read"
_FLOATING = {"F64", "F32", "F16", "BF16"}


def bundled_nowcasters() -> list[str]:
    """Names of the nowcasters that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG_NAME}"))


@dataclass
class NowcasterFolder:
    """Where the files of a nowcaster are.

    Args:
        name: a local directory, the name of a bundled nowcaster (no slash), or a Hub repository ``"org/name"``, with
            its revision if need be: ``"org/name@v1"``.
        revision, token, cache_dir, force_download, local_files_only: for the Hub, as in ``hf_hub_download``.

    Raises:
        FileNotFoundError: neither an existing directory, a bundled name nor something that could be a repository.
        ValueError: an impossible revision, or two different ones.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False

    def __post_init__(self) -> None:
        self.name = str(self.name)
        self.directory: Path | None = None
        local = Path(self.name).expanduser()
        if self.name and local.is_dir():
            self.directory = local
        elif self.name and local.exists():
            raise FileNotFoundError(
                f"`{self.name}` must be a directory with {CONFIG_NAME} and {WEIGHTS_NAME}, it is a file"
            )
        elif self.name in bundled_nowcasters():
            self.directory = BUNDLED / self.name
        else:
            self.name, self.revision = split_revision(self.name, self.revision)
            if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.name):
                raise FileNotFoundError(
                    f"no nowcaster {self.name!r}: there is no such directory, and it is not a repository of the form "
                    f"'org/name'; bundled nowcasters are {bundled_nowcasters() or 'none'}"
                )
        self.source = NowcasterSource(self.name, None if self.directory else self.revision)

    def file(self, filename: str, most: int | None = None) -> Path:
        """The local path of one of its files, downloaded if need be.

        Args:
            most: bytes that it may have.

        Raises:
            FileNotFoundError: the file, the repository or the revision does not exist.
            OSError: the Hub could not be reached or refused (``PermissionError``).
            ValueError: a file of more than ``most`` bytes; it is not downloaded if the Hub says so before.
        """
        if self.directory is not None:
            path = self.directory / filename
            if not path.is_file():
                raise FileNotFoundError(
                    f"nowcaster {self.name!r} must have a file {filename}, found {self._listing()}; {_HINT}"
                )
        else:
            self._check_size(filename, self._size_on_hub(filename), most)
            path = self._download(filename)
        self._check_size(filename, path.stat().st_size, most)
        return path

    def _download(self, filename: str) -> Path:
        where = f"repository {self.name!r}" + (f" at revision {self.revision!r}" if self.revision else "")
        try:
            path = hf_hub_download(
                repo_id=self.name,
                filename=filename,
                revision=self.revision,
                cache_dir=self.cache_dir,
                force_download=self.force_download,
                token=self.token,
                local_files_only=self.local_files_only,
            )
        except Exception as error:  # the client lets those of its HTTP library through, which have no class in common
            missing = f"{where} has no file {filename}; {_HINT}"
            raise hub_error(error, f"{filename} of {where}", where, missing=missing) from error
        # All further files come from the same commit, also when the branch moves in between.
        commit = Path(path).parent.name
        if _COMMIT.fullmatch(commit):
            if self.source.commit is None:
                self.source = NowcasterSource(self.name, self.revision, commit)
                if self.revision != commit:
                    logger.info(
                        f"Nowcaster {self.name}: {self.revision or 'the default branch'} is commit {commit} now; "
                        f"'{self.source}' is the same again."
                    )
            self.revision = commit
        return Path(path)

    def _size_on_hub(self, filename: str) -> int | None:
        """Bytes of a file that is to be downloaded, if the Hub says so."""
        pinned = self.revision is not None and _COMMIT.fullmatch(self.revision) and not self.force_download
        if self.local_files_only or (
            pinned and isinstance(try_to_load_from_cache(self.name, filename, self.cache_dir, self.revision), str)
        ):
            return None
        try:
            url = hf_hub_url(self.name, filename, revision=self.revision)
            return get_hf_file_metadata(url, token=self.token).size
        except Exception:  # the download, which knows the cache too, says what is wrong
            return None

    def _check_size(self, filename: str, size: int | None, most: int | None) -> None:
        if size is not None and most is not None and size > most:
            raise ValueError(
                f"{filename} of nowcaster {self.name!r} must have at most {most:,} bytes to be what it says it is, "
                f"it has {size:,}; it is not read"
            )

    def config(self) -> NowcasterConfig:
        """The nowcaster's configuration.

        Raises:
            ValueError: not JSON, or not a configuration that this version can read.
        """
        path = self.file(CONFIG_NAME, CONFIG_BYTES)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{CONFIG_NAME} of nowcaster {self.name!r} is not valid JSON: {error}") from error
        try:
            return NowcasterConfig.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{CONFIG_NAME} of nowcaster {self.name!r}: {error}") from error

    def _listing(self) -> str:
        names = sorted(os.listdir(self.directory))
        return ", ".join(names[:8]) or "an empty directory"


class HubNowcaster(PyTorchModelHubMixin):
    """``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` for models built from a ``NowcasterConfig``.

    Stricter than the mixin of huggingface_hub, which would leave missing tensors random, load without a configuration,
    fall back to pickle, and print.

    Attributes:
        source: where it was loaded from; ``None`` for a new one.
    """

    nowcaster_type: str
    config: NowcasterConfig
    source: NowcasterSource | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
    ) -> Self:
        """A nowcaster from a local directory, a bundled name (no slash) or a Hub repository, in evaluation mode.

        Args:
            pretrained_model_name_or_path: directory, bundled name, ``"org/name"`` or ``"org/name@revision"``; an
                existing directory wins.
            revision: branch, tag or commit of the repository; a commit is the safe choice.  ``model.source`` says
                which commit it was.
            map_location: device of the weights.
            force_download, token, cache_dir, local_files_only: as in ``hf_hub_download``.

        Raises:
            FileNotFoundError: no such nowcaster, or config.json or model.safetensors is missing.
            OSError: the Hub could not be reached or refused.
            ValueError: a malformed configuration or file, another type of nowcaster, more than :data:`MAX_WEIGHTS`
                weights, or tensors that are missing, unknown, not finite, or of another shape than the configuration
                says.
        """
        folder = NowcasterFolder(
            str(pretrained_model_name_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        return cls.from_folder(folder, folder.config(), map_location)

    @classmethod
    def from_folder(cls, folder: NowcasterFolder, config: NowcasterConfig, map_location: str | torch.device) -> Self:
        """The model of a configuration with the weights of a folder; see :meth:`from_pretrained`."""
        if config.nowcaster_type != cls.nowcaster_type:
            raise ValueError(
                f"nowcaster {folder.name!r} is of type {config.nowcaster_type!r}, {cls.__name__} needs "
                f"{cls.nowcaster_type!r}; `hf_nino.load_nowcaster` picks the right class"
            )
        model = empty_model(cls, config)
        what = f"{WEIGHTS_NAME} of nowcaster {folder.name!r}"
        path = folder.file(WEIGHTS_NAME, _most_bytes(model, what))
        try:
            with safe_open(path, framework="pt") as file:
                headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
                kinds = {header.get_dtype() for header in headers.values()}
            check_tensors(shapes, model, what)
            if kinds - _FLOATING:
                raise ValueError(f"{what} must hold floating point tensors, got {sorted(kinds - _FLOATING)}")
            tensors = load_file(path, device=str(map_location))
        except SafetensorError as error:
            raise ValueError(f"{what} is not a valid safetensors file: {error}") from error
        model = fill_model(model, tensors, what)
        model.source = folder.source
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        config = json.dumps(self.config.to_dict(), indent=2, sort_keys=True)
        (save_directory / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})

    def generate_model_card(self, repo_id: str | None = None, license: str | None = None) -> ModelCard:
        """The card that is saved and pushed with the nowcaster; see :func:`hf_nino.nowcaster.card.nowcaster_card`.

        Args:
            repo_id: the repository that it is for.
            license: instead of the class's own, mit.
        """
        data = type(self._hub_mixin_info.model_card_data)(**self._hub_mixin_info.model_card_data.to_dict())
        data.license = license or data.license
        weights = sum(parameter.numel() for parameter in self.parameters())
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{nowcaster_card(self.config, repo_id, weights)}")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config: Any = None,
        commit_message: str = "Push a nowcaster",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **upload: Any,
    ) -> str:
        """Push configuration, weights and a new card, as ``PyTorchModelHubMixin.push_to_hub`` does.

        Args:
            config: not read; the nowcaster has one.
            model_card_kwargs: of :meth:`generate_model_card`.
            upload: ``create_pr`` and the patterns of ``HfApi.upload_folder``.

        Returns:
            The address of the commit.

        Raises:
            OSError: the Hub could not be reached or refused (``PermissionError``).
            ValueError: an impossible ``repo_id``.
        """
        api = HfApi(token=token)
        try:
            # Not the mixin's own: that leaves its temporary folder behind when the Hub refuses.
            with tempfile.TemporaryDirectory() as temporary:
                repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
                self.save_pretrained(temporary, model_card_kwargs={"repo_id": repo_id, **(model_card_kwargs or {})})
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=Path(temporary),
                    commit_message=commit_message,
                    revision=branch,
                    **upload,
                )
        except Exception as error:
            where = f"repository {repo_id!r}"
            raise hub_error(error, f"the nowcaster to {where}", where, verb="push") from error


def _most_bytes(model: torch.nn.Module, what: str) -> int:
    """Bytes that the file of such a model may have."""
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    if count > MAX_WEIGHTS:
        raise ValueError(
            f"{what}: the tensors that the configuration asks for have {count:,} elements, more than the "
            f"{MAX_WEIGHTS:,} that a nowcaster may have"
        )
    return 8 * count + CONFIG_BYTES


def empty_model(cls: type, config: NowcasterConfig) -> torch.nn.Module:
    """The model without memory for its weights, and without drawing random numbers for them."""
    with torch.device("meta"):
        return cls(config)


def check_tensors(shapes: Mapping[str, tuple[int, ...]], model: torch.nn.Module, what: str) -> None:
    """Raise ``ValueError`` unless names and shapes are exactly those of the model."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{what} must hold the tensors that the configuration asks for; missing {missing[:3] or 'none'}, "
            f"unknown {unknown[:3] or 'none'}"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{what}: the configuration asks for {name!r} of shape {shape}, got {shapes[name]}")


def fill_model(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], what: str) -> torch.nn.Module:
    """The model with these weights, in float32 and evaluation mode."""
    # Copies: in a file tensors begin anywhere, and products of them may differ in the last bit from those of tensors
    # that begin where torch has them begin (seen on an AMD EPYC).
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():  # in float32, where what was finite may have overflowed
        if not tensor.isfinite().all():
            raise ValueError(f"{what}: {name!r} has values that are not finite")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()
