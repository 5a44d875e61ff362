"""Simulated detector frames with known shifts: expected counts in closed form, then Poisson noise.

The pattern is evaluated at the shifted coordinates and never interpolated, so the true shift is exact. Nothing here
reads or writes files.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numba
import numpy as np
import numpy.typing as npt
import scipy.ndimage

from stillframe.images.arrays import Image, Mask

Pattern = Literal["rings", "spots"]
KINDS = ("pumped", "unpumped", "dark")
"""Meaning of the values 0, 1, 2 of the coordinate ``kind``."""

# Lengths are fractions of the shorter side of the detector, heights are relative to the brightest ring.
_RADII = np.array([0.13, 0.19, 0.25, 0.31, 0.37, 0.44])
_HEIGHTS = np.array([1.0, 0.7, 0.5, 0.35, 0.22, 0.15])
_RING_WIDTH = 0.012
_BACKGROUND, _BACKGROUND_LENGTH = 1.5, 0.09
"""Height at the direct beam, and decay length, of the diffuse background."""
_FLOOR = 0.02
"""Height of the background far from the beam."""
_LATTICE, _SPOT_WIDTH = 0.09, 0.008
"""Period of the lattice of spots, and standard deviation of one spot."""
_GLOW, _HOT = 0.05, 40.0
"""Counts under the beam-block and in hot pixels, relative to the dose."""
_PUMP_EFFECT = 0.08
"""Largest relative loss of the features' intensity by the pump."""


