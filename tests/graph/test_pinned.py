"""Negative controls: neurons that are pinned for a reason really are not interchangeable.

For every reason there is a tiny network in which exchanging two neurons that are pinned for it changes the outputs.
Where the reason can be taken away (no rotation, equal slopes, one group of channels), the same exchange must be a
symmetry then: what is pinned is pinned for that reason and for no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from sample import SAMPLE, UNFOLLOWED, each_type, rolled, sample_graph, sample_model
from torch import Tensor, nn

from hf_nino.graph import NeuralGraph
from hf_nino.graph.inputs import split_inputs
from hf_nino.graph.verify import TOLERANCE, PermutationTest

CHANGED = 10 * TOLERANCE
"""What a change of the outputs of a tiny network must exceed to be one."""

TOKENS = torch.tensor([[3, 11, 0, 7, 19, 4, 8, 2]])
FEATURES = torch.linspace(-2, 2, 3 * 6).sin().view(3, 6)
IMAGE = torch.linspace(-9, 9, 3 * 64).sin().view(1, 3, 8, 8)


class Attention(nn.Module):
    """One layer of attention over tokens, whose heads or channels may be told apart in several ways.

    Args:
        mode: ``"plain"``; ``"rotary"`` in halves; ``"gains"``, which all heads share, before that; ``"complex"`` in
            neighbours; ``"slopes"`` of ALiBi, or ``"slope"``, one for all heads.
        heads: 8 heads of 2 channels are rotated by one frequency, which tells no pair from another.
    """

    def __init__(self, mode: str, heads: int = 4) -> None:
        super().__init__()
        self.mode, self.heads = mode, heads
        self.embed, self.q, self.k, self.v = nn.Embedding(20, 16), *(nn.Linear(16, 16, bias=False) for _ in range(3))
        self.out, self.classifier = nn.Linear(16, 16), nn.Linear(16, 5)
        if mode == "gains":
            self.gain = nn.Parameter(torch.zeros(16 // heads))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        places = torch.arange(x.shape[1]).to(x.dtype)
        angles = places[:, None] * 0.3 ** torch.arange(q.shape[-1] // 2).to(x.dtype)
        q = q * self.gain if self.mode == "gains" else q
        if self.mode in ("rotary", "gains"):
            q, k = self.rotated(q, angles), self.rotated(k, angles)
        elif self.mode == "complex":
            turn = torch.polar(torch.ones_like(angles), angles)
            q, k = (
                torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(3) for y in (q, k)
            )
        scores = q @ k.transpose(-1, -2)
        if self.mode.startswith("slope"):
            slopes = torch.full((self.heads,), 0.5) if self.mode == "slope" else 0.5 ** torch.arange(self.heads)
            scores = scores - slopes.to(x.dtype)[:, None, None] * (places[:, None] - places).abs()
        return self.classifier(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))

    @staticmethod
    def rotated(x: Tensor, angles: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = (f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-second, first], dim=-1) * sin


class Embedded(nn.Module):
    """Tokens, their positions and their kind (all of kind 0), looked up in tables."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.kind = nn.Embedding(20, 12), nn.Embedding(8, 12), nn.Embedding(2, 12)
        self.hidden, self.classifier = nn.Linear(12, 9), nn.Linear(9, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(8)) + self.kind(torch.zeros_like(tokens))
        return self.classifier(torch.relu(self.hidden(x)))


class Tables(nn.Module):
    """A table of biases for heads, by distance, and two learned tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.learned = nn.Parameter(torch.zeros(19, 4)), nn.Parameter(torch.zeros(1, 2, 12))
        self.token, self.q, self.k, self.v = nn.Embedding(20, 12), *(nn.Linear(12, 12) for _ in range(3))
        self.classifier = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.learned, self.token(tokens)], dim=1)
        q, k, v = (part(x).unflatten(-1, (4, 3)).transpose(1, 2) for part in (self.q, self.k, self.v))
        distance = torch.arange(10)[:, None] - torch.arange(10) + 9
        bias = self.table[distance.flatten()].view(10, 10, 4).permute(2, 0, 1)
        return self.classifier(((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Maps over positions between maps over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mix, self.classifier = nn.Embedding(20, 12), nn.Linear(8, 8), nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        return self.classifier(x + self.mix(x.transpose(1, 2)).transpose(1, 2).tanh())


class Perceptron(nn.Module):
    """Hidden units that are read together with data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 9), nn.Linear(13, 4)

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return self.last(torch.cat([torch.relu(self.first(x)), more], dim=-1))


