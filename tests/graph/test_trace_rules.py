"""Rules of the trace on small modules: what they should see, and what they must not claim."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from hf_nino.graph import NeuralGraph


class Standardised(nn.Module):
    """Kernels are centred and scaled before they are used (BiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.first, self.second):
            weight = conv.weight
            weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-3)
            x = torch.relu(nn.functional.conv2d(x, weight, conv.bias, padding=1))
        return x


class WeightNormalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Linear(6, 8))
        self.second = weight_norm(nn.Conv1d(8, 10, 3, padding=1))
        self.last = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.second(x.mT)).mT)


class ChannelsBeforeHeads(nn.Module):
    """An output map whose axes are flattened in another order than they lie in memory (einsum does that)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(12, 3, 4)) for _ in range(3))
        self.output = nn.Parameter(torch.randn(12, 3, 4))
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bih,hnd->bind", x, p) for p in (self.query, self.key, self.value))
        weights = torch.einsum("bind,bjnd->bnij", q, k).softmax(-1)
        mixed = torch.einsum("bnij,bjnd->bind", weights, v)
        return self.last(torch.einsum("bind,hnd->bih", mixed, self.output))


class InGroups(nn.Module):
    """Convolutions in groups: channels may only be exchanged with those of their group."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(6, 8, 1), nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.last = nn.Conv1d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


class ModulesForExperts(nn.Module):
    """Each token goes to one of several modules: the router's rows are told apart by the modules' numbers."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.embedding, self.router = nn.Embedding(20, 6), nn.Linear(6, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(experts)
        )
        # A router that was just made sends everything to one expert.
        nn.init.zeros_(self.router.weight)
        nn.init.constant_(self.router.bias[:1], 5.0)
        self.last = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        probabilities = self.router(x).softmax(-1)
        chosen = probabilities.argmax(-1)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen.flatten() == number)[0]
            if len(rows):
                said = expert(x.flatten(0, 1)[rows]) * probabilities.flatten(0, 1)[rows, number, None]
                total.view(-1, x.shape[-1]).index_add_(0, rows, said)
        return self.last(x + total)


class SeveralStreams(nn.Module):
    """Streams that are stacked, mixed and averaged in the end (hyper-connections)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(6, 8) for _ in range(3))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.stack([torch.relu(layer(x)) for layer in self.first]).mean(0))


class LookedUp(nn.Module):
    """What a map says for each distance is looked up by distance: its outputs are told apart by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.distances, self.last = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        said = self.distances(torch.relu(self.first(x)))
        length = x.shape[1]
        index = (torch.arange(length)[:, None] - torch.arange(length)).clamp(-3, 3) + 3
        return self.last(said.gather(-1, index.expand(len(x), -1, -1)))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, set[tuple[int, ...]]]] = {
    "standardised kernels": (Standardised, torch.randn(2, 3, 6, 6), {(1, 8, 1)}),
    "weight normalisation": (WeightNormalised, torch.randn(2, 5, 6), {(1, 8, 1), (1, 10, 1)}),
    # Within each of three heads, and the heads with 4 + 4 channels and their node.
    "channels before heads": (ChannelsBeforeHeads, torch.randn(2, 5, 12), {(3, 4, 1), (1, 12, 1), (1, 3, 9)}),
    "groups": (InGroups, torch.randn(2, 6, 9), {(2, 4, 1), (2, 6, 1)}),
    "experts as modules": (ModulesForExperts, torch.arange(16).view(2, 8), {(1, 6, 2), (1, 9, 1)}),
    "streams": (SeveralStreams, torch.randn(2, 6), {(1, 8, 1)}),
    "distances": (LookedUp, torch.randn(2, 4, 6), {(1, 8, 1)}),
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[NeuralGraph, set[tuple[int, ...]]]:
    build, inputs, expected = CASES[request.param]
    torch.manual_seed(0)
    return NeuralGraph.from_model(build(), inputs), expected


def test_symmetries_are_all_seen_and_hold(case) -> None:
    """[blocks, units, nodes] of every symmetry, all verified; every parameter is reached."""
    graph, expected = case
    assert {tuple(symmetry.units.shape) for symmetry in graph.symmetries} == expected
    assert not [line for line in graph.report if "refuted" in line or "not reached" in line], graph.report
    assert not [group for group in graph.groups if group.kind == "private"]


def test_a_compiled_part_has_the_names_of_the_part() -> None:
    """A graph names parameters as a checkpoint does, whatever wraps a submodule."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    plain = NeuralGraph.from_model(model, torch.randn(2, 4))
    model[0] = torch.compile(model[0], backend="eager")
    assert NeuralGraph.from_model(model, torch.randn(2, 4)).shapes == plain.shapes


def test_buffers_that_a_forward_pass_writes_are_put_back() -> None:
    """Building a graph leaves no trace in a model that counts its calls or keeps what it saw."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = x[0].clone()
            return self.linear(x)

    model = Counting()
    model(torch.ones(2, 4))
    NeuralGraph.from_model(model, torch.randn(2, 4))
    assert int(model.calls) == 1 and model.seen.equal(torch.ones(4))


def test_a_forward_pass_without_parameters_still_has_a_graph() -> None:
    """All parameters are private then, and the report says that they were not reached."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(3)

    graph = NeuralGraph.from_model(Constant(), torch.randn(2, 4))
    assert graph.num_parameters == 15 and not graph.symmetries
    assert all("not reached" in line for line in graph.report)
