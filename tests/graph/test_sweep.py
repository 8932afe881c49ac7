"""Tiny models of every type in transformers, the inputs made up for them, and what their graphs explain."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from sample import CLEAN, SAMPLE
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from hf_nino.graph import NeuralGraph, inputs, sweep, tiny
from hf_nino.graph.coverage import EXPLAINED, Row, count, summary, table, totals, unexplained
from hf_nino.graph.inputs import split_inputs
from hf_nino.graph.sweep import KINDS, measure
from hf_nino.graph.tiny import EXCEPTIONS, MAPPINGS, NOT_OFFLINE, model_types, tiny_config, tiny_model
from hf_nino.graph.trace import quiet_forward

TABLES_FOR = "5.23"
"""The release of transformers that the tables of tiny.py list completely, and the figures below were measured with."""
WITHOUT_GRAPH = 0
"""Types that can be made offline but whose graph cannot; the goal is 0."""
VERIFIED = 0.98
"""Share of types whose proposals all hold; the goal is 0.95."""
PLACED = 0.99
"""Mean share of elements on verified groups or on groups pinned with a reason; the goal is 0.99."""


def is_clean(row: Row) -> bool:
    """All proposals hold, 99% of the elements are placed, and more than half of them move."""
    return row.verified and row.placed >= 0.99 * row.parameters and row.moved > 0.5 * row.parameters


@pytest.mark.parametrize(("kind", "model_type"), SAMPLE, ids=lambda value: value)
def test_thirty_diverse_types_are_clean_or_known_exceptions(kind, model_type) -> None:
    """The graph of each type explains its parameters, as far as the table says."""
    row = measure(kind, model_type)
    assert row.error is None, row.line()
    if SAMPLE[kind, model_type] is CLEAN:
        assert is_clean(row), (row.line(), row.refuted)
    else:
        assert not is_clean(row), f"clean now: put CLEAN into SAMPLE[{kind!r}, {model_type!r}]"


def test_the_sample_covers_every_kind() -> None:
    """Thirty types of all kinds, none of them twice."""
    assert len(SAMPLE) == 30
    assert {kind for kind, _ in SAMPLE} == set(KINDS)
    assert all(name in model_types(KINDS[kind]) for kind, name in SAMPLE)


@pytest.mark.parametrize(("kind", "model_type"), SAMPLE, ids=lambda value: value)
def test_tiny_models_are_tiny_and_random(kind, model_type) -> None:
    """Five thousand to three million parameters, the same for the same seed, others for another, none all 0 or 1."""
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    models = [tiny_model(KINDS[kind], model_type, seed) for seed in (0, 0, 1)]
    assert torch.rand(1).equal(expected), "the global random state was used"
    assert 5e3 < sum(parameter.numel() for parameter in models[0].parameters()) < 3e6
    assert not models[0].training
    for first, same, other in zip(*(model.parameters() for model in models), strict=True):
        assert first.equal(same)
        assert not first.equal(other)
        assert first.numel() == 1 or first.unique().numel() > 1


@pytest.mark.parametrize(
    ("model_type", "layers"),
    {
        "jamba": {"JambaAttentionDecoderLayer", "JambaMambaDecoderLayer", "JambaSparseMoeBlock", "JambaMLP"},
        "qwen3_next": {"Qwen3NextGatedDeltaNet", "Qwen3NextAttention", "Qwen3NextSparseMoeBlock"},
        "deepseek_v3": {"DeepseekV3MLP", "DeepseekV3MoE"},
        "recurrent_gemma": {"RecurrentGemmaRecurrentBlock", "RecurrentGemmaAttention"},
        "zamba": {"ZambaHybridLayer", "ZambaMambaDecoderLayer"},
    }.items(),
)
def test_tiny_models_keep_every_kind_of_layer(model_type, layers) -> None:
    """A hybrid has each of its kinds of layers."""
    names = {type(module).__name__ for module in tiny_model("AutoModelForCausalLM", model_type).modules()}
    assert layers <= names


def test_per_layer_lists_follow_the_depth() -> None:
    """Gemma 3 alternates five sliding windows and one full attention; two layers, one of each, are enough."""
    config = tiny_model("AutoModelForCausalLM", "gemma3_text").config
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.num_hidden_layers == 2


def test_unknown_types_and_classes_are_refused() -> None:
    """One ValueError each, naming the argument; types that need other libraries say which."""
    with pytest.raises(ValueError, match="`auto_class_name` must be one of AutoModelForCausalLM"):
        tiny_model("AutoModel", "llama")
    with pytest.raises(ValueError, match="`model_type` must be a type behind AutoModelForMaskedLM, got 'llama'"):
        tiny_model("AutoModelForMaskedLM", "llama")
    with pytest.raises(ValueError, match="timm_wrapper needs timm"):
        tiny_model("AutoModelForImageClassification", "timm_wrapper")


in_full = pytest.mark.skipif(
    not transformers.__version__.startswith(TABLES_FOR), reason=f"the tables are for transformers {TABLES_FOR}"
)


@in_full
@pytest.mark.slow
def test_every_type_is_made_or_listed(monkeypatch) -> None:
    """Each type behind the five classes can be made and run on its made-up inputs, or really cannot be made."""
    listed = set(NOT_OFFLINE)
    monkeypatch.setattr(tiny, "NOT_OFFLINE", {})
    failed, parts = {}, set()
    for auto in MAPPINGS:
        for name in model_types(auto):
            try:
                parts |= part_types(tiny_config(CONFIG_MAPPING[name]))
                model = tiny_model(auto, name)
                arguments, keywords = split_inputs(model, None)
                with torch.no_grad():
                    model(*arguments, **keywords)
            except Exception as error:
                failed[name] = f"{auto}: {type(error).__name__}: {error}"
    assert set(failed) == listed & {name for auto in MAPPINGS for name in model_types(auto)}, failed
    assert set(EXCEPTIONS) <= parts | listed, "names of no type or part of one"


def part_types(config: PretrainedConfig) -> set[str]:
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return {config.model_type}.union(*(part_types(part) for part in parts if isinstance(part, PretrainedConfig)))


def run(auto: str, model_type: str) -> tuple[nn.Module, dict]:
    model = tiny_model(auto, model_type)
    arguments, keywords = split_inputs(model, None)
    assert arguments == ()
    return model, keywords


def test_inputs_reach_what_a_plain_sentence_does_not() -> None:
    """Cross attention without an encoder, language adapters, entities, boxes and images get inputs of their own."""
    assert run("AutoModelForCausalLM", "bart")[1]["encoder_hidden_states"].shape == (1, 8, 32)
    assert run("AutoModelForCausalLM", "whisper")[1]["encoder_outputs"][0].shape == (1, 8, 32)
    assert "encoder_hidden_states" not in run("AutoModelForCausalLM", "bert")[1]
    model, keywords = run("AutoModelForMaskedLM", "xmod")
    assert keywords["lang_ids"].tolist() == [0, 1]
    assert keywords["input_ids"].shape == (len(model.config.languages), 8)
    assert "entity_ids" in run("AutoModelForMaskedLM", "luke")[1]
    model, keywords = run("AutoModelForSequenceClassification", "layoutlmv3")
    low, high = keywords["bbox"][..., :2], keywords["bbox"][..., 2:]
    assert bool((low <= high).all()) and int(high.max()) < model.config.max_2d_position_embeddings
    assert "pixel_values" in keywords


def test_images_and_sounds_come_with_their_placeholders() -> None:
    """Models of text and images, or text and sound, get both, and run; the random state is left alone."""
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    for auto, model_type, name in (
        ("AutoModelForCausalLM", "gemma3", "pixel_values"),
        ("AutoModelForMaskedLM", "modernvbert", "pixel_values"),
        ("AutoModelForSeq2SeqLM", "audioflamingo3", "input_features"),
        ("AutoModelForSeq2SeqLM", "granite_speech", "input_features"),
    ):
        model, keywords = run(auto, model_type)
        token = model.config.image_token_id if name == "pixel_values" else model.config.audio_token_id
        assert name in keywords and int((keywords["input_ids"] == token).sum()) > 0
        with quiet_forward(model):
            model(**keywords)
    assert torch.rand(1).equal(expected)
    model = tiny_model("AutoModelForCausalLM", "gemma3")
    model.model.get_image_features = lambda pixel_values: torch.zeros(1, 3, 32)
    text = split_inputs(model, None)[1]
    assert "pixel_values" not in text, "three placeholders do not fit this image: text alone"


def test_sequences_are_longer_where_a_model_asks_for_it() -> None:
    """Eight tokens for each expert, enough blocks for block-sparse attention, and never more than positions."""
    assert run("AutoModelForCausalLM", "llama")[1]["input_ids"].shape == (1, inputs.SEQUENCE_LENGTH)
    assert run("AutoModelForCausalLM", "mixtral")[1]["input_ids"].shape == (1, 16)
    model, keywords = run("AutoModelForMaskedLM", "big_bird")
    assert keywords["input_ids"].shape == (1, 32)
    with quiet_forward(model):
        model(**keywords)
    assert model.bert.attention_type == "block_sparse", "too short: it switched to full attention"
    model = tiny_model("AutoModelForCausalLM", "llama")
    model.config.max_position_embeddings = 3
    assert split_inputs(model, None)[1]["input_ids"].shape == (1, 3)


def test_sentences_have_no_special_tokens_but_a_classifier_of_sentences_gets_its_end() -> None:
    """An image token would call for an image; BART's classifier reads the state of the end token."""
    model, keywords = run("AutoModelForCausalLM", "gemma3")
    assert model.config.image_token_id < model.config.get_text_config().vocab_size
    assert model.config.image_token_id not in keywords["input_ids"][:, : inputs.SEQUENCE_LENGTH]
    model, keywords = run("AutoModelForSequenceClassification", "bart")
    assert keywords["input_ids"][0, -1] == model.config.eos_token_id


