"""The refinement of METHOD.md in plain NumPy, slow, and written from the equations alone."""

from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import scipy.ndimage
import scipy.optimize

LAGS = range(-3, 4)
KAPPA = 3.5


class Result(NamedTuple):
    """A solution of (22) with its covariance (34)."""

    shift: np.ndarray
    covariance: np.ndarray
    gain: float
    offset: float
    variance: float
    mismatch: float
    significance: float
    outliers: int
    inflation: float


def moved(image, y, x):
    """image(p + (y, x)), 0 beyond the border."""
    out = np.zeros_like(image)
    height, width = image.shape
    rows = slice(max(0, -y), min(height, height - y))
    columns = slice(max(0, -x), min(width, width - x))
    out[rows, columns] = image[max(0, y) : height + min(0, y), max(0, x) : width + min(0, x)]
    return out


def slopes(image):
    """Central differences along y and x."""
    return (moved(image, 1, 0) - moved(image, -1, 0)) / 2, (moved(image, 0, 1) - moved(image, 0, -1)) / 2


def smoothed(image, mask, width):
    """Gaussian-weighted mean of the valid pixels."""
    total, weight = (scipy.ndimage.gaussian_filter(a * mask, width, mode="constant") for a in (image, 1.0))
    return np.where(weight > 1e-3, total / np.maximum(weight, 1e-3), 0)


def filled(image, mask):
    """Equation (55): an image with its small holes, and its mask with them."""
    padded = np.pad(mask, 2, mode="edge")
    height, width = mask.shape
    valid = sum(padded[y : y + height, x : x + width].astype(int) for y, x in np.ndindex(5, 5))
    holes = ~mask & (valid >= 15)
    return np.where(holes, smoothed(image, mask, 1.0), image), mask | holes


def variance(soft, mask, gain, pedestal):
    """Equation (16)."""
    above = np.maximum(soft - pedestal, 0)
    return gain * np.maximum(above, 0.05 * above[mask].mean())


def noise_information(width, side):
    """ν of (51)."""
    size = int(4 * width + 0.5) + side + 2
    impulse = np.zeros((2 * size + 1, 2 * size + 1))
    impulse[size, size] = 1
    along = slopes(scipy.ndimage.gaussian_filter(impulse, width, mode="constant"))[0]
    box = scipy.ndimage.convolve(along, np.full((side, side), side**-2.0), mode="constant")
    return 2 * side**2 * np.sum(box**2)


def structured(inner, information, of_noise, width, side):
    """Equation (51); None where too much of the information is left."""

    def spread(image):
        return scipy.ndimage.gaussian_filter(image * inner, 4.0 / side, mode="constant")

    excess, scatter = spread(information - of_noise), spread(of_noise) * width / np.sqrt(width**2 + 16)
    certain = inner & (excess > 5 * scatter)
    return certain if excess[certain].sum() >= 0.98 * excess[inner].sum() > 0 else None


def support(inner, information, side):
    """Equation (21)."""
    density = np.where(inner, scipy.ndimage.gaussian_filter(information * inner, 4.0 / side, mode="constant"), 0)
    ordered = np.sort(density[inner])[::-1]
    enough = np.searchsorted(np.cumsum(ordered), 0.995 * ordered.sum())
    return inner & (density >= ordered[enough])


def kernel(width, side=1):
    """Λ_y ∗ Λ_x ∗ G of (24), with its slopes along y and x, far enough for all lags."""
    size = int(4 * width + 0.5) + 8
    impulse = np.zeros((2 * size + 1, 2 * size + 1))
    impulse[size, size] = 1
    soft = scipy.ndimage.gaussian_filter(impulse, width, mode="constant")
    triangle = np.array([1 - abs(q) / side for q in range(1 - side, side)])
    soft = scipy.ndimage.convolve(soft, np.outer(triangle, triangle), mode="constant")
    return soft, *slopes(soft)


def shared_noise(width, bins, side=1):
    """Equation (24) at all lags for noise that is everywhere the same, (4, 7, 7)."""
    soft, along_y, along_x = kernel(width, side)
    middle = len(soft) // 2
    at = np.ix_(*[[middle + lag for lag in LAGS]] * 2)
    return bins * np.stack([-along_y[at], -along_x[at], soft[at], np.zeros((7, 7))])


