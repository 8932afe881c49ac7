"""Checkpoints of the original release are read strictly and without running code."""

import pickle

import pytest
import torch
from nowcaster_cases import SHARED, attention_graph, positions, trajectory

from hf_nino.nowcaster import NiNoModel, WNNModel, convert_original
from hf_nino.nowcaster.original import _nino_names


def original_file(tmp_path, *, vocabulary=None, hidden=8, layers=3, edit=None, **arguments):
    """A file in the original's format with random weights."""
    h, generator = hidden, torch.Generator().manual_seed(0)
    shapes = {"layer_embed.weight": (15, h)}

    def linear(name, out, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, width), (out,)

    linear("node_proj.fc.0", h, 8)
    linear("edge_proj.fc.0", h, 45)
    linear("edge_out.fc.0", h, h)
    linear("edge_out.fc.2", 360, h)
    for i in range(layers):
        for name, out, width in (("edge_encoder", 2 * h, h), ("pre_nns.0.0", h, 2 * h), ("post_nns.0.0", h, 2 * h)):
            linear(f"gnn.convs.{i}.{name}", out, width)
        linear(f"gnn.convs.{i}.lin", h, h)
    for i in range(layers - 1):
        for name in ("lin_e", "lin_s", "lin_t", "lin1"):
            linear(f"gnn.edge_update.{i}.{name}", h, h)
    if vocabulary is not None:
        shapes["wte_pos_enc_layer.weight"] = (vocabulary + 1, h)
        arguments["vocab_size"] = vocabulary
    else:
        arguments.setdefault("wte_pos_enc", False)
    state_dict = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    content = {"state_dict": state_dict, "model_args": {"hid": hidden, "layers": layers, **arguments}}
    if edit is not None:
        content = edit(content) or content
    path = tmp_path / "original.pt"
    torch.save(content, path)
    return path, content


def test_weights_keep_their_values_under_their_new_names(tmp_path):
    """Every tensor but those of the last message-passing layer is there; nothing is transposed or left random."""
    path, content = original_file(tmp_path)
    model = convert_original(path)
    assert isinstance(model, NiNoModel) and not model.training
    weights, names = model.state_dict(), _nino_names(model.config)
    for name, tensor in content["state_dict"].items():
        if not name.startswith("gnn.convs.2."):
            assert torch.equal(weights.pop(names[name]), tensor)
    assert not weights


@pytest.mark.parametrize(
    ("name", "kind"), [("nino_no_posw", NiNoModel), ("nino_mlp", WNNModel), ("nino_mlp_h32", WNNModel)]
)
def test_published_checkpoints(name, kind):
    """The published files give models of the right kind, without touching the random number generator."""
    path = SHARED / f"{name}.pt"
    if not path.is_file():
        pytest.skip(f"needs the original release's checkpoint {name}.pt in the shared folder beside the repository")
    state = torch.get_rng_state()
    model = convert_original(path)
    assert isinstance(model, kind) and model.config.hidden_size == (32 if name.endswith("h32") else 128)
    assert torch.equal(torch.get_rng_state(), state)


def test_token_position_table_is_used_for_tokens(tmp_path):
    """A checkpoint with a table gives each token of the graph its row; a table too small is refused at nowcast."""
    graph = attention_graph(tokens=9)
    states, pos = trajectory(graph), positions(graph)
    path, _ = original_file(tmp_path, vocabulary=20)
    model = convert_original(path)
    assert model.config.token_position_vocabulary == 20
    nowcast = model.nowcast(graph, states, 5, pos=pos)
    table = model.token_position.weight.detach()
    table[3].add_(1.0)
    moved = model.nowcast(graph, states, 5, pos=pos)
    change = (moved["wte.weight"] - nowcast["wte.weight"]).abs().amax(1)
    assert change.argmax() == 2  # token 2 has row 3
    before = moved["wte.weight"].clone()
    table[12].add_(1.0)  # no token of this graph
    assert torch.equal(model.nowcast(graph, states, 5, pos=pos)["wte.weight"], before)
    with pytest.raises(ValueError, match="'tokens' has 25 tokens"):
        big = attention_graph(tokens=25)
        model.nowcast(big, trajectory(big), 5, pos=positions(big))


def drop(name):
    return lambda content: {**content, "state_dict": {k: t for k, t in content["state_dict"].items() if k != name}}


def put(**values):
    return lambda content: content["state_dict"].update({k.replace("__", "."): v for k, v in values.items()})


@pytest.mark.parametrize(
    ("edit", "arguments", "message"),
    [
        (drop("layer_embed.weight"), {}, r"missing \['edge_type.weight'\]"),
        (drop("gnn.convs.1.lin.bias"), {}, r"missing \['convolutions.1.output.bias'\]"),
        (put(extra=torch.zeros(1)), {}, r"do not ask for: \['extra'\]"),
        (put(gnn__convs__0__pre_nns__1__0__weight=torch.zeros(1)), {}, "several towers"),
        (None, {"towers": 4}, "only towers=1 is supported, got 4"),
        (put(layer_embed__weight=torch.zeros(8, 15)), {}, r"of shape \(15, 8\), got \(8, 15\)"),
        (put(layer_embed__weight=torch.zeros(15, 8, dtype=torch.int64)), {}, "floating point tensors"),
        (put(layer_embed__weight=[1.0]), {}, "floating point tensors"),
        (put(layer_embed__weight=torch.full((15, 8), torch.nan)), {}, "not finite"),
        (None, {"gating": True}, r"unknown arguments \['gating'\]"),
        (None, {"scale_method": "min-max"}, "only scale_method='std' is supported, got 'min-max'"),
        (None, {"residual": False}, "only residual=True"),
        (None, {"hid": 10**7}, "`hidden_size`"),
        (None, {"hid": 16}, "of shape"),
        (None, {"act_name": "mish"}, "`activation`"),
        (None, {"wte_pos_enc": True}, r"missing \['token_position.weight'\]"),
        (lambda content: {"weights": content["state_dict"]}, {}, r"'state_dict' and 'model_args', got one with"),
        (lambda content: [1, 2], {}, "got list"),
        (lambda content: {**content, "model_args": 5}, {}, "'model_args' must be a mapping, got int"),
    ],
)
def test_malformed_checkpoints_are_refused(tmp_path, edit, arguments, message):
    """One ValueError that names the file and what is wrong with it."""
    path, _ = original_file(tmp_path, edit=edit, **arguments)
    with pytest.raises(ValueError, match=message) as error:
        convert_original(path)
    assert "'original.pt'" in str(error.value)


class Trap:
    """A pickle that would leave a file behind if it were run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_dangerous_pickles_are_refused(tmp_path, kind):
    """A file that holds code is refused before the code runs."""
    path, sprung = tmp_path / "trap.pt", tmp_path / "sprung"
    content = {"state_dict": {"layer_embed.weight": Trap(str(sprung))}, "model_args": {}}
    if kind == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="it holds code and is refused"):
        convert_original(path)
    assert not sprung.exists()
    # Negative control: the trap works where pickles are trusted.
    pickle.loads(pickle.dumps(Trap(str(sprung)))).close()
    assert sprung.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken zip", b"\x80\x04\x95"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content):
    """Empty, text, a broken archive and a broken pickle: one ValueError."""
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint 'broken\.pt' is not a"):
        convert_original(path)


def test_truncated_checkpoint_is_refused(tmp_path):
    """A download that broke off."""
    path, _ = original_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="is not a"):
        convert_original(path)


def test_missing_checkpoint(tmp_path):
    """FileNotFoundError with the path."""
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        convert_original(tmp_path / "absent.pt")
