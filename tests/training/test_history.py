"""Snapshots and the parameters they are taken of."""

import pytest
import torch
from torch import nn
from training_helpers import mlp, tiny_gpt2

from hf_nino.training import History, make_store
from hf_nino.training.stores import PlainStore, plain_store


def filled(store, context=3, count=2, **options):
    history = History(context, **options)
    for position in range(count):
        history.append(store.snapshot(), 10 * (position + 1))
    return history


def test_snapshots_are_copies():
    """A snapshot does not change when the parameters do."""
    model = mlp()
    store = make_store(model)
    snapshot = store.snapshot()
    before = {name: tensor.clone() for name, tensor in snapshot.items()}
    with torch.no_grad():
        model[0].weight.add_(1)
    assert all(torch.equal(snapshot[name], before[name]) for name in before)
    assert not torch.equal(store.snapshot()["0.weight"], before["0.weight"])


def test_history_returns_exactly_what_it_was_given_after_a_round_trip():
    """``load(to_safetensors())`` restores states and steps bit for bit."""
    store = make_store(mlp())
    history = filled(store)
    copy = History(3)
    copy.load(history.to_safetensors(), history.steps, store.signature(), store.live())
    assert copy.steps == [10, 20] and not copy.full
    for state, restored in zip(history.states(), copy.states(), strict=True):
        assert all(torch.equal(state[name], restored[name]) for name in state)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("0/0.weight"), "missing or unexpected"),
        (lambda t: t.update({"2/0.weight": torch.zeros(8, 4)}), "missing or unexpected"),
        (lambda t: t.update({"0/0.weight": torch.zeros(4, 8)}), "must have shape"),
    ],
)
def test_a_history_that_does_not_fit_is_refused_and_leaves_nothing(spoil, message):
    """Missing, superfluous or misshapen snapshots raise, and the history is empty afterwards."""
    store = make_store(mlp())
    history = filled(store)
    tensors = history.to_safetensors()
    spoil(tensors)
    with pytest.raises(ValueError, match=message):
        history.load(tensors, [10, 20], store.signature(), store.live())
    assert len(history) == 0


def test_history_refuses_disorder():
    """Snapshots come in order and no more than fit."""
    store = make_store(mlp())
    history = filled(store, context=2)
    with pytest.raises(ValueError, match="full"):
        history.append(store.snapshot(), 30)
    history.clear()
    history.append(store.snapshot(), 30)
    with pytest.raises(ValueError, match="later than"):
        history.append(store.snapshot(), 30)
    with pytest.raises(ValueError, match="history_dtype"):
        History(2, dtype="int8")


def test_names_are_those_of_the_bare_model():
    """Neither ``DataParallel`` nor ``torch.compile``, of the whole or of a part, changes the names."""
    names = list(make_store(mlp()).parameters())
    assert names == ["0.weight", "0.bias", "3.weight", "3.bias"]
    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")
    assert list(make_store(model).parameters()) == names
    assert list(make_store(torch.compile(mlp(), backend="eager")).parameters()) == names
    assert list(make_store(nn.DataParallel(mlp())).parameters()) == names


def test_a_submodule_called_module_keeps_its_name():
    """Only wrappers are taken off, not a module of the model that happens to have a wrapper's attribute name."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert list(make_store(Model()).parameters()) == ["module.weight", "module.bias"]


def test_tied_parameters_appear_once_and_frozen_ones_not_at_all():
    """The store holds each trainable tensor once; a tied one under its first name."""
    model = tiny_gpt2()
    names = set(make_store(model).parameters())
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    model.transformer.wpe.weight.requires_grad_(False)
    assert set(make_store(model).parameters()) == names - {"transformer.wpe.weight"}


def test_write_is_in_place_and_all_or_nothing():
    """``write`` keeps every parameter's memory; with a bad entry nothing is written."""
    model = mlp()
    store = make_store(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    target = {name: tensor + 1 for name, tensor in store.snapshot().items()}
    store.write(target)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(torch.equal(tensor, target[name]) for name, tensor in store.snapshot().items())
    for bad, message in (({"nowhere": torch.zeros(1)}, "trainable"), ({"3.bias": torch.zeros(5)}, "shapes")):
        with pytest.raises(ValueError, match=message):
            store.write({"0.weight": torch.zeros(8, 4)} | bad)
    assert torch.equal(store.snapshot()["0.weight"], target["0.weight"])


def test_the_signature_sees_what_changes_the_trainable_parameters():
    """Freezing changes the signature; training does not."""
    model = mlp()
    store = make_store(model)
    signature = store.signature()
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert store.signature() == signature
    model[0].weight.requires_grad_(False)
    assert store.signature() != signature


def test_the_fingerprint_tells_two_states_of_a_model_apart():
    """Equal states have equal fingerprints; a small step changes it."""
    model = mlp()
    fingerprint = make_store(model).fingerprint()
    assert make_store(mlp()).fingerprint() == fingerprint
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-5
    assert make_store(model).fingerprint() != fingerprint


def test_models_whose_parameters_cannot_be_written_are_refused():
    """DeepSpeed without its engine, meta device and fully frozen models get an error that says what is wrong."""
    model = mlp()
    model[0].weight.ds_id = 3
    with pytest.raises(ValueError, match=r"'0\.weight' is managed by DeepSpeed"):
        make_store(model)
    with pytest.raises(ValueError, match="meta device"):
        make_store(mlp().to("meta"))
    with pytest.raises(ValueError, match="frozen"):
        make_store(mlp().requires_grad_(False))


def test_sharded_models_of_one_process_are_whole(tmp_path):
    """A DTensor on a mesh of one process is read and written as a whole, in place; recorders refuse it by name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = mlp()
        before = model[0].weight.detach().clone()
        model[0].weight = nn.Parameter(distribute_tensor(before.clone(), init_device_mesh("cpu", (1,))))
        local = model[0].weight.to_local()
        store = make_store(model)
        state = store.snapshot()
        assert store.shards() is None and torch.equal(state["0.weight"], before)
        store.write({name: tensor + 1 for name, tensor in state.items()})
        assert torch.equal(local, before + 1)
        with pytest.raises(ValueError, match=r"'0\.weight' is a DTensor"):
            plain_store(model)
        assert type(make_store(mlp())) is PlainStore
    finally:
        torch.distributed.destroy_process_group()
