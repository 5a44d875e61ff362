"""Masked registration of detector frames: lazily, chunk by chunk, on one machine or a cluster."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillframe.batch import run
    from stillframe.errors import LeaseError, RunStopped
    from stillframe.flags import Flag
    from stillframe.frames import load_mask
    from stillframe.lazy import align, make_reference, open_frames, register
    from stillframe.match import match_frames
    from stillframe.ncc import masked_ncc
    from stillframe.reference import Reference
    from stillframe.settings import Settings
    from stillframe.store import load_reference, save_reference

__version__ = "0.1.0"

_HOME = {
    "Flag": "flags",
    "LeaseError": "errors",
    "Reference": "reference",
    "RunStopped": "errors",
    "Settings": "settings",
    "align": "lazy",
    "load_mask": "frames",
    "load_reference": "store",
    "make_reference": "lazy",
    "masked_ncc": "ncc",
    "match_frames": "match",
    "open_frames": "lazy",
    "register": "lazy",
    "run": "batch",
    "save_reference": "store",
}

__all__ = [
    "Flag",
    "LeaseError",
    "Reference",
    "RunStopped",
    "Settings",
    "align",
    "load_mask",
    "load_reference",
    "make_reference",
    "masked_ncc",
    "match_frames",
    "open_frames",
    "register",
    "run",
    "save_reference",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that ``import stillframe`` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'stillframe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stillframe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return __all__
