# SPDX-License-Identifier: Apache-2.0
"""What the Hugging Face hub refuses is one line that says what to do; no network is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_eigen import cli
from vllm_eigen.common.errors import InputError
from vllm_eigen.common.hub import is_hub_id
from vllm_eigen.server.launch.model_files import check_hub

errors = pytest.importorskip("huggingface_hub.errors")
REPOSITORY = "owner/model"


def answered(kind: str, status: int) -> Exception:
    """An error as `huggingface_hub` raises it for an answer of the hub."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error: Exception = getattr(errors, kind)("first line\nsecond", response=response)
    return error


def offline() -> Exception:
    error = errors.LocalEntryNotFoundError("not in the cache")
    error.__cause__ = errors.OfflineModeIsEnabled("offline")
    return error


CASES: dict[str, tuple[Callable[[], Exception], tuple[str, ...], str]] = {
    "gated": (
        lambda: answered("GatedRepoError", 403),
        ("gated", f"huggingface.co/{REPOSITORY}", "hf auth login"),
        "0",
    ),
    "absent": (
        lambda: answered("RepositoryNotFoundError", 404),
        ("does not exist, or is private", "hf auth login"),
        "0",
    ),
    "revision": (lambda: answered("RevisionNotFoundError", 404), ("no revision v9",), "0"),
    "forbidden": (lambda: answered("HfHubHTTPError", 403), ("refuses this account",), "0"),
    "offline": (offline, ("HF_HUB_OFFLINE is set", "pass a folder"), "1"),
    "down": (lambda: ConnectionError("no route"), ("cannot be reached (no route)",), "0"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["calibrate", "estimate"])
def test_a_model_of_the_hub(
    command: str,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    make, wanted, is_offline = CASES[case]
    asked: list[str | None] = []

    def refuse(repository: str, *_: Any, revision: str | None = None, **__: Any) -> str:
        assert repository == REPOSITORY
        asked.append(revision)
        raise make()

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", is_offline)
    arguments = [command, REPOSITORY, "--revision", "v9", "--kv-ratio", "0.5"]
    if command == "calibrate":
        arguments += ["--output", str(tmp_path / "out"), "--dry-run"]
    else:
        arguments += ["--memory", "1GiB"]
    assert cli.main(arguments) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert all(part in line for part in (REPOSITORY, *wanted))
    assert asked == ["v9"]


@pytest.mark.parametrize("case", CASES)
def test_a_served_model(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`serve` asks before vLLM does, and leaves to it what a repository has instead of a file."""
    make, wanted, is_offline = CASES[case]
    failure = make()

    def refuse(*_: Any, revision: str | None, token: str | None) -> str:
        assert (revision, token) == ("v9", "secret")
        raise failure

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", is_offline)
    with pytest.raises(InputError) as found:
        check_hub(REPOSITORY, "v9", "secret")
    assert all(part in str(found.value) for part in (REPOSITORY, *wanted))
    failure = answered("RemoteEntryNotFoundError", 404)
    check_hub(REPOSITORY, "v9", "secret")
    check_hub(str(tmp_path), None, None)


@pytest.mark.parametrize("command", ["calibrate", "estimate"])
def test_a_folder_has_no_revision(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [command, str(tmp_path), "--revision", "main", "--kv-ratio", "0.5"]
    more = ["--memory", "1GiB"] if command == "estimate" else ["--output", str(tmp_path / "out")]
    assert cli.main([*arguments, *more]) == 2
    assert "--revision main is of a hub model" in capsys.readouterr().err


def test_names() -> None:
    assert all(map(is_hub_id, ("gpt2", "owner/model-1.5_b")))
    assert not any(map(is_hub_id, ("./model", "/model", "a/b/c", "../a", "a b", "")))
