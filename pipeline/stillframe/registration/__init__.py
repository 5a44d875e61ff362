"""Registration of two images: the shift that aligns a frame with a reference, its error, or a reason why there is none.

A frame, step by step (:mod:`.match` calls the steps, METHOD.md derives the numbered equations):

1. :mod:`.reference` the image, its masks and the search options, as users build and store them;
   :mod:`.prepared_reference` what is computed from it once.
2. :mod:`.coarse_search` and :mod:`.exact_search` score all shifts in a window, :mod:`.peak` takes the highest.
3. :mod:`.refine` goes on to fractions of a pixel: :mod:`.templates` of the reference (chosen in
   :mod:`.template_draft`, made blind to backgrounds in :mod:`.local_changes`), :mod:`.bin_pass` over the frame,
   :mod:`.equations` and their solution, :mod:`.estimate` with the covariance.
4. :mod:`.ncc_at_shift` the score of single pixels there.
5. :mod:`.acceptance` judges frames, peaks and shifts, with all thresholds (:mod:`.refine` itself gives up solutions far
   from the peak, :mod:`.coarse_search` peaks near its border); :mod:`.matches` the record of a frame.

:mod:`.build_reference` makes a reference of frames, which :mod:`.reference_frames` and :mod:`.frame_choice` select:
:mod:`.first_guide` chooses one with which others can be registered, :mod:`.rounds` aligns them again and again,
:mod:`.aligned_sum` averages them, :mod:`.detector_map` finds what does not move with the pattern, from the sums in
:mod:`.detector_sums`.
:mod:`.masked_ncc` is the plain masked NCC of any two images. May import ``images`` and the ground files (``errors``,
``flags`` … directly in the package).
"""
