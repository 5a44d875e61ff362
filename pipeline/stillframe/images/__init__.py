"""One image: pixels, masks, bins, statistics, noise, outliers and moving by fractions of a pixel.

1. :mod:`.arrays` checks what users pass in; :mod:`.run_lengths` turns masks into runs of pixels.
2. :mod:`.binning` and :mod:`.statistics`: the first pass over a frame, its bins and its mean, deviation and range.
3. :mod:`.corrections`: dark and flat, applied to a frame before anything else is computed from it.
4. :mod:`.noise` variance against intensity, stated or measured; :mod:`.hot_pixels` isolated outliers.
5. :mod:`.resample` moves frames, and marks pixels for which nothing was observed.

May import the ground files (``errors``, ``flags``, ``options``, ``partition`` … directly in the package).
"""
