"""Opening videos: files, web sites, playlists and cameras, and what is not opened."""

import os
import resource
import threading
import time
from pathlib import Path

import pytest

from gearnn_ray.video.decoding import VideoFrame, decoded
from gearnn_ray.video.reading import Reader, pauses
from gearnn_ray.video.sources import SourceError, _reads_dash, is_live, open_source
from tests.streams import Camera, access_units, encoded, moving, number_of, transport_stream, web_site
from tests.test_segments import claiming


def frames_of(address: str, hosts: tuple[str, ...] = ()) -> list[VideoFrame]:
    source = open_source(address, hosts)
    try:
        return list(decoded(source.container))
    finally:
        source.close()


def numbers(frames: list[VideoFrame]) -> list[int]:
    return [number_of(frame.pixels) for frame in frames]


@pytest.mark.parametrize("name", ["film.mp4", "a film: with spaces #1.mp4", "x:y.mp4"])
def test_a_file_is_read_by_its_path(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(encoded(moving(8)))
    assert numbers(frames_of(str(tmp_path / name))) == list(range(8))


def test_a_file_is_read_by_its_file_address(tmp_path: Path) -> None:
    (tmp_path / "a film.mp4").write_bytes(encoded(moving(4)))
    assert numbers(frames_of((tmp_path / "a film.mp4").as_uri())) == list(range(4))


def test_a_file_that_is_still_written_is_followed_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "growing.ts"
    data = encoded(moving(24), container="mpegts", g=4)
    path.write_bytes(data[: len(data) // 3])

    def write_the_rest() -> None:
        with open(path, "ab") as file:
            for start in range(len(data) // 3, len(data), 8000):
                time.sleep(0.02)
                file.write(data[start : start + 8000])
                file.flush()

    writer = threading.Thread(target=write_the_rest)
    writer.start()
    assert numbers(frames_of(str(path))) == list(range(24))
    writer.join()


def test_a_film_over_http_whose_index_is_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(encoded(moving(8)))
    with web_site(tmp_path) as (site, asked):
        assert numbers(frames_of(f"{site}/film.mp4")) == list(range(8))
    assert set(asked) == {"/film.mp4"}


def playlist(folder: Path, renditions: dict[str, list[tuple[int, int]]]) -> None:
    """An HLS playlist for each name: segments of six frames, each of the height and width given."""
    for name, sizes in renditions.items():
        lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:1"]
        for number, (height, width) in enumerate(sizes):
            shot = moving(6, height, width, seed=number)
            (folder / f"{name}{number}.ts").write_bytes(encoded(shot, container="mpegts", start=6 * number))
            lines += ["#EXTINF:0.6,", f"{name}{number}.ts"]
        (folder / f"{name}.m3u8").write_text("\n".join([*lines, "#EXT-X-ENDLIST", ""]))


def test_a_playlist_whose_client_switches_renditions(tmp_path: Path) -> None:
    playlist(tmp_path, {"live": [(96, 128), (48, 64), (72, 96)]})
    with web_site(tmp_path) as (site, _):
        frames = frames_of(f"{site}/live.m3u8")
    assert [frame.pixels.shape[:2] for frame in frames] == [(96, 128)] * 6 + [(48, 64)] * 6 + [(72, 96)] * 6
    assert numbers(frames) == list(range(6)) * 3


def test_a_playlist_of_a_folder_names_files_of_that_folder(tmp_path: Path) -> None:
    playlist(tmp_path, {"local": [(48, 64)]})
    assert len(frames_of(str(tmp_path / "local.m3u8"))) == 6


@pytest.mark.parametrize("inside", ["file:///etc/hostname", "http://127.0.0.2:9/secret.ts", "../outside.ts"])
@pytest.mark.parametrize("over_http", [False, True])
def test_a_playlist_opens_nothing_else(tmp_path: Path, inside: str, over_http: bool) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (tmp_path / "outside.ts").write_bytes(encoded(moving(6), container="mpegts"))
    (folder / "bad.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{inside}\n#EXT-X-ENDLIST\n")
    with web_site(folder) as (site, asked):
        address = f"{site}/bad.m3u8" if over_http else str(folder / "bad.m3u8")
        reader = Reader(address, "all")
        with pytest.raises(SourceError) as error:
            list(reader)
        assert "\n" not in str(error.value)
    assert {path for path in asked if "bad.m3u8" not in path} <= {"/outside.ts"}  # where .. ends at the site's root


def test_a_host_that_the_operator_allows(tmp_path: Path) -> None:
    playlist(tmp_path, {"live": [(48, 64)]})
    with web_site(tmp_path) as (site, asked):
        segment = site.replace("127.0.0.1", "localhost") + "/live0.ts"
        (tmp_path / "other.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{segment}\n#EXT-X-ENDLIST\n")
        reader = Reader(f"{site}/other.m3u8", "all")
        with pytest.raises(SourceError, match="localhost"):
            list(reader)
        assert "/live0.ts" not in asked
        assert len(frames_of(f"{site}/other.m3u8", hosts=("localhost",))) == 6


def test_a_picture_too_large_is_refused_before_memory_is_allocated_for_it(tmp_path: Path) -> None:
    path = tmp_path / "film.h264"
    path.write_bytes(claiming(16_000, 16_000))
    os.utime(path, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceError, match="16000 × 16000"):
        frames_of(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "KB"


@pytest.mark.skipif(_reads_dash(), reason="this FFmpeg reads DASH")
def test_a_dash_manifest_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "film.mpd").write_text('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>')
    with pytest.raises(SourceError, match="built without libxml2"):
        frames_of(str(tmp_path / "film.mpd"))


def test_a_camera_that_sends_garbage_goes_on_with_its_next_keyframe() -> None:
    units = access_units(moving(20))
    garbage = [b"\0\0\0\1\x65" + os.urandom(400), b"\0\0\0\1\x41" + os.urandom(400), b"\0\0\0\1\x1f" + os.urandom(50)]
    with Camera([*units[:8], *garbage, *units[10:]]) as camera:
        seen = numbers(frames_of(camera.url))
    assert seen[:8] == list(range(8))
    assert seen[-5:] == list(range(15, 20))


def test_a_camera_over_rtsp(tmp_path: Path) -> None:
    with Camera(access_units(moving(12))) as camera:
        frames = frames_of(camera.url)
    assert numbers(frames) == list(range(12))
    assert all(frame.evidence.qp is not None for frame in frames)


def test_a_camera_that_stops_and_comes_back_is_read_again() -> None:
    camera = Camera(access_units(moving(6)), seconds_per_frame=0.02).start()
    reader = Reader(camera.url, "all", again=True)
    assert reader.take(1, seconds=10)
    camera.stop()
    deadline = time.monotonic() + 20
    while reader.problem is None and time.monotonic() < deadline:
        reader.take(4, seconds=0.1)
    assert reader.problem, "a camera without power is offline"
    camera.start()
    assert reader.take(1, seconds=20)
    assert reader.problem is None
    reader.close()
    camera.stop()


def test_a_camera_that_changes_its_codec_and_size_is_read_on() -> None:
    camera = Camera(access_units(moving(40)), seconds_per_frame=0.02).start()
    reader = Reader(camera.url, "all", again=True)
    assert reader.take(1, seconds=10)[0].pixels.shape == (48, 64, 3)
    camera.stop()
    camera.packets, camera.codec = access_units(moving(200, 96, 128), "libx265"), "H265"
    camera.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if any(frame.pixels.shape == (96, 128, 3) for frame in reader.take(4, seconds=0.2)):
            break
    else:
        pytest.fail("no frame of the new codec")
    reader.close()
    camera.stop()


def test_a_reader_says_when_a_frame_has_arrived(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(encoded(moving(3)))
    arrived = threading.Semaphore(0)
    reader = Reader(str(tmp_path / "film.mp4"), "all", arrived=arrived.release)
    for number in range(3):
        assert arrived.acquire(timeout=10)
        assert numbers(reader.take(1, seconds=0)) == [number], "it is there at once"
    reader.close()


def test_pauses_grow_to_half_a_minute() -> None:
    waits = pauses()
    assert [next(waits) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]


def test_the_newest_frame_counts_where_the_source_is_faster(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(encoded(moving(24)))
    reader = Reader(str(tmp_path / "film.mp4"), "newest")
    deadline = time.monotonic() + 10
    while reader.dropped < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    batch = reader.take()
    assert numbers(batch) == [23]
    assert reader.dropped == 23
    assert reader.take() == []
    assert reader.ended


def test_all_frames_count_where_the_source_waits(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(encoded(moving(24)))
    seen = []
    for batch in Reader(str(tmp_path / "film.mp4"), "all"):
        time.sleep(0.01)
        assert len(batch) <= 4
        seen += batch
    assert numbers(seen) == list(range(24))


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("/nowhere/film.mp4", "does not exist"),
        ("udp://127.0.0.1:9", "begins with udp"),
        ("concat:a.mp4", "begins with concat"),
        ("http://127.0.0.1:9/film.mp4", "cannot be opened (connection refused)"),
        ("rtsp://127.0.0.1:9/camera", "cannot be opened"),
        ("/dev/video99", "cannot be opened"),
        (os.sep, "is a folder"),
    ],
)
def test_what_cannot_be_opened_says_so_in_one_sentence(address: str, says: str) -> None:
    with pytest.raises(SourceError) as error:
        open_source(address)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no video", b"\xff\xd8\xff\xe0" + bytes(100), bytes(5000)], ids=len)
def test_a_file_that_is_no_video(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(content)
    os.utime(path, (0, 0))
    with pytest.raises(SourceError):
        frames_of(str(path))


def test_a_list_of_other_files_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(encoded(moving(4)))
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile film.mp4\n")
    os.utime(tmp_path / "list.txt", (0, 0))
    with pytest.raises(SourceError):
        frames_of(str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("address", "live"), [("rtsp://a/b", True), ("/dev/video0", True), ("a.mp4", False), ("http://a/b", False)]
)
def test_a_camera_is_live(address: str, live: bool) -> None:
    assert is_live(address) is live


def test_a_stream_that_changes_its_size(tmp_path: Path) -> None:
    path = tmp_path / "abr.ts"
    path.write_bytes(transport_stream([moving(5), moving(5, 96, 128), moving(5, 50, 66)]))
    os.utime(path, (0, 0))
    frames = frames_of(str(path))
    assert [frame.pixels.shape[:2] for frame in frames] == [(48, 64)] * 5 + [(96, 128)] * 5 + [(50, 66)] * 5
