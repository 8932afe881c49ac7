"""A module of one's own has a graph whenever it runs, and one clear error when it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_nino.graph import NeuralGraph
from hf_nino.graph.inputs import split_inputs
from hf_nino.graph.verify import TOLERANCE, PermutationTest

X = torch.linspace(-3, 3, 2 * 5 * 7).sin().view(2, 5, 7)
TOKENS = torch.arange(10).view(2, 5)


class Net(nn.Module):
    """A function of the module and its inputs, with parts of any kind: modules, parameters, buffers."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.function(self, *arguments, **keywords)


def hidden(**parts: Any) -> dict[str, Any]:
    """Parts with a first layer of 6 units and a last one of 3."""
    return {"first": nn.Linear(7, 6), "last": nn.Linear(6, 3), **parts}


def heads(x: Tensor, count: int, width: int) -> Tensor:
    return x.unflatten(-1, (count, width)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attended(net: Net, x: Tensor, key_heads: int = 2, **options: Any) -> Tensor:
    query, key, value = heads(net.q(x), 4, 2), heads(net.k(x), key_heads, 2), heads(net.v(x), key_heads, 2)
    return net.o(merged(F.scaled_dot_product_attention(query, key, value, **options)))


@dataclass(frozen=True)
class Case:
    """A module that runs.

    Args:
        build: makes it, from the global random state.
        inputs: example inputs.
        symmetries: shapes of permutations that must be found, at least.
        unused: beginnings of the names of parameters that the forward pass does not use.
    """

    build: Callable[[], nn.Module]
    inputs: Any = X
    symmetries: tuple[tuple[int, int, int], ...] = ()
    unused: tuple[str, ...] = ()


UNITS = ((1, 6, 1),)
CASES = {
    "a branch that depends on the data": Case(
        lambda: Net(
            lambda s, x: s.last(s.first(x).relu()) if x.sum() < 9 else s.other(x), **hidden(other=nn.Linear(7, 3))
        ),
        symmetries=UNITS,
        unused=("other",),
    ),
    "a loop that depends on the data": Case(
        lambda: Net(
            lambda s, x: s.last(sum(s.first(x) * i for i in range(int(x.abs().max().ceil()) + 1))), **hidden()
        ),
        symmetries=UNITS,
    ),
    "numbers as parameters": Case(
        lambda: Net(
            lambda s, x: s.last((s.first(x) * s.scale.exp()).relu()) + s.shift,
            **hidden(scale=nn.Parameter(torch.tensor(0.5)), shift=nn.Parameter(torch.tensor(1.0))),
        ),
        symmetries=UNITS,
    ),
    "an empty parameter": Case(
        lambda: Net(lambda s, x: s.last(s.first(x).relu()), **hidden(empty=nn.Parameter(torch.empty(0, 3)))),
        symmetries=UNITS,
    ),
    "a complex buffer": Case(
        lambda: Net(
            lambda s, x: s.last(
                torch.view_as_real(torch.view_as_complex(s.first(x).view(2, 5, 3, 2)) * s.c).flatten(2)
            ),
            **hidden(c=torch.polar(torch.ones(3), torch.arange(3.0))),
        )
    ),
    "a complex parameter": Case(
        lambda: Net(
            lambda s, x: s.last((s.first(x) * s.phase).abs()),
            **hidden(phase=nn.Parameter(torch.randn(6, dtype=torch.complex64))),
        )
    ),
    "integer parameters": Case(
        lambda: Net(
            lambda s, x: s.last(s.first(x).relu()) * s.count,
            **hidden(count=nn.Parameter(torch.tensor([1, 2, 3]), requires_grad=False)),
        ),
        symmetries=UNITS,
    ),
    "a sparse parameter": Case(
        lambda: Net(
            lambda s, x: s.last(torch.sparse.mm(s.first, x[0].T).T.relu()),
            first=nn.Parameter(torch.eye(7)[:6].to_sparse()),
            last=nn.Linear(6, 3),
        )
    ),
    "a sparse buffer": Case(
        lambda: Net(
            lambda s, x: s.last(torch.sparse.mm(s.neighbours, s.first(x[0]).relu())),
            **hidden(neighbours=torch.eye(5).roll(1, 0).to_sparse()),
        )
    ),
    "einsum": Case(
        lambda: Net(
            lambda s, x: torch.einsum("btho,hod->btd", torch.einsum("bti,iho->btho", x, s.up).tanh(), s.down),
            up=nn.Parameter(torch.randn(7, 2, 3)),
            down=nn.Parameter(torch.randn(2, 3, 4)),
        ),
        symmetries=UNITS,
    ),
    "scaled dot product attention": Case(
        lambda: Net(
            lambda s, x: attended(s, x, 4, is_causal=True),
            q=nn.Linear(7, 8),
            k=nn.Linear(7, 8),
            v=nn.Linear(7, 8),
            o=nn.Linear(8, 3),
        ),
        symmetries=((4, 2, 1), (4, 2, 1), (1, 4, 5)),
    ),
    "grouped scaled dot product attention": Case(
        lambda: Net(
            lambda s, x: attended(s, x, 2, enable_gqa=True),
            q=nn.Linear(7, 8),
            k=nn.Linear(7, 4),
            v=nn.Linear(7, 4),
            o=nn.Linear(8, 3),
        ),
        symmetries=((2, 2, 3), (2, 2, 3), (2, 2, 5), (1, 2, 14)),
    ),
    "nn.MultiheadAttention": Case(
        lambda: Net(
            lambda s, x: s.last(s.attention(*[s.first(x)] * 3, need_weights=False)[0]),
            first=nn.Linear(7, 8),
            attention=nn.MultiheadAttention(8, 2, batch_first=True),
            last=nn.Linear(8, 3),
        ),
        symmetries=((1, 8, 1), (2, 4, 1), (2, 4, 1), (1, 8, 1), (1, 2, 9)),
    ),
    "nn.MultiheadAttention with weights and learned keys": Case(
        lambda: Net(
            lambda s, x: s.attention(*[s.first(x)] * 3),
            first=nn.Linear(7, 8),
            attention=nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True),
        ),
        symmetries=((1, 8, 1),),
    ),
    "nn.TransformerEncoderLayer": Case(
        lambda: Net(
            lambda s, x: s.last(s.layer(s.first(x))),
            first=nn.Linear(7, 8),
            layer=nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
            last=nn.Linear(8, 3),
        ),
        symmetries=((1, 8, 3), (2, 4, 1), (2, 4, 1), (1, 12, 1), (1, 2, 9)),
    ),
    "nn.TransformerDecoderLayer": Case(
        lambda: Net(
            lambda s, x: s.last(s.layer(s.first(x), s.first(x).tanh())),
            first=nn.Linear(7, 8),
            layer=nn.TransformerDecoderLayer(8, 2, 12, batch_first=True),
            last=nn.Linear(8, 3),
        ),
        symmetries=((1, 12, 1),),
    ),
    "nn.LSTM": Case(
        lambda: Net(
            lambda s, x: s.last(s.layer(x)[0]),
            layer=nn.LSTM(7, 6, num_layers=2, bidirectional=True, batch_first=True),
            last=nn.Linear(12, 3),
        )
    ),
    "nn.GRU": Case(
        lambda: Net(lambda s, x: s.last(s.layer(x)[0]), layer=nn.GRU(7, 6, batch_first=True), last=nn.Linear(6, 3))
    ),
    "nn.RNN": Case(
        lambda: Net(lambda s, x: s.last(s.layer(x)[0]), layer=nn.RNN(7, 6, batch_first=True), last=nn.Linear(6, 3))
    ),
    "nn.LSTMCell": Case(
        lambda: Net(lambda s, x: s.last(s.cell(x[0])[0]), cell=nn.LSTMCell(7, 6), last=nn.Linear(6, 3))
    ),
    "nn.Bilinear": Case(
        lambda: Net(lambda s, x: s.last(s.pair(s.first(x), x).relu()), **hidden(pair=nn.Bilinear(6, 7, 6)))
    ),
    "nn.EmbeddingBag": Case(
        lambda: Net(lambda s, x: s.last(s.first(s.bag(x)).relu()), **hidden(bag=nn.EmbeddingBag(20, 7))),
        TOKENS,
        symmetries=UNITS,
    ),
    "nn.PReLU": Case(lambda: Net(lambda s, x: s.last(s.act(s.first(x[0]))), **hidden(act=nn.PReLU(6)))),
    "weight norm": Case(
        lambda: Net(
            lambda s, x: s.last(s.first(x).relu()),
            **hidden(first=nn.utils.parametrizations.weight_norm(nn.Linear(7, 6))),
        ),
        symmetries=UNITS,
    ),
    "spectral norm": Case(
        lambda: Net(
            lambda s, x: s.last(s.first(x).relu()),
            **hidden(first=nn.utils.parametrizations.spectral_norm(nn.Linear(7, 6))),
        )
    ),
    "an orthogonal matrix": Case(
        lambda: Net(
            lambda s, x: s.last(s.middle(s.first(x).relu())),
            **hidden(middle=nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))),
        )
    ),
    "weights that a network makes": Case(
        lambda: Net(lambda s, x: torch.bmm(x, s.maker(x.mean(1)).view(2, 7, 3)), maker=nn.Linear(7, 21))
    ),
    "a gain and a bias alone": Case(
        lambda: Net(
            lambda s, x: x * s.gain + s.bias, gain=nn.Parameter(torch.randn(7)), bias=nn.Parameter(torch.randn(7))
        )
    ),
    "a Fourier transform": Case(lambda: Net(lambda s, x: s.last(torch.fft.rfft(s.first(x), dim=1).abs()), **hidden())),
    "grouped convolution": Case(
        lambda: Net(
            lambda s, x: s.last(s.groups(s.first(x).relu().transpose(1, 2)).transpose(1, 2)),
            **hidden(groups=nn.Conv1d(6, 6, 3, groups=2)),
        )
    ),
    "vmap": Case(
        lambda: Net(lambda s, x: torch.vmap(lambda y: s.last(s.first(y).relu()))(x), **hidden()), symmetries=UNITS
    ),
    "activation checkpoints": Case(
        lambda: Net(
            lambda s, x: s.last(
                torch.utils.checkpoint.checkpoint(lambda y: s.first(y).relu(), x, use_reentrant=False)
            ),
            **hidden(),
        ),
        symmetries=UNITS,
    ),
    "operators in place": Case(
        lambda: Net(lambda s, x: s.last(s.first(x).relu_().add_(1)), **hidden()), symmetries=UNITS
    ),
    "a loss as output": Case(
        lambda: Net(lambda s, x: s.last(s.first(x).relu()).square().mean(), **hidden()), symmetries=UNITS
    ),
    "outputs in containers": Case(
        lambda: Net(lambda s, x: {"a": [s.last(s.first(x).relu())], "n": 3, "t": ("text", None)}, **hidden()),
        symmetries=UNITS,
    ),
    "several inputs by name": Case(
        lambda: Net(lambda s, x, scale=1.0, more=None: s.last((s.first(x) * scale + more).relu()), **hidden()),
        {"x": X, "more": X[..., :1], "scale": 2.0},
        symmetries=UNITS,
    ),
    "several inputs in order": Case(
        lambda: Net(lambda s, x, y: s.last((s.first(x) + s.first(y)).relu()), **hidden()),
        (X, X.cos()),
        symmetries=UNITS,
    ),
}


