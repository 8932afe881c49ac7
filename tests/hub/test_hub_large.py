"""Weights in the Hub's store for large files, on another host: up and down, and what goes wrong on the way."""

import hashlib

import pytest
from fake_hub import READER, WRITER
from hub_nowcasters import files, same, wnn
from huggingface_hub import constants

from hf_nino import load_nowcaster
from hf_nino.commands.push import push_nowcaster

# The client's own way to send a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def large(hub, monkeypatch):
    """A Hub that keeps weights there; by the protocol that can be spoken without the client's binary of Xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.large = (".safetensors",)
    return hub


@pytest.fixture
def folder(tmp_path):
    wnn(1).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def uploads(hub):
    return sum(method == "PUT" for method, _ in hub.requests)


def test_weights_go_to_the_store_and_come_back(large, folder, tmp_path):
    """Under the hash of their content, and nothing else goes there; they are not sent twice; the store is told no
    token, in either direction."""
    weights = (folder / "model.safetensors").read_bytes()
    pushed = push_nowcaster(str(folder), "org/name", token=WRITER, private=True)
    assert large.store == {hashlib.sha256(weights).hexdigest(): weights} and uploads(large) == 1
    found = load_nowcaster(f"org/name@{pushed.commit}", token=READER)
    assert same(found, load_nowcaster(folder)) and found.source.commit == pushed.commit
    push_nowcaster(str(folder), "org/copy", token=WRITER)
    assert uploads(large) == 1
    wnn(2).save_pretrained(tmp_path / "other")
    push_nowcaster(str(tmp_path / "other"), "org/copy", token=WRITER)
    assert uploads(large) == 2 and len(large.store) == 2
    assert large.store_tokens == {""}
    assert same(load_nowcaster("org/copy"), wnn(2)) and not same(load_nowcaster("org/copy"), found)


def test_a_store_that_refuses_leaves_the_repository_as_it_was(large, folder):
    """One clear error, and no commit without its weights; the same again goes through once there is room."""
    first = push_nowcaster(str(folder), "org/name", token=WRITER)
    large.store.clear()
    large.full = True
    with pytest.raises(OSError, match=r"could not push .* 'org/other'.*'model.safetensors'.*the Hub answered 507"):
        push_nowcaster(str(folder), "org/other", token=WRITER)
    assert (
        "model.safetensors"
        not in large.repositories["org/other"].commits[large.repositories["org/other"].refs["main"]]
    )
    large.full = False
    assert same(load_nowcaster("org/name"), load_nowcaster(folder)) and first.commit
    push_nowcaster(str(folder), "org/other", token=WRITER)
    assert same(load_nowcaster("org/other"), load_nowcaster(folder))


def test_a_download_from_the_store_that_breaks_off(large, monkeypatch):
    """Cut off at once, it is one clear error that leaves nothing half behind; cut off further on, it is taken up
    where it was."""
    large.repository("org/name", files(wnn(3)))
    large.cut["model.safetensors"] = 0
    with pytest.raises(OSError, match=r"could not download model\.safetensors of repository 'org/name'"):
        load_nowcaster("org/name")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    large.cut["model.safetensors"] = 1500
    assert same(load_nowcaster("org/name"), wnn(3))


def test_weights_that_are_too_large_are_not_fetched(large):
    """The Hub says how large they are before the store is asked."""
    large.repository("org/name", {**files(wnn(3)), "model.safetensors": bytes(2**22)})
    with pytest.raises(ValueError, match=r"model\.safetensors .* must have at most .*; it is not read"):
        load_nowcaster("org/name")
    assert not any(path.startswith("/store") for _, path in large.requests)
