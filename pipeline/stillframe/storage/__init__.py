"""What lies on disk: stacks of frames are read, Zarr stores of results are written durably.

- Input: ``frames`` opens a stack and reads units of it, ``coordinates`` reads time, scan, delay and kind stored beside
  it, ``pictures`` reads images and masks. A new detector format is a module beside ``frames`` whose class has the
  methods of ``FrameSource`` (shape, dtype, layout, reading a unit, identity of its files), opened by ``open_source``.
- Results: ``reference_store`` keeps the reference, ``shifts_store`` labels the kernel's result as a dataset,
  ``aligned_store`` holds aligned frames, one shard per unit.
- Below them: ``zarr_files`` writes or changes whole stores, ``durable`` writes single files that survive a power loss,
  ``checksums`` hashes files, arrays and JSON documents.

Imports ``registration``, ``images`` and the ground files (``errors``, ``options`` … directly in the package);
never dask.
"""
