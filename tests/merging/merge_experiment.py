"""Two texts, one base, one model fine-tuned on each, and what merging them is worth: losses on both texts.

    python tests/merging/merge_experiment.py OUT [NOWCASTER ...]

writes ``OUT/merging.json`` and ``OUT/merging.md``: validation losses, mean of the seeds, for base, task models and
every way of merging.  The texts are the King James Bible and the source of Python's standard library, of which the
base has seen both; nothing is tuned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

import torch
from transformers import set_seed

from hf_nino.bench.training.tasks.texts import read_text
from hf_nino.demo.data import blocks, train_tokenizer
from hf_nino.demo.models import language_model
from hf_nino.demo.text import split
from hf_nino.merging import as_markdown, compare_merges

TEXTS = {"bible": "kjv", "python": "pystdlib"}
CHARACTERS = 2_000_000
VOCABULARY, LENGTH, BATCH = 1024, 64, 32
SCALES = (0.4, 0.7)
NOWCAST_SCALES = (1.0, 0.3)


def corpora() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{text: (training tokens, validation tokens)}, one block of tokens a row."""
    parts = {name: split(read_text(text, Path())[:CHARACTERS]) for name, text in TEXTS.items()}
    tokenizer = train_tokenizer("\n".join(train[: CHARACTERS // 4] for train, _ in parts.values()), VOCABULARY)
    return {
        name: (blocks(train, tokenizer, LENGTH)["input_ids"][:], blocks(held, tokenizer, LENGTH, 128)["input_ids"][:])
        for name, (train, held) in parts.items()
    }


def train(model, tokens: torch.Tensor, steps: int, learning_rate: float, seed: int):
    """AdamW with a cosine to 0."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def run_seed(seed: int, data, nowcasters, base_steps: int, task_steps: int) -> list[dict]:
    """One table of one seed."""
    set_seed(seed)
    base = language_model("gpt2", vocabulary=VOCABULARY, block_length=LENGTH, layers=3, width=64)
    state = train(base, torch.cat([tokens for tokens, _ in data.values()]), base_steps, 3e-3, seed).state_dict()
    tasks = {}
    for number, (name, (tokens, _)) in enumerate(data.items()):
        model = language_model("gpt2", vocabulary=VOCABULARY, block_length=LENGTH, layers=3, width=64)
        model.load_state_dict(state)
        tasks[f"fine-tuned on {name}"] = train(model, tokens, task_steps, 1e-3, 100 * seed + number)

    @torch.no_grad()
    def evaluate(model) -> dict[str, float]:
        losses = {name: model(input_ids=held, labels=held).loss.item() for name, (_, held) in data.items()}
        return {**losses, "mean": mean(losses.values())}

    return compare_merges(base, tasks, nowcasters, evaluate, scales=SCALES, nowcast_scales=NOWCAST_SCALES)


def experiment(out: Path, nowcasters: dict, seeds=(0, 1, 2), base_steps=400, task_steps=200) -> list[dict]:
    """All seeds, their mean as a table, and the range of its last column."""
    torch.set_num_threads(1)
    data = corpora()
    tables = [run_seed(seed, data, nowcasters, base_steps, task_steps) for seed in seeds]
    rows = []
    for alike in zip(*tables, strict=True):
        row = {"method": alike[0]["method"]}
        row |= {key: mean(each[key] for each in alike) for key in alike[0] if key != "method"}
        of_seeds = sorted(each["mean"] for each in alike)
        rows.append(row | {"range over seeds": f"{of_seeds[0]:.3f} to {of_seeds[-1]:.3f}"})
    out.mkdir(parents=True, exist_ok=True)
    settings = {"seeds": list(seeds), "base_steps": base_steps, "task_steps": task_steps, "texts": TEXTS}
    (out / "merging.json").write_text(json.dumps({**settings, "rows": rows, "by_seed": tables}, indent=1) + "\n")
    (out / "merging.md").write_text(as_markdown(rows) + "\n")
    return rows


if __name__ == "__main__":
    named = sys.argv[2:] or ["linear", "momentum", "spectral"]
    experiment(Path(sys.argv[1]), {Path(name).stem: name for name in named})
