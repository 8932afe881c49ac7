"""Cards of trained models say truthfully what nowcasts did."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_nowcasters import files, wnn
from huggingface_hub import ModelCard, constants
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_nino import NiNoTrainer, NiNoTrainerMixin, NiNoTrainingArguments
from hf_nino.nowcaster.source import NowcasterSource
from hf_nino.training.card import NowcastFacts, card_with, facts_of, section, update_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FACTS = NowcastFacts(
    nowcaster="org/name",
    source=NowcasterSource("org/name", "v1", COMMIT),
    period=100,
    interval=20,
    horizon="lr-budget",
    steps=1234,
    horizons=(9, 8, 5, 2),
    written=4,
    taken_back=1,
    refused=2,
    shortened=3,
    overhead=0.0123,
)
CARD = "---\nlicense: mit\ntags:\n- mine\n---\n\n# A model\n\nBy hand.\n"


def rows(text):
    """The table of the section: {label: text}."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def test_the_section_has_the_facts():
    """Nowcaster and commit, period, horizons, what became of nowcasts, steps, overhead, and the paper."""
    text = section(FACTS)
    found = rows(text)
    assert f"[`{COMMIT}`](https://huggingface.co/org/name/tree/{COMMIT}) (`v1`)" in found["nowcaster"]
    assert found["a nowcast every"] == "100 optimizer steps, from snapshots every 20 optimizer steps"
    assert found["horizon"] == "`lr-budget`; looked 9, 8, 5, 2 intervals ahead"
    assert (found["nowcasts accepted"], found["nowcasts taken back"], found["nowcasts refused"]) == ("3", "1", "2")
    assert found["of those written, shortened"] == "3" and found["optimizer steps"] == "1,234"
    assert found["overhead"] == "1.2% of training time"
    assert "@inproceedings{knyazev2025accelerating" in text


def test_what_is_not_known_is_not_told():
    """No number is made up; a run without nowcasts, one that gave up and one that only observed say so."""
    text = section(replace(FACTS, shortened=None, overhead=None, horizons=(), source=None, nowcaster="linear"))
    assert not {"overhead", "of those written, shortened"} & rows(text).keys()
    assert rows(text)["nowcaster"] == "`linear`" and rows(text)["horizon"] == "`lr-budget`; none was written"
    assert "given up" not in text and "only measured" not in text
    assert "given up before the end" in section(replace(FACTS, stopped=True))
    assert "none was written" in section(replace(FACTS, observe_only=True))
    many = section(replace(FACTS, horizons=tuple(range(40, 0, -1)), horizon="8"))
    assert rows(many)["horizon"] == "8 intervals; looked 1 to 40 intervals ahead, 21 in the median"


def test_a_card_is_extended_and_nothing_of_it_lost():
    """Tags and text that are there stay; ours are added."""
    card = ModelCard(card_with(CARD, FACTS))
    assert card.data.license == "mit" and card.data.tags == ["mine", "nino", "nowcasting"]
    assert card.text.index("By hand.") < card.text.index("## Nowcasts")


def test_a_card_is_extended_once():
    """Twice is once; other facts replace the section, wherever it is, and leave what others wrote after it."""
    once = card_with(CARD, FACTS)
    assert card_with(once, FACTS) == once
    changed = card_with(once + "\n## Later\n\nMore.\n", replace(FACTS, steps=9999))
    assert changed.count("## Nowcasts") == 1 and "9,999" in changed and "1,234" not in changed
    assert changed.count("## Later\n\nMore.") == 1 and changed.count("- nino\n") == 1


@pytest.mark.parametrize(
    ("base", "metadata", "expected"),
    [
        ("", "", "This model was trained from scratch on"),
        ("/data/weights", "base_model: /data/weights\n", "This model is a fine-tuned version of a local model on"),
        ("None", "base_model: None\n", "This model is a fine-tuned version of a local model on"),
        ("org/base", "base_model: org/base\n", "This model is a fine-tuned version of [org/base]("),
        ("gpt2", "base_model: gpt2\n", "This model is a fine-tuned version of [gpt2]("),
    ],
)
def test_a_base_model_that_is_none_is_not_claimed(base, metadata, expected):
    """In text and metadata; a base on the Hub stays, and other links too."""
    text = f"---\nlicense: mit\n{metadata}---\nThis model is a fine-tuned version of [{base}](https://huggingface.co/{base})"
    text += " on the [data](https://huggingface.co/datasets/data) dataset.\n"
    for facts in (FACTS, None):
        found = card_with(text, facts)
        assert expected in found and "[data](https://huggingface.co/datasets/data)" in found
        kept = base in ("org/base", "gpt2")
        assert ModelCard(found).data.get("base_model") == (base if kept else None)
        assert kept or "huggingface.co/)" not in found


def tokens(count=64):
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 32, (8,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in data]


def trainer_of(folder, cls=NiNoTrainer, model=None, **settings):
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    defaults = {
        "nowcast_period": 10,
        "max_steps": 42,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 5,
    }
    args = NiNoTrainingArguments(str(folder), **(defaults | settings))
    return cls(model=model or GPT2LMHeadModel(config), args=args, train_dataset=tokens())


