"""The dataset of shifts: the kernel's result with labels, units and provenance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stillframe.errors import OtherVersion
from stillframe.flags import cf_attributes
from stillframe.registration.reference import Reference
from stillframe.versions import KERNEL_VERSION, STORE_VERSION, __version__

AXES = np.array(["y", "x"], dtype=object)

VARIABLE_ATTRIBUTES: Mapping[str, dict[str, Any]] = {
    "shift": {
        "long_name": "shift that aligns the frame with the reference",
        "units": "pixel",
        "comment": "to be applied to the frame, out(p) = frame(p - shift); axis order (y, x)",
    },
    "sigma": {"long_name": "standard error of the shift", "units": "pixel"},
    "covariance": {"long_name": "covariance of the errors along y and x", "units": "pixel2"},
    "score": {"long_name": "masked normalized cross-correlation at the peak", "units": "1"},
    "second_score": {"long_name": "highest masked normalized cross-correlation away from the peak", "units": "1"},
    "overlap": {"long_name": "part of the reference's valid pixels valid in both", "units": "1"},
    "intensity": {"long_name": "mean of the frame's valid pixels", "units": "count"},
}
"""Attributes of the variables that hold the kernel's figures."""


def shifts_dataset(matches: Any, coordinates: xr.Dataset, reference: Reference) -> xr.Dataset:
    """Return matches (frame,), of NumPy or dask, as the dataset that :func:`stillframe.register` returns.

    Variables of ``coordinates`` have the dimension frame. The image and mask of the reference are included, so that
    aligning needs only the dataset.
    """
    pair = ("frame", "axis")
    variables: dict[str, Any] = {
        "shift": (pair, np.stack([matches["dy"], matches["dx"]], axis=1)),
        "sigma": (pair, np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1)),
        "covariance": ("frame", matches["cov_yx"]),
    }
    variables |= {name: ("frame", matches[name]) for name in ("score", "second_score", "overlap", "intensity")}
    labelled = {name: (*value, VARIABLE_ATTRIBUTES[name]) for name, value in variables.items()}
    labelled["flag"] = ("frame", matches["flag"], {"long_name": "why a shift is missing", **cf_attributes()})
    labelled["reference"] = (("y", "x"), reference.image, {"long_name": "image that every frame is compared with"})
    labelled["mask"] = (("y", "x"), reference.frame_mask, {"long_name": "valid pixels of the detector"})
    return xr.Dataset(labelled, {**coordinates.variables, "axis": ("axis", AXES)}, provenance(reference))


def provenance(reference: Reference) -> dict[str, Any]:
    """Return attributes that state where numbers come from; without times, so that equal runs give equal bytes."""
    images = [name for name in ("dark", "flat") if getattr(reference, name) is not None]
    return ({"frames_corrected_for": ", ".join(images)} if images else {}) | {
        "Conventions": "CF-1.11",
        "source": f"stillframe {__version__}",
        "format_version": STORE_VERSION,
        "kernel_version": KERNEL_VERSION,
        "reference_sha256": reference.digest,
        "reference_history": reference.history,
        "max_shift": reference.max_shift,
        "overlap_ratio": reference.options.overlap_ratio,
    }


def refuse_newer_store(path: Path, attributes: Mapping[str, Any]) -> None:
    """Raise ``OtherVersion`` if the attributes of a store name a later format than this package can read."""
    version = attributes.get("format_version", STORE_VERSION)
    if isinstance(version, int) and version > STORE_VERSION:
        raise OtherVersion(
            f"{path} has format_version {version}, but this stillframe reads at most {STORE_VERSION}: "
            "a newer one wrote it. Use that version, or another folder; nothing was changed."
        )
