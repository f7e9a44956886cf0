"""Ahead-of-time compilation of the pinned kernels, with no GPU at hand: what a chip would be given, and what it would
cost there.

It proves that the kernels compile, fit the chip's shared memory, use its tensor cores and spill no register; not that
they are fast.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
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
HEAD = """# What the pinned kernels cost

Made by `make aot`, with triton {version}. Registers are per thread, spilled and shared are bytes; blocks of a
multiprocessor are by registers and shared memory. *all*: with biases, gates at the input and dropout."""
COLUMNS = "| kernel | registers | spilled | shared | blocks a multiprocessor | instructions |"
ALL_OF_IT = " all"
"""In a kernel's name: with biases, gates at the input and dropout."""
OPTIONAL = ("bias", "gates", "kept")
"""Arguments that are None where they are not there."""
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


def sources(entry: Entry, tma: bool) -> Iterator[tuple[str, Tile, Any, dict[str, str], dict[str, Any]]]:
    """Yield (body, activation and whether the expert has all that it may have besides; tile; kernel; types of the
    run-time arguments; constants) for each launch of the engine.
    """
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[entry.dtype]
    width, inner = entry.D or D, entry.F or F
    value, index = f"*{dtype}", "*i64"

    def box(*block: int) -> str:
        return f"tensordesc<{dtype}[{', '.join(map(str, block))}]>" if tma else value

    def weights(tile: Tile, transposed: bool, parts: int = 1) -> str:
        return box(1, tile.BK, tile.BN) if transposed else box(parts, tile.BN, tile.BK)

    plan = {"tokens": index, "pairs": index, "starts": index, "tile_experts": index, "tile_rows": index}
    tiles = entry.tiles
    up = {name: value for name in ("inputs", "hidden", "activated")} | plan | {"gates": "*fp32", "scale": "fp32"}
    back = {name: value for name in ("doutputs", "hidden", "dhidden", "activated")} | plan
    back |= {"weights": weights(tiles.back, True), "dgate_parts": "*fp32", "num_rows": "i32"}
    back |= {"gates": "*fp32", "scale": "fp32"}
    besides = {"bias": value, "kept": "*u8"}
    for activation, all_of_it in product(ACTIVATIONS, (False, True)):
        parts, name = hidden_rows(activation, 1), f"{activation}{ALL_OF_IT if all_of_it else ''}"
        constants: dict[str, Any] = {"F": inner, "K": width, "ACTIVATION": activation, "PARTS": parts, "TMA": tma}
        constants["GATE_AT_INPUT"] = all_of_it
        more = besides if all_of_it else {}
        stacked = {"weights": weights(tiles.up, False, parts)}
        yield f"up {name}", tiles.up, kernels.expert_up, up | stacked | more, constants | {"SAVE_HIDDEN": True}
        tile = tiles.back.fitting(activation, not all_of_it)
        yield f"back {name}", tile, kernels.expert_down_backward, back | more, constants
    biased = {"bias": value, "gates": "*fp32"}
    for body, tile, size, transposed, more in (
        ("down", tiles.down, inner, False, {}),
        ("down" + ALL_OF_IT, tiles.down, inner, False, biased),
        ("rows", tiles.rows, 2 * inner, True, {}),
    ):
        types = {"inputs": box(tile.BM, tile.BK), "outputs": box(1, 1, tile.BM, tile.BN // 2)} | more
        types |= {"weights": weights(tile, transposed), "tile_count": index} | plan
        shape = {"N": width, "K": size, "GATHER": False, "TRANSPOSED": transposed, "TMA": tma, "SORTED": tma}
        yield body, tile, kernels.rows_times_weights, types, shape
    sides = {"left": value, "right": value, "outputs": value, "tokens": index, "starts": index, "order": index}
    tile = tiles.weights
    left, right = {"left": box(1, 1, tile.BK, tile.BM)}, {"right": box(1, 1, tile.BK, tile.BN)}
    into = {"M": 2 * inner, "N": width, "GATHER_LEFT": False, "SORTED": tma}
    yield "weights in", tile, kernels.rows_times_rows, sides | left, into
    out_of = into | {"M": width, "N": inner, "GATHER_LEFT": True}
    yield "weights out", tile, kernels.rows_times_rows, sides | right, out_of


def compile_pinned(capability: int) -> Iterator[Compiled]:
    """Compile every pinned configuration for a compute capability: 80 (A100), 90 (H100), 100 (B200)."""
    chip = f"sm_{capability}"
    for entry in pinned():
        if entry.chip == chip:
            for body, tile, kernel, types, constants in sources(entry, chip in HAVE_TMA):
                widths = f" D={entry.D} F={entry.F}" if entry.D else ""
                name = f"{entry.dtype} from {entry.rows_from}{widths} {body}"
                yield _compile(name, kernel, types, constants, tile, capability)


def _compile(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], tile: Tile, capability: int
) -> Compiled:
    constants = constants | {"UPCAST": False, "BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    constants |= {name: None for name in OPTIONAL if name in kernel.arg_names and name not in types}
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


def row(one: Compiled, capability: int) -> str:
    """Return a kernel's row of the table."""
    counts = ", ".join(f"{word} {count}" for word, count in one.instructions.items() if count)
    numbers = (one.registers, one.spilled, one.shared, one.blocks(capability))
    return f"| {one.name} | {' | '.join(map(str, numbers))} | {counts} |"


def main(*capabilities: int) -> int:
    """Print the table of all pinned kernels on some chips, as Markdown; return how many faults they have."""
    print(HEAD.format(version=triton.__version__))
    wrong = []
    for capability in capabilities:
        print(f"\n## sm_{capability}\n\n{COLUMNS}\n|---|---:|---:|---:|---:|---|")
        for one in compile_pinned(capability):
            print(row(one, capability), flush=True)
            wrong += [f"sm_{capability}: {fault}" for fault in faults(one, capability)]
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main(80, 90, 100) > 0)
