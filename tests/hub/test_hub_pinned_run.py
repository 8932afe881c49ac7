"""A run keeps which commit its nowcaster was: in checkpoints and in its log."""

import json
from pathlib import Path

import torch
from hub_nowcasters import files, wnn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_nino import NiNoTrainer, NiNoTrainingArguments
from hf_nino.training.checkpoint import STATE_NAME


def trainer_of(folder, nowcaster):
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
    args = NiNoTrainingArguments(
        str(folder), nowcaster=nowcaster, nowcast_period=10, max_steps=12, save_steps=6, use_cpu=True, report_to="none"
    )
    return NiNoTrainer(model=GPT2LMHeadModel(config), args=args, train_dataset=data)


def test_the_commit_is_in_checkpoints_and_log(hub, tmp_path, capsys):
    """Of a branch, the commit that it was when the run began."""
    repository = hub.repository("org/name", files(wnn(1)))
    commit = repository.refs["main"]
    trainer_of(tmp_path, "org/name").train()
    saved = json.loads(Path(tmp_path, "checkpoint-6", STATE_NAME).read_text())
    assert saved["nowcaster_source"] == {"name": "org/name", "revision": None, "commit": commit}
    assert f"NiNo: nowcaster org/name@{commit}." in "".join(capsys.readouterr())


def test_a_resumed_run_tells_that_the_branch_has_moved(hub, tmp_path, caplog):
    """And how to go on with the same; nothing is said where it has not moved, or is pinned."""
    repository = hub.repository("org/name", files(wnn(1)))
    commit = repository.refs["main"]
    trainer_of(tmp_path, "org/name").train()
    trainer_of(tmp_path, "org/name").train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    moved = repository.commit(files(wnn(2)))
    trainer_of(tmp_path, f"org/name@{commit}").train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert "goes on with" not in caplog.text
    trainer_of(tmp_path, "org/name").train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert f"goes on with that of commit {moved}; 'org/name@{commit}' is the same as before" in caplog.text
