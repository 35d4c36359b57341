"""Eight CPU devices before JAX starts: every mesh of the tests fits on any machine."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    # On a busy machine the eight devices' threads meet late: patience instead of an abort.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    count = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{flags} {count} {patience}".strip()
# Many tests compile the same small programs; a cache on disk serves them and every xdist worker.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir(), "jaxalign_test_programs"))
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
