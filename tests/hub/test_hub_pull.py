"""Nowcasters come from the Hub whole and from one commit, or not at all; the real client against a Hub of our own."""

import pytest
from fake_hub import READER, STRANGER, WRITER
from hub_nowcasters import files, same, wnn
from huggingface_hub import constants

from hf_nino import load_nowcaster
from hf_nino.nowcaster import WNNModel
from hf_nino.nowcaster.source import NowcasterSource

FIRST, SECOND = wnn(1), wnn(2)


@pytest.fixture
def published(hub):
    """``org/name`` with two commits: the first is tagged ``v1``, the second is main and the branch ``next``."""
    repository = hub.repository("org/name", files(FIRST))
    repository.first = repository.refs["v1"] = repository.refs["main"]
    repository.second = repository.refs["next"] = repository.commit(files(SECOND))
    return repository


def test_the_default_branch_a_branch_a_tag_and_a_commit(hub, published):
    """Each gives the weights of its commit, by argument and in the name; what was asked for and what it was are on the
    model, and name it again."""
    for revision, commit, model in [
        (None, published.second, SECOND),
        ("main", published.second, SECOND),
        ("next", published.second, SECOND),
        ("v1", published.first, FIRST),
        (published.first, published.first, FIRST),
    ]:
        by_argument = load_nowcaster("org/name", revision=revision)
        by_name = load_nowcaster("org/name" if revision is None else f"org/name@{revision}")
        assert same(by_argument, model) and same(by_name, model)
        assert by_argument.source == by_name.source == NowcasterSource("org/name", revision, commit)
        assert same(load_nowcaster(str(by_argument.source)), model)
    assert same(WNNModel.from_pretrained("org/name@v1"), FIRST)
    assert wnn().source is None


def test_a_pinned_nowcaster_stays_what_it_was(hub, published):
    """A second commit moves the branch; the pin does not move with it."""
    pin = str(load_nowcaster("org/name").source)
    published.commit(files(FIRST))
    assert same(load_nowcaster("org/name"), FIRST)
    assert same(load_nowcaster(pin), SECOND)


def test_configuration_and_weights_are_of_one_commit(hub, published, monkeypatch):
    """Also when the branch moves between the two downloads."""
    original = WNNModel.from_folder.__func__

    def moves_meanwhile(cls, folder, *rest):
        published.commit(files(FIRST))
        return original(cls, folder, *rest)

    monkeypatch.setattr(WNNModel, "from_folder", classmethod(moves_meanwhile))
    loaded = load_nowcaster("org/name")
    assert same(loaded, SECOND) and loaded.source.commit == published.second


def test_the_commit_is_told_for_what_is_not_pinned(hub, published, caplog):
    """One line of information, and no warning, with a branch; nothing for a commit."""
    caplog.set_level("INFO", "hf_nino")
    load_nowcaster("org/name@next")
    said = [record for record in caplog.records if record.name.startswith("hf_nino")]
    caplog.clear()
    load_nowcaster(f"org/name@{published.second}")
    assert [record.levelname for record in said] == ["INFO"]
    assert f"next is commit {published.second} now" in said[0].getMessage()
    assert not any(record.name.startswith("hf_nino") for record in caplog.records)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", "the Hub has no repository 'org/absent', or it is private and needs a `token`"),
        ("org/name@v2", "the Hub has no repository 'org/name' at revision 'v2': the revision does not exist"),
        ("org/name@" + "0" * 40, "revision '0000.*does not exist"),
        ("org/empty", r"repository 'org/empty' has no file config\.json; a nowcaster is config\.json and"),
        ("org/half", r"repository 'org/half' at revision '\w{40}' has no file model\.safetensors; a nowcaster is"),
    ],
)
def test_what_is_missing_is_one_clear_error(hub, published, name, message):
    """Repository, tag, commit, and either file."""
    hub.repository("org/empty")
    hub.repository("org/half", {"config.json": files(FIRST)["config.json"]})
    with pytest.raises(FileNotFoundError, match=message) as error:
        load_nowcaster(name)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


