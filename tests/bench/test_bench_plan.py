"""The plan of a benchmark: which runs, which choices, in which order; nothing is trained here."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from hf_nino.bench.training.plan import BASELINE, Matrix, plan, rehearse
from hf_nino.bench.training.spec import RunSpec


@dataclass
class FakeMethod:
    grid: tuple = ({},)
    base: object = None


TASKS = {
    "words": SimpleNamespace(
        name="words", kind="language", steps=100, learning_rate=1e-3, constant_learning_rate=3e-4
    ),
    "small": SimpleNamespace(
        name="small", kind="language", steps=100, learning_rate=2e-3, constant_learning_rate=3e-4
    ),
    "cats": SimpleNamespace(name="cats", kind="images", steps=50, learning_rate=1e-2, constant_learning_rate=6e-3),
}
METHODS = {
    BASELINE: FakeMethod(),
    "linear": FakeMethod(({"period": 250}, {"period": 100}, {"period": 50})),
    "muon": FakeMethod(),
}


def valley(best: dict[str, float]):
    """A loss that is lowest at a method's best learning rate and at ``period=100``."""

    def loss(spec: RunSpec) -> float:
        period = dict(spec.settings).get("period")
        return abs(math.log2(spec.learning_rate / best[spec.method])) + (0.1 if period not in (None, 100) else 0)

    return loss


def finish(matrix: Matrix, loss) -> tuple:
    """The finished plan, the losses, and the runs in the order in which they were asked for."""
    losses, order = {}, []
    for _ in range(100):
        found = plan(matrix, TASKS.__getitem__, METHODS.__getitem__, losses)
        if not found.runs:
            return found, losses, order
        order.append(found.runs)
        losses |= {spec: loss(spec) for spec in found.runs}
    raise AssertionError("the plan does not end")


BEST = {BASELINE: 8e-3, "linear": 2e-3, "muon": 1.6e-2}
MATRIX = Matrix(tasks=("words",), methods=("linear", "muon"), selection={"language": "small"})


def test_a_sweep_ends_with_worse_learning_rates_on_both_sides():
    """The best learning rate of all is chosen, and half and double of it were tried, wherever a sweep began."""
    found, losses, _ = finish(replace(MATRIX, protocols=("tuned",)), valley(BEST))
    for name, best in BEST.items():
        assert found.choices["tuned"]["words"][name]["learning_rate"] == pytest.approx(best)
        tried = {spec.learning_rate for spec in losses if spec.task == "words" and spec.method == name}
        assert {best / 2, best, best * 2} <= {float(f"{rate:.4g}") for rate in tried}
    assert not found.unbracketed


def test_one_seed_finds_the_neighbourhood_and_all_of_them_decide():
    """The second and third seed run at the chosen learning rate, at half and at double of it, and nowhere else; the
    first one has come from afar."""
    found, losses, _ = finish(replace(MATRIX, protocols=("tuned",)), valley(BEST))
    for name, choice in found.choices["tuned"]["words"].items():
        runs = [s for s in losses if s.task == "words" and s.method == name]
        rates = {seed: {s.learning_rate for s in runs if s.seed == seed} for seed in (0, 1, 2)}
        best = choice["learning_rate"]
        assert rates[1] == rates[2] == {best / 2, best, best * 2}
        assert rates[0] > rates[1] if name == BASELINE else rates[0] >= rates[1]


def test_a_lucky_seed_does_not_choose_a_learning_rate_at_which_others_fail():
    """Where the first seed alone does best at a learning rate at which the others suffer, the median takes another."""

    def loss(spec):
        too_large = max(0.0, math.log2(spec.learning_rate / 2e-3))
        return valley(BEST)(spec) + (0.0 if spec.seed == 0 else 3 * too_large)

    found, _, _ = finish(replace(MATRIX, protocols=("tuned",), methods=("muon",)), loss)
    assert found.choices["tuned"]["words"][BASELINE]["learning_rate"] < 4e-3
    alone, _, _ = finish(replace(MATRIX, protocols=("tuned",), methods=("muon",), seeds=(0,)), loss)
    assert alone.choices["tuned"]["words"][BASELINE]["learning_rate"] == pytest.approx(8e-3)


def test_adamw_runs_wherever_a_nowcaster_on_it_was_swept(monkeypatch):
    """So both can be compared at learning rates that are too large; only nowcasters on AdamW ask for that."""
    matrix = replace(MATRIX, protocols=("tuned",), selection={})
    best = {**BEST, "linear": 4e-2}

    def rates(method):
        return {spec.learning_rate for spec in finish(matrix, valley(best))[1] if spec.method == method}

    assert not rates("linear") <= rates(BASELINE)
    monkeypatch.setitem(METHODS, "linear", FakeMethod(base=SimpleNamespace(name=BASELINE)))
    assert rates("linear") <= rates(BASELINE) and not rates("muon") <= rates(BASELINE) - rates("linear")


