"""HYDRA's names are here or refused by name."""

import pytest

from hc_compile import layers
from hc_compile.compat import hydra


def test_every_name_is_the_one_implementation():
    assert hydra.RotaryEmbedding is layers.RotaryEmbedding
    assert all(hasattr(hydra, name) for name in hydra.__all__)
    assert not hasattr(hydra, "no_such_name")


@pytest.mark.parametrize("name", hydra.REFUSED)
def test_its_own_model_is_refused_by_name(name):
    with pytest.raises(ImportError, match=f"{name} is not part of hc_compile: that model"):
        exec(f"from hc_compile.compat.hydra import {name}")
