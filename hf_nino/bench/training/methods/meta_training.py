"""Makes the learned optimizer: ``python -m hf_nino.bench.training.methods.meta_training``.

First the rule imitates Adam (as Chen et al., 2020, arXiv 2010.09089, do), then it learns from what its own steps lead
to.  Runs of up to 500 steps are unrolled in windows of K steps; the objective is the mean log loss within a window.
Its gradient by the step s is taken as

    -lr_s * sum_{t > s} grad log loss_t / K,

which leaves out one thing: other steps would make the rule see other gradients later (Andrychowicz et al., 2016, arXiv
1606.04474).  No second derivative is needed, and no unrolled graph is kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .learned import DECAYS, RECIPE, WEIGHTS, UpdateRule, observe, rule_inputs
from .meta_tasks import KINDS, Schedule, TinyTask

IMITATION_STRETCH = 8
"""Steps of Adam's path in an iteration of imitation."""

DIVERGED = 1e3
"""A loss beyond which a run is given up."""

VALIDATION_RATES = (8e-3, 1.6e-2, 3.2e-2)
"""Where Adam does best on tiny tasks is in the middle."""

VALIDATION_SEED = 1 << 40
"""Of the first validation run; those of training are below."""

# Where the element's own Adam step is among the features: after gradient, parameter and averages over the tensor's
# root mean squares, and the gradient over its own.
_ADAM = 2 + len(DECAYS) + 1 + DECAYS.index(0.9)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, up to the rounding of the machine.

    Args:
        imitation: iterations of imitating Adam, before.
        blocks: of meta-training, each with new runs; after each, a checkpoint.
        iterations: of a block; each unrolls a window of every run.
        runs: at once.
        window: steps, K.
        longest: steps of a run, at most; at least 60.
        learning_rate: of meta-training (Adam, cosine to 0).
        validate_every: blocks; the weights are chosen among those after imitation and after so many blocks.
        validation: tasks that they are chosen by.
        validation_steps: of a run of each of them.
        seed: of everything.
    """

    imitation: int = 300
    blocks: int = 12
    iterations: int = 15
    runs: int = 4
    window: int = 40
    longest: int = 500
    learning_rate: float = 5e-4
    validate_every: int = 4
    validation: int = 6
    validation_steps: int = 250
    seed: int = 0


class InnerRun:
    """A tiny task under way, driven by a rule."""

    def __init__(self, task: TinyTask, schedule: Schedule) -> None:
        self.task, self.schedule = task, schedule
        self.parameters = task.initial()
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.averages = [torch.zeros(len(DECAYS), size) for size in self.sizes]
        self.second = [torch.zeros(size) for size in self.sizes]
        self.step = 0

    @property
    def left(self) -> int:
        """Steps."""
        return self.schedule.steps - self.step

    def look(self) -> tuple[float, Tensor]:
        """Loss and flat gradient on a new batch."""
        loss, gradients = self.task.gradients(self.parameters)
        return loss, torch.cat([gradient.reshape(-1) for gradient in gradients])

    @torch.no_grad()
    def inputs(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What the rule sees at the next step, of all tensors: features and signs."""
        self.step += 1
        seen = []
        flat = zip(self.parameters, gradient.split(self.sizes), self.averages, self.second, strict=True)
        for parameter, part, averages, second in flat:
            observe(averages, second, part)
            seen.append(rule_inputs(parameter.reshape(-1), part, averages, second, self.step))
        features, signs = zip(*seen, strict=True)
        return torch.cat(features), torch.cat(signs)

    @torch.no_grad()
    def move(self, steps: Tensor) -> None:
        """Take steps [N], in learning rates."""
        for parameter, part in zip(self.parameters, steps.split(self.sizes), strict=True):
            parameter.sub_(part.view_as(parameter), alpha=self.schedule(self.step))


def imitate(rule: UpdateRule, run: InnerRun) -> Tensor:
    """Mean squared distance of the rule's steps to Adam's, on a stretch of Adam's path."""
    distances = []
    for _ in range(min(IMITATION_STRETCH, run.left)):
        features, sign = run.inputs(run.look()[1])
        adam = adam_steps(features, sign)
        distances.append((rule(features, sign) - adam).square().mean())
        run.move(adam)
    return torch.stack(distances).mean()


def adam_steps(features: Tensor, sign: Tensor) -> Tensor:
    """What Adam would do: one of the features."""
    return sign * features[:, _ADAM]


