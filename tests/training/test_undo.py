"""What was kept is put back, bit for bit, whatever the optimizer."""

import pytest
import torch
from torch import nn
from training_helpers import same

from hf_nino.training import make_store
from hf_nino.training.undo import NoUndo, Undo

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2).to(torch.float64))


def step(net, optimizer, seed):
    data = torch.Generator().manual_seed(seed)
    hidden = net[2](net[1](net[0](torch.randn(8, 4, generator=data))))
    optimizer.zero_grad()
    net[3](hidden.double()).square().mean().backward()
    optimizer.step()


def everything(net, optimizer):
    state = {
        f"{i}.{key}": torch.as_tensor(value).clone()
        for i, entry in enumerate(optimizer.state.get(p, {}) for p in net.parameters())
        for key, value in entry.items()
        if value is not None
    }
    return {name: tensor.clone() for name, tensor in net.state_dict().items()} | state


@pytest.mark.parametrize("place", ["cpu", "model", "disk"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_everything_is_put_back_exactly_and_in_place(tmp_path, kind, place):
    """Parameters of two dtypes, statistics and optimizer state are the same bits again, at the same addresses, and the
    run goes on as it did from there."""
    net = model()
    optimizer = OPTIMIZERS[kind](net.parameters())
    for seed in range(3):
        step(net, optimizer, seed)
    undo = Undo(f"disk:{tmp_path}" if place == "disk" else place)
    undo.keep(make_store(net), optimizer, {"anchor": torch.arange(3.0)}, 3)
    kept = everything(net, optimizer)
    addresses = [p.data_ptr() for p in net.parameters()]
    for seed in range(3, 6):
        step(net, optimizer, seed)
    later = everything(net, optimizer)
    assert not same(kept, later)
    memory = undo.restore(make_store(net), optimizer)
    assert same(kept, everything(net, optimizer))
    assert [p.data_ptr() for p in net.parameters()] == addresses
    assert torch.equal(memory["anchor"], torch.arange(3.0))
    undo.close()
    for seed in range(3, 6):
        step(net, optimizer, seed)
    assert same(later, everything(net, optimizer))


@pytest.mark.parametrize("place", ["cpu", "model", "disk"])
def test_memory_is_kept_as_it_was_before_the_nowcast(tmp_path, place):
    """Kept first, changed in place by the nowcast, and then the rest is kept: the memory of before comes back, beside
    parameters and state of after; the next state takes the place of all of it."""
    net = model()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    step(net, optimizer, 0)
    undo = Undo(f"disk:{tmp_path}" if place == "disk" else place)
    memory = {"anchor": torch.arange(3.0), "count": torch.tensor(3)}
    for turn in range(2):
        before = {name: tensor.clone() for name, tensor in memory.items()}
        undo.keep_memory(memory, turn)
        memory["anchor"].add_(1.0)
        memory["count"].add_(1)
        undo.keep(make_store(net), optimizer, None, turn)
        kept = everything(net, optimizer)
        step(net, optimizer, 1)
        assert same(undo.restore(make_store(net), optimizer), before) and not same(before, memory)
        assert same(kept, everything(net, optimizer))
        step(net, optimizer, 2)
    undo.release()
    assert undo.tensors() == {}
    undo.close()


def test_state_that_did_not_exist_is_gone_again():
    """Kept before the first step: afterwards the optimizer has no state, and its first step is the first again."""
    net = model()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    undo = Undo("cpu")
    undo.keep(make_store(net), optimizer, {}, 0)
    step(net, optimizer, 0)
    first = everything(net, optimizer)
    undo.restore(make_store(net), optimizer)
    assert len(optimizer.state) == 0
    step(net, optimizer, 0)
    assert same(first, everything(net, optimizer))


def test_the_learning_rate_goes_on_and_other_numbers_of_a_group_go_back():
    """What a scheduler sets stays; what the optimizer itself keeps in its groups (Prodigy's ``d``) is put back."""
    net = model()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    optimizer.param_groups[0]["d"] = 1.5
    undo = Undo("cpu")
    undo.keep(make_store(net), optimizer, {}, 0)
    optimizer.param_groups[0].update(d=7.0, lr=0.01)
    undo.restore(make_store(net), optimizer)
    assert (optimizer.param_groups[0]["d"], optimizer.param_groups[0]["lr"]) == (1.5, 0.01)


def test_what_was_saved_can_be_loaded():
    """Tensors and numbers of one object restore the run from another."""
    net = model()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    step(net, optimizer, 0)
    first, second = Undo("cpu"), Undo("cpu")
    first.keep(make_store(net), optimizer, {"m": torch.ones(1)}, 1)
    kept = everything(net, optimizer)
    second.load(first.tensors(), first.numbers(), 1)
    step(net, optimizer, 1)
    assert same(second.restore(make_store(net), optimizer), {"m": torch.ones(1)})
    assert same(kept, everything(net, optimizer))


def test_optimizers_with_a_memory_of_another_kind_are_named():
    """LBFGS keeps lists of tensors: its state cannot be kept, and the error says what was found."""
    net = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(net.parameters())

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(NoUndo, match=r"LBFGS keeps '.*', a list"):
        Undo("cpu").keep(make_store(net), optimizer, {}, 1)
