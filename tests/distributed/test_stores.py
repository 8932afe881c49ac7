"""What is written is what is read, on every rank, whatever backend holds the parameters."""

import math
from collections import Counter

import pytest
import torch
from backends import BACKENDS, bare_model, every_backend, own_rows, same, whole, wrapped
from launching import launch

from hf_nino.training.stores.layout import Layout, row_order

pytestmark = pytest.mark.distributed


# -- layouts, without processes -------------------------------------------------------------------------------------

# 7 rows of 3: whole on 3 ranks; cut between rows; cut anywhere; one rank without any; shards replicated across.
SPANS = {
    "replicas": ((0, 21),) * 3,
    "rows": ((0, 9), (9, 18), (18, 21)),
    "anywhere": ((0, 8), (8, 16), (16, 21)),
    "within one row": ((0, 1), (1, 2), (2, 21)),
    "idle": ((0, 21), (21, 21), (0, 0)),
    "hybrid": ((0, 12), (12, 21), (0, 12), (12, 21)),
    "hybrid in order": ((0, 12), (0, 12), (12, 21), (12, 21)),
}


def carried(moves, sources, count):
    """What every element of rank's target comes from: {element: source}, each exactly once."""
    found = Counter(element for move in moves for element in range(move.start, move.stop))
    assert all(times == 1 for times in found.values())
    assert all(sources[m.source][0] <= m.start and m.stop <= sources[m.source][1] for m in moves)
    return set(found) if count is None else len(found)


@pytest.mark.parametrize("kind", SPANS)
def test_every_row_has_one_owner_and_every_element_finds_its_way(kind):
    """Rows adjoin and are complete; reading, writing and gathering bring exactly the elements that are wanted, from
    ranks that have them, and senders and receivers have the same list."""
    layout = Layout((7, 3), SPANS[kind])
    assert [row for rows in layout.rows for row in range(rows.start, rows.stop)] == list(range(7))
    size = len(layout.held)
    everything = [(0, 21)] * size
    for plan, sources, wanted in (
        (layout.reads, layout.held, layout.own),
        (layout.writes, layout.own, layout.held),
        (layout.gathers, layout.own, everything),
    ):
        for rank in range(size):
            arriving = [move for move in plan(rank) if move.target == rank]
            assert carried(arriving, sources, None) == set(range(*wanted[rank]))
            for other in range(size):
                sent = [move for move in plan(other) if move.source == other and move.target == rank]
                assert sent == [move for move in arriving if move.source == other]


def test_rows_stay_where_they_are_held():
    """Nothing travels to read rows of backends that cut between rows, or not at all; replicas share the work."""
    assert all(Layout((7, 3), SPANS[kind]).holds_own for kind in ("replicas", "rows", "idle", "hybrid in order"))
    assert not Layout((7, 3), SPANS["anywhere"]).holds_own
    hybrid = Layout((7, 3), SPANS["hybrid"])
    assert not hybrid.holds_own and hybrid.reordered(row_order([hybrid])).holds_own
    assert [rows.count for rows in Layout((7, 3), SPANS["replicas"]).rows] == [2, 2, 3]
    assert [rows.count for rows in Layout((), ((0, 1), (0, 1))).rows] == [0, 1]


def test_spans_that_leave_something_out_are_refused():
    """A parameter of which no rank holds the end (pipelines) is an error, and so are overlaps."""
    for spans in (((0, 9), (9, 18)), ((0, 12), (9, 21))):
        with pytest.raises(ValueError, match="do not adjoin"):
            Layout((7, 3), spans)


# -- real processes -------------------------------------------------------------------------------------------------


