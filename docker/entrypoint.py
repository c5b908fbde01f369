# SPDX-License-Identifier: Apache-2.0
"""Entry point of the images: calibrate on the first start, then become the server.

Everything is said in the environment, see `.env.example`; arguments are flags for
`vllm-eigen serve`. With `--calibrate-only` alone it ends before the server, as an init container
does. A calibration goes to a folder named by all that shapes it, so a later start with the same
settings finds it finished and one with others makes its own; several containers on one volume wait
for the first.

Keys may come as files, as Compose mounts secrets: `docker inspect` shows variables.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from vllm_eigen.common.errors import EigenError, InputError, OutputError, UsageError
from vllm_eigen.common.sizes import parse_size

COMMAND = (sys.executable, "-m", "vllm_eigen.cli")
CALIBRATE_ONLY = "--calibrate-only"
AS_IT_IS = "none"
SECRETS = {"VLLM_API_KEY": "api_key", "HF_TOKEN": "hf_token"}
"""Variables that are read from files of these names below `$EIGEN_SECRETS`."""
PRELOADED = ("/usr/lib/*-linux-gnu/libtcmalloc_minimal.so.4", f"{sys.prefix}/lib/libiomp5.so")
"""The allocator and the OpenMP runtime with which vLLM's CPU build is fastest, where they are."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        model: folder or hub id of the base model, or of a finished checkpoint.
        kv_ratio: KV bytes to keep, as written; None serves the model as it is.
        texts: calibration text files; none for the default data set.
        calibrate_flags, serve_flags: further flags of the two commands.
        pool_bytes: bytes of the KV-cache pool; None leaves it to vLLM.
        checkpoints: folder that checkpoints are made in.
        checkpoint: one exact checkpoint folder instead, taken as it is if it exists.
    """

    model: str
    kv_ratio: str | None
    texts: tuple[Path, ...]
    calibrate_flags: tuple[str, ...]
    serve_flags: tuple[str, ...]
    pool_bytes: int | None
    host: str
    port: str
    checkpoints: Path
    checkpoint: Path | None


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from environment variables; an empty one counts as unset.

    Raises:
        UsageError: one is missing or malformed.
    """

    def value(name: str, default: str = "") -> str:
        return environment.get(name, "").strip() or default

    def words(name: str) -> tuple[str, ...]:
        try:
            return tuple(shlex.split(value(name)))
        except ValueError as error:
            raise UsageError(f"{name} cannot be split into words: {error}") from error

    if not value("EIGEN_MODEL"):
        raise UsageError("set EIGEN_MODEL to a model folder or a Hugging Face hub id")
    ratio = value("EIGEN_KV_RATIO", "0.27")
    if ratio != AS_IT_IS and not re.fullmatch(r"0?\.\d+|1(\.0*)?", ratio):
        raise UsageError(f"EIGEN_KV_RATIO={ratio} is no share; give e.g. 0.27, or {AS_IT_IS}")
    named = value("EIGEN_CHECKPOINT")
    return Settings(
        model=value("EIGEN_MODEL"),
        kv_ratio=None if ratio == AS_IT_IS else ratio,
        texts=tuple(Path(name) for name in words("EIGEN_TEXT")),
        calibrate_flags=words("EIGEN_CALIBRATE_FLAGS"),
        serve_flags=words("EIGEN_SERVE_FLAGS"),
        pool_bytes=parse_size(value("EIGEN_POOL")) if value("EIGEN_POOL") else None,
        host=value("EIGEN_HOST", "0.0.0.0"),
        port=value("EIGEN_PORT", "8000"),
        checkpoints=Path(value("EIGEN_CHECKPOINTS", "/checkpoints")),
        checkpoint=Path(named) if named else None,
    )


def target(settings: Settings) -> Path:
    """Folder of the checkpoint: its name carries a digest of everything that shapes it.

    Raises:
        InputError: a text or the model's configuration cannot be read.
    """
    if settings.checkpoint is not None:
        return settings.checkpoint
    shapes: list[object] = [settings.model, settings.kv_ratio, settings.calibrate_flags]
    shapes += [_content(path) for path in settings.texts]
    folder = Path(settings.model)
    if folder.is_dir():
        files = sorted((path.name, path.stat().st_size) for path in folder.iterdir())
        shapes += [files, _content(folder / "config.json")]
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:10]
    name = re.sub(r"[^\w.-]+", "-", settings.model.strip("/").split("/")[-1])
    return settings.checkpoints / f"{name}-kv{settings.kv_ratio}-{digest}"


