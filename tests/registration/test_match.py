import gc
import pickle
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe import Flag, Reference, masked_ncc, match_frames
from stillframe.images.run_lengths import RowRuns
from stillframe.images.statistics import statistics
from stillframe.registration.exact_search import ExactSearch
from stillframe.registration.matches import MATCH_DTYPE
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.reference_frames import usable_frames
from strategies import seeds
from synthetic import blocked, texture, windows

SHIFTS = [(0, 0), (3, -5), (-8, 8), (7, 2)]


def shifts_of(matches):
    return np.stack([matches["dy"], matches["dx"]], axis=1)


def assert_found(matches, shifts, within=0.1):
    np.testing.assert_allclose(shifts_of(matches), shifts, atol=within)


@pytest.fixture(scope="module")
def frames():
    return windows((96, 80), SHIFTS)


@pytest.fixture(scope="module")
def mask():
    return blocked((96, 80))


@pytest.fixture(scope="module")
def reference(frames, mask):
    return Reference(frames[0], mask, max_shift=12)


def test_every_frame_is_found_under_a_static_mask(frames, reference, mask):
    matches = match_frames(np.where(mask, frames, 7), reference)
    assert matches.dtype == MATCH_DTYPE
    assert_found(matches, SHIFTS)
    assert not matches["flag"].any()
    assert matches["score"][0] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(matches["intensity"], [frame[mask].mean() for frame in frames])


def test_whole_pixels_on_request(frames, mask):
    matches = match_frames(frames, Reference(frames[0], mask, max_shift=12, subpixel=False))
    assert_found(matches, SHIFTS, within=0)
    np.testing.assert_allclose(matches["sigma_y"], 12**-0.5)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(9, 60), st.integers(9, 60)),
    part=st.floats(0, 0.99),
    bad=st.sampled_from([0, 0.01, 0.3]),
    block=st.booleans(),
    ratio=st.sampled_from([0.1, 0.5]),
    seed=seeds,
)
def test_the_prepared_search_gives_the_scores_of_masked_ncc(shape, part, bad, block, ratio, seed):
    """Single precision and every shortcut against double precision, for holes of all kinds and any window."""
    rng = np.random.default_rng(seed)
    image, frame = rng.poisson(texture(shape, seed % 1000)), rng.poisson(texture(shape, seed % 1000 + 1))
    mask = blocked(shape, seed, bad) if block else rng.random(shape) >= bad
    radius = int(part * (min(shape) - 1))
    ncc, overlap = ExactSearch(image, mask, mask, radius, ratio).surface(
        frame, statistics(frame, RowRuns.of(mask), np.inf)
    )
    exact = masked_ncc(image, frame, mask, mask, max_shift=radius, overlap_ratio=ratio).ncc
    np.testing.assert_array_equal(np.isnan(ncc), np.isnan(exact))
    np.testing.assert_allclose(ncc, exact, atol=1e-5)
    assert overlap[radius, radius] == np.count_nonzero(mask)


