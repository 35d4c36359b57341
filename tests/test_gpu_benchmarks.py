"""benchmarks/gpu: a rehearsal writes its JSON, a broken part stops no other, a trace adds up."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """name -> that file of benchmarks/gpu, as its neighbours import it."""
    monkeypatch.syspath_prepend(str(HERE))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(HERE)):
            del sys.modules[name]


def rehearse(tmp_path, *words):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(HERE / "run.py"), "--rehearse", "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text("utf-8")), done.stdout


@pytest.mark.torch
@pytest.mark.slow
def test_a_rehearsal_writes_rows_and_a_table(tmp_path):
    found, printed = rehearse(tmp_path, "--quick", "--only", "peers")
    (part,) = found["parts"].values()
    assert part["status"] == "finished" and not any("error" in row for row in part["rows"])
    assert {"date", "command", "versions", "card"} <= found.keys()
    speeds = [row for row in part["rows"] if "tokens" in row]
    assert len(speeds) == 4 and all(row["seconds"] > 0 < row["flops"] for row in speeds)
    assert all(row["what"] in printed for row in speeds)


@pytest.mark.slow
@pytest.mark.torch
def test_everything_rehearsed(tmp_path):
    found, printed = rehearse(tmp_path, "--full")
    assert list(found["parts"]) == ["correct", "fast", "peers", "slots", "where", "real"]
    for part in found["parts"].values():
        assert part["status"] == "finished"
        for row in part["rows"]:
            assert not {"error", "skipped"} & row.keys() and row.get("ok", True), row
    assert "bit for bit" in printed and "WRONG" not in printed


def test_a_part_that_fails_or_hangs_keeps_its_rows(module, monkeypatch, tmp_path):
    run = module("run")
    write = "import json, sys, time; open(sys.argv[2], 'w').write(json.dumps([{'what': 'one'}])); "
    (tmp_path / "fast.py").write_text(write + "sys.exit(3)")
    (tmp_path / "peers.py").write_text(write + "time.sleep(600)")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "LEAST", 0)
    flags = dict.fromkeys(("rehearse", "quick", "full"), False)
    options = argparse.Namespace(**flags, limit=9, rows="", model=None)
    failed = run.run_part("fast", 9, options, tmp_path)
    assert failed["status"] == "failed" and "exit code 3" in failed["why"]
    stopped = run.run_part("peers", 1.5, options, tmp_path)
    assert stopped["status"] == "stopped" and stopped["took"] < 9
    assert failed["rows"] == stopped["rows"] == [{"what": "one"}]
    assert run.run_part("real", -1, options, tmp_path)["status"] == "skipped"


def test_rows_that_fail_or_have_no_time(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["part", "--seconds", "1000000"])
    part = module("part").Part("")
    assert part.measure("one", lambda: {"x": 1})["x"] == 1
    assert part.measure("two", lambda: 1 / 0)["error"] == "ZeroDivisionError: division by zero"
    assert "skipped" in part.measure("three", dict, need=2e6)
    assert [row["what"] for row in part.rows] == ["one", "two", "three"]


def test_shares_of_a_trace(module):
    where = module("where")
    events = [
        ("nvjet_hsh_128x256.1", 0, 40),
        ("nvjet_hsh_128x256.2", 40, 60),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 50, 70),
        ("loop_multiply_fusion_12", 80, 90),
        ("MemcpyD2D", 90, 100),
    ]
    found = where.summary(events)
    shares = {"attention": 0.2, "products": 0.6, "copies": 0.1, "element-wise": 0.1, "gaps": 0.1}
    assert found["shares"] == pytest.approx(shares)
    first = found["longest"][0]
    assert first["kernel"] == "nvjet_hsh_128x256" and first["calls_an_update"] == 2 / where.UPDATES


def test_ours_against_the_fastest_of_theirs(module):
    def rows(**seconds):
        return {"rows": [{"what": name, "tokens": 8, "seconds": s} for name, s in seconds.items()]}

    theirs = {"task, r 16, checkpointing on": 4.0, "task, r 16, checkpointing off": 3.0}
    parts = {"fast": rows(**{"task, r 16": 2.0, "align": 1.0}), "peers": rows(**theirs)}
    assert module("table").compare({"parts": parts}) == {"task, r 16": 1.5}


def test_least_work_is_the_products(module):
    shapes = module("shapes")
    spec = shapes.spec_of(shapes.hf_config(shapes.LLAMA))
    least = shapes.least_flops(spec, shapes.ANCHOR) / shapes.ANCHOR.tokens
    assert 4 * 7.5e9 < least < 4 * 8.03e9 * 1.15  # two products a weight, attention, the adapter
    pairs = shapes.least_flops(spec, shapes.ALIGN) / shapes.ALIGN.tokens
    assert pairs < least / 2  # half of the blocks, no head


def test_parts_with_their_seconds(module):
    run = module("run")
    assert run.parts("real,fast=60") == {"fast": 60.0, "real": 0.0}
    with pytest.raises(argparse.ArgumentTypeError, match="'fats' is not a part"):
        run.parts("fats=3")


def test_the_page_has_the_tables_of_its_numbers(module):
    table = module("table")
    first, second = (HERE / "results" / f"h100_2026-11-27{more}.json" for more in ("", "_second"))
    page = (HERE.parents[1] / "docs" / "gpu.md").read_text("utf-8")
    assert table.markdown(table.read(first)) in page
    assert table.markdown(table.read(second, first)) in page  # PEFT was measured in the first
    for row in table.read(second)["parts"]["slots"]["rows"]:
        if "texts" in row:
            memory = row.get("memory_gb", row.get("peak_gb"))
            line = f"{row['texts'] / row['seconds']:,.0f} | {row['computed']:,} | {memory:.1f} GB |"
            assert f"| {row['what']} | {line}" in page
