"""Parameters that several ranks train: each rank reads and writes its own rows, and what must travel travels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nowcaster.shards import Shards
from ..ranks import ProcessGroupRanks, as_bytes
from .base import ParameterStore, Signature, check_state, signature_hash
from .holders import Holder, Replica
from .layout import Layout, Move, Span, row_order

# Bytes of whole parameters whose rows travel together.
BUCKET = 128 * 2**20
# Flat tensors and the first element of the flattened parameter that they begin with.
Pieces = Mapping[str, tuple[int, Tensor]]


class DividedStore(ParameterStore):
    """Parameters of which every rank holds a span, or all.

    Args:
        model: the bare model.
        find: {name: holder} of its trainable parameters as they are now, in the same order on all ranks.
        holders: what ``find`` gives at present, if that is known.

    Raises:
        ValueError: ranks that hold different parameters (pipelines), or spans that do not make whole parameters; on
            all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        find: Callable[[nn.Module], dict[str, Holder]],
        holders: dict[str, Holder] | None = None,
    ) -> None:
        self.model = model
        self._find = find
        self._layouts: dict[str, Layout] = {}
        self._copies: dict[str, Layout] = {}
        self._arranged: tuple = ()
        self._shards: Shards | None = None
        self._arrange(find(model) if holders is None else holders)

    def signature(self) -> Signature:
        return _signature(self._find(self.model))

    @property
    def device(self) -> torch.device:
        return next(iter(self._find(self.model).values())).device

    def shards(self) -> Shards | None:
        self._holders()
        return self._shards if self.ranks.size > 1 else None

    @torch.no_grad()
    def live(self) -> dict[str, Tensor]:
        holders = self._holders()
        with self.ranks.together():
            return self._read(holders)

    def _read(self, holders: Mapping[str, Holder]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        rank = self.ranks.rank
        for bucket in self._buckets(holders):
            sources, targets, moves = {}, {}, {}
            for name, holder in bucket.items():
                layout = self._layouts[name]
                self._meet_at(holder)
                held, (start, stop) = holder.read(), layout.own[rank]
                if layout.holds_own:
                    own = held[start - holder.span[0] : stop - holder.span[0]] if stop > start else held[:0]
                else:
                    own = torch.empty(stop - start, dtype=held.dtype, device=held.device)
                    sources[name], targets[name] = (holder.span[0], held), (start, own)
                    moves[name] = layout.reads(rank)
                result[name] = own.view(layout.rows[rank].local_shape)
            self._travel(moves, sources, targets)
        return result

    @torch.no_grad()
    def write(self, state: Mapping[str, Tensor]) -> None:
        holders = self._holders()
        shapes = {name: layout.rows[self.ranks.rank].local_shape for name, layout in self._layouts.items()}
        with self.ranks.together():
            check_state(state, shapes)
        with self.ranks.together():
            for bucket in self._buckets({name: holder for name, holder in holders.items() if name in state}):
                self._deliver(bucket, state, self._layouts)
                copies = {name: holder.copy for name, holder in bucket.items() if holder.copy is not None}
                self._deliver(copies, state, self._copies)

    def _deliver(
        self, holders: Mapping[str, Holder], state: Mapping[str, Tensor], layouts: Mapping[str, Layout]
    ) -> None:
        rank = self.ranks.rank
        sources, targets, moves = {}, {}, {}
        for name, holder in holders.items():
            start = self._layouts[name].own[rank][0]
            own = state[name].detach().to(holder.device, holder.dtype).reshape(-1)
            if layouts[name].owns_held:
                targets[name] = start, own
                continue
            held = torch.empty(holder.span[1] - holder.span[0], dtype=holder.dtype, device=holder.device)
            sources[name], targets[name] = (start, own), (holder.span[0], held)
            moves[name] = layouts[name].writes(rank)
        self._travel(moves, sources, targets)
        for name, holder in holders.items():
            start, tensor = targets[name]
            first, last = holder.span
            self._meet_at(holder)
            holder.write(tensor[first - start : last - start] if last > first else tensor[:0])

    @torch.no_grad()
    def gather(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        holders = {name: holder for name, holder in self._holders().items() if name in state}
        with self.ranks.together():
            return self._gather(holders, state)

    def _gather(self, holders: Mapping[str, Holder], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rank = self.ranks.rank
        result = {}
        for bucket in self._buckets(holders):
            sources, targets, moves = {}, {}, {}
            for name in bucket:
                layout = self._layouts[name]
                whole = state[name].new_empty(layout.shape)
                sources[name] = layout.own[rank][0], state[name].detach().reshape(-1)
                targets[name] = 0, whole.view(-1)
                moves[name] = layout.gathers(rank)
                result[name] = whole
            self._travel(moves, sources, targets)
        return result

    def rows_of_state(self, parameter: Tensor, value: Tensor) -> Tensor:
        name = self._replicas().get(id(parameter))
        if name is None or value.shape != parameter.shape:
            return local(value)
        return self._layouts[name].rows[self.ranks.rank].of(value)

    @torch.no_grad()
    def write_states(self, states: Mapping[Any, tuple[Tensor, Tensor, Tensor]]) -> None:
        replicas = self._replicas()
        with self.ranks.together():
            for parameter, value, rows in states.values():
                name = replicas.get(id(parameter))
                if name is None or value.shape != parameter.shape:
                    local(value).copy_(rows)
                else:
                    self._spread(name, value, rows)

    def _spread(self, name: str, value: Tensor, rows: Tensor) -> None:
        """Make a tensor that every rank holds whole of the rows of each."""
        layout, rank = self._layouts[name], self.ranks.rank
        own = rows.to(value.device, value.dtype).reshape(-1)
        whole = torch.empty(value.numel(), dtype=value.dtype, device=value.device)
        self._travel({name: layout.gathers(rank)}, {name: (layout.own[rank][0], own)}, {name: (0, whole)})
        value.copy_(whole.view(value.shape))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _holders(self) -> dict[str, Holder]:
        holders = self._find(self.model)
        if _arrangement(holders) != self._arranged:
            self._arrange(holders)
        return holders

    def _replicas(self) -> dict[int, str]:
        """{id of a parameter: name} of those that every rank holds whole."""
        found = self._holders()
        return {holder.id: name for name, holder in found.items() if isinstance(holder, Replica)}

    def _arrange(self, holders: Mapping[str, Holder]) -> None:
        """Tell the others what is here, and work out who has which rows."""
        signature = _signature(holders)
        ranks = ProcessGroupRanks()  # as they are, until the order of rows is known
        if not ranks.alike(signature_hash(signature)):
            raise ValueError(
                "`model` must have the same parameters on all ranks, but their names, shapes or dtypes differ "
                "(pipeline or expert parallel?): train it without nowcasts"
            )
        copies = {name: holder.copy for name, holder in holders.items() if holder.copy is not None}
        table = _spans(ranks, [*holders.values(), *copies.values()])
        layouts = {
            name: _layout(name, holder.shape, held)
            for (name, holder), held in zip(holders.items(), table, strict=False)
        }
        order = row_order(layouts.values())
        self.ranks = ProcessGroupRanks(order)
        self._layouts = {name: layout.reordered(order) for name, layout in layouts.items()}
        self._copies = {
            name: self._layouts[name].copied([held[rank] for rank in order])
            for name, held in zip(copies, table[len(holders) :], strict=True)
        }
        self._shards = Shards({name: layout.rows for name, layout in self._layouts.items()}, self.ranks)
        self.whole = all(isinstance(holder, Replica) for holder in holders.values())
        self._arranged = _arrangement(holders)

    def _buckets(self, holders: Mapping[str, Holder]) -> Iterator[dict[str, Holder]]:
        """The same on all ranks: by the sizes of whole parameters."""
        bucket: dict[str, Holder] = {}
        size = 0
        for name, holder in holders.items():
            bucket[name] = holder
            size += self._layouts[name].numel * holder.dtype.itemsize
            if size >= BUCKET:
                yield bucket
                bucket, size = {}, 0
        if bucket:
            yield bucket

    def _meet_at(self, holder: Holder) -> None:
        """Before a holder is read or written: if all ranks have to do it together, none begins unless all can."""
        if holder.travels:
            holder.reserve()
            self.ranks.meet()

    def _travel(self, moves: Mapping[str, Sequence[Move]], sources: Pieces, targets: Pieces) -> None:
        """Carry out the moves; the same names on all ranks."""
        if not moves:
            return
        outgoing: list[list[Tensor]] = [[] for _ in range(self.ranks.size)]
        arrivals: list[list[Tensor]] = [[] for _ in range(self.ranks.size)]
        for name, parts in moves.items():
            (begun, source), (first, target) = sources[name], targets[name]
            for move in parts:
                if move.source == self.ranks.rank:
                    piece = source[move.start - begun : move.stop - begun]
                    if move.target == self.ranks.rank:
                        target[move.start - first : move.stop - first].copy_(piece)
                    else:
                        outgoing[move.target].append(as_bytes(piece.contiguous()))
                else:
                    arrivals[move.source].append(as_bytes(target[move.start - first : move.stop - first]))
        if self.ranks.size == 1:
            return
        device = next(iter(targets.values()))[1].device
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        incoming = [empty.new_empty(sum(part.numel() for part in parts)) for parts in arrivals]
        self.ranks.exchange([torch.cat([empty, *parts]) for parts in outgoing], incoming)
        for data, parts in zip(incoming, arrivals, strict=True):
            for part, target in zip(data.split([part.numel() for part in parts]), parts, strict=True):
                target.copy_(part)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the local part of a DTensor, else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _signature(holders: Mapping[str, Holder]) -> Signature:
    return tuple((name, holder.shape, str(holder.dtype)) for name, holder in holders.items())


def _arrangement(holders: Mapping[str, Holder]) -> tuple:
    """What tells how parameters are held: it changes where ``accelerator.prepare`` shards a model, on all ranks."""
    return tuple((name, h.shape, h.dtype, type(h).__name__, h.span) for name, h in holders.items())


def _spans(ranks: ProcessGroupRanks, holders: Sequence[Holder]) -> list[tuple[Span, ...]]:
    """For every holder, the spans of all ranks."""
    found = ranks.gather(torch.tensor([holder.span for holder in holders]))
    every = [[tuple(span) for span in rank.tolist()] for rank in found]
    return list(zip(*every, strict=True))


def _layout(name: str, shape: tuple[int, ...], held: tuple[Span, ...]) -> Layout:
    try:
        return Layout(shape, held)
    except ValueError as error:
        raise ValueError(f"`model` must be held whole by all ranks together, but of {name!r} {error}") from error