class Small(nn.Module):
    """A network of known counts, with a layer that is never used and one that is sorted."""

    def __init__(self, sort: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(6, 2)
        self.sort = sort

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.last(hidden.sort(dim=-1).values if self.sort else hidden)


def test_counts_say_what_moves_and_what_was_not_reached() -> None:
    """Hidden units move and carry all but the last bias; the unused layer is unreached, not private."""
    torch.manual_seed(0)
    row = count("kind", "small", NeuralGraph.from_model(Small(), torch.randn(2, 6)))
    assert (row.parameters, row.placed, row.unreached, row.private, row.unmoved) == (117, 103, 14, 0, 0)
    assert row.moved == 70 + 30
    assert row.verified and row.symmetries == 1
    assert row.pins["input of the model"] == 6
    pinned = count("kind", "small", NeuralGraph.from_model(Small(sort=True), torch.randn(2, 6)))
    assert (pinned.placed, pinned.moved, pinned.symmetries) == (103, 0, 0)


def test_counts_tell_refuted_and_unmoved_elements_from_placed_ones() -> None:
    """A group that lost its symmetry without a reason is unmoved; a private one is private."""
    torch.manual_seed(0)
    graph = NeuralGraph.from_model(Small(), torch.randn(2, 6))
    lost = dataclasses.replace(graph, symmetries=(), report=("refuted: neurons of first",))
    row = count("kind", "small", lost)
    assert row.unmoved == 100 and row.placed == 3 and row.moved == 0
    assert not row.verified and row.refuted == ("refuted: neurons of first",)
    hidden = next(number for number, group in enumerate(graph.groups) if group.name == "first")
    groups = list(lost.groups)
    groups[hidden] = dataclasses.replace(groups[hidden], kind="private", pinned="refuted by the permutation test")
    assert count("kind", "small", dataclasses.replace(lost, groups=tuple(groups))).private == 100


def test_totals_leave_out_what_cannot_be_made() -> None:
    """Shares are over types; a type without a graph counts as nothing explained."""
    rows = [
        Row("a", "one", parameters=10),
        Row("a", "two", parameters=1000, private=500, refuted=("refuted: x",)),
        Row("a", "three", error="ValueError: no"),
        Row("a", next(iter(NOT_OFFLINE)), error="ImportError: no"),
    ]
    found = totals(rows)
    assert (found.types, found.errors, found.verified) == (3, 1, 1)
    assert found.placed == pytest.approx(0.5) and found.verified_share == pytest.approx(1 / 3)
    assert "3 types, 1 without a graph; 1 (33.3%)" in summary(rows)
    assert "| a | two | 1000 | 50.0% | 500 |" in table(rows)
    assert "| a | three | ValueError: no |" in table(rows)


def test_every_exception_has_a_reason() -> None:
    """A type with refuted proposals or unplaced elements must be explained, and nothing else may be."""
    known = next(iter(EXPLAINED))
    fine, poor = Row("a", "fine", parameters=100), Row("a", "poor", parameters=100, private=2)
    refuted = Row("a", known, parameters=100, refuted=("refuted: x",))
    without, idle = unexplained([fine, poor, refuted])
    assert without == [poor] and set(idle) == set(EXPLAINED) - {known}
    assert f"| {known} | {EXPLAINED[known]} |" in table([fine, refuted])
    assert f"| {known} | {EXPLAINED[known]} |" not in table([fine])


def test_a_sweep_is_written_as_it_goes_and_goes_on_where_it_stopped(tmp_path) -> None:
    """JSON and a table; what the file has is not measured again unless named; another transformers starts anew."""
    out = tmp_path / "results" / "sweep.json"
    sweep.main(["--kind", "image-classification", "--types", "vit", "--out", str(out)])
    (row,) = sweep.read(out)
    assert row.type == "vit" and is_clean(row) and row.seconds > 0
    assert "| image-classification | vit |" in out.with_suffix(".md").read_text()
    rows = [dataclasses.replace(row, type=name, groups=77) for name in model_types(KINDS["image-classification"])]
    sweep.write(out, rows)
    sweep.main(["--kind", "image-classification", "--out", str(out)])
    assert {row.groups for row in sweep.read(out)} == {77}
    sweep.main(["--kind", "image-classification", "--types", "vit", "--out", str(out)])
    assert [row.type for row in sweep.read(out) if row.groups != 77] == ["vit"]
    content = json.loads(out.read_text())
    assert content["transformers"] == transformers.__version__
    out.write_text(json.dumps(content | {"transformers": "0"}))
    assert sweep.read(out) == []


def test_one_type_cannot_stop_a_sweep() -> None:
    """A type that takes too long, or that fails, becomes a row that says so."""
    (late,) = sweep.run([("causal-lm", "gpt2")], timeout=0.01)
    assert late.error == "no graph after 0.01 s" and "causal-lm gpt2: no graph" in late.line()
    broken = measure("causal-lm", "bert_of_nobody")
    assert broken.error is not None and broken.error.startswith("ValueError: `model_type` must be")
    assert not broken.verified


@in_full
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_sweep_reaches_the_goals() -> None:
    """Every type that can be made offline, each in a process of its own."""
    tasks = [(kind, name) for kind, auto in KINDS.items() for name in model_types(auto) if name not in NOT_OFFLINE]
    rows = list(sweep.run(tasks))
    found = totals(rows)
    assert found.types == len(tasks)
    assert found.errors <= WITHOUT_GRAPH, [row.line() for row in rows if row.error]
    assert found.verified_share >= VERIFIED, [row.line() for row in rows if row.refuted]
    assert found.placed >= PLACED, summary(rows)
    without, idle = unexplained(rows)
    assert not without, [row.line() for row in without]
    assert not idle, f"explained, but not in need of it: {idle}"
