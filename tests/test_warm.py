"""What one or two processes compile, no other compiles again."""

import os
import subprocess
import sys

import numpy as np
import pytest

from stillframe.warm import PARTS, Compile

FRESH = """
import sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from stillframe import Reference, match_frames
from stillframe.resample import resample_frames
from stillframe.scene import Experiment

interpolation, dtype = sys.argv[1:]
experiment = Experiment(frames=2, shape=(384, 400), dose=50.0, seed=7, max_drift=3.0)
frames = np.stack([experiment.render(index) for index in range(2)]).astype(dtype)
reference = Reference(frames[0], experiment.detector.mask, max_shift=16)
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
@pytest.mark.parametrize(("interpolation", "dtype"), [("nearest", "uint16"), ("cubic", "float32")])
def test_what_two_parts_compile_is_all_that_a_process_needs(tmp_path, interpolation, dtype):
    code = "import sys, numpy; from stillframe.warm import Compile; "
    for part in PARTS:
        fresh(tmp_path, f"{code}Compile(numpy.dtype(sys.argv[2]), sys.argv[1])({part!r})", interpolation, dtype)
    missed, loaded = fresh(tmp_path, FRESH, interpolation, dtype)
    assert missed == ""
    assert int(loaded) > 10


@pytest.mark.parametrize("dtype", ["u1", "i4", "f8"])
@pytest.mark.parametrize("part", PARTS)
def test_any_frames_can_be_prepared_for(part, dtype):
    assert Compile(np.dtype(dtype), "nearest")(part) is None
