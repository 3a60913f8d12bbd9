"""What a segment costs and earns at each configuration, and the streams that segments come from."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gearnn_ray import AdaptiveModel, Store, UserError
from gearnn_ray.core.events import Event
from gearnn_ray.data.scenes import CLASS_NAMES
from gearnn_ray.knobs.encoding import decode, encode, shown
from gearnn_ray.knobs.knob import knobs_of, settings_of
from gearnn_ray.knobs.methods import configurations_of
from gearnn_ray.knobs.objective import pixel_loss, probe_loss, signed_loss
from gearnn_ray.knobs.outcome import ADAPTED, NETWORKS, ORIGINAL, Judge, Outcomes, measured, outcomes
from gearnn_ray.knobs.saliency import gradient, saliency
from gearnn_ray.knobs.streams import Segment, folder_stream, generated_stream, video_stream
from gearnn_ray.tasks import task_by_name
from tests.nets import TRUST
from tests.served import publish
from tests.streams import encoded, moving

KNOBS = knobs_of(["crf=18,36", "size=1,0.5", "rate=1,2"])
SETTINGS = tuple(settings_of(KNOBS, values) for values in configurations_of(KNOBS))
SEGMENT = Segment(tuple(moving(4, 64, 80)), 10.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("store")))
    publish(store, "video", level_names=("h264-crf36", "h264-40x32"))
    return store


@pytest.fixture(scope="module")
def model(store: Store) -> AdaptiveModel:
    return AdaptiveModel.pull(store.uri, "video", trust=TRUST)


@pytest.fixture(scope="module")
def found(model: AdaptiveModel) -> dict[str, Outcomes]:
    return dict(zip(NETWORKS, measured(model, SEGMENT, SETTINGS, NETWORKS), strict=True))


def test_bytes_and_frames_are_those_of_the_encoding(found: dict[str, Outcomes]) -> None:
    for each in found.values():
        assert each.bytes == tuple(len(encode(SEGMENT.frames, settings).data) for settings in SETTINGS)
        assert each.sent == (4, 2) * 4


def test_a_network_agrees_with_itself_at_the_best_values(found: dict[str, Outcomes]) -> None:
    assert [each.agreement[0] for each in found.values()] == [100.0, 100.0]
    accuracies = found[ORIGINAL].accuracy
    assert accuracies[0] is not None
    assert all(each is not None and each <= accuracies[0] + 5 for each in accuracies)


def test_the_level_follows_the_settings(found: dict[str, Outcomes]) -> None:
    assert set(found[ORIGINAL].level) == {"clean"}
    levels = dict(zip(map(str, configurations_of(KNOBS)), found[ADAPTED].level, strict=True))
    assert levels["{'crf': 18, 'size': 1, 'rate': 1}"] == "clean"
    assert levels["{'crf': 36, 'size': 1, 'rate': 1}"] == "h264-crf36"
    assert levels["{'crf': 18, 'size': 0.5, 'rate': 2}"] == "h264-40x32"


def test_losses_are_those_of_the_objective(model: AdaptiveModel, found: dict[str, Outcomes]) -> None:
    pristine = np.stack(SEGMENT.frames)
    seen = [encode(SEGMENT.frames, settings) for settings in SETTINGS]
    views = [shown(each, SEGMENT.frames) for each in seen]
    at, of = 4, 5  # CRF 36 in full size, at which the adapted network has a level of its own
    forward = model.forward_at(["h264-crf36"])
    last = decode(seen[at])[-1]
    none = np.zeros(0, np.float32)
    assert found[ADAPTED].losses["pixels"][0][of] == pytest.approx(pixel_loss(none, pristine, views[of]))
    own = probe_loss(saliency(model.task, forward, last), pristine, views[of])
    assert found[ADAPTED].losses["saliency"][at][of] == pytest.approx(own, rel=1e-4)
    signed = signed_loss(gradient(model.task, forward, last), pristine, views[of])
    assert found[ADAPTED].losses["signed"][at][of] == pytest.approx(signed, rel=0.02, abs=1e-4)


def test_equal_pixels_have_equal_checksums(model: AdaptiveModel, found: dict[str, Outcomes]) -> None:
    assert len(set(found[ORIGINAL].shows)) == len(SETTINGS)
    still = Segment((SEGMENT.frames[0],) * 4, 10.0)
    knob = knobs_of(["filter-pixel=0,0.1,0.9"])
    (shown_,) = measured(model, still, [settings_of(knob, {"filter-pixel": value}) for value in (0.1, 0.9)], [ORIGINAL])
    assert shown_.sent == (1, 1)
    assert len(set(shown_.shows)) == 1


def test_outcomes_in_the_store_are_not_computed_again(
    store: Store, model: AdaptiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.manifest("video")[0]
    judge = Judge(store.uri, "video", digest, TRUST, "cpu", 1, (), ("crf=18,36", "size=1,0.5", "rate=1,2"), SETTINGS)
    first = outcomes(judge, SEGMENT, model, lambda _: None)
    events: list[Event] = []
    monkeypatch.setattr("gearnn_ray.knobs.outcome.measured", lambda *_: pytest.fail("computed again"))
    assert outcomes(judge, SEGMENT, model, events.append) == first
    assert [event.kind for event in events] == ["reused"]


def test_other_pixels_and_other_labels_are_another_segment() -> None:
    task, frames = task_by_name("segmentation"), SEGMENT.frames
    label = np.zeros((64, 80), np.uint8)
    segments = [
        SEGMENT,
        Segment(frames[::-1], 10.0),
        Segment(frames, 10.0, (label,) * 4),
        Segment(frames, 10.0, (label + 1,) * 4),
    ]
    assert len({segment.digest(task) for segment in segments}) == len(segments)
    assert SEGMENT.digest(task) == Segment(tuple(frame.copy() for frame in frames), 10.0).digest(task)


def written(folder: Path, frames: int, labels: bool = False) -> Path:
    (folder / "frames").mkdir(parents=True)
    (folder / "labels").mkdir()
    for number, frame in enumerate(moving(frames, 64, 80)):
        Image.fromarray(frame).save(folder / "frames" / f"{number:03d}.png")
        if labels:
            Image.fromarray(np.full((64, 80), number, np.uint8)).save(folder / "labels" / f"{number:03d}.png")
    return folder / "frames"


def test_a_folder_is_frames_in_the_order_of_their_names(tmp_path: Path) -> None:
    stream = folder_stream(written(tmp_path, 9), None, 10.0, 4, 3)
    segments = list(stream.segments())
    assert len(segments) == 2, "the rest of less than a segment is left out"
    assert not stream.has_labels
    assert all((a == b).all() for a, b in zip((f for s in segments for f in s.frames), moving(9, 64, 80), strict=False))


def test_label_values_that_are_no_class_are_ignored(tmp_path: Path) -> None:
    stream = folder_stream(written(tmp_path, 4, labels=True), tmp_path / "labels", 10.0, 4, 3)
    (segment,) = stream.segments()
    assert stream.has_labels
    assert segment.targets is not None
    assert [int(target[0, 0]) for target in segment.targets] == [0, 1, 2, 255]


def test_a_video_gives_so_many_frames_a_second(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(encoded(moving(25, 64, 80), container="mp4"))
    (whole,) = video_stream(str(path), 240, 25).segments()
    thinned = list(video_stream(str(path), whole.rate / 5, 5).segments())
    assert [(len(each.frames), each.rate) for each in thinned] == [(5, whole.rate / 5)]
    assert (thinned[0].frames[1] == whole.frames[5]).all()


@pytest.mark.parametrize("length", [10, 30])
def test_a_video_of_less_than_a_segment_is_refused(tmp_path: Path, length: int) -> None:
    folder = written(tmp_path, 5)
    with pytest.raises(UserError, match=f"frames has fewer than the {length} frames of a segment: give a longer video"):
        folder_stream(folder, None, 10.0, length, 3)


def test_generated_streets_are_for_releases_of_generated_scenes(store: Store) -> None:
    with pytest.raises(UserError, match="not trained on generated scenes"):
        generated_stream(store.manifest("video")[1], 10)


def test_each_seed_shows_other_streets_and_all_know_their_changes(store: Store) -> None:
    manifest = store.manifest("video")[1]
    manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update={"class_names": CLASS_NAMES})})
    streams = [generated_stream(manifest, 2, seed) for seed in range(2)]
    assert [stream.name for stream in streams] == ["generated", "generated-1"]
    first, second = (next(stream.segments()) for stream in streams)
    assert not np.array_equal(first.frames[0], second.frames[0])
    assert streams[0].changes == streams[1].changes != {}
