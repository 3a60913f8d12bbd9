"""The page of a comparison: its sentences, tables and figures, and its layout in headless Chromium."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from gearnn_ray.knobs.findings import at_equal_accuracy, averages_of, replayed
from gearnn_ray.knobs.methods import METHODS, STEERED
from gearnn_ray.knobs.outcome import ADAPTED, NETWORKS, ORIGINAL
from gearnn_ray.knobs.reaction import KINDS, reactions
from gearnn_ray.knobs.report.figures import TITLES, front
from gearnn_ray.knobs.report.page import ABOUT, Page, figures_of, render
from gearnn_ray.knobs.streams import stretches_of
from tests.test_adapt_methods import STREET, table
from tests.test_evaluation_page import Shown, browser, number

__all__ = ["browser"]


def made(**changes: Any) -> Page:
    segments = {ORIGINAL: STREET, ADAPTED: STREET}
    cuts = stretches_of({100: "cut", 200: "light"}, 10, 60)
    source = replayed("street", {network: table(segments[network]) for network in NETWORKS}, segments, True, None, cuts)
    found = at_equal_accuracy(source, 2.0)
    page = Page(
        "two", "centre-video", "ab" * 32, "jobs/adapt.py street.mp4", "AP", ("crf=18,26,34,42", "rate=1,2"), 10, 2.0, (),
        (source,), found, averages_of(found), reactions([source], 2.0), {},
    )  # fmt: skip
    return dataclasses.replace(page, **changes)


@pytest.fixture(scope="module")
def page() -> Page:
    return made()


@pytest.fixture(scope="module")
def figures(page: Page) -> dict[str, bytes]:
    return figures_of(page)


@pytest.fixture(scope="module")
def shown(browser: Any, page: Page, figures: dict[str, bytes], tmp_path_factory: Any) -> Iterator[Shown]:
    shown = Shown(browser, render(page, figures), tmp_path_factory.mktemp("page"))
    yield shown
    assert shown.complaints == []
    assert shown.requests == [shown.path.as_uri()]


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_and_every_figure_is_there(shown: Shown, width: int) -> None:
    shown.page.set_viewport_size({"width": width, "height": 844})
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    images = shown.page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 500)")
    assert images == [True] * 3


def test_the_tables_are_what_was_found(shown: Shown, page: Page) -> None:
    original, adapted, drops = shown.tables("street")
    for rows, ending in ((original, ""), (adapted, "+gearnn")):
        kilobits = {row[0]: row[1] for row in rows[1:]}
        assert list(kilobits) == [TITLES[method] for method in METHODS]
        for each in page.found:
            if each.method.endswith("+gearnn") == bool(ending) and each.kilobits is not None:
                title = TITLES[each.method.removesuffix("+gearnn")]
                assert number(kilobits[title]) == pytest.approx(each.kilobits, rel=0.02)
    assert [row[0] for row in drops[1:]] == [f"{method}{ending}" for ending in ("", "+gearnn") for method in METHODS]


def test_reactions_and_averages_have_tables_where_there_are_some(shown: Shown) -> None:
    (averages,), (reacted,) = shown.tables("clips"), shown.tables("reaction")
    assert averages[0] == ["method", "kbit/s", "to best fixed", "accuracy", "clips"]
    assert reacted[0] == ["method", *KINDS.values()]
    assert (
        {row[0] for row in averages[1:]}
        == {row[0] for row in reacted[1:]}
        == {f"{m}{e}" for m in METHODS for e in ("", "+gearnn")}
    )
    html = render(made(averages=(), reactions=()), {})
    assert 'id="clips"' not in html
    assert 'id="reaction"' not in html


def test_a_method_without_an_equal_run_has_a_dash() -> None:
    strict = made()
    strict = dataclasses.replace(strict, found=at_equal_accuracy(strict.sources[0], -1.0), within=-1.0)
    html = render(strict, {})
    assert "OneAdapt over the original network does not reach this accuracy." in html
    assert "<td>–</td>" in html


def test_what_failed_stands_at_the_top() -> None:
    html = render(made(failed={"street segment 3": "UserError: <b>out of paper</b>"}), {})
    assert "Some segments failed." in html
    assert "street segment 3: UserError: &lt;b&gt;out of paper&lt;/b&gt;" in html


def test_equal_outcomes_are_drawn_as_equal_bytes(page: Page, figures: dict[str, bytes]) -> None:
    assert list(figures) == ["street-accuracy.png", "street-knobs.png", "street-overhead.png"]
    assert figures_of(page)["street-overhead.png"] == figures["street-overhead.png"]


def test_every_method_is_described() -> None:
    assert ABOUT.keys() == TITLES.keys() == set(METHODS) >= STEERED.keys()


def test_a_front_is_what_no_other_point_is_cheaper_and_better_than() -> None:
    assert front([(3, 50), (1, 40), (2, 45), (2, 44), (4, 50), (5, 49)]) == [(1, 40), (2, 45), (3, 50)]
