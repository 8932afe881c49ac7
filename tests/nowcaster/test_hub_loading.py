"""Folders of config.json and model.safetensors load completely, or not at all."""

import json
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from nowcaster_cases import mlp_graph, positions, random_nowcaster, trajectory
from safetensors.torch import load_file, save_file

from hf_nino.nowcaster import NiNoModel, NowcasterConfig, WNNModel, hub, load_nowcaster


@pytest.fixture
def folder(tmp_path):
    """A saved NiNoModel."""
    random_nowcaster(hidden_size=8).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_round_trip_is_bit_equal(tmp_path, capsys):
    """Weights, configuration and predictions survive exactly; nothing is printed; the random number generator is left
    alone; the model comes back in evaluation mode."""
    model, graph = random_nowcaster(hidden_size=8, period=123, meta_trained_on="ten runs"), mlp_graph()
    model.train().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = NiNoModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().out == ""
    assert loaded.config == model.config and loaded.period == 123 and not loaded.training
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    states, pos = trajectory(graph), positions(graph)
    ours, theirs = (m.nowcast(graph, states, 3, pos=pos) for m in (loaded, model))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_low_precision_weights_are_used_in_float32(folder):
    """A file of bfloat16 weights gives a float32 model with these values."""
    edit_weights(folder, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    model, tensors = NiNoModel.from_pretrained(folder), load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[name].float())


