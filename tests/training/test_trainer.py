"""NiNoTrainer, its mixin and its arguments."""

from dataclasses import dataclass

import pytest
import torch
from training_helpers import (
    MAX_STEPS,
    PERIOD,
    Huge,
    Line,
    Record,
    arguments,
    nino_trainer,
    parameters,
    plain_trainer,
    recorded,
    same,
    tiny_gpt2,
    tokens,
)
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_nino.defaults import NOWCASTER
from hf_nino.nowcaster.base import Nowcaster
from hf_nino.training import NiNoArguments, NiNoTrainer, NiNoTrainerMixin, NiNoTrainingArguments


def scalars(trainer):
    return [entry for entry in trainer.state.log_history if "nino_horizon" in entry]


def test_the_state_after_a_nowcast_is_the_rules_prediction(tmp_path):
    """What other callbacks, logs and checkpoints see at the step of a nowcast is, exactly, what the rule predicts."""
    plain = plain_trainer(tmp_path / "plain", [Record()])
    plain.train()
    trainer = nino_trainer(tmp_path / "nino", save_strategy="steps", save_steps=PERIOD)
    trainer.train()
    names = parameters(plain.model)
    history = [{name: recorded(plain)[step][name] for name in names} for step in (2, 4, 6)]
    expected = Line().nowcast(None, history, 2)
    assert same(recorded(trainer)[PERIOD], expected)
    saved = type(trainer.model).from_pretrained(tmp_path / "nino" / f"checkpoint-{PERIOD}")
    assert same(parameters(saved), expected)


def test_a_refused_nowcast_leaves_the_run_as_it_was(tmp_path):
    """With a nowcaster that predicts absurdities every state equals the plain run's, and the log counts rejections."""
    plain = plain_trainer(tmp_path, [Record()])
    plain.train()
    trainer = nino_trainer(tmp_path, Huge(), logging_strategy="steps", logging_steps=1)
    trainer.train()
    assert all(same(state, recorded(plain)[step]) for step, state in recorded(trainer).items())
    assert [(entry["nino_accepted"], entry["nino_rejected"]) for entry in scalars(trainer)] == [(0, 1), (0, 2)]


def test_no_nowcast_is_lost_between_two_logs(tmp_path):
    """With a nowcast every 6 steps and a log every 100, the log history has every nowcast, at its own step."""
    trainer = nino_trainer(tmp_path, logging_strategy="steps", logging_steps=100)
    trainer.train()
    events = [event.step for event in trainer.nowcasting.events]
    assert len(events) > 1
    assert [entry["nino_step"] for entry in scalars(trainer)] == events
    assert [entry["step"] for entry in scalars(trainer)][:-1] == events[:-1]


