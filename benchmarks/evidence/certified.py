"""Certified accuracy with and without noise in the training, on MNIST digits; fills the table of ``docs/howto/certify.md``.

It needs what ``python -m benchmarks.evidence`` needs, and about a quarter of an hour; it can be stopped and started again.
"""

from __future__ import annotations

import json
from itertools import product
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks.evidence.runs import fit, quiet
from benchmarks.evidence.tasks import split
from benchmarks.tables import RESULTS, ROOT, insert
from lightning_noise import InputNoise, noise, smooth

RAW, PAGE = RESULTS / "certified.jsonl", ROOT / "docs" / "howto" / "certify.md"
SIGMAS, SEEDS, N = (0.25, 0.5, 1.0), range(5), 500
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
TRAININGS = {"without": lambda sigma: [], "with": lambda sigma: [InputNoise(noise.Gaussian(), sigma)]}
ABOUT = f"""# Certified accuracy

The share of the test digits whose class is right and certified up to an L2 radius, in per cent, and the average certified
radius (ACR): means over {len(SEEDS)} seeds with their standard errors. A seed draws weights, split and noise. The
network is that of `python -m benchmarks.evidence`, trained on 3,000 digits with pixels in [0, 1]; {N} test digits, n0 = 100,
n = 1,000 and alpha = 0.001, as in Cohen et al. (2019). "clean" is the accuracy of the network without noise. Measured by
`python -m benchmarks.evidence.certified`.
"""


def measure(seed: int, training: str, sigma: float, module: torch.nn.Module) -> dict[str, Any]:
    """What the smoothed module certifies of the first test digits."""
    x, y = (part[:N] for part in split("mnist", seed)["test"])
    classes, radii = smooth(module, sigma).certify(x, seed=seed)
    with torch.no_grad():
        clean = (module(x).argmax(1) == y).float().mean().item()
    right = classes == y
    accuracies = [(right & (radii >= radius)).float().mean().item() for radius in RADII]
    numbers = {"clean": clean, "abstentions": (classes < 0).float().mean().item(), "acr": (radii * right).mean().item()}
    numbers |= {f"{radius:g}": each for radius, each in zip(RADII, accuracies, strict=True)}
    return {"seed": seed, "training": training, "sigma": sigma} | {key: round(each, 5) for key, each in numbers.items()}


def table(records: list[dict[str, Any]]) -> str:
    """The table of the page."""

    def cell(found: list[dict[str, Any]], key: str) -> str:
        values = [each[key] * (1 if key == "acr" else 100) for each in found]
        digits = 3 if key == "acr" else 1
        return f"{fmean(values):.{digits}f} ± {stdev(values) / len(values) ** 0.5:.{digits}f}"

    keys = ["clean", *(f"{radius:g}" for radius in RADII), "abstentions", "acr"]
    head = ["sigma", "noise in training", *(f"r = {key}" if key[0].isdigit() else key for key in keys[:-1]), "ACR"]
    lines = [head, ["---"] * len(head)]
    for sigma in SIGMAS:
        for training in TRAININGS:
            found = [each for each in records if (each["training"], each["sigma"]) == (training, sigma)]
            lines.append([f"{sigma:g}", training, *(cell(found, key) for key in keys)])
    return ABOUT + "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def finished() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.exists() else []


def main() -> None:
    quiet()
    done = {(each["seed"], each["training"], each["sigma"]) for each in finished()}
    for seed, (training, callbacks), sigma in product(SEEDS, TRAININGS.items(), SIGMAS):
        if (seed, training, sigma) not in done:
            record = measure(seed, training, sigma, fit("mnist", "plain", seed, callbacks(sigma)))
            print(record, flush=True)
            with RAW.open("a") as file:
                file.write(json.dumps(record) + "\n")
    (RESULTS / "certified.md").write_text(table(finished()))
    PAGE.write_text(insert(PAGE.read_text()))


if __name__ == "__main__":
    main()
