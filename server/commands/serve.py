# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen serve MODEL [vLLM flags]`: vLLM's OpenAI server with our plugin and routes.

Apart from `--eigen-bases`, `--open-routes` and `--max-body-size` every flag is vLLM's own. The
command adds the plugins, the worker extension, a few defaults, and early checks whose errors are
one line instead of a traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from vllm_eigen.common.errors import EigenError, EngineError, UsageError
from vllm_eigen.common.packages import check_torchvision
from vllm_eigen.common.sizes import parse_size
from vllm_eigen.plugin.vllm_version import check_vllm_version, own_module
from vllm_eigen.server.launch.bases import apply_bases
from vllm_eigen.server.launch.checks import (
    check_model,
    check_pool,
    check_port,
    check_tls,
    root_path,
)
from vllm_eigen.server.launch.environment import check_server_environment
from vllm_eigen.server.launch.flags import check_flags
from vllm_eigen.server.launch.model_files import check_hub

logger = logging.getLogger("vllm.eigen")

HELP = "serve a model with vLLM's OpenAI server and KV-cache statistics"
RAW_ARGUMENTS = True

USAGE = """\
usage: vllm-eigen serve MODEL [vLLM flags]

Serve a model, compressed or not, on vLLM's OpenAI-compatible server, with
KV-cache statistics at /v1/kv_cache, gauges vllm_eigen:* at /metrics and a live
page at /dashboard.

MODEL is a folder made by `vllm-eigen calibrate`, any other model folder, or a
hub id. Every flag of vLLM's server applies; those most in use, and our own:

  --eigen-bases DIR            bases to apply over MODEL as it is
                               (`calibrate --bases-only`)
  --host, --port               where to listen (all addresses, 8000)
  --served-model-name NAME     name in the API (folder's name, or hub id)
  --max-model-len N            longest sequence in tokens (the model's own)
  --kv-cache-memory-bytes SIZE KV-cache pool, e.g. 4GiB; 4G is the same
  --gpu-memory-utilization F   share of the GPU to fill
  --kv-cache-dtype TYPE        element type of the cache, e.g. fp8
  --api-key KEY                ask for this key on all routes but /health and
                               /ready; VLLM_API_KEY keeps it out of `ps`
  --open-routes PATH ...       routes that need no key (/metrics)
  --max-body-size SIZE         largest request body (64MiB)
  --ssl-certfile FILE, --ssl-keyfile FILE
                               serve https
  --root-path PREFIX           path under which a proxy serves it
  --api-server-count N         processes that answer HTTP
  --shutdown-timeout S         seconds running requests may take after SIGTERM
                               (20)

  --help=all                   all flags
  --help=GROUP                 those of a group, e.g. Frontend, ModelConfig
"""

