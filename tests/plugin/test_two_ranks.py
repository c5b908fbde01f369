# SPDX-License-Identifier: Apache-2.0
"""Every row of the matrix on two tensor-parallel ranks, against transformers on one."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Rows
from tests.plugin.harness.engine import check
from tests.plugin.harness.rows import CODED_ROWS, FAMILY_ROWS, ROWS, Row, limits
from tests.plugin.harness.two_ranks import TwoRanks
from vllm_eigen.calibration.model.compressed import load_reference

# Of the other families those that are split in a way of their own: a fused projection, modules of
# transformers, experts.
OTHERS = ("phi3-post-rope-coded", "starcoder2-pre-rope-coded", "mixtral-pre-rope-coded")
SPLIT = (*ROWS, *CODED_ROWS, *(row for row in FAMILY_ROWS if str(row) in OTHERS))


@pytest.fixture(scope="module")
def two_ranks(served: Rows, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """What every row gives on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("two-ranks")
    return TwoRanks.run({str(row): served(row) for row in SPLIT}, folder)


@pytest.mark.parametrize("row", SPLIT, ids=str)
@pytest.mark.slow
def test_two_ranks(row: Row, served: Rows, two_ranks: TwoRanks) -> None:
    asked, answers = two_ranks.answers(str(row))
    check(load_reference(served(row).eigen), asked, answers, **limits(row))
