"""What became of the rows of a stream, in one line of the log."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """What became of the data, for the log."""

    read: int  # rows in the files, after the language filter
    kept: int
    cut: int  # kept rows that lost tokens on the right
    dropped: int  # rows whose whole answer was cut away
    languages: dict[str, int]  # kept rows of each
    others: int = 0  # rows that the language filter left out
    found: int = 0  # rows in the files, before transforms
    made: int = 0  # rows that transforms made of them

    @property
    def shortened(self) -> bool:
        """Whether not all of the data is there."""
        return bool(self.cut or self.dropped or self.others)

    def __str__(self) -> str:
        """One line for people."""
        among = f" of {self.read + self.others}" if self.others else ""
        parts = [f"{self.kept}{among} rows"]
        if self.cut:
            parts.append(f"{self.cut} cut to the maximum length")
        if self.dropped:
            parts.append(f"{self.dropped} dropped, their answer lay beyond it")
        named = [f"{name} {count}" for name, count in self.languages.items() if name]
        line = [", ".join(parts) + (f" ({', '.join(named)})" if named else "")]
        if self.made != self.found:
            line.append(f"transforms made {self.made} of {self.found}")
        if self.others:
            line.append(f"{self.others} in other languages or none")
        return "; ".join(line)
