"""Memory that is freed and taken again is not fetched from the system again."""

import subprocess
import sys

import pytest

# Four times 64 MB, written and freed: pages that were not there before.
CODE = """
import ctypes, resource, sys
from jaxalign.probe.heap import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_freed_memory_is_kept():
    def faults(word):
        done = subprocess.run([sys.executable, "-c", CODE, word], capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("this C library has no mallopt")
        return int(done.stdout)

    assert faults("keep") < 0.5 * faults("return")
