"""The benchmark's report: what runs say about each other, where the answer is known.  Nothing is trained here."""

import json
import math
import re
from itertools import pairwise

import pytest

from hf_nino.bench.training import runner
from hf_nino.bench.training.numbers import number_spread, percent, percent_spread, settings_text, small_percent
from hf_nino.bench.training.pictures.style import COLOURS, groups, looks, spread_out, wrapped
from hf_nino.bench.training.report import read_summary, write_report
from hf_nino.bench.training.results import Run, load_results
from hf_nino.bench.training.spec import RunSpec
from hf_nino.bench.training.statistics import MEASURES, Spread, against, middle_run
from hf_nino.bench.training.summary import Comparison, MethodInfo, Summary, TaskInfo, public_names, summarise
from hf_nino.bench.training.tables import (
    BEGIN,
    END,
    aims_table,
    headline,
    methods_by_tasks,
    readme_table,
    replace_marked,
    task_table,
    up_to_date,
)
from hf_nino.bench.training.verdicts import AIMS, best_nowcaster, verdicts

STEPS, EVERY = 1000, 50
FIRST, LAST = 6.0, 3.0
PNG = b"\x89PNG"


def line(speed=1.0, rises=()):
    """A loss that falls from 6 to 3 in ``STEPS / speed`` steps and further, and is 1 higher at some steps."""
    return lambda step: FIRST - (FIRST - LAST) * speed * step / STEPS + (step in rises)


def record(
    method="adamw", *, loss=None, protocol="fixed", rate=1e-3, seed=0, task="words", kind="language", **changes
):
    """A run's JSON."""
    loss = loss or line()
    steps = changes.pop("steps", STEPS)
    last = changes.pop("last", steps)
    accuracy, target = changes.pop("accuracy", None), changes.pop("target", None)
    slowness = changes.pop("slowness", 1.0)
    evaluations = [
        {"step": step, "loss": loss(step), "seconds": 0.1 * step, "cpu_seconds": 0.05 * step * slowness}
        | ({} if accuracy is None else {"accuracy": accuracy(step)})
        for step in range(0, last + 1, EVERY)
    ]
    return {
        "spec": {
            "task": task,
            "method": method,
            "settings": changes.pop("settings", {}),
            "schedule": "constant" if protocol == "paper" else "cosine",
            "learning_rate": rate,
            "seed": seed,
            "steps": steps,
        },
        "task": {"kind": kind, "name": task, "steps": steps} | ({} if target is None else {"target": target}),
        "parameters": 1000,
        "diverged": False,
        "evaluations": evaluations,
        "train_losses": [],
        "events": [],
        "nowcast_seconds": 0.0,
        "train_seconds": 100.0,
        "train_cpu_seconds": 50.0,
        "machine": {"device": "cpu"},
        **changes,
    }


def event(step, accepted=True, back=None):
    return {"step": step, "horizon": 3, "seconds": 0.1, "accepted": accepted, "reason": "", "taken_back_to": back}


def save(out, records, choices=None):
    """A benchmark's folder; by default every run is a choice of the ``fixed`` protocol."""
    chosen = {}
    for number, one in enumerate(records):
        spec = one["spec"]
        path = out / "runs" / spec["task"] / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(one))
        cell = {"settings": spec["settings"], "learning_rate": spec["learning_rate"]}
        chosen.setdefault("fixed", {}).setdefault(spec["task"], {})[spec["method"]] = cell
    (out / "choices.json").write_text(json.dumps(chosen if choices is None else choices))
    return out


def compared(out, records, choices=None, protocol="fixed", task="words", method="linear"):
    """The comparison of one method with AdamW."""
    found = summarise(load_results(save(out, records, choices))).get(protocol, task, method)
    assert found is not None
    return found


def seeds(method, losses, **changes):
    return [record(method, loss=loss, seed=seed, **changes) for seed, loss in enumerate(losses)]


# -- what two runs say about each other ------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [1.25, 2.0, 1.0])
def test_a_run_that_needs_a_share_of_the_steps_saves_the_rest(tmp_path, speed):
    """AdamW's curve with its steps divided by 1.25 saves 20%, for the first time and for good, and ends lower by what
    it learned in the steps that were left; AdamW's own curve saves nothing and is not behind."""
    found = compared(tmp_path, seeds("linear", [line(speed)] * 3) + seeds("adamw", [line()] * 3)).measures
    for name in ("steps_saved", "steps_saved_for_good", "time_saved"):
        assert found[name].median == pytest.approx(1 - 1 / speed, abs=1e-3)
    assert found["steps_behind"].median == pytest.approx(1 / speed - 1, abs=1e-3)
    assert found["loss_difference"].median == pytest.approx((LAST - FIRST) * (speed - 1), abs=1e-3)


