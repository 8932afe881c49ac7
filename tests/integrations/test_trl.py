"""NiNo in the trainers of TRL: as a callback, and mixed in."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from integration_helpers import (
    PERIOD,
    STEPS,
    Moves,
    callback,
    make_nowcaster,
    nowcasts,
    same,
    settings,
    uncovered,
    written,
)
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed

trl = pytest.importorskip("trl", reason="needs the package trl, which hf_nino[trl] brings")
peft = pytest.importorskip("peft", reason="needs the package peft, which hf_nino[peft] brings")

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

from hf_nino import NiNoArguments, NiNoTrainerMixin  # noqa: E402
from hf_nino.demo.data import train_tokenizer  # noqa: E402

# TRL's own use of names and calls that transformers and torch are giving up.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@dataclass
class NiNoSFTConfig(NiNoArguments, SFTConfig):
    """As the documentation says to write it."""


class NiNoSFTTrainer(NiNoTrainerMixin, SFTTrainer):
    """As the documentation says to write it."""


@dataclass
class NiNoDPOConfig(NiNoArguments, DPOConfig):
    """The same for preferences."""


class NiNoDPOTrainer(NiNoTrainerMixin, DPOTrainer):
    """The same for preferences."""


TEXTS = [f"the {kind} number {i} has the square {i * i}" for i in range(24) for kind in ("odd", "even")]


@pytest.fixture(scope="module")
def tokenizer():
    """Trained here; there is no network."""
    tokenizer = train_tokenizer("\n".join(TEXTS), 300)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def texts():
    return Dataset.from_dict({"text": TEXTS})


def preferences():
    rows = [(f"the square of {i} is ", str(i * i), str(i * i + 1)) for i in range(24)]
    return Dataset.from_dict(
        {name: [row[k] for row in rows] for k, name in enumerate(("prompt", "chosen", "rejected"))}
    )


def llama(dropout=0.0):
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            attention_dropout=dropout,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def gpt2():
    set_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))


def sft(folder, tokenizer, model=None, plain=False, callbacks=(), nowcaster=None, **others):
    """A trainer on the texts; ``plain``: TRL's own."""
    args = {"max_length": 32, "per_device_eval_batch_size": 16, **others}
    data = {"train_dataset": texts(), "eval_dataset": texts().select(range(32)), "processing_class": tokenizer}
    common = {"model": llama() if model is None else model, "callbacks": list(callbacks), **data}
    if plain:
        return SFTTrainer(args=SFTConfig(str(folder), **settings(**args)), **common)
    return NiNoSFTTrainer(args=NiNoSFTConfig(str(folder), **nowcasts(**args)), nowcaster=nowcaster, **common)


def metrics(trainer):
    """Logs by step, and kind of log, without what the clock says and without what NiNo says."""
    logs = {}
    for entry in trainer.state.log_history:
        kind = "eval" if "eval_loss" in entry else "train" if "loss" in entry else "end"
        logs[entry["step"], kind] = {
            key: value
            for key, value in entry.items()
            if not key.startswith("nino_") and not key.endswith(("_runtime", "_per_second"))
        }
    return logs


@pytest.mark.parametrize("nowcaster", ["linear", "momentum", "graph"])
def test_supervised_fine_tuning_nowcasts_with_the_mixin(tmp_path, tokenizer, nowcaster):
    """Every nowcast that is due is written, and every parameter is seen, with activation checkpointing as TRL does."""
    trainer = sft(tmp_path, tokenizer, nowcaster=make_nowcaster(nowcaster))
    assert trainer.args.gradient_checkpointing
    trainer.train()
    assert written(trainer) == [5, 10, 15]
    assert not uncovered(trainer.nowcasting, trainer.model)


