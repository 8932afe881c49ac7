"""Hand-built neural graphs, trajectories and nowcasters for the tests of this folder."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hf_nino.graph import ConstantEdges, EdgeBlock, EdgeType, NeuralGraph, NeuronGroup, Nodes, Symmetry
from hf_nino.nowcaster import NiNoModel, NowcasterConfig, convert_original
from hf_nino.nowcaster.blockwise import blockwise
from hf_nino.nowcaster.scaling import measure_scale

SHARED = Path(__file__).parents[2].parent / "shared" / "upstream"


class Builder:
    """Groups, blocks, constants and symmetries by name."""

    def __init__(self) -> None:
        self.groups: list[NeuronGroup] = []
        self.blocks: list[EdgeBlock] = []
        self.constants: list[ConstantEdges] = []
        self.symmetries: list[Symmetry] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def group(self, name: str, size: int, kind: str = "neuron", pinned: str | None = None) -> Nodes:
        self.groups.append(NeuronGroup(name, size, kind, pinned))
        return Nodes.all(len(self.groups) - 1, size)

    def node(self, nodes: Nodes) -> torch.Tensor:
        return nodes.index() + sum(group.size for group in self.groups[: nodes.group])

    def block(self, name, kind, source, target, source_strides, target_strides, **kwargs) -> None:
        self.blocks.append(EdgeBlock(name, kind, source, target, source_strides, target_strides, **kwargs))

    def linear(self, name: str, source: Nodes, target: Nodes, bias: bool = True) -> None:
        """A weight [target, source] and its bias, which hangs on a node of its own."""
        self.shapes[f"{name}.weight"] = (len(target), len(source))
        self.block(f"{name}.weight", EdgeType.LINEAR, source, target, (1,), (len(source),))
        if bias:
            self.vector(f"{name}.bias", target, EdgeType.OTHER)

    def vector(self, name: str, target: Nodes, kind: EdgeType) -> None:
        self.shapes[name] = (len(target),)
        self.block(name, kind, self.group(name, 1, "parameter"), target, (1,), (1,))

    def free(self, name: str, *units: torch.Tensor) -> None:
        """A symmetry of the given nodes, [units] each, that move together."""
        self.symmetries.append(Symmetry(name, torch.stack(units, dim=-1)[None]))

    def build(self) -> NeuralGraph:
        return NeuralGraph(
            tuple(self.groups), tuple(self.blocks), tuple(self.constants), tuple(self.symmetries), self.shapes
        )


def mlp_graph(sizes: tuple[int, ...] = (3, 7, 5, 2)) -> NeuralGraph:
    """An MLP with biases; inputs and outputs are pinned, hidden neurons are free."""
    b = Builder()
    layers = [
        b.group(f"layer {i}", size, "input" if i == 0 else "neuron", "end" if i in (0, len(sizes) - 1) else None)
        for i, size in enumerate(sizes)
    ]
    for i, (source, target) in enumerate(pairwise(layers)):
        b.linear(f"fc.{i}", source, target)
    for i, layer in enumerate(layers[1:-1], start=1):
        b.free(f"layer {i}", b.node(layer))
    return b.build()


def conv_graph() -> NeuralGraph:
    """Two 3x3 convolutions and a linear map that reads every channel at 4 positions, which are its taps."""
    b = Builder()
    layers = [
        b.group("pixels", 2, "input", "input"),
        b.group("c1", 4),
        b.group("c2", 3),
        b.group("y", 5, pinned="output"),
    ]
    for i, (source, target) in enumerate(pairwise(layers[:3])):
        b.shapes[f"conv.{i}.weight"] = (len(target), len(source), 3, 3)
        b.block(
            f"conv.{i}.weight",
            EdgeType.CONVOLUTION,
            source,
            target,
            (9,),
            (9 * len(source),),
            feature_sizes=(3, 3),
            feature_strides=(3, 1),
        )
        b.vector(f"conv.{i}.bias", target, EdgeType.OTHER)
    b.shapes["head.weight"] = (5, 12)
    b.block("head.weight", EdgeType.LINEAR, *layers[2:], (4,), (12,), feature_sizes=(4,), feature_strides=(1,))
    b.free("c1", b.node(layers[1]))
    b.free("c2", b.node(layers[2]))
    return b.build()


def attention_graph(tokens: int = 9, heads: int = 2, width: int = 3) -> NeuralGraph:
    """Token embedding, norm, attention with fused q, k, v (keys transposed), residual matching, head stars."""
    b = Builder()
    d = heads * width
    words = b.group("tokens", tokens, "row", "token")
    stream, channels, values, after = (b.group(name, d) for name in ("stream", "query and key", "value", "after"))
    head = b.group("heads", heads, "head")
    b.shapes["wte.weight"] = (tokens, d)
    b.block("wte.weight", EdgeType.TOKEN_EMBEDDING, words, stream, (d,), (1,))
    b.vector("ln.weight", stream, EdgeType.NORM)
    b.shapes["c_attn.weight"] = (d, 3 * d)
    b.block("c_attn.weight", EdgeType.QUERY, stream, channels, (3 * d,), (1,))
    b.block("c_attn.weight", EdgeType.KEY, channels, stream, (1,), (3 * d,), offset=d)
    b.block("c_attn.weight", EdgeType.VALUE, stream, values, (3 * d,), (1,), offset=2 * d)
    b.shapes["c_attn.bias"] = (3 * d,)
    for i, target in enumerate((channels, channels, values)):
        b.block("c_attn.bias", EdgeType.OTHER, b.group(f"bias {i}", 1, "parameter"), target, (1,), (1,), offset=i * d)
    for target in (channels, values):
        b.constants.append(ConstantEdges(EdgeType.HEAD, Nodes(head.group, (heads, width), (1, 0)), target))
    b.linear("c_proj", values, after)
    b.constants.append(ConstantEdges(EdgeType.RESIDUAL, stream, after))
    b.linear("lm_head", after, b.group("scores", tokens, "row", "token"), bias=False)
    b.free("residual stream", b.node(stream), b.node(after))
    per_head = [b.node(head), *b.node(channels).view(heads, width).T, *b.node(values).view(heads, width).T]
    b.free("heads", *per_head)
    within = b.node(values).view(heads, width)
    b.symmetries.append(Symmetry("value channels", within[:, :, None]))
    return b.build()


def strided_graph() -> NeuralGraph:
    """Parameters that lie in slices, with steps, over compound axes and backwards between overlapping selections."""
    b = Builder()
    x, y = b.group("x", 6, "input", "input"), b.group("y", 8)
    b.shapes["interleaved"] = (6, 8)
    evens, odds = Nodes(y.group, (4,), (2,)), Nodes(y.group, (4,), (2,), 1)
    b.block("interleaved", EdgeType.LINEAR, x, evens, (8,), (2,))
    b.block("interleaved", EdgeType.OTHER, odds, x, (2,), (8,), offset=1)
    b.shapes["compound"] = (2, 3, 4, 2)
    b.block(
        "compound", EdgeType.LINEAR, Nodes(x.group, (3, 2), (1, 3)), Nodes(y.group, (2, 4), (4, 1)), (8, 1), (24, 2)
    )
    b.shapes["scalar"] = ()
    b.block("scalar", EdgeType.OTHER, b.group("scalar", 1, "private"), Nodes(y.group, (1,), (1,), 5), (1,), (1,))
    return b.build()


GRAPHS = {"mlp": mlp_graph, "conv": conv_graph, "attention": attention_graph, "strided": strided_graph}


def trajectory(graph: NeuralGraph, context: int = 5, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """A smooth random path: every parameter drifts and wobbles around a random start."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name):
        return torch.randn(graph.shapes[name], generator=generator)

    start, drift = ({name: draw(name) for name in graph.parameter_names} for _ in range(2))
    return [
        {name: start[name] * 0.3 + 0.02 * t * drift[name] + 0.01 * draw(name) for name in start}
        for t in range(context)
    ]


