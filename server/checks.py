"""Checks before the engine starts: what is wrong is said in one line, not after a minute."""

from __future__ import annotations

import json
import socket
import ssl
import sys
from pathlib import Path

from server.estimate import estimate
from server.units import size
from server.weights import read_model
from vllm_eigen.checkpoint import CONFIG_FILE, validate
from vllm_eigen.errors import EigenError, InputError, UsageError


def check_model(model: str) -> None:
    """Refuse a missing folder or a damaged Eigen checkpoint.

    Raises:
        InputError, CheckpointError: what is wrong with the folder.
    """
    folder = Path(model)
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not folder.is_dir():
        if looks_local:
            raise InputError(f"model folder {model} does not exist")
        return
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG_FILE} is no JSON object")
    names = config.get("architectures") or []
    if "eigen" in config or any(str(name).startswith("Eigen") for name in names):
        validate(folder)


def check_pool(
    model: str, pool_bytes: int | None, max_model_len: int | None, kv_cache_dtype: str
) -> None:
    """Refuse a pool of given size that cannot hold one sequence, where the folder tells.

    Raises:
        UsageError: how many tokens it holds, and what would do.
    """
    folder = Path(model)
    if pool_bytes is None or not (folder / CONFIG_FILE).is_file():
        return
    try:
        config, _ = read_model(model)
        found = estimate(config, sys.maxsize, None, kv_cache_dtype, max_model_len)
    except EigenError:  # a model or type this project has no arithmetic for is left to vLLM
        return
    per_token, longest = found.compressed.bytes_per_token, found.max_model_len
    if pool_bytes < longest * per_token:
        raise UsageError(
            f"a pool of {size(pool_bytes)} holds {pool_bytes // per_token} tokens, a sequence has "
            f"up to {longest}; give --kv-cache-memory-bytes {longest * per_token} or more, or a "
            "smaller --max-model-len"
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
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error}; see --host, --port") from error
    family, kind, _, _, address = found[0]
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
    """The prefix under which a proxy offers the server, without its final slash.

    Raises:
        UsageError: the prefix does not begin with a slash.
    """
    if not path:
        return path
    if not path.startswith("/"):
        raise UsageError(f"--root-path {path} must begin with a slash, e.g. /{path}")
    return path.rstrip("/")
