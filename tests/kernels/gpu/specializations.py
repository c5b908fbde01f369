# SPDX-License-Identifier: Apache-2.0
"""What Triton would compile, asked of Triton itself on a GPU that is not there.

Its launcher binds every argument and decides for what a kernel is specialised; only the compiler
and the launch stand still.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CAPABILITY = 90


class Nothing:
    """Stands for a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        """Of a launch that is not made."""

    def run(self, *_: Any) -> None:
        """Launches nothing."""


@contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """(kernel, what it is specialised for) of everything that is compiled in this context."""
    pytest.importorskip("triton.backends.nvidia.compiler")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from vllm_eigen.kernels.gpu import kernels

    class Device:
        """As much of a driver as launching asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", CAPABILITY, 32)

        def get_current_device(self) -> int:
            return -1

        def get_current_stream(self, device: int) -> int:
            return 0

    compiled: list[tuple[str, str]] = []
    touched: list[Any] = []

    def compile_nothing(self: Any, key: str, _: Any, device: int, *__: Any) -> Nothing:
        compiled.append((self.__name__, key))
        touched.append(self)
        self.device_caches[device][0][key] = Nothing()
        return Nothing()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", compile_nothing)
        patch.setattr(kernels, "_INTERPRETED", True)  # No device is asked for.
        patch.setattr(driver, "_active", Device())
        try:
            yield compiled
        finally:
            for kernel in touched:
                kernel.device_caches.pop(-1, None)