def central(model):
    """Derivative of the first two rows of a (4, 7, 7) model at lag 0, (2, 2)."""
    return np.stack([model[:2, 4, 3] - model[:2, 2, 3], model[:2, 3, 4] - model[:2, 3, 2]], axis=1) / 2


def lagrange(x):
    """The polynomials l_i(x) of (23)."""
    return np.array([np.prod([(x - j) / (i - j) for j in LAGS if j != i]) for i in LAGS])


def interpolated(model, y, x):
    """M_k(ε) of (23)."""
    return np.einsum("kij,i,j->k", model, lagrange(y), lagrange(x))


def weights_of_second_order(y, x):
    """W(q) of (30), 3×3, as the coefficients of the Taylor series in (26)."""
    here, up, left = (np.zeros((3, 3)) for _ in range(3))
    here[1, 1] = 1
    up[2, 1], up[0, 1] = 0.5, -0.5
    left[1, 2], left[1, 0] = 0.5, -0.5
    bend_y, bend_x, twist = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((3, 3))
    bend_y[:, 1] = bend_x[1, :] = 1, -2, 1
    twist[0, 0] = twist[2, 2] = 0.25
    twist[0, 2] = twist[2, 0] = -0.25
    return here + y * up + x * left + y * y / 2 * bend_y + y * x * twist + x * x / 2 * bend_x


def borne(y, x, side=1):
    """β of (30) as the double sum that it is."""
    weights, total = weights_of_second_order(y, x), 0.0
    for (a, b), (c, d) in product(np.ndindex(3, 3), repeat=2):
        total += weights[a, b] * weights[c, d] * max(1 - abs(a - c) / side, 0) * max(1 - abs(b - d) / side, 0)
    return total


