"""Compilation of the kernel for frames of one dtype, before many workers need it.

Machine code is cached on disk, where other processes on machines of the same kind find it; so a cluster compiles once.
The two halves of the kernel, made by two workers at the same time, share only what prepares a reference.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from stillframe.images.binning import SingleFrame, in_single_precision
from stillframe.images.resample import resample_frames
from stillframe.images.statistics import statistics
from stillframe.options import Interpolation
from stillframe.registration.coarse_search import CoarseSearch
from stillframe.registration.prepared_reference import PreparedReference, prepare
from stillframe.registration.reference import Reference
from stillframe.registration.refine import refine
from stillframe.registration.rivals import preference
from stillframe.simulation.experiment import Experiment

Half = Literal["search", "refine"]
HALVES: tuple[Half, ...] = get_args(Half)

_SIZE, _REACH, _SIDE = 256, 8, 2


@dataclass(frozen=True)
class Compile:
    """Task that compiles one half of the kernel by running it on a small image."""

    dtype: np.dtype[Any]
    """Dtype of the frames."""
    interpolation: Interpolation
    """How frames will be moved."""
    corrected: bool = False
    """Whether frames are corrected for dark or flat before they are compared."""

    def __call__(self, half: Half) -> None:
        """Compile a half of the kernel, or load it from the cache."""
        experiment = Experiment(frames=2, shape=(_SIZE, _SIZE), dose=20.0, max_drift=1.0, seed=0)
        fixed, frame = (experiment.render(index).astype(self.dtype) for index in (0, 1))
        image = Reference(fixed, experiment.detector.mask, max_shift=_REACH)
        reference = prepare(image.replace(flat=np.ones((_SIZE, _SIZE))) if self.corrected else image)
        if half == "search":
            _search(reference, frame)
            move = np.array([[1.0, 1.0] if self.interpolation == "nearest" else [0.5, 0.5]])
            resample_frames(frame[None], move, reference.frame_pixels.mask, interpolation=self.interpolation)
        else:
            _refine(reference, frame)


def _search(reference: PreparedReference, frame: npt.NDArray[Any]) -> None:
    """Compile the scores at single shifts, then the search in bins."""
    valid, window = reference.frame_pixels, (reference.options.max_shift, reference.options.overlap_ratio)
    # The process that compiles the other half needs the scores first.
    pixels = statistics(frame.astype(np.float64), valid.valid, np.inf)
    reference.score((0, 0), _single(reference, frame), pixels, valid)
    content = reference.image.astype(np.float32)
    coarse = CoarseSearch(reference.image, reference.trusted.mask, valid.mask, *window, _SIDE, 0.0, content, _REACH)
    surveyed = reference.correct(frame, valid, np.inf)[1]
    coarse.find(surveyed)
    reference.has_lost_lines(frame, surveyed, np.inf)


def _refine(reference: PreparedReference, frame: npt.NDArray[Any]) -> None:
    """Compile the refinement, and the comparison of two fits."""
    if reference.template is not None:
        single, valid = _single(reference, frame), reference.frame_pixels.valid
        estimate = refine(single, valid, (0, 0), reference.template, reference.score_image)
        if estimate is not None:
            preference(single, valid, reference.pixel_model, estimate, estimate)


def _single(reference: PreparedReference, frame: npt.NDArray[Any]) -> SingleFrame:
    """Return a frame as the refinement gets it."""
    counts = frame if reference.corrections is None else reference.corrections.corrected(frame)
    return in_single_precision(counts, float(counts.mean()), float(counts.std()))