def test_numbers_of_a_nowcast_go_into_the_next_training_log(tmp_path):
    """With a log every 4 steps, the nowcast of step 6 is in the log of step 8; evaluation logs stay clean."""
    args = {"logging_strategy": "steps", "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    args = arguments(tmp_path, NiNoTrainingArguments, nowcast_period=PERIOD, **args)
    data = {"train_dataset": tokens(), "eval_dataset": tokens(4, seed=1)}
    trainer = NiNoTrainer(tiny_gpt2(), args, **data, nowcaster=Line())
    result = trainer.train()
    assert [(entry["step"], entry["nino_step"]) for entry in scalars(trainer)] == [(8, 6), (12, 12)]
    assert all("loss" in entry for entry in scalars(trainer))
    assert not any(key.startswith("nino_") for e in trainer.state.log_history if "eval_loss" in e for key in e)
    assert "train_loss" in result.metrics and "epoch" in result.metrics


def test_trackers_get_the_numbers(tmp_path):
    """``report_to="tensorboard"`` has ``train/nino_horizon`` and the rest."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = nino_trainer(tmp_path, report_to="tensorboard", logging_strategy="steps", logging_steps=1)
    trainer.train()
    folder = next(tmp_path.rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/nino_horizon")] == [6, 12]
    assert {"train/nino_step_norm", "train/nino_seconds", "train/nino_nowcasts"} <= set(events.Tags()["scalars"])


def test_the_loss_around_nowcasts_is_measured_without_touching_the_run(tmp_path):
    """Measuring changes no bit of the run with dropout; the losses are the model's, in evaluation mode, on the first
    evaluation batch."""
    data = {"train_dataset": tokens(), "eval_dataset": tokens(8, seed=1)}
    runs = []
    for measure in (False, True):
        args = arguments(
            tmp_path,
            NiNoTrainingArguments,
            nowcast_period=PERIOD,
            nowcast_measure_loss=measure,
            per_device_eval_batch_size=4,
            logging_strategy="steps",
            logging_steps=1,
        )
        trainer = NiNoTrainer(tiny_gpt2(), args, **data, nowcaster=Line(), callbacks=[Record()])
        trainer.train()
        runs.append((recorded(trainer), trainer))
    assert all(same(runs[0][0][step], runs[1][0][step]) for step in range(1, MAX_STEPS + 1))
    states, trainer = runs[1]
    model = tiny_gpt2()
    model.load_state_dict(states[PERIOD], strict=False)
    batch = {key: torch.stack([row[key] for row in data["eval_dataset"][:4]]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        expected = float(model.eval()(**batch).loss)
    first = scalars(trainer)[0]
    assert first["nino_loss_after"] == pytest.approx(expected, rel=1e-6)
    assert first["nino_loss_before"] != first["nino_loss_after"]
    assert "nino_loss_after" not in scalars(runs[0][1])[0]


def test_measuring_needs_evaluation_data(tmp_path):
    """Asked to measure without data, it says so at once."""
    args = arguments(tmp_path, NiNoTrainingArguments, nowcast_measure_loss=True)
    with pytest.raises(ValueError, match="needs an `eval_dataset`"):
        NiNoTrainer(tiny_gpt2(), args, train_dataset=tokens(), nowcaster=Line())


def test_plain_training_arguments_will_do(tmp_path, caplog):
    """Without our fields the defaults hold: the default rule by name, its period shortened to fit 4 nowcasts in."""
    trainer = NiNoTrainer(tiny_gpt2(), arguments(tmp_path, max_steps=40), train_dataset=tokens())
    trainer.train()
    assert trainer.nowcasting.spec == NOWCASTER and isinstance(trainer.nowcasting.nowcaster, Nowcaster)
    assert trainer.nowcasting.period == 10 and trainer.nowcasting.nowcasts >= 2
    assert trainer.nowcasting.outlook.horizon.policy == "lr-budget"
    assert sum("every 10 steps instead of" in record.message for record in caplog.records) == 1


def test_none_turns_nowcasts_off(tmp_path):
    """``nowcaster="none"`` is the plain run, from the same script."""
    plain = plain_trainer(tmp_path, [Record()])
    plain.train()
    trainer = nino_trainer(tmp_path, "none")
    trainer.train()
    assert trainer.nowcasting is None
    assert same(parameters(trainer.model), parameters(plain.model))


def test_the_nowcaster_argument_overrides_the_field(tmp_path):
    """``nowcaster=`` of the Trainer wins over ``args.nowcaster``; an unknown name is an error at once."""
    args = arguments(tmp_path, NiNoTrainingArguments, nowcaster="momentum")
    assert type(NiNoTrainer(tiny_gpt2(), args).nino_callback.nowcaster).__name__ == "MomentumNowcaster"
    assert type(NiNoTrainer(tiny_gpt2(), args, nowcaster=Line()).nino_callback.nowcaster).__name__ == "Line"
    with pytest.raises(FileNotFoundError, match="no nowcaster 'nemo'"):
        NiNoTrainer(tiny_gpt2(), args, nowcaster="nemo")


def test_the_mixin_works_with_another_trainer_class(tmp_path):
    """Cooperative: another Trainer's own ``log`` and arguments still work."""
    seen = []

    class Mine(Trainer):
        def log(self, logs, *args, **kwargs):
            seen.append(dict(logs))
            super().log(logs, *args, **kwargs)

    class Both(NiNoTrainerMixin, Mine):
        pass

    @dataclass
    class Config(NiNoArguments, TrainingArguments):
        flavour: str = "plain"

    settings = {"nowcast_period": PERIOD, "logging_strategy": "steps", "logging_steps": 1, "flavour": "sour"}
    trainer = Both(tiny_gpt2(), arguments(tmp_path, Config, **settings), train_dataset=tokens(), nowcaster=Line())
    trainer.train()
    assert [logs["nino_step"] for logs in seen if "nino_step" in logs] == [6, 12]
    assert trainer.args.flavour == "sour"


def test_arguments_can_be_given_on_a_command_line():
    """``HfArgumentParser`` knows every field; the first positional field is still ``output_dir``."""
    parser = HfArgumentParser(NiNoTrainingArguments)
    line = "--output_dir out --nowcaster org/name --nowcast-period 100 --nowcast_interval 10 --nowcast_horizon 8"
    line += " --nowcast_start_step 5 --nowcast_stop_step 900 --nowcast_history_device model --nowcast_on_invalid raise"
    line += " --nowcast_measure_loss --use_cpu --nowcast_patience 40 --nowcast_max_failures 2 --nowcast_observe_only"
    line += " --nowcast_undo_device model --nowcast_probe_batches 3 --nowcast_stop_fraction 0.9"
    (args,) = parser.parse_args_into_dataclasses(line.split())
    assert (args.nowcaster, args.nowcast_period, args.nowcast_interval) == ("org/name", 100, 10)
    assert (args.nowcast_horizon, args.nowcast_start_step, args.nowcast_stop_step) == ("8", 5, 900)
    assert (args.nowcast_history_device, args.nowcast_on_invalid, args.nowcast_measure_loss) == (
        "model",
        "raise",
        True,
    )
    assert (args.nowcast_patience, args.nowcast_max_failures, args.nowcast_observe_only) == (40, 2, True)
    assert (args.nowcast_undo_device, args.nowcast_probe_batches, args.nowcast_stop_fraction) == ("model", 3, 0.9)
    (defaults,) = parser.parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu"])
    assert (defaults.nowcaster, defaults.nowcast_period, defaults.nowcast_measure_loss) == (NOWCASTER, None, False)
    assert NiNoTrainingArguments("out", use_cpu=True).output_dir == "out"
    assert "nowcast_period" in parser.format_help()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nowcast_horizon", "far"),
        ("nowcast_on_invalid", "ignore"),
        ("nowcast_period", 0),
        ("nowcast_interval", -1),
        ("nowcast_patience", -1),
        ("nowcast_max_failures", 0),
        ("nowcast_stop_fraction", 0.0),
        ("nowcast_precision", "half"),
    ],
)
def test_bad_fields_are_refused(tmp_path, field, value):
    """Each raises when the arguments are made, in both classes."""
    for kind in (NiNoArguments, lambda **k: NiNoTrainingArguments(str(tmp_path), use_cpu=True, **k)):
        with pytest.raises(ValueError, match=field.removeprefix("nowcast_")):
            kind(**{field: value})


