"""What Hypothesis draws: images with masks, stacks with chunkings."""

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(2, 24)


@st.composite
def masked_image(draw, shape=None, least=2):
    """A random image with a random mask that leaves at least a few pixels."""
    shape = shape or (draw(sides), draw(sides))
    rng = np.random.default_rng(draw(seeds))
    mask = rng.random(shape) < draw(st.sampled_from([0.4, 0.75, 0.95, 1.0]))
    mask.flat[rng.choice(mask.size, size=min(least, mask.size), replace=False)] = True
    return rng.normal(draw(st.sampled_from([0.0, 3.0])), 1, shape), mask


@st.composite
def partition(draw, length):
    """Chunk lengths that add up."""
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=length - 1))) if length > 1 else []
    edges = [0, *cuts, length]
    return tuple(b - a for a, b in pairwise(edges))
