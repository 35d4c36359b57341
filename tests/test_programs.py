"""Compiled programs on disk: where, when, and never in the way."""

import os
import stat
from pathlib import Path

import jax
import pytest

from jaxalign.errors import UserError
from jaxalign.programs import begin, default_folder, keep_programs

NAMES = ("jax_compilation_cache_dir", "jax_enable_compilation_cache",
         "jax_compilation_cache_max_size")  # fmt: skip


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """JAX without a folder, and a cache folder of the user's that is not there yet."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_users_cache_folder_is_private(bare):
    folder = keep_programs()
    assert folder == bare / "cache" / "jaxalign" / "xla" == default_folder()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert jax.config.jax_compilation_cache_max_size > 0


def test_without_the_variable_it_lies_under_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == Path.home() / ".cache" / "jaxalign" / "xla"


def test_a_folder_that_jax_has_already_stays(bare):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    assert keep_programs() is None and jax.config.jax_compilation_cache_dir == "/elsewhere"


def test_it_can_be_turned_off(bare):
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_programs() is None and not (bare / "cache").exists()


def test_a_cpu_keeps_nothing(bare, monkeypatch):
    monkeypatch.undo()
    assert jax.default_backend() == "cpu" and keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_several_processes_share_no_private_folder(bare, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert keep_programs() is None and not (bare / "cache").exists()


@pytest.mark.parametrize("broken", ["file", "locked"])
def test_a_folder_that_cannot_be_written_stops_nothing(bare, monkeypatch, broken):
    if broken == "file":
        (bare / "cache").write_text("in the way")
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    assert keep_programs() is None and jax.config.jax_compilation_cache_dir is None


def test_a_machine_whose_devices_are_taken_is_one_sentence(monkeypatch):
    """As where other processes hold all memory of a GPU: JAX says it with a traceback."""

    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda': INTERNAL: no supported devices")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError, match=r"cannot use any device .*'cuda'.*JAX_PLATFORMS=cpu"):
        begin()
