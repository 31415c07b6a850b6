"""Fixtures and settings for all tests: no network, few threads, the directory of real records."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Read by huggingface_hub when it is imported, so before anything that imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same for Ray: a token and a directory of the suite's own, short enough for Ray's sockets, so
# that no other cluster of this machine is met.
RAYS = Path(tempfile.mkdtemp(prefix="hiedit-"))
atexit.register(shutil.rmtree, RAYS, ignore_errors=True)
(RAYS / "token").write_text(secrets.token_hex(32))
os.environ |= {
    "HIEDIT_HEAD": str(RAYS / "head"),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": str(RAYS / "token"),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
os.environ.pop("RAY_ADDRESS", None)

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# Of the smallest machine that the suite must pass on (more do not help such sizes), shared by the
# processes that pytest-xdist starts.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


def pytest_configure(config):
    torch.set_num_threads(THREADS)


# Each starts several processes at a time (the first four on one Ray cluster): one after the other,
# or they would wait for one another's cores until they time out.
CROWDS = ("test_distributed", "test_groups", "test_jobs", "test_scaling", "test_sharded")


def pytest_collection_modifyitems(items):
    """The crowds first, so that no process of the suite ends with them alone."""
    items.sort(key=lambda i: CROWDS.index(i.path.stem) if i.path.stem in CROWDS else len(CROWDS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under pytest-xdist (`-n 2`) the tests of one file stay in one process, for the sake of its
    fixtures, and so do all crowds."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "crowds" if Path(file).stem in CROWDS else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


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


@pytest.fixture(scope="session", autouse=True)
def calibrations(tmp_path_factory):
    """A directory of the suite's own for calibrations: none stays, and none that is here is met."""
    import hiedit.calibration.profile as profile

    with pytest.MonkeyPatch.context() as patched:
        directory = tmp_path_factory.mktemp("cache")
        patched.setattr(profile, "cache_dir", lambda: directory)
        yield directory


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


@pytest.fixture(scope="session")
def cluster():
    """One Ray cluster for the whole suite, started as a user starts one; its address."""
    ray = pytest.importorskip("ray", reason="distributed training needs ray")
    from rays import free_ports

    gcs, dashboard, agent, client = free_ports(4)
    place = {"RAY": str(Path(sys.executable).with_name("ray")), "PYTHONPATH": str(ROOT)}
    script = [str(ROOT / "launch" / "submit.sh")]
    options = [
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}",
        "--metrics-export-port=0",
        f"--temp-dir={RAYS / 'ray'}",
        f"--object-store-memory={200 << 20}",
    ]
    environment = os.environ | place
    subprocess.run([*script, "start", "5", *options], env=environment, check=True)
    try:
        ray.init(f"127.0.0.1:{gcs}", logging_level="ERROR")
        yield f"127.0.0.1:{gcs}"
    finally:
        ray.shutdown()
        subprocess.run([*script, "stop"], env=environment, check=True)
