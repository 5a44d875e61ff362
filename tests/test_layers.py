"""Layers point downward: numeric modules know nothing of dask, xarray or zarr."""

import subprocess
import sys

import pytest

import stillframe

NUMERIC = (
    "average",
    "bins",
    "checks",
    "coarse",
    "errors",
    "flags",
    "hits",
    "iterate",
    "match",
    "ncc",
    "noise",
    "peak",
    "reference",
    "refine",
    "resample",
    "runs",
    "scene",
    "score",
    "search",
    "selftest",
    "settings",
    "solve",
    "surroundings",
    "survey",
    "template",
    "units",
    "warm",
)
HEAVY = {"dask", "distributed", "xarray", "zarr"}


def loaded_by(statement):
    code = f"{statement}; import sys; print(*sorted(set(m.split('.')[0] for m in sys.modules)))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", NUMERIC)
def test_numeric_modules_load_nothing_heavy(module):
    assert not loaded_by(f"import stillframe.{module}") & HEAVY


@pytest.mark.parametrize("module", ["durable", "frames", "leases", "plans", "records", "simulate", "store"])
def test_storage_modules_load_no_cluster(module):
    assert not {"dask", "distributed"} & loaded_by(f"import stillframe.{module}")


def test_importing_the_package_is_light():
    assert not loaded_by("import stillframe") & (HEAVY | {"numpy", "scipy", "numba"})


def test_every_public_name_is_there():
    for name in stillframe.__all__:
        assert getattr(stillframe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        stillframe.nothing  # noqa: B018
