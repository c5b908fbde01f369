"""Every row of the matrix on two tensor-parallel ranks, against transformers on one."""

from __future__ import annotations

import pytest

from calibration.unfold import load_reference
from tests.engine.conftest import Rows
from tests.engine.harness import check
from tests.engine.rows import ROWS, Row
from tests.engine.two_ranks import TwoRanks


@pytest.fixture(scope="module")
def two_ranks(served: Rows, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """What every row gives on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("two-ranks")
    return TwoRanks.run({str(row): served(row) for row in ROWS}, folder)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_two_ranks(row: Row, served: Rows, two_ranks: TwoRanks) -> None:
    asked, answers = two_ranks.answers(str(row))
    check(load_reference(served(row).eigen), asked, answers)