def test_settings_are_chosen_on_the_selection_task_with_a_seed_that_does_not_count():
    """The best of the grid is taken, and no run of the task itself was made with another one of it."""
    found, losses, _ = finish(MATRIX, valley(BEST))
    for protocol in found.choices.values():
        assert protocol["words"]["linear"]["settings"] == {"period": 100}
    settings = {s.settings for s in losses if s.task == "words" and s.method == "linear"}
    assert settings == {(("period", 100),)}
    assert {s.seed for s in losses if s.task == "small"} == {MATRIX.selection_seed}


def test_a_kind_without_a_selection_task_uses_the_defaults():
    """Nothing is chosen: the first entry of the grid runs."""
    found, losses, _ = finish(replace(MATRIX, tasks=("cats",)), valley(BEST))
    assert found.choices["fixed"]["cats"]["linear"]["settings"] == {"period": 250}
    assert {s.task for s in losses} == {"cats"}


def test_learning_rates_of_the_protocols():
    """`paper` and `fixed` take the task's own, `robust` a quarter of AdamW's best, for every method."""
    found, _, _ = finish(MATRIX, valley(BEST))
    rates = {
        protocol: {choice["learning_rate"] for choice in found.choices[protocol]["words"].values()}
        for protocol in ("paper", "fixed", "robust")
    }
    assert rates == {"paper": {3e-4}, "fixed": {1e-3}, "robust": {2e-3}}


def test_protocols_share_runs():
    """Where two protocols want the same run, it is wanted once."""
    same = dict.fromkeys(BEST, 1e-3)
    _, both, _ = finish(replace(MATRIX, protocols=("fixed", "tuned"), methods=("muon",)), valley(same))
    _, fixed, _ = finish(replace(MATRIX, protocols=("fixed",), methods=("muon",)), valley(same))
    _, tuned, _ = finish(replace(MATRIX, protocols=("tuned",), methods=("muon",)), valley(same))
    assert both.keys() == fixed.keys() | tuned.keys() and len(both) < len(fixed) + len(tuned)


def test_no_run_is_asked_for_twice_and_finished_ones_never():
    """Whatever is asked for is missing; what a finished plan has used is what it wanted."""
    found, losses, order = finish(MATRIX, valley(BEST))
    asked = [spec for runs in order for spec in runs]
    assert len(asked) == len(set(asked)) == len(losses)
    assert found.wanted == losses.keys()


def test_divergence_drives_a_sweep_down_and_never_wins():
    """Learning rates that diverge lose to any that does not, even when a sweep begins among them."""

    def loss(spec):
        return math.inf if spec.learning_rate > 6e-4 else valley(BEST)(spec)

    found, _, _ = finish(replace(MATRIX, protocols=("tuned",)), loss)
    for choice in found.choices["tuned"]["words"].values():
        assert choice["learning_rate"] == pytest.approx(5e-4)


def test_a_sweep_without_an_end_says_so():
    """A loss that falls for ever is not called bracketed; one with a lowest point is."""
    found, _, _ = finish(replace(MATRIX, protocols=("tuned",)), lambda spec: -spec.learning_rate)
    assert found.unbracketed and "adamw" in found.unbracketed[0]


def test_the_rehearsal_counts_what_a_plausible_benchmark_needs():
    """It is the matrix's exact need when AdamW's best is four times the task's learning rate for everybody."""
    matrix = replace(MATRIX, tasks=("words", "cats"))

    def loss(spec):
        return abs(math.log2(spec.learning_rate / TASKS[spec.task].learning_rate) - 2)

    _, losses, _ = finish(matrix, loss)
    assert rehearse(matrix, TASKS.__getitem__, METHODS.__getitem__) == losses.keys()


def test_specs_survive_json_and_have_names_of_their_own(tmp_path):
    """A spec is equal to itself after a round trip; different specs lie in different files with harmless names."""
    base = {"task": "words", "method": "nino:/a b/x.pt", "schedule": "cosine", "seed": 0, "steps": 10}
    one = RunSpec.of(**base, settings={"b": 1, "a": "x"}, learning_rate=1e-3)
    other = RunSpec.of(**base, settings={"a": "x", "b": 2}, learning_rate=1e-3)
    assert (
        RunSpec.from_dict(one.to_dict()) == one == RunSpec.of(**base, settings={"a": "x", "b": 1}, learning_rate=1e-3)
    )
    assert one.path(tmp_path) != other.path(tmp_path)
    assert "/" not in one.path(tmp_path).name and " " not in one.path(tmp_path).name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ()}, "`methods`"),
        ({"protocols": ("paper", "fast")}, "fast"),
        ({"seeds": (0, 1000)}, "`selection_seed`"),
        ({"steps": 3}, "`steps`"),
    ],
)
def test_a_matrix_that_makes_no_sense_is_refused(change, words):
    """One error that names what is wrong."""
    with pytest.raises(ValueError, match=words):
        replace(MATRIX, **change)
