"""Which frames make a unit, and how much memory one needs: whole numbers only.

A unit is the frames of one output shard: one task, one writer, one record.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

TARGET_BYTES = 128 * 2**20
"""Input bytes of a unit, where memory and the input's chunks allow it."""
MOST_FRAMES = 32
"""Frames of a unit at most, unless the input's chunks hold more."""


@dataclass(frozen=True)
class Unit:
    """A run of frames that is read, computed and written as one."""

    number: int
    """Its place in the stack and the number of its shard."""
    start: int
    """First frame."""
    stop: int
    """One past the last frame."""

    def __str__(self) -> str:
        """Frame range as people write it."""
        return f"frames {self.start}–{self.stop - 1}"


@dataclass(frozen=True)
class Plan:
    """How a stack is cut into units."""

    frames: int
    """Frames of the stack."""
    unit_frames: int
    """Frames of a unit; the last may have fewer."""
    decodes: int = 1
    """How often each input chunk is decoded in one pass over the stack."""

    @property
    def units(self) -> list[Unit]:
        """All units in order."""
        size = self.unit_frames
        starts = range(0, self.frames, size)
        return [Unit(number, start, min(start + size, self.frames)) for number, start in enumerate(starts)]


@dataclass(frozen=True)
class Layout:
    """What of a stack decides the size of a unit."""

    frames: int
    """Frames of the stack."""
    shape: tuple[int, int]
    """Pixels of a frame (y, x)."""
    itemsize: int
    """Bytes per input pixel."""
    chunk_frames: int
    """Frames that the input decodes together."""

    @property
    def frame_bytes(self) -> int:
        """Bytes of one input frame."""
        return math.prod(self.shape) * self.itemsize


def unit_memory(layout: Layout, frames: int, output_itemsize: int, max_shift: int) -> int:
    """Predict the bytes a worker holds at most for a unit of so many frames, above those of the bare process.

    The larger of the two stages: registering holds the unit, the reference with what is prepared from it, and
    one frame's transforms; aligning holds the unit twice while a chunk across several frames is decoded, the
    result, and its encoded shard (zarr joins it from parts, hence twice).
    """
    pixels = math.prod(layout.shape)
    padded = (layout.shape[0] + max_shift) * (layout.shape[1] + max_shift)
    decoding = max(frames, layout.chunk_frames) * layout.frame_bytes
    prepare = pixels * (8 + 8 + 1) + padded * (8 + 16)
    per_frame = pixels * 4 + padded * 8
    register = frames * layout.frame_bytes + decoding + prepare + per_frame
    align = frames * layout.frame_bytes + decoding + 3 * frames * pixels * output_itemsize + pixels * 8
    return max(register, align)


def make_plan(
    layout: Layout, *, budget: int, output_itemsize: int, max_shift: int, unit_frames: int | None = None
) -> Plan:
    """Choose the frames of a unit: whole input chunks, about :data:`TARGET_BYTES`, within a worker's budget.

    Raises
    ------
    ValueError
        Not even one frame fits the budget, or the wish is not a positive number of frames.

    Examples
    --------
    >>> layout = Layout(frames=36000, shape=(2048, 2048), itemsize=2, chunk_frames=1)
    >>> make_plan(layout, budget=4 * 2**30, output_itemsize=2, max_shift=32).unit_frames
    16
    """
    if unit_frames is not None and unit_frames < 1:
        raise ValueError(f"unit_frames is {unit_frames}, but a unit needs a frame. Give a number ≥ 1.")

    def needed(size: int) -> int:
        return unit_memory(layout, size, output_itemsize, max_shift)

    if needed(1) > budget:
        raise ValueError(
            f"one frame of {layout.shape} needs {needed(1) / 2**20:.0f} MiB but a worker has {budget / 2**20:.0f} MiB. "
            "Use fewer workers, or give them more memory."
        )
    wish = unit_frames or _wish(layout)
    size = min(wish, layout.frames) if needed(wish) <= budget else _largest(wish, needed, budget)
    return Plan(layout.frames, size, _decodes(size, layout.chunk_frames))


def _wish(layout: Layout) -> int:
    """Whole input chunks, as many as make about the target."""
    target = min(MOST_FRAMES, max(1, TARGET_BYTES // layout.frame_bytes))
    return layout.chunk_frames * max(1, target // layout.chunk_frames)


def _largest(wish: int, needed: Callable[[int], int], budget: int) -> int:
    """Return the largest part of the wish that fits the budget; it divides the wish, so that chunks stay aligned."""
    return max(size for size in range(1, wish + 1) if wish % size == 0 and needed(size) <= budget)


def _decodes(size: int, chunk: int) -> int:
    """Units that touch one input chunk, at most."""
    if size % chunk == 0:
        return 1
    return math.ceil(chunk / size) + (chunk % size != 0)