def _store(rank, kind, dtype):
    from hf_nino.training import make_store

    start = {n: p.detach().double() for n, p in bare_model(kind, dtype).named_parameters() if p.requires_grad}
    model = wrapped(kind, bare_model(kind, dtype))
    store = make_store(model)
    found = {"read": same(start, whole(store)), "signature": sorted(store.signature())}
    found["fingerprints"] = [store.fingerprint()]
    new = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        for name, tensor in start.items()
    }
    reference = bare_model(kind, dtype)
    # FSDP2 shows whole parameters after an evaluation: optimizers are made before.
    optimizers = [
        torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1) for net in (model, reference)
    ]
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(new.get(name, parameter))
        model(x)  # an evaluation before: some backends stay unsharded after it
    store.write(own_rows(store, new))
    found["written"] = same({name: tensor.double() for name, tensor in new.items()}, whole(store))
    with torch.no_grad():
        found["evaluated"] = float((model(x) - reference(x)).abs().max())
    for net, optimizer in zip((model, reference), optimizers, strict=True):
        net(x).square().sum().backward()
        optimizer.step()
    after = {name: p.detach().double() for name, p in reference.named_parameters() if p.requires_grad}
    state = whole(store)
    found["stepped"] = max(float((state[name] - after[name]).abs().max()) for name in after if after[name].numel())
    found["state"] = state
    found["elements"] = sum(tensor.numel() for tensor in store.live().values())
    with pytest.raises(ValueError, match="trainable parameters of the model only"):
        store.write({"nonsense": torch.zeros(1)})
    with pytest.raises(ValueError, match="parameters' shapes"):
        store.write({"tiny": torch.zeros(9)})
    return found


@pytest.mark.parametrize("kind", every_backend())
def test_what_is_written_is_read_trained_on_and_the_same_on_every_rank(tmp_path, kind):
    """Reading gives the model's numbers; what is written is read again, is what the next evaluation and the next
    optimizer step start from, and every rank has the same bits.  Each rank reads its share alone."""
    results = launch(_store, BACKENDS[kind], tmp_path, kind, torch.float32)
    total = sum(p.numel() for p in bare_model(kind).parameters() if p.requires_grad)
    assert all(r["read"] and r["written"] for r in results)
    assert max(r["evaluated"] for r in results) < 1e-6 and max(r["stepped"] for r in results) < 1e-6
    assert all(same(results[0]["state"], r["state"]) for r in results)
    assert sum(r["elements"] for r in results) == total
    single = launch(_store, 1, tmp_path, "ddp", torch.float32)[0] if kind == "ddp" else None
    if single is not None:
        assert single["signature"] == results[0]["signature"]
        for one, several in zip(single["fingerprints"][0], results[0]["fingerprints"][0], strict=True):
            assert math.isclose(one, several, rel_tol=1e-12)


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_sixteen_bits_arrive_as_they_are(tmp_path, kind):
    """bfloat16 parameters travel in their own dtype."""
    results = launch(_store, 2, tmp_path, kind, torch.bfloat16)
    assert all(r["read"] and r["written"] for r in results)
    assert same(results[0]["state"], results[1]["state"])


def _odd(rank):
    from hf_nino.training import make_store

    errors = []
    other, frozen = bare_model(), bare_model()
    if rank:
        del other.scale
        frozen.requires_grad_(False)
    for model in (other, frozen):
        with pytest.raises(ValueError) as caught:
            make_store(model)
        errors.append(str(caught.value))
    return errors


def test_ranks_with_other_parameters_are_refused_on_all_of_them(tmp_path):
    """Parameters that only some ranks have, and a rank that cannot go on at all: the same clear error everywhere."""
    first, second = launch(_odd, 2, tmp_path)
    assert first == second
    assert "the same parameters on all ranks" in first[0]
    assert "rank 1: `model` must have trainable" in first[1]


def _ranks(rank):
    from hf_nino.training.ranks import ProcessGroupRanks, is_first_rank

    ranks = ProcessGroupRanks(order=(2, 0, 1))
    numbers = [torch.full((5,), 0.1 * (rank + 1)), torch.arange(3.0) * 1e-3 * rank, torch.zeros(0)]
    large = torch.randn(5_000_000, generator=torch.Generator().manual_seed(rank))
    ranks.sum_([*numbers, large])
    outgoing = [torch.full((place,), 10 * ranks.rank + place, dtype=torch.bfloat16) for place in range(3)]
    incoming = [torch.zeros(ranks.rank, dtype=torch.bfloat16) for _ in range(3)]
    ranks.exchange(outgoing, incoming)
    return {
        "numbers": numbers,
        "large": large,
        "incoming": incoming,
        "rank": ranks.rank,
        "texts": ranks.texts("ä" * rank),
        "agree": [ranks.agree(""), ranks.agree("no" if rank == 1 else ""), ranks.agree("all say so")],
        "least": ranks.least([rank, 5 - rank]),
        "alike": [ranks.alike("x"), ranks.alike(str(rank))],
        "timeout": ranks.timeout,
        "first": is_first_rank(),
    }


