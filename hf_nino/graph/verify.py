"""Proof by experiment that permutations keep a model's function.

Weights are drawn at random first, because initial values of 0 and 1 make everything look symmetric, and compared in
float64 where the model allows it.

That outputs stay as they are proves nothing about neurons on which they do not depend: a dead unit, an expert that no
token was sent to.  One backward pass says how much the outputs depend on each neuron (:func:`effects`), and what does
not show is tried again with other weights, then reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

from .structure import EdgeType, NeuralGraph, Symmetry
from .trace import output_tensors, quiet_forward

logger = logging.get_logger(__name__)

TOLERANCE = 1e-5
"""Largest relative change of the outputs; norms in transformers compute in float32 even in a float64 model."""

DRAWS = ((torch.float64, 1.0), (torch.float32, 1.0), (torch.float32, 0.25))
"""Data types and scales of random weights, until outputs are finite.

float32, because a mask that is the lowest float64 becomes -inf in a softmax that computes in float32, and a row of
those NaN; smaller weights, because exponentials overflow.
"""

ATTEMPTS = 3
"""Draws of weights until every neuron has shown that it matters; each has larger weights, and biases that are shifted
further, so that units with a threshold are on."""

ENOUGH = 0.5
"""Share of the neurons that change places with each other on which outputs must depend."""

DEAD = 0.01
"""Effect of a neuron, in units of the tolerance, below which it is one on which they do not."""


class PermutationTest:
    """Compares a model's outputs under permuted random weights.

    Args:
        model: never changed; its parameters and buffers are replaced by random ones for the duration of each call.
        arguments, keywords: example inputs.
        graph: whose symmetries are tested.
        seed: of the random weights and permutations.
        attempt: number of the draw of weights, see :data:`ATTEMPTS`.

    Attributes:
        state: the random parameters, and buffers.
        reference: the outputs that belong to them.
        tolerance: relative change of the outputs that is called none.
        conclusive: whether any of the outputs is finite; else nothing can be tested.
        remarks: what :meth:`refuted` found out besides, in words.

    Raises:
        RuntimeError: the forward pass fails in float32 too.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: tuple,
        keywords: Mapping[str, Any],
        graph: NeuralGraph,
        seed: int = 0,
        attempt: int = 0,
    ) -> None:
        self.model, self.graph, self.seed = model, graph, seed
        self.remarks: list[str] = []
        self.generator = torch.Generator().manual_seed(seed + attempt)
        most = -1.0
        for dtype, scale in DRAWS:
            generator = torch.Generator().manual_seed(seed + attempt)
            state = random_state(model, graph, dtype, generator, scale * 1.5**attempt, 0.5 * attempt)
            arguments, keywords = tree_map_only(
                Tensor, lambda x, d=dtype: x.to(d) if x.is_floating_point() else x, (arguments, keywords)
            )
            try:
                reference = run(model, state, arguments, keywords)
            except RuntimeError:
                # Some models build float32 constants on the way and cannot run in float64.
                if dtype == torch.float32:
                    raise
                continue
            finite = _finite_share(reference)
            if finite > most:
                most, self.state, self.reference = finite, state, reference
                self.arguments, self.keywords = arguments, keywords
                self.tolerance = TOLERANCE if dtype == torch.float64 else 100 * TOLERANCE
            if finite == 1:
                break
        self.conclusive = most > 0

    def run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The model's floating-point outputs with these parameters and buffers."""
        return run(self.model, state, self.arguments, self.keywords)

    def change(self, permutation: Tensor) -> float:
        """Largest change of any output under a permutation of nodes, relative to that output's largest value."""
        return self._change(self.graph.permute(self.state, permutation=permutation))

    def holds(self, *symmetries: Symmetry) -> bool:
        """Whether a product of members of these symmetries, each moving all of its units, keeps the outputs."""
        try:
            return self.change(self._permutation(*symmetries)) <= self.tolerance
        except ValueError:
            # The permutation leaves the slice that a parameter covers.
            return False

    def refuted(self) -> list[Symmetry]:
        """The graph's symmetries that do not hold; one forward and one backward pass when all do.

        ``remarks`` then names what is known to hold only because outputs do not depend on it.  If outputs are never
        finite, nothing can be tested: all symmetries are returned, and ``remarks`` says so.
        """
        if not self.conclusive:
            self.remarks = ["nothing could be tested: outputs are not finite with any random weights that were tried"]
            return list(self.graph.symmetries)
        failed: list[Symmetry] = []
        unseen: dict[Symmetry, list[str]] = {symmetry: [] for symmetry in self.graph.symmetries}
        effect = torch.zeros(self.graph.num_nodes, dtype=torch.float64)
        for attempt in range(ATTEMPTS):
            test = self.again(attempt) if attempt else self
            if not unseen or not test.conclusive:
                break
            failed += test._failing(list(unseen))
            effect = effect.maximum(test.effects())
            found = {symmetry: test._unseen(symmetry, effect) for symmetry in unseen if symmetry not in failed}
            unseen = {symmetry: groups for symmetry, groups in found.items() if groups}
        self.remarks = [
            f"not shown to matter: {', '.join(groups)}, moved by {symmetry.name!r}"
            for symmetry, groups in unseen.items()
        ]
        return [symmetry for symmetry in self.graph.symmetries if symmetry in failed]

    def again(self, attempt: int) -> PermutationTest:
        """The same test with another draw of weights."""
        return PermutationTest(self.model, self.arguments, self.keywords, self.graph, self.seed, attempt)

    def effects(self) -> Tensor:
        """How much the outputs depend on each node, in units of the tolerance, float64 [N]; 0 if it is not known."""
        try:
            return effects(self.graph, self.state, self._gradients()) / self.tolerance
        except Exception as error:
            logger.info(f"{type(self.model).__name__} cannot be differentiated: {type(error).__name__}: {error}")
            return torch.zeros(self.graph.num_nodes, dtype=torch.float64)

    def _permutation(self, *symmetries: Symmetry) -> Tensor:
        permutation = torch.arange(self.graph.num_nodes)
        for symmetry in symmetries:
            # A random permutation of two heads is the identity half of the time, and proves nothing.
            permutation = symmetry.permutation(self.graph.num_nodes, self.generator, move_all=True)[permutation]
        return permutation

    def _change(self, state: Mapping[str, Tensor]) -> float:
        pairs = [(new, old) for new, old in zip(self.run(state), self.reference, strict=True) if old.numel()]
        return max((relative_change(new, old) for new, old in pairs), default=math.inf)

    def _failing(self, symmetries: Sequence[Symmetry]) -> list[Symmetry]:
        if not symmetries or self.holds(*symmetries):
            return []
        return [symmetry for symmetry in symmetries if not self.holds(symmetry)]

    def _unseen(self, symmetry: Symmetry, effect: Tensor) -> list[str]:
        """The groups that a symmetry moves neurons of, without those on which outputs depend."""
        offsets = torch.tensor(self.graph.group_offsets)
        group = torch.searchsorted(offsets, symmetry.units[0, 0], right=True) - 1
        unseen = []
        for number in group[~shown(symmetry, effect)].unique().tolist():
            units = symmetry.units[:, :, group == number]
            # No gradient at all may mean that it does not get that far: rounding, a part that runs without gradients.
            if effect[units].any() or not self._tearing_shows(Symmetry(symmetry.name, units)):
                unseen.append(self.graph.groups[number].name)
        return unseen

    def _tearing_shows(self, symmetry: Symmetry) -> bool:
        """Whether outputs change when a symmetry permutes one parameter alone and leaves the others as they are."""
        try:
            permuted = self.graph.permute(self.state, permutation=self._permutation(symmetry))
        except ValueError:
            return False
        names = {b.parameter for b in self.graph.blocks if not permuted[b.parameter].equal(self.state[b.parameter])}
        return any(self._change({**self.state, name: permuted[name]}) > self.tolerance for name in sorted(names))

    def _gradients(self) -> dict[str, Tensor | None]:
        """Of a random sum of the outputs with respect to the parameters, in units of the outputs' largest values."""
        names = {name for name, _ in self.model.named_parameters()} & {block.parameter for block in self.graph.blocks}
        leaves = {name: self.state[name].requires_grad_() for name in names if self.state[name].is_floating_point()}
        try:
            outputs = run(self.model, self.state, self.arguments, self.keywords, gradients=True)
            sums = [_random_sum(output, self.generator) for output in outputs if output.requires_grad]
            found = torch.autograd.grad(sum(sums), [*leaves.values()], allow_unused=True) if sums else ()
        finally:
            for leaf in leaves.values():
                leaf.requires_grad_(False)
        return dict.fromkeys(leaves) | dict(zip(leaves, found, strict=False))


