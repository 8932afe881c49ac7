"""The documentation is true: its code runs, its commands parse, its links lead somewhere, its messages exist."""

import ast
import re
import runpy
import shlex
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import huggingface_hub.hf_api
import pytest
import torch
import typer
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from huggingface_hub import constants
from transformers import GPT2Config, GPT2LMHeadModel

import hf_nino
from hf_nino import WNNModel, cli
from hf_nino.graph import operators  # noqa: F401 (all rules are registered, before a page adds one)
from hf_nino.graph.registry import RULES
from hf_nino.nowcaster import NowcasterConfig

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md")
    if path.name != "architectures.md"  # made by a program
}


def blocks(text: str, language: str) -> list[str]:
    """Code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def prose(text: str) -> str:
    """Everything but code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def commands(language: str = "bash") -> list[str]:
    """All lines of shell blocks."""
    lines = (line for text in PAGES.values() for block in blocks(text, language) for line in block.splitlines())
    return sorted({line for line in lines if line.strip() and not line.startswith("#")})


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """What a reader has: a small model, data, a folder of their own; and what a page changes is put back."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 32}
    tokens = torch.randint(32, (256, 16)).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "labels": tokens}).with_format("torch")
    monkeypatch.chdir(tmp_path)
    rules = dict(RULES)
    page = ModuleType("page")  # a real one: classes of a page can then be pickled, as the Trainer does
    monkeypatch.setitem(sys.modules, "page", page)
    page.model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    page.train_dataset, page.torch = data, torch
    yield vars(page)
    RULES.clear()
    RULES.update(rules)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What the client takes for the Hub: a server on this machine, with the nowcaster that the page loads."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "hub")
    from fake_hub import WRITER, FakeHub

    server = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    WNNModel(NowcasterConfig(nowcaster_type="wnn", hidden_size=8, period=10)).save_pretrained(tmp_path / "pushed")
    files = {path.name: path.read_bytes() for path in (tmp_path / "pushed").iterdir()}
    repository = server.repository("org/nowcaster", files)
    repository.refs["v1"] = repository.refs["main"]
    yield server
    server.stop()


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
def test_the_python_of_a_page_runs(page, reader, monkeypatch, request):
    """All blocks of a page, one after the other, as a reader would type them."""
    if page == "docs/hub.md":
        request.getfixturevalue("hub")
    monkeypatch.setattr("pydoc.pager", lambda *arguments: None)  # help() would wait for a key
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module="hf_nino")
        for number, code in enumerate(blocks(PAGES[page], "python"), start=1):
            exec(compile(code, f"{page}, block {number}", "exec"), reader)


@pytest.mark.parametrize("line", commands())
def test_the_shell_commands_of_the_pages_parse(line):
    """hf-nino knows the command, its options and the values of them; make has the target."""
    words = shlex.split(line, comments=True)
    if words[0] == "hf-nino":
        parse(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.M)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[:2] == ["pip", "install"]


def test_a_command_with_a_wrong_option_does_not_parse():
    """The check above can fail: an unknown option, a value of the wrong kind, an unknown command."""
    for wrong in (["demo", "--stepz", "4"], ["demo", "--steps", "many"], ["train"], ["meta-train"]):
        with pytest.raises(Exception, match=r"(?i)no such|valid integer|no command|missing"):
            parse(wrong)


def parse(words: list[str]) -> None:
    """Let typer read the words, without doing what they say."""
    command = typer.main.get_command(cli.app)
    name = "hf-nino"
    while words and words[0] in getattr(command, "commands", {}):
        name, *words = words
        command = command.commands[name]
    if name == "hf-nino":
        raise AssertionError(f"hf-nino has no command {words[0]}")
    if words != ["--help"]:
        command.make_context(name, words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_prose_exist(page):
    """`hf-nino NAME` in a sentence names a command."""
    known = typer.main.get_command(cli.app).commands
    for name in re.findall(r"`hf-nino ([\w-]+)", prose(PAGES[page])):
        assert name in known


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    """Files are in the tree, and anchors are headings of theirs."""
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text("utf-8")), target


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_index_has_every_page():
    """A page that nobody links to is not found."""
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["docs/README.md"]))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_api_reference_is_what_the_docstrings_say(monkeypatch):
    """`make docs` would change nothing, every public name is there, and another docstring would be noticed."""
    make = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]
    page = PAGES["docs/api.md"]
    assert make() == page, "docs/api.md is out of date: make docs"
    assert all(f"### `{name}`\n" in page for name in hf_nino.__all__ if name != "__version__")
    monkeypatch.setattr(hf_nino.load_nowcaster, "__doc__", "Something else.")
    assert make() != page


def fragments() -> list[str]:
    """The messages that the troubleshooting page quotes, in its headings."""
    headings = re.findall(r"^### (.+)$", PAGES["docs/troubleshooting.md"], re.M)
    found = [re.fullmatch(r"(`+) ?(.+?) ?\1", heading) for heading in headings]
    assert found and all(found)
    return [match[2] for match in found]


@cache
def messages() -> tuple[str, ...]:
    """Every string in the source as it is when it runs, with a gap where a value goes."""
    found = []
    for path in sorted((ROOT / "hf_nino").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(parts))
    return tuple(found)


def exists(fragment: str) -> bool:
    """Whether some message has these words; "…" stands for a value."""
    pattern = re.compile(".*?\0.*?".join(re.escape(part.strip()) for part in fragment.split("…")), re.S)
    return any(pattern.search(message) for message in messages())


@pytest.mark.parametrize("fragment", fragments())
def test_quoted_messages_exist(fragment):
    """Whoever searches the page for the message they got finds it, because the source says the same."""
    assert exists(fragment)


def test_a_message_that_nobody_writes_does_not_exist():
    """The check above can fail."""
    assert not exists("must be at least the … bananas")
    assert not exists("the learning rate that is left allows no bananas")


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short_enough_to_finish(page):
    """No page is longer than 2000 words, and no paragraph longer than 120."""
    text = prose(PAGES[page])
    assert len(text.split()) < 2000
    assert all(len(part.split()) <= 120 for part in re.split(r"\n\s*\n|^[|*] |\n[|*>] |\n\d\. ", text))