@dataclass(frozen=True)
class Experiment:
    """A simulated pump–probe run. Equal fields give equal frames."""

    frames: int = 200
    """Number of frames."""
    shape: tuple[int, int] = (512, 512)
    """Detector (y, x), pixels."""
    pattern: Pattern = "rings"
    """Powder rings or spots of a single crystal."""
    dose: float = 50.0
    """Expected counts per pixel at the brightest ring or spot of the first frame."""
    max_drift: float = 8.0
    """Largest true shift along either axis, pixels."""
    jumps: int = 2
    """Number of sudden jumps of the pattern within the run."""
    decay: float = 0.3
    """Fraction of the intensity that is lost by the end of the run."""
    hot_pixels: float = 2e-4
    """Fraction of pixels with a constant, high count; the mask excludes them."""
    dead_pixels: float = 3e-4
    """Fraction of pixels that never count; the mask excludes them."""
    spikes: float = 0.0
    """Fraction of pixels hit at random, drawn anew for each frame; the mask does not exclude them."""
    dark_every: int = 50
    """Every n-th frame is taken without beam; 0 for none."""
    delays: int = 24
    """Number of pump–probe delays of a scan, visited in shuffled order."""
    interval: float = 6.0
    """Time between frames, seconds."""
    seed: int = 0
    """Seed of all random numbers."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a field out of its range."""
        if self.frames < 1 or min(self.shape) < 16:
            raise ValueError(f"{self.frames} frames of {self.shape} cannot be simulated: give ≥ 1 frame of ≥ 16×16.")
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern is {self.pattern!r}, which is not known. Choose rings or spots.")
        if not self.dose > 0:
            raise ValueError(f"dose is {self.dose}, but frames without counts show no pattern. Give a dose > 0.")

    @cached_property
    def shifts(self) -> Image:
        """True shift (y, x) to apply to each frame, (frame, 2), pixels: a smooth random walk with jumps."""
        rng = np.random.default_rng([self.seed, 1])
        steps = rng.normal(size=(self.frames, 2))
        walk = scipy.ndimage.gaussian_filter1d(np.cumsum(steps, axis=0), max(self.frames / 40, 1), axis=0)
        walk /= max(np.ptp(walk, axis=0).max(), 1e-9)
        for at in rng.integers(0, self.frames, size=self.jumps):
            walk[at:] += rng.uniform(-0.4, 0.4, size=2)
        walk -= (walk.max(axis=0) + walk.min(axis=0)) / 2
        return np.asarray(self.max_drift * walk / max(np.abs(walk).max(), 1e-9))

    @cached_property
    def intensity(self) -> Image:
        """Relative intensity of each frame, (frame,): decays over the run and fluctuates by 1 %; 0 without beam."""
        rng = np.random.default_rng([self.seed, 2])
        decay = (1 - self.decay) ** (np.arange(self.frames) / max(self.frames - 1, 1))
        return np.where(self.kind == KINDS.index("dark"), 0, decay * rng.normal(1, 0.01, self.frames))

    @cached_property
    def kind(self) -> npt.NDArray[np.int8]:
        """Index into :data:`KINDS` of each frame, (frame,)."""
        index = np.arange(self.frames)
        kind = np.where(index % 5 == 2, KINDS.index("unpumped"), KINDS.index("pumped"))
        if self.dark_every:
            kind = np.where(index % self.dark_every == self.dark_every - 1, KINDS.index("dark"), kind)
        return kind.astype(np.int8)

    @cached_property
    def scan(self) -> npt.NDArray[np.int32]:
        """Number of the scan that each frame belongs to, (frame,)."""
        return (np.arange(self.frames) // self.delays).astype(np.int32)

    @cached_property
    def delay(self) -> Image:
        """Pump–probe delay of each frame, (frame,), ps; every scan visits each delay once in shuffled order."""
        rng = np.random.default_rng([self.seed, 3])
        values = np.linspace(-2, 10, self.delays)
        scans = -(-self.frames // self.delays)
        return np.concatenate([rng.permutation(values) for _ in range(scans)])[: self.frames]

    @cached_property
    def detector(self) -> "Detector":
        """The detector: beam-block, hot and dead pixels, which do not move."""
        return Detector.of(self)

    def pumped(self, index: int) -> float:
        """Return the relative loss of the features' intensity by the pump in one frame."""
        excited = self.kind[index] == KINDS.index("pumped") and self.delay[index] > 0
        return float(_PUMP_EFFECT * (1 - np.exp(-self.delay[index]))) if excited else 0.0

    def expected(self, index: int) -> Image:
        """Return the expected counts (y, x) of one frame, without noise."""
        pattern = evaluate(self.pattern, self.shape, self.shifts[index], loss=self.pumped(index))
        return self.detector.see(self.dose * self.intensity[index] * pattern)

    def render(self, index: int) -> npt.NDArray[np.uint16]:
        """Return the counts (y, x) of one frame. They do not depend on which other frames are rendered."""
        rng = np.random.default_rng([self.seed, 4, index])
        counts = rng.poisson(self.expected(index))
        if self.spikes:
            hit = rng.random(self.shape) < self.spikes
            counts = counts + hit * rng.integers(1, int(20 * self.dose) + 20, size=self.shape)
        return np.minimum(counts, np.iinfo(np.uint16).max).astype(np.uint16)


@dataclass(frozen=True, eq=False)
class Detector:
    """A detector: everything that stays where it is while the pattern moves."""

    block: Mask
    """True under the beam-block, (y, x)."""
    gain: Image
    """0 for dead pixels, else 1."""
    glow: Image
    """Expected counts that do not come from the pattern, (y, x)."""
    mask: Mask = field(repr=False)
    """True = valid: neither blocked nor hot nor dead, (y, x)."""

    @classmethod
    def of(cls, experiment: Experiment) -> "Detector":
        """Place the beam-block and draw the bad pixels of an experiment."""
        block = beam_block(experiment.shape)
        kinds = np.random.default_rng([experiment.seed, 5]).random(experiment.shape)
        dead = kinds < experiment.dead_pixels
        hot = (kinds > 1 - experiment.hot_pixels) & ~dead
        glow = np.where(block, _GLOW * experiment.dose, 0) + np.where(hot, _HOT * experiment.dose, 0)
        return cls(block, np.where(dead, 0.0, 1.0), glow, ~(block | dead | hot))

    def see(self, pattern: Image) -> Image:
        """Return the expected counts of the detector (y, x) for the expected counts of a pattern (y, x)."""
        return self.gain * (np.where(self.block, 0, pattern) + self.glow)


def beam_block(shape: tuple[int, int]) -> Mask:
    """Return the beam-block (y, x), True where it is: a disc over the direct beam, held by an arm from the left."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    size = min(shape)
    dy, dx = y - (shape[0] - 1) / 2, x - (shape[1] - 1) / 2
    disc = dy**2 + dx**2 < (0.08 * size) ** 2
    return np.asarray(disc | ((np.abs(dy) < 0.03 * size) & (dx < 0)))


def evaluate(pattern: Pattern, shape: tuple[int, int], shift: npt.ArrayLike, *, loss: float = 0.0) -> Image:
    """Return the intensity (y, x) of a pattern at shifted coordinates: ``out(p) = pattern(p + shift)``.

    The shift (y, x), pixels, has to be applied to the result to bring it onto the unshifted pattern. The brightest
    feature has a height of about 1, of which the pump takes away the fraction ``loss``.

    Examples
    --------
    >>> still, moved = evaluate("rings", (64, 64), (0, 0)), evaluate("rings", (64, 64), (0, 3))
    >>> np.allclose(moved[:, :-3], still[:, 3:])
    True
    """
    dy, dx = np.asarray(shift, dtype=np.float64)
    y = np.arange(shape[0]) - (shape[0] - 1) / 2 + dy
    x = np.arange(shape[1]) - (shape[1] - 1) / 2 + dx
    size, out = float(min(shape)), np.empty(shape)
    heights = _HEIGHTS * (1 - loss) if pattern == "rings" else np.zeros(0)
    radii, background = _RADII[: len(heights)] * size, (_BACKGROUND, _BACKGROUND_LENGTH * size)
    _write_rings(y, x, radii, heights, _RING_WIDTH * size, background, out)
    if pattern == "spots":
        _add_spots(y, x, size, 1 - loss, out)
    return out


@numba.njit(nogil=True, cache=True)
def _write_rings(
    y: Image, x: Image, radii: Image, heights: Image, width: float, background: tuple[float, float], out: Image
) -> None:
    """Write Gaussian rings and a background that falls off exponentially from the beam."""
    for i in range(len(y)):
        for j in range(len(x)):
            radius = np.sqrt(y[i] ** 2 + x[j] ** 2)
            value = background[0] * np.exp(-radius / background[1]) + _FLOOR
            for k in range(len(radii)):
                distance = (radius - radii[k]) / width
                if abs(distance) < 7:
                    value += heights[k] * np.exp(-0.5 * distance * distance)
            out[i, j] = value


def _add_spots(y: Image, x: Image, size: float, height: float, out: Image) -> None:
    """Add Gaussian spots of different heights on a slightly rotated square lattice, fading outwards."""
    width, step = _SPOT_WIDTH * size, _LATTICE * size
    turn = np.array([[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]])
    for order in np.ndindex(13, 13):
        miller = np.array(order) - 6
        cy, cx = step * turn @ miller
        strength = height * np.exp(-np.hypot(cy, cx) / (0.25 * size)) * (0.55 + 0.45 * np.sin(7 * miller @ [1.3, 2.1]))
        rows, columns = np.abs(y - cy) < 7 * width, np.abs(x - cx) < 7 * width
        spot = np.outer(_bell((y[rows] - cy) / width), _bell((x[columns] - cx) / width))
        out[np.ix_(rows, columns)] += 1.4 * strength * spot


def _bell(distance: npt.NDArray[Any]) -> Image:
    return np.asarray(np.exp(-0.5 * distance**2))
