"""Compile what frames of a kind need before many workers ask for it, so that a cluster does not compile many times.

Machine code is kept on disk, where other processes of the same kind of machine find it. The two parts take about the
same time and share little, so that two workers are done in half of it.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from stillframe.bins import Single, in_single
from stillframe.coarse import CoarseSearch
from stillframe.reference import Reference
from stillframe.refine import refine
from stillframe.resample import Interpolation, resample_frames
from stillframe.runs import RowRuns
from stillframe.scene import Experiment
from stillframe.survey import statistics, survey

Part = Literal["search", "refine"]
PARTS: tuple[Part, ...] = get_args(Part)

_SIZE, _REACH, _SIDE = 256, 8, 2


@dataclass(frozen=True)
class Compile:
    """Go through a part of the kernel on a small picture."""

    dtype: np.dtype[Any]
    """Of the frames."""
    interpolation: Interpolation
    """How frames are going to be moved."""

    def __call__(self, part: Part) -> None:
        """Compile a part, or load what is compiled already."""
        experiment = Experiment(frames=2, shape=(_SIZE, _SIZE), dose=20.0, seed=0)
        fixed, frame = (experiment.render(index).astype(self.dtype) for index in (0, 1))
        reference = Reference(fixed, experiment.detector.mask, max_shift=_REACH)
        (_search if part == "search" else _refine)(reference, frame)
        if part == "search":
            move = np.array([[1.0, 1.0] if self.interpolation == "nearest" else [0.5, 0.5]])
            resample_frames(frame[None], move, reference.frame_mask, interpolation=self.interpolation)


def _search(reference: Reference, frame: npt.NDArray[Any]) -> None:
    mask, valid = reference.frame_mask, RowRuns.of(reference.frame_mask)
    # First what the other part will need soon.
    reference.score((0, 0), _single(frame), statistics(frame.astype(np.float64), mask, np.inf), mask)
    coarse = CoarseSearch(reference.image, reference.trusted, mask, _REACH, reference.overlap_ratio, _SIDE, 0.0)
    coarse.find(survey(frame, mask, valid, np.inf, _SIDE))


def _refine(reference: Reference, frame: npt.NDArray[Any]) -> None:
    if reference.template is not None:
        valid = RowRuns.of(reference.frame_mask)
        refine(_single(frame), valid, (0, 0), reference.template, reference.steps)


def _single(frame: npt.NDArray[Any]) -> Single:
    return in_single(frame, float(frame.mean()), float(frame.std()))
