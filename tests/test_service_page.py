"""The page in headless Chromium, with a real server on loopback: what it sends and shows, and that it loads nothing else."""

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gearnn_ray.service.backend import Prediction
from gearnn_ray.serving.frames import Frame
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Task
from tests.test_http import BUNDLES, CLASS_NAMES, Luma, encoded, luma_logits, picture, serve

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ARGUMENTS += ["--disable-sync", "--no-first-run", "--disable-quic"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser.new_context()
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Luma]]:
    backend = Luma()
    with serve(backend) as port:
        yield f"http://127.0.0.1:{port}/", backend


@pytest.fixture
def backend(served: tuple[str, Luma]) -> Iterator[Luma]:
    yield served[1]
    served[1].__init__()  # type: ignore[misc]


@pytest.fixture
def page(browser: Any, served: tuple[str, Luma], backend: Luma) -> Iterator[Any]:
    with opened(browser, served[0]) as page:
        yield page


@contextmanager
def opened(browser: Any, url: str) -> Iterator[Any]:
    """The page, showing the results of its example. Afterwards no request went to another host, and the console is clean."""
    page = browser.new_page()
    page.set_viewport_size({"width": 1280, "height": 900})
    page.set_default_timeout(10_000)
    complaints: list[str] = []
    elsewhere: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: None if request.url.startswith((url, "data:", "blob:")) else elsewhere.append(request.url))
    page.goto(url)
    settle(page)
    yield page
    page.close()
    # Chromium logs every response of 4xx and 5xx there
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
    assert elsewhere == []


def settle(page: Any) -> None:
    """Wait until the latest results are shown."""
    page.wait_for_selector("#figures[aria-busy=false]")


def slide(page: Any, slider: str, value: float) -> None:
    page.locator(f"#{slider}").fill(str(value))
    settle(page)


def text(page: Any, selector: str) -> str:
    return str(page.locator(selector).inner_text())


def numbers(page: Any) -> dict[str, tuple[str, str]]:
    """The table: original and adapted by row."""
    rows = [row.split("\t") for row in page.locator("#numbers").inner_text().splitlines()]
    return {name: (original, adapted) for name, original, adapted in rows}


def pixels(page: Any, canvas: str) -> np.ndarray:
    """What a canvas shows, RGB [H, W, 3]."""
    url = page.evaluate("id => document.getElementById(id).toDataURL('image/png')", canvas)
    return decoded(base64.b64decode(url.partition(",")[2]))


