"""A card for each noise on the page docs/noises.md, written and drawn from the class."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_sample_image, load_wine
from sphinx.application import Sphinx
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lightning_noise import noise
from lightning_noise._usage import typed
from lightning_noise.noise import Noise

PAGE = "noises"
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "noises.json"
MARK = "*The cards are on the documentation site, which `make site` builds; a code host does not show them.*"
GRAY, INK = "#808690", "#3d7fd9"  # seen on white and on black


def photo() -> Tensor:
    """Returns a photograph with pixels in [0, 1], of shape (1, 3, 80, 80)."""
    flower = torch.tensor(load_sample_image("flower.jpg")[60:380, 150:470]) / 255
    return avg_pool2d(flower.movedim(-1, 0).unsqueeze(0), 4)


def heart() -> Tensor:
    """Returns three beats of an artificial heart, of shape (1, 1, 300)."""
    seconds = torch.arange(300) / 100
    waves = [(0.15, 0.2, 0.04), (-0.15, 0.36, 0.015), (1.0, 0.4, 0.02), (-0.2, 0.44, 0.015), (0.3, 0.65, 0.06)]
    beats = [height * torch.exp(-((seconds % 1 - time) / width).square()) for height, time, width in waves]
    return torch.stack(beats).sum(0).view(1, 1, -1)


def sound() -> Tensor:
    """Returns a second of a rising and a falling tone, of shape (1, 4000)."""
    seconds = torch.arange(4000) / 4000
    rise, fall = (200 + 500 * seconds) * seconds, (1700 - 400 * seconds) * seconds
    return ((2 * math.pi * rise).sin() + (2 * math.pi * fall).sin()).unsqueeze(0)


def table() -> Tensor:
    """Returns 26 rows and 13 standardized columns of a table of wines."""
    x = torch.tensor(load_wine(return_X_y=True)[0], dtype=torch.float32)
    return ((x - x.mean(0)) / x.std(0))[::7]


def weights() -> Tensor:
    """Returns a matrix of weights, whose size varies from row to row."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 24, generator=generator) * torch.linspace(0.2, 1.0, 24).unsqueeze(1)


def draw_image(axes: list[Axes], x: Tensor) -> None:
    """Draws pixels."""
    axes[0].imshow(x[0].movedim(0, -1).clamp(0, 1), interpolation="nearest")


def draw_series(axes: list[Axes], x: Tensor) -> None:
    """Draws a line."""
    axes[0].plot(x[0, 0], color=INK, linewidth=0.8)
    axes[0].set_ylim(-1.1, 1.9)


def draw_sound(axes: list[Axes], x: Tensor) -> None:
    """Draws a waveform above its spectrogram."""
    axes[0].plot(x[0], color=INK, linewidth=0.3)
    axes[0].set_ylim(-4, 4)
    spectrum = torch.stft(x[0], 128, hop_length=40, window=torch.hann_window(128), return_complex=True)
    axes[1].imshow(spectrum.abs().log10(), origin="lower", aspect="auto", vmin=-1.5, vmax=1.5, cmap="magma")


def draw_matrix(axes: list[Axes], x: Tensor) -> None:
    """Draws positive numbers in red and negative numbers in blue."""
    axes[0].imshow(x, aspect="auto", cmap="coolwarm", vmin=-2.5, vmax=2.5, interpolation="nearest")


# what a noise is shown on: the data, how they are drawn, and the height of each row of the picture
IMAGE = (photo, draw_image, [1.0])
SERIES = (heart, draw_series, [0.7])
SOUND = (sound, draw_sound, [0.5, 0.7])
TABLE = (table, draw_matrix, [1.3])
WEIGHTS = (weights, draw_matrix, [1.0])
Subject = tuple[Callable[[], Tensor], Callable[[list[Axes], Tensor], None], list[float]]
HUM = torch.stack([(2 * math.pi * 50 * k * torch.arange(6000) / 4000).sin() / k for k in (1, 3, 5, 7)]).sum(0, keepdim=True)
CARDS: dict[str, tuple[Subject, list[Noise]]] = {
    "Data of any kind": (IMAGE, [noise.Gaussian(), noise.Uniform(), noise.Speckle(), noise.Impulse(), noise.Shot()]),
    "Images": (IMAGE, [noise.PatchGaussian(size=40), noise.Masking(value=0.5), noise.Rician()]),
    "Series": (SERIES, [noise.ColoredNoise(), noise.Drift(), noise.Scaling(), noise.Quantization(), noise.Jitter()]),
    "Audio": (SOUND, [noise.SNR(), noise.Recorded(HUM)]),
    "Tables": (TABLE, [noise.SwapNoise(), noise.FeatureDropout()]),
    "Weights": (WEIGHTS, [noise.DropConnect(), noise.AnalogWeights(time=86_400.0)]),
    "Several noises": (
        IMAGE,
        [
            noise.Compose([noise.Shot(), noise.Gaussian()]),
            noise.OneOf([noise.Gaussian(), noise.Masking()]),
            noise.Scaled(noise.Masking(), 0.5),
        ],
    ),
}


