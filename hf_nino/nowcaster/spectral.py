"""Momentum across jumps with equal weight for every direction of a matrix, as far as training agrees with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .displacements import DisplacementNowcaster
from .owners import from_owners, rounds, to_owners
from .rules import check_number, check_whole
from .shards import Shards
from .whitening import cosine, whitened, whiteness_of_noise, whitening_dtype, whitening_operations

# Share of the whiteness of noise above which a matrix counts as white.  In runs of a small GPT-2 (width 64) momenta of
# AdamW's moves had 0.3 to 0.92 of it, and those of Muon's 0.95 to 1.06.
_WHITE = 0.95
# Operations of matrix products that take as long as all else that is done with one element, about: on a CPU with
# instructions for products in bfloat16, six times as many of these.
_OPERATIONS = {torch.float32: 500, torch.bfloat16: 3000}


class SpectralNowcaster(DisplacementNowcaster):
    """Continues along the momentum of past displacements, whitened, at a length that feedback decides.

    For every parameter tensor, with the anchor w, the state w~ that the base optimizer reached since then, and the
    direction m of its last jump::

        d = w~ - w
        t = target * (1 + restraint * g)  if b is white, else target
        g = clip(g * exp(rate * (cos(d, m) - t)), 1 / 20, max_gain)
        b = momentum * b + (1 - momentum) * d
        m = |b| * polar(b) / sqrt(rank)          (matrices and kernels; else m = b)
        new = w~ + g * m
        new = new * (1 - (1 - growth) * (1 - |w~| / |new|))       (matrices and kernels; if |new| > |w~|)

    * ``polar(b) = U V'`` for ``b = U S V'``: all directions in which a matrix moves get equal weight, where the base
      optimizer favours a few.  Muon (Jordan et al., 2024) and Shampoo do so with gradients; here it is done with the
      optimizer's own moves, once every ``period`` steps instead of in each.  It commutes with every permutation of
      neurons.  Kernels are taken as matrices of their first axis against all others.
    * ``cos(d, m)`` says whether the steps after the last jump went on in its direction, in which case it was too
      short, or came back: delta-bar-delta (Jacobs, 1988) and hypergradient descent (Baydin et al., 2018, arXiv
      1703.04782) between jumps.  With a learning rate that is too small the gain grows, else it shrinks.
    * b is *white* if its singular values are as even as those of noise (:func:`whiteness_of_noise`; its own whiteness
      is ``cos(b, m)``).  Then the base optimizer moves in all directions alike already, as Muon does: there is none
      that it neglects, most of a jump is noise, and a longer one has to be backed by more agreement.
    * Jumps that are mostly at right angles to a matrix make it longer, and the base optimizer's next steps then turn
      it less.  ``growth`` says how much of that may stay.

    Anchor and buffer are float32, ``m`` is bfloat16: 10 bytes per parameter.

    On shards, cosines are sums over ranks, and every matrix has a rank that whitens it, so that each does its share of
    the work (as Muon does, distributed): buffers travel there and directions back, one matrix per rank at a time.

    Args:
        momentum: 0 .. below 1.
        period: optimizer steps between nowcasts.
        gain: first g.
        rate: of its feedback; 0 keeps it.
        target: agreement at which the gain stays as it is.
        max_gain: largest g.
        restraint: how much more agreement a gain of 1 needs where moves are white; 0: no more.
        whiten: whether matrices are whitened; without it this is momentum with feedback.
        growth: share, 0 .. 1, of what a jump would add to the norm of a matrix; 0: its norm stays as the base
            optimizer left it.  In trials on small language models 0 was better near the best learning rate of a
            cosine, 1 at a constant one far below it.

    Raises:
        ValueError: an argument out of range.
    """

    parts: ClassVar[tuple[str, ...]] = ("buffer", "direction", "gain")
    parts_without_rows: ClassVar[tuple[str, ...]] = ("gain",)
    works_on_shards = True
    min_gain: ClassVar[float] = 1 / 20

    def __init__(
        self,
        momentum: float = 0.5,
        period: int = 25,
        gain: float = 0.5,
        rate: float = 0.5,
        target: float = 0.05,
        max_gain: float = 8.0,
        restraint: float = 3.0,
        whiten: bool = True,
        growth: float = 1.0,
    ) -> None:
        super().__init__()
        kind = "SpectralNowcaster"
        self.momentum = check_number("momentum", momentum)
        self.period = check_whole("period", period, 1)
        self.gain = check_number("gain", gain)
        self.rate = check_number("rate", rate)
        self.target = check_number("target", target)
        self.max_gain = check_number("max_gain", max_gain)
        self.restraint = check_number("restraint", restraint)
        self.whiten = bool(whiten)
        self.growth = check_number("growth", growth)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` of a {kind} must be from 0 to below 1, got {momentum}")
        if self.rate < 0:
            raise ValueError(f"`rate` of a {kind} must be at least 0, got {rate}")
        if self.restraint < 0:
            raise ValueError(f"`restraint` of a {kind} must be at least 0, got {restraint}")
        if not 0 <= self.growth <= 1:
            raise ValueError(f"`growth` of a {kind} must be a share, from 0 to 1, got {growth}")
        if not -1 <= self.target <= 1:
            raise ValueError(f"`target` of a {kind} must be a cosine, from -1 to 1, got {target}")
        if not self.min_gain <= self.gain <= self.max_gain:
            raise ValueError(f"`gain` of a {kind} must be from {self.min_gain} to `max_gain` = {max_gain}, got {gain}")

    def work(self, shapes: Iterable[tuple[int, ...]], device: torch.device | str = "cpu") -> float:
        shapes = list(shapes)
        products = 0.0
        for shape in filter(self.whitens, shapes):
            dtype = whitening_dtype(shape, device)
            products += whitening_operations(shape, dtype) / _OPERATIONS[dtype]
        return super().work(shapes, device) + products

    def begin(self, anchor: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(anchor, memory_format=torch.contiguous_format)
        return {
            "buffer": zeros,
            "direction": zeros.to(torch.bfloat16),
            "gain": torch.full((), self.gain, device=anchor.device),
        }

    def shape(self, part: str, anchor: Tensor) -> torch.Size:
        return torch.Size() if part == "gain" else anchor.shape

    def move(self, displacement: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        direction = kept["direction"].to(displacement)
        agreement, whiteness = cosine(displacement, direction), cosine(kept["buffer"], direction)
        self._learn(kept["gain"], agreement, whiteness, tuple(direction.shape))
        buffer = kept["buffer"].lerp_(displacement, 1 - self.momentum)
        new = whitened(buffer) if self.whitens(buffer.shape) else buffer
        return self._step(displacement, new, kept)

    def moves(
        self, names: Iterable[str], displacement: Callable[[str], Tensor], shards: Shards | None
    ) -> Iterator[tuple[str, Tensor]]:
        if self.growth == 1:
            yield from self._jumps(names, displacement, shards)
            return
        before: dict[str, Tensor] = {}

        def measured(name: str) -> Tensor:
            moved = displacement(name)
            if name not in before:  # on shards each is asked for twice
                before[name] = (self._anchor[name] + moved).square().sum()
            return moved

        for name, move in self._jumps(names, measured, shards):
            anchor = self._anchor[name]
            if self.whitens(anchor.shape if shards is None else shards.local(name).shape):
                squares = torch.stack([before[name], (anchor + move).square().sum()])
                if shards is not None:
                    shards.ranks.sum_([squares])
                # Of nothing but zeros the ratio is not a number, and no longer than 1 either.
                excess = (1 - (squares[0] / squares[1]).sqrt()).clamp(min=0).nan_to_num()
                scale = 1 - (1 - self.growth) * excess
                move.mul_(scale).addcmul_(anchor, scale - 1)
            yield name, move

    def _jumps(
        self, names: Iterable[str], displacement: Callable[[str], Tensor], shards: Shards | None
    ) -> Iterator[tuple[str, Tensor]]:
        """:meth:`moves` whatever becomes of norms."""
        if shards is None:
            yield from super().moves(names, displacement, shards)
            return
        names = sorted(names)
        self._learn_together(names, displacement, shards)
        shapes = {name: shards.local(name).shape for name in names}
        matrices = {name: whitening_operations(shape) for name, shape in shapes.items() if self.whitens(shape)}
        for name in names:
            if name not in matrices:
                kept, moved = self.kept(name), displacement(name)
                yield name, self._step(moved, kept["buffer"].lerp_(moved, 1 - self.momentum), kept)
        for together in rounds(matrices, shards.ranks.size):
            moved = {name: displacement(name) for name in together}
            buffers = {name: self.kept(name)["buffer"].lerp_(moved[name], 1 - self.momentum) for name in together}
            mine = to_owners(shards, together, buffers, torch.float32)
            new = None if mine is None else whitened(mine)
            directions = from_owners(shards, together, new, buffers, torch.float32)
            for name in together:
                yield name, self._step(moved[name], directions[name], self.kept(name))

    def whitens(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of this shape is whitened."""
        return self.whiten and len(shape) > 1 and 0 not in shape

    def _learn(self, gain: Tensor, agreement: Tensor, whiteness: Tensor, shape: tuple[int, ...]) -> None:
        """Feedback on the gain of a parameter of this shape, in place."""
        target: Tensor | float = self.target
        if self.whitens(shape) and min(shape[0], math.prod(shape[1:])) > 1:
            white = whiteness > _WHITE * whiteness_of_noise(shape)
            target = self.target * torch.where(white, 1 + self.restraint * gain, 1.0)
        # Nothing can be said before the first jump, nor for a tensor that does not move: its gain stays.
        factor = torch.exp(self.rate * (agreement - target))
        gain.mul_(torch.where(agreement.isnan(), 1.0, factor)).clamp_(self.min_gain, self.max_gain)

    def _learn_together(self, names: Sequence[str], displacement: Callable[[str], Tensor], shards: Shards) -> None:
        """Feedback on all gains, from the cosines of whole tensors."""
        if not names:
            return
        gains = {name: self.kept(name)["gain"] for name in names}
        device = gains[names[0]].device
        sums = []
        for name in names:
            moved = displacement(name)
            direction, buffer = self.kept(name)["direction"].to(moved), self.kept(name)["buffer"].to(moved)
            products = (moved * direction, buffer * direction, moved.square(), buffer.square(), direction.square())
            sums.append(torch.stack([product.sum() for product in products]))
        totals = torch.stack([each.to(device) for each in sums])
        shards.ranks.sum_([totals])
        along, buffered, lengths, buffers, last = totals.unbind(1)
        agreements = along / (lengths.sqrt() * last.sqrt())
        whiteness = buffered / (buffers.sqrt() * last.sqrt())
        for name, agreement, white in zip(names, agreements, whiteness, strict=True):
            gain = gains[name]
            self._learn(gain, agreement.to(gain.device), white.to(gain.device), shards.local(name).shape)

    def _step(self, displacement: Tensor, new: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """The move along a new direction, which is kept; overwrites the displacement."""
        kept["direction"].copy_(new)
        return displacement.addcmul_(kept["gain"], new.to(displacement.device))

    def __repr__(self) -> str:
        return (
            f"SpectralNowcaster(momentum={self.momentum}, period={self.period}, gain={self.gain}, rate={self.rate}, "
            f"target={self.target}, max_gain={self.max_gain}, restraint={self.restraint}, whiten={self.whiten}, "
            f"growth={self.growth})"
        )