def test_a_broken_connection_leaves_nothing_broken_behind(hub, published):
    """Cut in the middle of the weights again and again: one clear error; the next call downloads what is missing, and
    only that; the cache holds nothing that is half."""
    hub.cut["model.safetensors"] = 0
    with pytest.raises(OSError, match=r"could not download model\.safetensors of repository 'org/name'.*try again"):
        load_nowcaster("org/name")
    hub.cut.clear()
    assert same(load_nowcaster("org/name"), SECOND)
    assert hub.downloads("config.json") == 1


def test_a_connection_that_breaks_off_is_taken_up_again(hub, published, monkeypatch):
    """Where each attempt gets some further, the client goes on from there, and the weights are right."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    hub.cut["model.safetensors"] = 1500
    assert same(load_nowcaster("org/name"), SECOND)
    assert hub.downloads("model.safetensors") > 1


def test_a_private_repository_needs_a_token(hub):
    """Without, with a wrong one, with one that may not: one error each that says what to do.  With one that may, as an
    argument or logged in: the nowcaster."""
    hub.repository("org/private", files(FIRST), private=True)
    with pytest.raises(FileNotFoundError, match="or it is private and needs a `token`: log in with `hf auth login`"):
        load_nowcaster("org/private")
    with pytest.raises(FileNotFoundError, match="or it is private"):
        load_nowcaster("org/private", token=STRANGER)
    with pytest.raises(PermissionError, match=r"it is not valid \(401\); log in with `hf auth login`, or give a `tok"):
        load_nowcaster("org/private", token="hf_wrong")
    assert same(load_nowcaster("org/private", token=READER), FIRST)
    with open(constants.HF_TOKEN_PATH, "w") as file:
        file.write(WRITER)
    assert same(load_nowcaster("org/private", force_download=True), FIRST)


def test_a_gated_repository_says_so(hub):
    """It exists, and access can be asked for."""
    hub.repository("org/gated", files(FIRST), gated=True)
    for token in (None, STRANGER):
        with pytest.raises(PermissionError, match="'org/gated' is gated: ask for access on its page"):
            load_nowcaster("org/gated", token=token)
    assert same(load_nowcaster("org/gated", token=READER), FIRST)


def test_offline_with_a_warm_cache(hub, published, monkeypatch):
    """Branch, tag and commit load without a request; so does everything with ``local_files_only``."""
    for revision in (None, "v1", published.first):
        load_nowcaster("org/name", revision=revision)
    hub.requests.clear()
    load_nowcaster("org/name", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision, model in ((None, SECOND), ("v1", FIRST), (published.first, FIRST), (published.second, SECOND)):
        loaded = load_nowcaster("org/name", revision=revision)
        assert same(loaded, model) and loaded.source.commit in (published.first, published.second)
    assert hub.requests == []


def test_a_pinned_nowcaster_in_the_cache_needs_no_request(hub, published):
    """The Hub is not asked about what cannot have changed."""
    load_nowcaster("org/name@v1")
    hub.requests.clear()
    load_nowcaster("org/name", revision=published.first)
    assert hub.requests == []


def test_offline_with_a_cold_cache(hub, published, monkeypatch):
    """One error that says which setting keeps it from the Hub."""
    with pytest.raises(OSError, match=r"is not in the local cache, and `local_files_only` is set"):
        load_nowcaster("org/name", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"config\.json of .* is not in the local cache, and HF_HUB_OFFLINE is set"):
        load_nowcaster("org/name")


def test_a_server_that_is_gone(hub, published):
    """What is in the cache loads; of what is not, one error says that the server cannot be reached."""
    load_nowcaster("org/name")
    hub.stop()
    assert same(load_nowcaster("org/name"), SECOND)
    with pytest.raises(OSError, match=rf"is not in the local cache, and {hub.url} cannot be reached"):
        load_nowcaster("org/name@v1")


def test_a_hub_that_is_out_of_order(hub, published):
    """A 503 is told as such, and is no reason not to use the cache."""
    load_nowcaster("org/name")
    hub.broken = 503
    assert same(load_nowcaster("org/name"), SECOND)
    with pytest.raises(OSError, match="is not in the local cache, and the Hub answered 503: try again later"):
        load_nowcaster("org/name@v1")
