"""Eight CPU devices before JAX starts: every mesh of the tests fits on any machine."""

import gc
import os
import socket
import tempfile
from pathlib import Path

import pytest

from tests.programs import OPTIMISED, QUICK, flags

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # The eight devices' threads meet late on a busy machine: patience instead of an abort.
    "--xla_cpu_collective_call_terminate_timeout_seconds=3600",
    # Else devices may reach two independent collectives of one program in different orders, and
    # each waits for the others for ever.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    *flags(OPTIMISED if os.environ.get("JAXALIGN_OPTIMISED") else QUICK),
)
# Tracing makes millions of small objects that live on; looking at them took a tenth of the time.
gc.set_threshold(200_000, 50, 100)
MAPS = 25_000  # more are not taken to the next module
# XLA takes the last of two: what is asked for outside wins.
os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", ""))).strip()
# Many tests compile the same small programs; a cache on disk serves them and every xdist worker.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir(), "jaxalign_test_programs"))
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Compiled programs of modules that are over go, before there are too many.

    Each program takes some memory maps. Linux allows a process 65,530 of them (vm.max_map_count),
    and XLA aborts Python when it gets no more.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def one_device(monkeypatch):
    """Bases are opened on the first of the eight devices."""
    open_on_one_device(monkeypatch)


def open_on_one_device(monkeypatch):
    """What `one_device` does, for a fixture of a wider scope."""
    import jax

    from jaxalign import base
    from jaxalign.sharding import make_mesh

    monkeypatch.setattr(
        base, "make_mesh", lambda *axes: make_mesh(*axes, devices=jax.devices()[:1])
    )


@pytest.fixture(scope="session")
def bucket():
    """The emulator's files; gcsfs, TensorStore and Google's client all ask it."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    names = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # TensorStore's; the emulator looks at none
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks a service that is not emulated
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    gcsfs = pytest.importorskip("gcsfs")
    yield gcsfs.GCSFileSystem(use_listings_cache=False)
    server.stop()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
