# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen push` and `calibrate --push` against a hub in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.calibration.export.test_scales import calibrated
from tests.calibration.test_calibrate import SMALL

Command = Callable[..., tuple[int, str, str]]
hub = pytest.importorskip("huggingface_hub")
REPOSITORY = "owner/model-eigen"


class Hub:
    """Repositories, the licences of base models, and whether an account is known."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.licences: dict[str, dict[str, str]] = {}
        self.account = True

    def whoami(self) -> dict[str, str]:
        if not self.account:
            raise hub.errors.LocalTokenNotFoundError("no token")
        return {"name": "owner"}

    def model_info(self, repository: str, revision: str | None = None) -> Any:
        fields = self.licences[repository]
        return SimpleNamespace(card_data=hub.ModelCardData(**fields) if fields else None)

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.files.setdefault(repository, {})
        self.private[repository] = private
        return f"https://hub/{repository}"

    def upload_file(
        self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, commit_message: str
    ) -> None:
        self.files[repo_id][path_in_repo] = path_or_fileobj

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], commit_message: str
    ) -> None:
        for path in folder_path.iterdir():
            if path.name not in ignore_patterns:
                self.files[repo_id][path.name] = path.read_bytes()

    def card(self, repository: str = REPOSITORY) -> Any:
        return hub.ModelCard(self.files[repository]["README.md"].decode())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: found)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return found


@pytest.fixture
def checkpoint(make_model: Callable[..., Path], text_file: Path, command: Command) -> Path:
    return calibrated("llama", ("--kv-ratio", 0.5, *SMALL), make_model, text_file, command)


def test_push(checkpoint: Path, fake: Hub, command: Command) -> None:
    status, out, error = command("push", checkpoint, REPOSITORY, "--license", "mit", "--private")
    assert (status, out.strip()) == (0, f"https://hub/{REPOSITORY}"), error
    stored = fake.files[REPOSITORY]
    assert set(stored) == {path.name for path in checkpoint.iterdir()}
    assert stored["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert fake.private[REPOSITORY]
    data = fake.card().data
    fields = data.to_dict()
    assert (fields["license"], fields["library_name"], fields["pipeline_tag"]) == (
        "mit",
        "vllm",
        "text-generation",
    )
    values = {item.metric_name: item.metric_value for item in data.eval_results}
    assert values["perplexity"] > 1
    assert 0 <= values["top-1 agreement with the base model"] <= 1
    text = fake.card().text
    assert f"vllm-eigen serve {REPOSITORY}" in text
    assert "serve DIR" not in text
    # A licence that the card has need not be given.
    (checkpoint / "README.md").write_bytes(stored["README.md"])
    assert command("push", checkpoint, "owner/other")[0] == 0
    assert fake.card("owner/other").data.license == "mit"


def test_refused_before_anything_is_written(checkpoint: Path, fake: Hub, command: Command) -> None:
    status, _, error = command("push", checkpoint, REPOSITORY)
    assert (status, "give --license" in error) == (2, True), error
    status, _, error = command("push", checkpoint, "no-owner", "--license", "mit")
    assert (status, "OWNER/NAME" in error) == (2, True), error
    fake.account = False
    status, _, error = command("push", checkpoint, REPOSITORY, "--license", "mit")
    assert (status, "hf auth login" in error) == (2, True), error
    status, _, error = command("push", checkpoint.parent, REPOSITORY, "--license", "mit")
    assert (status, "no Eigen checkpoint" in error) == (1, True), error
    assert not fake.files


def test_calibrate_and_push(
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    fake: Hub,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A base model of the hub brings its licence and its commit."""
    commit = "0123456789abcdef"
    model = make_model(name=commit)
    asked: list[str | None] = []

    def download(*_: Any, revision: str | None, **__: Any) -> str:
        asked.append(revision)
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    fake.licences["owner/base"] = {}
    arguments: tuple[Any, ...] = ("owner/base", "--text", text_file, "--kv-ratio", 0.5, *SMALL)
    arguments += ("--push", REPOSITORY, "--output", tmp_path / "out")
    status, _, error = command("calibrate", *arguments)
    assert (status, "licence of owner/base is not known" in error) == (2, True), error
    assert not (tmp_path / "out").exists()
    fake.licences["owner/base"] = {
        "license": "other",
        "license_name": "its-own",
        "license_link": "https://hub/owner/base",
    }
    status, out, error = command("calibrate", *arguments)
    assert (status, out.strip()) == (0, f"https://hub/{REPOSITORY}"), error
    data = fake.card().data
    assert (data.license, data.license_name, data.base_model) == ("other", "its-own", "owner/base")
    config = fake.files[REPOSITORY]["config.json"].decode()
    assert f'"commit": "{commit}"' in config
    assert "--push" not in config
    # On another machine the evaluation reads the same commit.
    monkeypatch.setenv("EIGEN_CACHE", str(tmp_path / "cache"))
    assert set(asked) == {None}
    status, _, error = command("evaluate", tmp_path / "out", "--text", text_file, "--json")
    assert (status, asked[-1]) == (0, commit), error
