import pytest

from tests.watch.launched import ForkedLauncher


@pytest.fixture(scope="session")
def launcher():
    """One process that forks ranks on request."""
    with ForkedLauncher() as launcher:
        yield launcher
