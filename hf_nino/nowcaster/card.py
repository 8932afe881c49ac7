"""The model card of a nowcaster: what it is, how to use it, how it was made."""

from __future__ import annotations

from .configuration import NowcasterConfig

TAGS = ("nino", "nowcasting", "learned-optimizer", "arxiv:2409.04434")

CITATION = """@inproceedings{knyazev2025accelerating,
  title     = {Accelerating Training with Neuron Interaction and Nowcasting Networks},
  author    = {Knyazev, Boris and Moudgil, Abhinav and Lajoie, Guillaume and Belilovsky, Eugene and
               Lacoste-Julien, Simon},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2409.04434}
}"""
"""The paper whose method this is, as BibTeX."""

_KINDS = {
    "nino": "a graph network over the neural graph of the model that is trained",
    "wnn": "a small network that sees every parameter alone",
}


def nowcaster_card(
    config: NowcasterConfig,
    repo_id: str | None = None,
    parameters: int | None = None,
    *,
    bundled: bool = False,
    more: str = "",
) -> str:
    """The card's Markdown, without the metadata before it.

    Args:
        config: of the nowcaster.
        repo_id: the repository that the card is for; ``None`` leaves a placeholder in the examples.
        parameters: number of its weights, if known.
        bundled: whether it comes with the package, and ``repo_id`` is its name there.
        more: further sections.
    """
    name = repo_id or "USER/NAME"
    rows = [
        ("type", f"`{config.nowcaster_type}`: {_KINDS[config.nowcaster_type]}"),
        ("reads", f"{config.context} snapshots"),
        ("predicts", f"up to {config.max_horizon} intervals ahead"),
        ("made for a nowcast every", f"{config.period:,} optimizer steps"),
        ("hidden size, layers", f"{config.hidden_size}, {config.num_layers}"),
        ("meta-trained on", _cell(config.meta_trained_on or "not recorded")),
    ]
    if parameters is not None:
        rows.insert(1, ("weights", f"{parameters:,}"))
    told = [word for word, on in (("the horizon", config.horizon_input), ("learning rates", config.rate_input)) if on]
    if told:
        rows.append(("is told", " and ".join(told)))
    if config.token_position_vocabulary is not None:
        rows.append(("largest vocabulary", f"{config.token_position_vocabulary:,} tokens"))
    pinned = f'Pin the commit for runs that are to be repeated: `nowcaster="{name}@COMMIT"`.'
    more = f"{more.strip()}\n\n" if more else ""
    origin = "It comes with the package." if bundled else pinned
    table = "\n".join(["| | |", "|---|---|", *(f"| {label} | {text} |" for label, text in rows)])
    return f"""# {name.split("/")[-1]}

A nowcaster: while a network is trained, it looks at the last few states of the parameters and predicts where they
will be many steps later. Written into the model every now and then, the prediction saves the steps in between. The
method is NiNo ([arXiv 2409.04434](https://arxiv.org/abs/2409.04434)), the Python package for it `hf_nino`.

{table}

## Use

```python
from hf_nino import NiNoTrainer, NiNoTrainingArguments

args = NiNoTrainingArguments("out", nowcaster="{name}")
trainer = NiNoTrainer(model=model, args=args, train_dataset=data)
trainer.train()
```

{origin} `NiNoCallback` goes into any other
`Trainer`, `NiNo` around the optimizer of a loop of your own.

The weights are safetensors; hf_nino reads no pickle.

{more}## Citation

```bibtex
{CITATION}
```
"""


def _cell(text: str) -> str:
    """Free text in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
