"""Simulated experiments with known shifts, and a self-test on a user's own pattern.

1. ``experiment``: the pattern, the drift and the detector of a pump–probe run; frames as arrays.
2. ``write``: an experiment as a Zarr store and a mask, for demonstrations and tests.
3. ``selftest``: errors of the registration on frames made from a user's own reference.

May import ``storage``, ``registration``, ``images`` and the ground files; ``experiment`` imports ``images`` alone.
"""