def test_a_trainer_writes_the_section(tmp_path):
    """After a run from scratch: the numbers of the run, what Trainer writes besides, no base model; twice is once."""
    trainer = trainer_of(tmp_path, nowcaster="linear:max_intervals=2", nowcast_horizon="3")
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    found, nowcasting = rows(text), trainer.nowcasting
    assert nowcasting.nowcasts == 4
    assert (
        found["nowcaster"] == "`linear:max_intervals=2`"
        and found["horizon"] == "3 intervals; looked 2 intervals ahead"
    )
    assert found["nowcasts accepted"] == "4" and found["optimizer steps"] == "42"
    runtime = next(entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
    assert facts_of(nowcasting, trainer.state.log_history).overhead == nowcasting.seconds / runtime
    assert found["overhead"].endswith("% of training time")
    assert "was trained from scratch on" in text and "fine-tuned" not in text
    assert "### Training hyperparameters" in text
    card = ModelCard(text)
    assert {"nino", "nowcasting", "generated_from_trainer"} <= set(card.data.tags) and card.data.get(
        "base_model"
    ) is None
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == text


def test_a_resumed_run_tells_of_the_whole_run(tmp_path):
    """Horizons and counts are those of both parts; the overhead is that of the part whose time is known."""
    settings = {"nowcaster": "linear", "nowcast_horizon": "3", "save_strategy": "steps", "save_steps": 25}
    trainer_of(tmp_path, **settings).train()
    trainer = trainer_of(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-25"))
    assert [event.step for event in trainer.nowcasting.events] == [30, 40]
    facts = facts_of(trainer.nowcasting, trainer.state.log_history)
    assert (facts.written, len(facts.horizons)) == (4, 4)
    runtimes = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    assert sum(event.seconds for event in trainer.nowcasting.events) / runtimes[-1] < facts.overhead
    assert facts.overhead < trainer.nowcasting.seconds / runtimes[-1]


def test_nowcasts_that_were_taken_back_do_not_count_as_accepted(tmp_path):
    """With one, all that were written since are undone; what was shortened is read where it was logged."""
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    log = [
        {"nino_step": step, "nino_horizon": 4, "nino_accepted": 1, "nino_shortened": step % 4} for step in (10, 20, 30)
    ]
    log += [{"nino_step": 35, "nino_horizon": 4, "nino_accepted": 0, "nino_taken_back_to": 20}]
    trainer.nowcasting.nowcasts, trainer.nowcasting.taken_back = 3, 1
    facts = facts_of(trainer.nowcasting, log)
    assert (facts.written, facts.taken_back, facts.shortened, facts.horizons) == (3, 2, 2, (4, 4, 4))
    assert rows(section(facts))["nowcasts accepted"] == "1"


def test_where_a_nowcaster_lies_on_a_disk_is_not_told(tmp_path):
    """Of a local folder the card has the last part of its name only."""
    wnn().save_pretrained(tmp_path / "secret" / "mine")
    trainer = trainer_of(tmp_path / "out", nowcaster=str(tmp_path / "secret" / "mine"), max_steps=1)
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "`mine`" in text and "secret" not in text


def test_trainers_with_cards_of_their_own(tmp_path):
    """A create_model_card with other arguments, as TRL's, gets them; one that writes nothing is left alone."""

    class Mine(Trainer):
        def create_model_card(self, model_name=None, dataset_name=None, tags=None):
            self.asked = (model_name, dataset_name, tags)
            if model_name:
                Path(self.args.output_dir, "README.md").write_text(CARD)

    trainer = trainer_of(tmp_path, type("Both", (NiNoTrainerMixin, Mine), {}))
    trainer.train()
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()
    trainer.create_model_card("name", dataset_name="data", tags=["a"])
    assert trainer.asked == ("name", "data", ["a"])
    text = (tmp_path / "README.md").read_text()
    assert "By hand." in text and "## Nowcasts" in text


def test_without_nowcasts_there_is_no_section(tmp_path):
    """Neither before training nor with nowcaster="none"; nor where there is no card."""
    for nowcaster in ("linear", "none"):
        trainer = trainer_of(tmp_path, nowcaster=nowcaster)
        trainer.create_model_card()
        text = (tmp_path / "README.md").read_text()
        assert "Nowcasts" not in text and "nino" not in text and "was trained from scratch" in text
    update_card(tmp_path / "absent.md", None)
    assert not (tmp_path / "absent.md").exists()


def test_a_pushed_model_has_the_section_on_the_hub(hub, tmp_path):
    """Trainer's own push, with a nowcaster from the Hub: the model is there, and its card names the commit."""
    commit = hub.repository("org/nowcaster", files(wnn())).refs["main"]
    Path(constants.HF_TOKEN_PATH).write_text("hf_writer")
    push = {"push_to_hub": True, "hub_model_id": "org/trained", "hub_strategy": "end"}
    trainer = trainer_of(tmp_path / "out", nowcaster="org/nowcaster", max_steps=12, **push)
    trainer.train()
    trainer.push_to_hub()
    repository = hub.repositories["org/trained"]
    content = repository.commits[repository.refs["main"]]
    text = content["README.md"].decode()
    assert "model.safetensors" in content
    assert f"https://huggingface.co/org/nowcaster/tree/{commit}" in text
    assert rows(text)["optimizer steps"] == "12" and len(trainer.nowcasting.events) == 1
    assert {"nino", "nowcasting"} <= set(ModelCard(text).data.tags)
