"""The held-out trajectories of a meta-training, measured by all of its processes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .held_out import ALL, METRICS, measure, summarise
from .meta_loop import MetaTraining
from .split import Split
from .trajectory import Trajectory


class Evaluation:
    """Held-out trajectories, and how to measure them.

    Args:
        training: whose nowcaster is measured, as it is at the time.
        interval: steps between the snapshots of a slice.
        slices: of each trajectory.

    Attributes:
        wanted: whether anything is held out.
    """

    def __init__(self, training: MetaTraining, split: Split, interval: int, slices: int) -> None:
        self.training, self.interval, self.slices = training, interval, slices
        self.parts = {"runs": split.runs, "tasks": split.tasks}
        self.wanted = any(self.parts.values())

    @property
    def own(self) -> list[Trajectory]:
        """Trajectories that this process measures."""
        return [one for part in self.parts.values() for one in self._share(part)]

    def run(self) -> dict[str, Any]:
        """:func:`~hf_nino.metatrain.held_out.summarise` of further runs of known tasks, and of unknown tasks."""
        training = self.training
        found: dict[str, Any] = {"interval": self.interval, "slices_per_trajectory": self.slices}
        for name, part in self.parts.items():
            own, quiet = self._share(part), not training.accelerator.is_local_main_process
            with tqdm(total=len(own), desc=f"held-out {name}", leave=False, disable=quiet) as progress:
                errors = measure(
                    training.network,
                    own,
                    training.shapes,
                    self.interval,
                    slices=self.slices,
                    mask_rounding=training.settings.mask_rounding,
                    progress=progress.update,
                )
            found[name] = summarise(gather_object(errors))
        return found

    def _share(self, part: Sequence[Trajectory]) -> Sequence[Trajectory]:
        accelerator = self.training.accelerator
        return part[accelerator.process_index :: accelerator.num_processes]


def means(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The mean errors over horizons of an evaluation, by part and then by metric and method."""
    parts = {name: found[name] for name in ("runs", "tasks") if found.get(name, {}).get("slices")}
    return {
        name: {
            f"{metric}_{method}": value for metric in METRICS for method, value in part[metric][ALL]["mean"].items()
        }
        for name, part in parts.items()
    }
