"""Errors are what they are said to be, over many draws of the noise."""

import numpy as np
import pytest

from oracle import LAGS, Oracle, lagrange, moved
from stillframe import Reference, match_frames
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.refine import refine

SHAPE = (96, 96)


def stripes(y, x):
    """Features that tell a shift along one diagonal much better than along the other."""
    across, along = (y - x) / 6, (y + x) / 25
    return 40 + 20 * np.cos(across) + 12 * np.cos(along) + 6 * np.cos((y + 0.3 * x) / 9)


def frames_of(count, seed, shift=(0.0, 0.0), dose=1.0, shape=SHAPE):
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    return np.random.default_rng(seed).poisson(dose * stripes(y + shift[0], x + shift[1]), (count, *shape))


def clean(dose=1.0):
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    return dose * stripes(y, x)


def errors(matches, shift):
    assert not matches["flag"].any()
    return np.stack([matches["dy"], matches["dx"]], axis=1) - shift


def claimed(match):
    cov = match["cov_yx"]
    return np.array([[match["sigma_y"] ** 2, cov], [cov, match["sigma_x"] ** 2]])


def test_covariance_is_the_scatter_of_shifts():
    """All three elements: errors along both axes are strongly correlated here."""
    shift = (1.3, -0.6)
    matches = match_frames(frames_of(400, 0, shift), Reference(clean(), max_shift=4, noise=(1e-6, 0)))
    error = errors(matches, shift)
    found, expected = np.cov(error.T), np.mean([claimed(match) for match in matches], axis=0)
    assert abs(expected[0, 1]) > 0.5 * np.sqrt(expected[0, 0] * expected[1, 1])
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(2 / 400) * expected.max())
    assert (np.abs(error.mean(axis=0)) < 4 * np.sqrt(np.diag(expected) / 400)).all()


@pytest.mark.parametrize("fraction", [0.0, 0.45])
def test_sigma_is_what_differs_from_frame_to_frame(fraction):
    """Laid on one noisy reference frames scatter by sigma; what is common to all of them is not in it."""
    shift = (1 + fraction, -1 + fraction)
    reference = Reference(frames_of(1, 1)[0], max_shift=4, noise=(1, 0))
    matches = match_frames(frames_of(300, 2, shift), reference)
    z = (errors(matches, shift) - errors(matches, shift).mean(axis=0)) / [*matches[["sigma_y", "sigma_x"]][0]]
    # At a fraction the wander is common to these frames, but counts in sigma.
    low = 0.88 if fraction == 0 else 0.75
    assert (low < z.std(axis=0)).all() and (z.std(axis=0) < 1.12).all()


@pytest.mark.slow
def test_the_offset_common_to_all_frames_has_the_covariance_of_equation_37():
    found, stated = [], []
    frame = np.rint(clean(50.0))
    for image in frames_of(150, 3):
        reference = Reference(image, max_shift=4, noise=(1, 0), smoothing=2.0)
        match = match_frames(frame[None], reference)
        found.append(errors(match, (0, 0))[0])
        stated.append(prepare(reference).template.common)
    common = np.mean(stated, axis=0)
    np.testing.assert_allclose(np.cov(np.transpose(found)), common, atol=4 * np.sqrt(2 / 150) * common.max())
    assert (np.abs(np.mean(found, axis=0)) < 4 * np.sqrt(np.diag(common) / 150)).all()


def test_the_offset_wanders_with_the_fraction_as_equation_36_says():
    """The change of Σ T_k(p) η(p + ε) from ε = 0, over draws of the reference's noise η."""
    image, fraction = frames_of(1, 4)[0], np.array([0.3, -0.25])
    reference = Reference(image, max_shift=4, noise=(1, 0), smoothing=2.0)
    oracle = Oracle(image.astype(float), prepare(reference).trusted.mask, 1.0, 0.0, 2.0)
    rng, changes = np.random.default_rng(4), []
    weights = np.outer(lagrange(fraction[0]), lagrange(fraction[1])) - np.outer(lagrange(0.0), lagrange(0.0))
    for _ in range(300):
        noise = rng.normal(0, np.sqrt(oracle.v))
        change = sum(weights[y + 3, x + 3] * moved(noise, y, x) for y in LAGS for x in LAGS)
        changes.append([np.sum(template * oracle.support * change) for template in oracle.templates[:2]])
    stated = np.einsum("klij,i,j->kl", prepare(reference).template.wander, fraction, fraction)
    np.testing.assert_allclose(np.cov(np.transpose(changes)), stated, atol=4 * np.sqrt(2 / 300) * stated.max())


def test_significance_is_the_gain_over_its_scatter():
    prepared = prepare(Reference(clean(100.0), max_shift=4, noise=(1e-6, 0), smoothing=2.0))
    estimates = []
    for frame in frames_of(200, 5, dose=0.2):
        surveyed = prepared.survey(frame)
        estimates.append(refine(surveyed.single, surveyed.valid, (0, 0), prepared.template, prepared.score_image))
    gains = np.array([estimate.gain for estimate in estimates])
    assert gains.mean() == pytest.approx(0.2 / 100, rel=0.02)
    assert np.median(gains / [estimate.significance for estimate in estimates]) == pytest.approx(gains.std(), rel=0.2)


def test_noise_alone_finds_no_shift():
    rng = np.random.default_rng(6)
    matches = match_frames(rng.poisson(20, (200, *SHAPE)), Reference(clean(), max_shift=6, noise=(1e-6, 0)))
    assert np.isnan(matches["dy"]).all()
