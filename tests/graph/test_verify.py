"""The permutation test finds wrong proposals, and the graph that remains is right."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from architectures import ARCHITECTURES
from sample import CLEAN, SAMPLE, sample_graph, sample_model
from torch import Tensor, nn

from hf_nino.graph import NeuralGraph, Symmetry
from hf_nino.graph.build import verified
from hf_nino.graph.inputs import split_inputs
from hf_nino.graph.tiny import tiny_model
from hf_nino.graph.verify import TOLERANCE, PermutationTest, effects, random_state, relative_change, shown


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "convolutional"])
def test_a_wrong_symmetry_is_refuted_and_nothing_else(name: str) -> None:
    """Added to the right ones, a permutation of pinned neurons is the only one to fall."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = architecture.model()
    graph = NeuralGraph.from_model(model, architecture.inputs)
    number = next(i for i, g in enumerate(graph.groups) if g.kind in ("row", "input") and g.size > 1)
    start = graph.group_offsets[number]
    units = torch.arange(start, start + graph.groups[number].size).view(1, -1, 1)
    wrong = Symmetry(f"neurons of {graph.groups[number].name}", units)
    proposed = dataclasses.replace(graph, symmetries=(*graph.symmetries, wrong))
    test = PermutationTest(model, *split_inputs(model, architecture.inputs), proposed)
    assert test.refuted() == [wrong]

    result = verified(proposed, test)
    assert [s.name for s in result.symmetries] == [s.name for s in graph.symmetries]
    assert any(line.startswith(f"refuted: {wrong.name}") for line in result.report)
    private = [group for group in result.groups if group.kind == "private"]
    assert private and sum(group.size for group in private) == graph.groups[number].size
    again = PermutationTest(model, *split_inputs(model, architecture.inputs), result)
    assert again.refuted() == []


def test_a_refuted_head_symmetry_only_loses_that_symmetry() -> None:
    """Query heads of different key/value heads may not be exchanged, but no group has to be taken apart for it."""
    architecture = next(a for a in ARCHITECTURES if a.name == "llama-grouped")
    model = architecture.model()
    graph = NeuralGraph.from_model(model)
    heads = next(s for s in graph.symmetries if s.name.startswith("heads of"))
    wrong = Symmetry(heads.name, heads.units.reshape(1, -1, heads.units.shape[-1]))
    proposed = dataclasses.replace(graph, symmetries=tuple(wrong if s is heads else s for s in graph.symmetries))
    result = verified(proposed, PermutationTest(model, *split_inputs(model, None), proposed))
    assert len(result.symmetries) == len(graph.symmetries) - 1
    assert result.groups == graph.groups and result.blocks == graph.blocks


def test_a_graph_with_private_neurons_covers_every_parameter() -> None:
    """Taking groups apart keeps every element on one edge: construction validates it, and edges stay as many."""
    architecture = next(a for a in ARCHITECTURES if a.name == "perceptron")
    model = architecture.model()
    graph = NeuralGraph.from_model(model, architecture.inputs)
    wrong = Symmetry("neurons of input", torch.arange(7).view(1, 7, 1))
    proposed = dataclasses.replace(graph, symmetries=(*graph.symmetries, wrong))
    result = verified(proposed, PermutationTest(model, *split_inputs(model, architecture.inputs), proposed))
    assert result.num_parameters == graph.num_parameters
    assert sum(block.edges for block in result.blocks) == sum(block.edges for block in graph.blocks)


FEATURES = torch.linspace(-1, 1, 14).view(2, 7)