def test_time_is_processor_time_on_a_cpu_and_wall_time_on_a_gpu(tmp_path):
    """A method whose steps take twice the processor time loses what it saves in steps; where processor time says
    nothing, it does not."""
    runs = [record("linear", loss=line(2), slowness=2), record()]
    assert compared(tmp_path / "a", runs).measures["time_saved"].median == pytest.approx(0, abs=1e-3)
    for run in runs:
        run["machine"] = {"device": "H200"}
    assert compared(tmp_path / "b", runs).measures["time_saved"].median == pytest.approx(0.5, abs=1e-3)


def test_a_rise_after_the_target_was_reached_counts_for_good_only(tmp_path):
    """With a rise of 1 at step 900, a run 1.25 times as fast is there at step 800, and for good when the rise is
    over; one twice as fast is so low by then that the rise does not matter."""
    found = compared(tmp_path, [record("linear", loss=line(2, rises=(900,))), record()]).measures
    assert found["steps_saved"].median == found["steps_saved_for_good"].median == 0.5
    found = compared(tmp_path, [record("linear", loss=line(1.25, rises=(900,))), record()]).measures
    assert found["steps_saved"].median == pytest.approx(0.2, abs=1e-3)
    # 3.625 at step 900 and 2.4375 at step 950: the line is at 3 after 0.526 of these steps
    assert found["steps_saved_for_good"].median == pytest.approx(1 - 0.9263, abs=1e-3)


def test_a_slower_run_has_not_got_there_and_is_behind_by_how_much_earlier_adamw_was(tmp_path):
    """At 0.8 of AdamW's speed the run ends at a loss that AdamW had after 80% of its steps: 20% behind."""
    found = compared(tmp_path, [record("linear", loss=line(0.8)), record()]).measures
    assert not found["steps_saved"].reached and found["steps_saved"].missed == 1
    assert found["steps_behind"].median == pytest.approx(0.2, abs=1e-3)
    assert found["loss_difference"].median == pytest.approx(0.6, abs=1e-3)


def test_a_run_that_diverged_has_reached_nothing(tmp_path):
    """Even if it was below AdamW's final loss before; the same run, whole, was."""
    runs = [record("linear", loss=line(2)), record()]
    assert compared(tmp_path / "a", runs).measures["steps_saved"].median == pytest.approx(0.5, abs=1e-3)
    runs[0] = record("linear", loss=line(2), last=700, diverged=True)
    found = compared(tmp_path / "b", runs)
    assert found.diverged == (0,)
    assert found.measures["final_loss"].median == math.inf
    assert found.measures["steps_saved"].median == -math.inf and found.measures["steps_behind"].median == math.inf


def test_a_run_that_failed_or_ended_at_once_is_one_that_diverged(tmp_path):
    """A record with an error, and one with a single evaluation, count as worst."""
    failed = {"spec": record("linear", seed=0)["spec"], "error": "Traceback\nRuntimeError: out of luck"}
    short = record("linear", seed=1, last=0, diverged=True)
    runs = [failed, short, *seeds("adamw", [line()] * 2)]
    summary = summarise(load_results(save(tmp_path, runs)))
    one = summary.get("fixed", "words", "linear")
    assert one is not None and one.diverged == (0, 1) and one.measures["steps_saved"].missed == 2
    assert any("out of luck" in text for text in summary.failed)


def test_where_adamw_diverged_its_seed_is_not_compared(tmp_path):
    """Two of three seeds are left for the comparison, three for the final loss."""
    plain = seeds("adamw", [line()] * 3)
    plain[1]["diverged"] = True
    found = compared(tmp_path, seeds("linear", [line(1.25)] * 3) + plain).measures
    assert found["steps_saved"].count == found["loss_difference"].count == 2 and found["final_loss"].count == 3
    assert found["steps_saved"].median == pytest.approx(0.2, abs=1e-3)


def test_adamw_that_learned_nothing_cannot_be_outrun(tmp_path):
    """No division by its zero steps."""
    assert "steps_saved" not in compared(tmp_path, [record("linear"), record(loss=lambda step: 4.0)]).measures


