"""The report of an evaluation: its sentences and tables, and its layout in headless Chromium."""

import dataclasses
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gearnn_ray.evaluation.baselines import CONSTANT, TITLES
from gearnn_ray.evaluation.memory import memory_rows
from gearnn_ray.evaluation.records import Picture
from gearnn_ray.evaluation.report.content import Evaluation
from gearnn_ray.evaluation.report.figures import spread_evenly
from gearnn_ray.evaluation.report.methods import GROUPS, METHODS
from gearnn_ray.evaluation.report.page import figures_of, render
from gearnn_ray.evaluation.report.pictures import RENDERERS
from gearnn_ray.levels.axes import axes_of
from gearnn_ray.store.tables import ACCURACY, AVERAGES, BYTES, CHANGES, DIFFERENCES, FREQUENCY, MEMORY, SHARES, TUNING, table
from gearnn_ray.tasks import TASKS

CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ARGUMENTS += ["--disable-sync", "--no-first-run", "--disable-quic"]

MODEL, BUDGET = 15_900_987, 31_801
SIZES = ("h264-480x360", "h264-376x280", "h264-240x180", "h264-120x90")
LEVELS = ("clean", *(f"jpeg-{q}" for q in (2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)), *SIZES)
LEVELS += tuple(f"brightness-{b}" for b in (0.1, 0.2, 0.4, 0.7, 1.5, 2.0))
BASELINE_LEVELS = ("clean", "jpeg-2", "jpeg-10", "jpeg-40", "jpeg-100", *SIZES, "brightness-0.1", "brightness-0.4")
UNTRAINED = ("jpeg-20", "jpeg-40", "jpeg-60", "jpeg-80")
GAINS = {
    "original": 0.0, "original-scaled": 0.3, "switching": 1.05, "mixed": 0.7, "stability": 0.3, "gearnn": 1.0,
    "gearnn-released": 0.97,
    "clean-tuned": 0.02, "bn-statistics": 0.5, "bn-tuned": 1.04, "first-block": 0.4, "auto-rgn": 0.85, "random": 0.3,
    "gearnn-nearest": 0.9, "gearnn-interpolated": 0.96, "gearnn-entropy": 0.95,
}  # fmt: skip


