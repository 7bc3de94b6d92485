"""The figure of clean samples next to noisy samples, as images, heat maps or signals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from lightning_noise.plots.style import CARD, COLORS, DPI, MOST_INCHES, WIDEST, PaperFigure, set_up, styled

__all__ = ["extremes", "samples", "spread"]

_MOST_COLUMNS = 9
_MOST_CHANNELS = 8
_TITLES = 0.34  # inches, for two lines
_LINE = 0.13  # inches, of a caption
_CHARACTERS = 15  # of a caption in an inch
_WRONG = COLORS[3]


@styled
def samples(
    columns: Mapping[str, Tensor | Sequence[Tensor]],
    *,
    n_samples: int = 4,
    captions: Mapping[str, Sequence[str]] | None = None,
    labels: Sequence[str] | None = None,
) -> Figure | None:
    """Draws samples as images or signals, a row for each sample and a column for each tensor.

    An image has shape (C, H, W) or (H, W, C) with one, three or four channels, or (H, W). One channel of unequal sides, such as
    a spectrogram, becomes a heat map. The colors of an image span the range of values of the same sample in the first column;
    NaN is red. Any other sample is drawn as signals: the longest axis is time, and the first eight of the others are drawn as
    lines. A gap in a line is NaN or infinite. Large images and long signals are thinned out, but the peaks of a signal stay. At
    most nine columns are drawn.

    Args:
        columns: The tensors by title, all of the same samples. Samples of different sizes come as a list of tensors.
        n_samples: How many samples to draw.
        captions: A short text for each sample, such as the predicted class, by title. A text that differs from the label, or
            without labels from the text in the first column, is red and bold.
        labels: The true label of each sample, which is written before the caption, as in "7 → 1".

    Returns:
        The figure, or ``None`` if there is no sample, or a sample is a single number or has more than three axes.

    Example:
        >>> figure = samples({"clean": torch.zeros(2, 1, 8, 8), "noisy": torch.ones(2, 1, 8, 8)})
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['clean', 'noisy']
        >>> samples({"clean": torch.zeros(2), "noisy": torch.ones(2)}) is None
        True
    """
    titles = spread(list(columns), _MOST_COLUMNS)
    shown = {title: [_as_real(x) for x in columns[title][:n_samples]] for title in titles}
    first = shown[titles[0]]
    texts = [captions[title][: len(first)] for title in titles] if captions else []
    wanted = labels or (texts[0] if texts else [])
    if not first:
        return None
    if all(_as_image(x) is not None for x in first):
        return _draw_images(shown, _Captions(texts, wanted, has_labels=labels is not None))
    if all(x.ndim <= 3 and max(x.shape, default=1) > 1 for x in first):
        return _draw_signals(shown, _Captions(texts, wanted, has_labels=labels is not None))
    return None


def spread(items: list[Any], n: int) -> list[Any]:
    """Returns at most n of the items, evenly spaced from the first to the last."""
    return items if len(items) <= n else [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def extremes(series: Tensor, n_stretches: int) -> Tensor:
    """Returns a short series itself, and else the smallest and largest value of each of many stretches, so that peaks stay."""
    n = series.shape[-1]
    size = math.ceil(n / n_stretches)
    if size <= 2:
        return series
    stretches = pad(series, (0, -n % size), value=math.nan).unflatten(-1, (-1, size))
    missing = stretches.isnan()
    low, high = stretches.masked_fill(missing, math.inf).amin(-1), stretches.masked_fill(missing, -math.inf).amax(-1)
    points = torch.stack([low, high], -1).flatten(-2)
    return points.where(points.isfinite(), math.nan)


class _Captions:
    """The texts above the samples.

    Args:
        texts: The texts of each column.
        wanted: The text of each sample that is right.
        has_labels: Whether to show what is right, too.
    """

    def __init__(self, texts: Sequence[Sequence[str]], wanted: Sequence[str], *, has_labels: bool):
        self.texts = texts
        self.wanted = wanted
        self.has_labels = has_labels

    def n_lines(self, inches: float) -> int:
        """Returns the lines that the longest caption needs in a column of a width."""
        if not self.texts:
            return 0
        return 1 + (self.has_labels and max(len(f"{a} → {b}") for a, b in self._pairs()) > inches * _CHARACTERS)

    def write(self, inches: float, place: Callable[[int, int], tuple[Axes, tuple[float, float], Any]]) -> None:
        """Writes each caption into the axes, above the point and in the coordinates that ``place`` returns for its cell."""
        between = "\n→ " if self.n_lines(inches) > 1 else " → "
        most = int(inches * _CHARACTERS) - 2 * (between != " → ")
        for column, texts in enumerate(self.texts):
            for row, (text, wanted) in enumerate(zip(texts, self.wanted, strict=False)):
                axes, point, coordinates = place(row, column)
                shown = between.join(_cut(each, most) for each in ([wanted, text] if self.has_labels else [text]))
                look: dict[str, Any] = {"color": "black"} if text == wanted else {"color": _WRONG, "weight": "bold"}
                axes.annotate(
                    shown,
                    point,
                    (0, 1.5),
                    xycoords=coordinates,
                    textcoords="offset points",
                    fontsize=7,
                    linespacing=1.0,
                    va="bottom",
                    annotation_clip=False,
                    **look,
                )

    def _pairs(self) -> list[tuple[str, str]]:
        return [pair for texts in self.texts for pair in zip(self.wanted, texts, strict=False)]


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else f"{text[: n - 1]}…"


def _as_real(x: Tensor) -> Tensor:
    x = x.detach().as_subclass(Tensor).cpu()
    return x.abs() if x.is_complex() else x


def _draw_signals(columns: Mapping[str, Sequence[Tensor]], captions: _Captions) -> Figure:
    """Draws all columns of a row into one axes, because a figure of many axes takes long to draw."""
    rows = [[_as_series(x) for x in row] for row in zip(*columns.values(), strict=True)]
    inches = min(1.6, (WIDEST - 0.6) / len(columns))
    gap = 0.08 + _LINE * captions.n_lines(inches)
    height = min(0.85, (MOST_INCHES - _TITLES - 0.3) / len(rows) - gap)
    size = np.array([inches * len(columns) + 0.6, (height + gap) * len(rows) + _TITLES + 0.25])
    figure = PaperFigure(figsize=tuple(size), dpi=DPI)
    (left, bottom), (right, top) = (0.5, 0.25) / size, 1 - (0.1, _TITLES + gap) / size
    figure.subplots_adjust(left, bottom, right, top, hspace=gap / height)
    grid = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, row in zip(grid, rows, strict=True):
        set_up(axes, grid=False)
        axes.set_prop_cycle(color=[*COLORS, "0.6"])
        x, y = _side_by_side(row, n_stretches=int(inches * DPI))
        axes.plot(x, y, linewidth=0.8, marker="." if len(row[0][0]) <= 32 else None, markersize=3)
        axes.vlines(range(1, len(row)), 0, 1, colors="0.8", linewidth=0.8, transform=axes.get_xaxis_transform())
        axes.set(xlim=(0, len(row)), xticks=[])
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.get_offset_text().set_fontsize(6)
    _set_titles(grid[0], columns, 1, inches, pad=2 + 72 * _LINE * captions.n_lines(inches))
    (n_lines, n_points), n_channels = rows[0][0].shape, next(iter(columns.values()))[0].numel()
    n_channels //= n_points
    if n_channels > n_lines:
        figure.text(0.5, 0.05 / size[1], f"the first {n_lines} of {n_channels} channels", fontsize=7, ha="center")
    captions.write(inches, lambda row, column: (grid[row], (column + 0.04, 1), grid[row].get_xaxis_transform()))
    return figure


def _as_series(x: Tensor) -> Tensor:
    """Returns the first channels of a sample as series along its longest axis, with gaps for what is not finite."""
    time = max(range(x.ndim), key=lambda dim: (x.shape[dim], dim))
    series = x.movedim(time, -1).reshape(-1, x.shape[time])[:_MOST_CHANNELS].float()
    return series.where(series.isfinite(), math.nan)


def _side_by_side(row: Sequence[Tensor], n_stretches: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns places and values of the series of a row, a line for each channel, with a gap between columns of width 1."""
    series = [pad(extremes(x, n_stretches), (0, 1), value=math.nan) for x in row]
    places = [column + torch.linspace(0.04, 0.96, x.shape[-1]) for column, x in enumerate(series)]
    return torch.cat(places).numpy(), torch.cat(series, -1).T.double().numpy()  # a range of float32 overflows