def test_steps_to_a_target_accuracy(tmp_path):
    """Accuracy that rises to 1 in 500 and in 1000 steps is at 0.9 after 450 and 900: half saved.  Who never gets there
    has no steps."""
    common = {"kind": "images", "target": 0.9}
    runs = [
        record("linear", accuracy=lambda step: min(step / 500, 1.0), **common),
        record("muon", accuracy=lambda step: step / 2000, **common),
        record(accuracy=lambda step: step / 1000, **common),
    ]
    summary = summarise(load_results(save(tmp_path, runs)))
    linear, muon = (summary.get("fixed", "words", name).measures for name in ("linear", "muon"))
    assert linear["target_steps"].median == pytest.approx(450) and muon["target_steps"].median == math.inf
    assert linear["target_steps_saved"].median == pytest.approx(0.5, abs=1e-3)
    assert muon["target_steps_saved"].missed == 1 and muon["accuracy"].median == 0.5
    table = task_table(summary, "fixed", "words")
    assert "steps to 90%" in table and "| 450 | 50% |" in table and "| none | none |" in table


def test_races_are_compared_by_their_ends_only(tmp_path):
    """Who is at the target after half of the steps has saved half of them; losses after unequal numbers of steps are
    not compared, nor do they count for an aim.  Runs that all go to their last step (the control) are."""
    common = {"kind": "images", "target": 0.9, "protocol": "paper"}

    def run(method, last, **changes):
        return record(method, last=last, accuracy=lambda step: 0.9 * step / last, **common, **changes)

    choices = {"paper": {"words": {m: {"settings": {}, "learning_rate": 1e-3} for m in ("adamw", "linear")}}}
    for adamw, saved in ((800, 0.5), (STEPS, 0.6)):
        runs = [run("linear", 400), run("adamw", adamw)]
        summary = summarise(load_results(save(tmp_path / str(adamw), runs, choices)))
        found = summary.get("paper", "words", "linear").measures
        assert found["target_steps"].median == 400 and found["target_steps_saved"].median == pytest.approx(saved)
        assert not found.keys() & {"loss_difference", "steps_saved", "steps_saved_for_good", "steps_behind"}
        assert verdicts(summary, "linear")["loss"].passed is None
        assert "| 400 |" in task_table(summary, "paper", "words")
        assert f"{saved:.0%}" in methods_by_tasks(summary, "paper", "images", "target_steps_saved")
        assert methods_by_tasks(summary, "paper", "images", "steps_saved") == ""
    runs = [run("linear", STEPS), run("adamw", STEPS)]
    assert "loss_difference" in compared(tmp_path / "control", runs, choices, "paper").measures


def test_nowcasts_are_counted_and_their_time_is_a_share_of_training_time(tmp_path):
    """Of four nowcasts at 100 to 400, those from step 200 to the event at 320 were taken back; 0.5 of 100 seconds were
    spent on them.  AdamW has neither."""
    events = [event(step) for step in (100, 200, 300)]
    events += [event(320, accepted=False, back=200), event(400), event(500, accepted=False)]
    runs = [record("linear", events=events, nowcast_seconds=0.5), record()]
    run = Run.from_record(runs[0])
    assert run.written == (100, 200, 300, 400) and run.taken_back == (200, 300)
    summary = summarise(load_results(save(tmp_path, runs)))
    found = summary.get("fixed", "words", "linear").measures
    assert (found["overhead"].median, found["written"].median, found["taken_back"].median) == (0.005, 4, 2)
    assert not {"overhead", "written"} & summary.get("fixed", "words", "adamw").measures.keys()


# -- protocols -------------------------------------------------------------------------------------------------------

CHOICES = {
    "fixed": {"words": {m: {"settings": {}, "learning_rate": 1e-3} for m in ("adamw", "linear")}},
    "tuned": {
        "words": {
            "adamw": {"settings": {}, "learning_rate": 8e-3},
            "linear": {"settings": {}, "learning_rate": 2e-3},
        }
    },
    "robust": {"words": {m: {"settings": {}, "learning_rate": 2e-3} for m in ("adamw", "linear")}},
}


def sweep(adamw, linear):
    """Runs at several learning rates, each a line to its own final loss."""
    found = []
    for method, losses in (("adamw", adamw), ("linear", linear)):
        for rate, loss in losses.items():
            found.append(record(method, loss=line((FIRST - loss) / (FIRST - LAST)), rate=rate))
    return found


