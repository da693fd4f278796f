"""A video file as sampled RGB frames and its sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from ep_serve.contract.media_formats import default_track
from ep_serve.media.containers import (
    UNTIMED,
    PacketSpan,
    check_complete,
    open_media,
    prepare_decoder,
)
from ep_serve.media.counter import decodes
from ep_serve.media.errors import MediaError
from ep_serve.media.limits import Deadline, MediaLimits
from ep_serve.media.orientation import display_matrix, upright
from ep_serve.media.sampling import SamplingRule, choose_frames
from ep_serve.media.sound import sound_track

Resize = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Clip:
    """A sampled video.

    `frames` is (T, H, W, 3) uint8 RGB, C-contiguous, T even. `fps` is the rate in frames/s at
    which these frames, not the file's, follow one another; `sound` is (n,) float32 mono at 16 kHz
    on the same clock, or None for a silent clip. `duration_s` is the length of the picture.
    """

    frames: NDArray[np.uint8]
    fps: float
    sound: NDArray[np.float32] | None
    duration_s: float


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """The frames and sound that a video decodes to, found without decoding.

    `moments` (T,) are the frames to keep, ascending timestamps or frame numbers. `height` and
    `width` in pixels are what the header states, `sound_s` is how many seconds of sound the packets
    add up to (0 without sound), `fps` and `duration_s` are those of the `Clip`.
    """

    moments: list[int]
    timed: bool
    fps: float
    duration_s: float
    start_s: float | None
    has_sound: bool
    height: int
    width: int
    sound_s: float


def decode_clip(
    data: bytes,
    rule: SamplingRule,
    limits: MediaLimits,
    *,
    sound: bool = True,
    size: Resize | None = None,
    plan: ClipPlan | None = None,
) -> Clip:
    """Decode the frames of a video that `rule` samples, and its sound.

    A clip without sound, or whose sound track is empty, has `sound=None`. A sound track that
    cannot be read is refused: an answer that silently ignores it would be wrong.

    Args:
        data: the whole file.
        rule: which frames.
        limits: what the file may cost.
        sound: False leaves the sound track unread.
        size: the (height, width) wanted for frames of a given (height, width). Frames are then
            scaled one by one (Pillow's antialiased bicubic), so that full-size frames are never
            held together; frames that have that size already keep their pixels. It may raise
            `MediaError` for a size it cannot use.
        plan: that of `plan_clip` for this file and rule, if it is known already.

    Raises:
        MediaError: the file cannot be read or exceeds a limit.
    """
    decodes.add("video")
    deadline = Deadline(limits.timeout_s)
    plan = plan or _plan(data, rule, limits, deadline)
    frames = _decode_frames(data, plan, limits, deadline, size)
    track = None
    if sound and plan.has_sound:
        track = sound_track(data, limits, deadline, start_s=plan.start_s)
    return Clip(frames, plan.fps, track, plan.duration_s)


def plan_clip(data: bytes, rule: SamplingRule, limits: MediaLimits) -> ClipPlan:
    """Walk the packets of a video, without decoding, to learn when its frames are shown.

    Raises:
        MediaError: as `decode_clip`, as far as it can be known without decoding.
    """
    return _plan(data, rule, limits, Deadline(limits.timeout_s))


def _plan(data: bytes, rule: SamplingRule, limits: MediaLimits, deadline: Deadline) -> ClipPlan:
    with open_media(data, "video", limits, deadline) as container:
        stream = _video_stream(container, limits)
        sound = PacketSpan(default_track(container.streams.audio))
        stamps = _timestamps(data, container, stream, sound, limits, deadline)
        known = sorted(stamp for stamp in stamps if stamp is not None)
        unit = stream.time_base
        # Frames are counted, not timed, wherever timestamps are guessed, missing or repeated.
        distinct = len(set(known)) == len(stamps)
        timed = unit is not None and distinct and container.format.name not in UNTIMED
        span = (known[-1] - known[0]) * unit if timed and unit is not None else Fraction(0)
        total = len(stamps)
        rate = _frame_rate(stream.average_rate, (total - 1) / span if span else None)
        limits.check_duration("video", total / rate)
        times = np.array(known, np.int64) if timed else None
        choice = choose_frames(total, rate, rule, times)
        start_s = float(known[0] * unit) if timed and unit is not None else None
        return ClipPlan(
            moments=(choice.indices if times is None else times[choice.indices]).tolist(),
            timed=timed,
            fps=choice.fps,
            duration_s=total / rate,
            start_s=start_s,
            has_sound=bool(container.streams.audio),
            height=stream.codec_context.height,
            width=stream.codec_context.width,
            sound_s=sound.seconds(start_s),
        )


def _timestamps(
    data: bytes,
    container: InputContainer,
    stream: VideoStream,
    sound: PacketSpan,
    limits: MediaLimits,
    deadline: Deadline,
) -> list[int | None]:
    """The presentation time of every frame of a stream, in the order of the file."""
    stamps: list[int | None] = []
    packets = 0
    end_s = 0.0
    for packet in container.demux():
        deadline.check()
        if packet.pts is not None and packet.duration and packet.time_base:
            end_s = max(end_s, float((packet.pts + packet.duration) * packet.time_base))
        sound.add(packet)
        if packet.stream_index != stream.index or not packet.size:
            continue
        packets += 1
        if packets > limits.max_frames:
            raise MediaError(f"the video has more than the limit of {limits.max_frames} frames")
        if not packet.is_discard:  # left out by an edit list
            stamps.append(packet.pts)
    deadline.check()
    check_complete(data, container, stream, "video", packets, end_s)
    if not stamps:
        raise MediaError("the video holds no pictures")
    return stamps


def _video_stream(container: InputContainer, limits: MediaLimits) -> VideoStream:
    stream = default_track(container.streams.video)
    if stream is None:
        raise MediaError("the file has no video stream")
    prepare_decoder(stream, "video", limits)
    limits.check_picture("video", stream.codec_context.height, stream.codec_context.width)
    return stream


def _frame_rate(stated: Fraction | None, measured: Fraction | None) -> float:
    """Frames/s: what the container states, unless its own timestamps say otherwise.

    Timestamps are rounded (to milliseconds in WebM), the stated rate is not.
    """
    if measured is None:
        return float(stated) if stated else 1.0
    if stated and abs(stated - measured) <= measured / 50:
        return float(stated)
    return float(measured)


def _decode_frames(
    data: bytes, plan: ClipPlan, limits: MediaLimits, deadline: Deadline, size: Resize | None
) -> NDArray[np.uint8]:
    """Decode up to the last frame wanted; only frames that are wanted are converted to RGB."""
    moments = plan.moments
    slack = (moments[-1] - moments[0]) / (len(moments) - 1)
    writer = _Writer(len(moments), limits, size)
    with open_media(data, "video", limits, deadline) as container:
        stream = _video_stream(container, limits)
        last: VideoFrame | None = None
        for moment, frame in _frames(container, stream, plan.timed, limits, deadline):
            last = frame
            while moment >= moments[writer.count]:
                if moment - moments[writer.count] > slack:
                    raise MediaError(_gap(stream, writer))
                writer.add(frame)
                if writer.full:
                    return writer.frames
        # Some packets show no frame of their own: what was on screen last stands in for them.
        if last is None:
            raise MediaError(
                f"no picture of the video can be decoded ({stream.codec_context.name})"
            )
        if moments[-1] - moment > slack:
            raise MediaError(_gap(stream, writer))
        while not writer.full:
            writer.add(last)
    return writer.frames


def _gap(stream: VideoStream, writer: _Writer) -> str:
    return (
        f"the video is cut short or damaged: only {writer.count} of {writer.wanted} sampled "
        f"pictures can be decoded ({stream.codec_context.name})"
    )


def _frames(
    container: InputContainer,
    stream: VideoStream,
    timed: bool,
    limits: MediaLimits,
    deadline: Deadline,
) -> Iterator[tuple[int, VideoFrame]]:
    """Every decodable frame in order, with its timestamp or number."""
    number = -1
    for packet in container.demux(stream):
        for frame in _decode(packet):
            deadline.check()
            limits.check_picture("video", frame.height, frame.width)
            number += 1
            moment = frame.pts if timed else number
            if moment is not None:
                yield moment, frame
        deadline.check()


def _decode(packet: Packet[VideoStream]) -> list[VideoFrame]:
    """The frames of a packet; none where it is damaged.

    Recordings often begin between key frames; `_decode_frames` judges whether too much is missing.
    """
    try:
        return packet.stream.decode(packet)
    except av.FFmpegError:
        return []


class _Writer:
    """Converts frames to upright RGB of one size, into one array of (T, H, W, 3) uint8."""

    def __init__(self, wanted: int, limits: MediaLimits, size: Resize | None) -> None:
        self.wanted = wanted
        self.count = 0
        self.frames = np.empty((0, 0, 0, 3), np.uint8)
        self._limits = limits
        self._size = size
        self._source: tuple[int, int] = (0, 0)
        self._reformatter = VideoReformatter()

    @property
    def full(self) -> bool:
        return self.count == self.wanted

    def add(self, frame: VideoFrame) -> None:
        if self.count == 0:
            self._source = frame.width, frame.height
        # A stream whose size changes midway is scaled to the size of its first frame.
        width, height = self._source
        rgb = self._reformatter.reformat(frame, width, height, format="rgb24", threads=1)
        picture = upright(rgb.to_ndarray().astype(np.uint8, copy=False), display_matrix(frame))
        if self.count == 0:
            self.frames = self._allocate(picture.shape[0], picture.shape[1])
        target = self.frames.shape[1:3]
        if picture.shape[:2] != target:
            scaled = Image.fromarray(np.ascontiguousarray(picture)).resize(
                (target[1], target[0]), Image.Resampling.BICUBIC
            )
            picture = np.asarray(scaled)
        self.frames[self.count] = picture
        self.count += 1

    def _allocate(self, height: int, width: int) -> NDArray[np.uint8]:
        if self._size is not None:
            height, width = self._size(height, width)
        need = self.wanted * height * width * 3
        if need > self._limits.max_clip_bytes:
            raise MediaError(
                f"{self.wanted} pictures of {width}x{height} pixels take {need} bytes; "
                f"the limit for a clip is {self._limits.max_clip_bytes} bytes"
            )
        return np.empty((self.wanted, height, width, 3), np.uint8)
