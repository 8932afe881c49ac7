"""Models that are named: found from a configuration alone, made without weights where that is cheaper."""

from __future__ import annotations

import json

import huggingface_hub.errors
import pytest
import torch
from transformers import AutoConfig, BertConfig, GPT2Config, LlamaConfig, T5Config, ViTConfig

from hf_nino import NeuralGraph
from hf_nino.graph import source
from hf_nino.graph.source import configuration, graph_of, model_class

SMALL = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16)


@pytest.fixture
def folder(tmp_path):
    SMALL.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def groups(graph: NeuralGraph) -> list:
    return [(group.name, group.size, group.kind) for group in graph.groups]


def test_a_folder_and_its_config_give_the_same_graph(folder):
    """No weights are there, and none are needed."""
    (graph, described), (same, _) = graph_of(folder), graph_of(folder / "config.json")
    assert described == "small: GPT2LMHeadModel"
    assert groups(graph) == groups(same) and graph.symmetries


def test_without_weights_the_graph_is_the_same(folder, monkeypatch):
    """On the meta device nothing is made; its symmetries are proven on a twin."""
    direct, _ = graph_of(folder)

    def build(model, **kwargs):
        assert all(parameter.is_meta for parameter in model.parameters())
        return from_model(model, **kwargs)

    from_model = NeuralGraph.from_model
    monkeypatch.setattr(source.NeuralGraph, "from_model", build)
    hollow, _ = graph_of(folder, meta=True)
    assert groups(hollow) == groups(direct)
    assert {symmetry.name for symmetry in hollow.symmetries} == {symmetry.name for symmetry in direct.symmetries}


def test_a_model_that_has_no_twin_is_made_in_full(folder, monkeypatch):
    """So that its symmetries can be proven, unless weights were ruled out."""
    monkeypatch.setattr(source, "PROVEN_DIRECTLY", 0)
    monkeypatch.setattr("hf_nino.graph.twin.shrunk", lambda config: None)
    assert graph_of(folder)[0].symmetries
    assert not graph_of(folder, meta=True)[0].symmetries


def test_a_model_type_stands_for_its_default_configuration():
    """Without the Hub; a folder of that name comes first."""
    config, described = configuration("llama")
    assert isinstance(config, LlamaConfig)
    assert described == "llama (the default configuration of this model type)"


def test_a_folder_is_preferred_to_a_model_type(tmp_path, monkeypatch):
    """A name that is both is what lies here."""
    SMALL.save_pretrained(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    assert isinstance(configuration("llama")[0], GPT2Config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (T5Config(), "T5ForConditionalGeneration"),
        (BertConfig(), "BertForMaskedLM"),
        (LlamaConfig(), "LlamaForCausalLM"),
        (ViTConfig(), "ViTForImageClassification"),
        (GPT2Config(architectures=["GPT2Model"]), "GPT2Model"),
        (GPT2Config(architectures=["NoSuchModel"]), "GPT2LMHeadModel"),
    ],
)
def test_the_class_is_what_the_configuration_names_or_what_the_type_is_for(config, expected):
    """Sequence to sequence before masked, masked before causal: the most telling head that there is."""
    assert model_class(config, "it").__name__ == expected


def refused(name) -> str:
    with pytest.raises(ValueError) as error:
        configuration(name)
    assert "MODEL_OR_PATH must be" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_model_here_is_refused_with_the_reason(tmp_path):
    """A path that is not there, a folder without a configuration, an adapter, a file that is something else."""
    assert refused("./no/such/folder").endswith("there is no file or folder ./no/such/folder")
    assert refused(tmp_path).endswith("has no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refused(tmp_path).endswith("has no config.json (it holds a PEFT adapter: name its base model)")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    assert "no-such-type" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("no JSON")
    assert "notes.txt is none" in refused(tmp_path / "notes.txt")


def cause(name: str) -> Exception:
    """An error of huggingface_hub, whose arguments differ between versions."""
    kind = getattr(huggingface_hub.errors, name)
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("RepositoryNotFoundError", "does not exist (or is private: log in with `hf auth login`)"),
        ("GatedRepoError", "is gated: ask for access on its page and log in with `hf auth login`"),
        ("EntryNotFoundError", "has no config.json, so it is no transformers model"),
        ("LocalEntryNotFoundError", "cannot be reached, nor is it in the cache"),
    ],
)
def test_what_the_hub_does_not_give_is_refused_with_the_reason(monkeypatch, kind, reason):
    """transformers wraps these errors in long texts; one sentence is left of them."""

    def fail(name, **kwargs):
        raise OSError("a very long text") from cause(kind)

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr(source.constants, "HF_HUB_OFFLINE", False)
    assert refused("someone/something").endswith(f"on the Hub it {reason}")


def test_offline_the_error_says_so(monkeypatch):
    """Before anything else, since nothing else can be known."""
    monkeypatch.setattr(source.constants, "HF_HUB_OFFLINE", True)
    assert refused("someone/something").endswith("because HF_HUB_OFFLINE is set and it is not in the cache")


def test_no_random_numbers_are_used_up_on_the_meta_device(folder):
    """A graph of an empty model leaves the random state as it was."""
    before = torch.random.get_rng_state()
    graph_of(folder, meta=True)
    assert torch.equal(torch.random.get_rng_state(), before)
