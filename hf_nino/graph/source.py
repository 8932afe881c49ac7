"""A model to look at, from its configuration alone: graphs do not depend on weights, so none are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .build import LARGE
from .structure import NeuralGraph

logger = logging.get_logger(__name__)

PROVEN_DIRECTLY = 30_000_000
"""Parameters up to which a model is made in full: tests on a narrow twin are much faster for larger ones."""

AUTOMATIC = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForSequenceClassification",
    "AutoModel",
)
"""Classes to look for a model type in, where its configuration names none."""


def graph_of(name: str | Path, meta: bool = False) -> tuple[NeuralGraph, str]:
    """The neural graph of a model that is named, not given.

    Args:
        name: a folder with a ``config.json`` or that file, a model type of transformers (``"llama"``, in its default
            size), or a repository on the Hub, of which the configuration alone is downloaded.
        meta: never make weights, not even random ones.  Models of more than 30 million parameters are first tried
            without; if symmetries then cannot be proven, they are made up to 300 million.

    Returns:
        The graph and what to call the model.

    Raises:
        ValueError: there is no such model, it cannot be reached, or transformers has no code for it.
    """
    config, described = configuration(name)
    cls = model_class(config, name)
    model = _empty(cls, config)
    parameters = None if model is None else sum(parameter.numel() for parameter in model.parameters())
    described = f"{described}: {cls.__name__}"
    if model is None or (not meta and parameters <= PROVEN_DIRECTLY):
        return NeuralGraph.from_model(cls(config)), described
    graph = NeuralGraph.from_model(model)
    if not meta and parameters <= LARGE and any(line.startswith("nothing is verified") for line in graph.report):
        graph = NeuralGraph.from_model(cls(config))
    return graph, described


def configuration(name: str | Path) -> tuple[PreTrainedConfig, str]:
    """The configuration that a folder, a file, a model type or a repository on the Hub stands for, and in words.

    Raises:
        ValueError: none of them has one.
    """
    rule = "MODEL_OR_PATH must be a folder or config.json of a transformers model, a model type or a Hub repository"
    path = Path(name).expanduser()
    text = str(name)
    if path.exists():
        if path.is_dir() and not (path / "config.json").is_file():
            hint = (
                " (it holds a PEFT adapter: name its base model)" if (path / "adapter_config.json").is_file() else ""
            )
            raise ValueError(f"{rule}, but the folder {text} has no config.json{hint}")
        return _read(path, f"{rule}, but {path / 'config.json' if path.is_dir() else path} is none"), name_of(text)
    if text in CONFIG_MAPPING:
        return CONFIG_MAPPING[text](), f"{text} (the default configuration of this model type)"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        raise ValueError(f"{rule}, but there is no file or folder {text}")
    return _read(text, f"{rule}, but {text} is no folder or model type here, and on the Hub it"), text


def name_of(text: str) -> str:
    """What to call a model: the last part of its folder, file or repository."""
    path = Path(text).expanduser()
    last = path.resolve() if path.exists() else path
    return last.parent.name if last.name == "config.json" else last.name.removesuffix(".json")


def model_class(config: PreTrainedConfig, name: str | Path) -> type[PreTrainedModel]:
    """The class that a configuration names, or else the first automatic one that knows its type.

    Raises:
        ValueError: transformers has none.
    """
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    for automatic in AUTOMATIC:
        mapping = getattr(transformers, automatic)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise ValueError(f"MODEL_OR_PATH {name} is of type {config.model_type!r}, for which transformers has no model")


def _empty(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | None:
    """The model without memory for its parameters; ``None`` if its code cannot be run like that."""
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:
        logger.info(f"{cls.__name__} cannot be made on the meta device: {type(error).__name__}: {error}")
        return None


def _read(source: str | Path, problem: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{problem}{_why(error, isinstance(source, Path))}") from error


def _why(error: BaseException, local: bool) -> str:
    """The end of a sentence on a configuration that could not be read."""
    chain = list(_causes(error))
    if local:
        return f": {_first_sentence(chain[0])}"
    if any(isinstance(e, GatedRepoError) for e in chain):
        return " is gated: ask for access on its page and log in with `hf auth login`"
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return " does not exist (or is private: log in with `hf auth login`)"
    if constants.HF_HUB_OFFLINE:
        return " cannot be looked up, because HF_HUB_OFFLINE is set and it is not in the cache"
    if any(isinstance(e, LocalEntryNotFoundError) for e in chain):
        return " cannot be reached, nor is it in the cache"
    if any(isinstance(e, EntryNotFoundError) for e in chain):
        return " has no config.json, so it is no transformers model"
    return f" could not be read: {_first_sentence(chain[0])}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_sentence(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{words[:200]}…" if len(words) > 200 else words