def prepare(settings: Settings) -> str:
    """Calibrate unless that is done already; returns what to serve.

    Raises:
        EigenError: an input or the volume is of no use.
        SystemExit: the calibration failed, with its status; it has said why.
    """
    if settings.kv_ratio is None or _is_compressed(settings.model):
        return settings.model
    output = target(settings)
    # A finished checkpoint appears in one step, so a folder that exists is whole.
    if not output.is_dir():
        with _lock(output):
            if not output.is_dir():
                _calibrate(settings, settings.kv_ratio, output)
    _say(f"checkpoint {output}")
    return str(output)


def serve_command(settings: Settings, model: str, arguments: Sequence[str]) -> list[str]:
    """The command line of the server.

    Clients know the model by its base's name. Metrics carry the first name: with one of its own the
    compressed model stays apart from a server of its base.
    """
    folder = Path(settings.model)
    name = folder.resolve().name if folder.is_dir() else settings.model
    names = [name] if model == settings.model else [f"{name}-eigen", name]
    command = [*COMMAND, "serve", model, "--served-model-name", *names]
    command += ["--host", settings.host, "--port", settings.port]
    if settings.pool_bytes is not None:
        command += ["--kv-cache-memory-bytes", str(settings.pool_bytes)]
    return [*command, *settings.serve_flags, *arguments]


def read_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of `SECRETS` that are unset and have a file with something in it.

    Raises:
        InputError: a file cannot be read.
    """
    folder = Path(environment.get("EIGEN_SECRETS") or "/run/secrets")
    found = {}
    for variable, name in SECRETS.items():
        path = folder / name
        if not environment.get(variable) and path.exists():  # may be /dev/null
            try:
                found[variable] = path.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return {variable: value for variable, value in found.items() if value}


def preloads(environment: Mapping[str, str], patterns: Sequence[str] = PRELOADED) -> str:
    """Value of LD_PRELOAD for the server: what the environment says, else the libraries found."""
    found = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    return environment.get("LD_PRELOAD") or ":".join(found)


def main(arguments: Sequence[str]) -> int:
    """Prepare and become the server; returns only with `--calibrate-only` or an error."""
    try:
        os.environ.update(read_secrets(os.environ))
        settings = read_settings(os.environ)
        model = prepare(settings)
    except EigenError as error:
        _say(str(error))
        return error.exit_code
    if list(arguments) == [CALIBRATE_ONLY]:
        return 0
    command = serve_command(settings, model, arguments)
    _say(f"serving {model}")
    if libraries := preloads(os.environ):
        os.environ["LD_PRELOAD"] = libraries
    os.execv(command[0], command)


def _calibrate(settings: Settings, kv_ratio: str, output: Path) -> None:
    """Run the calibration as a child that gets our SIGTERM, and can be taken up if it ends so."""
    command = [*COMMAND, "calibrate", settings.model, "--output", str(output), "--resume"]
    command += ["--kv-ratio", kv_ratio]
    if settings.texts:
        command += ["--text", *map(str, settings.texts)]
    _say(f"calibrating {settings.model} at KV ratio {kv_ratio}, once")
    # What it would need to go on after an interruption lies on the volume, too.
    environment = {**os.environ, "EIGEN_CACHE": str(output.parent / ".unfinished")}
    child = subprocess.Popen([*command, *settings.calibrate_flags], env=environment)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        status = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def _is_compressed(model: str) -> bool:
    """Whether the model is a folder that holds an Eigen checkpoint."""
    try:
        config = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "eigen" in config


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; is it mounted?") from error


@contextlib.contextmanager
def _lock(output: Path) -> Iterator[None]:
    """Let one container at a time calibrate into `output`; the others wait."""
    path = output.parent / f".{output.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path).acquire()
    except OSError as error:
        raise OutputError(
            f"cannot write {path.parent}: {error.strerror}; mount a volume this user may write"
        ) from error
    with held:
        yield


def _say(message: str) -> None:
    print(f"vllm-eigen: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
