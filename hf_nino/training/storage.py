"""Where snapshots live: on the device, in host memory, or on the disk (:mod:`hf_nino.training.disk`).

Taking a snapshot must not hold up training by more than the copy itself.  On the device it is one copy in the order of
the training stream.  To the host it is a copy from CUDA to pinned memory, on a stream of its own (:class:`Lane`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

DISK = "disk:"
# Two names for one place: each snapshot where its parameter is.
WITH_MODEL = ("model", "device")
# Bytes: where tensors begin, and what pinned memory is asked for at a time unless a tensor is larger.
ALIGNMENT = 256
SLAB = 256 * 2**20
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """``torch.float32`` from ``"float32"``.

    Raises:
        ValueError: none of the dtypes that snapshots may have.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"`history_dtype` must be a floating-point dtype ({names}), got {dtype!r}")
    return found


def check_place(device: str | torch.device) -> None:
    """Raise ``ValueError`` unless ``device`` names a place for snapshots; nothing is created."""
    text = str(device)
    if text in WITH_MODEL or (text.startswith(DISK) and text != DISK):
        return
    try:
        torch.device(text)
    except RuntimeError:
        raise ValueError(
            "`history_device` must be 'cpu', 'model' (with the parameters), 'disk:PATH' (a folder) or a torch device, "
            f"got {text!r}"
        ) from None


def make_place(device: str | torch.device, dtype: torch.dtype) -> Place:
    """The place that ``device`` names: ``"cpu"``, ``"model"`` (or ``"device"``), ``"disk:PATH"`` or a torch device.

    Raises:
        ValueError: no such place, or a folder in which nothing can be written.
    """
    check_place(device)
    text = str(device)
    if text.startswith(DISK):
        from .disk import DiskPlace

        return DiskPlace(text.removeprefix(DISK), dtype)
    found = None if text in WITH_MODEL else torch.device(text)
    return HostPlace(dtype) if found is not None and found.type == "cpu" else DevicePlace(dtype, found)


class Snapshot(ABC):
    """One state that a :class:`Place` keeps."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """{name: tensor}, whole and contiguous; to be read only, and only until the next snapshot is taken.

        Raises:
            OSError: it was to be on the disk and is not.
        """

    def file(self) -> Path | None:
        """The safetensors file that holds it, whole; ``None`` unless it lives on the disk.

        Raises:
            OSError: it could not be written.
        """
        return None

    def release(self) -> None:  # noqa: B027 (optional)
        """Give back what it takes."""


class Place(ABC):
    """Keeps snapshots in one dtype.

    Args:
        dtype: of the snapshots.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @abstractmethod
    def keep(self, state: Mapping[str, Tensor], step: int) -> Snapshot:
        """Copy ``state`` as it is now on the current streams; whatever is written to its tensors later is not seen."""

    def close(self) -> None:  # noqa: B027 (optional)
        """Give back everything; all snapshots have been released.  The place may be used again."""


class LostSnapshot(Snapshot):
    """One that could not be kept; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def tensors(self) -> dict[str, Tensor]:
        raise OSError(self.reason)

    def file(self) -> Path:
        raise OSError(self.reason)


class _Tensors(Snapshot):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)


class DevicePlace(Place):
    """Each snapshot on one device, or where its parameter is.

    Args:
        device: ``None``: where the parameter is.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__(dtype)
        self.device = device

    def keep(self, state: Mapping[str, Tensor], step: int) -> Snapshot:
        return _Tensors({name: _copy(tensor, self.dtype, self.device) for name, tensor in state.items()})


