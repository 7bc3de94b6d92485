"""Random numbers for each element of a tensor, and noises whose numbers are drawn where they are used."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_noise._tensor import empty_wide, is_differentiated
from lightning_noise.loop.internals import is_transformed

__all__ = ["draw_bits", "draw_normal", "draw_uniform", "fuse", "is_fused", "last_bits"]

_SMALLEST = 2**16  # for fewer numbers, a launch takes longer than its work, and torch launches faster
_DEVICE = "cuda"
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_NARROW = 2**30  # for more numbers, an index needs 64 bits
_PROBE = 2**63 - 1, 2**31 - 1  # a seed and the number of a draw that fill their words
# bits of the first program, one of each word, and the first of the second program
_KNOWN = [885090275, 1636526700, 673655113, 131908270, 1240304351]

Draw = Literal["normal", "uniform", "bits"]
Formula = Literal["add", "scale", "drop", "replace"]


def draw_normal(x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns normal numbers of the shape of ``x``, in at least float32."""
    y = empty_wide(x)
    return _draw("normal", y, generator) if _is_drawn(x) else y.normal_(generator=generator)


def draw_uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns uniform numbers between -1 and 1 of the shape of ``x``, in at least float32."""
    y = empty_wide(x)
    return _draw("uniform", y, generator) if _is_drawn(x) else y.uniform_(-1, 1, generator=generator)


def draw_bits(x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns uniform integers in [0, 2^31) of the shape of ``x``, as int32."""
    if x.device.type != "cpu" or x.numel() < 2**13:
        y = torch.empty_like(x, dtype=torch.int32)
        return _draw("bits", y, generator) if _is_drawn(x) else y.random_(generator=generator)
    # a generator of the CPU draws 64 bits in little more time than 32
    pairs = torch.empty((x.numel() + 1) // 2, dtype=torch.int64, device=x.device).random_(generator=generator)
    return pairs.view(torch.int32)[: x.numel()].view(x.shape).bitwise_and_(2**31 - 1)


def last_bits(level: float | Tensor) -> int | Tensor:
    """Returns the integer that a share ``level`` of the draws of :func:`draw_bits` does not exceed; -1 for no draw."""
    return (level * 2**31).long().sub_(1).int() if isinstance(level, Tensor) else int(level * 2**31) - 1


def is_fused(x: Tensor, level: float | Tensor) -> bool:
    """Returns whether :func:`fuse` takes ``x``: a large tensor on a GPU, if autograd follows neither ``x`` nor the level."""
    return _is_drawn(x) and not (is_differentiated(x) or (isinstance(level, Tensor) and is_differentiated(level)))


def fuse(
    draw: Draw,
    formula: Formula,
    x: Tensor,
    generator: torch.Generator,
    mask: Tensor | None,
    level: float | Tensor,
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
) -> Tensor:
    """Returns ``x`` perturbed by one kernel, with the numbers that the functions of this module draw.

    Invalid elements and NaN keep their values. With the number z of an element, the formula is one of:

    * ``"add"``: ``x + level * z``
    * ``"scale"``: ``x * (1 + level * z)``
    * ``"drop"``: ``x * high`` if ``z > level``, and else 0
    * ``"replace"``: ``x`` if ``z > level``, and else ``high`` or ``low``, by the last bit of z

    Args:
        draw: What to draw.
        formula: The formula.
        x: A contiguous tensor that :func:`is_fused`.
        generator: The source of randomness.
        mask: The valid elements.
        level: A number, or a number for each row with the axes of ``x``. If bits are drawn, it is that of :func:`last_bits`.
        low: The lower value of ``"replace"``, in the same form.
        high: The higher value of ``"replace"``, or the factor of ``"drop"``, in the same form.
    """
    # a level that is expanded to many rows, such as the deviation of a large weight, becomes one number
    values = [v[:1] if isinstance(v, Tensor) and not v.stride(0) else v for v in (level, low, high)]
    rows = len(x) if any(isinstance(value, Tensor) and value.numel() > 1 for value in values) else 1
    dtypes = torch.int32 if draw == "bits" else torch.float32, torch.float32, torch.float32
    operands = [_per_row(value, rows, dtype, x) for value, dtype in zip(values, dtypes, strict=True)]
    valid = None if mask is None else mask.view(torch.uint8)
    return _launch(_kernels(x.device), draw, formula, torch.empty_like(x), *_reserve(generator), x, valid, *operands)


def _per_row(value: float | Tensor | None, rows: int, dtype: torch.dtype, x: Tensor) -> Tensor | None:
    """Returns a value as a dense tensor with a number for each row."""
    if isinstance(value, Tensor):
        return value.to(dtype).expand(rows, *[1] * (x.ndim - 1)).contiguous()  # refuses a level for each channel
    return None if value is None else torch.full((rows,), value, dtype=dtype, device=x.device)


def _draw(draw: Draw, y: Tensor, generator: torch.Generator) -> Tensor:
    return _launch(_kernels(y.device), draw, "draw", y, *_reserve(generator))


def _is_drawn(x: Tensor) -> bool:
    """Returns whether the kernel draws the numbers for ``x``, whether or not autograd follows ``x``."""
    is_large = x.device.type == _DEVICE and x.dtype in _TYPES and x.numel() >= _SMALLEST
    if not is_large or type(x) not in (Tensor, nn.Parameter) or is_transformed():  # within torch.func, x may have no memory
        return False
    return _kernels(x.device) is not None


@cache
def _kernels(device: torch.device) -> Any:
    """Returns the module of the kernel, or ``None`` if the kernel does not draw the known numbers on the device."""
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from lightning_noise.noise import kernels

        y = torch.empty(4 * kernels.BLOCK + 1, dtype=torch.int32, device=device)
        found: Any = _launch(kernels, "bits", "draw", y, *_PROBE)[:: kernels.BLOCK].tolist()
        if found == _KNOWN:
            return kernels
    except Exception as error:  # above all, no C compiler or no headers of Python, which Triton needs
        found = f"{type(error).__name__}: {error}"  # the repr of an OSError names no file
    warnings.warn(
        f"torch draws the noise on {device}, which takes longer than the kernel of lightning_noise; the kernel should draw "
        f"{_KNOWN}, got {found}; if Triton finds no C compiler or no Python.h, type apt install gcc python3-dev, and if it "
        "cannot write its files, type export TRITON_CACHE_DIR=… with a folder that it can write",
        stacklevel=2,
    )
    return None


def _reserve(generator: torch.Generator) -> tuple[int, int]:
    """Returns the seed and the number of a draw, and moves the generator to the next draw."""
    if generator.device.type != _DEVICE:
        raise ValueError(
            f"the generator must be on the device of the tensor, got {generator.device}; type torch.Generator(x.device)"
        )
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # torch demands a multiple of four
    return generator.initial_seed(), offset // 4


@torch.compiler.disable()  # compiled code would hold the seed as a constant, and be compiled again for the next one
def _launch(
    kernels: Any,
    draw: Draw,
    formula: Formula | Literal["draw"],
    y: Tensor,
    seed: int,
    offset: int,
    x: Tensor | None = None,
    mask: Tensor | None = None,
    level: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """Writes to ``y`` what the kernel makes of the operands, and returns ``y``."""
    n, rows = y.numel(), 1 if level is None else len(level)
    operands = [y if each is None else each for each in (x, y, mask, level, low, high)]  # what is not read may be anything
    with torch.cuda.device_of(y):  # Triton launches on the current device
        kernels.perturb[(-(-n // (4 * kernels.BLOCK)),)](
            *operands,
            seed,
            offset,
            n,
            n // rows,
            draw=draw,
            formula=formula,
            masked=mask is not None,
            rows=rows > 1,
            wide=n > _NARROW,
            block=kernels.BLOCK,
            tag=kernels.TAG,
            enable_fp_fusion=False,  # with a level for each row or one for all, numbers must round alike
        )
    return y
