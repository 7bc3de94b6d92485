"""Compiles the kernel for GPUs that need not exist; prints, for each variant, what a thread of it does for an element."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from lightning_noise.noise import kernels

DRAWS = [("normal", "draw"), ("uniform", "draw"), ("bits", "draw")]
FORMULAS = [("normal", "add"), ("uniform", "add"), ("normal", "scale"), ("bits", "drop"), ("bits", "replace")]
THREADS = 128
DISASSEMBLER = Path(str(triton.__file__)).parent / "backends/nvidia/bin/nvdisasm"


def compiled(draw: str, formula: str, dtype: str, is_full: bool, capability: int) -> dict[str, int]:
    number = "*i32" if draw == "bits" else "*fp32"
    value = number if formula == "draw" else f"*{dtype}"
    constants = {
        "draw": draw,
        "formula": formula,
        "masked": is_full,
        "rows": is_full,
        "wide": is_full,
        "block": kernels.BLOCK,
        "tag": kernels.TAG,
    }
    signature = {
        **dict(x=value, y=value, mask="*u8", level=number, low="*fp32", high="*fp32"),
        **dict(seed="i64", offset="i32", n="i64" if is_full else "i32", row="i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    names = kernels.perturb.arg_names  # pyright: ignore[reportFunctionMemberAccess]
    places = {name: (i,) for i, name in enumerate(names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in ("x", "y", "mask", "level", "low", "high", "n")}
    source = ASTSource(kernels.perturb, signature, {places[name]: value for name, value in constants.items()}, aligned)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    Path("kernel.cubin").write_bytes(found.asm["cubin"])
    listing = subprocess.run([DISASSEMBLER, "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    operations = re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9]+)(\S*)", listing)
    return {
        "operations": len(operations) * THREADS // (4 * kernels.BLOCK),
        "spills": sum(name in ("LDL", "STL") for name, _ in operations),
        "vector loads": sum(name == "LDG" and (".64" in rest or ".128" in rest) for name, rest in operations),
    }


if __name__ == "__main__":
    variants = [(*each, "fp32", False) for each in DRAWS + FORMULAS]
    variants += [(*each, dtype, True) for each, dtype in product(FORMULAS, ("fp32", "fp16", "bf16"))]
    for capability, variant in product(map(int, sys.argv[1:]), variants):
        print(json.dumps({"variant": [capability, *variant], **compiled(*variant, capability)}))
