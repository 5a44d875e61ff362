"""Masked registration of detector frames: lazily, chunk by chunk, on one machine or a cluster.

A map of the package, from the bottom up; each group imports only groups above it in this list:

- Ground files: ``errors``, ``flags``, ``options``, ``versions``, ``settings``, ``partition`` (how a stack is cut into
  units), ``log``, ``progress``, ``wording``.
- ``images``: one picture. Masks, dark and flat, statistics, noise, hot pixels, resampling.
- ``registration``: two pictures. ``registration.match`` is the kernel, ``registration.acceptance`` holds the
  thresholds, ``registration.build_reference`` makes a reference.
- ``storage``: files. Frames, masks and coordinates are read; Zarr stores of results are written.
- ``simulation`` (experiments with known truth), ``cluster`` (worker processes), ``report`` (pictures for people).
- ``workflow``: a resumable run. It starts in ``workflow.driver``; ``workflow.staleness`` decides what is redone.
- What users call: ``lazy`` (lazy xarray objects), ``cli`` (the command line) with ``console`` and ``demo``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from stillframe.versions import __version__

if TYPE_CHECKING:
    from stillframe.errors import LeaseError as LeaseError
    from stillframe.errors import RunStopped as RunStopped
    from stillframe.flags import Flag as Flag
    from stillframe.lazy import align as align
    from stillframe.lazy import make_reference as make_reference
    from stillframe.lazy import open_frames as open_frames
    from stillframe.lazy import register as register
    from stillframe.registration.masked_ncc import masked_ncc as masked_ncc
    from stillframe.registration.match import match_frames as match_frames
    from stillframe.registration.reference import Reference as Reference
    from stillframe.settings import Settings as Settings
    from stillframe.storage.pictures import load_mask as load_mask
    from stillframe.storage.reference_store import load_reference as load_reference
    from stillframe.storage.reference_store import save_reference as save_reference
    from stillframe.workflow.driver import run as run

_MODULES = {
    "Flag": "flags",
    "LeaseError": "errors",
    "Reference": "registration.reference",
    "RunStopped": "errors",
    "Settings": "settings",
    "align": "lazy",
    "load_mask": "storage.pictures",
    "load_reference": "storage.reference_store",
    "make_reference": "lazy",
    "masked_ncc": "registration.masked_ncc",
    "match_frames": "registration.match",
    "open_frames": "lazy",
    "register": "lazy",
    "run": "workflow.driver",
    "save_reference": "storage.reference_store",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that ``import stillframe`` loads no library."""
    if name not in _MODULES:
        raise AttributeError(f"module 'stillframe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stillframe.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