def test_the_model_card_has_its_metadata(folder):
    """Library, licence, tags and paper, so that the Hub lists it rightly."""
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "hf_nino" and card.data.license == "mit"
    assert {"nino", "nowcasting", "learned-optimizer", "arxiv:2409.04434"} <= set(card.data.tags)
    assert "https://arxiv.org/abs/2409.04434" in card.content


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("edge_hidden.bias"), r"missing \['edge_hidden.bias'\]"),
        (lambda t: t.update(extra=torch.zeros(2)), r"unknown \['extra'\]"),
        (lambda t: t.update({"edge_hidden.bias": torch.zeros(9)}), r"'edge_hidden.bias' of shape \(8,\), got \(9,\)"),
        (
            lambda t: t.update({"edge_hidden.bias": torch.zeros(8, dtype=torch.int32)}),
            r"floating point tensors, got \['I32'\]",
        ),
        (lambda t: t["edge_hidden.bias"].fill_(torch.inf), "'edge_hidden.bias' has values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, damage, message):
    """A missing, an unknown, a misshapen, an integer and an infinite tensor: one ValueError that names it."""
    edit_weights(folder, damage)
    with pytest.raises(ValueError, match=message):
        NiNoModel.from_pretrained(folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b[:20], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_damaged_weights_are_refused(folder, damage):
    """Truncated, cut within the header, empty and overwritten files: one ValueError."""
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        NiNoModel.from_pretrained(folder)


def test_shapes_are_checked_before_memory_is_taken(folder, monkeypatch):
    """A configuration that asks for much more than the file has is refused without allocating it."""
    edit_config(folder, hidden_size=4096, num_layers=16, max_features=1024, max_horizon=1000)
    monkeypatch.setattr(hub, "load_file", lambda *_, **__: pytest.fail("weights were read before the check"))
    with pytest.raises(ValueError, match="the tensors that the configuration asks for"):
        NiNoModel.from_pretrained(folder)


def test_missing_config_is_an_error(folder):
    """The mixin alone would go on with default settings."""
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must have a file config\.json, found README.md, model\.safetensors"):
        NiNoModel.from_pretrained(folder)


def test_pickles_are_never_read(folder):
    """A folder with only pytorch_model.bin is refused."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must have a file model\.safetensors.*pickle files are never read"):
        NiNoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "`format_version`"),
        ({"hidden_size": -1}, "`hidden_size`"),
        ({"dropout": 0.1}, r"unknown keys \['dropout'\]"),
        ({"nowcaster_type": "wnn"}, "is of type 'wnn', NiNoModel needs 'nino'; `hf_nino.load_nowcaster`"),
    ],
)
def test_malformed_config_is_refused(folder, changes, message):
    """Unknown versions, values and keys, and the configuration of another class."""
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        NiNoModel.from_pretrained(folder)
    assert "saved" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_config_that_is_no_json_object_is_refused(folder, text):
    """One ValueError that names the file."""
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json of nowcaster .*saved"):
        NiNoModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["absent", "./absent", "a/b/c", "../x", ""])
def test_what_is_neither_folder_nor_repository(name):
    """FileNotFoundError that says what the possibilities are, without asking the Hub."""
    with pytest.raises(FileNotFoundError, match="bundled nowcasters are"):
        NiNoModel.from_pretrained(name)


def fake_hub(monkeypatch, folder, commit="0123456789abcdef0123456789abcdef01234567", error=None):
    """hf_hub_download from a folder instead of the Hub, as a cache lays it out; returns the calls."""
    calls = []

    def download(repo_id, filename, revision, **kwargs):
        calls.append((repo_id, filename, revision))
        if error is not None:
            raise error
        if not (folder / filename).exists():
            raise EntryNotFoundError(f"404: {filename}")
        snapshot = folder.parent / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / filename).write_bytes((folder / filename).read_bytes())
        return str(snapshot / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    return calls


def test_all_files_come_from_one_commit(monkeypatch, folder):
    """The weights are asked for at the commit that the configuration came from, even if the branch has moved."""
    calls = fake_hub(monkeypatch, folder)
    model = NiNoModel.from_pretrained("org/name", revision="main")
    assert isinstance(model, NiNoModel)
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert calls == [("org/name", "config.json", "main"), ("org/name", "model.safetensors", commit)]


def test_a_repository_with_only_pickle_is_refused(monkeypatch, folder):
    """pytorch_model.bin is not even asked for."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    calls = fake_hub(monkeypatch, folder)
    with pytest.raises(FileNotFoundError, match=r"has no file model\.safetensors.*pickle files are never read"):
        NiNoModel.from_pretrained("org/name")
    assert [filename for _, filename, _ in calls] == ["config.json", "model.safetensors"]


def test_an_unreachable_hub_is_one_clear_error(monkeypatch, folder):
    """Offline and not cached, or no connection: OSError that names repository, revision and file."""
    for error in (LocalEntryNotFoundError("offline"), ConnectionError("no route")):
        fake_hub(monkeypatch, folder, error=error)
        with pytest.raises(OSError, match=r"config\.json of repository 'org/name' at revision 'v1'"):
            NiNoModel.from_pretrained("org/name", revision="v1")


def test_the_real_client_offline(tmp_path):
    """With HF_HUB_OFFLINE the real client is asked, and its refusal becomes one clear error."""
    with pytest.raises(OSError, match=r"config\.json of repository 'hf-nino-tests/absent' is not in the local cache"):
        load_nowcaster("hf-nino-tests/absent", cache_dir=tmp_path)


def test_push_to_hub_uploads_what_from_pretrained_reads(monkeypatch, tmp_path):
    """The uploaded folder holds exactly configuration, weights and card, and loads."""
    model, seen = random_nowcaster(hidden_size=8), {}

    def upload_folder(self, *, folder_path, **kwargs):
        seen["files"] = sorted(path.name for path in folder_path.iterdir())
        seen["model"] = NiNoModel.from_pretrained(folder_path)
        return "https://commit"

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    assert model.push_to_hub("org/name") == "https://commit"
    assert seen["files"] == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(seen["model"].edge_out.weight, model.edge_out.weight)


def test_wnn_round_trip(tmp_path):
    """WNNModel saves and loads the same way, and load_nowcaster picks its class."""
    model = WNNModel(NowcasterConfig(nowcaster_type="wnn", hidden_size=8))
    model.save_pretrained(tmp_path)
    loaded = load_nowcaster(tmp_path)
    assert isinstance(loaded, WNNModel) and torch.equal(loaded.edge_out.weight, model.edge_out.weight)
    with pytest.raises(ValueError, match="is of type 'wnn', NiNoModel needs 'nino'"):
        NiNoModel.from_pretrained(tmp_path)
