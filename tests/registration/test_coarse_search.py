"""The search in bins changes no shift, and a peak in doubt is searched pixel by pixel."""

import numpy as np
import pytest

from stillframe import Reference, masked_ncc, match_frames
from stillframe.registration.coarse_search import bin_sides
from stillframe.registration.prepared_reference import prepare
from stillframe.simulation.experiment import Experiment, evaluate

SHAPE = (512, 512)


def frames_of(pattern, dose, count=8, reach=12.0):
    detector = Experiment(frames=1, shape=SHAPE, pattern=pattern, dose=dose, seed=5).detector
    rng = np.random.default_rng(1)
    shifts = rng.uniform(-reach, reach, (count, 2))
    frames = [rng.poisson(detector.see(dose * evaluate(pattern, SHAPE, shift))) for shift in [(0, 0), *shifts]]
    return np.array(frames, dtype=np.uint16), shifts, detector.mask


@pytest.mark.parametrize("pattern", ["rings", "spots"])
@pytest.mark.parametrize(("dose", "within"), [(200.0, 1), (5.0, 2)])
def test_the_peak_in_bins_is_that_of_single_pixels(pattern, dose, within):
    frames, shifts, mask = frames_of(pattern, dose)
    prepared = prepare(Reference(frames[0], mask, max_shift=16))
    peaks = [prepared.find_peak(frame, prepared.survey(frame)) for frame in frames[1:]]
    exact = [prepared.find_peak(frame, prepared.survey(frame), mask) for frame in frames[1:]]
    assert all(peak.slack == 1 for peak in peaks) and not any(peak.slack for peak in exact)
    assert np.abs(np.subtract([peak.shift for peak in peaks], [peak.shift for peak in exact])).max() <= within
    assert np.abs(np.subtract([peak.shift for peak in peaks], shifts)).max() < within


def test_whole_pixels_on_request_are_those_of_the_whole_surface():
    frames, _, mask = frames_of("rings", 200.0, count=4)
    reference = Reference(frames[0], mask, max_shift=16, subpixel=False)
    for frame, match in zip(frames[1:], match_frames(frames[1:], reference), strict=True):
        ncc, lags_y, lags_x = masked_ncc(frames[0], frame, mask, mask, max_shift=16)
        row, column = np.unravel_index(np.nanargmax(ncc), ncc.shape)
        assert (match["dy"], match["dx"]) == (lags_y[row], lags_x[column])
        assert match["score"] == pytest.approx(ncc.max(), abs=1e-5)


@pytest.mark.parametrize("pattern", ["rings", "spots"])
@pytest.mark.parametrize("dose", [200.0, 5.0])
def test_refined_shifts_are_those_of_the_exact_search(pattern, dose):
    frames, _, mask = frames_of(pattern, dose)
    reference = Reference(frames[0], mask, max_shift=16)
    coarse = match_frames(frames[1:], reference)
    exact = match_frames(frames[1:], reference, masks=mask)  # masks of frames are searched pixel by pixel
    for name in ("dy", "dx"):
        np.testing.assert_allclose(coarse[name], exact[name], atol=0.1 * np.nanmax(exact["sigma_y"]))
    np.testing.assert_array_equal(coarse["flag"], exact["flag"])
    np.testing.assert_allclose(coarse["score"], exact["score"], atol=1e-5)
    np.testing.assert_allclose(coarse["overlap"], exact["overlap"])


def test_a_doubt_is_settled_pixel_by_pixel():
    """In bins of four the lattice is grey; noise alone decides there."""
    y, x = np.mgrid[:512, :512]
    rng = np.random.default_rng(0)
    fine = rng.poisson(20 + 15 * (-1.0) ** (y + x))
    texture = rng.poisson(20, (520, 520))
    for frame, fixed in ((fine, fine), (texture[3:515, 5:517], texture[:512, :512])):
        reference = Reference(fixed, max_shift=8)
        (coarse,), (exact,) = (
            match_frames(frame[None], reference, masks=masks) for masks in (None, np.ones((512, 512)))
        )
        assert coarse["flag"] == exact["flag"]
        np.testing.assert_allclose([coarse["dy"], coarse["dx"]], [exact["dy"], exact["dx"]], atol=0.01)


def test_beyond_the_edge_the_wider_search_is_asked():
    frames, shifts, mask = frames_of("rings", 50.0, count=30, reach=20.0)
    matches = match_frames(frames[1:], Reference(frames[0], mask, max_shift=8))
    found = np.isfinite(matches["dy"])
    np.testing.assert_allclose(np.stack([matches["dy"], matches["dx"]], axis=1)[found], shifts[found], atol=0.1)
    assert (np.abs(shifts[~found]).max(axis=1) > 15).all()
    assert found[np.abs(shifts).max(axis=1) < 7].all()


@pytest.mark.parametrize(
    ("shape", "max_shift", "sides"),
    [
        ((2048, 2048), 32, [8, 4]),
        ((2048, 2048), 4, [4, 2]),
        ((300, 400), 32, [2]),
        ((128, 900), 8, []),
        ((512, 512), 1, []),
    ],
)
def test_small_pictures_and_small_searches_are_not_binned(shape, max_shift, sides):
    assert bin_sides(shape, max_shift) == sides
