"""A run's settings for the tiny model, on one device, and adapters of it."""

import pytest

from jaxalign.config import load
from tests.evaluate.conftest import adapters  # noqa: F401  (a fixture)
from tests.tiny import base  # noqa: F401  (a fixture)


@pytest.fixture
def config(base, one_device):  # noqa: F811
    """Of the base in float32."""
    return load(None, [f"model.path={base}", "model.dtype=float32", "mesh.fsdp=1"]).config
