"""The network agrees with the original release's code, on its own graphs and with its own checkpoints."""

import json

import pytest
import torch
from nowcaster_cases import SHARED, original_nowcaster
from safetensors.torch import load_file
from torch_geometric.data import Data

from hf_nino.nowcaster.scaling import measure_scale

HORIZONS = (1, 7, 40)
TOLERANCE = 1e-5


class Golden:
    """One golden file: states, the explicit graph of the release, and the predictions of its code."""

    def __init__(self, name):
        if not (SHARED / f"{name}.json").is_file():
            pytest.skip(f"needs {name}.json and {name}.safetensors in the shared folder beside the repository")
        self.shapes = {
            key: tuple(shape) for key, shape in json.loads((SHARED / f"{name}.json").read_text())["parameters"]
        }
        self.tensors = load_file(SHARED / f"{name}.safetensors")
        self.states = [self.split(column) for column in self.tensors["states"].T]
        self.scales = {key: measure_scale([state[key] for state in self.states]) for key in self.shapes}

    def split(self, flat):
        sizes = [int(torch.Size(shape).numel()) for shape in self.shapes.values()]
        return {key: part.view(self.shapes[key]) for key, part in zip(self.shapes, flat.split(sizes), strict=True)}

    def scaled(self):
        columns = [
            torch.cat([scale.apply(state[key]).flatten() for key, scale in self.scales.items()])
            for state in self.states
        ]
        return torch.stack(columns, dim=1)

    def data(self):
        owner, constant = self.tensors["edge_parameter"].long(), self.tensors["edge_constant"]
        attr = self.scaled()[owner.clamp(min=0)] * (owner >= 0)[..., None]
        attr[:, 0] += constant[:, None]
        return Data(
            edge_index=self.tensors["edge_index"].long(),
            edge_type=self.tensors["edge_type"].long(),
            edge_attr=attr.flatten(1),
            pos=self.tensors["laplacian_pe"],
            num_nodes=len(self.tensors["laplacian_pe"]),
        )

    def apply_deltas(self, deltas):
        """Scaled deltas on edges -> predicted parameters."""
        owner = self.tensors["edge_parameter"].long()
        flat = self.scaled()[:, -1].clone()
        flat[owner[owner >= 0]] += deltas[owner >= 0]
        return {key: self.scales[key].undo(part) for key, part in self.split(flat).items()}

    def worst(self, predicted, checkpoint, horizon):
        """Largest difference from the release's prediction, relative to each parameter's spread."""
        golden = self.split(self.tensors[f"{checkpoint}.k{horizon}"])
        return max(float((predicted[key] - golden[key]).abs().max()) / self.scales[key].std for key in golden)


@pytest.fixture(scope="module", params=["gpt2_tiny", "conv_tiny"])
def golden(request):
    return Golden(request.param)


@pytest.mark.parametrize("checkpoint", ["nino_no_posw", "nino_mlp", "nino_mlp_h32"])
def test_forward_equals_the_original_code(golden, checkpoint):
    """On the release's explicit graphs, predictions agree with its code to 1e-5 of each parameter's spread."""
    model, data = original_nowcaster(checkpoint), golden.data()
    with torch.no_grad():
        for horizon in HORIZONS:
            assert golden.worst(golden.apply_deltas(model(data, horizon)), checkpoint, horizon) < TOLERANCE
        # Negative control: the next horizon over is not within tolerance.
        assert golden.worst(golden.apply_deltas(model(data, 8)), checkpoint, 7) > 10 * TOLERANCE


@pytest.mark.parametrize("checkpoint", ["nino_mlp", "nino_mlp_h32"])
def test_wnn_without_a_graph_equals_the_original_code(golden, checkpoint):
    """WNNModel.nowcast derives the release's edge types from names and shapes, fused query, key and value included."""
    model = original_nowcaster(checkpoint)
    for horizon in HORIZONS:
        assert golden.worst(model.nowcast(None, golden.states, horizon), checkpoint, horizon) < TOLERANCE


def test_the_graph_matters(golden):
    """Negative control: with the ends of its edges shuffled the network no longer predicts what the release does."""
    model, data = original_nowcaster(), golden.data()
    data.edge_index = data.edge_index[:, torch.randperm(data.num_edges, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        assert golden.worst(golden.apply_deltas(model(data, 40)), "nino_no_posw", 40) > 100 * TOLERANCE
