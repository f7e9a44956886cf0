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
from rlroute.kernels.activations import ACTIVATIONS, hidden_rows
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
REGISTERS, WARP_GRAIN, BLOCK_SHARED = 2**16, 256, 1024
"""Registers of a multiprocessor, those by which a warp's share grows, and bytes of shared memory that the system takes
of each block; of all three (the same tables).
"""


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        name: precision, rows per expert from which it is used, and kernel body.
        tile: its sizes and launch parameters.
        registers: per thread.
        spilled: bytes of local memory a thread uses: registers that did not fit.
        shared: bytes of shared memory a block uses.
        instructions: how often each instruction of interest occurs.
    """

    name: str
    tile: Tile
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]

    def blocks(self, capability: int) -> int:
        """Return how many blocks run on a multiprocessor at a time, by registers and shared memory."""
        warps = REGISTERS // (-(-self.registers * 32 // WARP_GRAIN) * WARP_GRAIN)
        room = (SHARED_LIMIT[capability] + BLOCK_SHARED) // (self.shared + BLOCK_SHARED)
        return min(warps // self.tile.num_warps, room)


def sources(entry: Entry, tma: bool) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Yield (body and activation, kernel, types of the run-time arguments, constants) for each launch of the engine."""
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[entry.dtype]
    width, inner = entry.D or D, entry.F or F
    value, index = f"*{dtype}", "*i64"

    def box(*block: int) -> str:
        return f"tensordesc<{dtype}[{', '.join(map(str, block))}]>" if tma else value

    def weights(tile: Tile, transposed: bool, parts: int = 1) -> str:
        return box(1, tile.BK, tile.BN) if transposed else box(parts, tile.BN, tile.BK)

    plan = {"tokens": index, "starts": index, "tile_experts": index, "tile_rows": index}
    for_gates = {"gates": "*fp32", "pairs": index}
    tiles = entry.tiles
    up = {"inputs": value, "hidden": value, "activated": value} | for_gates | plan
    back = {name: value for name in ("doutputs", "hidden", "dhidden", "activated")} | for_gates | plan
    back |= {"weights": weights(tiles.back, True), "dgate_parts": "*fp32", "num_rows": "i32"}
    for activation in ACTIVATIONS:
        constants: dict[str, Any] = {"F": inner, "K": width, "ACTIVATION": activation, "TMA": tma}
        parts = hidden_rows(activation, 1)
        stacked = {"weights": weights(tiles.up, False, parts)}
        yield f"up {activation}", kernels.expert_up, up | stacked, constants | {"SAVE_HIDDEN": True}
        yield f"back {activation}", kernels.expert_down_backward, back, constants
    for body, tile, size, transposed in (("down", tiles.down, inner, False), ("rows", tiles.rows, 2 * inner, True)):
        types = {"inputs": box(tile.BM, tile.BK), "outputs": box(1, 1, tile.BM, tile.BN // 2)}
        types |= {"weights": weights(tile, transposed), "tile_count": index} | plan
        shape = {"N": width, "K": size, "GATHER": False, "TRANSPOSED": transposed, "TMA": tma, "SORTED": tma}
        yield body, kernels.rows_times_weights, types, shape
    sides = {"left": value, "right": value, "outputs": value, "tokens": index, "starts": index, "order": index}
    tile = tiles.weights
    left, right = {"left": box(1, 1, tile.BK, tile.BM)}, {"right": box(1, 1, tile.BK, tile.BN)}
    into = {"M": 2 * inner, "N": width, "GATHER_LEFT": False, "SORTED": tma}
    yield "weights in", kernels.rows_times_rows, sides | left, into
    yield "weights out", kernels.rows_times_rows, sides | right, into | {"M": width, "N": inner, "GATHER_LEFT": True}


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
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage, assembly = _cuobjdump("-res-usage", binary), _cuobjdump("-sass", binary)
    counted = (*TENSOR_CORE, TMA_LOAD, "LDGSTS", "ATOM", "ATOMG", "RED", "REDG")
    instructions = {word: len(re.findall(rf"\b{word}\b", assembly)) for word in counted}
    registers, stack = (int(re.findall(rf"{field}:(\d+)", usage)[-1]) for field in ("REG", "STACK"))
    local = int(re.findall(r"LOCAL:(\d+)", usage)[-1])
    return Compiled(name, tile, registers, stack + local, compiled.metadata.shared, instructions)


def _cuobjdump(option: str, binary: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True, check=True).stdout


def faults(one: Compiled, capability: int) -> list[str]:
    """Return what must not be: spilled registers, too much shared memory, atomics, bfloat16 products beside the tensor
    cores (with tiles of 64 rows, beside those of Hopper's warp groups), nothing by the tensor memory accelerator where
    the chip has one.
    """
    found = one.instructions
    wants_tma = f"sm_{capability}" in HAVE_TMA
    bfloat16 = one.name.startswith("bfloat16")
    groups = capability == 90 and bfloat16 and one.tile.BM >= 64
    checks = {
        f"spills {one.spilled} bytes": one.spilled > 0,
        f"takes {one.shared} bytes of shared memory, the chip has {SHARED_LIMIT[capability]}": one.shared
        > SHARED_LIMIT[capability],
        "uses atomics": any(found[word] for word in ("ATOM", "ATOMG", "RED", "REDG")),
        "misses the tensor cores": bfloat16 and not any(found[word] for word in TENSOR_CORE),
        "misses the products of warp groups": groups and not found["HGMMA"],
        "misses the tensor memory accelerator": wants_tma and not found[TMA_LOAD],
    }
    return [f"{one.name} {fault}" for fault, there in checks.items() if there]


def main(capability: int) -> int:
    """Print the table of all pinned kernels on a chip, then their faults; return how many there are."""
    print(f"sm_{capability}, triton {triton.__version__}")
    print(f"{'kernel':32} {'registers':>9} {'spilled':>8} {'shared':>8} {'blocks':>7}  instructions")
    kernels = list(compile_pinned(capability))
    for one in kernels:
        counts = ", ".join(f"{word} {count}" for word, count in one.instructions.items() if count)
        print(f"{one.name:32} {one.registers:9} {one.spilled:8} {one.shared:8} {one.blocks(capability):7}  {counts}")
    wrong = [fault for one in kernels for fault in faults(one, capability)]
    print("\n".join(wrong) or f"{len(kernels)} kernels, no fault")
    return len(wrong)


if __name__ == "__main__":
    import sys

    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 90) > 0)
