"""Fixtures and settings for all tests: no network, few threads, the directory of real records."""

from __future__ import annotations

import os
from pathlib import Path

# Read by huggingface_hub when it is imported, so before anything that imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2  # of the smallest machine that the suite must pass on; more do not help such sizes


def pytest_configure(config):
    torch.set_num_threads(THREADS)


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test: ``threads(4)``."""
    yield torch.set_num_threads
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny matrices gain nothing from more, and lose much where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real edit records (CounterFact, zsRE, ...), which are not part of the repository."""
    named = os.environ.get("HIEDIT_DATA")
    path = Path(named) if named else ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no edit records in {path}: set HIEDIT_DATA to their directory")
    return path
