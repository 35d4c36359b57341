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
    needs = any(re.search(r"\b(torch|peft|AutoModel\w*)\b", code) for code in blocks(page, "python"))
    assert not needs or "pip install '.[torch]'" in PAGES[page]
