import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.partition import MOST_FRAMES, TARGET_BYTES, Layout, make_plan, unit_memory

BIG = 2**50


def plan(layout, budget=BIG, **options):
    return make_plan(layout, budget=budget, output_itemsize=2, max_shift=32, **options)


layouts = st.builds(
    Layout,
    frames=st.integers(1, 500),
    shape=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    chunk_frames=st.integers(1, 60),
)


@given(layout=layouts, budget=st.integers(2**20, 2**36), wish=st.none() | st.integers(1, 90))
def test_units_cover_every_frame_once_and_fit_the_budget(layout, budget, wish):
    try:
        made = plan(layout, budget, unit_frames=wish)
    except ValueError:
        assert unit_memory(layout, 1, 2, 32) > budget
        return
    covered = [frame for unit in made.units for frame in range(unit.start, unit.stop)]
    assert covered == list(range(layout.frames))
    assert [unit.number for unit in made.units] == list(range(len(made.units)))
    assert unit_memory(layout, made.unit_frames, 2, 32) <= budget


@settings(deadline=None)
@given(layout=layouts, size=st.integers(1, 90))
def test_decodes_counts_the_units_that_meet_a_chunk(layout, size):
    made = plan(layout, unit_frames=size)
    chunk = layout.chunk_frames
    meeting = [
        sum(unit.start < start + chunk and unit.stop > start for unit in made.units)
        for start in range(0, layout.frames, chunk)
    ]
    assert max(meeting) <= made.decodes


@given(layout=layouts)
def test_whole_chunks_make_a_unit(layout):
    made = plan(layout)
    assert made.decodes == 1 or made.unit_frames == layout.frames
    assert made.unit_frames <= max(MOST_FRAMES, layout.chunk_frames)


def test_big_frames_make_units_of_the_target_size():
    layout = Layout(36000, (2048, 2048), 2, 1)
    assert plan(layout).unit_frames * layout.frame_bytes == TARGET_BYTES


def test_little_memory_makes_small_units_that_keep_chunks_aligned():
    layout = Layout(640, (2048, 2048), 2, 16)
    made = plan(layout, budget=700 * 2**20)
    assert made.unit_frames in (1, 2, 4, 8)
    assert made.decodes == 16 // made.unit_frames


def test_memory_does_not_grow_with_the_number_of_frames():
    few, many = (unit_memory(Layout(n, (512, 512), 2, 1), 32, 2, 32) for n in (100, 100_000))
    assert few == many


def test_frames_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="Use fewer workers, or give them more memory"):
        plan(Layout(10, (4096, 4096), 2, 1), budget=2**20)
    with pytest.raises(ValueError, match="Give a number ≥ 1"):
        plan(Layout(10, (64, 64), 2, 1), unit_frames=0)
