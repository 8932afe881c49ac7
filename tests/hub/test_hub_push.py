"""Nowcasters go to the Hub whole, with a card, and come back the same; the real client against a Hub of our own."""

import json
import sys

import pytest
from fake_hub import READER, WRITER
from hub_nowcasters import files, same, wnn
from huggingface_hub import HfApi, ModelCard, constants
from typer.testing import CliRunner

from hf_nino import cli, load_nowcaster
from hf_nino.commands.push import push_nowcaster


@pytest.fixture
def login(hub):
    """The token of ``hf auth login``."""
    with open(constants.HF_TOKEN_PATH, "w") as file:
        file.write(WRITER)


@pytest.fixture
def folder(tmp_path):
    """A nowcaster's folder without a card, and with something that is not for others."""
    wnn(1, period=77).save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "README.md").unlink()
    (tmp_path / "mine" / "notes.txt").write_text("private")
    return tmp_path / "mine"


def on_hub(hub, repo_id, revision="main"):
    repository = hub.repositories[repo_id]
    return repository.commits[repository.resolve(revision)]


def test_what_is_pushed_comes_back(hub, login, folder):
    """By the model and by the command's function: the same weights, a commit that names them for good, and nothing
    else from the folder."""
    model = load_nowcaster(folder)
    assert model.push_to_hub("org/by-model").startswith(f"{hub.url}/org/by-model/commit/")
    pushed = push_nowcaster(str(folder), "org/by-command")
    assert pushed.url == f"{hub.url}/org/by-command/commit/{pushed.commit}"
    for name in ("org/by-model", "org/by-command", f"org/by-command@{pushed.commit}"):
        assert same(load_nowcaster(name), model)
    for name in ("org/by-model", "org/by-command"):
        assert sorted(on_hub(hub, name).keys() - {".gitattributes"}) == [
            "README.md",
            "config.json",
            "model.safetensors",
        ]
    assert on_hub(hub, "org/by-command")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_the_card_says_what_it_is_and_how_to_use_it(hub, login, folder):
    """Metadata for the Hub, an example with the repository's own name, the paper; a licence of one's own."""
    push_nowcaster(str(folder), "org/name")
    load_nowcaster(folder).push_to_hub("org/same")
    push_nowcaster(str(folder), "org/other", license="apache-2.0")
    for name, license in (("org/name", "mit"), ("org/same", "mit"), ("org/other", "apache-2.0")):
        card = ModelCard(on_hub(hub, name)["README.md"].decode())
        assert (card.data.library_name, card.data.license) == ("hf_nino", license)
        assert {"nino", "nowcasting", "learned-optimizer", "arxiv:2409.04434"} <= set(card.data.tags)
        assert f'nowcaster="{name}"' in card.text and "every | 77 optimizer steps" in card.text
        assert "@inproceedings{knyazev2025accelerating" in card.text


def test_the_same_again_is_no_new_commit(hub, login, folder):
    """Pushed twice, it has the commit of the first time."""
    assert push_nowcaster(str(folder), "org/name").commit == push_nowcaster(str(folder), "org/name").commit


def test_cards_by_hand_are_kept(hub, login, folder):
    """That of the folder is pushed as it is; where the folder has none, that of the repository stays."""
    (folder / "README.md").write_text("---\nlicense: mit\n---\nBy hand.\n")
    push_nowcaster(str(folder), "org/name")
    (folder / "README.md").unlink()
    wnn(2).save_pretrained(folder)
    (folder / "README.md").unlink()
    pushed = push_nowcaster(str(folder), "org/name")
    assert pushed.files == ["config.json", "model.safetensors"]
    assert b"By hand." in on_hub(hub, "org/name")["README.md"]
    assert same(load_nowcaster("org/name"), wnn(2))


def test_a_branch_is_made_and_a_tag_can_be_put_on_the_commit(hub, login, folder):
    """The default branch stays as it was; a tag on the commit is a name for it."""
    first = push_nowcaster(str(folder), "org/name")
    wnn(2).save_pretrained(folder)
    pushed = push_nowcaster(str(folder), "org/name", revision="next", message="Better")
    HfApi(token=WRITER).create_tag("org/name", tag="v2", revision=pushed.commit)
    assert same(load_nowcaster("org/name"), wnn(1)) and load_nowcaster("org/name").source.commit == first.commit
    for name in ("org/name@next", "org/name@v2"):
        assert same(load_nowcaster(name), wnn(2)) and load_nowcaster(name).source.commit == pushed.commit


