"""What the pages tell a reader to type exists, and does what stands beside it."""

import re
import tomllib
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[1]
PAGES = {page.name: page.read_text("utf-8") for page in (
    TREE / "README.md", TREE / "CONTRIBUTING.md", *sorted((TREE / "docs").glob("*.md"))
)}  # fmt: skip
EXTRAS = tomllib.loads((TREE / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page, kind):
    return [text for of, text in BLOCKS.findall(PAGES[page]) if of == kind]


@pytest.mark.parametrize("page", PAGES)
def test_every_extra_that_a_page_names_exists(page):
    named = {
        extra
        for given in re.findall(r"(?:'\.|jaxalign)\[([a-z,]+)\]", PAGES[page])
        for extra in given.split(",")
    }
    assert named <= set(EXTRAS)


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"README.md"}))
def test_pages_install_from_the_clone(page):
    """No index has a release; the README says when messages may write `jaxalign[eval]`."""
    assert "pip install 'jaxalign[" not in PAGES[page]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_whose_code_needs_pytorch_says_how_to_install_it(page):
    needs = re.search(r"\b(torch|peft|AutoModel\w*)\b", "".join(blocks(page, "python")))
    assert not needs or "pip install '.[torch]'" in PAGES[page]


def test_the_script_of_massive_may_run_twice(tmp_path, monkeypatch):
    (script,) = (code for code in blocks("reproduce.md", "python") if "data/massive" in code)
    rows = [
        f'{{"partition": "{partition}", "locale": "{locale}", "utt": "ä {number}"}}\n'
        for locale in ("de-DE", "en-US")
        for number, partition in enumerate(["train", "dev", "train"])
    ]
    release = tmp_path / "1.1" / "data"
    release.mkdir(parents=True)
    for locale in ("de-DE", "en-US"):
        (release / f"{locale}.jsonl").write_text("".join(r for r in rows if locale in r), "utf-8")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        exec(script, {})
    written = {f.name: f.read_text("utf-8") for f in (tmp_path / "data" / "massive").iterdir()}
    assert set(written) == {
        f"{partition}.{locale}.jsonl"
        for partition in ("train", "dev")
        for locale in ("de-DE", "en-US")
    }
    assert written["train.de-DE.jsonl"] == rows[0] + rows[2]
    assert written["dev.en-US.jsonl"] == rows[4]
