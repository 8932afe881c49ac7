"""load_nowcaster takes everything that can name a nowcaster."""

import pytest
import torch
from nowcaster_cases import SHARED, random_nowcaster

from hf_nino.nowcaster import LinearNowcaster, MomentumNowcaster, NiNoModel, hub, load_nowcaster


def test_an_object_passes_through():
    """The same object, and no arguments for it."""
    nowcaster = LinearNowcaster()
    assert load_nowcaster(nowcaster) is nowcaster
    with pytest.raises(TypeError, match="takes no arguments, got"):
        load_nowcaster(nowcaster, period=3)


@pytest.mark.parametrize(
    ("spec", "kwargs", "kind", "values"),
    [
        ("linear", {}, LinearNowcaster, {"period": 250, "max_intervals": 4}),
        ("linear", {"period": 100}, LinearNowcaster, {"period": 100}),
        ("linear:max_intervals=3,factor=0.5", {}, LinearNowcaster, {"max_intervals": 3, "factor": 0.5}),
        ("momentum", {}, MomentumNowcaster, {"momentum": 0.5, "nesterov": True, "period": 50}),
        (
            "momentum:momentum=0.8, nesterov=false",
            {"period": 20},
            MomentumNowcaster,
            {"nesterov": False, "period": 20},
        ),
        ({"name": "momentum", "momentum": 0.8}, {}, MomentumNowcaster, {"momentum": 0.8}),
    ],
)
def test_rules_by_name(spec, kwargs, kind, values):
    """Names with settings in the name, in a mapping, or as arguments."""
    nowcaster = load_nowcaster(spec, **kwargs)
    assert type(nowcaster) is kind
    assert {name: getattr(nowcaster, name) for name in values} == values


@pytest.mark.parametrize(
    ("spec", "kwargs", "error", "message"),
    [
        (
            "linaer",
            {},
            FileNotFoundError,
            r"'linaer': rules are \['linear', 'momentum', 'spectral'\], bundled nowcasters are \['nino-base', ",
        ),
        ("linear", {"speed": 2}, TypeError, "'linear' does not take these settings: .*speed"),
        ("linear:factor", {}, ValueError, "must look like"),
        ("linear:factor=fast", {}, ValueError, "must look like"),
        ("linear:factor=NaN", {}, ValueError, "`factor`"),
        ({"momentum": 0.8}, {}, ValueError, "must have a 'name'"),
        (5, {}, TypeError, "must be a name, a path, a mapping or a Nowcaster, got 5"),
        (None, {}, TypeError, "got None"),
        ("", {}, TypeError, "got ''"),
        ("absent.pt", {}, FileNotFoundError, r"absent\.pt"),
        ("./absent/folder", {}, FileNotFoundError, "no such directory"),
        (__file__, {}, FileNotFoundError, "it is a file"),
    ],
)
def test_what_names_no_nowcaster_is_refused(spec, kwargs, error, message):
    """One clear error, without asking the Hub."""
    with pytest.raises(error, match=message):
        load_nowcaster(spec, **kwargs)


def test_a_local_folder_wins_over_the_hub(tmp_path, monkeypatch):
    """An existing directory is loaded, also when it looks like a repository."""
    monkeypatch.chdir(tmp_path)
    random_nowcaster(hidden_size=8).save_pretrained(tmp_path / "org" / "name")
    monkeypatch.setattr(hub, "hf_hub_download", lambda **_: pytest.fail("the Hub was asked"))
    assert isinstance(load_nowcaster("org/name"), NiNoModel)
    assert load_nowcaster("org/name", map_location=torch.device("cpu")).edge_in.weight.device.type == "cpu"


def test_bundled_nowcasters_by_name(tmp_path, monkeypatch):
    """A name without a slash is a bundled nowcaster, for load_nowcaster and from_pretrained; the error lists them."""
    monkeypatch.setattr(hub, "BUNDLED", tmp_path)
    random_nowcaster(hidden_size=8).save_pretrained(tmp_path / "nino-test")
    assert isinstance(load_nowcaster("nino-test"), NiNoModel)
    assert isinstance(NiNoModel.from_pretrained("nino-test"), NiNoModel)
    with pytest.raises(FileNotFoundError, match=r"bundled nowcasters are \['nino-test'\]"):
        load_nowcaster("nino-tset")


def test_a_checkpoint_of_the_original_release():
    """A `.pt` path is converted on the fly."""
    path = SHARED / "nino_mlp_h32.pt"
    if not path.is_file():
        pytest.skip("needs nino_mlp_h32.pt in the shared folder beside the repository")
    assert load_nowcaster(path).config.nowcaster_type == "wnn"
    with pytest.raises(TypeError, match="takes no arguments"):
        load_nowcaster(path, period=5)
