"""States from elsewhere: cut into strips, sent ahead, and predictions brought back; nothing changes but the way."""

import pytest
import torch
from nowcaster_cases import GRAPHS, attention_graph, mlp_graph, positions, random_nowcaster, trajectory
from safetensors import safe_open
from safetensors.torch import save_file

from hf_nino.nowcaster import Engine, streaming
from hf_nino.nowcaster.scaling import measure_scales
from hf_nino.nowcaster.streaming import PlainLane, Results, States, strips
from hf_nino.nowcaster.tiles import CANDIDATES, choose, grid

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("sources", "targets", "edges"), [(1, 1, 1), (1, 50, 8), (50, 1, 8), (7, 13, 16), (300, 3, 64), (9, 9, 10**6)]
)
def test_tiles_cover_a_block_once(sources, targets, edges):
    """Every edge lies in exactly one tile, and no tile has more edges than asked for."""
    count = torch.zeros(targets, sources, dtype=torch.int64)
    for tile in grid(sources, targets, edges):
        assert 1 <= tile.edges <= edges
        count[tile.columns, tile.rows] += 1
    assert (count == 1).all()
    assert all(t.columns.stop - t.columns.start <= 2 for t in grid(sources, targets, edges, 2))


@pytest.mark.parametrize("name", GRAPHS)
def test_strips_cover_a_block_once(name, monkeypatch):
    """Every edge lies in one tile of one strip, and a strip's elements are the block's, in either orientation."""
    monkeypatch.setattr(streaming, "STRIP_BYTES", 100)
    graph = GRAPHS[name]()
    cuts = 0
    for number, block in enumerate(graph.trainable_blocks):
        sources, targets, _ = block.shape
        count = torch.zeros(targets, sources, dtype=torch.int64)
        values = torch.arange(block.edges * block.shape[2]).view(block.shape)
        parts = list(strips(number, block, grid(sources, targets, 4), 20))
        cuts += len(parts)
        for strip in parts:
            here = strip.by_target(strip.of(values))
            for tile in strip.tiles():
                count[tile.columns, tile.rows] += 1
                expected = values[tile.rows, tile.columns].transpose(0, 1)
                assert torch.equal(here[strip.local(tile)], expected)
        assert (count == 1).all()
        assert len(list(strips(number, block, grid(sources, targets, 4), None))) == 1
    assert cuts > len(graph.trainable_blocks)


class Recorder(PlainLane):
    """Copies everything, and notes in which order pieces were sent and taken."""

    def __init__(self, device):
        super().__init__(device, always=True)
        self.log = []

    def send(self, pieces):
        number = sum(kind == "send" for kind, _ in self.log)
        self.log.append(("send", number))
        receive = super().send(pieces)

        def taken():
            self.log.append(("take", number))
            return receive()

        return taken

    def fetch(self, piece, destination):
        self.log.append(("fetch", None))
        held = piece.clone()
        piece.zero_()  # whoever counts on a prediction before it is fetched gets nothing

        def finish():
            self.log.append(("finish", None))
            destination.copy_(held)

        return finish


@pytest.mark.parametrize("name", GRAPHS)
def test_travelling_changes_nothing(name, monkeypatch):
    """Copied in strips, taken late and brought back late: bit for bit what states in place give."""
    graph, model = GRAPHS[name](), random_nowcaster()
    states, pos, engine = trajectory(graph), positions(graph), Engine(tile=6)
    expected = model.nowcast(graph, states, 3, pos=pos, engine=engine)
    lanes = []
    monkeypatch.setattr(streaming, "STRIP_BYTES", 100)
    monkeypatch.setattr(streaming, "PlainLane", lambda device: lanes.append(Recorder(device)) or lanes[-1])
    ours = model.nowcast(graph, states, 3, pos=pos, engine=engine)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    (lane,) = lanes
    fetched = [kind for kind, _ in lane.log].count("fetch")
    assert fetched == [kind for kind, _ in lane.log].count("finish") > 0


