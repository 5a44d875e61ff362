"""How a stack is cut into units, and how much memory a unit needs; whole numbers only.

A unit is the frames of one output shard: one task, one writer, one record.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from stillframe.wording import frame_range

T = TypeVar("T")

TARGET_BYTES = 128 * 2**20
"""Input bytes of a unit, where memory and the input's chunks allow it."""
MOST_FRAMES = 32
"""Frames of a unit at most, unless the input's chunks hold more."""
_NOMINAL_MEMORY = 3 * 2**30
"""Memory of a worker for which units are cut at most, so that runs on different machines write equal shards."""
_DECODED_AT_ONCE = 2
"""Input chunks that are decoded at a time."""
_CORRECTION_BYTES = 32
"""Bytes per pixel of dark and flat, the factors made from them, and a frame in corrected counts with its copy."""
_BUFFERS = 20 * 2**20
"""Bytes of buffers whose size does not depend on that of frames."""


@dataclass(frozen=True)
class Unit:
    """Consecutive frames that are read, computed and written together."""

    number: int
    """Position among the units, which is also the number of the output shard."""
    start: int
    """First frame."""
    stop: int
    """One past the last frame."""

    def __str__(self) -> str:
        return frame_range(self.start, self.stop)


@dataclass(frozen=True)
class Share:
    """The units that one of several independent processes does: number 3 of 16, for example."""

    number: int
    """Number of the share, counted from 1."""
    of: int
    """Number of shares."""

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Return the share that a text such as "3/16" names.

        Examples
        --------
        >>> Share.parse("3/16").units(range(32))
        range(4, 6)
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(
                f"{text!r} is no part of a run: parts are counted from 1, as in 3/16. For a Slurm array give "
                "--array=1-16 and --shard $SLURM_ARRAY_TASK_ID/16."
            )
        return cls(int(match[1]), int(match[2]))

    def units(self, units: Sequence[T]) -> Sequence[T]:
        """Return the units of this share: a consecutive part of all units."""
        return units[(self.number - 1) * len(units) // self.of : self.number * len(units) // self.of]


@dataclass(frozen=True)
class Plan:
    """How a stack is cut into units."""

    frames: int
    """Frames of the stack."""
    unit_frames: int
    """Frames of a unit; the last may have fewer."""
    decodes: int = 1
    """Units that read one input chunk, at most; the chunk is decoded for each of them."""

    @cached_property
    def units(self) -> list[Unit]:
        """All units in order."""
        size = self.unit_frames
        starts = range(0, self.frames, size)
        return [Unit(number, start, min(start + size, self.frames)) for number, start in enumerate(starts)]


@dataclass(frozen=True)
class Layout:
    """Size and chunks of a stack, which decide the frames of a unit."""

    frames: int
    """Frames of the stack."""
    shape: tuple[int, int]
    """Pixels of a frame (y, x)."""
    itemsize: int
    """Bytes per input pixel."""
    chunk_frames: int
    """Frames of an input chunk."""
    chunk_bytes: int = 0
    """Bytes of a decoded input chunk; 0 where chunks are whole frames."""

    @property
    def frame_bytes(self) -> int:
        """Bytes of one input frame."""
        return math.prod(self.shape) * self.itemsize


def unit_memory(layout: Layout, frames: int, output_itemsize: int, max_shift: int, *, corrected: bool = False) -> int:
    """Return the most memory that a worker needs for a unit of so many frames, bytes above the bare process.

    The larger of two moments counts: while the reference is prepared, before any frame is read; and at the end of a
    unit, when the frames, the chunks being decoded, the result and its encoded shard lie beside what stays of the
    reference (its image and masks, the templates, the search and its transforms). The factors were measured from 512²
    to 4096² pixels. Where frames are corrected for dark and flat, these images and the frame at work come on top.
    """
    pixels = math.prod(layout.shape)
    padded = (layout.shape[0] + 2 * max_shift) * (layout.shape[1] + 2 * max_shift)
    decoding = _DECODED_AT_ONCE * (layout.chunk_bytes or layout.chunk_frames * layout.frame_bytes)
    reading = frames * layout.frame_bytes + decoding
    writing = frames * pixels * (output_itemsize + _encoded_itemsize(layout.itemsize, output_itemsize))
    correcting = _CORRECTION_BYTES * pixels if corrected else 0
    return _BUFFERS + correcting + max(125 * pixels, 16 * pixels + 24 * padded + reading + round(writing))


def _encoded_itemsize(itemsize: int, output_itemsize: int) -> float:
    """Return the memory that encoded pixels take at most, bytes per pixel.

    Counts shrink to less than half, of which two copies are held; fractions of counts shrink to half; the noise of
    floats does not shrink.
    """
    if itemsize >= 4:
        return 2 * output_itemsize
    return output_itemsize if output_itemsize > itemsize else output_itemsize / 2


def make_plan(
    layout: Layout,
    *,
    budget: int,
    output_itemsize: int,
    max_shift: int,
    unit_frames: int | None = None,
    corrected: bool = False,
) -> Plan:
    """Choose the frames of a unit: whole input chunks, about :data:`TARGET_BYTES`, within the memory of a worker.

    Examples
    --------
    >>> layout = Layout(frames=36000, shape=(2048, 2048), itemsize=2, chunk_frames=1)
    >>> make_plan(layout, budget=4 * 2**30, output_itemsize=2, max_shift=32).unit_frames
    16
    """
    if unit_frames is not None and unit_frames < 1:
        raise ValueError(f"unit_frames is {unit_frames}, but a unit needs a frame. Give a number ≥ 1.")

    def needed(size: int) -> int:
        return unit_memory(layout, size, output_itemsize, max_shift, corrected=corrected)

    if needed(1) > budget:
        raise ValueError(
            f"one frame of {layout.shape} from chunks of {layout.chunk_frames} frames needs "
            f"{needed(1) / 2**20:.0f} MiB, but a worker has {max(budget, 0) / 2**20:.0f} MiB for it. "
            "Use fewer workers, or give them more memory."
        )
    limit = budget if unit_frames else min(budget, max(_NOMINAL_MEMORY, needed(1)))
    size = min(_largest_divisor(unit_frames or _preferred_frames(layout), needed, limit), layout.frames)
    chunk = layout.chunk_frames
    decodes = 1 if size % chunk == 0 else math.ceil(chunk / size) + (chunk % size != 0)
    return Plan(layout.frames, size, decodes)


def _preferred_frames(layout: Layout) -> int:
    """Return the frames of a unit without a limit of memory: whole input chunks of about the target size."""
    target = min(MOST_FRAMES, max(1, TARGET_BYTES // layout.frame_bytes))
    return layout.chunk_frames * max(1, target // layout.chunk_frames)


def _largest_divisor(frames: int, needed: Callable[[int], int], limit: int) -> int:
    """Return the largest divisor of a number of frames that fits the memory; units of it stay aligned with chunks."""
    return max(size for size in range(1, frames + 1) if frames % size == 0 and needed(size) <= limit)
