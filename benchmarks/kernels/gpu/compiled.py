# SPDX-License-Identifier: Apache-2.0
"""What Triton's compiler makes of the kernels for a GPU that is not there.

`compiling` runs launches with the compiler in place of the launcher. Registers, shared memory,
spills and instructions are read from the compiled code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
"""What one program may use, by compute capability."""
_NAMES = {
    "cache_write_kernel": "write",
    "down_project_and_write_kernel": "write",
    "coded_write_kernel": "write",
    "combine_splits_kernel": "combine",
}


@dataclass(frozen=True)
class CompiledKernel:
    """One launch. Counts are of instructions in the code, not executed ones.

    name: write, decode, prefill or combine. hash: of the compiled code's source and options.
    registers: of a thread. stack_bytes: local memory of a thread, where registers are spilled to.
    copies: asynchronous copies to shared memory, of any size; wide_copies: of 16 bytes;
        middling_copies: of more than a number and less than 16.
    loop_instructions: of a warp, in the longest loop; 0 where there is none or none is counted.
    block_m, block_n: queries times heads, and keys, of a step; 0 where there are none.
    """

    name: str
    hash: str
    threads: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    copies: int
    wide_copies: int
    middling_copies: int
    loop_instructions: int
    block_m: int
    block_n: int


@contextmanager
def compiling(capability: int, *, loops: bool = True) -> Iterator[list[CompiledKernel]]:
    """What is launched in this context is compiled for `capability` (90 is 9.0) and listed.

    Tensors may be anywhere; nothing reads them. Not where kernels are interpreted. loops: count
    the instructions of loops, for which a kernel is disassembled; that takes seconds.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from vllm_eigen.kernels.gpu import kernels

    class Device:
        """As much of a driver as compiling asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return -capability

        def get_current_stream(self, device: int) -> int:
            return 0

    found: list[CompiledKernel] = []
    launch = JITFunction.run

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del warmup
        made = launch(self, *args, grid=grid, warmup=True, **options)
        found.append(_read(self.__name__, made, options, loops))

    with (
        mock.patch.object(driver, "_active", Device()),
        mock.patch.object(JITFunction, "run", compile_kernel),
        # No device is asked for, and tiles are those of the device compiled for.
        mock.patch.object(kernels, "_INTERPRETED", True),
        mock.patch.object(kernels, "HOPPER_SHARED_BYTES", SHARED_BYTES[capability]),
    ):
        yield found


def _read(name: str, made: Any, options: dict[str, Any], loops: bool) -> CompiledKernel:
    """The numbers of a compiled kernel."""
    if "is_decode" in options:
        name = "decode" if options["is_decode"] else "prefill"
    ptx: str = made.asm["ptx"]
    registers, stack_bytes = resource_usage(made.asm["cubin"])
    sizes = re.findall(r"cp\.async\.c[ga]\.\S+ .*?, (0x[0-9a-f]+)", ptx)
    copies = [int(size, 16) for size in sizes]
    return CompiledKernel(
        name=_NAMES.get(name, name),
        hash=made.hash,
        threads=32 * made.metadata.num_warps,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=made.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync.aligned"),
        copies=len(copies),
        wide_copies=copies.count(16),
        middling_copies=copies.count(8),
        loop_instructions=longest_loop(_cuobjdump(made.asm["cubin"], "-sass")) if loops else 0,
        block_m=options.get("BLOCK_M", 0),
        block_n=options.get("BLOCK_N", 0),
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, of a thread."""
    usage = _cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) .*STACK:(\d+) .*LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of a kernel: {usage}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def longest_loop(listing: str) -> int:
    """Instructions between a branch and what it goes back to, most of all in the listing."""
    places = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", listing, re.MULTILINE)
    order = {int(place, 16): number for number, (place, _) in enumerate(places)}
    longest = 0
    for place, text in places:
        branch = re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < int(place, 16):
            longest = max(longest, 1 + order[int(place, 16)] - order[int(branch[1], 16)])
    return longest


def _cuobjdump(cubin: bytes, option: str) -> str:
    """What Triton's copy of the tool says of compiled code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
