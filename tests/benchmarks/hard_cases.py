"""What hard cases give: lattices, the detector's own pattern, changing patterns, wrong inputs, wrong patterns.

    python tests/benchmarks/hard_cases.py [--rows lattices detector ...] [--frames 200] [--seed 1] [--json FILE]
    python tests/benchmarks/hard_cases.py --quick

Frames are rendered at their true sub-pixel shifts, with Poisson noise. Geometries, layers and shifts are drawn by the
seed. The shift is what must be applied to a frame to lay it on the reference: a frame at s is pattern(p + s).
``--rows`` takes groups, or parts of the names of rows. ``--reference first`` makes the references of the group
"detector" from frames that have not moved, in place of frames spread over the drift.

Groups: lattices, detector, small-drift, calibrated, changes, others, wrong, peers, pictures.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
    os.environ[f"{library}_NUM_THREADS"] = "1"

import numpy as np
import scipy.fft
import scipy.ndimage
from ecc import SIZES, Ecc, available

import stillframe as sf

DATA = Path(__file__).parents[3] / "shared" / "data"
SIDE, DRIFT, MEMBERS = 384, 6.0, 32
"""Width of the detector in most groups, largest shift, frames of a reference."""
SCENE_FRAMES = 25
"""Frames of one scene of a lattice, besides those of its reference."""
QUICK_FRAMES, QUICK_MEMBERS, QUICK_SCENES = 12, 8, 12
"""A quick run only shows whether the script works and where gross faults are."""
LEVELS = {
    "rings": {"faint": 1.0, "bright": 60.0, "brilliant": 1000.0},
    "spots": {"faint": 0.3, "bright": 3.5, "brilliant": 100.0},
}
"""Mean counts per pixel. At the bright level the bound of the clean rows is 0.004 px for rings, 0.021 px for spots; at
the brilliant level, of clean rows and of those with texture alone, noise is far below the texture."""


# Figures


def shifts_of(matches):
    return np.stack([matches["dy"], matches["dx"]], axis=1)


def sigmas_of(matches):
    return np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1)


def flags_of(matches):
    """Number of frames of each combination of flags, good ones left out."""
    names = ["+".join(flag.name.lower() for flag in sf.Flag if flag & int(value)) for value in matches["flag"] if value]
    return dict(Counter(names))


def slope(error, truth):
    """Slope of the error against the true shift, in %, of the axis with the larger one."""
    if len(error) < 3:
        return np.nan
    both = [100 * np.polyfit(truth[:, axis], error[:, axis], 1)[0] for axis in (0, 1)]
    return float(max(both, key=abs))


def rms(values):
    return float(np.sqrt(np.mean(np.square(values)))) if np.size(values) else np.nan


def figures(matches, truth, offset=None):
    """Figures of the good frames; the common offset is their mean unless it is given."""
    good = (matches["flag"] == 0) & np.isfinite(matches["dy"])
    error, sigma = (shifts_of(matches) - truth)[good], sigmas_of(matches)[good]
    deviation = error - (error.mean(axis=0) if offset is None else offset) if len(error) else error
    return {
        "frames": len(matches),
        "rms": rms(deviation),
        "sigma": float(sigma.mean()) if len(sigma) else np.nan,
        "z": rms(deviation / sigma),
        "pull": slope(error, truth[good]),
        "flagged": int(np.sum(~good)),
        "flags": flags_of(matches),
    }


@dataclass
class Words:
    """Warnings and the refusal of one row."""

    said: list = field(default_factory=list)
    refusal: str = ""

    @property
    def short(self):
        first = self.refusal or (self.said[0] if self.said else "")
        return first[:110].replace("\n", " ").replace("|", "/")


class Refused(Exception):
    """The package refused the input in words."""


def listening(words, work, *arguments, **options):
    """Call the package; keep its warnings, and turn its refusals into :class:`Refused`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return work(*arguments, **options)
        except (ArithmeticError, AssertionError, IndexError, np.linalg.LinAlgError) as error:
            words.refusal = f"CRASH {type(error).__name__}: {error}"
            raise Refused from error
        except (ValueError, sf.RunStopped) as error:
            words.refusal = str(error)
            raise Refused from error
        finally:
            words.said.extend(str(one.message) for one in caught)


# Patterns


RADII = np.array([0.13, 0.19, 0.25, 0.31, 0.37, 0.44])
HEIGHTS = np.array([1.0, 0.7, 0.5, 0.35, 0.22, 0.15])


@dataclass(frozen=True)
class Pattern:
    """Rings or spots of a crystal with the glow of the direct beam; called with a shift it gives expected counts."""

    kind: str
    side: int = SIDE
    mean: float = 1.0
    """Mean counts per pixel outside the block."""
    scale: float = 1.0
    """Stretch of the radii, or of the period of the spots."""
    turn: float = 0.2
    """Rotation of the spots, radian."""
    order: tuple = (0, 1, 2, 3, 4, 5)
    """Which height each ring has; of spots, the first number changes the heights."""
    glow: float = 1.5
    glow_length: float = 0.09

    @cached_property
    def features(self):
        """Radii and heights of the rings, or places and heights of the spots; lengths in pixels."""
        if self.kind == "rings":
            return self.scale * RADII * self.side, HEIGHTS[list(self.order)]
        axes = np.array([[np.cos(self.turn), -np.sin(self.turn)], [np.sin(self.turn), np.cos(self.turn)]])
        miller = np.array(list(np.ndindex(13, 13))) - 6
        places = 0.09 * self.scale * self.side * miller @ axes.T
        fall = np.exp(-np.hypot(*places.T) / (0.25 * self.side))
        heights = 1.4 * fall * (0.55 + 0.45 * np.sin(7 * miller @ [1.3, 2.1] + self.order[0]))
        return places, heights

    @cached_property
    def unit(self):
        """Counts of a height of 1."""
        return self.mean / self.bare((0, 0))[~block(self.side)].mean()

    def bare(self, shift, factors=None):
        """Intensity (y, x) relative to the brightest feature; ``factors`` multiply the heights of the features."""
        axis = np.arange(self.side) - (self.side - 1) / 2
        y, x = axis + shift[0], axis + shift[1]
        radius = np.hypot(y[:, None], x[None])
        out = self.glow * np.exp(-radius / (self.glow_length * self.side)) + 0.02
        places, heights = self.features
        heights = heights if factors is None else heights * factors
        if self.kind == "rings":
            for place, height in zip(places, heights, strict=True):
                out += height * np.exp(-0.5 * ((radius - place) / (0.012 * self.side)) ** 2)
            return out
        columns = [np.exp(-0.5 * ((a[:, None] - places[:, k]) / (0.008 * self.side)) ** 2) for k, a in ((0, y), (1, x))]
        return out + (columns[0] * heights) @ columns[1].T

    def __call__(self, shift, factors=None):
        return self.unit * self.bare(shift, factors)