def test_private_is_private(hub, login, folder):
    """A new repository is; one that is public already is refused before anything is pushed to it."""
    push_nowcaster(str(folder), "org/mine", private=True)
    assert hub.repositories["org/mine"].private
    push_nowcaster(str(folder), "org/mine", private=True)
    hub.repository("org/public")
    with pytest.raises(ValueError, match="`private` cannot be had: repository 'org/public' exists and is public"):
        push_nowcaster(str(folder), "org/public", private=True)
    assert sorted(on_hub(hub, "org/public")) == [".gitattributes"]


def test_what_does_not_load_is_not_pushed(hub, login, folder):
    """Damaged weights, a rule, a name that is none, impossible targets: refused without a request."""
    with pytest.raises(ValueError, match="there is nothing to push: 'linear' is a rule without weights"):
        push_nowcaster("linear", "org/name")
    with pytest.raises(FileNotFoundError, match="no nowcaster 'absent'"):
        push_nowcaster("absent", "org/name")
    for repo_id in ("a/b/c", "org/na me", "../name"):
        with pytest.raises(ValueError, match="the repository must be of the form 'org/name', got"):
            push_nowcaster(str(folder), repo_id)
    with pytest.raises(ValueError, match="`revision` must be a branch"):
        push_nowcaster(str(folder), "org/name", revision="../x")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        push_nowcaster(str(folder), "org/name")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, r"could not push .*: there is no token, or it is not valid \(401\); log in with `hf auth login`"),
        ("hf_wrong", r"there is no token, or it is not valid \(401\)"),
        (READER, r"could not push .*: the token does not allow it \(403\)"),
    ],
)
def test_without_the_right_to_write_nothing_is_pushed(hub, folder, token, message):
    """No token, a wrong one, one that may only read: one clear error, from the model and the command's function."""
    hub.repository("org/name")
    with pytest.raises(PermissionError, match=message):
        push_nowcaster(str(folder), "org/name", token=token)
    with pytest.raises(PermissionError, match=message):
        load_nowcaster(folder).push_to_hub("org/name", token=token)
    assert sorted(on_hub(hub, "org/name")) == [".gitattributes"]


def test_a_hub_that_cannot_be_reached(hub, login, folder, monkeypatch):
    """Out of order, offline, gone: one clear error each."""
    hub.broken = 503
    with pytest.raises(OSError, match=r"could not push .* to repository 'org/name': the Hub answered 503"):
        push_nowcaster(str(folder), "org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"could not push .*: HF_HUB_OFFLINE is set: unset it"):
        push_nowcaster(str(folder), "org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    with pytest.raises(OSError, match=rf"could not push .*: {hub.url} cannot be reached, or the connection broke"):
        push_nowcaster(str(folder), "org/name")


def test_the_command_prints_the_commit(hub, login, folder):
    """For people the page of the commit and the name to use; with --json what a program needs."""

    def run(*arguments):
        result = CliRunner().invoke(cli.app, ["push", str(folder), *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    said = run("org/name", "--private", "--branch", "next", "--token", WRITER, "--message", "First")
    commit = hub.repositories["org/name"].refs["next"]
    assert f"{hub.url}/org/name/commit/{commit}" in said and f'"org/name@{commit}"' in said
    found = json.loads(run("org/name", "--json"))
    assert found == {
        "repo_id": "org/name",
        "revision": "main",
        "commit": hub.repositories["org/name"].refs["main"],
        "url": f"{hub.url}/org/name/commit/{found['commit']}",
        "files": ["README.md", "config.json", "model.safetensors"],
    }
    assert "Example: hf-nino push" in CliRunner().invoke(cli.app, ["push", "--help"]).stdout


def test_the_command_fails_in_one_line(hub, folder, monkeypatch, capsys):
    """Exit code 1, and what to do."""
    monkeypatch.setattr(sys, "argv", ["hf-nino", "push", str(folder), "org/name"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-nino: could not push") and "hf auth login" in line


def test_a_copy_from_the_hub(hub, login):
    """What is on the Hub already can be pushed under another name."""
    hub.repository("org/name", files(wnn(1)))
    push_nowcaster("org/name", "me/copy")
    assert same(load_nowcaster("me/copy"), wnn(1))
