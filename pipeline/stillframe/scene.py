"""Simulated detector frames with known motion: expected counts in closed form, then Poisson noise.

The pattern is evaluated at the shifted coordinates, never resampled, so the true shift is exact and knows no
interpolation. Nothing here reads or writes files.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numba
import numpy as np
import numpy.typing as npt
import scipy.ndimage

from stillframe.ncc import Image, Mask

Pattern = Literal["rings", "spots"]
KINDS = ("pumped", "unpumped", "dark")
"""Meaning of the values 0, 1, 2 of the coordinate ``kind``."""

_RADII = np.array([0.13, 0.19, 0.25, 0.31, 0.37, 0.44])
_HEIGHTS = np.array([1.0, 0.7, 0.5, 0.35, 0.22, 0.15])
_BACKGROUND, _BACKGROUND_LENGTH = 1.5, 0.09
_FLOOR = 0.02
_LATTICE = 0.09
_GLOW = 0.05
_HOT = 40.0
_PUMP_EFFECT = 0.08


@dataclass(frozen=True)
class Experiment:
    """A simulated pump–probe run, fully determined by its fields."""

    frames: int = 200
    """How many frames."""
    shape: tuple[int, int] = (512, 512)
    """Detector (y, x), pixels."""
    pattern: Pattern = "rings"
    """Powder rings, or the spots of a single crystal."""
    dose: float = 50.0
    """Expected counts per pixel on the brightest ring or spot, at the start."""
    max_drift: float = 8.0
    """Largest true shift along either axis, pixels."""
    jumps: int = 2
    """How often the pattern jumps within the run."""
    decay: float = 0.3
    """Part of the intensity that is lost by the end."""
    hot_pixels: float = 2e-4
    """Part of the pixels that always count much; they are in the mask."""
    dead_pixels: float = 3e-4
    """Part of the pixels that never count; they are in the mask."""
    spikes: float = 0.0
    """Part of the pixels hit at random in each frame; no mask names them."""
    dark_every: int = 50
    """Every n-th frame sees no beam; 0 for none."""
    delays: int = 24
    """Pump–probe delays of a scan, visited in shuffled order."""
    interval: float = 6.0
    """Lab time from frame to frame, seconds."""
    seed: int = 0
    """Everything random follows from it."""

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        if self.frames < 1 or min(self.shape) < 16:
            raise ValueError(f"{self.frames} frames of {self.shape} cannot be simulated: give ≥ 1 frame of ≥ 16×16.")
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern is {self.pattern!r}, which is not known. Choose rings or spots.")
        if not self.dose > 0:
            raise ValueError(f"dose is {self.dose}, but there must be something to see. Give counts per pixel > 0.")

    @cached_property
    def shifts(self) -> Image:
        """True shift to apply to each frame (frame, 2), pixels (y, x)."""
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
        """Relative intensity of each frame (frame,): decays and fluctuates by a percent; 0 without beam."""
        rng = np.random.default_rng([self.seed, 2])
        decay = (1 - self.decay) ** (np.arange(self.frames) / max(self.frames - 1, 1))
        return np.where(self.kind == KINDS.index("dark"), 0, decay * rng.normal(1, 0.01, self.frames))

    @cached_property
    def kind(self) -> npt.NDArray[np.int8]:
        """Index into :data:`KINDS` for each frame (frame,)."""
        index = np.arange(self.frames)
        kind = np.where(index % 5 == 2, KINDS.index("unpumped"), KINDS.index("pumped"))
        if self.dark_every:
            kind = np.where(index % self.dark_every == self.dark_every - 1, KINDS.index("dark"), kind)
        return kind.astype(np.int8)

    @cached_property
    def scan(self) -> npt.NDArray[np.int32]:
        """Number of the scan of each frame (frame,)."""
        return (np.arange(self.frames) // self.delays).astype(np.int32)

    @cached_property
    def delay(self) -> Image:
        """Pump–probe delay of each frame (frame,), ps; every scan visits each once in shuffled order."""
        rng = np.random.default_rng([self.seed, 3])
        values = np.linspace(-2, 10, self.delays)
        scans = -(-self.frames // self.delays)
        return np.concatenate([rng.permutation(values) for _ in range(scans)])[: self.frames]

    @cached_property
    def detector(self) -> "Detector":
        """The static part: beam-block, hot and dead pixels."""
        return Detector.of(self)

    def pumped(self, index: int) -> float:
        """Relative loss of the pattern's intensity by the pump in this frame."""
        excited = self.kind[index] == KINDS.index("pumped") and self.delay[index] > 0
        return float(_PUMP_EFFECT * (1 - np.exp(-self.delay[index]))) if excited else 0.0

    def expected(self, index: int) -> Image:
        """Return the expected counts (y, x) of one frame, without noise."""
        pattern = evaluate(self.pattern, self.shape, self.shifts[index], loss=self.pumped(index))
        return self.detector.see(self.dose * self.intensity[index] * pattern)

    def render(self, index: int) -> npt.NDArray[np.uint16]:
        """Return one frame of counts (y, x); the same whatever else is rendered."""
        rng = np.random.default_rng([self.seed, 4, index])
        counts = rng.poisson(self.expected(index))
        if self.spikes:
            hit = rng.random(self.shape) < self.spikes
            counts = counts + hit * rng.integers(1, int(20 * self.dose) + 20, size=self.shape)
        return np.minimum(counts, np.iinfo(np.uint16).max).astype(np.uint16)