class Regression(torch.nn.Module):
    """A user's own module, which has no `config` and does not say what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)

    def forward(self, x, labels):
        prediction = self.last(torch.relu(self.hidden(x)))
        return {"loss": (prediction - labels).square().mean(), "prediction": prediction}


def test_a_graph_nowcaster_reads_the_inputs_of_a_users_own_module_from_the_data(tmp_path):
    """NiNoTrainer traces one training example; without a dataset to look at, the same module has no graph."""
    from hf_nino.nowcaster import NiNoModel, NowcasterConfig

    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(3, generator=generator), "labels": torch.ones(1), "id": "unused"} for _ in range(16)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nowcaster, model = NiNoModel(NowcasterConfig(hidden_size=8)), Regression()
    args = arguments(tmp_path, NiNoTrainingArguments, nowcast_period=PERIOD, nowcast_on_invalid="raise")
    trainer = NiNoTrainer(model=model, args=args, train_dataset=data, nowcaster=nowcaster)
    trainer.train()
    assert trainer.nowcasting.nowcasts >= 1
    assert trainer.nowcasting.graph.group("hidden").size == 5

    assert nowcaster.engine.precision == "float32"
    fast = arguments(tmp_path, NiNoTrainingArguments, nowcast_precision="fast")
    assert (
        NiNoTrainer(model=model, args=fast, train_dataset=data, nowcaster=nowcaster).nino_callback.nowcaster
        is nowcaster
    )
    assert nowcaster.engine.precision == "fast"

    trainer.train_dataset = None
    with pytest.raises(ValueError, match="`example_inputs` must be given for a Regression"):
        trainer.nowcasting.graph.from_model(model, trainer._nowcast_inputs())


class Normed(Regression):
    """The same with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(5)

    def forward(self, x, labels):
        prediction = self.last(torch.relu(self.norm(self.hidden(x))))
        return {"loss": (prediction - labels).square().mean(), "prediction": prediction}


def test_statistics_are_computed_anew_from_the_last_training_batches(tmp_path, caplog):
    """Right after the last nowcast, at the run's last step, they are the means over the batches before it."""
    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(3, generator=generator), "labels": torch.ones(1)} for _ in range(64)]
    args = arguments(tmp_path, NiNoTrainingArguments, nowcast_period=PERIOD, nowcast_horizon="1", max_steps=PERIOD)
    torch.manual_seed(0)
    model = Normed()
    trainer = NiNoTrainer(model=model, args=args, train_dataset=data, nowcaster=Line())
    trainer.train()
    assert trainer.nowcasting.nowcasts == 1 and len(trainer._recent_inputs) == PERIOD
    means = [model.hidden(batch["x"]).mean(0) for batch in trainer._recent_inputs]
    assert torch.allclose(model.norm.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert not any("batch normalization" in record.message for record in caplog.records)


def test_observing_a_trainers_run_changes_nothing_and_logs_what_would_have_been(tmp_path):
    """Every state is the plain run's; the losses on two kept evaluation batches, before and after, are logged."""
    plain = plain_trainer(tmp_path, [Record()])
    plain.train()
    settings = {"nowcast_observe_only": True, "nowcast_probe_batches": 2, "nowcast_period": PERIOD}
    args = arguments(tmp_path, NiNoTrainingArguments, **settings)
    data = {"train_dataset": tokens(), "eval_dataset": tokens(16, seed=1)}
    trainer = NiNoTrainer(tiny_gpt2(), args, **data, nowcaster=Line(), callbacks=[Record()])
    trainer.train()
    assert all(same(state, recorded(plain)[step]) for step, state in recorded(trainer).items())
    events = trainer.nowcasting.events
    assert len(events) == 2 and events[0].loss_before != events[0].loss_after