class Convolutional(nn.Module):
    """A kernel of 11 taps on each channel, and a normalisation in groups of channels."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, (1, 11), padding=(0, 5), groups=8)
        self.norm, self.hidden, self.classifier = nn.GroupNorm(groups, 8), nn.Linear(8, 9), nn.Linear(9, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.depthwise(torch.relu(self.stem(image))))
        return self.classifier(self.hidden(x.tanh().mean((2, 3))).tanh())


class Overlapping(nn.Module):
    """Two slices of one matrix that share a part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.first, self.last = nn.Parameter(torch.zeros(8, 9)), nn.Linear(9, 8), nn.Linear(7, 3)
        self.hidden = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.hidden(x).tanh()).tanh()
        return self.last((x @ self.weight[:, :7]).tanh() * (x @ self.weight[:, 2:]).tanh())


@dataclass(frozen=True)
class Control:
    """Neurons of one group that are pinned.

    Args:
        reason: why, a pattern of what the graph says.
        build, inputs: the network.
        group: beginning of the group's name.
        order: new places of its first neurons; ``None`` moves all of them one further, a head with its channels.
        without: the same network without the reason; the same neurons may then be exchanged.
    """

    reason: str
    build: Callable[[], nn.Module]
    inputs: Any
    group: str
    order: tuple[int, ...] | None = None
    without: Callable[[], nn.Module] | None = None


def plain(heads: int = 4) -> Callable[[], nn.Module]:
    return lambda: Attention("plain", heads)


CONTROLS = {
    "tokens": Control("^token$", Embedded, TOKENS, "token.weight[row]"),
    "positions": Control("^position$", Embedded, TOKENS, "position.weight[row]"),
    "kinds of tokens": Control("row of an embedding", Embedded, TOKENS, "kind.weight[row]"),
    "positions that a matrix reads": Control("^position$", Mixer, TOKENS, "mix[in]"),
    "positions that a matrix makes": Control("^position$", Mixer, TOKENS, "mix[out]"),
    "rows of a table": Control("row of a table", Tables, TOKENS, "table[row]"),
    "learned tokens": Control("row of a parameter", Tables, TOKENS, "learned[row]"),
    "frequencies": Control(
        "rotary", lambda: Attention("rotary"), TOKENS, "q + k[query+key]", (1, 0, 3, 2), plain()
    ),
    "members of a pair": Control(
        "rotary", lambda: Attention("rotary"), TOKENS, "q + k[query+key]", (2, 1, 0, 3), plain()
    ),
    "members of the only pair": Control(
        "rotary", lambda: Attention("rotary", 8), TOKENS, "q + k[query+key]", (1, 0), plain(8)
    ),
    "gains of rotated channels": Control(
        "pinned neurons share", lambda: Attention("gains"), TOKENS, "gain", (1, 0, 3, 2)
    ),
    "complex frequencies": Control(
        "rotated as complex numbers", lambda: Attention("complex"), TOKENS, "q + k[query+key]", (2, 3, 0, 1), plain()
    ),
    "real and imaginary parts": Control(
        "rotated as complex numbers", lambda: Attention("complex"), TOKENS, "q + k[query+key]", (1, 0), plain()
    ),
    "heads with slopes": Control(
        "constant that differs", lambda: Attention("slopes"), TOKENS, "q[heads]", None, lambda: Attention("slope")
    ),
    "inputs": Control("input of the model", Perceptron, (FEATURES, FEATURES[:, :4].cos()), "input"),
    "data beside hidden units": Control("^data$", Perceptron, (FEATURES, FEATURES[:, :4].cos()), "last[in]"),
    "outputs": Control("output of the model", Embedded, TOKENS, "classifier"),
    "taps": Control("^tap$", Convolutional, IMAGE, "depthwise.weight[parameter]"),
    "groups of channels": Control(
        "normalised in groups of channels", Convolutional, IMAGE, "stem", (4, 1, 2, 3, 0, 5, 6, 7),
        lambda: Convolutional(1),
    ),
    "slices that overlap": Control("parameter shared in no regular way", Overlapping, FEATURES, "weight"),
}  # fmt: skip

SINGLE = {"parameter"}
"""The node of one bias or gain is alone in its group: there is nothing to exchange it with."""


def random_network(build: Callable[[], nn.Module], inputs: Any) -> tuple[NeuralGraph, PermutationTest]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    graph = NeuralGraph.from_model(model, inputs)
    return graph, PermutationTest(model, *split_inputs(model, inputs), graph)


def exchange(graph: NeuralGraph, control: Control) -> Tensor:
    """The control's permutation of nodes."""
    number = next(i for i, group in enumerate(graph.groups) if group.name.startswith(control.group))
    if control.order is None:
        return rolled(graph, number)
    permutation, start = torch.arange(graph.num_nodes), graph.group_offsets[number]
    permutation[start : start + len(control.order)] = start + torch.tensor(control.order)
    return permutation


def allowed(graph: NeuralGraph, permutation: Tensor) -> list[bool]:
    """For each node that a permutation moves, whether one of the graph's symmetries can bring it to its new place."""
    moved = (permutation != torch.arange(graph.num_nodes)).nonzero().flatten().tolist()
    found = []
    for node in moved:
        in_columns = [
            torch.isin(torch.tensor([node, int(permutation[node])]), block[:, column]).all()
            for symmetry in graph.symmetries
            for block in symmetry.units
            for column in range(block.shape[1])
        ]
        found.append(any(in_columns))
    return found


