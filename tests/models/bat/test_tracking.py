"""The tracking loop: videos in memory, in folders and in files; benchmarks that are stopped, resumed, or mixed up."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from companion.data import tracking as data
from companion.errors import CorruptFile
from companion.models.bat import BAT, SingleStream, tracking
from companion.models.bat.tracking import Frames, follow, open_video, run, track
from companion.toy import bat as pocket
from companion.toy.bat import OneDirection
from companion.toy.encoders import tracker
from tests.models.common import refuses

LENGTH = 8


def clip(index: int = 6, length: int = LENGTH) -> tuple[list[np.ndarray], np.ndarray]:
    """A pocket video in which both streams are clear throughout: frames (128, 128, 6), boxes (n, 4)."""
    plan = pocket.plan("test", index)
    none = np.zeros(pocket.FRAMES)
    plan = replace(plan, dark=none, glare=none, crossover=none)
    rng = np.random.default_rng(index)
    drawn = [[draw(plan, t, rng) for draw in (pocket.draw_visible, pocket.draw_infrared)] for t in range(length)]
    return [np.concatenate(pair, 2) for pair in drawn], plan.boxes()[:length]


@pytest.fixture(scope="module")
def clips() -> list[tuple[list[np.ndarray], np.ndarray]]:
    """Three clear videos of 8, 5 and 7 frames."""
    return [clip(6), clip(7, 5), clip(9, 7)]


def pocket_model(seed: int = 0, kind: type[BAT] = BAT, **options) -> BAT:
    torch.manual_seed(seed)
    return kind(tracker.build(), std=0.01, **options).eval()


@pytest.fixture(scope="module")
def model() -> BAT:
    return pocket_model()


@pytest.fixture(scope="module")
def expected(model, clips) -> np.ndarray:
    """The boxes of the first video, tracked from memory."""
    frames, boxes = clips[0]
    return follow(model, [Frames(frames)], [boxes[0]])[0].boxes


STREAMS = {"visible": slice(0, 3), "infrared": slice(3, 6)}


def on_disk(folder: Path, frames: list[np.ndarray], pattern: str = "{:06d}.png") -> tuple[Path, Path]:
    """Two folders of images."""
    for name, part in STREAMS.items():
        (folder / name).mkdir(parents=True)
        for t, frame in enumerate(frames):
            Image.fromarray(frame[..., part]).save(folder / name / pattern.format(t))
    return folder / "visible", folder / "infrared"


def as_files(folder: Path, frames: list[np.ndarray]) -> list[Path]:
    """Two video files, compressed without loss."""
    paths = []
    folder.mkdir(exist_ok=True)
    for name, part in STREAMS.items():
        paths.append(folder / f"{name}.avi")
        writer = cv2.VideoWriter(str(paths[-1]), cv2.VideoWriter_fourcc(*"FFV1"), 25, frames[0].shape[1::-1])
        assert writer.isOpened()
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., part][..., ::-1]))
        writer.release()
    return paths


def sequence(folder: Path, name: str, frames: list[np.ndarray], boxes: np.ndarray) -> data.Video:
    """A video of a benchmark, with its files."""
    paths = (tuple(sorted(path.iterdir())) for path in on_disk(folder / name, frames))
    return data.Video(name, *paths, boxes, None, np.zeros(len(boxes), bool))


@pytest.fixture
def sequences(tmp_path, clips) -> list[data.Video]:
    return [sequence(tmp_path / "data", f"video{i}", *one) for i, one in enumerate(clips)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("COMPANION_PROGRESS", "off")


def test_videos_together_are_the_videos_one_by_one(model, clips):
    videos, starts = [Frames(frames) for frames, _ in clips], [boxes[0] for _, boxes in clips]
    together = follow(model, videos, starts)
    assert [len(one.boxes) for one in together] == [8, 5, 7]
    for found, video, start in zip(together, videos, starts, strict=True):
        alone = follow(model, [video], [start.tolist()])[0]
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-2)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-4)
        np.testing.assert_array_equal(found.boxes[0], start)
        assert found.scores[0] == 1 and ((found.scores > 0) & (found.scores < 1))[1:].all()


def test_a_lost_target_stays_inside_the_image(model):
    noise = np.random.default_rng(0).integers(0, 255, (12, 60, 90, 6), dtype=np.uint8)
    found = follow(model, [Frames(list(noise))], [[70.0, 40, 15, 15]])[0].boxes
    assert np.isfinite(found).all() and (found[1:, 2:] >= 10).all() and (found[1:, :2] >= 0).all()
    assert (found[1:, :2] + found[1:, 2:] <= [90, 60]).all()


def test_first_boxes_without_a_target_are_refused(model, clips, sequences):
    video = Frames(clips[0][0])
    bad = [[10, 10, 0, 5], [128, 10, 5, 5], [-20, 10, 20, 5], [np.nan, 10, 5, 5], [10, 10, 5], None]
    refuses(*((lambda box=box: follow(model, [video], [box]), "box = .* 128 x 128") for box in bad))
    assert len(follow(model, [video], [[10, 10, 1, 1]])[0].boxes) == len(clips[0][0])  # a pixel is a target
    absent = replace(sequences[1], boxes=np.zeros_like(sequences[1].boxes))
    refuses(
        (lambda: follow(model, [video], []), "boxes"),
        (lambda: follow(model, [sequences[0], absent], [s.boxes[0] for s in (sequences[0], absent)]), "video1"),
    )


# --- videos on disk ---------------------------------------------------------------------------------------------------


def test_folders_and_files_give_the_boxes_of_memory_and_a_result_file(tmp_path, model, clips, expected):
    frames, boxes = clips[0]
    for paths in (on_disk(tmp_path, frames), as_files(tmp_path, frames)):
        found = track(*paths, boxes[0], model, out=tmp_path / "boxes.txt").boxes
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(np.loadtxt(tmp_path / "boxes.txt", delimiter=","), expected, atol=1e-4)
    video = open_video(*paths)
    assert len(video) == LENGTH
    for i in (0, 0, 3, 3):
        np.testing.assert_array_equal(video.frame(i), frames[i])
    refuses((lambda: video.frame(1), "frame = 1"))  # decoded forwards


def test_a_video_with_boxes_and_the_eight_numbers_of_a_toolkit(tmp_path, model, clips, expected):
    frames, boxes = clips[0]
    folders = on_disk(tmp_path, frames)
    track(*folders, boxes[0], model, tmp_path / "a.txt", box_type="corner", video=tmp_path / "out.mp4")
    rows = np.loadtxt(tmp_path / "a.txt", delimiter=",")
    np.testing.assert_allclose(rows[:, 4:6], expected[:, :2] + expected[:, 2:], atol=1e-3)
    np.testing.assert_allclose(data.read_results(tmp_path, ["a"], box_type="corner")["a"], expected, atol=1)
    shown = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    height, width = frames[0].shape[:2]
    assert shown.get(cv2.CAP_PROP_FRAME_COUNT) == len(frames) and shown.read()[1].shape == (height, 2 * width, 3)


def test_two_cameras_are_a_video(tmp_path, model, clips, expected, monkeypatch):
    class Camera:
        def __init__(self, number):
            self.images = iter([frame[..., 3 * number : 3 * number + 3][..., ::-1] for frame in clips[0][0]])

        def isOpened(self):
            return True

        def read(self):
            return True, np.ascontiguousarray(next(self.images))

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    boxes = clips[0][1]
    found = track(0, 1, boxes[0], model, video=tmp_path / "out.mp4", frames=len(boxes))
    np.testing.assert_array_equal(found.boxes, expected)


def test_frames_are_ordered_by_their_numbers(tmp_path):
    """frame10.png comes after frame9.png."""
    frames = [np.full((12, 12, 6), t, np.uint8) for t in range(12)]
    visible, infrared = on_disk(tmp_path, frames, "frame{}.png")
    (visible / "notes.txt").write_text("not an image")
    (visible / "._frame3.png").write_bytes(b"what macOS leaves beside a file")
    video = open_video(visible, infrared)
    assert [int(video.frame(i)[0, 0, 0]) for i in range(len(video))] == list(range(12))


def test_streams_that_do_not_fit_or_cannot_be_decoded_are_refused(tmp_path, model, clips):
    frames, boxes = clips[0]
    visible, infrared = on_disk(tmp_path, frames)
    first, second = as_files(tmp_path, frames)
    _, short = as_files(tmp_path / "short", frames[:5])
    _, small = as_files(tmp_path / "small", [frame[:64] for frame in frames])
    (cut := tmp_path / "cut.avi").write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    out = tmp_path / "boxes.txt"

    def tracked(*pair):
        return lambda: track(*pair, boxes[0], model, out=out)

    refuses(
        (lambda: open_video(tmp_path / "nowhere", infrared), "visible = .*nowhere"),
        (lambda: open_video(visible, second), r"infrared = .*infrared\.avi"),
        (tracked(first, small), r"infrared = .*\(128, 128\)"),
    )
    refuses((tracked(first, short), r"short/infrared\.avi"), (tracked(first, cut), r"cut\.avi"), error=CorruptFile)
    Image.new("RGB", (64, 64)).save(infrared / "000004.png")
    refuses((tracked(visible, infrared), r"000004\.png.*64x64.*128x128"), error=CorruptFile)
    (infrared / "000004.png").unlink()
    refuses((tracked(visible, infrared), "infrared = .*8 .* 7"))
    assert not out.exists()


# --- benchmarks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 2])
def test_results_are_in_the_toolkits_format(tmp_path, model, sequences, together):
    found = run(model, sequences, tmp_path / "out", together=together)
    assert list(found) == ["video0", "video1", "video2"]
    for one in sequences:
        expected = follow(model, [one], [one.boxes[0]])[0].boxes
        np.testing.assert_allclose(found[one.name], expected, atol=1e-2)
        written = np.loadtxt(tmp_path / "out" / f"{one.name}.txt", delimiter=",")
        assert len(written) == len(one)
        np.testing.assert_array_equal(written, found[one.name])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tracker.json", *(f"{n}.txt" for n in found)]


@pytest.mark.parametrize(("frames", "parts"), [(1000, [3]), (0, [1, 1, 1]), (-1, [2, 1])])
def test_a_kill_costs_the_frames_of_one_batch(frames, parts, tmp_path, model, sequences, monkeypatch):
    """-1: those of the two shorter sequences."""
    lengths, tracked = sorted(map(len, sequences)), []
    monkeypatch.setattr(tracking, "FRAMES", frames if frames >= 0 else sum(lengths[:2]))
    monkeypatch.setattr(
        tracking, "follow", lambda model, part, *a, **o: tracked.append(len(part)) or follow(model, part, *a, **o)
    )
    run(model, sequences, tmp_path / "out", together=3)
    assert tracked == parts


def test_finished_sequences_are_read_and_an_error_leaves_them(tmp_path, model, sequences, monkeypatch):
    """A file of another length, such as half a one, is written again."""

    def counting(visible, infrared):
        read.add(Path(visible).parents[1].name)
        return original(visible, infrared)

    read, original = set(), data.read_frame
    monkeypatch.setattr(data, "read_frame", counting)
    broken = sequences[1].infrared[3]
    content = broken.read_bytes()
    broken.write_bytes(b"")
    refuses((lambda: run(model, sequences, tmp_path / "out"), broken.name), error=CorruptFile)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tracker.json", "video0.txt"}
    broken.write_bytes(content)
    whole, path = None, tmp_path / "out" / "video1.txt"
    for expected in ({"video1", "video2"}, set(), {"video1"}):
        read.clear()
        found = run(model, sequences, tmp_path / "out")
        assert read == expected and all(np.array_equal(found[name], (whole or found)[name]) for name in found)
        if whole:
            path.write_text(path.read_text()[:-9])
        whole = whole or found


def test_results_of_other_models_are_not_reused(tmp_path, sequences):
    """Nor of those with the same tensors: RGB alone and thermal alone, one direction and the other."""
    one_way, other_way = (lambda into=into: pocket_model(kind=OneDirection, into=into) for into in (0, 1))
    rgb, thermal = (lambda stream=stream: SingleStream(tracker.build(), stream) for stream in (0, 1))
    others = ((pocket_model, lambda: pocket_model(seed=1)), (rgb, thermal), (one_way, other_way))
    for i, (first, second) in enumerate(others):
        folder = tmp_path / f"out{i}"
        run(first(), sequences[1:2], folder)
        run(first(), sequences[1:2], folder)  # the same weights, built again
        refuses((lambda: run(second(), sequences[1:2], folder), folder.name))  # noqa: B023
    (tmp_path / "out0" / "tracker.json").unlink()
    refuses((lambda: run(pocket_model(), sequences[1:2], tmp_path / "out0"), r"tracker\.json"))