def network(case: Case) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.build()


@pytest.mark.filterwarnings("ignore:.*torch_sparse:UserWarning", "ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_module_that_runs_has_a_graph(case) -> None:
    """Every trainable number has an edge, what is claimed to be interchangeable is, and what is unused is reported."""
    model = network(case)
    graph = NeuralGraph.from_model(model, case.inputs)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point() and p.numel()}
    assert set(graph.parameter_names) == set(trained)
    assert graph.num_parameters == sum(parameter.numel() for parameter in trained.values())
    found = [tuple(symmetry.units.shape) for symmetry in graph.symmetries]
    for shape in set(case.symmetries):
        assert found.count(shape) >= case.symmetries.count(shape), found
    permutation = graph.permutation(torch.Generator().manual_seed(0))
    if graph.symmetries:
        test = PermutationTest(model, *split_inputs(model, case.inputs), graph)
        assert test.change(permutation) < 100 * TOLERANCE
    assert not any("refuted" in line for line in graph.report)
    for beginning in case.unused:
        names = [name for name in trained if name.startswith(beginning)]
        assert names and all(any(line.startswith(f"{name}: ") for line in graph.report) for name in names)


@pytest.mark.parametrize("output", ["none", "text", "number", "integers"])
def test_without_a_tensor_to_compare_nothing_is_claimed(output) -> None:
    """A forward pass that returns nothing, text, a Python number or the largest class proves no permutation."""
    pick = {
        "none": lambda y: None,
        "text": lambda y: str(y.sum()),
        "number": lambda y: y.sum().item(),
        "integers": lambda y: y.argmax(-1),
    }[output]
    model = Net(lambda s, x: pick(s.last(s.first(x).relu())), **hidden())
    graph = NeuralGraph.from_model(model, X)
    assert graph.symmetries == ()
    assert graph.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert graph.report


