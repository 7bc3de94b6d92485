"""All benchmarks as one command: ``python -m benchmarks`` prints the tables, and with ``--write`` also keeps them.

The peers are in the extra ``bench``; a peer that cannot be imported is left out, and the output says so.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import platform
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import growth, memory, monitors, noises, report, rows, steps, weights
from benchmarks.tables import PAGE, RESULTS, insert, merge
from benchmarks.timing import Bench

TABLES = {
    "memory": memory.tables,  # first, because the peak of a small process shows more
    "noises": noises.tables,
    "rows": rows.tables,
    "weights": weights.tables,
    "steps": steps.tables,
    "monitors": monitors.tables,
    "report": report.tables,
    "growth": growth.tables,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures what noise costs.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="some of the tables")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU; above 1, wall time counts")
    parser.add_argument("--quick", action="store_true", help="measure each side once on little data, to test the benchmarks")
    parser.add_argument("--write", action="store_true", help="write the results and docs/performance.md")
    options = parser.parse_args()
    if options.write and options.quick:
        parser.error("--quick measures nothing that is worth keeping; leave out --write")
    return options


def about(bench: Bench) -> str:
    """Returns where, when and with what the tables were made."""
    clock = "Processor time" if bench.on_cpu and bench.threads == 1 else "Wall time"
    threads = f", {bench.threads} of {os.cpu_count()} processors" if bench.on_cpu else ""
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    versions = [f"{package} {version(package)}" for package in ("lightning_noise", "torch", "pytorch-lightning")]
    return (
        f"# Cost on {name(bench.device)}\n\n"
        f"Last written by `{command}`, with Python {platform.python_version()}, {', '.join(versions)}{threads}. {clock}; "
        f"medians, and in brackets the quartiles, of ratios of sides that took turns."
    )


def name(device: torch.device) -> str:
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    for logger in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    bench = Bench(torch.device(options.device), options.threads, options.quick)
    path = RESULTS / (bench.device.type + (f"-{bench.threads}-threads" if bench.threads > 1 else "") + ".md")
    chosen = [tables for part, tables in TABLES.items() if part in options.only]
    is_partial = len(chosen) < len(TABLES)
    old, sections = path.read_text() if is_partial and path.exists() else "", [about(bench)]
    print(sections[0], flush=True)
    for tables in chosen:
        for table in tables(bench):
            load = f" at a load of {os.getloadavg()[0]:.1f}" if bench.on_cpu else ""
            table.text += f" Measured on {datetime.date.today()}{load}."
            sections.append(str(table))
            print(f"\n{table}", flush=True)
        if options.write:  # now, because a run may be ended
            path.write_text(merge(old, "\n\n".join(sections)))
            PAGE.write_text(insert(PAGE.read_text()))


if __name__ == "__main__":
    main()