def test_the_next_strip_is_sent_before_this_one_is_used():
    """Of strips 0, 1, 2 ...: send 0, send 1, take 0, send 2, take 1 ...; one ahead, not more."""
    graph = attention_graph()
    lane = Recorder(CPU)
    histories = [trajectory(graph)]
    states = States(histories, [measure_scales(histories[0])], CPU, torch.float32, lane=lane)
    for _ in states.stream((block, grid(*block.shape[:2], 4)) for block in graph.trainable_blocks):
        pass
    total = len(lane.log) // 2
    order = [("send", 0)]
    for number in range(1, total):
        order += [("send", number), ("take", number - 1)]
    assert lane.log == [*order, ("take", total - 1)]


def test_results_return_to_their_own_dtype_and_place():
    """A strip's prediction is written where the strip was, in the parameter's dtype, and nowhere else."""
    graph = GRAPHS["strided"]()
    tensors = {name: torch.full(graph.shapes[name], -1.0).bfloat16() for name in graph.parameter_names}
    results = Results(tensors, CPU, Recorder(CPU))
    block = next(block for block in graph.trainable_blocks if block.parameter == "compound")
    number = graph.trainable_blocks.index(block)
    for strip in strips(number, block, grid(*block.shape[:2], 4), None):
        part = results.place(strip)
        assert part.dtype == torch.bfloat16
        strip.by_target(part).copy_(torch.arange(block.edges).view(block.shape).transpose(0, 1))
        results.done(part)
    results.close()
    assert torch.equal(block.view(tensors["compound"]).float(), torch.arange(block.edges).view(block.shape).float())
    assert all((tensor == -1).all() for name, tensor in tensors.items() if name != "compound")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_memory_mapped_snapshots(tmp_path, dtype):
    """Snapshots in files give what the same snapshots in memory give, in any dtype."""
    graph, model = mlp_graph(), random_nowcaster()
    states = [{name: tensor.to(dtype) for name, tensor in state.items()} for state in trajectory(graph)]
    mapped = []
    for number, state in enumerate(states):
        path = tmp_path / f"{number}.safetensors"
        save_file(state, path)
        with safe_open(path, framework="pt") as file:
            mapped.append({name: file.get_tensor(name) for name in state})
    ours, expected = (model.nowcast(graph, s, 3, pos=positions(graph)) for s in (mapped, states))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_scales_of_pieces_are_those_of_the_whole(monkeypatch):
    """Moments joined from pieces are the mean and unbiased deviation over all elements and snapshots."""
    monkeypatch.setattr("hf_nino.nowcaster.scaling.PIECE", 7)
    generator = torch.Generator().manual_seed(0)
    states = [
        {"w": torch.randn(5, 9, generator=generator) * 0.1 + t, "b": torch.full((3,), 2.0), "none": torch.zeros(0)}
        for t in range(4)
    ]
    scales = measure_scales(states)
    stacked = torch.stack([state["w"] for state in states]).double()
    assert scales["w"].mean == pytest.approx(float(stacked.mean()), rel=1e-6)
    assert scales["w"].std == pytest.approx(float(stacked.std()), rel=1e-6)
    assert scales["b"] == (2.0, 0.0) and scales["none"] == (0.0, 0.0)


def test_the_smallest_tile_near_the_fastest_is_chosen():
    """Within 5 percent of the least cost; what does not fit is never chosen while anything does."""
    cost = dict(zip(CANDIDATES, (9.0, 5.0, 1.04, 1.0, 1.2, float("inf")), strict=True))
    assert choose(CANDIDATES, cost.__getitem__) == CANDIDATES[2]
    cost[CANDIDATES[2]] = 1.06
    assert choose(CANDIDATES, cost.__getitem__) == CANDIDATES[3]
    assert choose(CANDIDATES, lambda _: float("inf")) == CANDIDATES[0]