def decoded(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def classes(page: Any, canvas: str) -> np.ndarray:
    """Class ids [H, W] that a canvas shows plainly."""
    colours = [[128, 64, 128], [244, 35, 232], [70, 70, 70], [102, 102, 156]]
    same = (pixels(page, canvas)[..., None, :] == np.array(colours)).all(-1)
    assert same.any(-1).all()
    return same.argmax(-1)


def choose(page: Any, name: str, body: bytes) -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": "image/png", "buffer": body})
    settle(page)


def test_it_starts_with_its_own_example(page: Any) -> None:
    assert text(page, "#error") == ""
    assert "level clean" in text(page, "#original-text")
    assert "level jpeg-10, estimated jpeg-20" in text(page, "#adapted-text")
    assert "ok" in text(page, "#health")
    assert text(page, "#sent-text").startswith("JPEG 20, 160 × 120")
    assert not np.array_equal(pixels(page, "original"), pixels(page, "adapted"))
    named = page.locator("#legend button > :nth-child(2)").all_inner_texts()
    assert named == [name for name in CLASS_NAMES if name in named] != []


def test_both_networks_get_the_same_bytes_and_their_results_are_shown_exactly(page: Any, backend: Luma) -> None:
    backend.received.clear()
    sent = backend.received
    page.get_by_text("Classes", exact=True).first.click()
    slide(page, "quality", 34)
    (first, one), (second, other) = sent
    assert first == second
    assert {one.get("x-gearnn-level"), other.get("x-gearnn-level")} == {"clean", None}
    assert one["content-type"] == other["content-type"] == "image/jpeg"
    image = decoded(first)
    assert np.array_equal(pixels(page, "sent"), image)  # the frame shown is the frame sent
    assert np.array_equal(classes(page, "original"), luma_logits(image, "clean").argmax(0))
    assert np.array_equal(classes(page, "adapted"), luma_logits(image, "jpeg-40").argmax(0))
    shown = numbers(page)
    assert shown["estimated level"] == ("jpeg-34", "jpeg-34")
    assert shown["level used"] == ("clean", "jpeg-40")
    assert shown["distance"] == ("0", "1.2")
    assert shown["network"] == ("2.0 ms", "2.0 ms")
    assert shown["release"] == ("12121212…",) * 2
    assert f"{len(first):,} bytes" in text(page, "#sent-text")


def test_every_quality_of_the_slider_is_the_quality_of_the_file(page: Any) -> None:
    for quality in (1, 50, 100):
        slide(page, "quality", quality)
        assert numbers(page)["estimated level"][0] == f"jpeg-{quality}"


def test_size_and_brightness_change_the_frame_and_png_keeps_it_exact(page: Any, backend: Luma) -> None:
    backend.received.clear()
    sent = backend.received
    original = picture(96, 128)
    page.get_by_text("PNG, lossless").click()
    choose(page, "ramp.png", encoded(original))
    assert np.array_equal(decoded(sent[-1][0]), original)
    slide(page, "brightness", 0.5)
    dimmed = decoded(sent[-1][0]).astype(float)
    assert sent[-1][1]["content-type"] == "image/png"
    assert np.abs(dimmed - original / 2).max() <= 0.5
    slide(page, "size", 50)
    small = decoded(sent[-1][0]).astype(float)
    assert small.shape == (48, 64, 3)
    assert abs(small.mean() - original.mean() / 2) < 1
    assert text(page, "#sent-text").startswith("PNG, 64 × 48")
    assert pixels(page, "adapted").shape == (48, 64, 3)
    page.get_by_role("button", name="Remove distortion").click()
    settle(page)
    assert np.array_equal(decoded(sent[-1][0]), original)
    assert numbers(page)["level used"] == ("clean", "clean")


def test_an_image_can_be_dropped(page: Any) -> None:
    page.evaluate(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        list(encoded(picture(60, 80))),
    )
    settle(page)
    assert text(page, "#source") == "dropped.png, 80 × 60"
    assert "80 × 60" in text(page, "#sent-text")


def test_a_file_that_is_not_an_image_gives_one_sentence(page: Any) -> None:
    choose(page, "notes.txt", b"no image")
    assert "This browser cannot read “notes.txt” as an image" in text(page, "#error")
    page.get_by_role("button", name="Example").click()
    settle(page)
    assert text(page, "#error") == ""


def test_an_error_of_the_server_is_shown_and_disappears(page: Any) -> None:
    page.get_by_text("PNG, lossless").click()
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    choose(page, "noise.png", encoded(noise))
    assert "larger than the 200,000 bytes allowed here" in text(page, "#error")
    assert "stale" in page.locator("#figures").get_attribute("class")
    page.get_by_text("JPEG", exact=True).click()
    slide(page, "quality", 10)
    assert text(page, "#error") == ""
    assert "stale" not in page.locator("#figures").get_attribute("class")


def test_results_of_earlier_frames_are_dropped(page: Any, backend: Luma) -> None:
    backend.received.clear()
    sent = backend.received
    backend.delays = [1.0, 1.0]
    page.locator("#quality").fill("10")
    page.wait_for_timeout(300)
    slide(page, "quality", 80)
    assert numbers(page)["level used"][1] == "jpeg-80"
    page.wait_for_timeout(900)
    assert numbers(page)["level used"][1] == "jpeg-80"
    assert len(sent) == 4


def test_a_dragged_slider_sends_only_where_it_stops(page: Any, backend: Luma) -> None:
    backend.received.clear()
    sent = backend.received
    box = page.locator("#quality").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.2 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], middle, steps=30)
    page.mouse.up()
    settle(page)
    assert 78 <= int(text(page, "#quality-text")) <= 82
    assert numbers(page)["level used"][1] == "jpeg-80"
    assert len(sent) <= 6


def test_the_keyboard_is_enough(page: Any) -> None:
    page.locator("#quality").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    settle(page)
    assert numbers(page)["estimated level"][1] == "jpeg-25"
    page.locator("#jpeg").focus()
    page.keyboard.press("ArrowRight")
    settle(page)
    assert text(page, "#sent-text").startswith("PNG")
    assert page.locator("#quality").is_disabled()
    button = page.locator("#legend button").first
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator("#legend button").first.get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.activeElement.closest('#legend') !== null")


def test_one_class_can_be_shown_alone_and_a_pixel_has_its_classes(page: Any) -> None:
    before = pixels(page, "adapted")
    page.locator("#legend button", has_text="light").click()
    alone = pixels(page, "adapted")
    assert not np.array_equal(alone, before)
    assert (np.ptp(alone.astype(int), axis=-1) == 0).mean() > 0.1  # the rest is grey
    page.locator("#legend button", has_text="light").click()
    assert np.array_equal(pixels(page, "adapted"), before)
    page.locator("#adapted").hover(position={"x": 5, "y": 5})
    assert any(name in text(page, "#pixel") for name in CLASS_NAMES)


def test_another_bundle_can_be_chosen(page: Any, backend: Luma) -> None:
    backend.received.clear()
    sent = backend.received
    assert page.locator("#bundle option").all_inner_texts() == list(BUNDLES)
    page.locator("#bundle").select_option("night:latest")
    settle(page)
    assert {headers["serve_multiplexed_model_id"] for _, headers in sent} == {"night:latest"}
    assert numbers(page)["release"][1] == "abababab…"


def test_the_problem_of_a_degraded_server_is_shown(page: Any, backend: Luma) -> None:
    backend.problem = "The store does not answer."
    page.evaluate("askHealth()")
    page.wait_for_selector("#health.degraded")
    assert "The store does not answer." in text(page, "#health")


