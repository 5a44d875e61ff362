"""Matches of a few simulated frames, as they were when the file beside this test was written.

``python tests/registration/test_golden.py`` writes the file anew. Do so only after a change that is meant to change
numbers, and raise ``KERNEL_VERSION`` with it, so that runs made before are not continued with other numbers.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from stillframe import Reference, make_reference, match_frames
from stillframe.simulation.experiment import Experiment
from stillframe.versions import KERNEL_VERSION

FILE = Path(__file__).with_name("golden.json")
SINGLE = {"second_score": 1e-6}
"""Tolerance of what comes from transforms in single precision; all else agrees to 1e-9."""
FIELDS = ("dy", "dx", "sigma_y", "sigma_x", "cov_yx", "score", "second_score", "overlap", "intensity", "flag")


@dataclass(frozen=True)
class Scene:
    """Frames of one experiment and how they are matched."""

    pattern: str
    dose: float
    dtype: str = "u2"
    shape: tuple[int, int] = (128, 136)
    own_masks: bool = False
    iterations: int | None = None
    """Rounds in which frames of the reference are aligned and averaged; None: it is the first frame."""
    subpixel: bool = True
    frames: int = 6
    within: float = 1e-9
    """Tolerance, relative and absolute."""

    def matches(self):
        """Match all frames but the first with the first or with a mean; one is dark, and one has a hit."""
        experiment = Experiment(
            frames=self.frames,
            shape=self.shape,
            pattern=self.pattern,
            dose=self.dose,
            max_drift=5.0,
            dark_every=5,
            spikes=1e-4,
            seed=11,
        )
        mask = experiment.detector.mask
        frames = np.stack([experiment.render(index) for index in range(self.frames)]).astype(self.dtype)
        if self.iterations is not None:
            reference = make_reference(frames, mask, iterations=self.iterations, max_shift=16)
        else:
            reference = Reference(frames[0], mask, max_shift=16, subpixel=self.subpixel)
        masks = mask & (np.random.default_rng(12).random(frames[1:].shape) > 0.01) if self.own_masks else None
        return match_frames(frames[1:], reference, masks=masks)


SCENES = {
    "rings, 500 counts, u2": Scene("rings", 500.0),
    "rings, 3 counts, u2": Scene("rings", 3.0),
    "rings, 50 counts, f4": Scene("rings", 50.0, "f4"),
    "spots, 1000 counts, u2": Scene("spots", 1000.0),
    "spots, 30 counts, f4": Scene("spots", 30.0, "f4"),
    "rings, masks of their own": Scene("rings", 50.0, own_masks=True),
    "spots, whole pixels": Scene("spots", 100.0, subpixel=False),
    "rings, on a plain mean": Scene("rings", 50.0, iterations=0, frames=12),
    # Whether a pixel enters the mean is a decision, which the last bits of another NumPy or SciPy can change.
    "rings, on a mean of frames": Scene("rings", 50.0, iterations=3, frames=12, within=2e-3),
    "rings, searched and refined in bins": Scene("rings", 100.0, shape=(340, 330)),
}


def as_lists(matches):
    """One list a field; what is not a number is null, as JSON has no other word for it."""
    return {
        name: [None if np.isnan(value) else value for value in matches[name].astype(float).tolist()] for name in FIELDS
    }


def write():
    """Write the file, a line for each field."""
    matches = {name: as_lists(scene.matches()) for name, scene in SCENES.items()}
    text = json.dumps({"kernel_version": KERNEL_VERSION, "matches": matches}, indent=1)
    FILE.write_text(re.sub(r"\[[^]]*]", lambda found: " ".join(found[0].split()), text) + "\n")


@pytest.fixture(scope="module")
def golden():
    return json.loads(FILE.read_text())


def test_the_file_belongs_to_this_kernel(golden):
    assert golden["kernel_version"] == KERNEL_VERSION, f"run python {Path(__file__).name}"
    assert set(golden["matches"]) == set(SCENES)


@pytest.mark.parametrize("name", SCENES)
def test_numbers_have_not_changed(name, golden):
    matches = SCENES[name].matches()
    for field in FIELDS:
        within = max(SINGLE.get(field, 0), SCENES[name].within)
        np.testing.assert_allclose(
            matches[field].astype(float),
            np.array(golden["matches"][name][field], float),
            rtol=within,
            atol=within,
            err_msg=f"{field} changed: raise KERNEL_VERSION and run python tests/registration/test_golden.py, "
            "or find out why it changed.",
        )


def test_some_frames_are_matched_and_some_are_not(golden):
    flags = np.concatenate([golden["matches"][name]["flag"] for name in SCENES])
    assert 0.1 < np.mean(flags != 0) < 0.4


if __name__ == "__main__":
    write()
