"""Tries each callback alone under the conditions of two processes; each rank writes its outcomes to `<folder>/<rank>.json`."""

from __future__ import annotations

import json
import sys
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    from matrix.cells import outcome
    from matrix.columns import COLUMNS
    from matrix.conditions import TWO_PROCESSES

    torch.set_num_threads(1)
    registry: Any = import_module("lightning_fabric.utilities.registry")
    registry.entry_points = cache(registry.entry_points)  # as in the other tests; each trainer would search all packages
    warnings.simplefilter("ignore")
    outcomes = {name: {column: outcome(each, column) for column in COLUMNS} for name, each in TWO_PROCESSES.items()}
    Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(outcomes))