def test_tuned_compares_each_at_its_own_best(tmp_path):
    """AdamW at 8e-3 (3.0) with the method at 2e-3 (2.4), whatever they have at other learning rates."""
    runs = sweep({1e-3: 5.0, 2e-3: 4.0, 8e-3: 3.0}, {1e-3: 4.0, 2e-3: 2.4, 8e-3: 5.5})
    found = compared(tmp_path, runs, CHOICES, "tuned")
    assert found.learning_rate == 2e-3
    assert found.measures["loss_difference"].median == pytest.approx(-0.6, abs=1e-3)
    assert found.measures["steps_saved"].median == pytest.approx(1 - 3 / 3.6, abs=1e-3)


@pytest.mark.parametrize(("loss", "share"), [(3.2, 0.8), (4.0, 0.0), (4.5, -0.5), (2.5, 1.5)])
def test_robust_is_the_share_of_what_the_sweep_recovers(tmp_path, loss, share):
    """AdamW has 4.0 at a quarter of its best learning rate and 3.0 at its best; who has 3.2 there recovers 80%."""
    runs = sweep({1e-3: 5.0, 2e-3: 4.0, 8e-3: 3.0}, {1e-3: 5.0, 2e-3: loss})
    found = compared(tmp_path, runs, CHOICES, "robust")
    assert found.measures["recovered"].median == pytest.approx(share, abs=1e-3)


def test_where_a_sweep_recovers_nothing_there_is_no_share_of_it(tmp_path):
    """AdamW is as good at a quarter of what was chosen: no number, and no division by zero."""
    runs = sweep({1e-3: 5.0, 2e-3: 3.0, 8e-3: 3.0}, {1e-3: 5.0, 2e-3: 2.9})
    assert "recovered" not in compared(tmp_path, runs, CHOICES, "robust").measures


def test_the_schedule_and_the_settings_tell_runs_apart(tmp_path):
    """A run of another schedule or with other settings is not the one that was chosen."""
    runs = [record("linear", loss=line(1.25), settings={"period": 100}), record()]
    runs += [
        record("linear", loss=line(3)),
        record("linear", loss=line(3), protocol="paper", settings={"period": 100}),
    ]
    choices = {
        "fixed": {
            "words": {
                "adamw": {"settings": {}, "learning_rate": 1e-3},
                "linear": {"settings": {"period": 100}, "learning_rate": 1e-3},
            }
        }
    }
    assert compared(tmp_path, runs, choices).measures["steps_saved"].median == pytest.approx(0.2, abs=1e-3)


def test_the_seed_that_chose_settings_does_not_count(tmp_path):
    """Runs of seed 1000 are left out, and of runs of two lengths the longer count."""
    runs = [*seeds("linear", [line(1.25)] * 3), *seeds("adamw", [line()] * 3)]
    runs += [record("linear", loss=line(3), seed=1000), record(seed=1000), record("linear", seed=3, steps=100)]
    assert compared(tmp_path, runs).seeds == (0, 1, 2)


# -- noise -----------------------------------------------------------------------------------------------------------


def test_who_did_not_get_there_is_worse_than_any_who_did():
    """Of three, one may fail and two may not; of two, none."""
    nothing = -math.inf
    assert Spread.of([0.1, 0.3, nothing]) == Spread(0.1, nothing, 0.3, 3, 1)
    assert not Spread.of([0.1, nothing, nothing]).reached
    assert not Spread.of([0.1, nothing]).reached and Spread.of([0.1, 0.2]).median == pytest.approx(0.15)
    assert Spread.of([]) is None


def test_no_more_digits_than_the_spread_supports():
    """A loss that seeds know to 0.05 has two digits, to 0.005 three; shares are whole percent; what was not reached
    says so."""
    assert number_spread(Spread.of([3.3812, 3.3555, 3.4099]), alone=2) == "3.38 [3.36..3.41]"
    assert number_spread(Spread.of([3.3812, 3.3829, 3.3863]), alone=2) == "3.383 [3.381..3.386]"
    assert number_spread(Spread.of([3.3812]), alone=2) == "3.38"
    assert number_spread(Spread.of([1234, 1534, 1434]), alone=-1, most=0) == "1,430 [1,230..1,530]"
    assert number_spread(Spread.of([-0.5, 0.1, math.inf]), alone=2, signed=True) == "+0.10 [-0.50..none]"
    assert percent_spread(Spread.of([0.254, 0.2149, 0.281]), Spread.of([0.1])) == "25% (10%) [21..28]"
    assert percent_spread(Spread.of([0.254, -math.inf, 0.281])) == "25% [none..28]"
    assert percent_spread(Spread.of([-math.inf] * 3), Spread.of([-math.inf] * 3)) == "none"
    assert percent_spread(Spread.of([0.3]), Spread.of([-math.inf])) == "30% (none)"
    assert percent(-0.001) == "0%" and percent(0.125) == "13%"
    assert [small_percent(Spread.of([v])) for v in (0.0, 1e-4, 0.0034, 0.2)] == ["0.0%", "<0.1%", "0.3%", "20%"]
    assert settings_text({}) == "default" and settings_text({"a": 1, "b": "x"}) == "a 1, b x"


