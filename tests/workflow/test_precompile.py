"""Code that one or two processes compiled is not compiled by any other."""

import os
import subprocess
import sys

import numpy as np
import pytest

from stillframe.workflow import precompile
from stillframe.workflow.precompile import HALVES, Compile

FRESH = """
import sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from stillframe import Reference, match_frames
from stillframe.images.resample import resample_frames
from stillframe.simulation.experiment import Experiment

interpolation, dtype, corrected = sys.argv[1:]
experiment = Experiment(frames=2, shape=(384, 400), dose=50.0, seed=7, max_drift=3.0)
frames = np.stack([experiment.render(index) for index in range(2)]).astype(dtype)
reference = Reference(frames[0], experiment.detector.mask, max_shift=16)
if corrected:
    reference = reference.replace(flat=np.ones((384, 400)))
matches = match_frames(frames, reference)
assert not matches["flag"].any()
moves = np.stack([matches["dy"], matches["dx"]], axis=1) + 0.3
resample_frames(frames, moves, reference.frame_mask, interpolation=interpolation)
modules = [module for name, module in sys.modules.items() if name.startswith("stillframe")]
functions = {id(one): one for module in modules for one in vars(module).values() if isinstance(one, Dispatcher)}
print(*(one.py_func.__name__ for one in functions.values() if one.stats.cache_misses))
print(sum(sum(one.stats.cache_hits.values()) for one in functions.values()))
"""


def fresh(cache, code, *arguments):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("interpolation", "dtype", "corrected"),
    [("nearest", "uint16", ""), ("cubic", "float32", ""), ("nearest", "uint16", "corrected")],
)
def test_what_two_halves_compile_is_all_that_a_process_needs(tmp_path, interpolation, dtype, corrected):
    code = "import sys, numpy; from stillframe.workflow.precompile import Compile; "
    for half in HALVES:
        arguments = f"numpy.dtype(sys.argv[2]), sys.argv[1], {bool(corrected)}"
        fresh(tmp_path, f"{code}Compile({arguments})({half!r})", interpolation, dtype)
    missed, loaded = fresh(tmp_path, FRESH, interpolation, dtype, corrected)
    assert missed == ""
    assert int(loaded) > 10


@pytest.mark.parametrize(("dtype", "single"), [("u1", "u1"), ("i4", "f4"), ("f8", "f4")])
def test_the_search_goes_through_bins_of_frames_of_any_dtype(monkeypatch, dtype, single):
    searched = []
    find = precompile.CoarseSearch.find
    monkeypatch.setattr(precompile.CoarseSearch, "find", lambda *given: searched.append((given[1], find(*given))))
    Compile(np.dtype(dtype), "nearest")("search")
    ((surveyed, peak),) = searched
    assert surveyed.single.values.dtype == single
    assert peak is None or peak.slack > 0


@pytest.mark.parametrize("dtype", ["u1", "i4", "f8"])
def test_the_refinement_arrives_at_an_estimate_for_frames_of_any_dtype(monkeypatch, dtype):
    estimates = []
    refine = precompile.refine
    monkeypatch.setattr(precompile, "refine", lambda *given: estimates.append(refine(*given)))
    Compile(np.dtype(dtype), "nearest")("refine")
    assert estimates[0].significance > 10
