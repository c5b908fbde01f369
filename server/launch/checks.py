# SPDX-License-Identifier: Apache-2.0
"""Checks before the engine starts: errors are one line at once, not a traceback after a minute."""

from __future__ import annotations

import socket
import ssl
import sys
from pathlib import Path

from vllm_eigen.checkpoint.config import CONFIG_FILE, check_cache_dtype
from vllm_eigen.checkpoint.estimate import estimate
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import EigenError, UsageError
from vllm_eigen.common.sizes import format_bytes
from vllm_eigen.server.launch.model_files import is_local, read_config


def check_model(model: str, kv_cache_dtype: str = "auto") -> None:
    """Refuse a missing folder, a damaged Eigen checkpoint, or a cache type that does not fit it.

    Raises:
        InputError, CheckpointError, UsageError: what is wrong with the folder or the type.
    """
    if not is_local(model):
        return
    config = read_config(model)
    names = config.get("architectures") or []
    if "eigen" in config or any(str(name).startswith("Eigen") for name in names):
        check_cache_dtype(validate(Path(model)), kv_cache_dtype)


def check_pool(
    model: str, pool_bytes: int | None, max_model_len: int | None, kv_cache_dtype: str
) -> None:
    """Refuse a pool of given size that cannot hold one sequence; only for a local model.

    Raises:
        UsageError: how many tokens it holds, and how many bytes it needs.
    """
    folder = Path(model)
    if pool_bytes is None or not (folder / CONFIG_FILE).is_file():
        return
    try:
        expected = estimate(
            read_config(model),
            sys.maxsize,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
        )
    except EigenError:  # a model or type that `estimate` does not know is left to vLLM
        return
    if expected.kept_layers:  # what a window holds depends on the scheduler, which vLLM knows
        return
    per_token, longest = expected.compressed.bytes_per_token, expected.max_model_len
    if pool_bytes < longest * per_token:
        raise UsageError(
            f"a pool of {format_bytes(pool_bytes)} holds {pool_bytes // per_token} tokens, a "
            f"sequence has up to {longest}; give --kv-cache-memory-bytes {longest * per_token} "
            "or more, or a smaller --max-model-len"
        )


def check_port(host: str | None, port: int) -> None:
    """Refuse an address that cannot be listened on.

    vLLM shares its port between API processes, so a second server would silently join the first.

    Raises:
        UsageError: another process listens there, or the address is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port} is out of range; give 1 to 65535")
    try:
        addresses = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error}; see --host, --port") from error
    family, kind, _, _, address = addresses[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UsageError(
                f"cannot listen on port {port}: {error.strerror}; choose another with --port"
            ) from error


def check_tls(certificate: str | None, key: str | None) -> None:
    """Refuse a certificate and key that cannot be loaded, or one without the other.

    Raises:
        UsageError: which of the two is wrong.
    """
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise UsageError("TLS needs both --ssl-certfile and --ssl-keyfile")
    for name, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        if not Path(path).is_file():
            raise UsageError(f"{name} {path} does not exist")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--ssl-certfile {certificate} and --ssl-keyfile {key} do not work together: {error}"
        ) from error


def root_path(path: str | None) -> str | None:
    """The path under which a proxy serves us, without its final slash.

    Raises:
        UsageError: the prefix does not begin with a slash.
    """
    if not path:
        return path
    if not path.startswith("/"):
        raise UsageError(f"--root-path {path} must begin with a slash, e.g. /{path}")
    return path.rstrip("/")