def test_supervised_fine_tuning_nowcasts_with_the_callback(tmp_path, tokenizer):
    """The callback's run is the mixin's, bit for bit, and TRL's own before the first nowcast; on GPT-2."""
    runs = {}
    for name in ("plain", "callback", "mixin"):
        moves = Moves()
        first = [callback("linear")] if name == "callback" else []
        trainer = sft(tmp_path / name, tokenizer, gpt2(), name != "mixin", [*first, moves])
        trainer.train()
        runs[name] = moves.states
        if name != "plain":
            assert written(trainer) == [5, 10, 15]
    assert all(same(runs["callback"][step], runs["mixin"][step]) for step in range(1, STEPS + 1))
    assert all(same(runs["plain"][step], runs["mixin"][step]) for step in range(1, PERIOD))
    assert not same(runs["plain"][PERIOD], runs["mixin"][PERIOD])


def test_the_metrics_of_trl_stay_its_own(tmp_path, tokenizer):
    """The loss on evaluation batches is measured around each nowcast: before the first one every metric of training
    and evaluation is that of a run without NiNo, later ones have the same names, and as many tokens have been seen."""
    common = {"eval_strategy": "steps", "eval_steps": 4}
    plain = sft(tmp_path / "plain", tokenizer, plain=True, **common)
    plain.train()
    trainer = sft(tmp_path / "nino", tokenizer, nowcast_measure_loss=True, **common)
    trainer.train()
    expected, got = metrics(plain), metrics(trainer)
    assert expected.keys() == got.keys() and {(4, "eval"), (16, "eval")} < expected.keys()
    assert {"mean_token_accuracy", "entropy", "num_tokens"} < expected[1, "train"].keys()
    assert all(got[log] == expected[log] for log in expected if log[0] < PERIOD)
    assert all(got[log].keys() == expected[log].keys() for log in expected)
    assert got[6, "train"] != expected[6, "train"]
    counts = [log for log in expected if "num_tokens" in expected[log]]
    assert len(counts) >= STEPS and all(got[log]["num_tokens"] == expected[log]["num_tokens"] for log in counts)
    assert all(event.loss_before != event.loss_after for event in trainer.nowcasting.events)


def test_watching_changes_no_metric_of_trl(tmp_path, tokenizer):
    """A run whose nowcasts are only measured, between evaluations, logs what a run without NiNo logs, to the last bit;
    a batch that TRL's own method is shown leaves its traces there."""
    common = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8}
    plain = sft(tmp_path / "plain", tokenizer, plain=True, **common)
    plain.train()
    trainer = sft(tmp_path / "nino", tokenizer, nowcast_observe_only=True, nowcast_measure_loss=True, **common)
    trainer.train()
    assert [event.loss_before is None for event in trainer.nowcasting.events] == [False] * 3
    assert metrics(trainer) == metrics(plain)

    batch = next(iter(trainer.get_eval_dataloader()))
    trainer._nowcast_loss()
    assert not trainer._metrics["eval"]
    trainer.model.eval()
    trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    assert trainer._metrics["eval"]


@pytest.mark.parametrize("nowcaster", ["linear", "momentum"])
def test_resuming_is_exact(tmp_path, tokenizer, nowcaster):
    """A run that goes on from a checkpoint in the middle of a history ends where the uninterrupted one did, bit for
    bit, dropout included."""
    options = {"nowcaster": nowcaster, "save_strategy": "steps", "save_steps": 8}
    whole = sft(tmp_path, tokenizer, llama(dropout=0.1), callbacks=[moves := Moves()], **options)
    whole.train()
    set_seed(17)
    resumed = sft(tmp_path, tokenizer, llama(dropout=0.1), callbacks=[again := Moves()], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert [event.step for event in resumed.nowcasting.events] == [10, 15]
    assert all(same(moves.states[step], again.states[step]) for step in range(9, STEPS + 1))
    assert resumed.nowcasting.nowcasts == whole.nowcasting.nowcasts == 3


def test_a_model_card_is_written_with_trls_arguments(tmp_path, tokenizer):
    """``create_model_card`` takes what TRL's takes, by position and by name, and what it says is in the card."""
    trainer = sft(tmp_path, tokenizer, max_steps=PERIOD)
    trainer.train()
    trainer.create_model_card("my-model", dataset_name="my-data", tags=["my-tag"])
    card = (tmp_path / "README.md").read_text()
    assert "my-tag" in card and "my-data" in card and "my-model" in card


def test_adapters_are_all_that_moves(tmp_path, tokenizer):
    """With ``peft_config`` TRL makes the adapters: the nowcaster sees them and nothing else, and only they move."""
    trainer = sft(tmp_path / "none", tokenizer, plain=True)  # for the weights that are there before training
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    args = NiNoSFTConfig(str(tmp_path), **nowcasts(max_length=32))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    data = {"train_dataset": texts(), "processing_class": tokenizer}
    trainer = NiNoSFTTrainer(model=llama(), args=args, peft_config=lora, **data, nowcaster=make_nowcaster("graph"))
    trainer.train()
    assert written(trainer) == [5, 10, 15]
    seen = {name for name, _, _ in trainer.nowcasting.store.signature()}
    assert seen == {name for name, parameter in trainer.model.named_parameters() if "lora_" in name} and len(seen) == 4
    assert not uncovered(trainer.nowcasting, trainer.model)
    base = trainer.model.get_base_model()
    frozen = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if "lora_" not in name}
    assert frozen.keys() == before.keys() and same(frozen, before)


