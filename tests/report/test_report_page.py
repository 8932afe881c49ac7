"""The page of a run: well-formed, self-contained, complete, and safe whatever the run is called."""

import re
from dataclasses import replace

import pytest
from report_helpers import charts, parse, words

from hf_nino.report import Gain, Nowcast, RunFacts, page_of
from hf_nino.report.charts import loss_chart
from hf_nino.report.facts import Memory, Place
from hf_nino.report.markup import Markup, element
from hf_nino.report.page import summary

PARTS = ("Loss", "What each nowcast brought", "Against the plain run", "Horizons", "Time", "Memory", "Learning rate")
PARTS += ("Path of the parameters",)
STEPS = range(0, 401, 10)
NOWCASTS = (
    Nowcast(100, 4, 0.02, True, 80, relative_step_norm=0.1, gain=Gain(2.0, 2.1, 0.02, True)),
    Nowcast(150, 4, 0.02, True, 80, relative_step_norm=0.1, shortened=3),
    Nowcast(200, 4, 0.01, False, 80, reason="7 of 9 predicted values of 'w' are not finite"),
    Nowcast(250, 3, 0.02, True, 60, taken_back_at=280, reason="worse", gain=Gain(2.2, 2.0, 0.05, True)),
    Nowcast(300, 2, 0.02, False, 40, reason="only observed", relative_step_norm=0.1),
    Nowcast(400, 0, 0.0, False, 0, reason="the learning rate that is left allows no interval"),
)
FULL = RunFacts(
    title="a run",
    kind="a run of a test",
    settings=(("period", "50"),),
    steps=400,
    max_steps=400,
    train_loss=tuple((step, 3 - step / 400) for step in STEPS if step),
    eval_loss=tuple((step, 3.1 - step / 400) for step in STEPS),
    plain_loss=tuple((step, 3.2 - step / 500) for step in STEPS),
    learning_rate=tuple((step, 1e-3 * (1 - step / 400)) for step in STEPS),
    nowcasts=NOWCASTS,
    nowcast_seconds=0.09,
    train_seconds=9.0,
    timed="by a test",
    memory=(Memory("5 snapshots", "cpu", 5 * 2**20),),
    path=(
        Place(50, (0.0, 0.0, 0.0)),
        Place(100, (1.0, 0.5, 0.0)),
        Place(100, (3.0, 0.7, 0.1), "nowcast"),
        Place(250, (4.0, 0.8, 0.1)),
        Place(250, (4.5, 0.0, 0.1), "nowcast"),
        Place(280, (4.0, 0.8, 0.1), "taken back"),
        Place(300, (4.2, 0.9, 0.1)),
    ),
)
EMPTY = RunFacts(title="nothing", kind="a run of a test")
PLAIN = replace(FULL, nowcasts=(), plain_loss=(), memory=(), path=(), nowcast_seconds=None)