each_control = pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS.keys())


@each_control
def test_exchanging_pinned_neurons_changes_the_outputs(control) -> None:
    """The group says the reason, no symmetry makes the exchange, and it shows in the outputs.

    The control of the control: the network's own symmetries, which move other neurons, leave the outputs as they are.
    """
    graph, test = random_network(control.build, control.inputs)
    group = next(group for group in graph.groups if group.name.startswith(control.group))
    assert any(re.search(control.reason, reason) for reason in (group.pinned or "").split("; ")), group
    permutation = exchange(graph, control)
    assert len(allowed(graph, permutation)) > 1 and not any(allowed(graph, permutation))
    assert test.change(permutation) > CHANGED
    others = graph.permutation(torch.Generator().manual_seed(0))
    assert (others != torch.arange(graph.num_nodes)).any()
    assert test.change(others) < TOLERANCE


@pytest.mark.parametrize(
    "control", [c for c in CONTROLS.values() if c.without], ids=[n for n, c in CONTROLS.items() if c.without]
)
def test_the_same_neurons_are_free_without_the_reason(control) -> None:
    """The same exchange keeps the outputs of the network without the reason, and its graph knows."""
    graph, test = random_network(control.without, control.inputs)
    permutation = exchange(graph, control)
    assert test.change(permutation) < TOLERANCE
    assert len(allowed(graph, permutation)) > 1 and all(allowed(graph, permutation))


def test_pixels_of_a_flattened_image_are_no_neurons_to_exchange() -> None:
    """A channel may move with all that is read of it, its 4 pixels; pixels of one channel may not move at all."""
    architecture = next(a for a in ARCHITECTURES if a.name == "convolutional")
    model = architecture.model()
    graph = NeuralGraph.from_model(model, architecture.inputs)
    test = PermutationTest(model, *split_inputs(model, architecture.inputs), graph)
    channels = next(symmetry for symmetry in graph.symmetries if symmetry.units.shape == (1, 6, 5))
    assert test.holds(channels)
    start = graph.group_offsets[graph.groups.index(graph.group("classifier[in]"))]
    pixels = channels.units[0, 0][channels.units[0, 0] >= start]
    assert len(pixels) == 4
    permutation = torch.arange(graph.num_nodes)
    permutation[pixels] = pixels.roll(1)
    assert not any(allowed(graph, permutation))
    assert test.change(permutation) > CHANGED


def kinds(graph: NeuralGraph) -> set[str]:
    """The reasons that a graph gives for neurons that cannot move."""
    return {reason for group in graph.groups if group.pinned for reason in group.pinned.split("; ")}


@each_type
def test_every_reason_in_the_sample_has_a_control(kind, model_type) -> None:
    """A reason that is new here needs a network above that shows it, unless it means that the trace lost sight."""
    shown = re.compile("|".join(control.reason for control in CONTROLS.values()))
    unknown = kinds(sample_graph(kind, model_type)) - SINGLE
    assert not {reason for reason in unknown if not shown.search(reason) and not UNFOLLOWED.search(reason)}


@pytest.mark.parametrize("pattern", ["token", "position", "rotary", "tap", "input of", "output of", "of a table"])
def test_the_sample_has_the_common_reasons(pattern) -> None:
    """The test above is about something: tokens, positions, rotations, taps, inputs, outputs and tables are there."""
    found = set().union(*(kinds(sample_graph(*key)) for key in SAMPLE))
    assert any(re.search(pattern, reason) and not UNFOLLOWED.search(reason) for reason in found)


@each_type
def test_pinned_neurons_of_real_models_change_the_outputs(kind, model_type) -> None:
    """One group for each reason, in each type of the sample: a hundred times more than the symmetries do.

    Left out are single nodes, and neurons that were lost, of which nothing is known.
    """
    graph, model = sample_graph(kind, model_type), sample_model(kind, model_type)
    test = PermutationTest(model, *split_inputs(model, None), graph)
    rounding = max(1e-9, test.change(graph.permutation(torch.Generator().manual_seed(0))))
    tried = set(SINGLE)
    for number, group in enumerate(graph.groups):
        reason = group.pinned
        if group.size > 1 and reason is not None and reason not in tried and not UNFOLLOWED.search(reason):
            tried.add(reason)
            assert effect(test, number) > 100 * rounding, group
    assert tried > SINGLE


def effect(test: PermutationTest, number: int) -> float:
    """Change of the outputs when the neurons of a group move one further, or where a parameter is made of slices that
    these would leave, when the first two of them change places."""
    try:
        return test.change(rolled(test.graph, number))
    except ValueError:
        first = test.graph.group_offsets[number]
        permutation = torch.arange(test.graph.num_nodes)
        permutation[[first, first + 1]] = permutation[[first + 1, first]]
        return test.change(permutation)
