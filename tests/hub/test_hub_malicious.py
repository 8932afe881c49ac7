"""What a repository holds can at worst give bad numbers: no code runs, no memory is taken, no path is left."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hub_nowcasters import files, wnn
from safetensors.torch import load, save

from hf_nino import load_nowcaster
from hf_nino.nowcaster import NiNoModel, NowcasterConfig, WNNModel
from hf_nino.nowcaster import hub as nowcaster_hub

GOOD = files(wnn())


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def with_header(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edited(edit) -> bytes:
    tensors = load(GOOD["model.safetensors"])
    edit(tensors)
    return save(tensors)


def refused(hub, content, message, error=ValueError):
    """The repository with this content gives one clear error."""
    hub.repository("org/evil", content)
    with pytest.raises(error, match=message) as caught:
        load_nowcaster("org/evil")
    assert len(str(caught.value)) < 600


def test_the_good_one_loads(hub):
    """What the others are changed from."""
    hub.repository("org/good", GOOD)
    assert isinstance(load_nowcaster("org/good"), WNNModel)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt", "config.json"])
def test_no_pickle_is_ever_read(hub, tmp_path, name):
    """A bomb by any name does not go off; under the names of pickles it is not even downloaded.  The same bytes do go
    off where they are unpickled."""
    trace = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(trace))
    content = {**GOOD, name: bomb}
    if name.endswith((".bin", ".pt")):
        del content["model.safetensors"]
        refused(hub, content, "pickle files are never read", FileNotFoundError)
        assert hub.downloads(name) == 0
    else:
        refused(hub, content, "not a valid safetensors file|is not valid JSON")
    assert not trace.exists()
    pickle.loads(bomb)
    assert trace.exists()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"hidden_size": 10**6}, "`hidden_size` of a nowcaster must be a whole number from 1 to 4096, got 1000000"),
        ({"hidden_size": 4096, "max_horizon": 10**12}, "`max_horizon` of a nowcaster must be"),
        (
            {"nowcaster_type": "nino", "hidden_size": 4096, "max_horizon": 1000, "max_features": 1024},
            r"the tensors that the configuration asks for have 4,[0-9,]{11} elements, more than the 268,435,456",
        ),
    ],
)
def test_a_configuration_that_asks_for_too_much_is_refused(hub, monkeypatch, size, message):
    """Before any weights are downloaded or memory is taken for them."""
    content = {**GOOD, "config.json": json.dumps({**json.loads(GOOD["config.json"]), **size}).encode()}
    refused(hub, content, message)
    assert hub.downloads("model.safetensors") == 0


def test_a_large_nowcaster_is_not_too_large():
    """The limit on weights leaves room: ten times the width of the original release is within it."""
    with torch.device("meta"):
        model = NiNoModel(NowcasterConfig(hidden_size=1280, token_position_vocabulary=100_000))
    assert sum(p.numel() for p in model.parameters()) < nowcaster_hub.MAX_WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_too_large_is_not_downloaded(hub, name):
    """The Hub says that it has a terabyte: refused before the first byte."""
    hub.sizes[name] = 10**12
    refused(hub, GOOD, rf"{name} of nowcaster 'org/evil' must have at most [\d,]+ bytes .*, it has 1,000,000,000,000")
    assert hub.downloads(name) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_too_large_is_not_read(tmp_path, name):
    """A local folder goes through the same check: a megabyte of padding more than the configuration explains."""
    for file, content in GOOD.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / name).write_bytes(GOOD[name] + b" " * (2**20 + 10**5))
    with pytest.raises(ValueError, match=f"{name} of nowcaster .* must have at most"):
        load_nowcaster(tmp_path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            with_header({"edge_in.bias": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
            "not a val",
        ),
        (with_header({"edge_in.bias": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}), "not a valid"),
        (
            with_header({"edge_in.bias": {"dtype": "F32", "shape": [8], "data_offsets": [0, 16]}}, b"\0" * 16),
            "not a val",
        ),
        (
            with_header({"edge_in.bias": {"dtype": "F32", "shape": [-8], "data_offsets": [0, 32]}}, b"\0" * 32),
            "not a va",
        ),
        (struct.pack("<Q", 2**60) + b"{}", "not a valid safetensors file"),
        (b"", "not a valid safetensors file"),
        (edited(lambda t: t.update({"../../../etc/passwd": torch.zeros(1)})), r"unknown \['../../../etc/passwd'\]"),
        (edited(lambda t: t.update({"edge_in.bias": torch.zeros(9)})), r"'edge_in.bias' of shape \(8,\), got \(9,\)"),
        (edited(lambda t: t.update({"edge_in.bias": torch.zeros(8, dtype=torch.int64)})), "floating point tensors"),
        (edited(lambda t: t["edge_in.bias"].fill_(torch.nan)), "'edge_in.bias' has values that are not finite"),
        (
            edited(lambda t: t.update({"edge_in.bias": torch.full((8,), 1e300, dtype=torch.float64)})),
            "'edge_in.bias' has values that are not finite",
        ),
    ],
)
def test_weights_that_lie_are_refused(hub, monkeypatch, weights, message):
    """Headers that claim what is not there, that overflow, that contradict themselves; unknown names, wrong shapes
    and kinds; values that are not finite, or not in float32."""
    refused(hub, {**GOOD, "model.safetensors": weights}, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"[" * 100_000, "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b'{"format_version": 1, "nowcaster_type": "wnn", "context": 1e999}', "`context`"),
        (
            files(wnn(), format_version=2)["config.json"],
            "`format_version` of a nowcaster must be 1, got 2; try a newer",
        ),
        (files(wnn(), format_version=True)["config.json"], "`format_version` of a nowcaster must be 1, got True"),
        (files(wnn(), auto_map="evil.py")["config.json"], r"unknown keys \['auto_map'\]"),
        (files(wnn(), nowcaster_type="../x")["config.json"], "`nowcaster_type` of a nowcaster must be one of"),
        (files(wnn(), activation="__import__")["config.json"], "`activation` of a nowcaster must be one of"),
    ],
)
def test_configurations_that_are_not_ours_are_refused(hub, config, message):
    """No JSON, or JSON without end; unknown format versions, keys, types and functions."""
    refused(hub, {**GOOD, "config.json": config}, message)


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("../../absent", None),
        ("org/..", None),
        ("../name", None),
        ("org/name/../../x", None),
        ("/org/name", None),
        ("org\\name", None),
        ("org/na me", None),
        ("org/name", "../../../etc/passwd"),
        ("org/name", "/etc/passwd"),
        ("org/name", "a/../../b"),
        ("org/name", "a..b"),
        ("org/name", ""),
        ("org/name", "v1\n"),
        ("org/name@", None),
        ("org/name@..", None),
        ("org/name@-rf", None),
    ],
)
def test_names_that_lead_elsewhere_are_refused(hub, name, revision):
    """Repositories and revisions with parts that climb out of the cache: refused without a request."""
    with pytest.raises((FileNotFoundError, ValueError), match=r"no nowcaster|`revision` must be a branch"):
        load_nowcaster(name, revision=revision)
    assert hub.requests == []


def test_a_revision_is_given_once(hub):
    """Two different ones contradict each other; the same one twice does not."""
    with pytest.raises(ValueError, match="`revision` must be given once, got 'v1' in the name and 'v2'"):
        load_nowcaster("org/name@v1", revision="v2")
    hub.repository("org/name", GOOD)
    assert load_nowcaster("org/name@main", revision="main").source.revision == "main"
