"""``hf-nino meta-train``: from a folder of trajectories to a nowcaster that was measured."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers.utils import logging

from ..nowcaster.auto import MODELS, load_nowcaster
from ..nowcaster.configuration import NowcasterConfig
from ..nowcaster.modeling import NiNoModel, WNNModel
from ..training.estimate import in_words
from .describe import software
from .meta_checkpoint import last_checkpoint, read_state
from .meta_cost import plan_cost
from .meta_data import describe_data, fingerprint, open_trajectories
from .meta_evaluation import Evaluation, means
from .meta_loop import MetaTraining
from .meta_report import write_evaluation
from .meta_settings import MetaSettings
from .sampling import Sampler
from .shapes import Shapes
from .shards import write_text
from .split import split_trajectories
from .trajectory import Trajectory

logger = logging.get_logger(__name__)

SUMMARY = "meta_training.json"
PERIOD = 250
"""Of a new nowcaster, unless its configuration says otherwise: shorter than the original release's."""

LOG_EVERY = 20
"""Steps between the numbers that are kept and sent to trackers."""


def meta_train(
    trajectories: str | Path,
    out: Path,
    *,
    config: NowcasterConfig | None = None,
    settings: MetaSettings | None = None,
    initial: str | Path | None = None,
    device: str | None = None,
    report_to: Sequence[str] = (),
    save_every: int | None = None,
    evaluate_every: int | None = None,
    evaluation_slices: int = 8,
    say: Callable[[str], Any] = logger.info,
) -> dict[str, Any]:
    """Train a nowcaster on recorded trajectories, and measure it on others.

    The same call again goes on after the last checkpoint; on a CPU the result is then, bit for bit, that of an
    uninterrupted run.  Under ``accelerate launch`` several processes learn together: each from trajectories of its
    own, so that a step sees as many times more of them.

    ``out`` becomes the nowcaster's folder (``config.json``, ``model.safetensors``), with ``meta_training.json``
    (recipe, data, software, hours, losses, evaluation), ``evaluation.md`` and ``evaluation.png``.

    Args:
        trajectories: a folder with trajectories at any depth, or a dataset repository on the Hub.  Runs that diverged
            are left out.
        config: of a new nowcaster; default: a :class:`NiNoModel` for a period of 250 steps.
        settings: the recipe.
        initial: folder, repository or original ``.pt`` file of a nowcaster to start from, instead of ``config``.
        device: ``"cpu"``, or ``"cuda"``; default: what there is.
        report_to: names of trackers, as accelerate knows them.
        save_every: steps between checkpoints; default: a twentieth of all.
        evaluate_every: steps between evaluations; default: a tenth of all.
        evaluation_slices: of each held-out trajectory, evenly spread.
        say: is told what it will cost, and where things are.

    Returns:
        What is in ``meta_training.json``.

    Raises:
        ValueError: an argument is out of range, there are no trajectories that fit, or ``out`` holds another run.
        OSError: trajectories or ``initial`` cannot be reached.
        FloatingPointError: see :meth:`~hf_nino.metatrain.meta_loop.MetaTraining.run`.
    """
    settings, out = settings or MetaSettings(), Path(out)
    save_every = _every("save_every", save_every, settings.steps, 20)
    evaluate_every = _every("evaluate_every", evaluate_every, settings.steps, 10)
    if evaluation_slices < 1:
        raise ValueError(f"`evaluation_slices` must be at least 1, got {evaluation_slices}")
    if device not in (None, "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"`device` must be 'cpu', or 'cuda' where PyTorch finds a GPU, got {device!r}")
    network = start_network(config, initial, settings.seed)
    interval = max(1, network.period // network.context)
    whole, diverged = open_trajectories(trajectories)
    _check_tokens(network, whole)
    split = split_trajectories(whole, share=settings.held_out_share, tasks=settings.held_out_tasks, seed=settings.seed)
    sampler = Sampler(split.train, network.context, settings.intervals(interval), settings.seed)
    trackers = [name for name in report_to if name != "none"]
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", log_with=trackers or None, project_dir=out)
    main = accelerator.is_main_process
    if not main:
        say = _say_nothing
    decides = {
        "settings": settings.to_dict(),
        "config": network.config.to_dict(),
        "initial": None if initial is None else Path(initial).name,
        "trajectories": fingerprint(sampler.trajectories),
        "processes": accelerator.num_processes,
    }
    checkpoint = last_checkpoint(out)
    if checkpoint is not None:
        before = read_state(checkpoint)
        # Runs begun before there was a setting had its default.
        before["decides"]["settings"] = MetaSettings.from_dict(before["decides"]["settings"]).to_dict()
        _check_same(before["decides"], decides, checkpoint)
        if (out / SUMMARY).is_file() and before["step"] >= settings.steps:
            say(f"{out} is finished already.")
            return json.loads((out / SUMMARY).read_text("utf-8"))

    shapes = Shapes()
    shapes.build([*sampler.trajectories, *split.runs, *split.tasks], quiet=not main)
    training = MetaTraining(network, sampler, shapes, settings, accelerator)
    evaluation = Evaluation(training, split, interval, evaluation_slices)
    evaluations: list[dict[str, Any]] = []
    if checkpoint is not None:
        evaluations = training.load(checkpoint)["evaluations"]
        say(f"Going on from {checkpoint.name}.")
    data = describe_data(trajectories, sampler, split, diverged)
    say(_told(data, training, evaluation, evaluate_every))
    training.prepare()
    accelerator.init_trackers("hf_nino", config=_flat(decides["settings"] | decides["config"]))
    if len(accelerator.trackers) < len(trackers):
        logger.warning(f"Of the trackers {', '.join(trackers)}, some are not installed and get nothing.")

    bar = tqdm(total=settings.steps, initial=training.step_count, desc="meta-training", unit="step", disable=not main)
    with bar as progress:
        for step in training.run(settings.steps):
            progress.update()
            last = step == settings.steps
            if step % LOG_EVERY == 0 or last:
                numbers = training.log() | {"skipped_steps": len(training.skipped)}
                accelerator.log(numbers, step=step)
                progress.set_postfix(_shown(numbers), refresh=False)
            if step % evaluate_every == 0 and not last and evaluation.wanted:
                evaluations.append({"step": step, **means(evaluation.run())})
                accelerator.log(_flat(evaluations[-1]), step=step)
            if step % save_every == 0 or last:
                if main:
                    training.save(out, {"decides": decides, "evaluations": evaluations})
                accelerator.wait_for_everyone()

    found = evaluation.run() if evaluation.wanted else {}
    evaluations.append({"step": settings.steps, **means(found)})
    accelerator.log(_flat(evaluations[-1]), step=settings.steps)
    network.config = replace(network.config, meta_trained_on=_learned_from(data, decides["initial"]))
    summary = {
        "nowcaster": network.config.to_dict(),
        "parameters": _count(network),
        "settings": decides["settings"],
        "initial": decides["initial"],
        "data": data,
        "software": software() | {"accelerate": accelerate.__version__},
        "hardware": _hardware(accelerator),
        "hours": training.seconds / 3600,
        "steps": training.step_count,
        "skipped_steps": training.skipped,
        "losses": training.losses,
        "evaluations": evaluations,
        "evaluation": found,
    }
    if main:
        network.eval().save_pretrained(out)
        if found:
            say(write_evaluation(found, out))
        write_text(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
        say(f"The nowcaster is in {out}; {len(training.skipped)} of {training.step_count} steps were skipped.")
    accelerator.wait_for_everyone()
    # A DDP model that outlives its process group is the last to hold it, and freeing gloo's may then wait for ever.
    training.wrapped = training.objective
    accelerator.free_memory()
    accelerator.end_training()
    return summary


def start_network(config: NowcasterConfig | None, initial: str | Path | None, seed: int) -> NiNoModel | WNNModel:
    """A new nowcaster, or the one that ``initial`` names.

    Raises:
        ValueError: both are given, or ``initial`` is a rule without weights.
    """
    if initial is None:
        config = config or NowcasterConfig(period=PERIOD)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MODELS[config.nowcaster_type](config)
    if config is not None:
        raise ValueError("`config` must be left out with `initial`, whose sizes it would change")
    network = load_nowcaster(initial)
    if not isinstance(network, NiNoModel | WNNModel):
        raise ValueError(f"`initial` must name a nowcaster with weights, got {initial!r}")
    return network


def _check_tokens(network: NiNoModel | WNNModel, trajectories: Sequence[Trajectory]) -> None:
    if isinstance(network, NiNoModel) and network.token_position is not None:
        partial = next((one for one in trajectories if one.rows), None)
        if partial is not None:
            raise ValueError(
                "`initial` must be a nowcaster without a table of token positions for trajectories whose embeddings "
                f"were recorded in part, as in {partial.folder}"
            )


def _check_same(there: dict[str, Any], ours: dict[str, Any], checkpoint: Path) -> None:
    for part, value in ours.items():
        before = there.get(part)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            key = next(key for key in {**before, **value} if before.get(key) != value.get(key))
            part, before, value = key, before.get(key), value.get(key)
        raise ValueError(
            f"`out` must be a folder for this run, but {checkpoint} was made with another `{part}` ({before}, now "
            f"{value}): choose another folder"
        )


def _every(name: str, value: int | None, steps: int, parts: int) -> int:
    if value is None:
        return math.ceil(steps / parts)
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1 step, got {value}")
    return value


def _told(data: Mapping[str, Any], training: MetaTraining, evaluation: Evaluation, evaluate_every: int) -> str:
    """The cost, in words."""
    network, settings, accelerator = training.network, training.settings, training.accelerator
    cost = plan_cost(training, evaluation.own, evaluation.slices, evaluation.interval)
    left = settings.steps - training.step_count
    times = left / evaluate_every + 1 if evaluation.wanted else 0
    held = [sum(task[part] for task in data["tasks"].values()) for part in ("held_out_runs", "held_out_tasks")]
    many = f"{accelerator.num_processes} {'process' if accelerator.num_processes == 1 else 'processes'}"
    return (
        f"{type(network).__name__} with {_count(network):,} parameters, on {data['trajectories']} trajectories with "
        f"{data['snapshots']:,} snapshots; held out: {held[0]} runs of the same tasks and {held[1]} of other tasks. "
        f"{left:,} steps of {settings.batch_size} x {settings.slices} slices are left: about "
        f"{in_words(left * cost.step)}, and {in_words(times * cost.evaluation)} for evaluations, with {many} on "
        f"{accelerator.device}. The same command goes on where it was interrupted."
    )


def _learned_from(data: Mapping[str, Any], initial: str | None) -> str:
    """For the nowcaster's configuration."""
    tasks = sum(1 for task in data["tasks"].values() if task["train"])
    text = f"{data['trajectories']} recorded runs of {tasks} tasks, {data['snapshots']} snapshots"
    return text if initial is None else f"{text}; begun from {initial}"


def _say_nothing(text: str) -> None:
    """What processes but the main one say."""


def _shown(numbers: Mapping[str, float]) -> dict[str, str]:
    """Beside the progress bar."""
    if "loss" not in numbers:
        return {"skipped": str(numbers["skipped_steps"])}
    relative = numbers["loss"] / max(numbers["persistence"], 1e-30)
    return {"loss": f"{numbers['loss']:.4f}", "relative": f"{relative:.3f}", "skipped": str(numbers["skipped_steps"])}


def _count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names with slashes, and values that every tracker takes."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}/")
        elif value is not None:
            found[f"{prefix}{name}"] = value if isinstance(value, bool | int | float) else str(value)
    return found


def _hardware(accelerator: Accelerator) -> dict[str, Any]:
    cuda = accelerator.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(accelerator.device) if cuda else platform.machine(),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
