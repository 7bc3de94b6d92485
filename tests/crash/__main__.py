"""Kills fits at random moments: `cd tests && python -m crash --fits 200`."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import torch

from crash.kill import kill

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        counted, lost = kill(Path(folder), given.fits, given.seed)
    for what, number in sorted(counted.items()):
        print(f"{what}: {number}")
    print(f"lost: {len(lost)}")