class Branches(nn.Module):
    """Two hidden layers side by side, of which the second is treated in some way before it is added."""

    def __init__(self, second: str = "used") -> None:
        super().__init__()
        self.kind = second
        self.first, self.first_out = nn.Linear(7, 16), nn.Linear(16, 5)
        self.second, self.second_out = nn.Linear(7, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first_out(torch.tanh(self.first(x)))
        with torch.set_grad_enabled(torch.is_grad_enabled() and "not differentiated" not in self.kind):
            hidden = self.second(x)
            hidden = torch.relu(hidden - 1.5) if "threshold" in self.kind else torch.tanh(hidden)
            z = self.second_out(hidden)
        if "not used" in self.kind:
            z = 0 * z
        if "NaN" in self.kind:
            z = z.index_fill(0, torch.tensor([0, 1] if "all NaN" in self.kind else [1]), math.nan)
        return y + z


def permutation_test(model: nn.Module, inputs=None) -> PermutationTest:
    graph = NeuralGraph.from_model(model, inputs, verify=False)
    return PermutationTest(model, *split_inputs(model, inputs), graph)


@pytest.mark.parametrize("kind", ["used", "threshold", "not differentiated", "one row NaN"])
def test_what_matters_is_verified_without_remarks(kind: str) -> None:
    """Also units that are off at first, parts that run without gradients, and outputs that are NaN in some rows."""
    test = permutation_test(Branches(kind), FEATURES)
    assert test.conclusive and [s.units.shape[1] for s in test.graph.symmetries] == [16, 12]
    assert test.refuted() == [] and test.remarks == []
    broken = test.graph.symmetries[1].units.clone()
    broken[0, :2, 0] = broken[0, :2, 0] - 3  # two neurons of another group, or of another place
    assert not test.holds(dataclasses.replace(test.graph.symmetries[1], units=broken))


def test_a_threshold_needs_a_second_draw() -> None:
    """The control of the test above: with the first weights, all units of the second branch are off."""
    test = permutation_test(Branches("threshold"), FEATURES)
    first, second = test.graph.symmetries
    assert shown(first, test.effects()).all() and not shown(second, test.effects()).any()
    later = test.again(1).effects().maximum(test.again(2).effects())
    assert shown(second, later).all()


@pytest.mark.parametrize("kind", ["not used", "not used, not differentiated"])
def test_what_does_not_matter_is_not_refuted_but_reported(kind: str) -> None:
    """A branch times 0 has every symmetry: the test would accept any of it, and says so."""
    test = permutation_test(Branches(kind), FEATURES)
    assert test.refuted() == []
    assert test.remarks == ["not shown to matter: second, moved by 'neurons of second'"]
    nonsense = dataclasses.replace(test.graph.symmetries[1], units=test.graph.symmetries[1].units[:, :2])
    model = Branches(kind)
    torn = {**test.state, "second.weight": test.state["second.weight"].flip(0)}
    assert test.holds(nonsense) and relative_change(test.run(torn)[0], test.reference[0]) == 0
    report = verified(test.graph, permutation_test(model, FEATURES)).report
    assert "not shown to matter: second, moved by 'neurons of second'" in report


def test_without_a_finite_output_nothing_is_called_verified() -> None:
    """One line says so; no group is taken apart for it."""
    test = permutation_test(Branches("all NaN"), FEATURES)
    assert not test.conclusive and test.refuted() == list(test.graph.symmetries) != []
    assert len(test.remarks) == 1 and test.remarks[0].startswith("nothing could be tested")
    graph = NeuralGraph.from_model(Branches("all NaN"), FEATURES)
    assert graph.symmetries == () and graph.groups == test.graph.groups
    assert [line for line in graph.report if "could be tested" in line] == test.remarks
    assert not any(line.startswith("refuted") for line in graph.report)


def test_changes_are_compared_where_numbers_are_finite() -> None:
    """NaN must stay where it is; the rest is compared to the largest finite value."""
    old = torch.tensor([math.nan, 4.0, -2.0, math.inf])
    assert relative_change(old, old) == 0
    assert relative_change(torch.tensor([math.nan, 4.0, -1.0, math.inf]), old) == 0.25
    assert relative_change(torch.tensor([1.0, 4.0, -2.0, math.inf]), old) == math.inf
    assert relative_change(torch.tensor([4.0, math.nan, -2.0, math.inf]), old) == math.inf
    assert relative_change(torch.tensor([3.0, 5.0]), torch.tensor([4.0, 4.0])) == 0.25


class Masked(nn.Module):
    """A query that may attend to nothing, under a mask that is the lowest number of the weights' type."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(7, 6), nn.Linear(7, 6), nn.Linear(7, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        mask = torch.tensor([[1, 0], [1, 1]]) * torch.finfo(scores.dtype).min
        weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(x.dtype)
        return self.out(weights @ self.value(x))


def test_float32_is_tried_where_float64_gives_nan() -> None:
    """A mask of the lowest float64 is -inf in a softmax of float32, and a row of those NaN; in float32 it is not."""
    test = permutation_test(Masked(), FEATURES)
    assert test.tolerance > TOLERANCE and all(output.isfinite().all() for output in test.reference)
    assert len(test.graph.symmetries) >= 2 and test.refuted() == [] and test.remarks == []
    wide = {name: tensor.double() for name, tensor in test.state.items()}
    with torch.no_grad():
        output = torch.func.functional_call(Masked(), wide, FEATURES.double())
    assert output.isnan().any()


def test_blt_is_verified_and_its_patcher_known_not_to_matter() -> None:
    """Its masks are of that kind; and its patcher only decides where patches end, which no small change changes."""
    test = permutation_test(tiny_model("AutoModelForCausalLM", "blt"))
    assert len(test.graph.symmetries) > 40 and test.refuted() == []
    assert 0 < len(test.remarks) < 20 and any("model.patcher.lm_head" in line for line in test.remarks)
    assert not any("local_decoder" in line for line in test.remarks)


def test_experts_of_a_last_layer_that_no_token_needs_are_reported() -> None:
    """A classifier reads the last token: of the last layer's 4 experts it can know 2.  A language model reads all."""
    test = permutation_test(tiny_model("AutoModelForSequenceClassification", "mixtral"))
    assert test.refuted() == []
    experts = "model.layers.1.mlp.experts"
    assert test.remarks == [f"not shown to matter: {experts}, moved by 'neurons of {experts}'"]
    test = permutation_test(tiny_model("AutoModelForCausalLM", "mixtral"))
    assert test.refuted() == [] and test.remarks == []


@pytest.mark.parametrize(("kind", "model_type"), [key for key, known in SAMPLE.items() if known == CLEAN])
def test_what_is_verified_in_the_sample_matters(kind: str, model_type: str) -> None:
    """All that the proposed permutations move shows in the outputs of diverse types."""
    model, graph = sample_model(kind, model_type), sample_graph(kind, model_type)
    test = PermutationTest(model, *split_inputs(model, None), graph)
    assert test.refuted() == [] and test.remarks == []


def test_effects_are_what_random_parameters_do() -> None:
    """On each node of a linear map, the root mean square of the changes that other weights and biases make."""
    model = nn.Linear(7, 3).double()
    graph = NeuralGraph.from_model(model, (FEATURES.double(),), verify=False)
    generator = torch.Generator().manual_seed(0)
    state = random_state(model, graph, torch.float64, generator)
    state["weight"][0] *= 0  # scatter is that of the whole block
    factors = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    found = effects(graph, state, {"weight": factors.T @ FEATURES.double(), "bias": factors.sum(0)})

    noise = torch.randn(4000, 3, 7, dtype=torch.float64, generator=generator) * state["weight"].std(correction=0)
    changes = torch.einsum("nij,bj,bi->nij", noise, FEATURES.double(), factors)
    by_group = dict(zip((g.name for g in graph.groups), found.split([g.size for g in graph.groups]), strict=True))
    inputs = changes.sum(1).square().mean(0).sqrt()
    torch.testing.assert_close(by_group["input"], inputs, rtol=0.1, atol=0)
    biases = factors.sum(0).abs() * state["bias"].std(correction=0)
    outputs = changes.sum(2).square().mean(0).sqrt().maximum(biases)
    output = next(values for name, values in by_group.items() if len(values) == 3 and name != "input")
    torch.testing.assert_close(output, outputs, rtol=0.1, atol=0)


def test_random_matrices_have_the_variance_of_their_fan_in() -> None:
    """Each expert's matrix has its own fan-in, and a kernel that of all its taps."""
    model = tiny_model("AutoModelForCausalLM", "mixtral")
    graph = NeuralGraph.from_model(model, verify=False)
    state = random_state(model, graph, torch.float64, torch.Generator().manual_seed(0))
    experts = state["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.dim() == 3 and experts.var() * experts.shape[2] == pytest.approx(1, rel=0.1)
    convolution = next(a for a in ARCHITECTURES if a.name == "convolutional")
    model = convolution.model()
    graph = NeuralGraph.from_model(model, convolution.inputs, verify=False)
    kernel = random_state(model, graph, torch.float64, torch.Generator().manual_seed(0))["wide.weight"]
    assert kernel.dim() == 4 and kernel.var() * kernel[0].numel() == pytest.approx(1, rel=0.1)