def test_the_median_seed_is_drawn_bold():
    """The middle final loss of three; the worse of two; none if it diverged."""
    runs = [Run.from_record(record(loss=line(speed), seed=i)) for i, speed in enumerate((1.0, 3.0, 2.0))]
    assert middle_run(runs).spec.seed == 2 and middle_run(runs[:2]).spec.seed == 0 and middle_run([]) is None
    lost = [Run(spec=run.spec) for run in runs[:2]]
    assert middle_run([*lost, runs[2]]) is None and against(lost[0], lost[1]) == {}


# -- aims ------------------------------------------------------------------------------------------------------------

GOOD = {"steps_saved": 0.3, "recovered": 0.75, "overhead": 0.004, "steps_behind": -0.3, "loss_difference": -0.1}


def outcome(protocol, task, method, measures):
    spreads = {name: Spread.of([value] * 3) for name, value in measures.items()}
    return Comparison(protocol, task, method, {}, 1e-3, (0, 1, 2), (), {"final_loss": Spread.of([3.0] * 3)} | spreads)


def imagined(changes=None, methods=("linear",), parameters=20_000_000, tasks=("a", "b", "c")):
    """A summary in which all is good but for ``changes``: (protocol, task, method) -> measures."""
    found = []
    for protocol in ("fixed", "tuned", "robust"):
        for task in tasks:
            found.append(outcome(protocol, task, "adamw", {}))
            for method in methods:
                found.append(outcome(protocol, task, method, GOOD | (changes or {}).get((protocol, task, method), {})))
    infos = {
        name: MethodInfo(name.title(), name, None if name == "adamw" else "adamw") for name in ("adamw", *methods)
    }
    return Summary({task: TaskInfo("language", parameters, STEPS) for task in tasks}, infos, tuple(found))


def test_all_aims_are_reached_where_everything_is_good():
    """Six verdicts, all pass."""
    found = verdicts(imagined(), "linear")
    assert {name: verdict.word for name, verdict in found.items()} == dict.fromkeys(AIMS, "pass")


@pytest.mark.parametrize(
    ("name", "protocol", "bad"),
    [
        ("fixed", "fixed", {"steps_saved": 0.249}),
        ("fixed", "fixed", {"steps_saved": -math.inf}),
        ("tuned", "tuned", {"steps_saved": 0.099}),
        ("robust", "robust", {"recovered": 0.69}),
    ],
)
def test_a_majority_of_the_tasks_decides(name, protocol, bad):
    """One bad task of three does no harm, two of three or of four do, and no other aim is touched."""
    one = verdicts(imagined({(protocol, "a", "linear"): bad}), "linear")
    assert one[name].passed and one[name].passing == 2
    for tasks in ("abc", "abcd"):
        half = verdicts(imagined({(protocol, task, "linear"): bad for task in "ab"}, tasks=tuple(tasks)), "linear")
        assert [key for key, verdict in half.items() if not verdict.passed] == [name]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("overhead", {"overhead": 0.0101}),
        ("loss", {"loss_difference": 0.031}),
        ("loss", {"loss_difference": math.inf}),
        ("steps", {"steps_behind": 0.0101}),
    ],
)
def test_never_means_never(name, bad):
    """One case, in whichever protocol, is enough; at the limit it is not."""
    found = verdicts(imagined({("robust", "c", "linear"): bad}), "linear")
    assert [key for key, verdict in found.items() if not verdict.passed] == [name]
    limit = {"overhead": 0.01, "loss_difference": 0.03, "steps_behind": 0.01}
    assert all(verdict.passed for verdict in verdicts(imagined({("robust", "c", "linear"): limit}), "linear").values())