def meta_gradient(rule: UpdateRule, run: InnerRun, steps: int) -> float:
    """Unroll a window, and add the gradient of the mean log loss after its steps to the rule's.

    Returns:
        That mean; ``nan`` where the run left the finite, and then no gradient is added.
    """
    steps = min(steps, run.left)
    seen, losses, pulls = [], [], []
    loss, gradient = run.look()
    for _ in range(steps):
        features, sign = run.inputs(gradient)
        with torch.no_grad():
            run.move(rule(features, sign))
        seen.append((features, sign, run.schedule(run.step)))
        loss, gradient = run.look()
        losses.append(loss)
        pulls.append(gradient / loss)
    if not all(math.isfinite(loss) and loss < DIVERGED for loss in losses):
        return math.nan
    later = torch.zeros_like(gradient)
    for (features, sign, rate), pull in zip(reversed(seen), reversed(pulls), strict=True):
        later += pull
        (-rate / steps * later @ rule(features, sign)).backward()
    return sum(map(math.log, losses)) / steps


def drawn_run(seed: int, longest: int) -> InnerRun:
    """A run that ``seed`` decides: task, length, learning rate and schedule."""
    task = KINDS[seed % len(KINDS)](seed)
    steps = round(task.between(60, longest))
    return InnerRun(task, Schedule(steps, task.between(4e-3, 6e-2), cosine=bool(task.whole(0, 1))))


