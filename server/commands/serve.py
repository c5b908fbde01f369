"""`vllm-eigen serve MODEL [vLLM flags]`: vLLM's OpenAI server with our plugin and routes.

Every flag is vLLM's own; the command adds the plugins, the worker extension, and early checks
whose failures are one line instead of an engine's traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_eigen.checkpoint import CONFIG_FILE, validate
from vllm_eigen.errors import InputError, UsageError
from vllm_eigen.vllm_version import check_vllm_version

HELP = "serve a model with vLLM's OpenAI server and KV-cache figures"
RAW_ARGUMENTS = True

PLUGINS = ("eigen", "eigen_kv_cache")
WORKER_EXTENSION = "vllm_eigen.worker.KVLayoutWorker"
_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only for the list of commands; vLLM parses the real command line."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.epilog = "all flags of vLLM's server apply, e.g. --port, --kv-cache-memory-bytes"


def run(args: argparse.Namespace) -> int:
    """Serve until stopped; returns the exit status.

    Raises:
        EngineError, UsageError, InputError, CheckpointError: before the engine starts.
    """
    arguments: list[str] = args.arguments
    if not arguments:
        raise UsageError("name a model: vllm-eigen serve MODEL [vLLM flags]; --help=all lists them")
    check_vllm_version()
    os.environ["VLLM_PLUGINS"] = ",".join(plugin_names(os.environ.get("VLLM_PLUGINS")))

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(
        prog="vllm-eigen serve", description="vLLM's OpenAI-compatible server, with Eigen Attention"
    )
    parsed = make_arg_parser(parser).parse_args(arguments)
    model = parsed.model_tag or parsed.model
    check_model(model)
    check_port(parsed.host, parsed.port)
    if parsed.worker_extension_cls:
        raise UsageError("--worker-extension-cls is taken by vllm-eigen serve; drop the flag")
    parsed.worker_extension_cls = WORKER_EXTENSION
    command = ServeSubcommand()
    _validate(command, parsed)
    command.cmd(parsed)
    return 0


def plugin_names(named: str | None) -> list[str]:
    """The value of VLLM_PLUGINS that adds ours and keeps what would load without it.

    The variable filters every plugin group at once, so when it is unset all installed plugins
    are named; endpoint plugins load only if named and stay as the user chose.
    """
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        names = [entry.name for group in _GROUPS for entry in entry_points(group=group)]
    return list(dict.fromkeys([*names, *PLUGINS]))


def check_model(model: str) -> None:
    """Refuse a missing folder or a damaged Eigen checkpoint before the engine starts.

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
    names = config.get("architectures") or []
    if "eigen" in config or any(str(name).startswith("Eigen") for name in names):
        validate(folder)


def check_port(host: str | None, port: int) -> None:
    """Refuse a port that is taken.

    Raises:
        UsageError: another process listens there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "0.0.0.0", port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on port {port}: {error.strerror}; choose another with --port"
            ) from error


def _validate(command: Any, parsed: argparse.Namespace) -> None:
    try:
        command.validate(parsed)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error).splitlines()[0]) from error
