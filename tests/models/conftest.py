"""Tests of what a probe finds probe every model anew."""

from collections.abc import Iterator
from unittest import mock

import pytest

from alphaquant.models import mapping
from alphaquant.models.probe import probe_model


@pytest.fixture(scope="module")
def probed_each_time() -> Iterator[None]:
    """The probe as it is, in place of the one that remembers."""
    with mock.patch.object(mapping, "probe_model", probe_model):
        yield