def test_ranks_sum_exchange_and_vote(tmp_path):
    """Sums have the same bits everywhere, rows go to the ranks in their order, and one failure is everyone's."""
    results = launch(_ranks, 3, tmp_path, timeout=41)
    for found in results:
        assert torch.allclose(found["numbers"][0], torch.full((5,), 0.6))
        assert torch.equal(found["numbers"][1], results[0]["numbers"][1])
        assert torch.equal(found["large"], results[0]["large"])
        place = found["rank"]
        assert [piece.tolist() for piece in found["incoming"]] == [[10.0 * s + place] * place for s in range(3)]
        assert found["texts"] == ["", "ä", "ää"]
        assert found["agree"] == ["", "rank 1: no", "all say so"]
        assert (found["least"], found["alike"], found["timeout"]) == ([0, 3], [True, False], 41)
    assert [found["rank"] for found in results] == [1, 2, 0]
    assert [found["first"] for found in results] == [True, False, False]


def _fails(rank, when):
    """Two sums with local work around them, of which rank 1 (or every rank) fails at ``when``."""
    from hf_nino.training.ranks import FailedElsewhere, ProcessGroupRanks

    ranks, numbers = ProcessGroupRanks(), torch.ones(3)

    def work(stage):
        if stage == when and (rank == 1 or when == "all"):
            raise KeyError(stage)

    found = {"error": None}
    try:
        with ranks.together():
            for stage in ("first", "second"):
                work(stage)
                with ranks.together():
                    work("all")
                    ranks.sum_([numbers])
            work("last")
    except (FailedElsewhere, KeyError) as error:
        found = {"error": str(error), "own": isinstance(error, KeyError)}
    return found | {"numbers": numbers.tolist(), "later": ranks.texts(str(rank))}


@pytest.mark.parametrize(("when", "sums"), [("first", 1), ("second", 3), ("last", 9), ("all", 1), ("never", 9)])
def test_what_fails_on_one_rank_fails_on_all_at_the_next_collective(tmp_path, when, sums):
    """Before the first collective, between two, after the last, on several ranks or on none: the rank raises its own
    error, the others one that names it, none of them begins a further collective, and they can go on talking."""
    results = launch(_fails, 3, tmp_path, when)
    for rank, found in enumerate(results):
        assert found["numbers"] == [sums] * 3 and found["later"] == ["0", "1", "2"]
        if when == "never":
            assert found["error"] is None
        elif when == "all" or rank == 1:
            assert found["own"] and found["error"] == repr(when)
        else:
            assert not found["own"] and found["error"] == f"rank 1 failed (KeyError: {when!r})"


def _writes(rank, kind):
    from hf_nino.training import make_store

    store = make_store(wrapped(kind, bare_model(kind)))
    before, rows = whole(store), store.snapshot()
    if rank == 1:
        rows["2.bias"] = rows["2.bias"][:0] if len(rows["2.bias"]) else torch.ones(9)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        store.write({name: tensor + 1 for name, tensor in rows.items()})
    return str(caught.value), same(before, whole(store))


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("fsdp1", marks=pytest.mark.slow)])
def test_a_rank_that_cannot_write_keeps_the_others_from_writing(tmp_path, kind):
    """Nothing is written anywhere, and the others say who could not."""
    results = launch(_writes, BACKENDS[kind], tmp_path, kind)
    assert all(unchanged for _, unchanged in results)
    assert "parameters' shapes" in results[1][0] and results[0][0].startswith("rank 1 failed (ValueError")
