"""NiNo as an optimizer around an optimizer, for any training loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..defaults import NOWCASTER
from ..nowcaster.base import Nowcaster
from .compatibility import check_optimizer
from .event import NowcastEvent
from .losses import as_loss
from .nowcasting import Nowcasting


class NiNo(torch.optim.Optimizer):
    """An optimizer that nowcasts: every step is one of the base optimizer, and once every ``period`` steps a nowcast.

    ::

        optimizer = NiNo(torch.optim.AdamW(model.parameters()), model, "linear", max_steps=10_000)
        scheduler = get_scheduler("cosine", optimizer, 100, 10_000)
        optimizer.lr_scheduler = scheduler          # the horizon then knows the learning rate that is left
        ...
        loss.backward()
        optimizer.record_loss(loss)                 # a nowcast that does harm can then be taken back
        optimizer.step()

    It is a ``torch.optim.Optimizer`` for learning-rate schedulers, ``GradScaler`` and ``accelerator.prepare``: its
    parameter groups, state and defaults are those of the base optimizer, and so is :meth:`state_dict`.  The nowcasting
    state is saved apart, by :meth:`save` and :meth:`load`, or together with ``accelerator.save_state`` after
    :meth:`register_for_checkpointing`.

    With gradient accumulation, step it once per optimizer step (``accelerator.accumulate`` does).  A step that a
    ``GradScaler`` skips never arrives here and does not count.

    Args:
        optimizer: the base optimizer, over parameters of ``model``.
        model: the model that is trained.
        nowcaster: a :class:`~hf_nino.nowcaster.base.Nowcaster`, or the name, path or repo id of one.
        **nowcasting: keyword arguments of :class:`~hf_nino.training.nowcasting.Nowcasting` (``period``, ``horizon``,
            ``max_steps``, ``start_step``, ...).

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``.
        ValueError: an optimizer that cannot be combined with nowcasts (schedule-free), or a bad keyword argument.
    """

    # GradScaler would hand the scale to this object, where a fused base optimizer does not look for it.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        nowcaster: str | os.PathLike | Nowcaster = NOWCASTER,
        **nowcasting: Any,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        check_optimizer(optimizer)
        # `Optimizer.__init__` is not called: it would replace the groups and the state of the base optimizer.
        self.base_optimizer = optimizer
        self.nowcasting = Nowcasting(nowcaster, model, **nowcasting)
        self._begun = False
        self._all_groups: list[dict[str, Any]] | None = None

    # -- what the base optimizer has --------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        # DeepSpeed's ZeRO-1 and 2 step one group after the other, and show the optimizer that one alone meanwhile.
        before = self._all_groups or self.base_optimizer.param_groups
        known = {id(group) for group in before}
        one_of_them = 0 < len(groups) < len(before) and all(id(group) in known for group in groups)
        self._all_groups = before if one_of_them else None
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> dict[Any, Any]:
        return self.base_optimizer.state

    @state.setter
    def state(self, state: dict[Any, Any]) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        if name == "base_optimizer":  # not set yet: copying or unpickling
            raise AttributeError(name)
        return getattr(self.base_optimizer, name)  # hooks and the like: they run with the base optimizer's steps

    def __repr__(self) -> str:
        return f"NiNo({self.base_optimizer!r}, {self.nowcasting.spec!r}, period={self.nowcasting.period})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base_optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the base optimizer."""
        self.base_optimizer.load_state_dict(state_dict)

    # -- stepping ---------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer; then a snapshot or a nowcast, if one is due.  Returns the base's value."""
        if self._is_rehearsal():
            return self.base_optimizer.step(closure)
        if not self._begun:
            self._begun = True
            with self._whole():
                self.nowcasting.begin(None, self.base_optimizer)
        value = self.base_optimizer.step(closure)
        if self._all_groups is not None and self.param_groups[-1] is not self._all_groups[-1]:
            return value  # others follow
        if closure is not None and not self.nowcasting.losses.recorded and as_loss(value) is not None:
            self.nowcasting.record_loss(value)
        with self._whole():
            self.nowcasting.step(optimizer=self.base_optimizer)
        return value

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Show all groups, where the base optimizer is shown one of them."""
        shown = self.base_optimizer.param_groups
        if self._all_groups is not None:
            self.base_optimizer.param_groups = self._all_groups
        try:
            yield
        finally:
            self.base_optimizer.param_groups = shown

    def record_loss(self, loss: Tensor | float) -> None:
        """Tell the training loss, before :meth:`step`: what ``backward`` was called on, for every micro-batch.

        Nowcasts on probation are judged by it; without it, and without a closure that returns it, none is taken back.
        A tensor stays on its device; the host does not wait for it.  The loss of a step that a ``GradScaler`` skipped
        is added to that of the next one, where a single one does no harm.
        """
        self.nowcasting.record_loss(loss)

    def _is_rehearsal(self) -> bool:
        """A step with learning rate 0 and gradients 0 only fills the state: torch.distributed.checkpoint does that."""
        if any(float(group.get("lr") or 0) != 0 for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(grad.any()) for grad in grads)

    # -- nowcasting -------------------------------------------------------------------------------------------------

    @property
    def lr_scheduler(self) -> Any:
        """The run's learning-rate scheduler; set it once it exists, before the first step.

        Without one the learning rate is taken to be constant: nowcasts then neither wait for the end of a warm-up nor
        shorten their horizon as the learning rate runs out.
        """
        return self.nowcasting.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self.nowcasting.lr_scheduler = scheduler

    @property
    def last_event(self) -> NowcastEvent | None:
        """What happened when a nowcast was last due."""
        return self.nowcasting.events[-1] if self.nowcasting.events else None

    def save(self, directory: str | os.PathLike) -> None:
        """Write the nowcasting state into ``directory`` (safetensors and JSON), beside your own checkpoint.

        Where several ranks train, on all of them at once: each writes its rows, into files of its own.
        """
        self.nowcasting.save(directory)

    def load(self, directory: str | os.PathLike) -> bool:
        """Restore what :meth:`save` wrote, before the first step; ``False`` and a warning if absent or unfitting."""
        return self.nowcasting.load(directory)

    def register_for_checkpointing(self, accelerator: Any) -> None:
        """Save and load the nowcasting state with ``accelerator.save_state`` and ``accelerator.load_state``.

        A folder without it loads all the same, with a warning and a new warm-up.
        """

        def save(models: Any, weights: Any, directory: str) -> None:
            self.save(directory)

        def load(models: Any, directory: str) -> None:
            self.load(directory)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)
