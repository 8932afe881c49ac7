"""Small graphs with layers of several kinds, for tests of what is drawn."""

from __future__ import annotations

from handmade import Sketch, convnet, gpt2, llama, mlp

from hf_nino.graph import EdgeType, NeuralGraph

WIDTH = 4


def attention(sketch: Sketch, layer: str, stream: str, memory: str = "") -> str:
    """Queries and keys, values, heads, output; of another stream if ``memory`` is given."""
    memory = memory or stream
    query = sketch.group(f"{layer}.query[query+key]", WIDTH)
    value = sketch.group(f"{layer}.value[value]", WIDTH)
    heads = sketch.group(f"{layer}.query[heads]", 2, "head")
    out = sketch.group(f"{layer}.out", WIDTH)
    sketch.linear(f"{layer}.query.weight", (WIDTH, WIDTH), stream, query, EdgeType.QUERY)
    sketch.matrix(f"{layer}.key.weight", (WIDTH, WIDTH), query, memory, EdgeType.KEY, WIDTH, 1)
    sketch.linear(f"{layer}.value.weight", (WIDTH, WIDTH), memory, value, EdgeType.VALUE)
    sketch.linear(f"{layer}.out.weight", (WIDTH, WIDTH), value, out)
    sketch.vector(f"{layer}.norm.weight", stream, EdgeType.NORM)
    sketch.star(heads, query)
    sketch.star(heads, value)
    sketch.matching(stream, out)
    return out


def perceptron(sketch: Sketch, layer: str, stream: str, units: str = "state", size: int = 6) -> str:
    """Units and output."""
    up, out = sketch.group(f"{layer}.{units}", size), sketch.group(f"{layer}.out", WIDTH)
    sketch.linear(f"{layer}.{units}.weight", (size, WIDTH), stream, up)
    sketch.linear(f"{layer}.out.weight", (WIDTH, size), up, out)
    sketch.vector(f"{layer}.out.bias", out)
    sketch.matching(stream, out)
    return out


def embedding(sketch: Sketch, name: str = "embedding") -> str:
    table, stream = sketch.group(f"{name}[row]", 9, "row", "token"), sketch.group(name, WIDTH)
    sketch.matrix(f"{name}.weight", (9, WIDTH), table, stream, EdgeType.TOKEN_EMBEDDING, WIDTH, 1)
    return stream


def hybrid(repeats: int = 4) -> NeuralGraph:
    """Three layers with a state and one with attention, repeated."""
    sketch = Sketch()
    stream = embedding(sketch)
    for i in range(4 * repeats):
        stream = (attention if i % 4 == 3 else perceptron)(sketch, f"layers.{i}", stream)
    head = sketch.group("head", 9, pinned="output of the model")
    sketch.linear("head.weight", (9, WIDTH), stream, head)
    return sketch.graph()


def dense_then_experts(experts: int = 6) -> NeuralGraph:
    """Two dense layers, then five with a router and experts that are modules of their own."""
    sketch = Sketch()
    stream = embedding(sketch)
    for i in range(7):
        layer = f"layers.{i}"
        if i < 2:
            stream = perceptron(sketch, layer, stream, "up")
            continue
        router, out = sketch.group(f"{layer}.router", experts), sketch.group(f"{layer}.out", WIDTH)
        sketch.linear(f"{layer}.router.weight", (experts, WIDTH), stream, router)
        for e in range(experts):
            up = sketch.group(f"{layer}.experts.{e}.up", 3)
            sketch.linear(f"{layer}.experts.{e}.up.weight", (3, WIDTH), stream, up)
            sketch.linear(f"{layer}.experts.{e}.down.weight", (WIDTH, 3), up, out)
        sketch.matching(stream, out)
        stream = out
    return sketch.graph()


def encoder_decoder(layers: int = 3) -> NeuralGraph:
    """An encoder and a decoder that share an embedding."""
    sketch = Sketch()
    memory = stream = embedding(sketch, "shared")
    for i in range(layers):
        memory = attention(sketch, f"encoder.layers.{i}", memory)
    for i in range(layers):
        stream = attention(sketch, f"decoder.layers.{i}.self", stream)
        stream = attention(sketch, f"decoder.layers.{i}.cross", stream, memory)
    return sketch.graph()


def three_towers() -> NeuralGraph:
    """Three streams side by side, the last of which attends to the first."""
    sketch = Sketch()
    first, second, third = (embedding(sketch, name) for name in ("first", "second", "third"))
    for i in range(2):
        first, memory = attention(sketch, f"one.{i}", first), first
        second = attention(sketch, f"two.{i}", second)
        third = attention(sketch, f"three.{i}", third, memory)
    return sketch.graph()


GRAPHS = {
    "mlp": mlp,
    "convnet": convnet,
    "gpt2": lambda: gpt2(layers=30),
    "llama": lambda: llama(layers=30),
    "hybrid": hybrid,
    "dense then experts": dense_then_experts,
    "encoder and decoder": encoder_decoder,
}
