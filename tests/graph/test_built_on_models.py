"""Graphs of what people build on models: adapters (PEFT), extra heads, tied and untied embeddings, wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, TEXT
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_nino import NiNo
from hf_nino.graph import EdgeBlock, EdgeType, NeuralGraph
from hf_nino.graph.inputs import split_inputs
from hf_nino.graph.verify import TOLERANCE, PermutationTest
from hf_nino.nowcaster import NiNoModel, NowcasterConfig

# Told to transformers 5.23 by peft 0.21.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(8).view(1, 8) * 3


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = TEXT | {"num_hidden_layers": 1, "num_key_value_heads": 2} | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def gpt2() -> GPT2LMHeadModel:
    return next(a for a in ARCHITECTURES if a.name == "gpt2").model()


def adapted(base: nn.Module, **config: Any) -> nn.Module:
    """A PEFT model with low-rank adapters of rank 4, none of whose parameters is zero."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install hf_nino[peft]")
    settings = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | config
    return scatter(peft.get_peft_model(base, peft.LoraConfig(**settings)).eval())


def scatter(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def two_adapters(active: bool) -> nn.Module:
    model = adapted(llama())
    peft = pytest.importorskip("peft")
    model.add_adapter("second", peft.LoraConfig(r=3, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"]))
    if active:
        model.base_model.set_adapter(["default", "second"])
    return scatter(model)


ADAPTERS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "queries and values": (lambda: adapted(llama()), {"q_proj": 4, "v_proj": 4}),
    "all linear layers": (
        lambda: adapted(llama(), target_modules="all-linear"),
        dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 4),
    ),
    "saved modules": (
        lambda: adapted(llama(), modules_to_save=["lm_head", "embed_tokens"]),
        {"q_proj": 4, "v_proj": 4},
    ),
    "transposed weights": (
        lambda: adapted(gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        dict.fromkeys([f"h.{layer}.{name}" for layer in range(2) for name in ("attn.c_attn", "mlp.c_fc")], 4),
    ),
    "the first of two": (lambda: two_adapters(active=False), {"q_proj": 4, "v_proj": 4}),
}
"""A model, and the rank of the adapter of each layer that has one."""

each_adapter = pytest.mark.parametrize(("build", "ranks"), ADAPTERS.values(), ids=ADAPTERS.keys())


def blocks_of(graph: NeuralGraph, ending: str) -> list[EdgeBlock]:
    found = [block for block in graph.blocks if block.parameter.endswith(ending)]
    assert found, ending
    return found


def outer_group(block: EdgeBlock, inner: int) -> int:
    """The group at the other end of an edge block."""
    return block.target.group if block.source.group == inner else block.source.group


@each_adapter
def test_the_rank_axis_of_an_adapter_is_a_group_of_its_own(build, ranks) -> None:
    """One group of r interchangeable neurons for each adapted layer, between the layer's own inputs and outputs."""
    model = build()
    graph = NeuralGraph.from_model(model)
    for layer, rank in ranks.items():
        base = blocks_of(graph, f"{layer}.base_layer.weight")
        (down,) = blocks_of(graph, f"{layer}.lora_A.default.weight")
        assert all(down.source.group in (block.source.group, block.target.group) for block in base)
        unit = graph.groups[down.target.group]
        assert unit.name.endswith(f"{layer}.lora_A.default") and (unit.size, unit.pinned) == (rank, None)
        for up in blocks_of(graph, f"{layer}.lora_B.default.weight"):
            targets = {outer_group(block, down.source.group) for block in base}
            assert outer_group(up, down.target.group) in targets
        assert any(s.units.shape == (1, rank, 1) and unit.name in s.name for s in graph.symmetries)
    assert not any("refuted" in line for line in graph.report)
    assert not any(group.kind == "private" for group in graph.groups)


@each_adapter
def test_only_what_is_trained_has_edges(build, ranks) -> None:
    """The graph's parameters are the trainable ones; frozen matrices take part in permutations only."""
    model = build()
    graph = NeuralGraph.from_model(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(graph.parameter_names) == trained
    assert any("lora_A" in name for name in trained) and not any("base_layer" in name for name in trained)
    assert any(block.parameter.endswith("base_layer.weight") and not block.trainable for block in graph.blocks)


@each_adapter
def test_permuting_an_adapted_model_keeps_its_outputs(build, ranks) -> None:
    """Base and adapter move together, rank units by themselves; moving the rank units of one side alone shows."""
    model = build()
    graph = NeuralGraph.from_model(model)
    test = PermutationTest(model, *split_inputs(model, None), graph)
    assert test.change(graph.permutation(torch.Generator().manual_seed(0))) < TOLERANCE
    units = [symmetry for symmetry in graph.symmetries if "lora_A" in symmetry.name and "lora_B" not in symmetry.name]
    assert len(units) == len(ranks) and all(test.holds(symmetry) for symmetry in units)
    name = next(name for name in test.state if name.endswith("lora_A.default.weight"))
    torn = test.run({**test.state, name: test.state[name].roll(1, dims=0)})
    assert max(float((a - b).abs().max()) for a, b in zip(torn, test.reference, strict=True)) > 1e-3


def test_two_adapters_at_work_have_ranks_of_their_own() -> None:
    """Both read the same stream and write the same channels, through 4 and 3 units."""
    graph = NeuralGraph.from_model(two_adapters(active=True))
    (first,), (second,) = (blocks_of(graph, f"q_proj.lora_A.{name}.weight") for name in ("default", "second"))
    assert first.source.group == second.source.group and first.target.group != second.target.group
    assert [graph.groups[block.target.group].size for block in (first, second)] == [4, 3]
    (up,), (other) = blocks_of(graph, "q_proj.lora_B.default.weight"), blocks_of(graph, "q_proj.lora_B.second.weight")
    assert {up.target.group} == {block.target.group for block in other}
    assert sorted(s.units.shape[1] for s in graph.symmetries if "lora_A" in s.name) == [3, 3, 4, 4]


def magnitudes() -> nn.Module:
    return adapted(llama(), use_dora=True)


def test_magnitudes_of_adapted_layers_are_gains_of_their_outputs() -> None:
    """DoRA: rank units as ever, a gain on the channels that base and adapter write, and every permutation holds.

    DoRA measures each row of the adapted matrix by feeding it the identity, which tells its inputs apart: they are
    pinned.
    """
    model = magnitudes()
    graph = NeuralGraph.from_model(model)
    for layer in ("q_proj", "v_proj"):
        (up,), (gain,) = (
            blocks_of(graph, f"{layer}.{name}.default.weight") for name in ("lora_B", "lora_magnitude_vector")
        )
        assert up.target == gain.target and gain.edge_type == EdgeType.NORM
        unit = graph.groups[up.source.group]
        assert (unit.size, unit.pinned) == (4, None)
        assert any(s.units.shape == (1, 4, 1) and unit.name in s.name for s in graph.symmetries)
    assert not any("refuted" in line for line in graph.report)
    assert not any(group.kind == "private" for group in graph.groups)
    assert set(graph.parameter_names) == {name for name, p in model.named_parameters() if p.requires_grad}


class FourBits(nn.Linear):
    """A linear layer as those of bitsandbytes: two numbers in a byte, one scale for every eight, no gradient."""

    @classmethod
    def of(cls, layer: nn.Linear) -> FourBits:
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        groups = layer.weight.detach().reshape(-1, 8)
        scale = groups.abs().amax(1, keepdim=True) / 7
        codes = ((groups / scale).round().to(torch.uint8) + 8).view(-1, 2)
        made.weight = nn.Parameter((codes[:, 0] * 16 + codes[:, 1]).unsqueeze(1), requires_grad=False)
        made.register_buffer("scale", scale)
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        codes = self.weight.flatten().to(torch.int16)
        groups = torch.stack([codes // 16, codes % 16], 1).view(-1, 8) - 8
        return nn.functional.linear(inputs, (groups * self.scale).view(self.out_features, self.in_features))


def quantised() -> nn.Module:
    base = llama()
    base.requires_grad_(False)
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, FourBits.of(child))
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install hf_nino[peft]")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = scatter(peft.get_peft_model(base, config).eval())
    assert sum(parameter.dtype == torch.uint8 for parameter in model.parameters()) == 7
    return model


@pytest.mark.parametrize(
    "build",
    [
        *(ADAPTERS[name][0] for name in ("queries and values", "saved modules", "transposed weights")),
        magnitudes,
        quantised,
    ],
    ids=["queries and values", "saved modules", "transposed weights", "magnitudes", "quantised"],
)
def test_adapters_are_nowcast_and_frozen_weights_left_alone(build) -> None:
    """A short run with a graph nowcaster: every adapter matrix jumps, no frozen number changes."""
    model = build()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nowcaster = NiNoModel(NowcasterConfig(hidden_size=8, max_horizon=4))
        for parameter in nowcaster.parameters():
            nn.init.normal_(parameter, std=0.05)
    optimizer = NiNo(torch.optim.SGD(trained.values(), lr=0.05), model, nowcaster, period=5)
    for step in range(5):
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        before = {n: p.detach().clone() for n, p in trained.items()}
        gradients = {n: p.grad.clone() for n, p in trained.items()}
        optimizer.step()
        jumps = [float((p.detach() - before[n] + 0.05 * gradients[n]).abs().max()) for n, p in trained.items()]
        assert max(jumps) < 1e-6 if step < 4 else min(jumps) > 1e-6
        optimizer.zero_grad()
    assert optimizer.nowcasting.scalars()["nino_nowcasts"] == 1
    assert set(optimizer.nowcasting.graph.parameter_names) == set(trained)
    assert all(parameter.equal(frozen[n]) for n, parameter in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("nowcaster", ["linear", "spectral", "nino-small"])
def test_adapters_may_be_switched_in_a_run(nowcaster, caplog) -> None:
    """What was remembered of one adapter says nothing of the other: after a switch the history begins anew, which is
    said; and only the adapter at work jumps."""
    model = two_adapters(active=False)
    parts = {name: [p for n, p in model.named_parameters() if f".{name}." in n] for name in ("default", "second")}
    optimizer = NiNo(
        torch.optim.AdamW([*parts["default"], *parts["second"]], lr=1e-2),
        model,
        nowcaster,
        period=10,
        interval=2,
        max_steps=80,
        patience=0,
        example_inputs={"input_ids": TOKENS},
    )
    for step in range(40):
        if step == 17:
            model.base_model.set_adapter("second")
        at_work, idle = ("default", "second") if step < 17 else ("second", "default")
        before = {name: [p.detach().clone() for p in parts[name]] for name in parts}
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(map(torch.equal, parts[idle], before[idle]))
        assert not any(map(torch.equal, parts[at_work], before[at_work]))
    assert all(event.accepted for event in optimizer.nowcasting.events)
    steps = [event.step for event in optimizer.nowcasting.events]
    assert steps[0] == 10 and 30 in steps and 40 in steps
    told = [message for message in caplog.messages if "trainable parameters changed" in message]
    assert len(told) == 1 and "starts anew" in told[0]


class Valued(nn.Module):
    """A language model with a head of our own on its last states, as in reinforcement learning."""

    def __init__(self, base: PreTrainedModel, width: int) -> None:
        super().__init__()
        self.base, self.value = base, nn.Linear(width, 1)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.base(input_ids=input_ids, output_hidden_states=True, use_cache=False)
        return out.logits, self.value(out.hidden_states[-1]).squeeze(-1)


@pytest.mark.parametrize(
    "inputs", [TOKENS, (TOKENS,), [TOKENS], {"input_ids": TOKENS}], ids=lambda x: type(x).__name__
)
def test_an_extra_head_reads_the_stream_and_a_tuple_may_be_returned(inputs) -> None:
    """The value head hangs on the last place of the stream; all else is as without it, whatever form inputs have."""
    model = Valued(llama(), 32)
    graph, plain = NeuralGraph.from_model(model, inputs), NeuralGraph.from_model(llama())
    (value,) = blocks_of(graph, "value.weight")
    (logits,) = blocks_of(graph, "lm_head.weight")
    assert value.source == logits.source
    assert graph.groups[value.target.group].pinned == "output of the model"
    assert [s.units.shape for s in graph.symmetries] == [s.units.shape for s in plain.symmetries]
    assert graph.num_parameters == plain.num_parameters + 33


def test_tied_embeddings_share_their_edges_and_untied_ones_do_not() -> None:
    """Tied: one matrix, tokens are the outputs.  Untied: outputs are neurons of their own.  Same stream in both."""
    tied, untied = (NeuralGraph.from_model(llama(tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.aliases == {"lm_head.weight": "model.embed_tokens.weight"} and untied.aliases == {}
    assert untied.num_parameters - tied.num_parameters == 61 * 32
    assert "lm_head" not in {group.name for group in tied.groups}
    assert untied.group("lm_head").pinned == "output of the model"
    assert [s.units.shape for s in tied.symmetries] == [s.units.shape for s in untied.symmetries]


def test_ties_that_only_the_code_knows_are_followed() -> None:
    """A matrix that is used forth and back, transposed, ties its two sides: an autoencoder's one matrix."""

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(7, 6) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight) @ self.weight.T

    graph = NeuralGraph.from_model(Autoencoder(), torch.randn(4, 7))
    assert [(group.size, group.pinned is None) for group in graph.groups] == [(7, False), (6, True)]
    assert len(graph.blocks) == 1 and [s.units.shape for s in graph.symmetries] == [(1, 6, 1)]


def same(first: NeuralGraph, second: NeuralGraph) -> bool:
    parts = [
        (graph.groups, graph.blocks, graph.constants, graph.aliases, dict(graph.shapes)) for graph in (first, second)
    ]
    units = zip(first.symmetries, second.symmetries, strict=True)
    return parts[0] == parts[1] and all(a.name == b.name and a.units.equal(b.units) for a, b in units)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_of_a_model_does_not_matter(dtype) -> None:
    """The same graph, with proof: permutations are tested in float64 whatever the model is kept in."""
    model = llama()
    before = {name: tensor.clone() for name, tensor in copy.deepcopy(model).to(dtype).state_dict().items()}
    low = copy.deepcopy(model).to(dtype)
    assert same(NeuralGraph.from_model(low), NeuralGraph.from_model(model))
    assert all(tensor.equal(before[name]) for name, tensor in low.state_dict().items())


def test_dropout_and_training_mode_do_not_matter() -> None:
    """The same graph as in evaluation mode, and the model stays in training mode."""
    config = GPT2Config(
        n_layer=1, n_embd=24, n_head=3, vocab_size=61, n_positions=16, bos_token_id=1, eos_token_id=2, resid_pdrop=0.5
    )
    model = GPT2LMHeadModel(config).train()
    graph = NeuralGraph.from_model(model)
    assert model.training and all(module.training for module in model.modules())
    assert same(graph, NeuralGraph.from_model(model.eval()))


@pytest.fixture
def process_group(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["compiled", "compiled in place", "data parallel", "distributed"])
def test_wrapped_models_have_the_graph_of_the_model_inside(wrap, request) -> None:
    """``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` change neither neurons nor names."""
    model = llama()
    graph = NeuralGraph.from_model(model)
    if wrap == "compiled":
        wrapped = torch.compile(model, backend="eager")
    elif wrap == "compiled in place":
        wrapped = llama()
        wrapped.compile(backend="eager")
    elif wrap == "data parallel":
        wrapped = nn.DataParallel(model)
    else:
        request.getfixturevalue("process_group")
        wrapped = nn.parallel.DistributedDataParallel(model)
    assert wrapped is not model
    assert same(NeuralGraph.from_model(wrapped), graph)


def test_speech_models_get_a_sound() -> None:
    """Spectra as long as Whisper's positions, a wave for wav2vec 2.0, whose position kernel is normalised."""
    small = {"num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48, "hidden_size": 32}
    whisper = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=99, num_mel_bins=16, max_source_positions=20,
        max_target_positions=30, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    wave = transformers.Wav2Vec2Config(
        **small, conv_dim=(16, 16, 16), conv_stride=(5, 4, 4), conv_kernel=(10, 4, 4), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, num_feat_extract_layers=3,
    )  # fmt: skip
    torch.manual_seed(0)
    for model, unused in (
        (transformers.WhisperForConditionalGeneration(whisper), set()),
        (transformers.Wav2Vec2ForSequenceClassification(wave), {"wav2vec2.masked_spec_embed"}),
    ):
        graph = NeuralGraph.from_model(model)
        assert len(graph.symmetries) >= 10 and not any("refuted" in line for line in graph.report)
        private = {block.parameter for block in graph.blocks if graph.groups[block.target.group].kind == "private"}
        assert private == unused
