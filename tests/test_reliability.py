"""Every test that docs/reliability.md names as a proof exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"(tests/[\w/]+\.py)?::(\w+)|(tests/[\w/]+\.py)")


def test_named_tests_exist():
    lost, seen = [], 0
    for line in (ROOT / "docs" / "reliability.md").read_text("utf-8").splitlines():
        file = ""
        for match in NAMED.finditer(line):
            file = match[1] or match[3] or file  # `::name` alone is of the file before it
            text = (ROOT / file).read_text("utf-8") if (ROOT / file).is_file() else ""
            seen += 1
            if not text or (match[2] and f"def {match[2]}(" not in text):
                lost.append(f"{file}::{match[2]}")
    assert seen > 100
    assert not lost
