"""A model of the shapes that a trajectory has, from what its description says."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from ..training.stores import PlainStore
from .trajectory import DESCRIPTION, Trajectory

# Configuration entries that count the rows of an embedding.
_COUNTS = ("vocab_size", "max_position_embeddings", "type_vocab_size")


def rebuild_model(trajectory: Trajectory) -> nn.Module:
    """A new model with random weights, whose trainable parameters have the names and shapes of the trajectory.

    Embeddings of which rows were subsampled have as many rows as were kept.

    Raises:
        ValueError: the description names neither a transformers class with its configuration nor a task that
            :func:`hf_nino.metatrain.tasks.recording_task` knows, or what it names has other parameters.
    """
    model = _build(trajectory)
    found = {name: tuple(tensor.shape) for name, tensor in PlainStore(model).live().items()}
    if found != trajectory.shapes:
        different = sorted(found.items() ^ trajectory.shapes.items())[0][0]
        shapes = f"{found.get(different)}, and the trajectory {trajectory.shapes.get(different)}"
        raise ValueError(
            f"{trajectory.folder / DESCRIPTION} must describe the model that was recorded, but one that is built from "
            f"it has {different!r} with shape {shapes}"
        )
    return model


def example_inputs(trajectory: Trajectory) -> dict[str, torch.Tensor] | None:
    """Inputs for tracing that model; ``None`` for transformers models, whose configuration says what they take."""
    task = trajectory.description.get("task")
    if "config" in trajectory.description["model"] or task is None:
        return None
    from .tasks import recording_task

    return recording_task(task["name"]).tracing_inputs()


def _build(trajectory: Trajectory) -> nn.Module:
    model, task = trajectory.description["model"], trajectory.description.get("task")
    if "config" in model:
        return _transformers_model(trajectory, model["class"], dict(model["config"]))
    if task is not None:
        from .tasks import recording_task

        return recording_task(task["name"]).build_model(None)
    raise ValueError(
        f"{trajectory.folder / DESCRIPTION} must name a transformers model or a recording task for the model to be "
        f"built again, but it was a {model['class']}: build it yourself"
    )


def _transformers_model(trajectory: Trajectory, name: str, config: dict[str, Any]) -> nn.Module:
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no model {name!r}, of {trajectory.folder}")
    built = cls.config_class.from_dict(config)
    kept = {entry["of"]: len(entry["rows"]) for entry in _subsampled(trajectory)}
    for part in {id(part): part for part in (built, built.get_text_config())}.values():
        for count in _COUNTS:
            if getattr(part, count, None) in kept:
                setattr(part, count, kept[getattr(part, count)])
        # Tokens with a meaning of their own may lie beyond the rows that were kept; for the shapes it does not matter.
        if getattr(part, "pad_token_id", None) is not None:
            part.pad_token_id = 0
    trained = built.dtype if isinstance(built.dtype, torch.dtype) else None
    built.dtype = trained or torch.float32
    return cls(built)


def _subsampled(trajectory: Trajectory) -> list[dict[str, Any]]:
    return [entry for entry in trajectory.description["parameters"].values() if "rows" in entry]
