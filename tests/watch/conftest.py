import pytest

from tests.watch.launched import forked_launcher


@pytest.fixture(scope="session")
def launcher():
    """One process that forks ranks on request."""
    with forked_launcher() as server:
        yield server