def test_what_was_not_measured_is_neither_passed_nor_failed():
    """Overhead counts from 10 million parameters on; the others need their protocol."""
    small = verdicts(imagined(parameters=9_999_999), "linear")
    assert small["overhead"].word == "not measured"
    summary = imagined()
    only = Summary(summary.tasks, summary.methods, tuple(summary.find("fixed")))
    words = {name: verdict.word for name, verdict in verdicts(only, "linear").items()}
    assert words["tuned"] == words["robust"] == "not measured" and words["fixed"] == "pass"
    assert "not measured" in aims_table(only)


def test_one_nowcaster_is_the_best_for_all_aims():
    """It is the one that reaches most; then the one that saves most in `fixed`.  AdamW and methods that do not nowcast
    on it are none."""
    much = {("fixed", task, "momentum"): {"steps_saved": 0.5} for task in "abc"}
    assert best_nowcaster(imagined(much, ("linear", "momentum"))) == "momentum"
    behind = much | {("robust", "a", "momentum"): {"steps_behind": 0.1}}
    assert best_nowcaster(imagined(behind, ("linear", "momentum"))) == "linear"
    summary = imagined()
    others = Summary(summary.tasks, {"adamw": summary.methods["adamw"]}, summary.comparisons)
    assert best_nowcaster(others) is None and "No nowcaster" in aims_table(others)
    table = aims_table(imagined(behind, ("linear", "momentum")))
    assert "**Linear**" in table and "| Momentum |" in table and "10.0%, **fail**" in table


# -- tables ----------------------------------------------------------------------------------------------------------


def test_the_headline_is_the_median_task_of_median_seeds():
    """Of tasks with 10%, 30% and nothing, the middle one and the range; a method without a protocol has an empty
    cell, and one without some tasks says so."""
    changes = {("fixed", "a", "linear"): {"steps_saved": 0.1}, ("fixed", "b", "linear"): {"steps_saved": -math.inf}}
    summary = imagined(changes, ("linear", "momentum"))
    dropped = [one for one in summary.find() if (one.method, one.protocol) != ("momentum", "tuned")]
    dropped = [one for one in dropped if (one.method, one.protocol, one.task) != ("momentum", "fixed", "a")]
    table = headline(Summary(summary.tasks, summary.methods, tuple(dropped)), "language")
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in map(split_row, table.splitlines())}
    assert rows["Linear"] == ["10% [none..30]", "30% [30..30]", "75% [75..75]", "0.4%"]
    assert rows["Momentum"] == ["30% [30..30], 2 tasks", "", "75% [75..75]", "0.4%"]
    assert "Adamw" not in rows


def split_row(text):
    return text.split("|")


def test_the_marked_part_of_a_readme_is_replaced_and_nothing_else():
    """Replacing twice changes nothing; a file with an older table is not up to date."""
    summary = imagined()
    before = f"# Title\n\n{BEGIN}\nold numbers\n{END}\n\nthe rest\n"
    assert not up_to_date(before, summary)
    after = replace_marked(before, readme_table(summary))
    assert after.startswith(f"# Title\n\n{BEGIN}\n| method |") and after.endswith(f"{END}\n\nthe rest\n")
    assert "old numbers" not in after and up_to_date(after, summary)
    assert replace_marked(after, readme_table(summary)) == after
    other = imagined({("fixed", task, "linear"): {"steps_saved": 0.4} for task in "abc"})
    assert not up_to_date(after, other)


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_one_pair_of_markers_is_refused(text):
    """One error that names the markers."""
    with pytest.raises(ValueError, match=re.escape(BEGIN)):
        replace_marked(text, "table\n")


def test_names_with_paths_are_shortened_to_what_tells_them_apart():
    """Nothing of the machine is left in what is kept with the code."""
    here = "nino:/home/me/nino_no_posw.pt"
    names = ["adamw", here, f"muon+{here}", f"paper-{here}", "nino:a/final"]
    found = public_names([*names, "nino:b/final"])
    assert list(found.values()) == [
        "adamw",
        "nino:nino_no_posw",
        "muon+nino:nino_no_posw",
        "paper-nino:nino_no_posw",
        "nino:final",
        "nino:b/final",
    ]