def broken(error: Exception) -> Callable[..., Any]:
    def forward(*_: Any) -> None:
        raise error

    return forward


FAILURES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "no inputs": (lambda: Net(lambda s, x: s.first(x), **hidden()), None, "`example_inputs` must be given for a Net"),
    "an input is missing": (
        lambda: Net(lambda s, x, y: s.first(x) + y, **hidden()),
        X,
        "`model` must run on `example_inputs`.* Net failed with TypeError: .*missing 1 required positional argument",
    ),
    "an input that it does not take": (
        lambda: Net(lambda s, x: s.first(x), **hidden()),
        {"x": X, "z": X},
        "`model` must run on `example_inputs`.* Net failed with TypeError: .*unexpected keyword argument 'z'",
    ),
    "an input of another shape": (
        lambda: Net(lambda s, x: s.first(x), **hidden()),
        X[..., :3],
        "`model` must run on `example_inputs`.* Net failed with RuntimeError: mat1 and mat2",
    ),
    "an error of its own": (
        lambda: Net(broken(ZeroDivisionError("not today")), **hidden()),
        X,
        "`model` must run on `example_inputs`.* Net failed with ZeroDivisionError: not today",
    ),
    "not implemented": (
        lambda: Net(broken(NotImplementedError()), **hidden()),
        X,
        "`model` must run on `example_inputs`.* Net failed with NotImplementedError",
    ),
    "gradients inside the forward pass": (
        lambda: Net(lambda s, x: torch.autograd.grad(s.first(x).sum(), s.first.weight)[0], **hidden()),
        X,
        "`model` must run on `example_inputs`.* Net failed with RuntimeError: .* does not require grad",
    ),
    "nothing to train": (
        lambda: Net(lambda s, x: s.first(x), **hidden()).requires_grad_(False),
        X,
        "`model` must have a trainable floating-point parameter, but Net has none",
    ),
    "no parameters": (nn.Identity, X, "`model` must have a trainable floating-point parameter, but Identity has none"),
    "lazy parameters": (
        lambda: Net(lambda s, x: s.first(x), first=nn.LazyLinear(6)),
        X,
        "`model` must know the shapes of its parameters, but 'first.weight' is lazy .* run one forward pass",
    ),
    "TorchScript": (
        lambda: torch.jit.trace(nn.Linear(7, 3), X),
        X,
        "`model` must be a plain module, got a TorchScript one",
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(("build", "inputs", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_a_module_that_does_not_run_is_refused_with_one_clear_error(build, inputs, message) -> None:
    """A ValueError that names the argument and keeps the first error; the model stays as it was."""
    model = build()
    model.train()
    with pytest.raises(ValueError, match=message) as caught:
        NeuralGraph.from_model(model, inputs)
    if "failed with" in str(caught.value):
        assert f"{type(caught.value.__cause__).__name__}" in str(caught.value)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
