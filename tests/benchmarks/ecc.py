"""OpenCV 5's masked ECC as a peer: sub-pixel, with a mask for either image. Needs ``opencv-python-headless`` ≥ 5.

G. Evangelidis, E. Psarakis, IEEE Trans. Pattern Anal. Mach. Intell. 30(10), 1858 (2008),
doi 10.1109/TPAMI.2008.113; ``cv2.findTransformECCWithMask`` with translations alone.
"""

import numpy as np
import scipy.ndimage

try:
    import cv2
except ImportError:
    cv2 = None

SIZES = (1, 3, 5, 7, 11, 15, 21)
"""Sizes of OpenCV's Gaussian filter that are tried, pixels; 5 is its default."""
_STEPS, _CONVERGED = 200, 1e-6


def available():
    return cv2 is not None and hasattr(cv2, "findTransformECCWithMask")


class Ecc:
    """Register frames with one image at one size of the filter; the masks are shrunk so that no hole is smeared."""

    def __init__(self, image, mask, frame_mask=None, size=5):
        self.image, self.size = np.ascontiguousarray(image, np.float32), size
        reach = np.ones((size + 2, size + 2), bool)
        masks = (mask, mask if frame_mask is None else frame_mask)
        self.masks = [
            scipy.ndimage.binary_erosion(one, reach, border_value=1).astype(np.uint8) * np.uint8(255) for one in masks
        ]
        self.criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, _STEPS, _CONVERGED)
        cv2.setNumThreads(1)

    def shift(self, frame, start=(0.0, 0.0)):
        """Return the shift (y, x) to apply to a frame, NaN where OpenCV gives up."""
        dy, dx = start
        warp = np.array([[1, 0, -dx], [0, 1, -dy]], np.float32)
        moving = np.ascontiguousarray(frame, np.float32)
        try:
            _, warp = cv2.findTransformECCWithMask(
                self.image, moving, *self.masks, warp, cv2.MOTION_TRANSLATION, self.criteria, self.size
            )
        except cv2.error:
            return np.full(2, np.nan)
        return -np.asarray(warp, float)[[1, 0], 2]