def test_a_summary_is_the_same_after_a_round_trip_and_small(tmp_path):
    """Infinities included; 800 comparisons, as many as the largest preset has, stay below 200 kB."""
    names = [name for name in MEASURES if not name.startswith(("target", "accuracy"))]
    values = {name: 0.1234 for name in names} | {"steps_saved": -math.inf, "steps_behind": math.inf}
    every = {
        (protocol, task, "linear"): values for protocol in ("fixed", "tuned", "robust") for task in ("a", "b", "c")
    }
    summary = imagined(every)
    text = json.dumps(summary.to_json(), separators=(",", ":"))
    assert Summary.from_json(json.loads(text)) == summary
    compact = len(json.dumps(summary.to_json()["comparisons"], separators=(",", ":")))
    assert compact / len(summary.comparisons) * 800 < 200_000


# -- pictures --------------------------------------------------------------------------------------------------------


def test_labels_keep_their_distance_and_their_order():
    """Positions that touch are moved apart, those that do not stay where they are."""
    moved = spread_out([0.5, 0.5, 0.52, 0.9], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(moved)) and moved[3] == 0.9
    assert sum(moved[:3]) / 3 == pytest.approx(sum((0.5, 0.5, 0.52)) / 3)
    assert spread_out([0.2, 0.8], 0.1) == pytest.approx([0.2, 0.8])
    edge = spread_out([1.0, 0.99, 0.98], 0.1)
    assert edge == pytest.approx([1.0, 0.9, 0.8])
    many = spread_out([0.5] * 30, 0.1)
    assert min(many) == pytest.approx(0) and max(many) == pytest.approx(1) and len(set(many)) == 30
    assert spread_out([], 0.1) == []


def test_captions_are_broken_between_words():
    """No line is wider than asked for, and no word is lost."""
    text = "the quick brown fox jumps over the lazy dog"
    lines = wrapped(text, 1.0, 8).split("\n")
    assert len(lines) > 1 and " ".join(lines) == text
    assert wrapped(text, 100.0, 8) == text


def test_every_method_has_a_panel_and_a_look_of_its_own_there():
    """Nowcasts on AdamW, others, and a group for each other base; no two of a panel share colour and marker."""
    names = ["adamw", "linear", "momentum", "ema", "muon", "muon+linear"]
    bases = {"linear": "adamw", "momentum": "adamw", "muon+linear": "muon"}
    summary = Summary({}, {name: MethodInfo(name, name, bases.get(name)) for name in names}, ())
    found = {group.name: group.methods for group in groups(summary)}
    assert found == {
        "adamw": ("adamw", "linear", "momentum"),
        "others": ("adamw", "ema"),
        "muon": ("adamw", "muon", "muon+linear"),
    }
    for members in found.values():
        assert len({looks(summary)[name] for name in members}) == len(members) <= len(COLOURS) + 1


# -- the whole report ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A folder with three protocols and methods, a sweep, a lost seed, a failure and a torn file; its report."""
    out = tmp_path_factory.mktemp("bench")
    runs, methods = [], {"adamw": 0.0, "linear": 0.3, "muon": 0.2}
    for method, better in methods.items():
        for rate, loss in ((1e-3, 5.0), (2e-3, 4.0), (4e-3, 3.5), (8e-3, 3.0), (1.6e-2, 3.6)):
            for seed in (0, 1, 2) if rate in (1e-3, 2e-3, 8e-3) else (0,):
                speed = (FIRST - loss + better + 0.01 * seed) / (FIRST - LAST)
                events = [event(step) for step in range(100, 900, 100)] + [event(450, False, 300)]
                events = events if method == "linear" else []
                runs.append(record(method, loss=line(speed), rate=rate, seed=seed, events=events))
    rates = {"fixed": 1e-3, "tuned": 8e-3, "robust": 2e-3}
    choices = {
        protocol: {"words": {method: {"settings": {}, "learning_rate": rate} for method in methods}}
        for protocol, rate in rates.items()
    }
    lost = next(run for run in runs if run["spec"]["method"] == "muon" and run["spec"]["seed"] == 2)
    lost["diverged"] = True
    failed = next(run for run in runs if run["spec"]["method"] == "muon" and run["spec"]["learning_rate"] == 1.6e-2)
    failed.update(error="Traceback\nValueError: no luck")
    gone = {"method": "linear", "seed": 1, "learning_rate": 8e-3}
    runs = [run for run in runs if not gone.items() <= run["spec"].items()]
    save(out, runs, choices)
    (out / "runs" / "words" / "torn.json").write_text(json.dumps(runs[0])[:200])
    readme = out / "README.md"
    readme.write_text(f"# Mine\n{BEGIN}\n{END}\n")
    return out, write_report(out, readme=readme), readme


