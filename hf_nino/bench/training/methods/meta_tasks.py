"""Tiny tasks without end, to meta-train a learned optimizer on: nothing is read, all of it is drawn from a seed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class TinyTask(ABC):
    """Parameters to begin with, and a loss on a new batch at every call.

    Args:
        seed: decides everything: sizes, initial parameters, the source of the data, and the batches.
    """

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    @abstractmethod
    def initial(self) -> list[Tensor]:
        """Initial parameters, all that there are."""

    @abstractmethod
    def loss(self, parameters: Sequence[Tensor]) -> Tensor:
        """Mean cross-entropy on a new batch."""

    def gradients(self, parameters: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Loss on a new batch, and its gradient."""
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        with torch.enable_grad():
            loss = self.loss(leaves)
            return loss.item(), list(torch.autograd.grad(loss, leaves))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.random) * scale

    def whole(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def between(self, low: float, high: float) -> float:
        """Log-uniform."""
        return low * (high / low) ** float(torch.rand((), generator=self.random))


class Classification(TinyTask):
    """A perceptron learns the classes that a random one gives to Gaussian points, some of them wrong."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.inputs, self.classes, self.rows = self.whole(6, 24), self.whole(3, 10), self.whole(8, 64)
        self.widths = [self.inputs, *[self.whole(12, 32) for _ in range(self.whole(1, 2))], self.classes]
        self.activation = (torch.tanh, F.relu, F.gelu)[self.whole(0, 2)]
        self.scales = torch.exp(self.normal(self.inputs, scale=0.7))  # inputs of different sizes
        self.teacher = self.normal(self.inputs, 32), self.normal(32, self.classes)
        self.noise = self.between(0.02, 0.3)
        self.gain = self.between(0.5, 2.0)

    def initial(self) -> list[Tensor]:
        shapes = list(zip(self.widths, self.widths[1:], strict=False))
        weights = [self.normal(a, b, scale=self.gain / math.sqrt(a)) for a, b in shapes]
        return [*weights, *[torch.zeros(b) for _, b in shapes]]

    def loss(self, parameters: Sequence[Tensor]) -> Tensor:
        points = self.normal(self.rows, self.inputs)
        labels = (torch.tanh(points @ self.teacher[0] / math.sqrt(self.inputs)) @ self.teacher[1]).argmax(1)
        wrong = torch.rand(self.rows, generator=self.random) < self.noise
        others = torch.randint(0, self.classes, (self.rows,), generator=self.random)
        labels = torch.where(wrong, others, labels)
        depth = len(self.widths) - 1
        hidden = points * self.scales
        for layer, (weight, bias) in enumerate(zip(parameters[:depth], parameters[depth:], strict=True)):
            hidden = torch.addmm(bias, hidden, weight)
            if layer < depth - 1:
                hidden = self.activation(hidden)
        return F.cross_entropy(hidden, labels)


class Language(TinyTask):
    """A transformer with one block learns the text of a random source in which a token depends on the two before."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.vocabulary, self.width, self.length = self.whole(16, 48), 4 * self.whole(3, 6), self.whole(6, 12)
        self.rows = self.whole(4, 16)
        sharpness = self.between(1.0, 3.0)
        rare = -torch.arange(1, self.vocabulary + 1).log()  # Zipf's law: some tokens are rare
        near, far = self.normal(self.vocabulary, self.vocabulary), self.normal(self.vocabulary, self.vocabulary)
        self.first = rare.softmax(0)
        self.source = torch.softmax(rare + sharpness * (near[:, None] + 0.5 * far[None]), -1).cumsum(-1)
        self.scale = self.between(0.02, 0.2)

    def initial(self) -> list[Tensor]:
        d, h = self.width, 2 * self.width
        matrices = [(self.vocabulary, d), (self.length, d), (d, 3 * d), (d, d), (d, h), (h, d)]
        vectors = [torch.ones(d), torch.zeros(d)] * 3 + [torch.zeros(3 * d), torch.zeros(h)]
        return [self.normal(*shape, scale=self.scale) for shape in matrices] + [vector.clone() for vector in vectors]

    def text(self) -> Tensor:
        tokens = [torch.multinomial(self.first, self.rows, replacement=True, generator=self.random) for _ in range(2)]
        draws = torch.rand(self.length - 1, self.rows, 1, generator=self.random)
        for draw in draws:
            levels = self.source[tokens[-1], tokens[-2]]
            tokens.append(torch.searchsorted(levels, draw).squeeze(1).clamp_(max=self.vocabulary - 1))
        return torch.stack(tokens[1:], dim=1)

    def loss(self, parameters: Sequence[Tensor]) -> Tensor:
        table, places, mix, out, up, down, g1, b1, g2, b2, g3, b3, mix_bias, up_bias = parameters
        text = self.text()
        d = (self.width,)
        stream = table[text[:, :-1]] + places[: text.shape[1] - 1]
        mixed = F.layer_norm(stream, d, g1, b1) @ mix + mix_bias
        heads = mixed.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        stream = stream + seen @ out
        stream = stream + F.gelu(F.layer_norm(stream, d, g2, b2) @ up + up_bias) @ down
        logits = F.layer_norm(stream, d, g3, b3) @ table.T
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


KINDS: tuple[type[TinyTask], ...] = (Classification, Language)


@dataclass(frozen=True)
class Schedule:
    """Learning rates of a run: constant, or a warm-up of a tenth and a cosine to 0."""

    steps: int
    peak: float
    cosine: bool

    def __call__(self, step: int) -> float:
        """Of step 1, 2, .. ``steps``."""
        if not self.cosine:
            return self.peak
        warmup = max(self.steps // 10, 1)
        if step <= warmup:
            return self.peak * step / warmup
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))
