"""Nowcasters as folders of config.json and model.safetensors: local, bundled or on the Hub.  Never pickle."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from typing_extensions import Self

from .configuration import NowcasterConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
BUNDLED = Path(__file__).parent / "bundled"

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
        name: a local directory, the name of a bundled nowcaster (no slash), or a Hub repository ``"org/name"``.
        revision, token, cache_dir, force_download, local_files_only: for the Hub, as in ``hf_hub_download``.

    Raises:
        FileNotFoundError: neither an existing directory, a bundled name nor something that could be a repository.
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
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) or self.name.startswith("."):
            raise FileNotFoundError(
                f"no nowcaster {self.name!r}: there is no such directory, and it is not a repository of the form "
                f"'org/name'; bundled nowcasters are {bundled_nowcasters() or 'none'}"
            )

    def file(self, filename: str) -> Path:
        """The local path of one of its files, downloaded if need be.

        Raises:
            FileNotFoundError: the file, the repository or the revision does not exist.
            OSError: the Hub could not be reached or refused.
        """
        if self.directory is not None:
            path = self.directory / filename
            if not path.is_file():
                raise FileNotFoundError(
                    f"nowcaster {self.name!r} must have a file {filename}, found {self._listing()}; {_HINT}"
                )
            return path
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
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"the Hub has no {where}, or it is private or gated and needs a `token`"
            ) from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"the Hub has no {where}: the revision does not exist") from error
        except LocalEntryNotFoundError as error:
            raise OSError(
                f"{filename} of {where} is not in the local cache and could not be downloaded: {error}"
            ) from error
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"{where} has no file {filename}; {_HINT}") from error
        except HFValidationError as error:
            raise ValueError(f"{self.name!r} is not the name of a repository: {error}") from error
        except (HfHubHTTPError, OSError) as error:
            raise OSError(f"could not download {filename} of {where}: {error}") from error
        # All further files come from the same commit, also when the branch moves in between.
        if _COMMIT.fullmatch(Path(path).parent.name):
            self.revision = Path(path).parent.name
        return Path(path)

    def config(self) -> NowcasterConfig:
        """The nowcaster's configuration.

        Raises:
            ValueError: not JSON, or not a configuration that this version can read.
        """
        path = self.file(CONFIG_NAME)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
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
    """

    nowcaster_type: str
    config: NowcasterConfig

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
            pretrained_model_name_or_path: directory, bundled name, or ``"org/name"``; an existing directory wins.
            revision: branch, tag or commit of the repository; a commit is the safe choice.
            map_location: device of the weights.
            force_download, token, cache_dir, local_files_only: as in ``hf_hub_download``.

        Raises:
            FileNotFoundError: no such nowcaster, or config.json or model.safetensors is missing.
            OSError: the Hub could not be reached or refused.
            ValueError: a malformed configuration or file, another type of nowcaster, or tensors that are missing,
                unknown, or of another shape than the configuration says.
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
        path = folder.file(WEIGHTS_NAME)
        what = f"{WEIGHTS_NAME} of nowcaster {folder.name!r}"
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
        return fill_model(model, tensors, what)

    def _save_pretrained(self, save_directory: Path) -> None:
        config = json.dumps(self.config.to_dict(), indent=2, sort_keys=True)
        (save_directory / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})


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
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{what}: {name!r} has values that are not finite")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.float().eval()