def block(side):
    """Beam-block (y, x), True where it is: a disc over the direct beam, held by an arm from the left."""
    axis = np.arange(side) - (side - 1) / 2
    y, x = axis[:, None], axis[None]
    return (y**2 + x**2 < (0.08 * side) ** 2) | ((np.abs(y) < 0.03 * side) & (x < 0))


class Picture:
    """A pattern made from a real picture. It is smoothed, its holes are filled, and splines move it.

    The smoothing and a floor keep the noise of the picture, which no reference can follow, out of the bound.
    """

    BORDER = 12

    def __init__(self, image, valid, mean, smoothing):
        def smooth(width):
            weight = scipy.ndimage.gaussian_filter(valid.astype(float), width)
            return scipy.ndimage.gaussian_filter(np.where(valid, image, 0.0), width) / np.maximum(weight, 1e-9)

        near = scipy.ndimage.gaussian_filter(valid.astype(float), 1.0) > 0.3
        content = np.maximum(np.where(near, smooth(smoothing), smooth(12.0)), 0)
        self.valid = self.cut(valid)
        content = content + 0.05 * self.cut(content)[self.valid].mean()
        self.scale = mean / self.cut(content)[self.valid].mean()
        self.spline = scipy.ndimage.spline_filter(self.scale * content, order=5, mode="nearest")

    def cut(self, image):
        return image[self.BORDER : -self.BORDER, self.BORDER : -self.BORDER]

    def __call__(self, shift, factors=None):
        moved = scipy.ndimage.shift(self.spline, -np.asarray(shift), order=5, mode="nearest", prefilter=False)
        return np.maximum(self.cut(moved), 1e-3)


# Detector's own pattern


@dataclass(frozen=True, eq=False)
class Detector:
    """What does not move: shade, gain, added counts."""

    open: np.ndarray
    """True where the pattern is seen (y, x)."""
    gain: np.ndarray
    added: np.ndarray
    """Expected counts that do not move (y, x)."""
    mask: np.ndarray | None
    """The mask that the package is given; None for none."""

    def expected(self, pattern):
        return np.where(self.open, self.gain * pattern, 0) + self.added

    @property
    def used(self):
        return self.open if self.mask is None else self.mask & self.open


def detector(kind, row, mean, open_, rng):
    """The detector of a row; ``kind`` is unused but for the places of the scatter."""
    shape = open_.shape
    gain, added, mask = np.ones(shape), np.zeros(shape), open_
    if "texture" in row:
        percent = float(row.split("texture ")[1].split(" ")[0])
        gain = np.maximum(1 + percent / 100 * rng.normal(size=shape), 0.05)
    if "scatter" in row:
        times = 3.0 if "3 ×" in row else 1.0
        y, x = (np.arange(length)[:, None] / length - 0.5 for length in shape)
        centre = rng.uniform(-0.1, 0.1, 2)
        hump = np.exp(-0.5 * ((y - centre[0]) ** 2 + (x.T - centre[1]) ** 2) / 0.15**2)
        added = np.where(open_, hump * times * mean / hump[open_].mean(), 0)
    if "hot" in row:
        hot = (rng.random(shape) < 0.03) & open_
        added = added + hot * mean * np.exp(rng.uniform(np.log(2), np.log(40), shape))
    if "offsets" in row:
        added = mean * np.maximum(4 + rng.normal(size=shape if "pixels" in row else (1, shape[1])) + np.zeros(shape), 0)
    if row == "no mask at all":
        added, mask = np.where(open_, added, 0.05 * mean), None
    return Detector(open_, gain, added, mask)


def bound(pattern, screen, shifts, factors=None):
    """Cramér–Rao bound of a shift, (2,) px: rms over some shifts; gain and offset unknown, the layers known."""
    squares, step = [], 0.05
    for shift in np.asarray(shifts, float):
        middle = pattern(shift, factors)
        slopes = [(pattern(shift + e, factors) - pattern(shift - e, factors)) / (2 * step) for e in step * np.eye(2)]
        used = screen.used
        columns = np.stack([screen.gain[used] * one[used] for one in (*slopes, middle, np.ones_like(middle))])
        mean = np.maximum(screen.expected(middle)[used], 1e-9)
        squares.append(np.diag(np.linalg.inv((columns / mean) @ columns.T))[:2])
    return np.sqrt(np.mean(squares, axis=0))


@dataclass(frozen=True, eq=False)
class Stack:
    """Frames of a run with their true shifts; which make the reference, which are measured."""

    frames: np.ndarray
    truth: np.ndarray
    use: slice
    measured: np.ndarray
    """Indices of the frames that are judged."""
    unchanged: np.ndarray | None = None
    """Indices of the frames that define the common offset, if others than those that are judged."""


def counts(rng, expected):
    return np.minimum(rng.poisson(expected), 65535).astype(np.uint16)


def half_lost(pattern, rng):
    """Factors of the features: half of one ring's or of the spots' intensity is lost."""
    if pattern.kind == "rings":
        return np.where(np.arange(len(RADII)) == 1, 0.5, 1.0)
    return np.full(len(pattern.features[1]), 0.5)


