# SPDX-License-Identifier: Apache-2.0
"""Every family has its class, and the class is the stock one with what Eigen adds."""

from __future__ import annotations

import pytest

from vllm_eigen.checkpoint.families import FAMILIES, Family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_class_of_each_family(family: Family) -> None:
    from vllm_eigen.plugin import models

    made = getattr(models, family.eigen_architecture)
    assert issubclass(made, models.EigenModel)
    stock = {base.__name__ for base in made.__mro__}
    assert stock & {family.architecture, *family.aliases}
