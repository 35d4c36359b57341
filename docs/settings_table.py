"""Writes the table of docs/configuration.md from the settings: python docs/settings_table.py"""

from pathlib import Path

from jaxalign.settings.explain import table

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- settings: written by docs/settings_table.py -->", "<!-- end of settings -->"


def with_table(page: str) -> str:
    """The page with the table of today."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
