"""Eight CPU devices before JAX starts: every mesh of the tests fits on any machine."""

import os
import tempfile
from pathlib import Path

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
