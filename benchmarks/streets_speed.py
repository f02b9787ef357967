"""How fast the generated world is drawn: pictures of 64×64 a second, several rounds.

python benchmarks/streets_speed.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from common import record
from louver.data import streets

COUNT = 3000
ASKED = 1500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    begun = time.monotonic()
    streets(100, seed=0)
    rates = []
    for seed in range(1, arguments.rounds + 1):
        started = time.perf_counter()
        streets(COUNT, seed=seed)
        rates.append(COUNT / (time.perf_counter() - started))
    figures = {
        "images_per_second": [round(rate) for rate in rates],
        "median": round(float(np.median(rates))),
        "asked": ASKED,
    }
    print(figures)
    print(record("streets_speed", figures, seed=1, seconds=time.monotonic() - begun))


if __name__ == "__main__":
    main()
