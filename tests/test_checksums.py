"""A folder whose bytes have changed is refused; the list is one that sha256sum reads."""

import shutil
import subprocess

import pytest

from jaxalign.checksums import SUMS, check_sums, read_sums, write_sums
from jaxalign.errors import UserError


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "part" / "b.txt").write_text("ä", "utf-8")
    write_sums(tmp_path)
    return tmp_path


def test_an_untouched_folder_passes(sealed):
    check_sums(sealed)
    assert set(read_sums(sealed)) == {"a.bin", "part/b.txt"}


def test_one_flipped_bit_is_found(sealed):
    data = bytearray((sealed / "a.bin").read_bytes())
    data[100] ^= 1
    (sealed / "a.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.bin: the content is not what was written"):
        check_sums(sealed)
    check_sums(sealed, ["part/b.txt"])  # only what is about to be read is compared


def test_a_missing_file_and_a_damaged_list_are_named(sealed):
    (sealed / "a.bin").unlink()
    with pytest.raises(UserError, match=r"a\.bin is missing"):
        check_sums(sealed)
    (sealed / SUMS).write_bytes(b"\xff\xfe junk")
    with pytest.raises(UserError, match="SHA256SUMS:1: damaged"):
        check_sums(sealed)


def test_folders_without_a_list_pass(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    check_sums(tmp_path, ["model.safetensors"])


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="coreutils are not installed")
def test_coreutils_read_the_list(sealed):
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=sealed, capture_output=True)
    assert done.returncode == 0
