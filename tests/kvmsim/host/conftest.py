import pytest


class NoAccounting:
    """A machine that charges nobody."""


@pytest.fixture
def accounting():
    return NoAccounting()
