"""A run: from settings to finished stores, in units that survive any kill.

The story of ``stillframe run``, with the module of each step:

1. ``driver``: the entry point. ``begin`` checks the folder, opens the frames and cuts the stack into units;
   ``run_reference`` makes or keeps the reference.
2. ``lease`` lets one driver write into the folder, and fences off writers of an earlier run.
3. ``stages``: one pass over the stack. ``unit_table`` reads each record once; ``staleness.unit_state`` says whether a
   unit is done, and if not, why, from the dependencies that ``begin`` collects. A change of ``interpolation`` or
   ``fill`` redoes the alignment only; a change of mask, reference, search options, ``missing_chunks``, input files,
   ``unit_frames`` or kernel version redoes both stages. ``run_reference`` decides whether the reference is made again.
4. ``unit_tasks``: what a worker does with one unit. ``precompile`` compiles the kernel before all workers need it.
5. ``ledger`` holds a record for each unit and stage; ``run_folder`` every name in the folder, ``run.json`` and the
   manifest.

Beside it: ``follow`` (frames that are still being written), ``parts`` (a run in parts without a scheduler),
``forecast`` (what a run is going to take), ``status`` (how far it is) and ``verify`` (every byte as recorded).

May import every other package, but not ``lazy``, ``console``, ``demo`` or ``cli``, which users call.
"""