class Oracle:
    """One reference, in bins of some side; everything that no frame changes."""

    def __init__(self, image, mask, gain, pedestal, width, side=1, square=0):
        self.level, self.gain, self.side = image[mask].mean(), gain, side
        self.image, self.mask = filled(np.where(mask, image - self.level, 0), mask)
        mask = self.mask
        soft = smoothed(self.image, mask, width)
        zero = pedestal - self.level
        v = variance(soft, mask, gain, zero)
        own = np.where(mask, np.maximum(gain * (soft - zero), 0), 0)
        self.v, self.own = self.bins(v) / side**2, own
        self.of_valid_pixels = self.bins(np.where(mask, v, 0)) / side**2
        self.zero, self.width = zero, width
        growth = self.bins(np.where(mask & (own >= v), gain, 0)) / side**2
        inner = self.bins(scipy.ndimage.minimum_filter(mask, 7, mode="constant", cval=False)) == 1
        along = [self.bins(slope) for slope in slopes(soft)]
        information, noisy = (along[0] ** 2 + along[1] ** 2) / self.v, self.bins(own) / side**2 / self.v
        certain = structured(inner, information, noisy * noise_information(width, side), width, side)
        self.support = support(inner, information, side) if certain is None else certain
        self.noisy = np.sum(noisy[self.support])
        fields = self.without_local_changes(*along, self.bins(soft), square // side)
        self.templates = [field / self.v for field in (*fields, np.ones_like(self.v))]
        self.shared = self.shared_noise(width, growth / self.v)

    def without_local_changes(self, along_y, along_x, soft, square):
        """Equation (53), square by square."""
        out = np.stack([along_y, along_x, soft])
        rows, columns = (length // square if square else 0 for length in soft.shape)
        for i, j in np.ndindex(rows, columns):
            place = np.zeros_like(self.support)
            stops = (None if k + 1 == n else (k + 1) * square for k, n in ((i, rows), (j, columns)))
            place[tuple(slice(k * square, stop) for k, stop in zip((i, j), stops, strict=True))] = True
            place &= self.support
            y, x = (position / square for position in np.nonzero(place))
            terms = np.stack([np.ones_like(y), y, x, y**2, y * x, x**2, soft[place]]) / np.sqrt(self.v[place])
            for k, basis in enumerate((terms, terms, terms[:6])):
                wanted = out[k, place] / np.sqrt(self.v[place])
                out[k, place] -= np.sqrt(self.v[place]) * (np.linalg.lstsq(basis.T, wanted)[0] @ basis)
        return out

    def shared_noise(self, width, growth):
        """Equation (24) at all lags, (4, 7, 7)."""
        unit, out = shared_noise(width, 1, self.side), np.zeros((4, 7, 7))
        for (i, y), (j, x) in product(enumerate(LAGS), enumerate(LAGS)):
            there = self.support * self.bins(moved(self.own, y, x)) / self.side**2
            weights = growth * there
            out[:, i, j] = np.sum(there / self.v) * unit[:, i, j] - self.sums(weights) * unit[2, i, j]
        return out

    def bins(self, image):
        """Means over bins."""
        rows, columns = (length // self.side for length in image.shape)
        whole = image[: rows * self.side, : columns * self.side]
        return whole.reshape(rows, self.side, columns, self.side).mean(axis=(1, 3))

    def sums(self, other):
        """Σ T_k other, for each of four templates."""
        return np.array([np.sum(template * other) for template in self.templates])

    def model(self, kept):
        """Equation (28): M_k at all lags, over the bins that are kept."""
        share = np.count_nonzero(kept) / np.count_nonzero(self.support)
        rows = [[self.sums(kept * self.bins(moved(self.image, y, x))) for x in LAGS] for y in LAGS]
        return np.moveaxis(np.array(rows), 2, 0) - share * self.shared

    def second_order(self, y, x):
        """R₂ of (26)."""
        weights = weights_of_second_order(y, x)
        return self.bins(sum(weights[i, j] * moved(self.image, i - 1, j - 1) for i, j in np.ndindex(3, 3)))

    def solve(self, frame, frame_mask, start, passes=8):
        """Go from a whole-pixel shift to the solution; outliers and V are those of the last pass but one."""
        values = self.bins(moved(frame.astype(float), -start[0], -start[1]))
        there = self.support & (self.bins(moved(frame_mask.astype(float), -start[0], -start[1])) == 1)
        parameters, own, kept = np.array([0.0, 0.0, 1.0, values[there].mean()]), 1.0, there
        for number in range(passes):
            y, x, a, b = parameters
            r = np.where(there, (values - b - a * self.second_order(y, x)) / np.sqrt(self.v), 0)
            if number > 1:
                spread = np.sqrt(own + a**2 * borne(y, x, self.side))
                step = self.gain / self.side**2 * (KAPPA**2 - 1) / 6 / np.sqrt(self.v)
                expected = a * (self.second_order(y, x) - self.zero)
                allowed = 0.2 * np.abs(expected) / np.sqrt(self.v)
                high, low = KAPPA * spread + own / a * step + allowed, KAPPA * spread + a * step + allowed
                kept = there & (r < high) & (r > -low)
            data, totals, model = self.sums(kept * values), self.sums(kept), self.model(kept)

            def lacking(at, data=data, totals=totals, model=model):
                return data - at[2] * interpolated(model, at[0], at[1]) - at[3] * totals

            parameters = scipy.optimize.root(lacking, parameters, tol=1e-12).x
            square = (r**2)[kept].sum() / (self.noisy * np.count_nonzero(kept) / np.count_nonzero(self.support))
            own = max(square - borne(*parameters[:2], self.side) * parameters[2] ** 2, 0.1 * square)
        return self._result(start, parameters, lacking, np.where(kept, r, 0), kept, own)

    def _result(self, start, parameters, lacking, r, kept, own):
        y, x, a, b = parameters
        n, share = np.count_nonzero(kept), np.count_nonzero(kept) / np.count_nonzero(self.support)
        scatter, products = self.products(r**2), self.reference_products()
        without = scatter - a**2 * borne(y, x, self.side) * share * products
        meat = without if (np.diag(without) > 0.1 * np.diag(scatter)).all() else scatter
        meat[:2, :2] += a**2 * np.einsum("klij,i,j->kl", self.wander(), (y, x), (y, x))
        bread = np.linalg.inv(-scipy.optimize.approx_fprime(parameters, lacking, 1e-6))
        apart = max(np.sum(r * self.far(r)) / n, 0)
        mismatches = [
            unexplained / (unexplained + a**2 * structure)
            for unexplained, structure in zip(np.maximum(self.local(r) / share, 0), self.structures(), strict=True)
        ]
        inflation = self.inflation(r, apart, np.mean(r[kept] ** 2))
        return Result(
            shift=np.add(start, (y, x)),
            covariance=bread @ meat @ bread.T * inflation,
            gain=a,
            offset=b,
            variance=own,
            mismatch=min(mismatches),
            significance=a / np.sqrt((bread @ meat @ bread.T * inflation)[2, 2]),
            outliers=np.count_nonzero(self.support & ~kept),
            inflation=inflation,
        )

    def inflation(self, r, apart, square):
        """F of (38), from every fourth row of bins; gaps of up to 64 bins in a row belong to it."""
        rows = np.zeros_like(self.support)
        step = -(-3 // self.side)
        for row in range(0, len(rows), 4):
            columns = np.flatnonzero(self.support[row])
            if row >= step and columns.size and self.support[row - step].any():
                rows[row, columns] = True
                for first, last in pairwise(columns):
                    rows[row, first : last if last - first <= 65 else first] = True
        pairs = np.count_nonzero(rows)
        lags = [(0, 1), (0, 2), *((y, x) for y in (1, 2) for x in range(-2, 3))]
        near = sum(np.sum(rows * r * moved(r, -y, -x)) for y, x in lags)
        excess = 2 * (near / pairs - 12 * apart) / square
        return 1 + excess if excess > 8 * np.sqrt(12 / pairs) else 1.0

    def products(self, squares):
        """Σ T_k T_l v squares over the support."""
        t = np.stack([template[self.support] for template in self.templates])
        return (t * (self.v * squares)[self.support]) @ t.T

    def reference_products(self):
        """Σ T_k T_l v of the noise of the plain reference."""
        return self.products(self.gain * (self.bins(self.image) - self.zero) / self.side**2 / self.v)

    def common(self):
        """Equation (37)."""
        inverse = np.linalg.inv(central(self.model(self.support)))
        return inverse @ self.reference_products()[:2, :2] @ inverse.T

    def expected_variance(self):
        """Equation (25)."""
        along = [self.bins(slope) * self.support for slope in slopes(self.image)]
        shared = central(self.shared)
        jacobian = np.stack([self.sums(slope)[:2] for slope in along], axis=1) - shared
        inverse = np.linalg.inv(jacobian)
        variance = inverse @ self.products(np.ones_like(self.v))[:2, :2] @ inverse.T
        drawn = np.diag(shared) / np.diag(jacobian)
        counts = 4 * np.pi * self.width**2 * self.bins(self.own)[self.support] / self.gain**2
        lack = np.mean(1 / np.maximum(counts, 1))
        return np.trace(variance) + (0.05 / 8 + lack**2) * np.sum(drawn**2) / 12

    def wander(self):
        """W of (36), over pixels."""
        inside = [template * self.support / self.side**2 for template in self.templates[:2]]
        changes = [slopes(one.repeat(self.side, 0).repeat(self.side, 1)) for one in inside]
        v = (self.of_valid_pixels * self.side**2).repeat(self.side, 0).repeat(self.side, 1)
        return np.array(
            [[[[np.sum(k[i] * m[j] * v) for j in (0, 1)] for i in (0, 1)] for m in changes] for k in changes]
        )

    def far(self, image):
        """What stands A₀ bins above and to the left, equation (39)."""
        step = -(-3 // self.side)
        return moved(image, -step, -step)

    def farther(self, image):
        """What stands A₀ bins above and B₀ to the left."""
        down, across = (int(np.ceil(length / self.side)) for length in (3, round(max(12, 6 * self.width))))
        return moved(image, -down, -across)

    def products_of_pairs(self, image):
        """C_A and C_B of (39)."""
        here = self.support.astype(float)
        return [np.sum(image * of(image)) / np.sum(here * of(here)) for of in (self.far, self.farther)]

    def local(self, image):
        """A of (39)."""
        apart, far = self.products_of_pairs(image)
        return np.array([apart - far, apart])[: 1 + self.is_smooth()]

    def is_smooth(self):
        """Whether the reference may have nothing but smooth structure, (39)."""
        apart, far = self.products_of_pairs(self.standardized())
        return bool(apart - far <= 0.03 * apart)

    def standardized(self):
        """ρ of (39)."""
        known, weights = self.bins(self.image), self.support / self.v
        return self.support * (known - np.sum(known * weights) / weights.sum()) / np.sqrt(self.v)

    def structures(self):
        """E of (39), and C_A(ρ) where the reference may be smooth."""
        apart, _ = self.products_of_pairs(self.standardized())
        return np.maximum(self.local(self.standardized()), 0.03 * apart)