def test_it_fits_wide_and_narrow_windows_light_and_dark(page: Any, tmp_path: Path) -> None:
    for name, width, scheme in (("wide", 1280, "light"), ("narrow", 390, "dark")):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_timeout(200)
        page.screenshot(path=tmp_path / f"page_{name}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.querySelectorAll('canvas')].every(c => c.getBoundingClientRect().width > 150)")


def test_every_control_has_a_name(page: Any) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button, canvas")].filter(e =>
            !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label"))).map(e => e.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("#error").get_attribute("role") == "alert"


# ---- a detector


class Boxes(Luma):
    """A backend that finds the left half of a frame, and adapted also its upper right quarter."""

    def task(self, bundle: str | None) -> Task:
        super().task(bundle)
        return task_by_name("detection")

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, media_type: str
    ) -> Prediction:
        height, width, _ = frame.pixels.shape
        boxes = np.array([[0, 0, width / 2, height], [width / 2, 0, width, height / 2]], np.float32)
        scores, labels = np.array([0.8, 0.4], np.float32), np.array([1, 3])
        found = 1 if level == "clean" else 2
        prediction = await super().predict(frame, level, stream, bundle, media_type)
        content = {"boxes": boxes[:found], "scores": scores[:found], "labels": labels[:found]}
        return replace(prediction, content=content, class_names=CLASS_NAMES)


@pytest.fixture(scope="module")
def detector() -> Iterator[tuple[str, Boxes]]:
    backend = Boxes()
    with serve(backend) as port:
        yield f"http://127.0.0.1:{port}/", backend


@pytest.fixture
def boxes(browser: Any, detector: tuple[str, Boxes]) -> Iterator[Any]:
    """The page of a detector."""
    detector[1].__init__()  # type: ignore[misc]
    with opened(browser, detector[0]) as page:
        yield page


def legend(page: Any) -> list[str]:
    return [" ".join(each.split("\n")) for each in page.locator("#legend button").all_inner_texts()]


def test_boxes_of_both_networks_are_shown_over_the_frame(boxes: Any, detector: tuple[str, Boxes]) -> None:
    first, second = detector[1].received
    assert first[0] == second[0]
    assert first[1]["accept"] == "application/json, image/png;q=0.9"
    frame = pixels(boxes, "sent")
    original, adapted = pixels(boxes, "original"), pixels(boxes, "adapted")
    zoom = original.shape[1] // frame.shape[1]
    assert original.shape == adapted.shape == (zoom * frame.shape[0], zoom * frame.shape[1], 3)
    plain = frame.repeat(zoom, 0).repeat(zoom, 1)
    height, width = frame.shape[0] * zoom, frame.shape[1] * zoom
    lower_right = (slice(height * 3 // 4, None), slice(width * 3 // 4, None))
    upper_right = (slice(height // 4), slice(width * 3 // 4, None))
    for shown in (original, adapted):
        assert np.array_equal(shown[lower_right], plain[lower_right])
    assert np.array_equal(original[upper_right], plain[upper_right])
    assert not np.array_equal(adapted[upper_right], plain[upper_right])
    assert legend(boxes) == ["dim 1 → 1", "bright 0 → 1"]
    assert text(boxes, "#changed") == "Detections: 1 by the original network, 2 by the adapted network."
    assert "bright 1" in boxes.locator("#adapted").get_attribute("aria-label")
    assert numbers(boxes)["level used"] == ("clean", "jpeg-10")
    assert not boxes.get_by_text("Blended").is_visible()


def test_the_score_slider_hides_boxes_without_asking_again(boxes: Any, detector: tuple[str, Boxes]) -> None:
    sent, before = len(detector[1].received), pixels(boxes, "adapted")
    assert text(boxes, "#score-text") == "0.30"
    boxes.locator("#score").fill("0.5")
    assert legend(boxes) == ["dim 1 → 1"]
    assert np.array_equal(pixels(boxes, "adapted"), pixels(boxes, "original"))
    boxes.locator("#score").fill("0.9")
    assert legend(boxes) == []
    boxes.locator("#score").fill("0.3")
    assert np.array_equal(pixels(boxes, "adapted"), before)
    boxes.wait_for_timeout(300)
    assert len(detector[1].received) == sent


def test_one_class_of_boxes_can_be_shown_alone_and_a_pixel_has_its_boxes(boxes: Any) -> None:
    boxes.locator("#adapted").hover(position={"x": 5, "y": 60})
    assert text(boxes, "#pixel").endswith("original network dim 0.80, adapted network dim 0.80.")
    boxes.locator("#legend button", has_text="bright").click()
    assert legend(boxes) == ["dim 1 → 1", "bright 0 → 1"]
    boxes.locator("#adapted").hover(position={"x": 5, "y": 60})
    assert text(boxes, "#pixel").endswith("original network nothing, adapted network nothing.")
    slide(boxes, "quality", 80)
    assert boxes.locator("#legend button[aria-pressed=true]").count() == 1


def test_a_page_of_class_maps_has_no_score_slider(page: Any) -> None:
    assert not page.locator("#score").is_visible()
    assert page.get_by_text("Blended").is_visible()
