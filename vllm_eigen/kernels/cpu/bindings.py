# SPDX-License-Identifier: Apache-2.0
"""The compiled library: loading it, agreeing with it on constants, and its error codes.

`kernels.py` calls it through ctypes with the structures of `abi.py`.
"""

from __future__ import annotations

import ctypes

from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.cpu import abi, build

_PROBLEMS = {
    1: "unknown cache type",
    2: "a sequence is longer than the table of rotary cosines",
    3: "a block or slot lies outside the cache",
    4: "a sequence is longer than its row of the block table",
    5: "query_start_loc points outside the query",
    6: "the plan was made for layers of another geometry",
    7: "out of memory",
}


class Library:
    """The C++ kernels for one instruction-set level."""

    def __init__(self, isa: str, extra_flags: tuple[str, ...] = ()) -> None:
        """Compile the library if need be, and load it.

        Raises:
            KernelError: it cannot be built or loaded here, or is not the one Python expects.
        """
        # This also asks for what the level needs of the operating system.
        if isa not in (supported := build.supported_isas()):
            raise KernelError(f"{isa} does not run here; choose one of {', '.join(supported)}")
        path = build.compiled(isa, extra_flags)
        build.share_openmp()
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"cannot load {path.name}: {error}; delete it to rebuild") from error
        self._functions.vllm_eigen_describe.restype = ctypes.POINTER(abi.Constant)
        self._functions.vllm_eigen_free_plan.argtypes = (ctypes.c_void_p,)
        self._functions.vllm_eigen_free_plan.restype = None
        self._functions.vllm_eigen_attend.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        described = self.describe()
        for name, value in abi.SHARED.items():
            if described.get(name) != value:
                raise KernelError(
                    f"{path.name} has {name} = {described.get(name)}, Python has {value};"
                    f" delete it to rebuild"
                )
        self.reconstructs_bf16 = bool(described["reconstructs bfloat16"])
        """Whether keys for bfloat16 queries are made in bfloat16, otherwise in float32."""
        self.has_integer_keys = bool(described["integer keys"])
        """Whether keys for bfloat16 queries are reconstructed from codes in integers."""
        self.has_keys_in_bytes = bool(described["integer keys in bytes"])
        """Whether those are bytes even where they meet 8-bit codes."""
        self.tile_units = described["units of a tile"]
        """Units of a row of a matrix unit's operand; 1 without matrix units."""

    def describe(self) -> dict[str, int]:
        """Constants and structure sizes that the library was compiled with."""
        constants: dict[str, int] = {}
        for constant in self._functions.vllm_eigen_describe():
            if constant.name is None:
                break
            constants[constant.name.decode()] = constant.value
        return constants

    def write_cache(self, args: abi.WriteArgs) -> None:
        """Raises KernelError for a slot outside of the cache."""
        _raise_if(self._functions.vllm_eigen_write_cache(ctypes.byref(args)))

    def attend(self, args: abi.AttendArgs, plan: PlanHandle) -> None:
        """Raises KernelError where plan and layer do not go together."""
        _raise_if(self._functions.vllm_eigen_attend(ctypes.byref(args), plan.address))

    def plan(self, args: abi.StepArgs) -> PlanHandle:
        """Raises KernelError for block numbers or lengths that cannot be right."""
        address = ctypes.c_void_p()
        _raise_if(self._functions.vllm_eigen_plan(ctypes.byref(args), ctypes.byref(address)))
        return PlanHandle(self, address)

    def free_plan(self, address: ctypes.c_void_p) -> None:
        """Give back what `plan` made; `PlanHandle` does so."""
        self._functions.vllm_eigen_free_plan(address)


class PlanHandle:
    """Owns a plan in C++ memory, freed with this object."""

    def __init__(self, library: Library, address: ctypes.c_void_p) -> None:
        self.address = address
        self._bindings = library

    def __del__(self) -> None:
        self._bindings.free_plan(self.address)


def _raise_if(code: int) -> None:
    if code:
        raise KernelError(_PROBLEMS.get(code, f"the CPU kernels failed with code {code}"))
