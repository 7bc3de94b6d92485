"""Noise that was recorded, added at a signal-to-noise ratio."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_noise._checks import check_counts
from lightning_noise._tensor import validate_axis
from lightning_noise.noise.base import Noise, check_axes, find_valid
from lightning_noise.noise.series import SNR, add_at_ratio

__all__ = ["Recorded"]


@dataclass(frozen=True)
class Recorded(Noise):
    r"""Adds segments of recordings at an exact signal-to-noise ratio.

    .. math:: y = x + a \frac{\lVert x \rVert}{\lVert n \rVert} n

    The segment :math:`n` of a sample comes from a random recording, and begins at a random time. A recording that is too short
    is looped. The level is the relative amplitude :math:`a \geq 0`, as in :class:`SNR`: give ``schedules.from_snr_db(20)`` for
    20 decibels. The norms are those of the valid part of the whole sample. Silence in a recording adds nothing.

    Two noises are equal if their recordings hold the same numbers, or come from the same folder.

    Args:
        bank: The recordings: a tensor or an array of shape :math:`(N, T)` or :math:`(N, C, T)`, a list of recordings of any
            length, each of shape :math:`(T,)` or :math:`(C, T)`, or a folder with audio files. A recording without channels is
            added to all channels. A folder is read at the first draw, and stays in memory.
        sample_rate: The samples per second of the data, to check the files of a folder.
        dim: The axis of time, counted from the end: -1 for :math:`(B, C, T)` and -2 for :math:`(B, T, C)`.

    Raises:
        ImportError: If the bank is a folder and ``soundfile`` is not installed.
        ValueError: If a file has another sample rate.

    References:
        MUSAN: A Music, Speech, and Noise Corpus (Snyder et al., 2015), https://arxiv.org/abs/1510.08484

    Example:
        >>> bank = torch.randn(3, 8000, generator=torch.Generator().manual_seed(0))
        >>> x = torch.ones(4, 16_000)
        >>> y = Recorded(bank)(x, 0.1, generator=torch.Generator().manual_seed(1))
        >>> 20 * torch.log10(x.norm(dim=1) / (y - x).norm(dim=1))
        tensor([20.0000, 20.0000, 20.0000, 20.0000])
    """

    bank: Any  # Tensor | Sequence[Tensor] | str | PathLike
    _: KW_ONLY
    sample_rate: int | None = None
    dim: int = -1

    severities: ClassVar[tuple[float, ...]] = SNR.severities
    unit: ClassVar[str] = SNR.unit
    level_usage: ClassVar[str] = SNR.level_usage
    independent_rows: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "dim", validate_axis(self.dim))
        check_counts(sample_rate=self.sample_rate)
        if isinstance(self.bank, str | os.PathLike):
            folder = os.fspath(self.bank)
            object.__setattr__(self, "bank", folder)
            vars(self)["_folder"] = os.path.abspath(folder)  # the working directory may change before the first draw
            _check_folder(folder, self.sample_rate)
        elif not isinstance(self.bank, _Recordings):
            object.__setattr__(self, "bank", _Recordings(self.bank))

    @classmethod
    def _advise(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        is_rate = len(args) == 2 and isinstance(args[0], str | os.PathLike)
        return super()._advise(args[:1], {"sample_rate": args[1]} | kwargs) if is_rate else super()._advise(args, kwargs)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        check_axes(self, x, -self.dim)
        mask = find_valid(x, mask)
        return add_at_ratio(x, self._draw(x, generator), level, mask)

    def _draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a segment for each sample, in the shape of ``x``."""
        bank = self.bank if isinstance(self.bank, _Recordings) else _read(vars(self)["_folder"], self.sample_rate)
        others, n = x.movedim(self.dim, -1).shape[1:-1], x.shape[self.dim]
        if bank.channels not in ((), others):
            raise ValueError(
                f"recordings with channels of shape {tuple(bank.channels)} do not fit samples of shape {tuple(x.shape[1:])} "
                f"with time along axis {self.dim}; give recordings without channels, or type dim=…"
            )
        sound, starts, lengths = bank.on(x.device)
        which, when = torch.empty(2, len(x), dtype=x.dtype, device=x.device).uniform_(generator=generator)
        chosen = _pick(which, torch.full_like(which, len(starts)))
        start, length = starts[chosen, None], lengths[chosen, None]
        first = _pick(when[:, None], torch.where(length < n, length, length - n + 1))  # a long recording is not looped
        times = start + (first + torch.arange(n, device=x.device)) % length
        segments = sound[..., times].to(x.dtype).movedim(-2, 0)
        if not bank.channels:
            segments = segments.view(len(x), *[1] * len(others), n).expand(-1, *others, -1)
        return segments.movedim(-1, self.dim).contiguous()


