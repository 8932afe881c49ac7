"""What happened when a nowcast was due, or was taken back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NowcastEvent:
    """What happened at a step at which a nowcast was due, or at which one was taken back.

    Attributes:
        step: optimizer steps done.
        horizon: intervals looked ahead; 0 when the learning rate that is left allowed none.
        horizon_steps: the same in optimizer steps.
        seconds: spent on the nowcast, guard and writing included, measuring the loss excluded.
        step_norm: Euclidean norm of the change of the parameters; ``None`` when nothing was written.
        relative_step_norm: the same over the norm of the parameters.
        accepted: whether it was written into the model.
        reason: why not, or why it was taken back; empty when accepted.
        loss_before: loss on a fixed batch before writing, when measured.
        loss_after: the same after writing.
        taken_back_to: the step of a nowcast that was taken back at ``step``: parameters and optimizer are again as
            they were there.
        shortened, left_alone: parameters whose step was too long, and was shortened or not taken.
    """

    step: int
    horizon: int
    horizon_steps: int
    seconds: float
    step_norm: float | None = None
    relative_step_norm: float | None = None
    accepted: bool = False
    reason: str = ""
    loss_before: float | None = None
    loss_after: float | None = None
    taken_back_to: int | None = None
    shortened: int = 0
    left_alone: int = 0

    def scalars(self) -> dict[str, float]:
        """``nino_*`` numbers for trackers."""
        values = {
            "nino_step": self.step,
            "nino_horizon": self.horizon,
            "nino_seconds": self.seconds,
            "nino_accepted": int(self.accepted),
            "nino_step_norm": self.step_norm,
            "nino_relative_step_norm": self.relative_step_norm,
            "nino_loss_before": self.loss_before,
            "nino_loss_after": self.loss_after,
            "nino_shortened": self.shortened + self.left_alone if self.accepted else None,
            "nino_taken_back_to": self.taken_back_to,
        }
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        if self.taken_back_to is not None:
            return f"step {self.step}: the nowcast of step {self.taken_back_to} is taken back: {self.reason}."
        if not self.accepted:
            return f"step {self.step}: no nowcast: {self.reason}"
        text = f"step {self.step}: nowcast {self.horizon_steps} steps ahead ({self.horizon} intervals)"
        text += f", parameters moved by {100 * self.relative_step_norm:.2g}%, {self.seconds:.2f} s"
        if self.loss_before is not None and self.loss_after is not None:
            text += f", loss {self.loss_before:.4f} -> {self.loss_after:.4f}"
        return text
