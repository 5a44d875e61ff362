"""How many bad frames are flagged with the right reason, and how many good ones are flagged.

python tests/benchmarks/flags.py [--good 2000] [--bad 200]
"""

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from stillframe import Flag, make_reference, match_frames
from stillframe.simulation.experiment import Experiment, evaluate

SHAPE = (256, 256)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--good", type=int, default=2000)
    parser.add_argument("--bad", type=int, default=200)
    options = parser.parse_args()
    table = Table("pattern", "dose", "frames", "expected", "number", "right reason", "any flag", box=None)
    for pattern in ("rings", "spots"):
        for dose in (100.0, 5.0):
            for row in cell(pattern, dose, options):
                table.add_row(pattern, f"{dose:g}", *row)
    Console(width=110).print(table)


def cell(pattern, dose, options):
    rng = np.random.default_rng(20261122)
    detector = Experiment(frames=1, shape=SHAPE, pattern=pattern, dose=dose, seed=4).detector
    mask, pedestal = detector.mask, 50

    def good(shift):
        return rng.poisson(detector.see(dose * evaluate(pattern, SHAPE, shift))) + pedestal

    def corrupt(shift):
        frame = good(shift).astype(float)
        frame[tuple(rng.choice(np.argwhere(mask)))] = np.nan
        return frame

    makers = {
        "good": (None, good),
        "all zero": (Flag.DARK, lambda _: np.zeros(SHAPE)),
        "beam off": (Flag.DARK, lambda _: pedestal + np.rint(rng.normal(0, 1.5, SHAPE))),
        "corrupt": (Flag.CORRUPT, corrupt),
        "saturated": (Flag.SATURATED, lambda shift: np.where(good(shift) > pedestal + dose / 8, 65535, good(shift))),
        "noise only": (Flag.LOW_SCORE, lambda _: pedestal + rng.poisson(0.5 * dose, SHAPE)),
    }
    stack = np.stack([good(shift) for shift in rng.uniform(-4, 4, (32, 2))]).astype(np.uint16)
    reference = make_reference(stack, mask, use=slice(32), iterations=4, max_shift=16)
    for name, (flag, make) in makers.items():
        number = options.bad if flag else options.good
        flags = []
        for shift in rng.uniform(-8, 8, (number, 2)):
            frame = make(shift)
            frame = frame if name == "corrupt" else frame.astype(np.uint16)
            flags.append(int(match_frames(frame[None], reference)["flag"][0]))
        right = np.mean([value == (flag or 0) for value in flags])
        yield (
            name,
            str(flag.name).lower() if flag else "none",
            str(number),
            f"{right:.2%}",
            f"{np.mean(np.array(flags) != 0):.2%}",
        )


if __name__ == "__main__":
    main()
