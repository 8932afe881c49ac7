"""The explicit graph: one row per edge, and back."""

from __future__ import annotations

import pytest
import torch
from handmade import convnet, gpt2, llama, mlp, random_state

from hf_nino.graph import EdgeType
from hf_nino.graph.pyg import edge_slices, from_pyg, to_pyg
from hf_nino.graph.structure import SELF_LOOP_VALUE

GRAPHS = {"mlp": mlp, "convnet": convnet, "gpt2": gpt2, "llama": llama}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_edge_is_where_its_block_says(name):
    """Edges come block by block, row-major over [source, target]; then constants; then one self loop per node."""
    graph = GRAPHS[name]()
    state = random_state(graph)
    data = to_pyg(graph, [state])
    expected = []
    for block in graph.trainable_blocks:
        flat = state[block.parameter].flatten()
        elements = block.elements()
        for j, source in enumerate(graph.node_index(block.source).tolist()):
            for i, target in enumerate(graph.node_index(block.target).tolist()):
                taps = flat[elements[j, i]].tolist()
                expected.append((source, target, int(block.edge_type), taps))
    for constant in graph.constants:
        ends = zip(graph.node_index(constant.source).tolist(), graph.node_index(constant.target).tolist(), strict=True)
        expected += [(source, target, int(constant.edge_type), [constant.value]) for source, target in ends]
    expected += [(node, node, int(EdgeType.SELF_LOOP), [SELF_LOOP_VALUE]) for node in range(graph.num_nodes)]
    assert data.num_nodes == graph.num_nodes
    assert data.edge_index.T.tolist() == [list(edge[:2]) for edge in expected]
    assert data.edge_type.tolist() == [edge[2] for edge in expected]
    padded = [edge[3] + [0.0] * (graph.max_features - len(edge[3])) for edge in expected]
    assert torch.equal(data.edge_attr, torch.tensor(padded))
    assert data.validate()


def test_columns_are_kernel_taps_then_states():
    """Column f * S + s of ``edge_attr`` is tap f at state s; missing taps and taps of constants are 0."""
    graph = convnet()
    states = [random_state(graph, seed) for seed in range(3)]
    values = to_pyg(graph, states, features=11).edge_attr.view(-1, 11, 3)
    for block, edges in edge_slices(graph).items():
        taps = block.shape[2]
        for s, state in enumerate(states):
            assert torch.equal(values[edges, :taps, s], block.view(state[block.parameter]).flatten(0, 1))
        assert (values[edges, taps:] == 0).all()
    assert (values[-graph.num_nodes :, 0] == SELF_LOOP_VALUE).all()
    assert (values[-graph.num_nodes :, 1:] == 0).all()


def test_edge_slices_tile_the_parameter_edges():
    """Each trainable block has its own run of edges, in order and without gaps."""
    graph = llama()
    slices = edge_slices(graph)
    assert list(slices) == list(graph.trainable_blocks)
    ends = [0, *(edges.stop for edges in slices.values())]
    assert [edges.start for edges in slices.values()] == ends[:-1]
    assert ends[-1] == graph.num_parameters
    for block, edges in slices.items():
        assert (to_pyg(graph, pos=0).edge_type[edges] == block.edge_type).all()


@pytest.mark.parametrize("name", GRAPHS)
def test_edge_values_go_back_into_the_parameters(name):
    """``from_pyg`` undoes ``edge_attr``, whatever the constant edges and padded taps hold."""
    graph = GRAPHS[name]()
    state = random_state(graph)
    values = to_pyg(graph, [state], features=graph.max_features + 2).edge_attr
    values[graph.num_parameters // graph.max_features + 1 :, -2:] = torch.nan
    values[-graph.num_nodes :] = torch.nan
    restored = from_pyg(graph, values)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)


def test_an_edge_permuted_is_a_node_permuted():
    """A state permuted by ``graph.permute`` is the same graph with its nodes renamed: the same set of edges."""
    graph = llama()
    state = random_state(graph)
    permutation = graph.permutation(torch.Generator().manual_seed(0))
    before = to_pyg(graph, [state], pos=0)
    after = to_pyg(graph, [graph.permute(state, permutation=permutation)], pos=0)

    def edges(data, rename):
        rows = zip(
            *rename[data.edge_index].tolist(), data.edge_type.tolist(), data.edge_attr[:, 0].tolist(), strict=True
        )
        return sorted(rows)

    same = torch.arange(graph.num_nodes)
    assert edges(before, permutation) == edges(after, same)
    assert edges(before, same) != edges(after, same)


def test_what_is_not_asked_for_is_absent():
    """Without states there is no ``edge_attr``, with ``pos=0`` no ``pos``; groups are always there."""
    graph = mlp()
    bare = to_pyg(graph, pos=0)
    assert bare.edge_attr is None
    assert bare.pos is None
    full = graph.to_pyg([random_state(graph)] * 5, pos=3)
    assert full.edge_attr.shape == (graph.num_edges, 5)
    assert full.pos.shape == (graph.num_nodes, 3)
    assert [graph.groups[g].name for g in full.group.unique_consecutive()] == [g.name for g in graph.groups]


def test_frozen_blocks_have_no_edges_and_constants_need_no_parameters():
    """A graph whose blocks are all frozen has only constant edges and self loops."""
    from dataclasses import replace

    full = gpt2()
    graph = replace(full, blocks=tuple(replace(block, trainable=False) for block in full.blocks))
    data = to_pyg(graph, [{}])
    assert set(data.edge_type.tolist()) == {EdgeType.RESIDUAL, EdgeType.HEAD, EdgeType.SELF_LOOP}
    assert from_pyg(graph, data.edge_attr) == {}


def test_bad_arguments_are_refused_by_name():
    """One clear error for each way to get the arguments wrong."""
    graph = convnet()
    state = random_state(graph)
    with pytest.raises(ValueError, match="`features` must be at least 9, the kernel taps of this graph, got 1"):
        to_pyg(graph, [state], features=1)
    with pytest.raises(ValueError, match="`states` must hold at least one state"):
        to_pyg(graph, [])
    with pytest.raises(ValueError, match=r"state 1 lacks '2\.bias'"):
        to_pyg(graph, [state, {name: state[name] for name in state if name != "2.bias"}])
    with pytest.raises(ValueError, match=r"'2.bias' has shape \(2, 3\) in state 0 instead of \(6,\)"):
        to_pyg(graph, [state | {"2.bias": torch.zeros(2, 3)}])
    with pytest.raises(ValueError, match=rf"`edge_values` must have shape \[E, F\] with E = {graph.num_edges}"):
        from_pyg(graph, torch.zeros(5, 9))
    with pytest.raises(ValueError, match="F at least 9"):
        from_pyg(graph, torch.zeros(graph.num_edges, 8))
