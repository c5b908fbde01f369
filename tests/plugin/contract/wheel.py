# SPDX-License-Identifier: Apache-2.0
"""The Python files of a vLLM release, without its compiled ones: about 12 MB of a large wheel.

pip says which wheel it would take and downloads nothing; ranges of that file are then read over
HTTP, as pip's own lazy wheels do. What was fetched stays in the user's cache.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from vllm_eigen.calibration.cache import cache_folder
from vllm_eigen.common.errors import InputError, first_line

CHUNK_BYTES = 1 << 20
MAX_BYTES = 200 << 20
"""Read of one wheel at most; vLLM 0.33 takes 20 MiB."""
PIP_SECONDS = 120
READ_SECONDS = 60
PLATFORMS = ("manylinux_2_35", "manylinux_2_31", "manylinux_2_28", "manylinux2014", "manylinux1")


def python_files(version: str) -> Path:
    """A folder with `vllm/**/*.py` of a release and its metadata, fetched where it is not there.

    Processes that ask at once wait for the first of them.

    Raises:
        InputError: there is no such release, or it cannot be fetched.
        OutputError: the cache cannot be written.
    """
    if not re.fullmatch(r"\d+\.\d+[\w.+]*", version):
        raise InputError(f"{version!r} is no version of vLLM; name one such as 0.33.0")
    folder = cache_folder() / "vllm-python" / version
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{version}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _fetch(version, folder)
    return folder


def _fetch(version: str, folder: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f"{version}.", dir=folder.parent))
    try:
        with zipfile.ZipFile(io.BufferedReader(RangeFile(_wheel_url(version)))) as wheel:
            members = [member for member in wheel.infolist() if _is_wanted(member.filename)]
            for member in sorted(members, key=lambda member: member.header_offset):
                wheel.extract(member, scratch)
        os.rename(scratch, folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"the wheel of vLLM {version} cannot be read: {first_line(error)}; try again, or with "
            "an index that serves ranges of files"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_wanted(name: str) -> bool:
    is_metadata = name.endswith((".dist-info/METADATA", ".dist-info/entry_points.txt"))
    return is_metadata or (name.startswith("vllm/") and name.endswith(".py"))


def newest_version() -> str:
    """The newest release.

    Raises:
        InputError: the package index cannot be read.
    """
    return str(_ask_pip("vllm")["metadata"]["version"])


def _wheel_url(version: str) -> str:
    """Where pip would take the release from."""
    return str(_ask_pip(f"vllm=={version}")["download_info"]["url"])


def _ask_pip(wanted: str) -> Any:
    """What pip would install for a requirement, without that it does."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12"]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command += ["--target", scratch, "--report", str(report), wanted]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=PIP_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(f"pip did not find {wanted} in {PIP_SECONDS} s") from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise InputError(f"{wanted} cannot be fetched from the package index ({reason})")
        [found] = json.loads(report.read_text(encoding="utf-8"))["install"]
    return found


class RangeFile(io.RawIOBase):
    """A remote file that is read in chunks, when and where it is read.

    Raises:
        InputError: it cannot be read, gives no ranges, or more than MAX_BYTES are read.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._left = MAX_BYTES
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self._size = 1
        self._size = self._request(0, 1)[1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        index, begin = divmod(self._position, CHUNK_BYTES)
        if self._position >= self._size:
            return 0
        if index not in self._chunks:
            self._chunks[index] = self._request(index * CHUNK_BYTES, CHUNK_BYTES)[0]
            if len(self._chunks) > 4:
                self._chunks.popitem(last=False)
        found = self._chunks[index][begin : begin + len(buffer)]
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def _request(self, begin: int, length: int) -> tuple[bytes, int]:
        """Bytes from `begin` on, and the size of the file."""
        self._left -= length
        if self._left < 0:
            raise InputError(
                f"more than {MAX_BYTES} bytes of the wheel would be read; not a wheel?"
            )
        end = min(begin + length, self._size) - 1
        request = urllib.request.Request(self._url, headers={"Range": f"bytes={begin}-{end}"})
        try:
            with urllib.request.urlopen(request, timeout=READ_SECONDS) as answer:
                found = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers["Content-Range"] or "")
                if answer.status != 206 or found is None:
                    raise InputError("the package index serves no ranges of files; use another")
                return answer.read(), int(found[1])
        except urllib.error.URLError as error:
            raise InputError(f"the wheel cannot be read: {first_line(error)}; try again") from error
