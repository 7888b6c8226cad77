"""What tests of the training side have in common."""

from multiprocessing import get_context

import pytest

from dpnp_training.data import ImageData


@pytest.fixture
def caches(tmp_path_factory, monkeypatch):
    """Nothing is found in caches, and nothing is left there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def open_data(caches):
    """Opens a source for training."""

    def opened(source, **kwargs) -> ImageData:
        data = ImageData(str(source), **kwargs)
        data.prepare_data()
        data.setup("fit")
        return data

    return opened


@pytest.fixture(scope="session")
def fork_server():
    """Starts processes from one that is not the tests' own and has imported what takes seconds."""
    server = get_context("forkserver")
    server.set_forkserver_preload(["dpnp_training.estimate"])
    return server