PLUGINS = ("eigen", "eigen_kv_cache")
SIZE_FLAG = "--kv-cache-memory-bytes"
WORKER_EXTENSION = "vllm_eigen.plugin.kv_layout.KVLayoutWorker"
DRAIN_SECONDS = 20
"""With the time to close connections below the 30 seconds that Kubernetes gives a pod by default.
vLLM's own default, 0, aborts running requests at SIGTERM."""
_FILTERED_GROUPS = (
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
        EngineError, UsageError, InputError, CheckpointError: before the engine starts, or when
            it does not.
    """
    arguments: list[str] = args.arguments
    if not arguments:
        raise UsageError("name a model: vllm-eigen serve MODEL [vLLM flags]; see --help")
    if arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    check_flags(arguments, check_vllm_version())
    check_sizes(arguments)
    check_torchvision()
    check_server_environment(compiles=_compiles(arguments))
    os.environ["VLLM_PLUGINS"] = ",".join(plugin_names(os.environ.get("VLLM_PLUGINS")))
    if not arguments[0].startswith("-"):
        check_model(arguments[0])

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_arg_parser = own_module().make_arg_parser
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm-eigen serve", description=HELP))
    add_own_arguments(parser)
    parsed = parser.parse_args(arguments)
    if parsed.model_tag is None and not _names_model(arguments):
        raise UsageError("name a model: vllm-eigen serve MODEL [vLLM flags]; see --help")
    prepare(parsed)
    command = ServeSubcommand()
    _validate(command, parsed)
    _serve(command, parsed)
    return 0


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Extend vLLM's parser by our flags, our meaning of sizes, and errors of one line."""
    group = parser.add_argument_group("Eigen", "flags of vllm-eigen")
    group.add_argument("--eigen-bases", metavar="DIR", help="bases to apply over the model")
    group.add_argument(
        "--open-routes",
        nargs="*",
        type=_route,
        metavar="PATH",
        help="routes that need no API key, with all below them, beside /health and /ready "
        "(default: /metrics); without a PATH none",
    )
    group.add_argument(
        "--max-body-size", type=parse_size, metavar="SIZE", help="largest request body (64MiB)"
    )
    for action in parser._actions:
        if SIZE_FLAG in action.option_strings:
            action.type = parse_size
    parser.set_defaults(shutdown_timeout=DRAIN_SECONDS)
    parser.error = _refuse  # type: ignore[method-assign]  # vLLM's usage has 300 lines


def check_sizes(arguments: list[str]) -> None:
    """Refuse a malformed size before vLLM is imported.

    Raises:
        UsageError: the size, and how to write one.
    """
    for name, value in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, given, attached = name.replace("_", "-").partition("=")
        if flag in (SIZE_FLAG, "--max-body-size"):
            try:
                parse_size(attached if given else value)
            except UsageError as error:
                raise UsageError(f"{flag}: {error}") from error


def prepare(parsed: argparse.Namespace) -> None:
    """Check vLLM's parsed flags and fill in our defaults.

    Raises:
        UsageError, InputError, CheckpointError: what would make the engine fail later.
    """
    model = parsed.model_tag or parsed.model
    check_model(model, parsed.kv_cache_dtype)
    check_hub(model, parsed.revision, parsed.hf_token)
    apply_bases(parsed, model)
    one_device = parsed.tensor_parallel_size == parsed.pipeline_parallel_size == 1
    if one_device and parsed.dtype == "auto" and (parsed.max_model_len or 1) > 0:
        check_pool(model, parsed.kv_cache_memory_bytes, parsed.max_model_len, parsed.kv_cache_dtype)
    if not (parsed.uds or parsed.headless):
        check_port(parsed.host, parsed.port)
    check_tls(parsed.ssl_certfile, parsed.ssl_keyfile)
    parsed.root_path = root_path(parsed.root_path)
    if parsed.worker_extension_cls:
        raise UsageError("--worker-extension-cls is taken by vllm-eigen serve; drop the flag")
    parsed.worker_extension_cls = WORKER_EXTENSION
    if not parsed.served_model_name and Path(model).is_dir():
        parsed.served_model_name = [Path(model).resolve().name]


def plugin_names(named: str | None) -> list[str]:
    """The value of VLLM_PLUGINS that adds ours and keeps what would load without it.

    The variable filters every plugin group at once, so when it is unset all installed plugins
    are named; endpoint plugins load only if named and stay as the user chose.
    """
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        names = [entry.name for group in _FILTERED_GROUPS for entry in entry_points(group=group)]
    return list(dict.fromkeys([*names, *PLUGINS]))


def _route(path: str) -> str:
    if not path.startswith("/"):
        raise UsageError(f"--open-routes {path} must begin with a slash, e.g. /{path}")
    return path


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"{message}; see --help")


def _compiles(arguments: list[str]) -> bool:
    """Whether torch.compile is in use, as far as the command line tells."""
    eager = {"--enforce-eager", "--enforce_eager"} & set(arguments)
    return not eager and os.environ.get("TORCHDYNAMO_DISABLE") != "1"


def _names_model(arguments: list[str]) -> bool:
    """Whether `--model` or a `--config` file names the model."""
    return any(argument.split("=")[0] in ("--model", "--config") for argument in arguments)


def _validate(command: Any, parsed: argparse.Namespace) -> None:
    try:
        command.validate(parsed)
    except (TypeError, ValueError) as error:
        raise UsageError(_first_line(error)) from error


def _serve(command: Any, parsed: argparse.Namespace) -> None:
    """Run vLLM's server; an exception becomes one line after the engine's own log.

    Raises:
        EngineError: the server did not start, or lost its engine.
    """
    try:
        command.cmd(parsed)
    except EigenError:
        raise
    except Exception as error:
        logger.debug("the server ended", exc_info=True)
        raise EngineError(f"vLLM ended: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The message of an exception on one line; pydantic's has the reason on its third."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "validation error" in lines[0]:
        lines = [line for line in lines[1:] if "Value error" in line] or lines
    text = lines[0] if lines else type(error).__name__
    return text.removeprefix("Value error, ").split(" [type=")[0]