def draw(value: Noise, subject: Subject, path: Path) -> None:
    """Draws the data clean and at the five severities of a noise."""
    make, draw_one, heights = subject
    x = make()
    pictures = {"clean": x}
    for level in value.severities:
        pictures[f"{level:.2g}"] = value(x, level, generator=torch.Generator().manual_seed(0))
    size = (9.0, 1.5 * sum(heights) + 0.25)
    grid: dict[str, Any] = {"height_ratios": heights, "hspace": 0.04, "wspace": 0.05, "left": 0, "right": 1, "bottom": 0}
    figure, rows = plt.subplots(len(heights), 6, figsize=size, squeeze=False, gridspec_kw={**grid, "top": 1 - 0.25 / size[1]})
    for axes, (title, picture) in zip(rows.T, pictures.items(), strict=True):
        draw_one(list(axes), picture)
        axes[0].set_title(title, fontsize=10, color=GRAY, pad=3)
    for axes in rows.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)


def card(value: Noise, picture: str) -> str:
    """Returns the card of a noise in Markdown."""
    kind = type(value)
    text = inspect.getdoc(kind) or ""
    formula = re.search(r"\.\. math:: ((?:.+\n)+)", text)
    sources = re.search(r"References:\n(.*?)(?=\n\S|\Z)", text, re.DOTALL)
    severities = ", ".join(f"{level:.2g}" for level in value.severities)
    rows = {
        "in code": f"`{re.sub('<.*>', 'bank', typed(value))}`",  # recordings are shown by their number
        "level": value.unit + (f", at most {value.max_level:g}" if value.max_level < math.inf else ""),
        "usual levels": severities,
        "notes": "; ".join(notes(value)),
        "measured": measured(value),
        "source": "<br>".join(link(source) for source in re.split(r"\n\s*\n", sources[1])) if sources else "",
    }
    lines = [
        f"### {kind.__name__}",
        re.sub(r":class:`(\w+)`", r"`\1`", text.splitlines()[0]),
        f"![{kind.__name__} on the same data, clean and at five levels]({picture})",
        f"```{{math}}\n{formula[1]}```" if formula else "",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value),
    ]
    return "\n\n".join(line for line in lines if line)


def measured(value: Noise) -> str:
    """Returns what the noise does to a small model, without and with the noise in its training."""
    found = json.loads(MEASURED.read_text())[value.title]
    return (
        f"{found['data']}: an accuracy of {found['clean']} falls to {found['noisy']} under the noise. Training with the noise "
        f"changes these by {found['clean gain']} and {found['noisy gain']} points."
    )


def notes(value: Noise) -> list[str]:
    """Returns what a noise takes and works with, as its attributes say."""
    names = {field.name for field in fields(value)}  # pyright: ignore[reportArgumentType]
    facts = {
        '`relative="std"` gives the level in standard deviations of each sample': value.additive,
        "`schedules.from_snr_db` gives the level in decibels": "from_snr_db" in value.level_usage,
        "`dim=` names the axis": "dim" in names,
        "also takes integers, such as categories": not value.requires_float,
        "also takes complex data": value.takes_complex,
        "a sample depends on its batch, so monitors and adaptive levels refuse the noise": value.mixes_samples,
    }
    return [fact for fact, is_true in facts.items() if is_true]


def link(source: str) -> str:
    """Returns a reference of a docstring as a link."""
    words = " ".join(source.split())
    title, _, address = words.rpartition(", ")
    return f"[{title}]({address})"


def write_cards(app: Sphinx, name: str, source: list[str]) -> None:
    """Puts the cards into their page."""
    if name != PAGE:
        return
    folder = Path(app.doctreedir).parent / "noises"
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(inspect.getfile(noise)).parent.glob("*.py"):
        app.env.note_dependency(str(file))
    parts = []
    for title, (subject, values) in CARDS.items():
        parts.append(f"## {title}")
        for value in values:
            path = folder / f"{value.title}.png"
            draw(value, subject, path)
            parts.append(card(value, os.path.relpath(path, app.srcdir)))
    before, after = source[0].split(MARK)  # an error if the page lacks the mark
    source[0] = before + "\n\n".join(parts) + after


def check_complete() -> None:
    """Raises a ValueError if a public noise has no card."""
    shown = {value.title for _, values in CARDS.values() for value in values}
    missing = {name for name in noise.__all__ if isinstance(getattr(noise, name), type)} - shown - {"Noise", "Transform"}
    if missing:
        raise ValueError(f"expected a card for each noise, got none for {sorted(missing)}; add them to CARDS")


def setup(app: Sphinx) -> dict[str, bool]:
    """Writes the cards when their page is read."""
    check_complete()
    app.connect("source-read", write_cards)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