@pytest.mark.parametrize("nowcaster", ["linear", "graph"])
def test_preference_optimization_nowcasts(tmp_path, tokenizer, nowcaster):
    """DPO nowcasts the policy; the reference model stays what it was, and the metrics keep their names."""
    logs = []
    for kind, config, more in (
        (DPOTrainer, DPOConfig, settings()),
        (NiNoDPOTrainer, NiNoDPOConfig, nowcasts(nowcast_measure_loss=True)),
    ):
        args = config(str(tmp_path), **more)
        data = {"train_dataset": preferences(), "eval_dataset": preferences(), "processing_class": tokenizer}
        ours = {} if kind is DPOTrainer else {"nowcaster": make_nowcaster(nowcaster)}
        trainer = kind(model=llama(), ref_model=llama(), args=args, **data, **ours)
        trainer.train()
        logs.append(metrics(trainer))
    assert written(trainer) == [5, 10, 15] and not uncovered(trainer.nowcasting, trainer.model)
    assert same(dict(trainer.ref_model.named_parameters()), dict(llama().named_parameters()))
    assert all(logs[0][step, "train"] == logs[1][step, "train"] for step in range(1, PERIOD))
    assert all(logs[0][log].keys() == logs[1][log].keys() for log in logs[0])
    assert torch.isfinite(torch.tensor([event.loss_after for event in trainer.nowcasting.events])).all()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_the_recipe_runs(tmp_path, tokenizer, monkeypatch):
    """What the recipes say about TRL, as a reader would type it."""
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
    code = re.search(r"## TRL.*?```py\n(.*?)^```", page, re.S | re.M)[1]
    monkeypatch.chdir(tmp_path)
    recipe = ModuleType("recipe")  # a real one: its classes can then be pickled, as the Trainer does
    monkeypatch.setitem(sys.modules, "recipe", recipe)
    vars(recipe).update(model=llama(), train_dataset=texts(), tokenizer=tokenizer)
    exec(compile(code, "recipes.md", "exec"), vars(recipe))
    assert recipe.trainer.nowcasting.nowcasts >= 1


def test_arguments_are_options_of_a_command(tmp_path):
    """TRL's and NiNo's fields side by side on a command line."""
    words = ["--output_dir", str(tmp_path), "--nowcaster", "momentum", "--nowcast_period", "7", "--max_length", "99"]
    (args,) = HfArgumentParser(NiNoSFTConfig).parse_args_into_dataclasses([*words, "--use_cpu", "--bf16", "False"])
    assert (args.nowcaster, args.nowcast_period, args.max_length) == ("momentum", 7, 99)


def test_arguments_without_trls_do_not_reach_it(tmp_path, tokenizer):
    """Why there is a mixin for arguments: TRL makes its own of others, and knows no field of ours."""
    from hf_nino import NiNoTrainingArguments

    with pytest.raises(TypeError, match="unexpected keyword argument 'nowcaster'"):
        args = NiNoTrainingArguments(str(tmp_path), **settings())
        NiNoSFTTrainer(model=llama(), args=args, train_dataset=texts(), processing_class=tokenizer)
