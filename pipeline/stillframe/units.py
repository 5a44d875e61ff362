"""Which frames make a unit, and how much memory one needs: whole numbers only.

A unit is the frames of one output shard: one task, one writer, one record.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

TARGET_BYTES = 128 * 2**20
"""Input bytes of a unit, where memory and the input's chunks allow it."""
NOMINAL_MEMORY = 3 * 2**30
"""What a worker is taken to have when units are laid out, so that runs on different machines write equal shards."""
_NAMED = 3
"""Files or frames that a message names."""
_DECODED_AT_ONCE = 2
_TRANSIENT = 20 * 2**20
"""What does not depend on the size of frames, beyond the bare process: buffers."""
MOST_FRAMES = 32
"""Frames of a unit at most, unless the input's chunks hold more."""


def frame_range(start: int, stop: int) -> str:
    """Write frames start … stop − 1 as people do.

    Examples
    --------
    >>> frame_range(3, 4), frame_range(3, 6)
    ('frame 3', 'frames 3–5')
    """
    return f"frame {start}" if stop - start == 1 else f"frames {start}–{stop - 1}"


def first_few(names: Sequence[str]) -> str:
    """Write the first names of many.

    Examples
    --------
    >>> first_few(["a", "b"]), first_few(["a", "b", "c", "d"])
    ('a, b', 'a, b, c…')
    """
    return ", ".join(names[:_NAMED]) + ("…" if len(names) > _NAMED else "")


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
        return frame_range(self.start, self.stop)


@dataclass(frozen=True)
class Share:
    """The part of a stack that one of several independent processes does."""

    number: int
    """Which part, from 1 on."""
    of: int
    """How many parts there are."""

    def __str__(self) -> str:
        """Number and count as people write them."""
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Read "3/16".

        Raises
        ------
        ValueError
            Not such a part.

        Examples
        --------
        >>> Share.parse("3/16").units(range(32))
        range(4, 6)
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(
                f"{text!r} is no part of a run: parts are counted from 1, as in 3/16. For a Slurm array give "
                "--array=1-16 and --shard $SLURM_ARRAY_TASK_ID/16."
            )
        return cls(int(found[1]), int(found[2]))

    def units(self, units: Sequence[T]) -> Sequence[T]:
        """Return this part of all units, neighbours together."""
        return units[(self.number - 1) * len(units) // self.of : self.number * len(units) // self.of]


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
    chunk_bytes: int = 0
    """Bytes of one decoded input chunk; 0 where chunks are whole frames."""

    @property
    def frame_bytes(self) -> int:
        """Bytes of one input frame."""
        return math.prod(self.shape) * self.itemsize

    @property
    def decoding_bytes(self) -> int:
        """Bytes of the chunks that are decoded at a time while frames are read."""
        return _DECODED_AT_ONCE * (self.chunk_bytes or self.chunk_frames * self.frame_bytes)


def unit_memory(layout: Layout, frames: int, output_itemsize: int, max_shift: int) -> int:
    """Predict the bytes a worker holds at most for a unit of so many frames, above those of the bare process.

    The larger of two moments: while the reference is prepared, before any frame is read; and at the end of a unit,
    when the frames, the chunks being decoded, the result and its encoded shard lie beside what stays of the reference
    (its image and masks, the templates, the search and its transforms). Measured from 512² to 4096².
    """
    pixels = math.prod(layout.shape)
    padded = (layout.shape[0] + 2 * max_shift) * (layout.shape[1] + 2 * max_shift)
    reading = frames * layout.frame_bytes + layout.decoding_bytes
    writing = frames * pixels * (output_itemsize + encoded_itemsize(layout.itemsize, output_itemsize))
    return _TRANSIENT + max(125 * pixels, 16 * pixels + 24 * padded + reading + round(writing))


def encoded_itemsize(itemsize: int, output_itemsize: int) -> float:
    """Return the bytes that the codec's results take at most, per pixel written.

    Counts shrink to less than half, twice held; fractions of them to half; the noise of floats does not shrink.
    """
    if itemsize >= 4:
        return 2 * output_itemsize
    return output_itemsize if output_itemsize > itemsize else output_itemsize / 2


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
            f"one frame of {layout.shape} from chunks of {layout.chunk_frames} frames needs "
            f"{needed(1) / 2**20:.0f} MiB, but a worker has {max(budget, 0) / 2**20:.0f} MiB for it. "
            "Use fewer workers, or give them more memory."
        )
    nominal = max(budget, needed(1)) if unit_frames else max(NOMINAL_MEMORY, needed(1))
    size = _fitting(unit_frames or _wish(layout), needed, min(budget, nominal))
    size = min(size, layout.frames)
    return Plan(layout.frames, size, _decodes(size, layout.chunk_frames))


def _wish(layout: Layout) -> int:
    """Whole input chunks, as many as make about the target."""
    target = min(MOST_FRAMES, max(1, TARGET_BYTES // layout.frame_bytes))
    return layout.chunk_frames * max(1, target // layout.chunk_frames)


def _fitting(wish: int, needed: Callable[[int], int], budget: int) -> int:
    """Return the largest part of the wish that fits the budget; it divides the wish, so that chunks stay aligned."""
    if needed(wish) <= budget:
        return wish
    return max(size for size in range(1, wish + 1) if wish % size == 0 and needed(size) <= budget)


def _decodes(size: int, chunk: int) -> int:
    """Units that touch one input chunk, at most."""
    if size % chunk == 0:
        return 1
    return math.ceil(chunk / size) + (chunk % size != 0)