def positions(graph: NeuralGraph, size: int = 8, seed: int = 0) -> torch.Tensor:
    """Any positional encoding that is constant on groups and differs between pinned neurons."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for group in graph.groups:
        rows = torch.randn(group.size if group.pinned else 1, size, generator=generator)
        parts.append(rows.expand(group.size, size))
    return torch.cat(parts) * 0.1


def random_nowcaster(seed: int = 0, **config) -> NiNoModel:
    """A small network with weights large enough that every part of it shows in the output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NiNoModel(NowcasterConfig(**{"hidden_size": 16, "max_horizon": 6, **config}))
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3 if name.endswith("bias") else 1 / parameter.shape[1] ** 0.5)
    return model.eval()


def original_nowcaster(name: str = "nino_no_posw"):
    """A checkpoint of the original release."""
    path = SHARED / f"{name}.pt"
    if not path.is_file():
        pytest.skip(f"needs the original release's checkpoint {name}.pt in the shared folder beside the repository")
    return convert_original(path)


def scales_of(graph, states):
    return {name: measure_scale([state[name] for state in states]) for name in graph.parameter_names}


def reference_deltas(model, graph, states, horizon, pos, token=None) -> list[torch.Tensor]:
    """Scaled deltas of every block from the explicit graph, [J, I, F] each (or [J, I, F, K])."""
    scales = scales_of(graph, states)
    data = graph.to_pyg([{name: scales[name].apply(state[name]) for name in scales} for state in states], pos=0)
    data.pos = pos
    data.token = token
    deltas = model(data, horizon)
    result, first = [], 0
    for block in graph.trainable_blocks:
        mine = deltas[first : first + block.edges, : block.shape[2]]
        result.append(mine.reshape(*block.shape, *deltas.shape[2:]))
        first += block.edges
    return result


def blockwise_deltas(model, graph, states, horizon, pos, **kwargs) -> list[torch.Tensor]:
    """The same from the edge blocks."""
    return [delta for _, delta in blockwise(model, graph, states, scales_of(graph, states), horizon, pos, **kwargs)]
