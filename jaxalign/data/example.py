"""A prompt and its answer, before any template.

example = Example("wake me at nine", "intent: alarm/set_alarm", language="en", system="...")
example.finished             # False: a template is put around it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, before any template."""

    prompt: str  # the user's turn; for finished rows the whole prefix
    answer: str
    language: str = ""
    system: str | None = None  # the task's instruction; None: a finished row, no template
    names: Mapping[str, str] = field(default_factory=dict)  # what {names} in an instruction mean
    origin: str = ""
    shots: tuple[tuple[str, str], ...] = ()  # solved prompts and answers shown before (few-shot)
    choices: tuple[str, ...] = ()  # the answers among which the right one is, if that is asked
    answered_in: str = ""  # the language of the answer, if it is not that of the row
    judged: str = ""  # what stands before the part of an answer that is judged; empty: all is
    ends: tuple[str, ...] = ()  # texts with which an answer is over, as a finished row writes them

    @property
    def finished(self) -> bool:
        """Prompt and answer are used letter by letter, end token and all."""
        return self.system is None

    @property
    def reference(self) -> str:
        """The part of the answer that others are compared with."""
        return self.read(self.answer)

    def read(self, answer: str) -> str:
        """The part of an answer that is judged; empty where it never came to it."""
        for end in self.ends:
            answer = answer.partition(end)[0]
        if not self.judged:
            return answer
        return answer.rpartition(self.judged)[2] if self.judged in answer else ""