@pytest.mark.parametrize("facts", [FULL, PLAIN, EMPTY], ids=["full", "plain", "empty"])
def test_a_page_is_well_formed_and_loads_nothing(facts):
    """It parses as XML, runs no script, and names no address but in its policy, which forbids all loading."""
    text = page_of(facts)
    tree = parse(text)
    assert not list(tree.iter("script")) and not list(tree.iter("link")) and not list(tree.iter("img"))
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=|\bon\w+=", text)
    policies = [meta.get("content") for meta in tree.iter("meta") if meta.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_chart_has_a_title_a_description_and_its_numbers():
    """Readers who do not see a chart get its title and description; those who want numbers, a table or a tooltip."""
    tree = parse(page_of(FULL))
    found = charts(tree)
    assert len(found) == 7
    identifiers = [e.get("id") for e in tree.iter() if e.get("id")]
    assert len(identifiers) == len(set(identifiers))
    for chart in found:
        title, description = chart.find("title"), chart.find("desc")
        assert title.text and description.text
        assert chart.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    marks = [group for group in tree.iter("g")]
    assert len(marks) > 20 and all(mark.find("title") is not None for mark in marks if not _in_legend(mark, tree))
    assert len(list(tree.iter("table"))) == 7  # one behind each chart but the path, and memory


def _in_legend(mark, tree) -> bool:
    return any(mark in list(key.iter("g")) for key in tree.iter("svg") if key.get("aria-hidden"))


@pytest.mark.parametrize("facts", [FULL, PLAIN, EMPTY], ids=["full", "plain", "empty"])
def test_every_part_is_shown_or_said_to_be_left_out(facts):
    """No part is missing without a word."""
    tree = parse(page_of(facts))
    shown = {heading.text for heading in tree.iter("h2")}
    left_out = {item.find("b").text for item in tree.iter("li") if item.find("b") is not None}
    assert not shown & left_out
    assert (shown | left_out) - {"Left out"} == set(PARTS)
    assert left_out == (set() if facts is FULL else left_out) and bool(left_out) == (facts is not FULL)


def test_a_run_without_nowcasts_has_a_useful_page():
    """Loss and learning rate are drawn, and the rest says that no nowcast was due."""
    tree = parse(page_of(PLAIN))
    assert [chart.find("title").text.split()[0] for chart in charts(tree)] == ["Loss", "Learning"]
    assert words(tree).count("no nowcast was due in this run") >= 3


def test_every_fate_is_marked_and_told():
    """Accepted, shortened, refused, taken back, observed and not tried each have a legend entry and a reason."""
    text = words(parse(page_of(FULL)))
    for fate in ("accepted", "shortened", "refused", "taken back", "observed", "not tried"):
        assert f"{fate} (1)" in text
    assert "7 of 9 predicted values of 'w' are not finite" in text
    assert "steps 250 to 280 were taken back" in text


def test_the_loss_is_drawn_where_it_falls_slowly():
    """The first tenth of a run does not squeeze the rest; with a loss that falls evenly the axis holds nearly all."""
    steep = tuple((step, 100.0 if step < 40 else 3 - step / 400) for step in STEPS)
    assert loss_chart(replace(FULL, eval_loss=steep, plain_loss=(), train_loss=())).y[1] < 4
    assert "The first steps lie above the picture." in page_of(replace(FULL, eval_loss=steep))


EVIL = '"><script>alert(1)</script><svg onload=alert(2)>&\x00\x1b\ud800'


def test_names_and_reasons_cannot_become_markup():
    """Whatever a run, a setting, a reason or a place is called, it is text; raw markup would be found."""
    nowcast = replace(NOWCASTS[2], reason=EVIL)
    memory = (Memory(EVIL, EVIL, 1),)
    facts = replace(FULL, title=EVIL, kind=EVIL, settings=((EVIL, EVIL),), nowcasts=(nowcast,), memory=memory)
    tree = parse(page_of(facts))
    assert not list(tree.iter("script"))
    assert not [e for e in tree.iter() if any(name.startswith("on") for name in e.attrib)]
    assert "<script>alert(1)</script>" in tree.find("body/main/header/h1").text
    raw = parse(page_of(replace(facts, title=Markup("<script>alert(1)</script>"))))
    assert list(raw.iter("script"))


def test_attributes_cannot_be_left():
    """A quote in an attribute stays in it."""
    assert element("p", {"title": '"a" onclick="b'}, "<") == '<p title="&quot;a&quot; onclick=&quot;b">&lt;</p>'


def test_the_summary_has_the_pages_numbers():
    """What --json prints can be read by a program: counts, gains, overhead."""
    found = summary(FULL)
    assert found["nowcasts"] == dict.fromkeys(("accepted", "shortened", "taken back"), 1) | dict.fromkeys(
        ("refused", "observed", "not tried"), 1
    )
    assert [gain["step"] for gain in found["gains"]] == [100, 250]
    assert found["gains"][0]["excess"] == pytest.approx(-0.1)
    assert found["overhead"] == pytest.approx(0.01)
    assert summary(EMPTY)["overhead"] is None


def test_long_runs_make_small_pages():
    """A log of a hundred thousand entries is thinned, the page says so, and it stays below half a megabyte."""
    long = tuple((float(step), 3 + (step % 7) / 10) for step in range(100_000))
    text = page_of(replace(PLAIN, train_loss=long, eval_loss=(), learning_rate=long, steps=100_000))
    assert len(text) < 500_000
    assert "(every 500th of 100,000)" in text
