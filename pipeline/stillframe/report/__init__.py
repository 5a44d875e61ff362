"""Reports of a run, for people to look at.

- ``plots``: the picture ``shifts.png`` of a run: shifts, scores and flags over time.

Modules here may import the ground files and ``storage``. The workflow calls them at the end of a run.
"""
