"""Tracking through a video: the test-time loop of the OSTrack family, on folders, video files or frames in memory.

    track = follow(model, [video], [box])[0]                 one video, or several as one batch
    run(model, sequences, "results/BAT")                     a benchmark: one text file per sequence; resumes
    track("visible.mp4", "thermal.mp4", box, model)          your own pair of files, folders or cameras

The first frame's box is given. In each next frame the tracker searches around the last box, in a crop of four times its
width; the score map is weighted by a Hann window; the template is never updated (SparkTempest/BAT, lib/test/tracker).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from ...data.tracking import read_frame, read_results, write_results
from ...errors import BadParameter, CompanionError, CorruptFile, extra
from ...io.config import config_of
from ...io.files import atomic, read_json, write_json
from ...io.progress import progress
from ...training.checkpoints import checkpoint_key
from ...training.hardware import Hardware, evaluating
from .crops import box_from_crop, clip_box, crop, normalise
from .ostrack import decode, hann

with extra("tracking"):
    import cv2

TEMPLATE_FACTOR, SEARCH_FACTOR = 2.0, 4.0
FRAMES = 20_000  # of the videos of a batch
READERS = 8  # threads that read the next frames of several videos
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


class Video(Protocol):
    """A video to track in: frames (H, W, 6) uint8, RGB and then the second stream, read in order."""

    def __len__(self) -> int: ...

    def frame(self, i: int) -> np.ndarray: ...


class Track(NamedTuple):
    """Boxes (n, 4) x, y, w, h in pixels, the first as given, and scores (n,): the windowed peaks, 1 at first."""

    boxes: np.ndarray
    scores: np.ndarray


class Frames:
    """Frames in memory as a `Video`."""

    def __init__(self, frames: Sequence[Any]):
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, i: int) -> np.ndarray:
        """Frame `i`, (H, W, 6) uint8."""
        return self.frames[i]


class Folders(Frames):
    """Two folders of images as a `Video`, paired in the order of the numbers in their names."""

    def __init__(self, visible: str | Path, infrared: str | Path):
        rgb, thermal = _images(visible), _images(infrared)
        if not rgb:
            raise BadParameter("visible", str(visible), f"a folder with images ({', '.join(IMAGES)})")
        if len(rgb) != len(thermal):
            accepted = f"a folder of {len(rgb)} images, as many as {visible} has; it has {len(thermal)}"
            raise BadParameter("infrared", str(infrared), accepted)
        super().__init__(list(zip(rgb, thermal, strict=True)))

    def frame(self, i: int) -> np.ndarray:
        return read_frame(*self.frames[i])


class Files:
    """Two video files as a `Video`, decoded frame by frame, so frames are read in order."""

    def __init__(self, visible: str | Path, infrared: str | Path):
        self.paths = Path(visible), Path(infrared)
        self._open = [cv2.VideoCapture(str(path)) for path in self.paths]
        for path, capture in zip(self.paths, self._open, strict=True):
            if not capture.isOpened():
                raise CorruptFile(path, "not a video that OpenCV can decode")
        # the container's count may be off by a few: the shorter stream ends the video
        counts = [int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) for capture in self._open]
        self.count = min(counts)
        if self.count < max(0.9 * max(counts), 1):
            names = " and ".join(f"{path} has {n}" for path, n in zip(self.paths, counts, strict=True))
            reason = f"it ends early, or its container has no number of frames (convert it then): {names} frames"
            raise CorruptFile(self.paths[counts.index(self.count)], reason)
        self._next, self._last = 0, np.empty(0)

    def __len__(self) -> int:
        return self.count

    def frame(self, i: int) -> np.ndarray:
        """Frame `i`, (H, W, 6) uint8: the last one that was read, or a later one."""
        if i < self._next - 1:
            raise BadParameter("frame", i, f"{self._next - 1} or later: a file is decoded forwards")
        while self._next <= i:
            parts = []
            for path, capture in zip(self.paths, self._open, strict=True):
                read, image = capture.read()
                if not read:
                    raise CorruptFile(path, f"frame {self._next} of {self.count} cannot be decoded")
                parts.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
            if parts[0].shape != parts[1].shape:
                raise BadParameter("infrared", str(self.paths[1]), f"frames of {parts[0].shape[:2]} pixels, as RGB has")
            self._last, self._next = np.concatenate(parts, 2), self._next + 1
        return self._last


class Cameras:
    """Two live cameras as a `Video` of `count` frames, which are kept in memory as they come."""

    def __init__(self, visible: int, infrared: int, count: int):
        self.count, self.frames = count, list[np.ndarray]()
        self._open = [cv2.VideoCapture(number) for number in (visible, infrared)]
        for number, capture in zip((visible, infrared), self._open, strict=True):
            if not capture.isOpened():
                raise BadParameter("camera", number, "the number of a camera that OpenCV can open, such as 0")

    def __len__(self) -> int:
        return self.count

    def frame(self, i: int) -> np.ndarray:
        """Frame `i`, (H, W, 6) uint8, the second camera's at the size of the first one's."""
        while len(self.frames) <= i:
            found = [capture.read() for capture in self._open]
            if not all(read for read, _ in found):
                raise BadParameter("camera", len(self.frames), "cameras that deliver all frames: this one did not come")
            rgb, thermal = (cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for _, image in found)
            thermal = cv2.resize(thermal, rgb.shape[1::-1])
            self.frames.append(np.concatenate([rgb, thermal], 2))
        return self.frames[i]


def open_video(visible: str | Path, infrared: str | Path) -> Video:
    """Two folders of images, or two video files, as one video.

    Raises:
        BadParameter: neither of them, one of each, or different numbers of frames.
        CorruptFile: a file that cannot be decoded.
    """
    paths = Path(visible), Path(infrared)
    for name, path in zip(("visible", "infrared"), paths, strict=True):
        if not path.exists():
            raise BadParameter(name, str(path), "a folder of images or a video file that exists")
    if all(path.is_dir() for path in paths):
        return Folders(*paths)
    if any(path.is_dir() for path in paths):
        raise BadParameter("infrared", str(infrared), "a folder when `visible` is one, a video file when it is one")
    return Files(*paths)


def follow(
    model: nn.Module,
    videos: Sequence[Video],
    boxes: Sequence[Sequence[float]],
    *,
    hardware: Hardware = Hardware(),
    name: str = "tracking",
) -> list[Track]:
    """Track one target through each video; frame by frame, the videos are one batch.

    The tokens of a template are computed once per video.

    Args:
        model: `BAT`, or a baseline with the same `embed_template` and `locate`.
        videos: of any lengths.
        boxes: the target in the first frame of each, (x, y, w, h) in pixels.
        hardware: accelerator and precision.
        name: of the progress bar, which counts frames.

    Raises:
        BadParameter: a first box without area, outside the image, or not four finite numbers; not one box per video.
        CorruptFile: a frame that cannot be read.
    """
    tracker = model.tracker
    if len(videos) != len(boxes) or not videos:
        raise BadParameter("boxes", f"{len(boxes)} for {len(videos)} videos", "a box for each of one or more videos")
    tracks = [[_checked(box, video)] for video, box in zip(videos, boxes, strict=True)]
    scores = [[1.0] for _ in videos]
    # inference mode inside: a model moved within it could not be trained any more
    with (
        evaluating(hardware, model) as device,
        torch.inference_mode(),
        ThreadPoolExecutor(min(READERS, len(videos))) as readers,
    ):
        window = hann(tracker.f).to(device)  # (1, 1, f, f)

        def batch(patches: list[np.ndarray]) -> torch.Tensor:
            return normalise(torch.from_numpy(np.stack(patches)).movedim(-1, 1).contiguous().to(device))

        templates = [
            crop(video.frame(0), track[0], TEMPLATE_FACTOR, tracker.template)[0]
            for video, track in zip(videos, tracks, strict=True)
        ]
        tokens = model.embed_template(batch(templates)).unflatten(0, (-1, len(videos)))

        def read(t: int) -> dict[int, Future]:
            return {i: readers.submit(video.frame, t) for i, video in enumerate(videos) if t < len(video)}

        before: list[int] = []
        ahead = read(1)
        for t in progress(range(1, max(map(len, videos))), name):
            active, frames = list(ahead), [frame.result() for frame in ahead.values()]
            ahead = read(t + 1)  # while the network processes these
            if active != before:
                before, shown = active, tokens[:, active].flatten(0, 1)
            crops = [crop(f, tracks[i][-1], SEARCH_FACTOR, tracker.search) for f, i in zip(frames, active, strict=True)]
            output = model.locate(shown, batch([patch for patch, _ in crops]))
            weighted = output.score.float() * window
            decoded = decode(weighted, output.size.float(), output.offset.float())
            # the host waits for the GPU here, once per frame
            rows = torch.cat([decoded, weighted.flatten(1).amax(1, keepdim=True)], 1).cpu().double().numpy()
            for i, image, (_, scale), row in zip(active, frames, crops, rows, strict=True):
                there = box_from_crop(row[:4], tracks[i][-1], scale, tracker.search)
                tracks[i].append(clip_box(there, *image.shape[:2]))
                scores[i].append(float(row[4]))
    return [Track(np.array(b, dtype=np.float64), np.array(s)) for b, s in zip(tracks, scores, strict=True)]


def follow_in_memory(model: nn.Module, videos: Sequence, name: str, hardware: Hardware) -> dict[str, np.ndarray]:
    """The boxes (n, 4) of short videos by name, all videos as one batch."""
    tracks = follow(model, videos, [video.boxes[0] for video in videos], hardware=hardware, name=name)
    return {video.name: track.boxes for video, track in zip(videos, tracks, strict=True)}


def run(
    model: nn.Module,
    sequences: Sequence,
    folder: str | Path,
    *,
    together: int = 1,
    box_type: str = "ltwh",
    **options: Any,
) -> dict[str, np.ndarray]:
    """Track the sequences of a benchmark; write `folder`/<name>.txt in the toolkits' text format.

    A sequence whose file is complete is not tracked again. `tracker.json` in the folder identifies the weights, so that
    results of another model are not reused.

    Args:
        sequences: of `companion.data.tracking`; each starts from its first RGB box.
        together: number of sequences in one batch, grouped by similar length; fewer where they have more than `FRAMES`.
        box_type: of the files: "ltwh", four numbers a row, or "corner", eight, as RGBT234's toolkit reads them.
        options: of `follow`.

    Returns:
        Boxes (n, 4) by sequence.

    Raises `BadParameter`: `folder` holds results of another model.
    """
    # the config, because the RGB-only and thermal-only models have the same tensors
    facts = {"weights": checkpoint_key(config=config_of(model), weights=model)}
    folder = Path(folder)
    record = folder / "tracker.json"
    if record.exists() and read_json(record) != facts:
        raise BadParameter("folder", str(folder), "results of this model, or a new folder: these are another model's")
    if not record.exists() and any(folder.glob("*.txt")):
        raise BadParameter("folder", str(folder), "a new folder: it holds results without a tracker.json")
    write_json(record, facts)
    todo = [sequence for sequence in sequences if not _complete(folder, sequence)]
    if together > 1:  # videos of similar length, so that none waits for the others
        todo.sort(key=len)
    while todo:
        # those of a part are written at its end: its frames are what a kill costs
        frames = np.cumsum([len(sequence) for sequence in todo[:together]])
        part = todo[: max(1, int(np.searchsorted(frames, FRAMES, "right")))]
        todo = todo[len(part) :]
        done = len(sequences) - len(todo)
        name = f"{part[0].name} ({done} of {len(sequences)})"
        tracks = follow(model, part, [sequence.boxes[0] for sequence in part], name=name, **options)
        for sequence, one in zip(part, tracks, strict=True):
            write_results(folder / f"{sequence.name}.txt", one.boxes, box_type)
    return read_results(folder, [sequence.name for sequence in sequences], box_type=box_type)


def track(
    visible: str | Path | int,
    infrared: str | Path | int,
    box: Sequence[float],
    model: nn.Module,
    out: str | Path | None = None,
    *,
    box_type: str = "ltwh",
    video: str | Path | None = None,
    frames: int = 300,
    **options: Any,
) -> Track:
    """Track the target `box` (x, y, w, h in the first frame) through your own video.

    Args:
        visible, infrared: two folders of images, two video files, or the numbers of two cameras, aligned in time and
            space.
        out: a result file to write.
        box_type: of that file, see `run`.
        video: an .mp4 file to write: both streams next to each other, with the box and its score.
        frames: of the cameras, how many to take.
        options: of `follow`.

    Raises `BadParameter`, `CorruptFile`: see `open_video` and `follow`.
    """

    def opened() -> Video:
        if isinstance(visible, int) and isinstance(infrared, int):
            return Cameras(visible, infrared, frames)
        return open_video(str(visible), str(infrared))

    if video is not None and Path(video).suffix != ".mp4":
        raise BadParameter("video", str(video), "a name that ends in .mp4")
    source = opened()
    (tracked,) = follow(model, [source], [box], **options)
    if out is not None:
        write_results(out, tracked.boxes, box_type)
    if video is not None:
        draw(source if isinstance(source, Cameras) else opened(), tracked, video)
    return tracked


def draw(video: Video, tracked: Track, path: str | Path, rate: float = 25) -> None:
    """Write a video file of both streams next to each other, with the box and its score; `rate` in frames a second.

    Raises `CompanionError`: OpenCV has no encoder for it.
    """
    height, width = video.frame(0).shape[:2]
    with atomic(path) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), rate, (2 * width, height))
        if not writer.isOpened():
            raise CompanionError(f"{path}: this OpenCV has no encoder of mp4v video; install another build of it")
        for i, (box, score) in enumerate(zip(tracked.boxes, tracked.scores, strict=True)):
            left, top, right, bottom = (int(n) for n in np.rint([*box[:2], *(box[:2] + box[2:])]))
            image = np.ascontiguousarray(np.concatenate(np.split(video.frame(i), 2, axis=2), axis=1)[..., ::-1])
            for shift in (0, width):
                cv2.rectangle(image, (left + shift, top), (right + shift, bottom), (0, 200, 255), 2)
            cv2.putText(image, f"{score:.2f}", (left, max(top - 4, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 200, 255))
            writer.write(image)
        writer.release()


def _images(folder: str | Path) -> list[Path]:
    """Sorted by the numbers in their names: 9.png precedes 10.png."""
    images = [path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGES and path.name[0] != "."]
    return sorted(images, key=lambda path: ([int(number) for number in re.findall(r"\d+", path.stem)], path.name))


def _checked(box: Sequence[float], video: Video) -> np.ndarray:
    (height, width), xywh = video.frame(0).shape[:2], np.asarray(box, dtype=np.float64)
    sound = xywh.shape == (4,) and np.isfinite(xywh).all() and (xywh[2:] > 0).all()
    if not sound or (xywh[:2] >= (width, height)).any() or (xywh[:2] + xywh[2:] <= 0).any():
        name = f"box of {video.name}" if hasattr(video, "name") else "box"
        accepted = f"x, y, w, h in pixels, w and h above 0, meeting the {width} x {height} image"
        raise BadParameter(name, box, accepted)
    return xywh


def _complete(folder: Path, sequence: Any) -> bool:
    path = folder / f"{sequence.name}.txt"
    return path.exists() and path.read_bytes().count(b"\n") == len(sequence)