def run(
    model: nn.Module,
    state: Mapping[str, Tensor],
    arguments: tuple,
    keywords: Mapping[str, Any],
    gradients: bool = False,
) -> list[Tensor]:
    """A model's floating-point outputs with these parameters and buffers."""
    with quiet_forward(model), torch.set_grad_enabled(gradients):
        return output_tensors(functional_call(model, dict(state), arguments, dict(keywords)))


def relative_change(new: Tensor, old: Tensor) -> float:
    """Largest change, relative to the largest finite value; infinite if NaN or infinities appear, vanish or move."""
    finite = old.isfinite()
    if not finite.equal(new.isfinite()):
        return math.inf
    if finite.all():
        return ((new - old).abs().max() / old.abs().max().clamp_min(1e-30)).item()
    if not finite.any():
        return 0.0
    return relative_change(new[finite], old[finite])


def effects(graph: NeuralGraph, state: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> Tensor:
    """How much a function depends on each node, float64 [N]; infinite for nodes on which no parameter hangs.

    To first order, the root mean square of how much the function changes when the parameters between a node and the
    other side of one edge block get other random values, scattered as theirs are; the largest over its blocks.

    Args:
        state: the parameters.
        gradients: of the function, by name; ``None`` is none at all, and blocks of other parameters are left out.
    """
    found = torch.full((graph.num_nodes,), -math.inf, dtype=torch.float64)
    for block in graph.blocks:
        if block.parameter not in gradients:
            continue
        gradient = gradients[block.parameter]
        if gradient is None:
            gradient = torch.zeros_like(state[block.parameter])
        # Rows that the model itself makes NaN have such gradients; they are not compared.
        squares = block.view(gradient).nan_to_num().double().square()
        scatter = block.view(state[block.parameter]).double().std(correction=0)
        for nodes, others in ((block.source, (1, 2)), (block.target, (0, 2))):
            effect = scatter * squares.sum(others).sqrt()
            found.scatter_reduce_(0, graph.node_index(nodes), effect.cpu(), "amax")
    return found.where(found > -math.inf, math.inf)


def shown(symmetry: Symmetry, effect: Tensor) -> Tensor:
    """Whether a function depends on what a symmetry moves, for each of the nodes of its units, bool [nodes].

    In each block, the nodes that change places must have an effect together, and enough of them any at all.

    Args:
        effect: how much the function depends on each node, in units of what is called no change; float64 [N].
    """
    effect = effect[symmetry.units]
    together = effect.square().sum(dim=1) > 1
    alive = (effect > DEAD).double().mean(dim=1) >= ENOUGH
    return (together & alive).all(dim=0)


def _finite_share(outputs: Sequence[Tensor]) -> float:
    count = sum(output.numel() for output in outputs)
    return sum(int(output.isfinite().sum()) for output in outputs) / max(1, count)


def _random_sum(output: Tensor, generator: torch.Generator) -> Tensor:
    """Of the finite values of one output, so that its size is that of a typical change of one of them."""
    values = output[output.isfinite()]
    factors = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values)
    return (factors * values).sum() / (values.abs().max().detach().clamp_min(1e-30) * max(1, len(values)) ** 0.5)


