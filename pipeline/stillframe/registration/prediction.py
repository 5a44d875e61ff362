"""The expected mean of each bin of a frame, and the limits beyond which a residual is an outlier (26, 32)."""

from typing import NamedTuple

import numpy as np

from stillframe.images.arrays import Image

TAYLOR_TERMS = 6
"""The reference, its two slopes and its three second derivatives."""


class Prediction(NamedTuple):
    """Expected means of a frame's bins and limits of their residuals (26, 32), in single precision.

    The expected mean of a bin is the offset plus the Taylor series of the reference at the fraction of a pixel, each
    term with its coefficient. Residuals are in standard deviations of the reference.
    """

    mean: np.float32
    """Coefficient of the reference itself: the gain."""
    mean_y: np.float32
    """Coefficients of its derivatives."""
    mean_x: np.float32
    mean_yy: np.float32
    mean_yx: np.float32
    mean_xx: np.float32
    offset: np.float32
    limit: np.float32
    """Residual from which a bin of normal noise is an outlier."""
    skew_above: np.float32
    """What the skewness of the frame's counts adds to the upper limit, times the standard deviation."""
    skew_below: np.float32
    """What the skewness of the reference's counts adds to the lower limit, times the standard deviation."""
    tolerance: np.float32
    """Error of the expected mean that both limits allow besides, as a fraction of it."""
    zero: np.float32
    """Expected mean, without the offset, of a bin without counts."""

    @property
    def taylor(self) -> Image:
        """Coefficients of the Taylor series, (6,), rounded to single precision as the pass used them."""
        return np.array(self[:TAYLOR_TERMS], np.float64)
