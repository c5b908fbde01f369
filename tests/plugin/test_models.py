# SPDX-License-Identifier: Apache-2.0
"""Every family has its class, and the class is the stock one with what Eigen adds."""

from __future__ import annotations

import pytest

from vllm_eigen.checkpoint.families import FAMILIES, Family
from vllm_eigen.common.errors import EngineError


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_class_of_each_family(family: Family) -> None:
    from vllm import ModelRegistry

    from vllm_eigen.plugin import models
    from vllm_eigen.plugin.register import register

    register()
    made = ModelRegistry.models[family.eigen_architecture].load_model_cls()
    stock = ModelRegistry.models[family.architecture].load_model_cls()
    assert made.__mro__[1:3] == (models.EigenModel, stock)
    assert (made.__module__, made.__name__) == (models.__name__, family.eigen_architecture)
    assert models.eigen_class(family.eigen_architecture) is made


def test_another_name_is_no_class() -> None:
    from vllm_eigen.plugin import models

    with pytest.raises(EngineError, match="EigenGPT2LMHeadModel"):
        models.eigen_class("EigenGPT2LMHeadModel")