@torch.no_grad()
def final_loss(rule: UpdateRule | None, seed: int, rate: float, steps: int) -> float:
    """Mean loss of the last tenth of a run by the rule, or by Adam (``None``); infinity where it diverged."""
    run = InnerRun(KINDS[seed % len(KINDS)](seed), Schedule(steps, rate, cosine=True))
    losses = []
    while run.left:
        loss, gradient = run.look()
        if not math.isfinite(loss):
            return math.inf
        losses.append(loss)
        seen = run.inputs(gradient)
        run.move(adam_steps(*seen) if rule is None else rule(*seen))
    tail = losses[-max(steps // 10, 1) :]
    return sum(tail) / len(tail)


def validate(rule: UpdateRule | None, recipe: Recipe) -> float:
    """Mean over unseen tasks of the log of the final loss at the best of :data:`VALIDATION_RATES`."""
    best = [
        min(final_loss(rule, VALIDATION_SEED + run, rate, recipe.validation_steps) for rate in VALIDATION_RATES)
        for run in range(recipe.validation)
    ]
    return sum(map(math.log, best)) / len(best)


class MetaTraining:
    """Meta-training under way.

    Attributes:
        rule: as it is now.
        block: blocks done; 0 after imitation, -1 before.
        history: validations so far, that after imitation first.
        best: the weights with the lowest of them.
        cpu_seconds: spent so far.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.rule = UpdateRule()
        self.optimizer = torch.optim.Adam(self.rule.parameters(), betas=(0.9, 0.99))
        self.block = -1
        self.history: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.cpu_seconds = 0.0

    def advance(self, progress: tqdm) -> None:
        """One block, and a validation where one is due."""
        started = time.process_time()
        if self.block < 0:
            self._imitate(progress)
        else:
            self._train(progress)
        self.block += 1
        if self.block % self.recipe.validate_every == 0:
            self.history.append(validate(self.rule, self.recipe))
            if self.history[-1] == min(self.history):
                self.best = {name: tensor.clone() for name, tensor in self.rule.state_dict().items()}
            progress.set_postfix(validation=f"{self.history[-1]:.4f}", best=f"{min(self.history):.4f}")
        self.cpu_seconds += time.process_time() - started

    def _imitate(self, progress: tqdm) -> None:
        optimizer = torch.optim.Adam(self.rule.parameters())
        seeds = self._seeds()
        run = None
        for iteration in range(self.recipe.imitation):
            _set_rate(optimizer, 3e-3 * (1 - iteration / self.recipe.imitation))
            run = run if run is not None and run.left else drawn_run(next(seeds), self.recipe.longest)
            optimizer.zero_grad()
            imitate(self.rule, run).backward()
            optimizer.step()
            progress.update()

    def _train(self, progress: tqdm) -> None:
        recipe = self.recipe
        total, seeds = recipe.blocks * recipe.iterations, self._seeds()
        runs: list[InnerRun | None] = [None] * recipe.runs
        for iteration in range(recipe.iterations):
            done = (self.block * recipe.iterations + iteration) / total
            _set_rate(self.optimizer, recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done)))
            sums = [torch.zeros_like(parameter) for parameter in self.rule.parameters()]
            for place, run in enumerate(runs):
                run = run if run is not None and run.left else drawn_run(next(seeds), recipe.longest)
                self.optimizer.zero_grad()
                finite = math.isfinite(meta_gradient(self.rule, run, recipe.window))
                runs[place] = run if finite else None
                if finite:
                    _add_normalized(sums, [parameter.grad for parameter in self.rule.parameters()])
            for parameter, gradient in zip(self.rule.parameters(), sums, strict=True):
                parameter.grad = gradient / recipe.runs
            self.optimizer.step()
            progress.update()

    def _seeds(self) -> Iterator[int]:
        """Of the runs of a block, all different; tasks alternate."""
        return itertools.count((self.recipe.seed * 1000 + self.block + 1) * 10_000)

    def save(self, path: Path) -> None:
        """Everything, into one file; whole or not at all."""
        tensors = {f"rule/{name}": tensor for name, tensor in self.rule.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in state.items()}
        numbers = {"block": self.block, "history": self.history, "cpu_seconds": self.cpu_seconds}
        temporary = path.with_name(f"{path.name}.part")
        save_file(tensors, temporary, {"recipe": json.dumps(asdict(self.recipe)), "numbers": json.dumps(numbers)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, recipe: Recipe) -> MetaTraining:
        """What :meth:`save` wrote.

        Raises:
            ValueError: it is about another recipe.
        """
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        found = json.loads(about["recipe"])
        if found != asdict(recipe):
            other = {name: value for name, value in found.items() if value != asdict(recipe)[name]}
            raise ValueError(
                f"the checkpoint {str(path)!r} is of another recipe, with {other}: give another folder, or remove it"
            )
        training = cls(recipe)
        vars(training).update(json.loads(about["numbers"]))
        parts: dict[str, dict[str, Tensor]] = {"rule": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        training.rule.load_state_dict(parts["rule"])
        training.best = parts["best"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = tensor
        groups = training.optimizer.state_dict()["param_groups"]
        training.optimizer.load_state_dict({"state": state, "param_groups": groups})
        return training


def meta_train(recipe: Recipe, folder: Path, *, blocks: int | None = None) -> MetaTraining:
    """Meta-train, on from the checkpoint in ``folder`` if there is one; a resumed run equals an uninterrupted one.

    Args:
        folder: for the checkpoint; made if need be.
        blocks: stop after so many, not at the recipe's end.

    Raises:
        ValueError: the checkpoint is of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.safetensors"
    training = MetaTraining.load(path, recipe) if path.exists() else MetaTraining(recipe)
    end = recipe.blocks if blocks is None else blocks
    done = 0 if training.block < 0 else recipe.imitation + training.block * recipe.iterations
    total = recipe.imitation + end * recipe.iterations
    with tqdm(total=total, initial=done, desc="meta-training", unit="iteration") as progress:
        while training.block < end:
            training.advance(progress)
            training.save(path)
    return training


def export(training: MetaTraining, weights: Path, recipe: Path) -> None:
    """Write the best weights, and beside them how they came about."""
    save_file(training.best, weights)
    changed = {name: value for name, value in asdict(training.recipe).items() if value != getattr(Recipe(), name)}
    options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())
    about = {
        "command": f"python -m {__spec__.name}{options}",
        "recipe": asdict(training.recipe),
        "shapes": {name: list(tensor.shape) for name, tensor in training.best.items()},
        "validation": {
            "what": "mean log of the final loss on unseen tiny tasks, at the best of three learning rates",
            "adam": validate(None, training.recipe),
            "after_imitation_and_blocks": training.history,
            "chosen_block": training.history.index(min(training.history)) * training.recipe.validate_every,
        },
        "cpu_seconds": round(training.cpu_seconds),
        "torch": torch.__version__,
    }
    recipe.write_text(json.dumps(about, indent=1) + "\n", "utf-8")


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _add_normalized(sums: list[Tensor], gradients: list[Tensor]) -> None:
    """Add gradients at a common norm of 1: tasks differ by orders of magnitude in theirs."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().clamp_min(1e-30)
    for total, gradient in zip(sums, gradients, strict=True):
        total += gradient / norm


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description="Make the learned optimizer anew.")
    parser.add_argument("--folder", type=Path, default=Path("runs/l2o"), help="for the checkpoint (%(default)s)")
    parser.add_argument("--out", type=Path, default=WEIGHTS.parent, help="for the weights (default: the package)")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="(%(default)s)")
    given = vars(parser.parse_args(arguments))
    folder, out = given.pop("folder"), given.pop("out")
    torch.set_num_threads(1)  # tiny tensors
    export(meta_train(Recipe(**given), folder), out / WEIGHTS.name, out / RECIPE.name)


if __name__ == "__main__":
    main()