def record(pattern, screen, rng, task, drift=DRIFT, lost=None):
    """Draw a stack with the frames of the reference spread over it; with ``lost``, its second part has less.

    With ``--reference first`` the frames of the reference have hardly moved.
    """
    frames, used = task.frames, task.members
    first = used + (frames if lost is None else max(frames // 2, 12))
    number = first if lost is None else first + frames
    step = first // used
    members = np.arange(0, step * used, step)
    truth = rng.uniform(-drift, drift, (number, 2))
    if task.reference == "first":
        truth[members] = truth[members[0]] + rng.uniform(-0.3, 0.3, (used, 2))
    factors = [None] * first + [lost] * (number - first)
    drawn = np.stack([counts(rng, screen.expected(pattern(s, f))) for s, f in zip(truth, factors, strict=True)])
    others = np.setdiff1d(np.arange(first), members)
    measured, unchanged = (others, None) if lost is None else (np.arange(first, number), others)
    return Stack(drawn, truth, slice(0, step * used, step), measured, unchanged)


def judge(stack, mask, words, max_shift=16, **options):
    """Make the reference of a stack, match all frames, and return the figures of those that are judged."""
    reference = listening(
        words, sf.make_reference, stack.frames, mask, use=stack.use, iterations=3, max_shift=max_shift, **options
    )
    matches = listening(words, sf.match_frames, stack.frames, reference)
    offset = None
    if stack.unchanged is not None:
        usual = matches[stack.unchanged]
        fine = usual["flag"] == 0
        offset = (shifts_of(usual) - stack.truth[stack.unchanged])[fine].mean(axis=0) if fine.any() else None
    return figures(matches[stack.measured], stack.truth[stack.measured], offset)


DETECTOR_ROWS = (
    "clean",
    "texture 3 %",
    "texture 10 %",
    "scatter as bright as the mean",
    "scatter 3 × the mean",
    "3 % hot pixels, unmasked",
    "no mask at all",
    "half of the intensity lost",
)
TEXTURED = ("texture 10 %",)
OFFSETS = ("offsets of pixels", "offsets of columns")
"""Their standard deviation is the mean of the pattern."""
DETECTOR_LEVELS = {
    "faint": ("clean", "texture 10 %", "scatter as bright as the mean", "scatter 3 × the mean", *DETECTOR_ROWS[5:]),
    "bright": (*DETECTOR_ROWS, *OFFSETS),
    "brilliant": DETECTOR_ROWS[:3],
}
"""Rows of the group "detector"; the other two groups have the bright ones, and texture at the brilliant level."""


def detector_row(task):
    kind, level, row = task.row.split(" | ")
    rng, words = task.rng(), Words()
    drift = 0.3 if task.group == "small-drift" else DRIFT
    pattern = Pattern(kind, mean=LEVELS[kind][level])
    screen = detector(kind, row, pattern.mean, ~block(SIDE), rng)
    lost = half_lost(pattern, rng) if row.startswith("half") else None
    stack = record(pattern, screen, rng, task, drift, lost)
    options = {"dark": screen.added, "flat": screen.gain} if task.group == "calibrated" else {}
    try:
        found = judge(stack, screen.mask, words, **options)
    except TypeError as error:
        return {"skipped": f"make_reference: {error}"}
    except Refused:
        return {"refused": words.short}
    least = rms(bound(pattern, screen, stack.truth[:5], lost))
    return found | {"bound": least, "ratio": found["rms"] / least, "words": words.short}


# Changing patterns


CHANGES = (
    "gradient of 1 count, mean 4",
    "gradient of 1 count, mean 10",
    "hump of 10 %",
    "hump of 30 %",
    "hump of 50 %",
    "single features ±10 %",
    "single features ±30 %",
    "single features ±50 %",
)


def changed(pattern, row, shift, rng):
    """Expected pattern of a frame with the change of a row, drawn anew for each frame."""
    side = pattern.side
    y, x = np.arange(side)[:, None] / side - 0.5, np.arange(side)[None] / side - 0.5
    if row.startswith("gradient"):
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.cos(angle) * y + np.sin(angle) * x
        return pattern(shift) + 0.5 + ramp / np.ptp(ramp)
    share = float(row.strip(" %").split(" ")[-1].strip("±")) / 100
    if row.startswith("hump"):
        centre, width = rng.uniform(-0.25, 0.25, 2), rng.uniform(0.1, 0.3)
        hump = np.exp(-0.5 * ((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / width**2)
        return pattern(shift) + share * pattern.mean * hump / hump.mean()
    heights = pattern.features[1]
    factors = np.ones(len(heights))
    strong = np.argsort(heights)[::-1][: 4 if pattern.kind == "rings" else 24]
    chosen = rng.choice(strong, 1 if pattern.kind == "rings" else 3, replace=False)
    factors[chosen] += share * rng.choice([-1, 1])
    return pattern(shift, factors)


def changes_row(task):
    """The reference and a third of the frames are unchanged; these define the common offset."""
    kind, row = task.row.split(" | ")
    rng, words = task.rng(), Words()
    mean = float(row.split("mean ")[1]) if "mean" in row else 5.0
    pattern, mask = Pattern(kind, mean=mean), ~block(SIDE)
    usual = max(task.frames // 3, 12)
    first = task.members + usual
    places, truth = np.arange(first + task.frames), rng.uniform(-DRIFT, DRIFT, (first + task.frames, 2))
    expected = (
        pattern(shift) if place < first else changed(pattern, row, shift, rng)
        for place, shift in zip(places, truth, strict=True)
    )
    drawn = np.stack([counts(rng, np.where(mask, one, 0)) for one in expected])
    stack = Stack(drawn, truth, slice(task.members), places[first:], places[task.members : first])
    try:
        return judge(stack, mask, words) | {"words": words.short}
    except Refused:
        return {"refused": words.short}


# Lattices


@dataclass(frozen=True)
class Lattice:
    """A scene: one lattice of spots, one dose, one way to make the reference."""

    geometry: str
    size: int
    basis: tuple
    """Two lattice vectors (y, x), pixels."""
    spot: float
    heights: float
    """Standard deviation of the heights, relative; they are cut at 0."""
    envelope: float
    """Standard deviation of the Gaussian envelope, pixels; infinity for none."""
    dose: float
    """Counts at a spot."""
    background: float
    """Counts between spots, relative to the dose."""
    members: int
    """Frames of the reference."""
    beyond: bool
    """Whether the drift leaves the window."""

    @property
    def periodic(self):
        return self.heights == 0 and not np.isfinite(self.envelope)

    @property
    def distinct(self):
        return (self.heights >= 0.3 or np.isfinite(self.envelope)) and self.dose >= 30

    @property
    def kind(self):
        if self.periodic:
            return "exactly periodic, beyond the window" if self.beyond else "exactly periodic"
        if self.beyond:
            return "not periodic, beyond the window"
        return "heights ≥ 30 % or envelope, dose ≥ 30" if self.distinct else "other"


def draw_lattice(rng, reported):
    """Draw a scene; ``reported`` ones are square lattices of the narrower ranges in which faults were found."""
    envelope = rng.choice([np.inf, 400, 250])
    if reported:
        period = rng.uniform(18, 30) if rng.random() < 0.5 else float(rng.integers(18, 31))
        basis = ((period, 0.0), (0.0, period))
        heights, members = rng.choice([0.1, 0.3, 0.5]), rng.choice([1, 16], p=[0.75, 0.25])
        size = int(rng.choice([1024, 2048], p=[0.85, 0.15]))
        return Lattice("square", size, basis, 2.0, float(heights), float(envelope), 100.0, 0.0, int(members), False)
    geometry = str(rng.choice(["square", "hexagonal", "oblique"]))
    period = float(np.exp(rng.uniform(np.log(12), np.log(60))))
    period = float(round(period)) if rng.random() < 0.3 else period
    ratio, angle = {"square": (1.0, 90.0), "hexagonal": (1.0, 60.0)}.get(
        geometry, (rng.uniform(0.7, 1.4), rng.uniform(65, 115))
    )
    turn = rng.choice([0.0, rng.uniform(0, np.pi)])
    other = min(max(period * ratio, 12.0), 60.0)
    directions = turn, turn + np.deg2rad(angle)
    basis = tuple(
        (float(length * np.sin(a)), float(length * np.cos(a)))
        for length, a in zip((period, other), directions, strict=True)
    )
    return Lattice(
        geometry,
        int(rng.choice([256, 512, 1024, 2048], p=[0.58, 0.33, 0.075, 0.015])),
        basis,
        float(rng.uniform(1.5, min(4.0, min(period, other) / 4))),
        float(rng.choice([0, 0.1, 0.3, 0.5, 1.0])),
        float(envelope),
        float(np.exp(rng.uniform(np.log(3), np.log(300)))),
        float(rng.choice([0, 0.02, 0.1])),
        int(rng.choice([1, 16], p=[0.7, 0.3])),
        bool(rng.random() < 0.2),
    )


class LatticeFrames:
    """Renders a scene: spots on a larger canvas that is 0 at its border, moved by a phase in Fourier space."""

    MARGIN = 64

    def __init__(self, scene, rng):
        self.scene, self.edge = scene, self.MARGIN + int(np.ceil(8 * scene.spot)) + 1
        side = scipy.fft.next_fast_len(scene.size + 2 * self.edge, real=True)
        self.spectrum = scipy.fft.rfft2(self._canvas(side, rng))
        self.frequencies = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
        self.side = side

    def _canvas(self, side, rng):
        scene, canvas = self.scene, np.zeros((side, side))
        basis, centre = np.array(scene.basis), self.edge + (scene.size - 1) / 2
        count = int(1.5 * side / min(np.linalg.norm(basis, axis=1))) + 2
        count = int(count / max(abs(np.linalg.det(basis)) / np.prod(np.linalg.norm(basis, axis=1)), 0.3))
        orders = np.stack(np.meshgrid(*[np.arange(-count, count + 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
        places = orders @ basis + rng.uniform(-0.5, 0.5, 2) @ basis + centre
        reach = int(np.ceil(6 * scene.spot))
        inside = ((places > reach + 1) & (places < scene.size + 2 * self.edge - reach - 2)).all(axis=1)
        places = places[inside]
        heights = np.maximum(rng.normal(1, scene.heights, len(places)), 0) if scene.heights else np.ones(len(places))
        if np.isfinite(scene.envelope):
            heights = heights * np.exp(-0.5 * np.sum((places - centre) ** 2, axis=1) / scene.envelope**2)
        for (y, x), height in zip(places, scene.dose * heights, strict=True):
            i, j = int(y) - reach, int(x) - reach
            rows, columns = (
                np.exp(-0.5 * ((np.arange(k, k + 2 * reach + 2) - a) / scene.spot) ** 2) for k, a in ((i, y), (j, x))
            )
            canvas[i : i + len(rows), j : j + len(columns)] += height * np.outer(rows, columns)
        return canvas

    def expected(self, shift):
        """Counts at p + shift, (y, x)."""
        whole = np.floor(shift).astype(int)
        fraction = np.asarray(shift) - whole
        phase = [np.exp(2j * np.pi * f * k) for f, k in zip(self.frequencies, fraction, strict=True)]
        moved = scipy.fft.irfft2(self.spectrum * phase[0] * phase[1], (self.side, self.side))
        i, j = self.edge + whole
        cut = moved[i : i + self.scene.size, j : j + self.scene.size]
        return np.maximum(cut, 0) + self.scene.background * self.scene.dose

    def separation(self):
        """Least distance, in standard deviations, between the pattern and itself moved by a short lattice vector.

        Gain and offset are free, both pictures have noise. What is below about 10 nobody can tell apart.
        """
        a, b = np.array(self.scene.basis)
        short = sorted((a, b, a - b, a + b), key=np.linalg.norm)[:3]
        still, distances = self.expected((0, 0)), []
        weight = 1 / np.maximum(still, 0.02 * self.scene.dose).ravel()
        for vector in short:
            if np.abs(vector).max() > self.MARGIN:
                continue
            columns = np.stack([self.expected(vector).ravel(), np.ones(still.size)])
            solution = np.linalg.solve((columns * weight) @ columns.T, (columns * weight) @ still.ravel())
            residual = still.ravel() - solution @ columns
            distances.append(np.sqrt(np.sum(residual**2 * weight) / (1 + 1 / self.scene.members)))
        return float(min(distances, default=np.inf))


def lattice_shifts(rng, scene, number):
    if not scene.beyond:
        return rng.uniform(-28, 28, (number, 2))
    shifts = rng.uniform(-28, 28, (number, 2))
    far = rng.uniform(36, 50, number) * rng.choice([-1, 1], number)
    shifts[np.arange(number), rng.integers(0, 2, number)] = far
    return shifts


def position(image, mask, render, candidates):
    """Return which of the members' true shifts the reference lies at, by correlation with noiseless frames."""
    if len(candidates) == 1:
        return candidates[0]
    scores = [np.corrcoef(image[mask], render.expected(shift)[mask])[0, 1] for shift in candidates]
    return candidates[int(np.argmax(scores))]


def lattice_scene(task):
    rng, words = task.rng(), Words()
    scene = draw_lattice(rng, reported=task.index % 12 == 0)
    scene = replace(scene, size=min(scene.size, task.largest))
    render = LatticeFrames(scene, rng)
    members = rng.uniform(-3, 3, (scene.members, 2))
    if scene.members == 1:
        members[:] = 0
    about = {"kind": scene.kind, "separation": render.separation(), "scene": asdict(scene), "frames": SCENE_FRAMES}
    about["reported"] = task.index % 12 == 0
    stack = np.stack([counts(rng, render.expected(shift)) for shift in members])
    try:
        many = {"use": slice(scene.members), "iterations": 3} if scene.members > 1 else {"use": 0}
        reference = listening(words, sf.make_reference, stack, **many, max_shift=32)
        truth = lattice_shifts(rng, scene, SCENE_FRAMES)
        drawn = (counts(rng, render.expected(shift)) for shift in truth)
        matches = np.concatenate([listening(words, sf.match_frames, one[None], reference) for one in drawn])
    except Refused:
        nothing = {"right": 0, "imprecise": 0, "wrong": 0, "edge_right": 0, "edge_wrong": 0}
        return (
            about
            | nothing
            | {"flags": {"crashed" if "CRASH" in words.short else "refused": SCENE_FRAMES}, "words": words.short}
        )
    truth = truth - position(reference.image, reference.mask, render, members)
    return about | lattice_figures(matches, truth) | {"words": words.short}


def lattice_figures(matches, truth):
    good = (matches["flag"] == 0) & np.isfinite(matches["dy"])
    error, sigma = (shifts_of(matches) - truth)[good], sigmas_of(matches)[good]
    near = np.abs(error).max(axis=1) < 1 if len(error) else np.zeros(0, bool)
    deviation = error - (np.median(error[near], axis=0) if near.any() else 0)
    within = (np.abs(deviation) <= 5 * sigma).all(axis=1) if len(error) else near
    # A shift found outside of the window is flagged at_edge, and may be right.
    edge = (matches["flag"] == int(sf.Flag.AT_EDGE)) & np.isfinite(matches["dy"])
    edge_right = np.abs((shifts_of(matches) - truth)[edge]).max(axis=1, initial=0) < 1
    return {
        "right": int(np.sum(near & within)),
        "imprecise": int(np.sum(near & ~within)),
        "wrong": int(np.sum(~near)),
        "largest": float(np.abs(error).max(initial=0)),
        "edge_right": int(edge_right.sum()),
        "edge_wrong": int(np.sum(~edge_right)),
        "flags": flags_of(matches),
    }


# Others


@dataclass(frozen=True, eq=False)
class Case:
    """Frames of a kind that an earlier version got wrong, and the true shifts of the frames that are judged."""

    frames: np.ndarray
    truth: np.ndarray
    measured: slice
    mask: np.ndarray | None = None
    use: int | slice | None = field(default_factory=lambda: slice(16))
    iterations: int = 3
    options: dict = field(default_factory=dict)
    changes: dict = field(default_factory=dict)
    """Arguments of ``Reference.replace``."""


def usual_case(rng, number, kind, mean, side=SIDE):
    """Clean frames of which the first 16 make the reference."""
    pattern, open_ = Pattern(kind, side, mean), ~block(side)
    truth = rng.uniform(-DRIFT, DRIFT, (number + 16, 2))
    frames = np.stack([counts(rng, np.where(open_, pattern(shift), 0.05 * mean)) for shift in truth])
    return Case(frames, truth, slice(16, None), open_, options={"max_shift": 16})


def inverted_mask(rng, number, kind):
    """Behind the block is a glow; a few hot and dead pixels, which the mask excluded, are valid now."""
    case = usual_case(rng, number, kind, 20.0, 512)
    kinds = rng.random(case.mask.shape)
    frames = np.where(kinds < 3e-4, 0, case.frames)
    frames = np.where(kinds > 1 - 2e-4, rng.poisson(800, frames.shape), frames).astype(np.uint16)
    return replace(case, frames=frames, mask=~(case.mask & (kinds >= 3e-4) & (kinds <= 1 - 2e-4)))


def rows_lost(rng, number, kind):
    case = usual_case(rng, number, kind, 20.0, 512)
    for frame in case.frames[16:]:
        first = rng.integers(0, 400)
        frame[first : first + 112] = 0
    return case


def first_frames(what):
    """The first 16 frames hold no pattern, and make the reference; what they hold is in all frames."""

    def make(rng, number, kind):
        case = usual_case(rng, number, kind, 5.0)
        y, x = np.arange(SIDE)[:, None] / SIDE - 0.55, np.arange(SIDE)[None] / SIDE - 0.4
        expected = {
            "dark": np.broadcast_to(rng.uniform(1, 3, SIDE), (SIDE, SIDE)),
            "laser": 20 * np.exp(-0.5 * (y**2 + x**2) / 0.2**2),
            "empty": np.zeros((SIDE, SIDE)),
        }[what]
        case.frames[:16] = 0
        return replace(case, frames=case.frames + counts(rng, np.broadcast_to(expected, case.frames.shape)), use=None)

    return make


def stripes_in_reference(rng, number, kind):
    case = usual_case(rng, number, kind, 5.0)
    for index in (3, 9):
        case.frames[index, :, 40::96] = 65535
    return case


def hot_line(axis):
    def make(rng, number, kind):
        case = usual_case(rng, number, kind, 5.0)
        line = (slice(None), 250) if axis == 0 else (slice(None), slice(None), 250)
        case.frames[line] = rng.poisson(3000, case.frames[line].shape)
        return case

    return make


def smooth_change(what):
    def make(rng, number, kind):
        case = usual_case(rng, number, kind, 5.0)
        pattern = Pattern(kind, SIDE, 5.0)
        row = {"gradient": "gradient of 1 count, mean 5", "hump": "hump of 50 %"}[what]
        for index in range(16, len(case.frames)):
            expected = changed(pattern, row, case.truth[index], rng)
            case.frames[index] = counts(rng, np.where(case.mask, expected, 0))
        return case

    return make


def saturated_block(rng, number, kind):
    case = usual_case(rng, number, kind, 5.0)
    case.frames[:, 90:114, 240:264] = 65535
    return case


def sparse_mask(invalid):
    def make(rng, number, kind):
        case = usual_case(rng, number, kind, 20.0)
        return replace(case, mask=case.mask & (rng.random(case.mask.shape) >= invalid))

    return make


def whole_pixels_hot(rng, number, kind):
    case = usual_case(rng, number, kind, 1.0, 512)
    places = rng.integers(60, 450, (5, 2))
    for y, x in places:
        case.frames[:, y, x] = rng.poisson(20000, len(case.frames))
    return replace(case, use=0, changes={"subpixel": False})


def reference_of_hits(iterations):
    """One pixel in a hundred is hit, with up to 100 counts on a mean of 1; with a plain mean only in its frames."""

    def make(rng, number, kind):
        case = usual_case(rng, number, kind, 1.0)
        hit = rng.random(case.frames.shape) < 0.01
        hit[16 if iterations == 0 else len(hit) :] = False
        frames = case.frames + (hit * rng.integers(5, 100, case.frames.shape)).astype(np.uint16)
        return replace(case, frames=frames, iterations=iterations)

    return make


def wrapped(rng, number, kind):
    """A dark frame of 100 counts with readout noise was subtracted in uint16: values below 0 are near 65535."""
    case = usual_case(rng, number, kind, 3.0)
    noise = np.rint(rng.normal(0, 2, case.frames.shape)).astype(np.int64)
    return replace(case, frames=((case.frames + noise) % 65536).astype(np.uint16))


def packed(rng, number, kind):
    """Packed integers in a Zarr array with ``_FillValue``, scale and offset; opened by ``open_frames``."""
    import zarr

    case = usual_case(rng, number, kind, 5.0)
    missing = rng.random(case.mask.shape) < 0.01
    values = np.where(missing | ~case.mask, -32768, case.frames.astype(np.int64) * 4 - 100).astype(np.int16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.zarr"
        array = zarr.create_array(path, shape=values.shape, dtype="i2", chunks=(1, *values.shape[1:]))
        array.attrs.update({"_FillValue": -32768, "scale_factor": 0.25, "add_offset": 25.0})
        array[:] = values
        frames = sf.open_frames(path).compute().values
    return replace(case, frames=frames, mask=None)


def few_counts(rng, number, kind):
    """Fewer than 3 % of the pixels counted: 95,000 counts at 2048², or as few per pixel at 1024² in a quick run."""
    side, number = 1024 if number <= QUICK_FRAMES else 2048, min(number, 60)
    pattern = Pattern(kind, side, 95_000 / 2048**2, glow=0.2)
    truth = rng.uniform(-DRIFT, DRIFT, (number + 16, 2))
    open_ = ~block(side)
    frames = np.stack([counts(rng, np.where(open_, pattern(shift), 0)) for shift in truth])
    return Case(frames, truth, slice(16, None), open_, options={"max_shift": 16})


def normalised(rng, number, kind):
    """Floats 0…1 in which hits are the ones."""
    case = usual_case(rng, number, kind, 5.0)
    hit = rng.random(case.frames.shape) < 2e-4
    frames = (np.where(hit, 20000, case.frames) / 20000).astype(np.float32)
    return replace(case, frames=frames)


def some_saturated(rng, number, kind):
    """1.5 % of the valid pixels, the brightest, stand at the limit."""
    case = usual_case(rng, number, kind, 20.0)
    level = np.quantile(case.frames[:, case.mask], 0.985)
    return replace(case, frames=np.where(case.frames > level, 65535, case.frames).astype(np.uint16))


def another_at_whole_pixels(rng, number, kind):
    """Another pattern, whole pixels: nothing here is right, so that every good frame counts as wrong."""
    case = usual_case(rng, number, kind, 5.0)
    other = other_sample(Pattern(kind, SIDE, 5.0))
    for index in range(16, len(case.frames)):
        case.frames[index] = counts(rng, np.where(case.mask, other(case.truth[index]), 0))
    truth = case.truth.copy()
    truth[16:] += 1000
    return replace(case, truth=truth, changes={"subpixel": False})


OTHERS = {
    "inverted mask": inverted_mask,
    "112 of 512 rows lost": rows_lost,
    "first 16 frames dark": first_frames("dark"),
    "first 16 frames laser background": first_frames("laser"),
    "first 16 frames empty": first_frames("empty"),
    "two frames of the reference with stripes": stripes_in_reference,
    "hot row of 3000 counts": hot_line(0),
    "hot column of 3000 counts": hot_line(1),
    "gradient of 1 count": smooth_change("gradient"),
    "diffuse hump of 50 %": smooth_change("hump"),
    "saturated block in every frame": saturated_block,
    "scattered mask, 75 % invalid": sparse_mask(0.75),
    "scattered mask, 90 % invalid": sparse_mask(0.90),
    "whole pixels, 5 hot pixels": whole_pixels_hot,
    "whole pixels, another sample": another_at_whole_pixels,
    "reference with 1 % hits": reference_of_hits(3),
    "reference with 1 % hits, plain mean": reference_of_hits(0),
    "dark subtraction that wrapped around": wrapped,
    "packed integers with _FillValue": packed,
    "fewer than 3 % of the pixels counted": few_counts,
    "floats 0…1 with hits": normalised,
    "1.5 % saturated": some_saturated,
}
THROWN_AWAY = ("fewer than 3 % of the pixels counted", "floats 0…1 with hits", "1.5 % saturated")
"""Frames that must be good."""


def others_row(task):
    kind, row = task.row.split(" | ")
    rng, words = task.rng(), Words()
    try:
        case = listening(words, OTHERS[row], rng, task.frames, kind)
        reference = listening(
            words, sf.make_reference, case.frames, case.mask, use=case.use, iterations=case.iterations, **case.options
        )
        reference = reference.replace(**case.changes) if case.changes else reference
        matches = listening(words, sf.match_frames, case.frames[case.measured], reference)
    except Refused:
        return {"frames": task.frames, "right": 0, "wrong": 0, "refused": words.short, "words": words.short}
    return others_figures(matches, case.truth[case.measured]) | {"words": words.short}


def others_figures(matches, truth):
    """Right are good frames within 4 sigma of the truth, the common offset removed."""
    good = (matches["flag"] == 0) & np.isfinite(matches["dy"])
    error, sigma = (shifts_of(matches) - truth)[good], sigmas_of(matches)[good]
    deviation = np.abs(error - np.median(error, axis=0)) if len(error) and np.abs(error).max() < 500 else np.abs(error)
    wrong = (deviation > 4 * sigma).any(axis=1) if len(error) else np.zeros(0, bool)
    return {
        "frames": len(matches),
        "right": int(np.sum(~wrong)),
        "wrong": int(np.sum(wrong)),
        "largest": float(deviation.max(initial=0)),
        "sigma": float(sigma.mean()) if len(sigma) else np.nan,
        "flags": flags_of(matches),
    }


# Wrong patterns


def other_sample(pattern):
    """Another sample with another glow."""
    return replace(pattern, scale=1.13, turn=0.9, order=(3, 0, 5, 1, 4, 2), glow=0.4, glow_length=0.2)


def same_glow(pattern):
    """Other rings or spots around the same glow."""
    return replace(pattern, scale=1.13, turn=0.9, order=(3, 0, 5, 1, 4, 2))


WRONG = ("same glow", "double exposure", "another sample")


def wrong_row(task):
    kind, mean, row = task.row.split(" | ")
    rng, words = task.rng(), Words()
    pattern, open_ = Pattern(kind, mean=float(mean)), ~block(SIDE)
    case = usual_case(rng, 8, kind, pattern.mean)
    frames, other = [], same_glow(pattern) if row == "same glow" else other_sample(pattern)
    for shift in rng.uniform(-DRIFT, DRIFT, (task.frames, 2)):
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(4, 12)
        apart = distance * np.array([np.sin(angle), np.cos(angle)])
        twice = row == "double exposure"
        expected = (pattern(shift) + pattern(shift + apart)) / 2 if twice else other(shift)
        frames.append(counts(rng, np.where(open_, expected, 0)))
    try:
        reference = listening(words, sf.make_reference, case.frames, open_, use=slice(16), iterations=3, max_shift=16)
        usual = sf.match_frames(case.frames[16:], reference)
        matches = listening(words, sf.match_frames, np.stack(frames), reference)
    except Refused:
        return {"refused": words.short}
    return {
        "frames": len(matches),
        "flagged": int(np.sum(matches["flag"] != 0)),
        "flags": flags_of(matches),
        "usual_good": int(np.sum(usual["flag"] == 0)),
        "usual": len(usual),
    }


# Peers


TUNED, PEER_FRAMES = 24, 100
"""Frames with which the filter is chosen, and frames that OpenCV registers."""


def peers_row(task):
    """Ours and OpenCV's masked ECC on the same clean frames, ECC at its best filter."""
    kind, mean = task.row.split(" | ")
    rng = task.rng()
    pattern = Pattern(kind, mean=float(mean))
    screen = detector(kind, "clean", pattern.mean, ~block(SIDE), rng)
    stack = record(pattern, screen, rng, task)
    reference = sf.make_reference(stack.frames, screen.mask, use=stack.use, iterations=3, max_shift=16)
    frames, truth = stack.frames[stack.measured], stack.truth[stack.measured]
    sf.match_frames(frames[:1], reference)
    began = time.perf_counter()
    matches = sf.match_frames(frames, reference)
    spent = time.perf_counter() - began
    least = rms(bound(pattern, screen, truth[:5]))
    result = {"bound": least, "frames": len(frames)}
    result["stillframe"] = peer_figures(shifts_of(matches), truth, least, spent)
    if not available():
        return result | {"skipped": "OpenCV 5 is not installed"}
    whole = sf.match_frames(frames, reference.replace(subpixel=False))
    for start, starts in (("whole pixels", shifts_of(whole)), ("zero", np.zeros_like(truth))):
        few, some = slice(TUNED), slice(PEER_FRAMES)
        tried = {size: ecc_figures(reference, frames[few], truth[few], starts[few], size, least) for size in SIZES}
        best = min(tried, key=lambda size: (tried[size]["lost"] > 0.05 * TUNED, tried[size]["ratio"]))
        got, usual = (ecc_figures(reference, frames[some], truth[some], starts[some], k, least) for k in (best, 5))
        result[f"ECC from {start}"] = got | {"filter": best, "default": usual["ratio"]}
    return result


def ecc_figures(reference, frames, truth, starts, size, least):
    ecc = Ecc(reference.image, reference.mask, reference.frame_mask, size)
    began = time.perf_counter()
    found = np.stack([ecc.shift(frame, np.nan_to_num(start)) for frame, start in zip(frames, starts, strict=True)])
    return peer_figures(found, truth, least, time.perf_counter() - began)


def peer_figures(found, truth, least, seconds):
    """Error of the shifts within 2 px of the truth; the others are lost."""
    error = found - truth
    error = error - np.nanmedian(error, axis=0)
    kept = (np.abs(error) < 2).all(axis=1)
    spread = rms(error[kept] - error[kept].mean(axis=0)) if kept.any() else np.inf
    return {"rms": spread, "ratio": spread / least, "lost": int(np.sum(~kept)), "ms": 1e3 * seconds / len(found)}


# Pictures


PICTURES = {"chromium": (3.0, 2.0), "ewald": (3.0, 1.0), "hotspots": (3.0, 2.0)}
"""Pictures: mean counts per pixel of the frames that are made from them, and the smoothing, pixels."""
PICTURE_ROWS = (
    "clean",
    "texture 10 %",
    "scatter as bright as the mean",
    "texture 10 % and scatter",
    "hot pixels as found",
)


def load_picture(name):
    """Return a picture and its valid pixels."""
    import tifffile

    if name == "chromium":
        return np.load(DATA / "cr_reference_260.npy").astype(float), ~np.load(DATA / "cr_invalid_mask_260.npy")
    if name == "ewald":
        return tifffile.imread(DATA / "ewald_walkoff.tif"), tifffile.imread(DATA / "ewald_walkoff_mask.tif") > 0
    image = tifffile.imread(DATA / "hotspots.tif").astype(float)
    return image, image < 500


def pair_row():
    """The real pair of chromium patterns: (2, 4) at whole pixels."""
    reference, frame = (np.load(DATA / f"cr_{name}_260.npy") for name in ("reference", "data"))
    mask = ~np.load(DATA / "cr_invalid_mask_260.npy")
    (match,) = sf.match_frames(frame[None], sf.Reference(reference, mask))
    names = ("dy", "dx", "sigma_y", "sigma_x", "score")
    return {"pair": {name: float(match[name]) for name in names} | {"flag": int(match["flag"])}}


def pictures_row(task):
    if not DATA.is_dir():
        return {"skipped": f"the folder of real pictures {DATA.name} is absent"}
    name, row = task.row.split(" | ")
    if row == "the real pair":
        return pair_row()
    rng, words = task.rng(), Words()
    image, valid = load_picture(name)
    mean, smoothing = PICTURES[name]
    pattern = Picture(image, valid, mean, smoothing)
    screen = detector(name, row if "as found" not in row else "clean", mean, pattern.valid, rng)
    if "as found" in row:
        everywhere = np.ones_like(pattern.valid)
        added = np.where(pattern.valid, 0, pattern.scale * pattern.cut(image))
        screen = Detector(everywhere, screen.gain, added, None)
    stack = record(pattern, screen, rng, task)
    try:
        found = judge(stack, screen.mask, words)
    except Refused:
        return {"refused": words.short}
    least = rms(bound(pattern, screen, stack.truth[:5]))
    return found | {"bound": least, "ratio": found["rms"] / least, "words": words.short}


# Tasks and tables


@dataclass(frozen=True)
class Task:
    """One row, or one scene of a row; its random numbers depend on nothing else."""

    group: str
    row: str
    index: int
    frames: int
    seed: int
    members: int
    reference: str
    largest: int
    """Largest frames of lattices, pixels."""

    def rng(self):
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.group} {self.row}".encode()), self.index])


WORK = {
    "lattices": lattice_scene,
    "detector": detector_row,
    "small-drift": detector_row,
    "calibrated": detector_row,
    "changes": changes_row,
    "others": others_row,
    "wrong": wrong_row,
    "peers": peers_row,
    "pictures": pictures_row,
}


def rows_of(group, quick):
    """Return the names of the rows of a group."""
    kinds = ("rings", "spots")
    own = {
        "lattices": ["scenes"],
        "changes": [f"{kind} | {row}" for kind in kinds[quick:] for row in CHANGES],
        "others": [f"{kind} | {row}" for row in OTHERS for kind in kinds[quick:]],
        "wrong": [
            f"{kind} | {mean} | {row}"
            for kind in kinds
            for mean in (("5",) if quick else ("0.5", "5", "50"))
            for row in WRONG
        ],
        "peers": [f"{kind} | {mean}" for kind in kinds for mean in (("1",) if quick else ("1", "0.1"))],
        "pictures": ["chromium | the real pair"]
        + [
            f"{picture} | {row}"
            for picture in list(PICTURES)[: 1 if quick else None]
            for row in PICTURE_ROWS
            if picture == "hotspots" or "as found" not in row
        ],
    }
    some_kinds = kinds if group == "detector" else kinds[quick:]
    chosen = DETECTOR_LEVELS if group == "detector" and not quick else {"bright": DETECTOR_ROWS, "brilliant": TEXTURED}
    detectors = [f"{kind} | {level} | {row}" for kind in some_kinds for level, some in chosen.items() for row in some]
    return own.get(group, detectors)


def tasks(options):
    members, largest = (QUICK_MEMBERS, 512) if options.quick else (MEMBERS, 2048)
    for group in WORK:
        for name in rows_of(group, options.quick):
            if options.rows and not any(wanted == group or wanted in name for wanted in options.rows):
                continue
            scenes = max(QUICK_SCENES, 27 * options.frames // SCENE_FRAMES) if group == "lattices" else 1
            for index in range(scenes):
                yield Task(group, name, index, options.frames, options.seed, members, options.reference, largest)


def work(task):
    began = time.process_time()
    result = WORK[task.group](task)
    return {"group": task.group, "row": task.row, "index": task.index, "cpu_s": time.process_time() - began} | result


def markdown(title, heads, rows):
    print(f"\n**{title}**\n")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(str(cell).replace(' | ', ', ') for cell in row)} |")


def decimal(value, digits=3):
    return "–" if value is None or not np.isfinite(value) else f"{value:.{digits}g}"


def kinds_of(flags):
    return " ".join(f"{name} {count}" for name, count in sorted(flags.items())) or "–"


def show_lattices(results):
    def row(label, some):
        total = {name: sum(one[name] for one in some) for name in ("frames", "right", "imprecise", "wrong")}
        flags = sum((Counter(one["flags"]) for one in some), Counter())
        decidable = [one for one in some if one["separation"] >= 10]
        shown = sum(one["frames"] for one in decidable)
        fine = sum(one["right"] + one["imprecise"] for one in decidable)
        good = total["right"] + total["imprecise"] + total["wrong"]
        share = f"{good / total['frames']:.1%}"
        told = f"{fine / shown:.1%} of {shown}" if shown else "–"
        return (label, len(some), *total.values(), kinds_of(flags), share, told)

    heads = [
        "scenes",
        "number",
        "frames",
        "right",
        "< 1 px, > 5 σ",
        "wrong > 1 px",
        "flagged",
        "good",
        "right if clear",
    ]
    kinds = sorted({one["kind"] for one in results})
    rows = [row(kind, [one for one in results if one["kind"] == kind]) for kind in kinds]
    rows += [
        row(f"{size}²", [one for one in results if one["scene"]["size"] == size])
        for size in sorted({one["scene"]["size"] for one in results})
    ]
    rows += [row("of them square, as reported", [one for one in results if one["reported"]])]
    rows += [row("all", results)]
    markdown("Lattices", heads, rows)
    worst = sorted(results, key=lambda one: -one["wrong"])[:5]
    for one in (one for one in worst if one["wrong"]):
        scene = {key: value for key, value in one["scene"].items() if key != "geometry"}
        where = f"scene {one['index']}, {one['scene']['geometry']}, {scene}"
        print(f"- {one['wrong']} wrong by up to {decimal(one['largest'])} px: {where}")


def show_detector(title):
    def show(results):
        heads = ("row", "bound", "rms", "rms / bound", "sigma", "z", "pull, %", "flagged", "words")
        rows = []
        for one in results:
            if "pair" in one:
                rows.append((one["row"], json.dumps(one["pair"]), *["–"] * 7))
            elif reason := one.get("skipped") or one.get("refused"):
                rows.append((one["row"], *["–"] * 6, "all" if "refused" in one else "–", reason))
            else:
                found = [one.get(name, np.nan) for name in ("bound", "rms", "ratio", "sigma", "z", "pull")]
                flagged = f"{one['flagged']} of {one['frames']} {kinds_of(one['flags']) if one['flagged'] else ''}"
                rows.append((one["row"], *map(decimal, found), flagged, one["words"]))
        markdown(title, heads, rows)

    return show


def show_others(results):
    heads = ("row", "frames", "right", "flagged", "good, > 4 σ wrong", "by up to, px", "sigma", "must be good", "words")
    rows = [
        (
            one["row"],
            one["frames"],
            one["right"],
            "refused" if "refused" in one else kinds_of(one["flags"]),
            one["wrong"],
            decimal(one.get("largest", np.nan)),
            decimal(one.get("sigma", np.nan)),
            "yes" if one["row"].split(" | ")[1] in THROWN_AWAY else "",
            one["words"],
        )
        for one in results
    ]
    markdown("Others", heads, rows)


def show_wrong(results):
    rows = [
        (
            one["row"],
            f"{one['flagged'] / one['frames']:.1%} of {one['frames']}" if "frames" in one else one["refused"],
            kinds_of(one.get("flags", {})),
            f"{one['usual_good']} of {one['usual']}" if "usual" in one else "–",
        )
        for one in results
    ]
    markdown("Wrong patterns", ("pattern, mean counts, what", "flagged", "flags", "usual frames good"), rows)


def show_peers(results):
    rows = []
    for one in results:
        for method in ("stillframe", "ECC from whole pixels", "ECC from zero"):
            if method in one:
                got = one[method]
                size = f"{got['filter']} (default 5: {decimal(got['default'])})" if "filter" in got else "–"
                values = decimal(one["bound"]), decimal(got["ratio"]), got["lost"], size, decimal(got["ms"])
                rows.append((one["row"], method, *values))
        if "skipped" in one:
            rows.append((one["row"], one["skipped"], *["–"] * 5))
    heads = ("pattern, mean counts", "method", "bound, px", "rms / bound", "lost", "filter, px", "ms per frame")
    markdown("Peers, clean frames", heads, rows)


SHOW = {
    "lattices": show_lattices,
    "detector": show_detector("The detector's own pattern, drift ±6 px"),
    "small-drift": show_detector("The detector's own pattern, drift ±0.3 px"),
    "calibrated": show_detector("The detector's own pattern, dark and flat given"),
    "changes": show_detector("Changing patterns"),
    "others": show_others,
    "wrong": show_wrong,
    "peers": show_peers,
    "pictures": show_detector("Real pictures"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=None, metavar="NAME", help=f"groups ({', '.join(WORK)}) or rows")
    parser.add_argument("--frames", type=int, default=200, help="frames of a row")
    parser.add_argument("--seed", type=int, default=20261127)
    parser.add_argument("--reference", choices=("spread", "first"), default="spread")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_FRAMES} frames a row, small lattices: only to see whether it works",
    )
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    options.frames = QUICK_FRAMES if options.quick else options.frames
    wanted = list(tasks(options))
    if not wanted:
        parser.error(f"no row is called {' or '.join(options.rows)}. Give groups or parts of names of rows.")
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        results = []
        for group, some in itertools.groupby(pool.imap(work, wanted), key=lambda one: one["group"]):
            results += (some := list(some))
            SHOW[group](some)
            print(
                f"\n{group}: {len(some)} rows or scenes, {sum(one['cpu_s'] for one in some):.0f} s of a core",
                flush=True,
            )
    seconds = time.perf_counter() - began
    print(f"\n{len(wanted)} rows and scenes, {options.frames} frames a row, seed {options.seed}, {seconds:.0f} s")
    if options.json:
        context = {"stillframe": sf.__version__, "seed": options.seed, "frames": options.frames, "seconds": seconds}
        options.json.write_text(json.dumps({"context": context, "results": results}, indent=1))


if __name__ == "__main__":
    main()