@pytest.mark.parametrize(("limit", "value"), [("_MOST_RUNS", 0), ("_TILE", 40)])
def test_every_way_of_summing_gives_the_same(monkeypatch, limit, value):
    image, frame = windows((64, 70), [(0, 0), (2, 3)])
    mask = blocked((64, 70), bad=0.05)
    pixels = statistics(frame, RowRuns.of(mask), np.inf)
    usual = ExactSearch(image, mask, mask, 9, 0.3).surface(frame, pixels)[0]
    monkeypatch.setattr(f"stillframe.registration.exact_search.{limit}", value)
    other = ExactSearch(image, mask, mask, 9, 0.3).surface(frame, pixels)[0]
    np.testing.assert_allclose(other, usual, atol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i4", ">u4", "u8", "f4", ">f8", "f2"])
def test_any_real_dtype_gives_the_same_shifts(dtype):
    frames = windows((64, 48), SHIFTS, counts=0.3)
    cast = frames.astype(dtype)
    cast.flags.writeable = False
    reference = Reference(cast[0], max_shift=9)
    assert_found(match_frames(cast, reference), SHIFTS)
    np.testing.assert_array_equal(cast, frames)


@pytest.mark.parametrize("shape", [(33, 65), (64, 31), (101, 47)])
def test_odd_and_oblong_frames(shape):
    frames = windows(shape, SHIFTS)
    assert_found(match_frames(frames, Reference(frames[0], max_shift=9)), SHIFTS)


@pytest.mark.parametrize("pedestal", [0, 1, 1e3, 1e4, 1e5, 1e6, -200, -1e5])
def test_no_pedestal_changes_a_shift(pedestal, frames, mask):
    raised = frames.astype(np.float64) + pedestal
    matches = match_frames(raised, Reference(raised[0], mask, max_shift=12))
    usual = match_frames(frames, Reference(frames[0], mask, max_shift=12))
    assert_found(matches, shifts_of(usual), within=1e-3)
    assert matches["score"][1] == pytest.approx(match_frames(frames, Reference(frames[0], mask))["score"][1], abs=1e-5)


@pytest.mark.parametrize("gain", [1.0, 3.5, 1e17, 1e25, 1e40])
def test_a_gain_changes_nothing(gain, frames, reference):
    found = match_frames(gain * frames[1:2], reference)
    assert_found(found, shifts_of(match_frames(frames[1:2], reference)), within=1e-6)
    assert found["score"] == pytest.approx(match_frames(frames[1:2], reference)["score"], abs=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_garbage_under_the_mask_changes_nothing(garbage, frames, mask):
    floats = frames.astype(np.float64)
    spoiled = np.where(mask, floats, garbage)
    clean = match_frames(floats, Reference(floats[0], mask, max_shift=12))
    np.testing.assert_array_equal(match_frames(spoiled, Reference(spoiled[0], mask, max_shift=12)), clean)


def test_swapping_the_roles_negates_the_shift(frames, mask):
    for frame, shift in zip(frames, SHIFTS, strict=True):
        back = match_frames(frames[:1], Reference(frame, mask, max_shift=12))
        assert_found(back, [(-shift[0], -shift[1])])


def test_a_frame_does_not_depend_on_its_company(frames, reference):
    together = match_frames(frames, reference)
    alone = np.concatenate([match_frames(frames[i : i + 1], reference) for i in range(len(frames))])
    np.testing.assert_array_equal(together, alone)


def test_masks_of_single_frames(frames, reference, mask):
    masks = np.stack([blocked(mask.shape, seed=i, bad=0.1) for i in range(len(frames))])
    spoiled = np.where(masks, frames.astype(float), np.nan)
    matches = match_frames(spoiled, reference, masks=masks)
    assert_found(matches, SHIFTS)
    for frame, own, match in zip(frames, masks, matches, strict=True):
        ncc = masked_ncc(reference.image, frame, mask, own, max_shift=12).ncc
        assert match["score"] == pytest.approx(np.nanmax(ncc), abs=1e-5)


def test_the_static_mask_given_for_every_frame_is_the_same(frames, reference, mask):
    usual, general = match_frames(frames, reference), match_frames(frames, reference, masks=mask)
    for name in MATCH_DTYPE.names:
        np.testing.assert_allclose(general[name], usual[name], atol=1e-6)


def test_a_brilliant_pixel_leaves_the_scores_exact(frames):
    """Where windows without it must be scored beside windows with it, single precision is not enough."""
    image, frame = frames[0].astype(np.float64), frames[1].astype(np.float64)
    image[2, 3] = frame[2, 3] = 1e8
    mask = np.ones(image.shape, bool)
    ncc, _ = ExactSearch(image, mask, mask, 12, 0.3).surface(frame, statistics(frame, RowRuns.of(mask), np.inf))
    np.testing.assert_allclose(ncc, masked_ncc(image, frame, max_shift=12).ncc, atol=1e-5)


def test_a_frame_that_never_meets_the_reference_is_flagged(frames, reference):
    masks = np.ones(frames.shape, bool)
    masks[1], masks[2] = False, False
    masks[2, 0, 0] = True
    matches = match_frames(frames, reference, masks=masks)
    assert_found(matches[::3], SHIFTS[::3])
    assert Flag(int(matches["flag"][1])) == Flag.CORRUPT
    assert matches["flag"][2]
    assert np.isnan(matches["dy"][1:3]).all()


def test_memory_is_that_of_a_few_frames_whatever_the_stack():
    stack = np.broadcast_to(windows((256, 256), [(0, 0)])[0].astype(">u2"), (80, 256, 256)).copy()
    reference = Reference(stack[0], max_shift=8)
    match_frames(stack[:1], reference)
    tracemalloc.start()
    match_frames(stack, reference)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * stack[0].nbytes < stack.nbytes / 2


def test_overlap_is_a_part_of_the_valid_pixels(frames):
    reference = Reference(frames[0], max_shift=12)
    height, width = reference.shape
    expected = [(height - abs(y)) * (width - abs(x)) / (height * width) for y, x in SHIFTS]
    np.testing.assert_allclose(match_frames(frames, reference)["overlap"], expected)


class TestFrames:
    """What cannot be registered says why, and has no shift."""

    @pytest.mark.parametrize(
        ("spoil", "flag"),
        [
            (lambda f: 0 * f, Flag.DARK),
            (lambda f: 0 * f + 7, Flag.DARK),
            (lambda f: f // 300, Flag.DARK),
            (lambda f: 0 * f + 65535, Flag.SATURATED),
            (lambda f: np.where(f > np.median(f), 65535, f), Flag.SATURATED),
            (lambda f: np.where(np.arange(f.size).reshape(f.shape) == f.size - 1, np.nan, f), Flag.CORRUPT),
            (lambda f: np.where(np.arange(f.size).reshape(f.shape) == f.size - 1, -np.inf, f), Flag.CORRUPT),
            (lambda f: np.random.default_rng(5).poisson(100, f.shape), Flag.LOW_SCORE),
        ],
    )
    def test_are_flagged_with_the_reason(self, spoil, flag, frames, reference):
        spoiled = spoil(frames[1])
        spoiled = spoiled if spoiled.dtype.kind == "f" else spoiled.astype(np.uint16)
        (match,) = match_frames(spoiled[None], reference)
        assert Flag(int(match["flag"])) == flag
        assert np.isnan([match["dy"], match["dx"], match["sigma_y"], match["sigma_x"]]).all()

    def test_beyond_the_window_are_at_the_edge(self, frames, mask):
        """They are sought once more in a window of twice the size, and say so."""
        matches = match_frames(frames, Reference(frames[0], mask, max_shift=4))
        assert matches["flag"].tolist() == [0, Flag.AT_EDGE, Flag.AT_EDGE, Flag.AT_EDGE]
        assert_found(matches[[0, 1, 3]], [SHIFTS[0], SHIFTS[1], SHIFTS[3]])
        assert np.isnan(shifts_of(matches[2:3])).all()

    def test_saturate_where_it_is_stated(self, frames, mask):
        reference = Reference(frames[0], mask, max_shift=12, saturation=float(np.percentile(frames[0], 60)))
        assert (match_frames(frames, reference)["flag"] == Flag.SATURATED).all()

    def test_are_sorted_before_an_average(self, frames, mask):
        stack = np.concatenate([frames, 0 * frames[:1], np.full_like(frames[:1], 65535)])
        np.testing.assert_array_equal(usable_frames(stack, mask), [True] * 4 + [False] * 2)


class TestReference:
    @pytest.mark.parametrize(
        ("arguments", "options", "error", "words"),
        [
            ((np.ones((8, 8)),), {"max_shift": 2}, ValueError, "no contrast"),
            ((np.eye(8),), {"max_shift": 8}, ValueError, "Give at most 7"),
            ((np.eye(8),), {"max_shift": -1}, ValueError, "negative"),
            ((np.eye(8),), {"max_shift": 2.0}, TypeError, "integer"),
            ((np.eye(8) + 1j,), {"max_shift": 2}, TypeError, "complex"),
            ((np.where(np.eye(8), np.nan, 1),), {"max_shift": 2}, ValueError, "8 valid pixels that are NaN"),
            ((np.eye(8), np.zeros((8, 8), bool)), {"max_shift": 2}, ValueError, "False everywhere"),
            ((np.eye(8), np.ones((8, 9), bool)), {"max_shift": 2}, ValueError, "belongs to one detector"),
            ((1e30 * np.eye(8),), {"max_shift": 2}, ValueError, "Multiply reference and frames by one constant"),
            ((np.eye(8),), {"max_shift": 2, "overlap_ratio": 1.5}, ValueError, "it is a fraction"),
            ((np.eye(8),), {"max_shift": 2, "frame_mask": np.ones((3, 3))}, ValueError, "mask of the frames has shape"),
        ],
    )
    def test_that_cannot_work_is_refused(self, arguments, options, error, words):
        with pytest.raises(error, match=words):
            Reference(*arguments, **options)

    def test_travels_as_its_fields_alone(self, reference, frames):
        match_frames(frames, reference)
        image, mask = reference.image, reference.mask
        packed = pickle.dumps(reference)
        assert len(packed) < image.nbytes + 2 * mask.nbytes + 2000
        back = pickle.loads(packed)
        assert back.digest == reference.digest
        np.testing.assert_array_equal(match_frames(frames, back), match_frames(frames, reference))

    def test_digest_changes_with_everything(self, frames, mask):
        variants = [
            Reference(frames[0], mask),
            Reference(frames[1], mask),
            Reference(frames[0]),
            Reference(frames[0], mask, max_shift=9),
            Reference(frames[0], mask, overlap_ratio=0.4),
            Reference(frames[0], mask, saturation=9.0),
            Reference(frames[0].astype("f4"), mask),
            Reference(frames[0], mask, frame_mask=np.ones_like(mask)),
            Reference(frames[0], mask, noise=(1, 0)),
            Reference(frames[0], mask, smoothing=2.0),
            Reference(frames[0], mask, subpixel=False),
        ]
        assert len({one.digest for one in variants}) == len(variants)

    def test_is_prepared_once_and_its_copies_anew(self, frames):
        reference = Reference(frames[0], max_shift=12)
        assert prepare(reference) is prepare(reference)
        other = reference.replace(max_shift=8)
        assert (other.max_shift, other.options.overlap_ratio) == (8, 0.3)
        assert prepare(other) is not prepare(reference)

    def test_is_prepared_once_for_several_threads(self, frames):
        reference = Reference(frames[0], max_shift=12)
        with ThreadPoolExecutor(4) as pool:
            prepared = list(pool.map(prepare, [reference] * 8))
        assert len({id(one) for one in prepared}) == 1

    def test_is_forgotten_with_what_was_prepared(self, frames):
        reference = Reference(frames[0], max_shift=12)
        prepared = weakref.ref(prepare(reference))
        del reference
        gc.collect()
        assert prepared() is None

    def test_cannot_be_written(self, reference):
        with pytest.raises(ValueError, match="read-only"):
            reference.image[0, 0] = 1


@pytest.mark.parametrize(
    ("stack", "masks", "error", "words"),
    [
        (np.zeros((3, 5, 5)), None, ValueError, "the same detector"),
        (np.zeros((96, 80)), None, ValueError, r"\(frame, y, x\) is needed"),
        (np.zeros((1, 96, 80), object), None, TypeError, "dtype object"),
        (np.zeros((2, 96, 80)), np.ones((3, 96, 80), bool), ValueError, "one mask per frame"),
    ],
)
def test_a_wrong_stack_is_told(stack, masks, error, words, reference):
    with pytest.raises(error, match=words):
        match_frames(stack, reference, masks=masks)


def test_an_empty_stack_gives_no_matches(reference):
    assert len(match_frames(np.zeros((0, 96, 80)), reference)) == 0