@dataclass(frozen=True, eq=False)
class Detector:
    """What stays where it is while the pattern moves."""

    block: Mask
    """True under the beam-block (y, x)."""
    gain: Image
    """0 for dead pixels, else 1."""
    glow: Image
    """Counts that do not come from the pattern (y, x)."""
    mask: Mask = field(repr=False)
    """True = valid: neither blocked nor hot nor dead."""

    @classmethod
    def of(cls, experiment: Experiment) -> "Detector":
        """Lay out block and bad pixels for this experiment."""
        shape = experiment.shape
        rng = np.random.default_rng([experiment.seed, 5])
        block = beam_block(shape)
        kinds = rng.random(shape)
        dead = kinds < experiment.dead_pixels
        hot = (kinds > 1 - experiment.hot_pixels) & ~dead
        glow = np.where(block, _GLOW * experiment.dose, 0) + np.where(hot, _HOT * experiment.dose, 0)
        return cls(block, np.where(dead, 0.0, 1.0), glow, ~(block | dead | hot))

    def see(self, pattern: Image) -> Image:
        """Return the expected counts on the detector under this pattern."""
        return self.gain * (np.where(self.block, 0, pattern) + self.glow)


def beam_block(shape: tuple[int, int]) -> Mask:
    """Return a disc over the direct beam, held by an arm from the left; True where it is."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    size = min(shape)
    dy, dx = y - (shape[0] - 1) / 2, x - (shape[1] - 1) / 2
    disc = dy**2 + dx**2 < (0.08 * size) ** 2
    return np.asarray(disc | ((np.abs(dy) < 0.03 * size) & (dx < 0)))


def evaluate(pattern: Pattern, shape: tuple[int, int], shift: npt.ArrayLike, *, loss: float = 0.0) -> Image:
    """Return the pattern's intensity at the coordinates moved by a shift: ``out(p) = pattern(p + shift)``.

    Parameters
    ----------
    pattern : {"rings", "spots"}
        What the sample scatters; its brightest feature has height 1.
    shape : tuple of int
        (y, x).
    shift : array_like of 2 floats
        The shift that, applied to the result, lays it on the unshifted pattern, pixels.
    loss : float
        Part of the features' intensity that the pump takes away.

    Examples
    --------
    >>> still, moved = evaluate("rings", (64, 64), (0, 0)), evaluate("rings", (64, 64), (0, 3))
    >>> np.allclose(moved[:, :-3], still[:, 3:])
    True
    """
    dy, dx = np.asarray(shift, dtype=np.float64)
    y = np.arange(shape[0]) - (shape[0] - 1) / 2 + dy
    x = np.arange(shape[1]) - (shape[1] - 1) / 2 + dx
    size = float(min(shape))
    out = np.empty(shape)
    rings = pattern == "rings"
    heights = _HEIGHTS * (1 - loss) if rings else np.zeros(0)
    _add_rings(
        y,
        x,
        _RADII[: len(heights)] * size,
        heights,
        0.012 * size,
        (_BACKGROUND, _BACKGROUND_LENGTH * size),
        out,
    )
    if not rings:
        _add_spots(y, x, size, 1 - loss, out)
    return out


@numba.njit(nogil=True, cache=True)
def _add_rings(
    y: Image,
    x: Image,
    radii: Image,
    heights: Image,
    width: float,
    background: tuple[float, float],
    out: Image,
) -> None:
    """Gaussian rings on a background that falls off exponentially from the beam."""
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
    """Gaussian spots on a slightly turned square lattice, fading outwards, no two alike."""
    width, step = 0.008 * size, _LATTICE * size
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