def random_state(
    model: nn.Module,
    graph: NeuralGraph,
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float = 1.0,
    shift: float = 0.0,
) -> dict[str, Tensor]:
    """Random parameters of a sensible scale, and the model's buffers, in one dtype.

    Matrices have entries of variance 1 / fan-in so that activations stay of order 1; vectors are scattered around 1
    when they multiply (norm gains) and around 0 otherwise.  Running statistics are random too, variances positive.

    Args:
        scale: multiplies the entries of matrices.
        shift: is added to vectors that do not multiply.
    """
    gains = {block.parameter for block in graph.blocks if block.edge_type == EdgeType.NORM}
    kernels = {block.parameter for block in graph.blocks if block.edge_type == EdgeType.CONVOLUTION}
    state = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() >= 2:
            # More axes than two are a kernel's taps, or there is a matrix for each expert.
            rows = parameter.shape[: 1 if name in kernels or parameter.dim() > 3 else -1]
            noise *= scale / math.sqrt(max(1, parameter.numel() // max(1, math.prod(rows))))
        elif name in gains:
            noise = 1 + 0.25 * noise
        else:
            noise = shift + 0.25 * noise
        state[name] = noise.to(parameter.device, dtype if parameter.is_floating_point() else parameter.dtype)
    on_edges = {block.parameter for block in graph.blocks}
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point():
            state[name] = buffer
        elif name in gains:
            state[name] = (1 + torch.rand(buffer.shape, generator=generator)).to(buffer.device, dtype)
        elif name in on_edges:
            state[name] = (0.25 * torch.randn(buffer.shape, generator=generator)).to(buffer.device, dtype)
        else:
            state[name] = buffer.to(dtype)
    return state
