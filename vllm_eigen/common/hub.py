# SPDX-License-Identifier: Apache-2.0
"""What to say when the Hugging Face hub does not give, or does not take, a repository.

`huggingface_hub` is imported where it is used, so this module may be imported without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from vllm_eigen.common.errors import InputError, first_line

LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a hub repository."""
    return _NAME.fullmatch(name) is not None and not name.startswith(".")


def hub_error(error: BaseException, repository: str, revision: str | None = None) -> InputError:
    """One line on why a repository cannot be had, and what to do.

    Args:
        error: what a call of `huggingface_hub` raised.
        repository: its id.
        revision: that was asked for, if one was.
    """
    from huggingface_hub import errors

    causes = list(_chain(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    statuses = {getattr(getattr(cause, "response", None), "status_code", None) for cause in causes}
    where = f"{repository!r} of the Hugging Face hub"
    if caused_by(errors.GatedRepoError):
        return InputError(
            f"{where} is gated; accept its terms at https://huggingface.co/{repository}, then "
            f"{LOGIN}"
        )
    if caused_by(errors.RevisionNotFoundError):
        return InputError(
            f"{where} has no revision {revision or 'main'}; see its branches and tags"
        )
    if caused_by(errors.RepositoryNotFoundError):
        return InputError(f"{where} does not exist, or is private; check the name, or {LOGIN}")
    if caused_by(errors.HFValidationError):
        return InputError(f"{repository!r} is no name of a hub repository; give OWNER/NAME")
    if statuses & {401, 403}:
        return InputError(f"{where} refuses this account; {LOGIN} with a token that may do this")
    if is_offline() and caused_by(
        errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HfHubHTTPError
    ):
        return InputError(
            f"{where} is not in this machine's cache, and HF_HUB_OFFLINE is set; unset it, or pass "
            "a folder"
        )
    return InputError(
        f"{where} cannot be reached ({first_line(causes[-1])}); try again, or pass a folder"
    )


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` asks for no network, as `huggingface_hub` reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__