def test_a_report_has_tables_pictures_and_all_its_numbers(reported):
    """Markdown that shows pictures which exist, PNGs, a summary that says the same, and the README's table."""
    out, path, readme = reported
    report = path.read_text()
    assert path == out / "report.md" and not re.search(r"\bnan\b|\binf\b", report)
    shown = re.findall(r"\]\((pictures/.*?\.png)\)", report)
    assert sorted(shown) == sorted(f"pictures/{file.name}" for file in (out / "pictures").iterdir())
    assert {name.split("/")[1].split("-")[0] for name in shown} == {"overview", "curves", "learning"}
    assert all((out / name).read_bytes().startswith(PNG) for name in shown)
    assert sum(name.startswith("pictures/curves-") for name in shown) == 3
    summary = read_summary(out / "summary.json")
    assert readme_table(summary) in report and up_to_date(readme.read_text(), summary)
    assert summary == summarise(load_results(out))


def test_a_report_names_what_diverged_failed_or_is_missing(reported):
    """And how many seeds there were."""
    report = reported[1].read_text()
    assert "* diverged: Muon, `fixed`: words (seed 2)" in report
    assert "* missing: tuned, words, linear: seed 1" in report
    assert "* failed: words, muon, cosine 0.016, seed 0: ValueError: no luck" in report
    assert "2 to 3 seeds" in report and "| 3, 1 diverged |" in report
    assert "What has one seed" not in report


def test_a_torn_file_is_left_out_with_a_warning(reported, caplog):
    """All other runs are there."""
    out = reported[0]
    runs = load_results(out).runs
    assert len(runs) == len(list(out.glob("runs/words/*.json"))) - 1
    assert [record.message for record in caplog.records if "torn.json" in record.message]


def test_a_report_of_one_protocol_and_one_seed_says_so(tmp_path):
    """The tables of other protocols are absent, there is no picture of a sweep, and luck is named."""
    report = write_report(save(tmp_path, [record("linear", loss=line(1.25)), record()])).read_text()
    assert "`fixed`: steps saved" in report and "`tuned`: steps saved" not in report
    assert "## `tuned`" not in report and "learning-rate" not in report
    assert "What has one seed cannot be told from luck" in report and "20% (20%)" in report


def test_a_report_without_adamw_or_of_adamw_alone_can_be_written(tmp_path):
    """There is nothing to compare, and it says so instead of failing."""
    alone = write_report(save(tmp_path / "a", [record()])).read_text()
    assert "No method but AdamW was run" in alone and "No nowcaster" in alone
    without = write_report(save(tmp_path / "b", [record("muon")])).read_text()
    assert "AdamW was not run" in without


def test_a_folder_without_a_benchmark_is_refused(tmp_path):
    """One error that says what is missing and what to do: no runs, no choices, others' choices."""
    with pytest.raises(ValueError, match=r"`out`.*hf-nino bench"):
        write_report(tmp_path)
    save(tmp_path, [record()])
    (tmp_path / "choices.json").unlink()
    with pytest.raises(ValueError, match=r"choices\.json.*hf-nino bench"):
        write_report(tmp_path)
    (tmp_path / "choices.json").write_text(
        json.dumps({"paper": {"words": {"adamw": CHOICES["fixed"]["words"]["adamw"]}}})
    )
    with pytest.raises(ValueError, match="another benchmark"):
        write_report(tmp_path)


def test_a_readme_that_cannot_be_used_is_refused_before_anything_is_drawn(tmp_path):
    """No such file, and a file without markers."""
    save(tmp_path, [record("linear"), record()])
    with pytest.raises(ValueError, match=r"`readme`.*cannot be read"):
        write_report(tmp_path, readme=tmp_path / "none.md")
    (tmp_path / "bare.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="`readme`"):
        write_report(tmp_path, readme=tmp_path / "bare.md")
    assert not (tmp_path / "report.md").exists() and not (tmp_path / "pictures").exists()


def test_what_the_runner_writes_is_understood(tmp_path):
    """Whatever it rounds, the runs that it chose are found."""
    runs = [record(method, rate=1 / 3000, settings={"factor": 1 / 3}) for method in ("linear", "adamw")]
    for run in runs:
        runner._write(RunSpec.from_dict(run["spec"]).path(tmp_path), run)
    cell = {"settings": {"factor": 1 / 3}, "learning_rate": 1 / 3000}
    runner._write(tmp_path / "choices.json", {"fixed": {"words": {"linear": cell, "adamw": cell}}})
    assert len(summarise(load_results(tmp_path)).comparisons) == 2
