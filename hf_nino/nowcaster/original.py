"""Reads the checkpoints of the original release (github.com/SamsungSAILMontreal/nino), to be saved as safetensors."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configuration import NowcasterConfig
from .hub import check_tensors, empty_model, fill_model
from .modeling import NiNoModel, WNNModel

# Arguments of the original model that only one value of is supported, with that value; it is also their default.
_FIXED: dict[str, Any] = {
    "dms": True,
    "input_layer": "linear",
    "residual": True,
    "improved_graph": True,
    "scale_method": "std",
    "upd_scale": 1.0,
    "final_edge_update": False,
    "towers": 1,
}
# Arguments that say how to run, not what to compute.
_IGNORED = {"chunk_size", "message_passing_device", "edge_sample_ratio"}
_DEFAULTS: dict[str, Any] = {
    "ctx": 5,
    "hid": 128,
    "layers": 3,
    "gnn": True,
    "max_feat_size": 9,
    "act_name": "silu",
    "seq_len": 40,
    "wte_pos_enc": True,
    "vocab_size": 50257,
    "edge_types": 15,
    "lpe": 8,
}


def convert_original(path: str | Path) -> NiNoModel | WNNModel:
    """A nowcaster with the weights of a ``.pt`` file of the original release; write it with ``save_pretrained``.

    The file is read with ``weights_only=True``: a pickle that would run code is refused.  The last message-passing
    layer is left out, it changes nothing in the output.  Checkpoints with several towers are refused.

    Args:
        path: a file ``{"state_dict": ..., "model_args": ...}``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, unknown or unsupported arguments, or tensors that do not fit them.
    """
    path = Path(path).expanduser()
    what = f"checkpoint {path.name!r}"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {str(path)!r}")
    state_dict, arguments = _read(path, what)
    if any(".pre_nns.1." in name for name in state_dict):
        raise ValueError(
            f"{what} has several towers (pre_nns), which are not supported; use one of the other checkpoints"
        )
    config = _config(arguments, what)
    names = _nino_names(config) if config.nowcaster_type == "nino" else _WNN_NAMES
    unused = _last_layer_names(config) if config.nowcaster_type == "nino" else set()
    unknown = sorted(name for name in state_dict if name not in names and name not in unused)
    if unknown:
        raise ValueError(f"{what} has tensors that its arguments do not ask for: {unknown[:3]}")
    renamed = {names[name]: tensor for name, tensor in state_dict.items() if name in names}
    model = empty_model(NiNoModel if config.nowcaster_type == "nino" else WNNModel, config)
    check_tensors({name: tuple(tensor.shape) for name, tensor in renamed.items()}, model, f"{what}, renamed,")
    return fill_model(model, {name: tensor.detach().clone() for name, tensor in renamed.items()}, what)


def _read(path: Path, what: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The state dict and the model's arguments in a file, with their types checked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, for files that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{what} is not a PyTorch file of plain tensors; it is damaged, or it holds code and is refused"
        ) from error
    # The reader raises almost anything on a damaged file (KeyError, RuntimeError, EOFError, UnicodeDecodeError, ...).
    except Exception as error:
        raise ValueError(f"{what} is not a readable PyTorch file: {error}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{what} must hold a mapping with 'state_dict' and 'model_args', got {_describe(content)}")
    arguments = content.get("model_args", {})
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{what}: 'model_args' must be a mapping, got {_describe(arguments)}")
    for name, tensor in content["state_dict"].items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{what}: 'state_dict' must map names to floating point tensors, not so for {name!r}")
    return dict(content["state_dict"]), arguments


def _describe(content: Any) -> str:
    return f"one with {[str(key) for key in content][:5]}" if isinstance(content, Mapping) else type(content).__name__


def _config(arguments: Mapping[str, Any], what: str) -> NowcasterConfig:
    """Our configuration for the arguments of an original model."""
    known = _FIXED.keys() | _IGNORED | _DEFAULTS.keys()
    unknown = sorted(str(name) for name in arguments if name not in known)
    if unknown:
        raise ValueError(f"{what} has unknown arguments {unknown} in 'model_args'; known are {sorted(known)}")
    for name, value in _FIXED.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"{what}: only {name}={value!r} is supported, got {arguments[name]!r}")
    values = {**_DEFAULTS, **{name: value for name, value in arguments.items() if name in _DEFAULTS}}
    graph = values["gnn"] not in (False, None, "None", "none")
    common = {
        "context": values["ctx"],
        "hidden_size": values["hid"],
        "max_horizon": values["seq_len"],
        "edge_types": values["edge_types"],
        "activation": values["act_name"],
        "meta_trained_on": "original release of NiNo (arXiv 2409.04434)",
    }
    try:
        if not graph:
            return NowcasterConfig(nowcaster_type="wnn", **common)
        return NowcasterConfig(
            nowcaster_type="nino",
            num_layers=values["layers"],
            max_features=values["max_feat_size"],
            positional_size=values["lpe"],
            token_position_vocabulary=values["vocab_size"] if values["wte_pos_enc"] else None,
            **common,
        )
    except ValueError as error:
        raise ValueError(f"{what}: its 'model_args' are not supported: {error}") from error


def _linear(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}


_WNN_NAMES = {
    "layer_embed.weight": "edge_type.weight",
    **_linear("edge_proj.fc.0", "edge_in"),
    **_linear("edge_mlp.fc.0", "hidden.0"),
    **_linear("edge_mlp.fc.2", "hidden.1"),
    **_linear("edge_mlp.fc.4", "hidden.2"),
    **_linear("edge_mlp.fc.6", "edge_out"),
}
_CONVOLUTION = {"edge_encoder": "modulation", "pre_nns.0.0": "pair", "post_nns.0.0": "combine", "lin": "output"}
_EDGE_UPDATE = {"lin_e": "edge", "lin_s": "source", "lin_t": "target", "lin1": "output"}


def _nino_names(config: NowcasterConfig) -> dict[str, str]:
    """Tensor names of the original graph network -> ours."""
    names = {
        "layer_embed.weight": "edge_type.weight",
        "wte_pos_enc_layer.weight": "token_position.weight",
        **_linear("node_proj.fc.0", "node_in"),
        **_linear("edge_proj.fc.0", "edge_in"),
        **_linear("edge_out.fc.0", "edge_hidden"),
        **_linear("edge_out.fc.2", "edge_out"),
    }
    for depth in range(config.num_layers - 1):
        for theirs, ours in _CONVOLUTION.items():
            names.update(_linear(f"gnn.convs.{depth}.{theirs}", f"convolutions.{depth}.{ours}"))
        for theirs, ours in _EDGE_UPDATE.items():
            names.update(_linear(f"gnn.edge_update.{depth}.{theirs}", f"edge_updates.{depth}.{ours}"))
    return names


def _last_layer_names(config: NowcasterConfig) -> set[str]:
    """Tensors of the last message-passing layer, which updates nodes that nothing reads."""
    names: dict[str, str] = {}
    for theirs in _CONVOLUTION:
        names.update(_linear(f"gnn.convs.{config.num_layers - 1}.{theirs}", ""))
    return set(names)
