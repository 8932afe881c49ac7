"""A folder of trajectories as a dataset repository of the Hub: its rows and its card.

With ``README.md`` (the card) and ``trajectories.jsonl`` (the rows) beside the trajectories it can be uploaded as it
is: ``hf upload USER/NAME FOLDER --repo-type dataset``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..training.snapshot_file import TEMPORARY
from .recording import CHECKPOINTS
from .shards import write_text
from .trajectory import Trajectory, find_trajectories

ROWS = "trajectories.jsonl"
CARD = "README.md"
TAGS = ["nino", "nowcasting", "learned-optimizer", "training-trajectories", "arxiv:2409.04434"]

_SETTINGS = ("schedule", "warmup_steps", "weight_decay", "batch_size", "initialisation")


def write_dataset(folder: str | Path) -> Path:
    """Write the rows and the card of the trajectories in ``folder``, so that it can be uploaded as it is.

    What stands in a card that is there is replaced.

    Returns:
        The card.

    Raises:
        ValueError: there is no trajectory, or one that is malformed.
    """
    folder = Path(folder)
    rows = trajectory_rows(folder)
    write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / CARD, dataset_card(rows))
    return folder / CARD


def push_trajectories(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload ``folder``, with rows and card made anew, to a dataset repository on the Hub; its address.

    Raises:
        ValueError: see :func:`write_dataset`.
        OSError: the Hub refused.
    """
    write_dataset(folder)
    api = HfApi()
    address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    ignored = [f"**/*{TEMPORARY}", f"**/{CHECKPOINTS}"]
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=str(folder), ignore_patterns=ignored)
    return str(address)


def dataset_card(rows: Sequence[Mapping[str, Any]]) -> str:
    """The card of a dataset with these rows: YAML for the Hub, and what it is."""
    snapshots = sum(row["snapshots"] for row in rows)
    data = DatasetCardData(
        pretty_name="Parameter trajectories",
        tags=TAGS,
        configs=[{"config_name": "default", "data_files": ROWS}],
        size_categories=[_size_category(len(rows))],
    )
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        tasks.setdefault(row["task"] or row["model"], []).append(row)
    table = [
        "| task | runs | parameters | snapshots | every | optimizers | learning rates |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, group in tasks.items():
        rates = [row["learning_rate"] for row in group]
        cells = [
            task,
            len(group),
            f"{group[0]['parameters']:,}",
            sum(row["snapshots"] for row in group),
            f"{group[0]['interval']} steps",
            ", ".join(sorted({row["optimizer"] for row in group})),
            f"{min(rates):.1e} to {max(rates):.1e}",
        ]
        table.append("| " + " | ".join(map(str, cells)) + " |")
    text = f"""
# Parameter trajectories

The parameters of {len(rows)} training runs, {snapshots} snapshots in all, recorded by
hf_nino to train nowcasters on: networks that predict where parameters are going
([arXiv 2409.04434](https://arxiv.org/abs/2409.04434)).
{sum(row["diverged"] for row in rows)} of the runs diverged and were recorded until then.

```python
from hf_nino.metatrain import load_trajectories, open_trajectory

rows = load_trajectories("FOLDER_OR_REPO_ID")
trajectory = open_trajectory(rows[0])
states = trajectory.states(0, 5)
```

Each row of `{ROWS}` is a run, and `folder` in it a folder with `trajectory.json` (model, optimizer, settings, seed,
software, and which rows of large embeddings were kept), `index.jsonl` (step, learning rate and training loss of each
snapshot) and safetensors files with the states.

{chr(10).join(table)}
"""
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def trajectory_rows(folder: Path) -> list[dict[str, Any]]:
    """What is to be said of each trajectory in ``folder``, in a row each; see
    :data:`hf_nino.metatrain.dataset.FEATURES`.

    Raises:
        ValueError: there is none, or one that is malformed.
    """
    found = [_row(Trajectory(path), folder) for path in find_trajectories(folder)]
    if not found:
        raise ValueError(
            f"`path` must be a folder with trajectories, at any depth, or a repo id; found none in {folder}"
        )
    return found


def _row(trajectory: Trajectory, folder: Path) -> dict[str, Any]:
    description = trajectory.description
    settings = description.get("settings", {})
    losses = [loss for loss in trajectory.losses if math.isfinite(loss)]
    return {
        "folder": trajectory.folder.relative_to(folder).as_posix(),
        "task": description.get("task", {}).get("name"),
        "model": description["model"]["class"],
        "parameters": trajectory.num_parameters,
        "snapshots": len(trajectory),
        "interval": trajectory.interval,
        "last_step": trajectory.steps[-1] if len(trajectory) else None,
        "dtype": description["dtype"],
        "moments": list(trajectory.moments),
        "optimizer": description["optimizer"]["name"],
        "learning_rate": settings.get("learning_rate", max(trajectory.learning_rates, default=None)),
        **{name: settings.get(name) for name in _SETTINGS},
        "seed": description["seed"],
        "final_loss": losses[-1] if losses else None,
        "finished": trajectory.finished,
        "diverged": bool(description.get("diverged", False)),
    }


def _size_category(rows: int) -> str:
    return "n<1K" if rows < 1000 else "1K<n<10K" if rows < 10_000 else "10K<n<100K"
