"""Where the host's time of a compiled call goes: python -m benchmarks.host_profile --n 8192."""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Sequence

import torch

from benchmarks.host import inputs, ours, runs

CALLS = 200


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--n", type=int, default=8192)
    args = parser.parse_args(argv)
    for kind, run in runs(ours(), inputs(args.n)).items():
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(CALLS):
            run()
        profile.disable()
        torch.cuda.synchronize()
        print(f"{kind}, {CALLS} calls")
        pstats.Stats(profile).sort_stats("cumtime").print_stats(45)


if __name__ == "__main__":
    main()
