"""Neural graphs written down by hand, for tests of everything that is derived from one.

Parameter names and layouts are those of the models in ``torch.nn`` and ``transformers`` that each function names, so
that a test can run the real model on a permuted state.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from hf_nino.graph import ConstantEdges, EdgeBlock, EdgeType, NeuralGraph, NeuronGroup, Nodes, Symmetry


class Sketch:
    """Collects the parts of a graph; groups are referred to by name."""

    def __init__(self) -> None:
        self.groups: dict[str, NeuronGroup] = {}
        self.blocks: list[EdgeBlock] = []
        self.constants: list[ConstantEdges] = []
        self.symmetries: list[tuple[str, list[list[tuple[str, Tensor]]]]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.aliases: dict[str, str] = {}

    def group(self, name: str, size: int, kind: str = "neuron", pinned: str | None = None) -> str:
        self.groups[name] = NeuronGroup(name, size, kind, pinned)
        return name

    def number(self, name: str) -> int:
        return list(self.groups).index(name)

    def nodes(self, name: str, sizes: tuple[int, ...] = (), strides: tuple[int, ...] = (), offset: int = 0) -> Nodes:
        if not sizes:
            return Nodes.all(self.number(name), self.groups[name].size)
        return Nodes(self.number(name), sizes, strides, offset)

    def linear(
        self, parameter: str, shape: tuple[int, int], source: str, target: str, edge_type: EdgeType = EdgeType.LINEAR
    ) -> None:
        """A weight [target, source], as in ``nn.Linear``."""
        self.matrix(parameter, shape, source, target, edge_type, source_stride=1, target_stride=shape[1])

    def matrix(
        self,
        parameter: str,
        shape: tuple[int, int],
        source: str,
        target: str,
        edge_type: EdgeType,
        source_stride: int,
        target_stride: int,
        offset: int = 0,
    ) -> None:
        self.shapes[parameter] = shape
        self.blocks.append(
            EdgeBlock(
                parameter,
                edge_type,
                self.nodes(source),
                self.nodes(target),
                (source_stride,),
                (target_stride,),
                offset=offset,
            )
        )

    def vector(
        self, parameter: str, target: str, edge_type: EdgeType = EdgeType.OTHER, size: int = 0, offset: int = 0
    ) -> None:
        """A bias or gain: edges from one node of its own to every neuron of ``target``."""
        origin = parameter if not offset and not size else f"{parameter}[{offset}:]"
        self.group(origin, 1, "parameter", "belongs to one parameter")
        self.shapes[parameter] = (size or self.groups[target].size,)
        self.blocks.append(
            EdgeBlock(parameter, edge_type, self.nodes(origin), self.nodes(target), (1,), (1,), offset=offset)
        )

    def matching(self, source: Nodes | str, target: Nodes | str, edge_type: EdgeType = EdgeType.RESIDUAL) -> None:
        source, target = (self.nodes(side) if isinstance(side, str) else side for side in (source, target))
        self.constants.append(ConstantEdges(edge_type, source, target))

    def star(self, heads: str, channels: str) -> None:
        """Each head node to its channels, which are ``[heads, channels per head]``."""
        count = self.groups[heads].size
        width = self.groups[channels].size // count
        self.matching(self.nodes(heads, (count, width), (1, 0)), channels, EdgeType.HEAD)

    def symmetry(self, name: str, *parts: tuple[str, Tensor]) -> None:
        """``parts``: (group, positions [blocks, units, nodes]); a unit is the union of its parts."""
        self.symmetries.append((name, list(parts)))

    def graph(self) -> NeuralGraph:
        offsets, total = {}, 0
        for name, group in self.groups.items():
            offsets[name] = total
            total += group.size
        symmetries = tuple(
            Symmetry(name, torch.cat([positions + offsets[group] for group, positions in parts], dim=2))
            for name, parts in self.symmetries
        )
        return NeuralGraph(
            tuple(self.groups.values()),
            tuple(self.blocks),
            tuple(self.constants),
            symmetries,
            self.shapes,
            aliases=self.aliases,
        )


def units(size: int) -> Tensor:
    """Each neuron of a group is a unit: [1, size, 1]."""
    return torch.arange(size).view(1, size, 1)


def chunks(*sizes: int) -> Tensor:
    """Positions of a group seen as [blocks, units, nodes]."""
    return torch.arange(math.prod(sizes)).view(sizes)


def mlp(sizes: tuple[int, ...] = (5, 7, 6, 3)) -> NeuralGraph:
    """The graph of :func:`mlp_module`."""
    sketch = Sketch()
    names = [f"layer {i}" for i in range(len(sizes))]
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        outer = i in (0, len(sizes) - 1)
        sketch.group(name, size, "input" if i == 0 else "neuron", "input or output" if outer else None)
        if not outer:
            sketch.symmetry(name, (name, units(size)))
        if i:
            sketch.linear(f"{2 * (i - 1)}.weight", (size, sizes[i - 1]), names[i - 1], name)
            sketch.vector(f"{2 * (i - 1)}.bias", name)
    return sketch.graph()


def mlp_module(sizes: tuple[int, ...] = (5, 7, 6, 3)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convnet(channels: tuple[int, ...] = (3, 8, 6), classes: int = 10, kernel: int = 3) -> NeuralGraph:
    """The graph of :func:`convnet_module`: kernel taps are features of an edge."""
    sketch = Sketch()
    sketch.group("pixels", channels[0], "input", "input")
    previous = "pixels"
    for i, (inputs, outputs) in enumerate(pairwise(channels)):
        name = sketch.group(f"conv {i}", outputs)
        taps = kernel * kernel
        parameter = f"{2 * i}.weight"
        sketch.shapes[parameter] = (outputs, inputs, kernel, kernel)
        sketch.blocks.append(
            EdgeBlock(
                parameter,
                EdgeType.CONVOLUTION,
                sketch.nodes(previous),
                sketch.nodes(name),
                (taps,),
                (taps * inputs,),
                (kernel, kernel),
                (kernel, 1),
            )
        )
        sketch.vector(f"{2 * i}.bias", name)
        sketch.symmetry(name, (name, units(outputs)))
        previous = name
    last = 2 * (len(channels) - 1) + 2
    sketch.group("classes", classes, pinned="output")
    sketch.linear(f"{last}.weight", (classes, channels[-1]), previous, "classes")
    sketch.vector(f"{last}.bias", "classes")
    return sketch.graph()


def convnet_module(channels: tuple[int, ...] = (3, 8, 6), classes: int = 10, kernel: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, kernel), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


def gpt2(layers: int = 3, width: int = 8, heads: int = 2, vocab: int = 11, positions: int = 6) -> NeuralGraph:
    """The graph of ``GPT2LMHeadModel``: fused query-key-value weights, key edges from the channels to the stream."""
    sketch = Sketch()
    depth = width // heads
    sketch.group("transformer.wte", vocab, "row", "token")
    sketch.group("transformer.wpe", positions, "row", "position")
    stream = sketch.group("transformer.drop", width)
    streams = [stream]
    for name, size, kind in (
        ("wte", vocab, EdgeType.TOKEN_EMBEDDING),
        ("wpe", positions, EdgeType.POSITION_EMBEDDING),
    ):
        sketch.matrix(f"transformer.{name}.weight", (size, width), f"transformer.{name}", stream, kind, width, 1)
    sketch.aliases["lm_head.weight"] = "transformer.wte.weight"
    for i in range(layers):
        h = f"transformer.h.{i}"
        sketch.vector(f"{h}.ln_1.weight", stream, EdgeType.NORM)
        sketch.vector(f"{h}.ln_1.bias", stream, EdgeType.NORM)
        head = sketch.group(f"{h}.attn.heads", heads, "head")
        qk = sketch.group(f"{h}.attn.query_key", width)
        value = sketch.group(f"{h}.attn.value", width)
        weight, bias, shape = f"{h}.attn.c_attn.weight", f"{h}.attn.c_attn.bias", (width, 3 * width)
        sketch.matrix(weight, shape, stream, qk, EdgeType.QUERY, 3 * width, 1)
        sketch.matrix(weight, shape, qk, stream, EdgeType.KEY, 1, 3 * width, offset=width)
        sketch.matrix(weight, shape, stream, value, EdgeType.VALUE, 3 * width, 1, offset=2 * width)
        for part, target in enumerate((qk, qk, value)):
            sketch.vector(bias, target, size=3 * width, offset=part * width)
        sketch.star(head, qk)
        sketch.star(head, value)
        after = sketch.group(f"{h}.attn.c_proj", width)
        sketch.matrix(f"{h}.attn.c_proj.weight", (width, width), value, after, EdgeType.LINEAR, width, 1)
        sketch.vector(f"{h}.attn.c_proj.bias", after)
        sketch.matching(stream, after)
        sketch.vector(f"{h}.ln_2.weight", after, EdgeType.NORM)
        sketch.vector(f"{h}.ln_2.bias", after, EdgeType.NORM)
        unit = sketch.group(f"{h}.mlp.c_fc", 4 * width)
        sketch.matrix(f"{h}.mlp.c_fc.weight", (width, 4 * width), after, unit, EdgeType.LINEAR, 4 * width, 1)
        sketch.vector(f"{h}.mlp.c_fc.bias", unit)
        stream = sketch.group(f"{h}.mlp.c_proj", width)
        sketch.matrix(f"{h}.mlp.c_proj.weight", (4 * width, width), unit, stream, EdgeType.LINEAR, width, 1)
        sketch.vector(f"{h}.mlp.c_proj.bias", stream)
        sketch.matching(after, stream)
        streams += [after, stream]
        sketch.symmetry(f"{h} heads", (head, units(heads)), *((g, chunks(1, heads, depth)) for g in (qk, value)))
        sketch.symmetry(f"{h} query and key channels", (qk, chunks(heads, depth, 1)))
        sketch.symmetry(f"{h} value channels", (value, chunks(heads, depth, 1)))
        sketch.symmetry(f"{h} units", (unit, units(4 * width)))
    sketch.vector("transformer.ln_f.weight", stream, EdgeType.NORM)
    sketch.vector("transformer.ln_f.bias", stream, EdgeType.NORM)
    sketch.symmetry("residual stream", *((name, units(width)) for name in streams))
    return sketch.graph()


def llama(
    layers: int = 3,
    width: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    units_per_layer: int = 10,
    vocab: int = 13,
) -> NeuralGraph:
    """The graph of an untied ``LlamaForCausalLM`` with grouped-query attention and head width ``width // heads``.

    The key and value channels of a kv head are joined by matchings to the query and output channels that repeat them.
    """
    sketch = Sketch()
    depth, repeats, kv_width = width // heads, heads // kv_heads, width // heads * kv_heads
    sketch.group("model.embed_tokens", vocab, "row", "token")
    stream = sketch.group("model.embedding", width)
    streams = [stream]
    sketch.matrix(
        "model.embed_tokens.weight", (vocab, width), "model.embed_tokens", stream, EdgeType.TOKEN_EMBEDDING, width, 1
    )
    for i in range(layers):
        h = f"model.layers.{i}"
        sketch.vector(f"{h}.input_layernorm.weight", stream, EdgeType.NORM)
        head = sketch.group(f"{h}.self_attn.heads", heads, "head")
        query = sketch.group(f"{h}.self_attn.q_proj", width, pinned="rotary channel")
        key = sketch.group(f"{h}.self_attn.k_proj", kv_width, pinned="rotary channel")
        value = sketch.group(f"{h}.self_attn.v_proj", kv_width)
        output = sketch.group(f"{h}.self_attn.repeated", width)
        sketch.linear(f"{h}.self_attn.q_proj.weight", (width, width), stream, query, EdgeType.QUERY)
        sketch.matrix(
            f"{h}.self_attn.k_proj.weight", (kv_width, width), key, stream, EdgeType.KEY, width, 1
        )  # scores are x Wq Wk' x'
        sketch.linear(f"{h}.self_attn.v_proj.weight", (kv_width, width), stream, value, EdgeType.VALUE)
        for few, many in ((key, query), (value, output)):
            repeated = sketch.nodes(few, (kv_heads, repeats, depth), (depth, 0, 1))
            sketch.matching(repeated, sketch.nodes(many, (kv_heads, repeats, depth), (repeats * depth, depth, 1)))
        sketch.star(head, query)
        sketch.star(head, output)
        after = sketch.group(f"{h}.self_attn.o_proj", width)
        sketch.linear(f"{h}.self_attn.o_proj.weight", (width, width), output, after)
        sketch.matching(stream, after)
        sketch.vector(f"{h}.post_attention_layernorm.weight", after, EdgeType.NORM)
        unit = sketch.group(f"{h}.mlp.gate_up", units_per_layer)
        for name in ("gate", "up"):
            sketch.linear(f"{h}.mlp.{name}_proj.weight", (units_per_layer, width), after, unit)
        stream = sketch.group(f"{h}.mlp.down_proj", width)
        sketch.linear(f"{h}.mlp.down_proj.weight", (width, units_per_layer), unit, stream)
        sketch.matching(after, stream)
        streams += [after, stream]
        sketch.symmetry(
            f"{h} kv groups",
            (head, chunks(1, kv_heads, repeats)),
            *((group, chunks(1, kv_heads, repeats * depth)) for group in (query, output)),
            *((group, chunks(1, kv_heads, depth)) for group in (key, value)),
        )
        sketch.symmetry(
            f"{h} heads of a kv group",
            (head, chunks(kv_heads, repeats, 1)),
            *((group, chunks(kv_heads, repeats, depth)) for group in (query, output)),
        )
        sketch.symmetry(
            f"{h} value channels",
            (value, chunks(kv_heads, depth, 1)),
            (output, chunks(kv_heads, repeats, depth).transpose(1, 2)),
        )
        sketch.symmetry(f"{h} units", (unit, units(units_per_layer)))
    sketch.vector("model.norm.weight", stream, EdgeType.NORM)
    sketch.group("lm_head", vocab, "row", "token")
    sketch.linear("lm_head.weight", (vocab, width), stream, "lm_head")
    sketch.symmetry("residual stream", *((name, units(width)) for name in streams))
    return sketch.graph()


def random_state(graph: NeuralGraph, seed: int = 0) -> dict[str, Tensor]:
    """A state of the graph's trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(graph.shapes[name], generator=generator) for name in graph.parameter_names}