def evaluation() -> Evaluation:
    """As a run on CamVid might end: three axes, every method, three seeds of the main ones."""
    rng = np.random.default_rng(0)
    loss = {level: 45 * np.exp(-index / 2.5) for index, level in enumerate(LEVELS[1:13])}
    loss |= dict(zip(SIZES, (0.4, 1.5, 6.0, 21.0), strict=True))
    loss |= {f"brightness-{b}": d for b, d in ((0.1, 52), (0.2, 44), (0.4, 13), (0.7, 1.1), (1.5, 2.5), (2.0, 12.7))}
    loss["clean"] = 0.0
    accuracy, means = [], {}
    for method in TITLES:
        own = UNTRAINED if method in ("gearnn-nearest", "gearnn-interpolated", "gearnn-entropy") else BASELINE_LEVELS
        for level in LEVELS if method in ("original", "switching", "gearnn") else own:
            seeds = {"switching": 3, "gearnn": 3, "random": 5}.get(method, 1) if level in BASELINE_LEVELS else 1
            floats = {"switching": MODEL, "bn-statistics": 8_000, "bn-tuned": 16_000}.get(method, 31_243)
            if method in CONSTANT:
                floats = 0 if method.startswith("original") else MODEL
            values = 56.3 - loss[level] * (1 - 0.93 * GAINS[method]) + rng.normal(0, 0.25, seeds)
            means[method, level] = float(values.mean())
            accuracy += [
                {"method": method, "level": level, "metric": "mIoU", "value": float(value), "seed": seed,
                 "floats": 0 if level == "clean" and method not in CONSTANT else floats, "release": "ab" * 32}
                for seed, value in enumerate(values)
            ]  # fmt: skip
    axes = axes_of(LEVELS)
    differences = []
    for (method, level), mean in means.items():
        if method != "gearnn":
            value = mean - means["gearnn", level]
            width = 0.2 + 0.1 * abs(value)
            differences.append(
                {"method": method, "level": level, "value": value, "low": value - width, "high": value + width, "seeds": 1}
            )
    averages = []
    for axis, levels in axes.items():
        for method in TITLES:
            both = [level for level in levels if (method, level) in means]
            if method != "gearnn" and both:
                own, reference = (float(np.mean([means[m, level] for level in both])) for m in (method, "gearnn"))
                width = 0.15 + 0.1 * abs(reference - own)
                averages.append(
                    {"axis": axis, "method": method, "levels": len(both), "average": own, "gearnn": reference,
                     "difference": reference - own, "low": reference - own - width, "high": reference - own + width,
                     "published": {"original": 18.12, "stability": 4.84}.get(method)}
                )  # fmt: skip
    tuning = [
        {"method": method, "level": "jpeg-10", "learning_rate": rate, "alpha": None,
         "sigma": None, "value": 50 + index + rate * 100, "chosen": rate == best}
        for index, (method, best) in enumerate((("switching", 0.01), ("stability", 0.01), ("gearnn", 0.03), ("bn-tuned", 0.01)))
        for rate in (0.003, 0.01, 0.03)
    ]  # fmt: skip
    tuning += [
        {"method": "stability", "level": level, "learning_rate": 0.01, "alpha": alpha, "sigma": sigma,
         "value": 40 + alpha + 10 * sigma, "chosen": (alpha, sigma) == (2.0, 0.1)}
        for level in ("jpeg-10", "jpeg-40") for alpha in (0.5, 1.0, 2.0) for sigma in (0.04, 0.1)
    ]  # fmt: skip
    points = [("original", None, 0), ("switching", None, MODEL), ("mixed", None, MODEL), ("bn-statistics", None, 8_000)]
    points += [("bn-tuned", None, 16_000), ("first-block", None, 31_000), ("auto-rgn", None, 31_700), ("random", None, 31_500)]
    points += [("gearnn", round(MODEL * share), round(MODEL * share) - 99) for share in (0.0005, 0.001, 0.002, 0.004, 0.01)]
    per_byte = [
        {"method": method, "level": "jpeg-10", "budget": budget, "floats": floats,
         "value": means[method, "jpeg-10"] + (0.5 * np.log(floats / BUDGET) if budget else 0)}
        for method, budget, floats in points
    ]  # fmt: skip
    changes = [
        {"level": level, "layer": f"layer{index}.{kind}", "kind": kind, "index": index, "numel": 64,
         "mean_abs_change": float(10 ** rng.uniform(-4, -2)), "max_abs_change": 0.1, "l2_change": 0.1, "l2_weight": 1.0,
         "share_above_2e_4": 0.3, "selected": kind != "conv_weight"}
        for level in LEVELS[1:6]
        for index, kind in enumerate(("conv_weight", "norm_weight", "norm_bias", "norm_statistics") * 20)
    ]  # fmt: skip
    v, h = np.mgrid[:8, :8]
    original = 1e-5 * np.exp(-(v + h) / 4)
    maps = {"original": original, "switching": original * np.exp(-(v + h) / 20) * 1.3}
    maps["gearnn"] = original + 0.8 * (maps["switching"] - original)
    frequency = [
        {"network": network, "level": level, "vertical": int(i), "horizontal": int(j), "magnitude": float(magnitude * scale)}
        for level, scale in (("brightness-0.2", 3.0), ("jpeg-10", 1.0))
        for network, values in maps.items()
        for (i, j), magnitude in np.ndenumerate(values)
    ]
    names = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
    label = np.add.outer(np.arange(90) // 14, np.arange(120) // 30).astype(np.uint8)
    label[:4] = 255
    image = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    seen = (np.roll(label, 20, 1) % 11, np.roll(label, 4, 1) % 11)
    held = {"switching": [MODEL] * 22, "gearnn": [31_243] * 22, "bn-tuned": [16_000] * 10}
    return Evaluation(
        name="drn22-camvid",
        release="ab" * 32,
        command="jobs/evaluate.py --release drn22-camvid:latest --seeds 3 --store /data/store --data.path /data/camvid",
        data="CamVid, 101 validation images of 1 clip",
        network="drn_d_22",
        task="segmentation",
        metric="mIoU",
        model_floats=MODEL,
        budget_floats=BUDGET,
        seed=0,
        axes=axes,
        accuracy=accuracy,
        differences=differences,
        averages=averages,
        memory=memory_rows("drn_d_22", MODEL, BUDGET, held),
        tuning=tuning,
        bytes=per_byte,
        changes=changes,
        shares=[{"level": level, "by_layer": 0.0263, "by_weight": 0.1178} for level in LEVELS[1:6]],
        frequency=frequency,
        pictures=[Picture("brightness-0.1", "0016E5_07959", image, label, *seen, names, (11.52, 54.26))],
        notes=[
            "All fine-tunes share the 367 training images, 4 epochs, batches of 8, crops of 320 pixels, SGD with momentum 0.9.",
            "Stability training puts two copies of every image through the network, at twice the cost.",
        ],
        failed={},
    )


def empty(**fields: Any) -> Evaluation:
    nothing = {field.name: () for field in dataclasses.fields(Evaluation)}
    words = dict.fromkeys(("name", "release", "command", "data", "network", "metric"), "x") | {"task": "segmentation"}
    return Evaluation(**nothing | words | {"model_floats": 0, "budget_floats": 0, "seed": 0, "axes": {}, "failed": {}} | fields)


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return evaluation()


@pytest.fixture(scope="module")
def figures(whole: Evaluation) -> dict[str, bytes]:
    return figures_of(whole)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the report is looked at with playwright, which is not installed"
    )
    if CHROMIUM is None:
        pytest.skip("the report is looked at in Chromium, which is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser.new_context()
        browser.close()


class Shown:
    """A page of the browser with what it asked for and complained about."""

    def __init__(self, browser: Any, html: str, folder: Path) -> None:
        self.path = folder / "report.html"
        self.path.write_text(html, encoding="utf-8")
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("request", lambda r: None if r.url.startswith("data:") else self.requests.append(r.url))
        self.page.goto(self.path.as_uri())

    def tables(self, section: str) -> list[list[list[str]]]:
        """Every table of a section as rows of texts, without what CSS adds; closed ones too."""
        found: list[list[list[str]]] = self.page.evaluate(
            """id => [...document.querySelectorAll(`#${id} table`)].map(
                table => [...table.rows].map(row => [...row.cells].map(cell => cell.textContent)))""",
            section,
        )
        return found


@pytest.fixture(scope="module")
def shown(browser: Any, whole: Evaluation, figures: dict[str, bytes], tmp_path_factory: Any) -> Iterator[Shown]:
    shown = Shown(browser, render(whole, figures), tmp_path_factory.mktemp("report"))
    yield shown
    assert shown.complaints == []
    assert shown.requests == [shown.path.as_uri()]


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def test_rows_of_this_file_are_rows_of_the_tables(whole: Evaluation) -> None:
    for schema, rows in (
        (ACCURACY, whole.accuracy), (DIFFERENCES, whole.differences), (AVERAGES, whole.averages), (MEMORY, whole.memory),
        (TUNING, whole.tuning), (BYTES, whole.bytes), (CHANGES, whole.changes), (SHARES, whole.shares),
        (FREQUENCY, whole.frequency),
    ):  # fmt: skip
        assert table(schema, rows).num_rows == len(rows) > 0


def test_every_method_is_described() -> None:
    assert METHODS.keys() == TITLES.keys()


def test_every_task_has_a_renderer() -> None:
    assert RENDERERS.keys() == TASKS.keys()


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_and_every_picture_is_there(shown: Shown, width: int) -> None:
    shown.page.set_viewport_size({"width": width, "height": 844})
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    images = shown.page.evaluate("[...document.images].map(i => [i.complete && i.naturalWidth > 500, i.alt.length > 20])")
    assert images == [[True, True]] * len(images)
    assert len(images) == 3 + 1 + 1 + 1 + 1 + 1


def test_it_prints_on_paper_without_cutting_figures_off(shown: Shown) -> None:
    shown.page.emulate_media(media="print")
    shown.page.set_viewport_size({"width": 700, "height": 900})
    widest = shown.page.evaluate("Math.max(...[...document.images].map(i => i.getBoundingClientRect().right))")
    shown.page.emulate_media(media="screen")
    assert widest <= 700


def test_every_figure_has_its_command_data_and_seed_under_it(shown: Shown, whole: Evaluation) -> None:
    captions = shown.page.locator("figcaption small").all_inner_texts()
    assert captions == [f"{whole.command} · {whole.data} · seed 0"] * len(figures_of_names(whole))


def figures_of_names(whole: Evaluation) -> list[str]:
    axes = list(whole.axes)
    names = [f"accuracy_{axis}.png" for axis in axes] + ["averages.png", "accuracy_per_byte.png", "weight_changes_jpeg.png"]
    return [*names, "frequency.png", "picture_1.png"]


def test_figures_are_named_for_what_they_show_and_are_the_same_bytes_every_time(
    whole: Evaluation, figures: dict[str, bytes]
) -> None:
    assert list(figures) == figures_of_names(whole)
    few = figures_of(dataclasses.replace(whole, axes={}, frequency=()))
    assert list(few) == ["averages.png", "accuracy_per_byte.png", "picture_1.png"]
    assert few.items() <= figures.items()


def test_figures_tell_methods_apart_without_colour(whole: Evaluation) -> None:
    from gearnn_ray.evaluation.report.figures import _STYLES

    for members in GROUPS.values():
        for key in ("marker", "linestyle"):
            assert len({str(_STYLES[method][key]) for method in (*members, "gearnn")}) == len(members) + 1


def test_accuracy_is_that_of_the_rows(shown: Shown, whole: Evaluation) -> None:
    tables = shown.tables("accuracy")[::2]
    for levels, (heads, *rows) in zip(whole.axes.values(), tables, strict=True):
        assert [row[0] for row in rows] == list(levels)
        methods = [next(m for m, title in TITLES.items() if title == head) for head in heads[1:]]
        for level, *cells in rows:
            for method, text in zip(methods, cells, strict=True):
                values = [r["value"] for r in whole.accuracy if (r["method"], r["level"]) == (method, level)]
                expected = ""
                if values:
                    expected = f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
                assert text == expected


def test_the_best_of_a_level_is_bold_and_what_differs_is_marked(shown: Shown, whole: Evaluation) -> None:
    row = shown.page.locator("#accuracy tr", has=shown.page.locator("th", has_text="brightness-0.1")).first
    best = max(
        {m: np.mean([r["value"] for r in whole.accuracy if (r["method"], r["level"]) == (m, "brightness-0.1")]) for m in
         {r["method"] for r in whole.accuracy if r["level"] == "brightness-0.1"}}.values()
    )  # fmt: skip
    assert {text.split()[0] for text in row.locator(".best").all_inner_texts()} == {f"{best:.1f}"}
    here = [r for r in whole.differences if r["level"] == "brightness-0.1"]
    assert row.locator(".above").count() == sum(r["low"] > 0 for r in here) > 0
    assert row.locator(".below").count() == sum(r["high"] < 0 for r in here) > 0


def test_differences_verdicts_and_averages_are_those_of_the_rows(shown: Shown, whole: Evaluation) -> None:
    (verdicts,) = shown.tables("verdict")
    (averages,) = shown.tables("averages")
    at = {(r["method"], r["axis"]): r for r in whole.averages}
    titles = {title: method for method, title in TITLES.items()}
    seen = 0
    for row in verdicts[1:]:
        for axis, text in zip(whole.axes, row[2:], strict=False):
            expected = at.get((titles[row[0]], axis))
            assert (text == "") == (expected is None)
            if expected:
                seen += 1
                word = "wins" if expected["low"] > 0 else "loses" if expected["high"] < 0 else "ties"
                shown_word, *numbers = text.replace("[", "").replace("]", "").replace(",", "").split()
                assert shown_word == word
                assert [number(n) for n in numbers] == [round(expected[k], 2) for k in ("difference", "low", "high")]
    assert seen == len(whole.averages)
    rows = [row for row in averages[1:] if len(row) > 1]
    assert len(rows) == len(whole.averages)
    assert {row[0]: row[6] for row in rows if row[6]} == {"original": "+18.12", "stability training": "+4.84"}
    first = at["original", "jpeg"]
    assert rows[[row[0] for row in rows].index("original")][1:4] == ["12", f"{first['average']:.1f}", f"{first['gearnn']:.1f}"]
    against = shown.tables("accuracy")[1]
    column = against[0].index("DNN switching")
    row = next(r for r in whole.differences if (r["method"], r["level"]) == ("switching", "jpeg-10"))
    text = next(line[column] for line in against if line[0] == "jpeg-10")
    assert number(text.split()[0]) == round(row["value"], 2)


def test_a_baseline_of_equal_bytes_that_is_better_is_named(whole: Evaluation) -> None:
    def page(low: float, high: float) -> str:
        rows = [{**r, "difference": 1.0, "low": 0.5, "high": 1.5} for r in whole.averages if r["axis"] == "jpeg"]
        for row in rows:
            if row["method"] == "bn-tuned":
                row.update(difference=(low + high) / 2, low=low, high=high)
        return render(dataclasses.replace(whole, averages=rows), {})

    assert "BatchNorm fine-tuned (by 0.75 points) is better than GearNN" in page(-1.0, -0.5)
    assert "<b>loses</b> to BatchNorm fine-tuned</dd>" in page(-1.0, -0.5)
    assert "No method that stores as little is better" in page(-1.0, 0.5)
    assert "<b>ties</b> with BatchNorm fine-tuned</dd>" in page(-1.0, 0.5)
    # what rounds to nothing has no sign
    assert "<b>ties</b> 0.00 [0.00, 0.00]" in page(-0.004, 0.004)


def test_memory_bytes_and_shares_are_those_of_the_rows(shown: Shown, whole: Evaluation) -> None:
    table_1, held = shown.tables("memory")
    assert table_1[-1] == ["10", f"{MODEL:,}", f"{10 * MODEL:,}", f"{MODEL + 9 * BUDGET:,}"]
    assert held[2][:3] == ["GearNN adaptors", "23", f"{MODEL + 22 * 31_243:,}"]
    (per_byte,) = shown.tables("bytes")
    assert [number(row[2]) for row in per_byte[2:]] == sorted(row["floats"] for row in whole.bytes)
    (shares,) = shown.tables("changes")
    assert shares[1] == ["jpeg-2", "2.63%", "11.78%"]


def test_the_whole_grid_of_settings_is_shown_and_the_chosen_marked(shown: Shown) -> None:
    rates, stability = shown.tables("rates")
    assert rates[0] == ["method", "0.003", "0.01", "0.03"]
    assert [row[0] for row in rates[2:]] == ["DNN switching", "stability training", "GearNN adaptors", "BatchNorm fine-tuned"]
    assert rates[2][1:] == ["50.3", "51.0", "53.0"]
    assert stability[0][1:4] == ["α 0.5, σ 0.04", "α 0.5, σ 0.1", "α 1, σ 0.04"]
    assert [row[0] for row in stability[1:]] == ["jpeg-10", "jpeg-40", "2 levels with equal weight", "average"]
    assert stability[-1][-1] == "43.0"
    assert shown.page.locator("#rates .chosen").all_inner_texts() == ["51.0", "52.0", "55.0", "54.0", "43.0", "43.0"]
    # GearNN took the largest rate tried
    assert shown.page.locator("#rates p:not(.caption)").inner_text().endswith("beyond it: GearNN adaptors.")


def test_what_the_paper_says_of_frequencies_is_checked(shown: Shown, whole: Evaluation) -> None:
    text = shown.page.locator("#frequency").inner_text()
    assert (
        "At brightness-0.2 and jpeg-10 the full fine-tune turns away from high frequencies: their share of the response goes "
        "from 16.4% to 12.8% (brightness-0.2) and 16.4% to 12.8% (jpeg-10)."
    ) in text
    assert "full fine-tune and adaptor change the response alike (cosine similarity at least 0.9)" in text
    swapped = {"original": "switching", "switching": "original", "gearnn": "gearnn"}
    rows = [{**r, "network": swapped[r["network"]] if r["level"] == "jpeg-10" else r["network"]} for r in whole.frequency]
    html = render(dataclasses.replace(whole, frequency=rows), {})
    assert "turns away from high frequencies; at jpeg-10 the full fine-tune does not turn away" in html


def test_what_is_missing_is_said(browser: Any, tmp_path: Path) -> None:
    nothing = empty()
    assert figures_of(nothing) == {}
    shown = Shown(browser, render(nothing, {}), tmp_path)
    for section in ("verdict", "methods", "accuracy", "averages", "memory", "bytes", "rates", "changes", "frequency", "pictures"):
        (sentence,) = shown.page.locator(f"#{section} p").all_inner_texts()
        assert sentence.endswith(".")
    assert shown.complaints == []


@pytest.mark.parametrize(
    "rows", ["accuracy", "differences", "averages", "memory", "tuning", "bytes", "changes", "shares", "frequency"]
)
def test_any_table_may_be_missing_or_be_all_there_is(whole: Evaluation, rows: str) -> None:
    render(dataclasses.replace(whole, **{rows: ()}), {})
    render(empty(axes=whole.axes, **{rows: getattr(whole, rows)}), {})


def test_what_comes_from_outside_is_text(browser: Any, whole: Evaluation, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x'"
    words = dict.fromkeys(("name", "release", "command", "data", "network", "metric"), bad)
    picture = dataclasses.replace(whole.pictures[0], sample=bad)
    hostile = dataclasses.replace(whole, **words, notes=[bad], failed={bad: bad}, pictures=[picture], changes=(), frequency=())
    shown = Shown(browser, render(hostile, {"picture_1.png": png()}), tmp_path)
    assert shown.page.evaluate("[document.scripts.length, document.querySelectorAll('[onload], [onerror]').length]") == [0, 0]
    assert shown.page.locator("h1").inner_text().startswith(bad)
    assert shown.page.locator("[role=alert] li").all_inner_texts() == [f"{bad}: {bad}"]
    assert shown.requests == [shown.path.as_uri()]
    assert shown.complaints == []


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(("items", "chosen"), [("", ""), ("a", "a"), ("abcd", "abcd"), ("abcdefghij", "adgj"), ("abcde", "abde")])
def test_few_of_many_are_spread_evenly(items: Sequence[str], chosen: str) -> None:
    assert "".join(spread_evenly(items)) == chosen


def test_sparse_rows_can_be_drawn_too(whole: Evaluation) -> None:
    """The original alone on two odd axes, a network without a response, one budget at one level, classes without end."""
    levels = {"combination": ("jpeg-10+brightness-0.4",), "clean": ("clean",)}
    row = {"method": "original", "metric": "mIoU", "value": 50.0, "seed": 0, "floats": 0, "release": "x"}
    label = np.arange(200, dtype=np.uint8).reshape(10, 20)
    names = tuple(f"class {index}" for index in range(200))
    sparse = empty(
        axes=levels,
        accuracy=[{**row, "level": level} for (level,) in levels.values()],
        bytes=[{"method": "gearnn", "level": "clean", "budget": 9, "floats": 9, "value": 50.0}],
        frequency=[{**r, "magnitude": 0.0} for r in whole.frequency if r["network"] == "gearnn"],
        pictures=[Picture("clean", "a", np.zeros((10, 20, 3), np.uint8), *[label] * 3, names, (0.0, 0.0))],
    )
    figures = figures_of(sparse)
    assert len(figures) == 5
    assert "frequency response" in render(sparse, figures).lower()