class HostPlace(Place):
    """Snapshots in host memory.

    Parameters on the CPU are copied at once.  Those on CUDA travel to pinned memory on a stream of their own, and
    neither the host nor, if the device has room for one more copy, the training stream waits for them (:class:`Lane`).
    Memory is slow to get, pinned memory above all, so the buffers of released snapshots are used again.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._lanes: dict[torch.device, Lane] = {}
        self._free: list[_Buffers] = []
        self._pins = True

    def keep(self, state: Mapping[str, Tensor], step: int) -> Snapshot:
        buffers = self._buffers({name: (tensor.shape, travels(tensor.device)) for name, tensor in state.items()})
        loads: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for name, tensor in state.items():
            if travels(tensor.device):
                loads.setdefault(tensor.device, []).append((buffers[name], tensor))
            else:
                buffers[name].copy_(tensor.detach())
        events = [self._lane(device).carry(load) for device, load in loads.items()]
        return _HostSnapshot(buffers, events, self._free)

    def close(self) -> None:
        self._free.clear()
        self._lanes.clear()

    def _lane(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = Lane(device)
        return self._lanes[device]

    def _buffers(self, wanted: Mapping[str, tuple[torch.Size, bool]]) -> _Buffers:
        """Host memory for tensors of these shapes, pinned or not: used before, or new."""
        while self._free:
            buffers = self._free.pop()
            if buffers.wanted == wanted:
                return buffers
        far = {name: shape for name, (shape, pinned) in wanted.items() if pinned}
        slabs, places = pack({name: shape.numel() * self.dtype.itemsize for name, shape in far.items()})
        memory = [self._pinned(size) for size in slabs]
        found = {
            name: memory[slab][first : first + far[name].numel() * self.dtype.itemsize]
            .view(self.dtype)
            .view(far[name])
            for name, (slab, first) in places.items()
        }
        found |= {name: torch.empty(shape, dtype=self.dtype) for name, (shape, pinned) in wanted.items() if not pinned}
        return _Buffers(wanted, {name: found[name] for name in wanted})

    def _pinned(self, size: int) -> Tensor:
        if self._pins:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._pins = False
                logger.warning(f"Snapshots go to memory that is not pinned, which is slower ({error}).")
        return torch.empty(size, dtype=torch.uint8)


class _Buffers(dict[str, Tensor]):
    """Host memory for a snapshot, and what it was made for: {name: (shape, whether it is pinned)}."""

    def __init__(self, wanted: Mapping[str, tuple[torch.Size, bool]], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.wanted = dict(wanted)


class _HostSnapshot(Snapshot):
    def __init__(self, buffers: _Buffers, events: Sequence[Any], free: list[_Buffers]) -> None:
        self._buffers: _Buffers | None = buffers
        self._events, self._free = events, free

    def tensors(self) -> dict[str, Tensor]:
        for event in self._events:
            event.synchronize()
        return {} if self._buffers is None else dict(self._buffers)

    def release(self) -> None:
        """The next copies into these buffers come after the last ones on the same streams: nothing to wait for."""
        if self._buffers is not None:
            self._free.append(self._buffers)
            self._buffers = None


def pack(sizes: Mapping[str, int]) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Lay tensors out in few slabs of memory: ``(bytes of each slab, {name: (slab, first byte)})``.

    Torch rounds pinned memory up to a power of two, which is up to twice of what a tensor needs.  So slabs are powers
    of two, and what a large tensor leaves over is filled with smaller ones.

    Args:
        sizes: {name: bytes}.
    """
    slabs: list[int] = []
    used: list[int] = []
    places: dict[str, tuple[int, int]] = {}
    left = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values())
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        size = -(-size // ALIGNMENT) * ALIGNMENT
        slab = next((i for i in range(len(slabs)) if used[i] + size <= slabs[i]), len(slabs))
        if slab == len(slabs):
            slabs.append(_power_of_two(max(size, min(left, SLAB))))
            used.append(0)
        places[name] = (slab, used[slab])
        used[slab] += size
        left -= size
    return slabs, places


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


class Lane:
    """Carries tensors from one CUDA device to the host, on a stream of its own.

    The optimizer writes parameters in place, so a copy that is still under way must not see the next step.  Two ways,
    both right whoever writes next (the optimizer, an averaging callback, a swap of weights for evaluation):

    * if the device has room, the training stream first makes a copy on the device, which is as fast as its memory, and
      that copy travels while training goes on;
    * otherwise the parameters themselves travel, and the training stream waits for the end of it.  The host does not.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def carry(self, load: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Start copying; ``load`` is [(host buffer, tensor on the device)].  Returns the event to wait for."""
        training = torch.cuda.current_stream(self.device)
        staged = self._has_room(sum(buffer.numel() * buffer.element_size() for buffer, _ in load))
        if staged:
            load = [(buffer, _copy(tensor, buffer.dtype)) for buffer, tensor in load]
        self.stream.wait_stream(training)
        with torch.cuda.stream(self.stream):
            for buffer, tensor in load:
                buffer.copy_(tensor, non_blocking=True)
                if staged:
                    # Freed below, but not to be used again before the copy has been read.
                    tensor.record_stream(self.stream)
            done = torch.cuda.Event()
            done.record(self.stream)
        if not staged:
            training.wait_event(done)
        return done

    def _has_room(self, size: int) -> bool:
        """Whether the driver has twice that many bytes to give; what torch's allocator holds is left to training."""
        return torch.cuda.mem_get_info(self.device)[0] >= 2 * size


def travels(device: torch.device) -> bool:
    """Whether copies from there to the host can run beside training."""
    return device.type == "cuda"


def _copy(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    device = tensor.device if device is None else device
    return tensor.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
