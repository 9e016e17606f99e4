"""The tracking loop: videos in memory, in folders and in files; benchmarks that are stopped, resumed, or mixed up."""

import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from companion import tracking
from companion.data import tracking as data
from companion.errors import BadParameter, CompanionError, CorruptFile
from companion.evaluation.metrics.tracking import iou
from companion.models.bat import BAT, HigherPeak, SingleStream
from companion.toy.datasets import tracking as pocket
from companion.toy.encoders import tracker
from companion.tracking import Frames, Track, follow, open_video, run, track
from companion.training.fit import Hardware
from tests.data.conftest import refused

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


def pocket_model(seed: int = 0, **options) -> BAT:
    torch.manual_seed(seed)
    return BAT(tracker.build(), std=0.01, fusion="mean", **options).eval()


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


def as_files(folder: Path, frames: list[np.ndarray], codec: str, suffix: str) -> list[Path]:
    """Two video files."""
    paths = []
    folder.mkdir(exist_ok=True)
    for name, part in STREAMS.items():
        paths.append(folder / f"{name}.{suffix}")
        writer = cv2.VideoWriter(str(paths[-1]), cv2.VideoWriter_fourcc(*codec), 25, frames[0].shape[1::-1])
        assert writer.isOpened()
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., part][..., ::-1]))
        writer.release()
    return paths


def sequence(folder: Path, name: str, frames: list[np.ndarray], boxes: np.ndarray) -> data.Sequence:
    """A video of a benchmark, with its files."""
    paths = (tuple(sorted(path.iterdir())) for path in on_disk(folder / name, frames))
    return data.Sequence(name, *paths, boxes, None, np.zeros(len(boxes), bool))


