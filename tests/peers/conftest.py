"""The peers' process, started once for all tests that ask it."""

import pytest

from tests.peers import peer as peers


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    if not peers.PYTHON.exists():
        pytest.fail(peers.MISSING, pytrace=False)
    process = peers.Peer(tmp_path_factory.mktemp("peer"))
    yield process
    process.close()
