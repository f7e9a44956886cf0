"""Ahead-of-time compilation of the pinned kernels, with no GPU at hand: what a chip would be given, and what it would
cost there.

It proves that the kernels compile, fit the chip's shared memory, use its tensor cores and spill no register; not that
they are fast.
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
from rlroute.kernels.activations import ACTIVATIONS
from rlroute.kernels.sparse import HAVE_TMA
from rlroute.kernels.tiles import Entry, Tile, pinned

TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
"""The instructions that multiply matrices in 16 bits: of a warp (all chips), of a warp group (90), of a thread block
(100).
"""
TMA_LOAD = "UTMALDG"
"""The tensor memory accelerator's load."""
D, F = 2048, 768
"""The model and expert widths that lines of the table without their own are compiled for."""


SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may use, by compute capability (CUDA C++ Programming Guide, technical
specifications).
"""


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        name: precision, rows per expert from which it is used, and kernel body.
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


def sources(entry: Entry, tma: bool) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Yield (body and activation, kernel, types of the run-time arguments, constants) for each launch of the engine."""
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[entry.dtype]
    width, inner = entry.D or D, entry.F or F
    value, index = f"*{dtype}", "*i64"

    def weights(tile: Tile, transposed: bool) -> str:
        block = (tile.BK, tile.BN) if transposed else (tile.BN, tile.BK)
        return f"tensordesc<{dtype}[{block[0]}, {block[1]}]>" if tma else value

    plan = {"tokens": index, "starts": index, "tile_experts": index, "tile_rows": index}
    for_gates = {"gates": "*fp32", "pairs": index}
    tiles = entry.tiles
    up = {"inputs": value, "weights": weights(tiles.up, False), "hidden": value, "activated": value}
    back = {name: value for name in ("doutputs", "hidden", "dhidden", "activated")}
    back |= {"weights": weights(tiles.back, True), "dgate_parts": "*fp32", "num_rows": "i32"}
    for activation in ACTIVATIONS:
        constants: dict[str, Any] = {"F": inner, "K": width, "ACTIVATION": activation, "TMA": tma}
        yield f"up {activation}", kernels.expert_up, up | for_gates | plan, constants | {"SAVE_HIDDEN": True}
        yield f"back {activation}", kernels.expert_down_backward, back | for_gates | plan, constants
    down = {"inputs": value, "weights": weights(tiles.down, False), "outputs": value}
    shape: dict[str, Any] = {"N": width, "K": inner, "GATHER": False, "TRANSPOSED": False, "TMA": tma}
    yield "down", kernels.rows_times_weights, down | plan, shape
    rows = down | {"weights": weights(tiles.rows, True)}
    yield "rows", kernels.rows_times_weights, rows | plan, shape | {"K": 2 * inner, "TRANSPOSED": True}
    sides = {"left": value, "right": value, "outputs": value, "tokens": index, "starts": index, "order": index}
    yield "weights", kernels.rows_times_rows, sides, {"M": 2 * inner, "N": width, "GATHER_LEFT": False}


def compile_pinned(capability: int) -> Iterator[Compiled]:
    """Compile every pinned configuration for a compute capability: 80 (A100), 90 (H100), 100 (B200)."""
    chip = f"sm_{capability}"
    for entry in pinned():
        if entry.chip == chip:
            for body, kernel, types, constants in sources(entry, chip in HAVE_TMA):
                widths = f" D={entry.D} F={entry.F}" if entry.D else ""
                name = f"{entry.dtype} from {entry.rows_from}{widths} {body}"
                yield _compile(name, kernel, types, constants, getattr(entry.tiles, body.partition(" ")[0]), capability)


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
    counted = (*TENSOR_CORE, TMA_LOAD, "LDGSTS", "ATOM", "ATOMG", "RED", "REDG")
    instructions = {word: len(re.findall(rf"\b{word}\b", assembly)) for word in counted}
    registers, stack = (int(re.findall(rf"{field}:(\d+)", usage)[-1]) for field in ("REG", "STACK"))
    local = int(re.findall(r"LOCAL:(\d+)", usage)[-1])
    return Compiled(name, registers, stack + local, compiled.metadata.shared, instructions)


def _cuobjdump(option: str, binary: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True, check=True).stdout


def faults(one: Compiled, capability: int) -> list[str]:
    """Return what must not be: spilled registers, too much shared memory, atomics, bfloat16 products beside the tensor
    cores, weights beside the tensor memory accelerator where the chip has one."""
    found = one.instructions
    wants_tma = f"sm_{capability}" in HAVE_TMA and not one.name.endswith("weights")
    checks = {
        f"spills {one.spilled} bytes": one.spilled > 0,
        f"takes {one.shared} bytes of shared memory, the chip has {SHARED_LIMIT[capability]}": one.shared
        > SHARED_LIMIT[capability],
        "uses atomics": any(found[word] for word in ("ATOM", "ATOMG", "RED", "REDG")),
        "misses the tensor cores": one.name.startswith("bfloat16") and not any(found[word] for word in TENSOR_CORE),
        "misses the tensor memory accelerator": wants_tma and not found[TMA_LOAD],
    }
    return [f"{one.name} {fault}" for fault, there in checks.items() if there]


def main(capability: int) -> int:
    """Print the table of all pinned kernels on a chip, then their faults; return how many there are."""
    print(f"sm_{capability}, triton {triton.__version__}")
    print(f"{'kernel':32} {'registers':>9} {'spilled':>8} {'shared':>8}  instructions")
    kernels = list(compile_pinned(capability))
    for one in kernels:
        counts = ", ".join(f"{word} {count}" for word, count in one.instructions.items() if count)
        print(f"{one.name:32} {one.registers:9} {one.spilled:8} {one.shared:8}  {counts}")
    wrong = [fault for one in kernels for fault in faults(one, capability)]
    print("\n".join(wrong) or f"{len(kernels)} kernels, no fault")
    return len(wrong)


if __name__ == "__main__":
    import sys

    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 90) > 0)