@pytest.fixture
def sequences(tmp_path, clips) -> list[data.Sequence]:
    return [sequence(tmp_path / "data", f"video{i}", *one) for i, one in enumerate(clips)]


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The folders that frames were read from, one entry per frame."""
    seen, original = [], data.read_frame

    def counting(visible, infrared):
        seen.append(Path(visible).parents[1].name)
        return original(visible, infrared)

    monkeypatch.setattr(data, "read_frame", counting)
    return seen


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("COMPANION_PROGRESS", "off")


def test_videos_together_are_the_videos_one_by_one(model, clips):
    videos, starts = [Frames(frames) for frames, _ in clips], [boxes[0] for _, boxes in clips]
    together = follow(model, videos, starts)
    assert [len(one.boxes) for one in together] == [8, 5, 7]
    for found, video, start in zip(together, videos, starts, strict=True):
        alone = follow(model, [video], [start])[0]
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)


def test_the_first_box_is_the_one_given_and_scores_are_scores(model, clips):
    frames, boxes = clips[0]
    found = follow(model, [Frames(frames)], [boxes[0].tolist()])[0]
    assert isinstance(found, Track) and found.boxes.dtype == np.float64
    np.testing.assert_array_equal(found.boxes[0], boxes[0])
    assert found.scores.shape == (8,) and found.scores[0] == 1
    assert ((found.scores > 0) & (found.scores < 1))[1:].all()
    one = follow(model, [Frames(frames[:1])], [boxes[0]])[0]
    assert one.boxes.shape == (1, 4) and one.scores.tolist() == [1]


MODELS = {
    "RGB": lambda: SingleStream(tracker.build(), 0),
    "thermal": lambda: SingleStream(tracker.build(), 1),
    "higher peak": lambda: HigherPeak(tracker.build()),
    "BAT": pocket_model,
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_clear_video_is_followed(kind):
    """By the shipped weights, over all 24 frames of three videos: the target moves by more than its own size."""
    whole = [clip(index, pocket.FRAMES) for index in (6, 8, 10)]
    tracks = follow(MODELS[kind](), [Frames(frames) for frames, _ in whole], [boxes[0] for _, boxes in whole])
    for found, (_, boxes) in zip(tracks, whole, strict=True):
        assert iou(boxes, np.tile(boxes[0], (len(boxes), 1))).mean() < 0.3, "standing still would do"
        assert iou(found.boxes, boxes).mean() > 0.5


def test_templates_are_embedded_once_and_searches_once_a_frame(clips):
    model, seen = pocket_model(), []
    model.tracker.vit.patch_embed.proj.register_forward_hook(lambda _, x, __: seen.append(tuple(x[0].shape)))
    follow(model, [Frames(frames) for frames, _ in clips], [boxes[0] for _, boxes in clips])
    # two streams of three videos; the shortest ends after 5 frames, the next after 7
    assert seen == [(6, 3, 32, 32)] + [(6, 3, 64, 64)] * 4 + [(4, 3, 64, 64)] * 2 + [(2, 3, 64, 64)]


def test_every_frame_after_the_first_is_read_once(model, sequences, read):
    follow(model, sequences[:1], [sequences[0].boxes[0]])
    assert len(read) - LENGTH <= 1  # the first one twice: its size, and its template


def test_the_window_lowers_peaks_away_from_the_last_position(model, clips):
    frames, boxes = clips[0]
    windowed, plain = (follow(model, [Frames(frames)], [boxes[0]], window=window)[0] for window in (True, False))
    assert (windowed.scores[1:] < plain.scores[1:]).mean() > 0.5


def test_a_model_in_training_mode_is_put_into_eval_mode(clips):
    model, (frames, boxes) = pocket_model().train(), clips[1]
    first, second = (follow(model, [Frames(frames)], [boxes[0]])[0] for _ in range(2))
    np.testing.assert_array_equal(first.boxes, second.boxes)
    assert not model.training and not any(p.is_inference() for p in model.parameters())


def test_half_precision_follows_alike(model, clips, expected):
    frames, boxes = clips[0]
    found = follow(model, [Frames(frames)], [boxes[0]], hardware=Hardware(precision="bf16-mixed"))[0]
    assert iou(found.boxes, expected).min() > 0.7


def test_the_boxes_of_a_lost_target_are_inside_the_image(model):
    noise = np.random.default_rng(0).integers(0, 255, (12, 60, 90, 6), dtype=np.uint8)
    boxes = follow(model, [Frames(list(noise))], [[70.0, 40, 15, 15]])[0].boxes
    assert np.isfinite(boxes).all() and (boxes[1:, 2:] >= 10).all() and (boxes[1:, :2] >= 0).all()
    assert (boxes[1:, :2] + boxes[1:, 2:] <= [90, 60]).all()


BAD = [[10, 10, 0, 5], [10, 10, 5, -5], [128, 10, 5, 5], [-20, 10, 20, 5], [10, 130, 5, 5], [np.nan, 10, 5, 5]]
BAD += [[10, 10, np.inf, 5], [10, 10, 5], [[10, 10, 5, 5]], ["left", 10, 5, 5], None]


@pytest.mark.parametrize("box", BAD, ids=str)
def test_bad_first_boxes(model, clips, box):
    refused(BadParameter, r"box = .*x, y, w, h in pixels.* 128 x 128", follow, model, [Frames(clips[0][0])], [box])


def test_a_bad_box_of_a_benchmark_names_the_video(model, sequences):
    absent = replace(sequences[1], boxes=np.zeros_like(sequences[1].boxes))
    with pytest.raises(BadParameter, match="box of video1"):
        follow(model, [sequences[0], absent], [s.boxes[0] for s in (sequences[0], absent)])


@pytest.mark.parametrize("count", [0, 1])
def test_a_box_for_each_video(model, clips, count):
    refused(BadParameter, "a box for each", follow, model, [Frames(clips[0][0])] * count, [])


def test_a_folder_gives_the_boxes_of_memory_and_a_result_file(tmp_path, model, clips, expected):
    frames, boxes = clips[0]
    found = track(*on_disk(tmp_path, frames), boxes[0], model, out=tmp_path / "boxes.txt").boxes
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "boxes.txt", delimiter=","), expected, atol=1e-4)


@pytest.mark.parametrize(("codec", "suffix", "least"), [("FFV1", "avi", 1), ("MJPG", "avi", 0.6), ("mp4v", "mp4", 0.6)])
def test_files_give_the_same_boxes_or_nearly_so_when_compressed(tmp_path, model, clips, expected, codec, suffix, least):
    frames, boxes = clips[0]
    found = track(*as_files(tmp_path, frames, codec, suffix), boxes[0], model).boxes
    assert found.shape == expected.shape and iou(found, expected).min() > least - 1e-9
    assert least < 1 or np.array_equal(found, expected)


def test_frames_are_ordered_by_their_numbers(tmp_path, clips):
    """frame10.png comes after frame9.png."""
    frames = [np.full((12, 12, 6), t, np.uint8) for t in range(12)]
    visible, infrared = on_disk(tmp_path, frames, "frame{}.png")
    (visible / "notes.txt").write_text("not an image")
    (visible / "._frame3.png").write_bytes(b"what macOS leaves beside a file")
    video = open_video(visible, infrared)
    assert [int(video.frame(i)[0, 0, 0]) for i in range(len(video))] == list(range(12))


def test_a_file_is_decoded_forwards(tmp_path, clips):
    video = open_video(*as_files(tmp_path, clips[0][0], "FFV1", "avi"))
    assert len(video) == LENGTH
    for i in (0, 0, 3, 3):
        np.testing.assert_array_equal(video.frame(i), clips[0][0][i])
    refused(BadParameter, "decoded forwards", video.frame, 1)
    np.testing.assert_array_equal(video.frame(3), clips[0][0][3])


def test_a_file_that_ends_early_is_refused(tmp_path, model, clips):
    frames, boxes = clips[0]
    visible, _ = as_files(tmp_path, frames, "FFV1", "avi")
    _, infrared = as_files(tmp_path / "short", frames[:5], "FFV1", "avi")
    refused(CorruptFile, "it ends early", track, visible, infrared, boxes[0], model)


def test_folders_of_unequal_length(tmp_path, clips):
    visible, infrared = on_disk(tmp_path, clips[0][0])
    for change, said in (
        ([infrared / "000003.png"], r"infrared = .*8 images.*it has 7"),
        (visible.iterdir(), r"visible = .*a folder with images"),
    ):
        for path in change:
            path.unlink()
        refused(BadParameter, said, open_video, visible, infrared)


def test_streams_of_unequal_size_and_a_damaged_image(tmp_path, model, clips):
    frames, boxes = clips[0]
    visible, infrared = on_disk(tmp_path, frames)
    Image.new("RGB", (64, 64)).save(infrared / "000004.png")
    refused(CorruptFile, r"000004\.png.*64x64.*128x128", track, visible, infrared, boxes[0], model)
    broken = infrared / "000002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(CorruptFile) as caught:
        track(visible, infrared, boxes[0], model, out=tmp_path / "boxes.txt")
    assert caught.value.path == broken and not (tmp_path / "boxes.txt").exists()
    first, _ = as_files(tmp_path, frames, "FFV1", "avi")
    _, second = as_files(tmp_path / "small", [frame[:64] for frame in frames], "FFV1", "avi")
    refused(BadParameter, r"infrared = .*frames of \(128, 128\) pixels", track, first, second, boxes[0], model)


def test_paths_that_do_not_fit(tmp_path, clips):
    visible, infrared = on_disk(tmp_path, clips[1][0])
    file = as_files(tmp_path, clips[1][0], "FFV1", "avi")[0]
    for pair, said in (
        ((tmp_path / "nowhere", infrared), r"visible = '.*nowhere' .*that exists"),
        ((file, tmp_path / "nowhere.mp4"), r"infrared = '.*nowhere\.mp4'"),
        ((visible, file), "a folder when `visible` is one"),
        ((file, infrared), "a folder when `visible` is one"),
    ):
        refused(BadParameter, said, open_video, *pair)


def test_files_that_cannot_be_decoded(tmp_path, model, clips):
    frames, boxes = clips[0]
    visible, infrared = as_files(tmp_path, frames, "MJPG", "avi")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(CorruptFile, match="OpenCV can decode") as caught:
        open_video(visible, tmp_path / "text.mp4")
    assert caught.value.path == tmp_path / "text.mp4"
    # its index has 8 frames, half of them exist
    cut = tmp_path / "cut.avi"
    cut.write_bytes(infrared.read_bytes()[: infrared.stat().st_size // 2])
    with pytest.raises(CorruptFile, match=r"frame \d of 8 cannot be decoded") as caught:
        track(visible, cut, boxes[0], model)
    assert caught.value.path == cut


@pytest.mark.parametrize("together", [1, 2, 5])
def test_results_are_in_the_toolkits_format(tmp_path, model, sequences, together):
    found = run(model, sequences, tmp_path / "out", together=together)
    assert list(found) == ["video0", "video1", "video2"]
    again = data.read_results(tmp_path / "out")
    for one in sequences:
        expected = follow(model, [one], [one.boxes[0]])[0].boxes
        np.testing.assert_allclose(found[one.name], expected, atol=2e-3)
        text = (tmp_path / "out" / f"{one.name}.txt").read_text()
        assert re.fullmatch(r"(-?\d+\.\d{4}(,-?\d+\.\d{4}){3}\n)+", text) and text.count("\n") == len(one)
        np.testing.assert_array_equal(again[one.name], found[one.name])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tracker.json", *(f"{n}.txt" for n in found)]


def test_finished_sequences_are_not_tracked_again(tmp_path, model, sequences, read, monkeypatch):
    names = []
    monkeypatch.setattr(tracking, "progress", lambda items, name, *_: names.append(name) or items)
    first = run(model, sequences[:2], tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.txt")}
    read.clear()
    found = run(model, sequences, tmp_path / "out")
    assert set(read) == {"video2"}
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert all(np.array_equal(found[name], first[name]) for name in first)
    assert names == ["video0 (1 of 2)", "video1 (2 of 2)", "video2 (3 of 3)"]  # which one, and how many are done
    read.clear()
    run(model, sequences, tmp_path / "out")
    assert not read


@pytest.mark.parametrize("damage", [lambda t: t[:-9], lambda t: t[: len(t) // 2], lambda t: "", lambda t: t + t])
def test_a_file_of_another_length_is_written_again(tmp_path, model, sequences, read, damage):
    whole = run(model, sequences, tmp_path / "out")
    path = tmp_path / "out" / "video1.txt"
    path.write_text(damage(path.read_text()))
    read.clear()
    found = run(model, sequences, tmp_path / "out")
    assert set(read) == {"video1"}
    np.testing.assert_array_equal(found["video1"], whole["video1"])


def test_an_error_keeps_what_is_finished(tmp_path, model, sequences, read):
    broken = sequences[1].infrared[3]
    content = broken.read_bytes()
    broken.write_bytes(b"")
    refused(CorruptFile, broken.name, run, model, sequences, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tracker.json", "video0.txt"]
    broken.write_bytes(content)
    read.clear()
    run(model, sequences, tmp_path / "out")
    assert set(read) == {"video1", "video2"}


def test_stopped_while_it_writes_leaves_no_half_file(tmp_path, model, sequences, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        savetxt = np.savetxt

        def halfway(path, rows, **options):
            savetxt(path, rows[: 3 if len(rows) == 5 else None], **options)
            if len(rows) == 5:
                raise KeyboardInterrupt

        patch.setattr(data.np, "savetxt", halfway)
        run(model, sequences, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tracker.json", "video0.txt"}
    assert [len(boxes) for boxes in run(model, sequences, tmp_path / "out").values()] == [8, 5, 7]


@pytest.mark.parametrize(
    ("first", "second", "options"),
    [
        (pocket_model, lambda: pocket_model(seed=1), {}),
        (pocket_model, lambda: BAT(tracker.build(), std=0.01), {}),  # another fusion
        (MODELS["RGB"], MODELS["higher peak"], {}),
        # the same tensors: RGB alone and thermal alone, one direction and the other
        (MODELS["RGB"], MODELS["thermal"], {}),
        (*(lambda d=d: pocket_model(directions=d) for d in ("first to second", "second to first")), {}),
        (pocket_model, pocket_model, {"window": False}),
    ],
    ids=["seed", "fusion", "kind", "stream", "direction", "window"],
)
def test_results_of_another_model_or_way_are_refused(tmp_path, sequences, first, second, options):
    run(first(), sequences[1:2], tmp_path / "out")
    run(first(), sequences[1:2], tmp_path / "out")  # the same weights, built again
    refused(BadParameter, "another model's", run, second(), sequences[1:2], tmp_path / "out", **options)


def test_an_option_that_saves_memory_is_no_other_model(tmp_path, model, sequences):
    found = run(model, sequences[1:2], tmp_path / "out")
    model.set_grad_checkpointing(True)
    again = run(model, sequences[1:2], tmp_path / "out")
    assert np.array_equal(found["video1"], again["video1"])


def test_a_folder_of_other_results_is_refused(tmp_path, model, sequences):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "video0.txt").write_text("1,2,3,4\n")
    refused(BadParameter, r"without a tracker\.json", run, model, sequences, tmp_path / "out")
    assert (tmp_path / "out" / "video0.txt").read_text() == "1,2,3,4\n"
    (tmp_path / "out" / "tracker.json").write_text("{")
    refused(CorruptFile, r"tracker\.json", run, model, sequences, tmp_path / "out")


def test_ground_truth_alone_cannot_be_followed(tmp_path, model):
    boxes = np.array([[1.0, 2, 3, 4]] * 3)
    bare = data.Sequence("bare", (), (), boxes, None, np.zeros(3, bool))
    refused(CompanionError, "only the ground truth of 'bare'", run, model, [bare], tmp_path / "out")
