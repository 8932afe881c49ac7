"""Precision by name: exact whatever surrounds it, or fast with a known error."""

import pytest
import torch
from nowcaster_cases import attention_graph, original_nowcaster, positions, random_nowcaster, trajectory
from transformers import GPT2Config, GPT2LMHeadModel

from hf_nino.graph import NeuralGraph
from hf_nino.nowcaster import Engine
from hf_nino.nowcaster.blockwise import blockwise
from hf_nino.nowcaster.precision import products, rounds
from hf_nino.nowcaster.scaling import measure_scales

CPU = torch.device("cpu")


def settings():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def medium():
    """A process that allows rounded float32 products everywhere, as people do for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def trained():
    """A small GPT-2, its graph and the snapshots of a real training run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 61, "n_positions": 16}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        likely = torch.rand(61, 61) ** 8
        states = []
        for step in range(50):
            tokens = [torch.randint(61, (8,))]
            while len(tokens) < 16:
                tokens.append(torch.multinomial(likely[tokens[-1]], 1)[:, 0])
            batch = torch.stack(tokens, dim=1)
            logits = model(input_ids=batch).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 9:
                states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return NeuralGraph.from_model(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}), states


@pytest.mark.parametrize("horizon", [1, 40])
def test_the_error_of_fast_is_small_beside_the_predicted_step(trained, horizon):
    """With the original network, on a real run: below 1 percent of the step's norm, 4 for the worst parameter."""
    graph, states = trained
    model, last = original_nowcaster(), states[-1]
    exact = model.nowcast(graph, states, horizon)
    fast = model.nowcast(graph, states, horizon, engine=Engine(precision="fast"))
    errors = {name: float((fast[name] - exact[name]).norm()) for name in exact}
    steps = {name: float((exact[name] - last[name]).norm()) for name in exact}
    assert sum(e * e for e in errors.values()) < 0.01**2 * sum(s * s for s in steps.values())
    assert all(errors[name] < 0.04 * steps[name] for name in steps)
    if rounds("fast", CPU, torch.float32):
        assert max(errors[name] / steps[name] for name in steps) > 1e-4, "negative control: products were rounded"
    else:
        assert max(errors.values()) == 0


def test_float32_is_exact_whatever_the_process_allows(medium):
    """TF32 and bfloat16 products, allowed for training, and autocast around it change nothing in a nowcast."""
    graph, model = attention_graph(tokens=40, heads=4, width=8), random_nowcaster(hidden_size=64)
    states, pos = trajectory(graph), positions(graph)
    allowed = model.nowcast(graph, states, 2, pos=pos)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.nowcast(graph, states, 2, pos=pos)
    torch.set_float32_matmul_precision("highest")
    strict = model.nowcast(graph, states, 2, pos=pos)
    for name, tensor in strict.items():
        assert torch.equal(allowed[name], tensor) and torch.equal(inside[name], tensor)
    if rounds("fast", CPU, torch.float32):
        fast = model.nowcast(graph, states, 2, pos=pos, engine=Engine(precision="fast"))
        assert any(not torch.equal(fast[name], tensor) for name, tensor in strict.items())


@pytest.mark.parametrize("precision", ["float32", "fast"])
def test_the_settings_of_the_process_are_left_as_they_were(precision, medium):
    """After a nowcast, after one that failed, and while deltas are handed out one by one."""
    graph, model = attention_graph(), random_nowcaster()
    states, engine, before = trajectory(graph), Engine(precision=precision), settings()
    model.nowcast(graph, states, 2, pos=positions(graph), engine=engine)
    assert settings() == before
    with pytest.raises(RuntimeError):
        model.nowcast(graph, states, 2, pos=positions(graph)[:, :3], engine=engine)
    assert settings() == before
    for _ in blockwise(model, graph, states, measure_scales(states), 2, positions(graph), engine=engine):
        assert settings() == before
    with products(rounded=True):
        assert settings() == ("tf32", "bf16")


def test_the_network_s_attribute_is_the_default():
    """`model.engine` is what `nowcast` uses unless told otherwise; unknown modes are refused with the known ones."""
    graph, model = attention_graph(tokens=40, heads=4, width=8), random_nowcaster(hidden_size=64)
    states, pos = trajectory(graph), positions(graph)
    assert model.engine == Engine(precision="float32")
    given = model.nowcast(graph, states, 2, pos=pos, engine=Engine(precision="fast"))
    model.engine = Engine(precision="fast")
    own = model.nowcast(graph, states, 2, pos=pos)
    assert all(torch.equal(own[name], given[name]) for name in own)
    with pytest.raises(ValueError, match=r"`precision` must be one of \('float32', 'fast'\), got 'fp8'"):
        Engine(precision="fp8")
