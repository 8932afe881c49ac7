"""Proof by experiment that permutations keep a model's function.

Weights are drawn at random first, because initial values of 0 and 1 make everything look symmetric, and compared in
float64 where the model allows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from .structure import EdgeType, NeuralGraph, Symmetry
from .trace import output_tensors, quiet_forward

TOLERANCE = 1e-5
"""Largest relative change of the outputs; norms in transformers compute in float32 even in a float64 model."""


class PermutationTest:
    """Compares a model's outputs under permuted random weights.

    Args:
        model: never changed; its parameters and buffers are replaced by random ones for the duration of each call.
        arguments, keywords: example inputs.
        graph: whose symmetries are tested.
        seed: of the random weights and permutations.
    """

    def __init__(
        self, model: nn.Module, arguments: tuple, keywords: Mapping[str, Any], graph: NeuralGraph, seed: int = 0
    ) -> None:
        self.model, self.graph = model, graph
        self.generator = torch.Generator().manual_seed(seed)
        for dtype in (torch.float64, torch.float32):
            self.state = random_state(model, graph, dtype, torch.Generator().manual_seed(seed))
            cast = tree_map_only(
                Tensor, lambda x, d=dtype: x.to(d) if x.is_floating_point() else x, (arguments, keywords)
            )
            self.arguments, self.keywords = cast
            self.tolerance = TOLERANCE if dtype == torch.float64 else 100 * TOLERANCE
            try:
                self.reference = self.run(self.state)
                break
            except RuntimeError:
                # Some models build float32 constants on the way and cannot run in float64.
                if dtype == torch.float32:
                    raise

    def run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The model's floating-point outputs with these parameters and buffers."""
        with quiet_forward(self.model):
            return output_tensors(functional_call(self.model, dict(state), self.arguments, dict(self.keywords)))

    def change(self, permutation: Tensor) -> float:
        """Largest change of any output under a permutation of nodes, relative to that output's largest value."""
        outputs = self.run(self.graph.permute(self.state, permutation=permutation))
        changes = [
            ((new - old).abs().max() / old.abs().max().clamp_min(1e-30)).item()
            for new, old in zip(outputs, self.reference, strict=True)
            if old.numel()
        ]
        worst = max(changes, default=math.inf)
        return math.inf if math.isnan(worst) else worst

    def holds(self, *symmetries: Symmetry) -> bool:
        """Whether a product of members of these symmetries, each moving all of its units, keeps the outputs."""
        permutation = torch.arange(self.graph.num_nodes)
        for symmetry in symmetries:
            # A random permutation of two heads is the identity half of the time, and proves nothing.
            permutation = symmetry.permutation(self.graph.num_nodes, self.generator, move_all=True)[permutation]
        try:
            return self.change(permutation) <= self.tolerance
        except ValueError:
            # The permutation leaves the slice that a parameter covers.
            return False

    def refuted(self) -> list[Symmetry]:
        """The graph's symmetries that do not hold; one forward pass when all do."""
        symmetries = list(self.graph.symmetries)
        if not symmetries or self.holds(*symmetries):
            return []
        return [symmetry for symmetry in symmetries if not self.holds(symmetry)]


def random_state(
    model: nn.Module, graph: NeuralGraph, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random parameters of a sensible scale, and the model's buffers, in one dtype.

    Matrices have entries of variance 1 / fan-in so that activations stay of order 1; vectors are scattered around 1
    when they multiply (norm gains) and around 0 otherwise.  Running statistics are random too, variances positive.
    """
    gains = {block.parameter for block in graph.blocks if block.edge_type == EdgeType.NORM}
    state = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() >= 2:
            noise /= math.sqrt(max(1, parameter.numel() // max(parameter.shape[0], 1)))
        elif name in gains:
            noise = 1 + 0.25 * noise
        else:
            noise = 0.25 * noise
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