class _Recordings:
    """Recordings in memory, compared by a digest of their numbers."""

    def __init__(self, recordings: Any):
        is_list = isinstance(recordings, Tensor | np.ndarray | Sequence) and getattr(recordings, "ndim", 1) > 0
        if not is_list or not len(recordings) or any(isinstance(part, str | os.PathLike) for part in recordings):
            raise TypeError(
                f"bank must be a tensor, a list of tensors or a folder, got {recordings!r}; type noise.Recorded('noises', "
                "sample_rate=16000)"
            )
        # a copy, because a later write of the caller would change the noise
        parts = [torch.as_tensor(part).detach() for part in recordings]
        if any(map(torch.is_complex, parts)):
            raise TypeError("recordings must be real numbers, got complex numbers; type torch.view_as_real(bank)[..., 0]")
        parts = [part.to("cpu", torch.float32, copy=True) for part in parts]
        for part in parts:
            advice = "" if part.ndim else "; for a single recording type noise.Recorded([recording])"
            if not part.ndim or not part.numel() or not part.isfinite().all() or part.shape[:-1] != parts[0].shape[:-1]:
                raise ValueError(
                    "recordings must be finite numbers of shape (T,), or of shape (C, T) with as many channels each, got shape "
                    f"{tuple(part.shape)} beside {tuple(parts[0].shape)}{advice}"
                )
        self.channels = parts[0].shape[:-1]
        self._lengths = [part.shape[-1] for part in parts]
        self._sound = torch.cat(parts, -1).contiguous()
        self._digest = blake2b(repr((self.channels, self._lengths)).encode() + self._sound.numpy().tobytes(), digest_size=8)
        self._digest = self._digest.hexdigest()
        self._copies: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the recordings one after another, where each begins, and their lengths, on a device."""
        if device not in self._copies:
            lengths = torch.tensor(self._lengths, device="cpu")
            parts = self._sound, lengths.cumsum(0) - lengths, lengths
            self._copies[device] = tuple(part.to(device) for part in parts)  # type: ignore[assignment]
        return self._copies[device]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Recordings) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        n = len(self._lengths)
        return f"<{n} recording{'s' if n > 1 else ''} {self._digest}>"

    def __deepcopy__(self, memo: Any) -> _Recordings:
        return self  # nobody writes to them

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_copies": {}}


def _pick(u: Tensor, n: Tensor) -> Tensor:
    """Returns an integer below ``n`` from a uniform number; the product of both may round up to ``n``."""
    return torch.minimum((u * n).long(), n.long() - 1)


@cache
def _read(folder: str, sample_rate: int) -> _Recordings:
    import soundfile

    sounds = []
    for path in _files(folder):
        sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if rate != sample_rate:
            raise ValueError(
                f"{path} must have {sample_rate} samples per second, got {rate}; type ffmpeg -i {path.name} -ar {sample_rate} "
                f"{path.stem}_{sample_rate}.wav"
            )
        sounds.append(torch.from_numpy(sound[:, 0] if sound.shape[1] == 1 else sound.T.copy()))
    return _Recordings(sounds)


def _check_folder(folder: str, sample_rate: int | None) -> None:
    """Raises an error if the audio files of a folder cannot be read."""
    try:
        import soundfile  # noqa: F401
    except ImportError as error:
        raise ImportError(f"noise.Recorded({folder!r}) reads audio files with soundfile; type pip install soundfile") from error
    if sample_rate is None:
        raise ValueError(
            f"a folder needs the sample rate of the data, got None; type noise.Recorded({folder!r}, sample_rate=16000)"
        )
    if not any(_files(folder)):
        raise ValueError(f"bank must be a folder with audio files, got {folder!r} without any")


def _files(folder: str) -> Iterator[Path]:
    """Yields the audio files of a folder and its subfolders, in the order of their names."""
    import soundfile

    kinds = {f".{kind.lower()}" for kind in soundfile.available_formats()} - {".raw"} | {".aif", ".oga", ".opus"}
    yield from (path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in kinds)
