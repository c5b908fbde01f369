# SPDX-License-Identifier: Apache-2.0
"""The reference kernels against the float64 answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.kernels.cases import Case, expected, make, run, tolerance
from tests.kernels.strategies import QUERY_DTYPES, cases
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels import load

SETTINGS = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@SETTINGS
@given(cases(dtypes=(torch.float64, *QUERY_DTYPES)))
def test_agrees_with_float64(case: Case) -> None:
    problem = make(case)
    found = run(load("reference"), problem, free_outside_window=True)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=tolerance(case))


@SETTINGS
@given(cases(dtypes=(torch.float64, *QUERY_DTYPES), coded=True))
def test_coded_caches_agree_with_float64(case: Case) -> None:
    problem = make(case)
    found = run(load("reference"), problem, free_outside_window=True)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=tolerance(case))


def test_unknown_name_is_one_clear_error() -> None:
    with pytest.raises(KernelError, match="unknown kernels 'fast'; choose one of reference, cpu"):
        load("fast")
