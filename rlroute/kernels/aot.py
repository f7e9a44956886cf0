"""Ahead-of-time compilation of the pinned kernels, with no GPU at hand: what a chip would be given, and what it would cost there.

It proves that the kernels compile, fit the chip's shared memory, use its tensor cores and spill no register; not that they are fast.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlroute.kernels import triton_kernels as kernels
from rlroute.kernels.tiles import TABLE, Tile

TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
"""The instructions that multiply matrices in 16 bits: of a warp (all chips), of a warp group (90), of a thread block (100)."""
D, F = 2048, 768
"""The model and expert widths that the kernels are compiled for."""


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        name: table key and kernel body.
        registers: per thread.
        spilled: bytes of local memory a thread uses: registers that did not fit.
        shared: bytes of shared memory a block uses.
        instructions: how often each instruction of interest occurs.
    """

    name: str
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]


def sources(dtype: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Yield (body, kernel, types of the run-time arguments, constants) for each launch of the engine."""
    value, index = f"*{dtype}", "*i64"
    plan = {"tokens": index, "starts": index, "tile_experts": index, "tile_rows": index}
    rows = {"inputs": value, "weights": value, "outputs": value, **plan}
    shapes = {
        "down": {"N": D, "K": F, "GATHER": False, "TRANSPOSED": False},
        "rows": {"N": D, "K": 2 * F, "GATHER": False, "TRANSPOSED": True},
    }
    up = {
        "inputs": value,
        "weights": value,
        "gates": "*fp32",
        "hidden": value,
        "activated": value,
        "pairs": index,
        **plan,
    }
    yield "up", kernels.swiglu_up, up, {"F": F, "K": D, "SAVE_HIDDEN": True}
    for body, constants in shapes.items():
        yield body, kernels.rows_times_weights, rows, constants
    back = {
        "doutputs": value, "weights": value, "gates": "*fp32", "hidden": value, "dhidden": value, "activated": value,
        "dgate_parts": "*fp32", "pairs": index, "num_rows": "i32", **plan,
    }  # fmt: skip
    yield "back", kernels.swiglu_down_backward, back, {"F": F, "K": D}
    sides = {"left": value, "right": value, "outputs": value, "tokens": index, "starts": index}
    yield "weights", kernels.rows_times_rows, sides, {"M": 2 * F, "N": D, "GATHER_LEFT": False}


def compile_pinned(capability: int) -> Iterator[Compiled]:
    """Compile every pinned configuration for a compute capability (90 for an H100)."""
    for key, tiles in TABLE.items():
        if key == "interpreter":
            continue
        dtype = "fp32" if key == "float32" else "bf16"
        for body, kernel, types, constants in sources(dtype):
            tile: Tile = getattr(tiles, body)
            yield _compile(f"{key} {body}", kernel, types, constants, tile, capability)


def _compile(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], tile: Tile, capability: int
) -> Compiled:
    constants = constants | {"UPCAST": False, "BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
    aligned = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg, t in types.items() if t[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage, assembly = _cuobjdump("-res-usage", binary), _cuobjdump("-sass", binary)
    counted = (*TENSOR_CORE, "UTMALDG", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG")
    instructions = {word: len(re.findall(rf"\b{word}\b", assembly)) for word in counted}
    registers, stack = (int(re.findall(rf"{field}:(\d+)", usage)[-1]) for field in ("REG", "STACK"))
    local = int(re.findall(r"LOCAL:(\d+)", usage)[-1])
    return Compiled(name, registers, stack + local, compiled.metadata.shared, instructions)


def _cuobjdump(option: str, binary: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True, check=True).stdout


def report(capability: int) -> str:
    """Return the table of all pinned kernels on a chip."""
    lines = [f"{'kernel':28} {'registers':>9} {'spilled':>8} {'shared':>8}  instructions"]
    for one in compile_pinned(capability):
        found = ", ".join(f"{word} {count}" for word, count in one.instructions.items() if count)
        lines.append(f"{one.name:28} {one.registers:9} {one.spilled:8} {one.shared:8}  {found}")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    print(report(int(sys.argv[1]) if len(sys.argv) > 1 else 90))