def _draw_images(columns: Mapping[str, Sequence[Tensor]], captions: _Captions) -> Figure:
    """Draws all images as one array, because a figure of many axes takes long to draw."""
    rows = list(zip(*columns.values(), strict=True))
    tiles = [_tiles(row, DPI) for row in rows]
    height, width = (max(tile.shape[dim] for row in tiles for tile in row) for dim in (0, 1))
    most = MOST_INCHES - _TITLES - 0.1
    widest = CARD if len(columns) <= 6 else WIDEST
    inches = min(1.0, widest / len(columns), most * width / (len(tiles) * height))
    n_lines = captions.n_lines(inches)
    strip = math.ceil((0.02 + _LINE * n_lines) * width / inches) if n_lines else 0  # white rows, for the caption
    inches = min(inches, most * width / (len(tiles) * (height + strip)))
    cells = [[pad(_centered(tile, height, width), (0, 0, 0, 0, strip, 0), value=1.0) for tile in row] for row in tiles]
    board = torch.cat([torch.cat(row, 1) for row in cells])
    size = np.array([len(columns) * inches, len(tiles) * (height + strip) / width * inches + _TITLES])
    figure = PaperFigure(figsize=tuple(size), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1 - _TITLES / size[1]))
    axes.imshow(board.numpy(), aspect="auto")
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    _set_titles(axes, columns, width, inches)
    margin = max(1, width // 18) - 0.5  # the edge of an image is at -0.5
    captions.write(
        inches, lambda row, column: (axes, (column * width + margin, row * (height + strip) + strip + margin), axes.transData)
    )
    return figure


def _as_image(x: Tensor) -> Tensor | None:
    """Returns a sample of an image's shape as (H, W, C) with one or three channels, or ``None``."""
    if x.ndim == 2:  # may also be a series of time and channels
        is_image = _are_sides(x.shape, shortest=8, ratio=4) or _are_sides(x.shape, shortest=16, ratio=64)
        return x.unsqueeze(-1) if is_image else None
    for image, shortest in ((x.movedim(0, -1), 2), (x, 8)) if x.ndim == 3 else ():
        *sides, channels = image.shape
        if channels in (1, 3, 4) and _are_sides(sides, shortest, ratio=8):
            return image[..., :3]
        if channels == 1 and _are_sides(sides, shortest=16, ratio=64):
            return image
    return None


def _are_sides(sides: Sequence[int], shortest: int, ratio: int) -> bool:
    return min(sides) >= shortest and max(sides) <= ratio * min(sides)


def _tiles(row: Sequence[Tensor], side: int) -> list[Tensor]:
    """Returns the images of a row in the colors of the first one, with a longest side near the given and a white margin."""
    images = [image for x in row if (image := _as_image(x)) is not None]
    height, width, n_channels = images[0].shape
    is_map = n_channels == 1 and max(height, width) >= 1.5 * min(height, width)
    images = [_resize(image, side, at_least=side // 2 if is_map else 1).float() for image in images]
    finite = images[0][images[0].isfinite()]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    margin = max(1, images[0].shape[1] // 16)
    tiles = []
    for image in images:
        colors = ((image - low) / (high - low)).clamp(0, 1)
        colors = _as_heat(colors) if is_map else colors.expand(-1, -1, 3)
        colors = torch.where(image.isnan().any(-1, keepdim=True), colors.new_tensor([0.9, 0.3, 0.3]), colors)
        tiles.append(_centered(colors, colors.shape[0] + 2 * margin, colors.shape[1] + 2 * margin))
    return tiles


def _as_heat(values: Tensor) -> Tensor:
    return torch.from_numpy(colormaps["viridis"](values[..., 0].nan_to_num(0.0).numpy())[..., :3])


def _resize(image: Tensor, side: int, at_least: int) -> Tensor:
    """Returns an image with a longest side near the given, and a shortest side of at least a number of pixels."""
    longest = max(image.shape[:2])
    step, factor = math.ceil(longest / side), max(1, side // longest)
    image = image[::step, ::step]  # an average of pixels would hide the noise
    for dim in (0, 1):
        repeats = max(factor, math.ceil(at_least / image.shape[dim]))
        image = image.repeat_interleave(repeats, dim)
    return image


def _centered(tile: Tensor, height: int, width: int) -> Tensor:
    """Returns a tile in the middle of a white one."""
    above, left = (height - tile.shape[0]) // 2, (width - tile.shape[1]) // 2
    return pad(tile, (0, 0, left, width - tile.shape[1] - left, above, height - tile.shape[0] - above), value=1.0)


def _set_titles(axes: Axes, titles: Iterable[str], width: float, inches: float, pad: float = 2.0) -> None:
    """Writes a title above each column of a width, in data coordinates; the edge of an image is at -0.5."""
    # a name and its level stand in two lines, because in one line they would touch the next title
    labels = ["\n".join(_cut(line, int(inches * _CHARACTERS)) for line in title.rsplit(maxsplit=1)) for title in titles]
    axes.set_xticks([(i + 0.5) * width - 0.5 * bool(axes.images) for i in range(len(labels))], labels)
    size = min(8.0, 9 * inches)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=size, pad=pad)
