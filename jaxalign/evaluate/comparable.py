"""Whether systems can be compared, and in which groups: the same languages, rows and measures.

languages = same_languages(systems)                   # ['en', 'de', 'sw']
rows = same_rows(systems, languages)                  # {'en': 250, ...}
check_rows(systems, languages)                        # the same before anything is measured
measured = same_measures(systems, languages)          # {'slot_f1': ['en', 'de', 'sw'], ...}
members, absent = members_of({'aligned': ['de']}, languages)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxalign.errors import UserError
from jaxalign.evaluate.measure import Scored

ALL, OTHER = "all", "other"


@dataclass(frozen=True)
class System:
    """A named system and what it scored, one dict of languages for each seed."""

    name: str
    runs: list[dict[str, Scored]]


def each_run(systems: Sequence[System]) -> Iterator[tuple[str, dict[str, Scored]]]:
    """(how an error calls it, languages) of every run of every system."""
    for system in systems:
        for number, run in enumerate(system.runs, 1):
            yield f"{system.name}, run {number}" if len(system.runs) > 1 else system.name, run


def same_languages(systems: Sequence[System]) -> list[str]:
    """The languages of every run of every system, in the order of the first.

    Raises:
      UserError: no system, two of one name, one without scores, a language that one lacks.
    """
    if not systems:
        raise UserError("there is no system to compare; name at least one")
    names = [system.name for system in systems]
    for system in systems:
        if names.count(system.name) > 1:
            raise UserError(f"two systems are called {system.name!r}; give each its own name")
        if not system.runs or not all(system.runs):
            raise UserError(f"{system.name}: no language was measured; evaluate it first")
    languages = list(dict.fromkeys(language for _, run in each_run(systems) for language in run))
    for where, run in each_run(systems):
        missing = [language for language in languages if language not in run]
        if missing:
            raise UserError(
                f"{where} has no rows in {', '.join(missing)}, but others have; evaluate it "
                "there, or leave these languages out of every system"
            )
    return languages


def same_rows(systems: Sequence[System], languages: Sequence[str]) -> dict[str, int]:
    """The number of rows of each language.

    Raises:
      UserError: other rows, or another order, in one of the runs; a language without rows.
    """
    first, run = next(each_run(systems))
    rows = {language: len(run[language].measures[0].parts) for language in languages}
    for where, run in each_run(systems):
        for language in languages:
            for measure in run[language].measures:
                if len(measure.parts) != rows[language]:
                    raise UserError(
                        f"{where}: {language} has {len(measure.parts)} rows, but {first} has "
                        f"{rows[language]}; evaluate all systems on the same rows"
                    )
    check_rows(systems, languages)
    empty = [language for language in languages if not rows[language]]
    if empty:
        raise UserError(f"{', '.join(empty)}: no rows to score; leave out languages without data")
    return rows


def check_rows(systems: Sequence[System], languages: Sequence[str]) -> None:
    """Compares the ids of rows and what they hold; nothing need be measured.

    Raises:
      UserError: other rows, or another order, in one of the runs.
    """
    first, run = next(each_run(systems))
    asked = {language: (run[language].ids, run[language].contents) for language in languages}
    for where, run in each_run(systems):
        for language in languages:
            if (run[language].ids, run[language].contents) != asked[language]:
                raise UserError(
                    f"{where}: the rows of {language} are not those of {first}; evaluate all "
                    "systems on the same rows, in one order"
                )


def same_measures(systems: Sequence[System], languages: Sequence[str]) -> dict[str, list[str]]:
    """Each measure with the languages that it is measured in: one or more.

    Raises:
      UserError: runs or languages that do not share their measures.
    """
    first, run = next(each_run(systems))
    head = run[languages[0]]
    names = [*(measure.name for measure in head.measures), *head.unmeasured]
    missing = {language: set(run[language].unmeasured) for language in languages}
    for where, run in each_run(systems):
        for language in languages:
            left_out = set(run[language].unmeasured)
            have = {measure.name for measure in run[language].measures} | left_out
            if differs := (have ^ set(names)) | (left_out ^ missing[language]):
                odd = ", ".join(sorted(differs))
                raise UserError(
                    f"{where}: {language} and {first}: {languages[0]} do not share {odd}; "
                    "evaluate all systems with the same measures"
                )
    found = {
        name: [language for language in languages if name not in missing[language]]
        for name in names
    }
    return {name: inside for name, inside in found.items() if inside}


def check_groups(groups: Mapping[str, Sequence[str]]) -> None:
    """Refuses groups with the names of those that are always there.

    Raises:
      UserError: a group is called all or other.
    """
    for name in (ALL, OTHER):
        if name in groups:
            raise UserError(f"the group name {name!r} is taken, as it always exists; use another")


def members_of(
    groups: dict[str, list[str]], languages: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Groups of measured languages, and the languages named that were not measured.

    Languages in no group form `other`; `all` comes last.

    Raises:
      UserError: as of `check_groups`.
    """
    check_groups(groups)
    groups = {name: list(dict.fromkeys(named)) for name, named in groups.items()}
    found = {
        name: [language for language in named if language in languages]
        for name, named in groups.items()
    }
    absent = {
        name: [language for language in named if language not in languages]
        for name, named in groups.items()
    }
    grouped = {language for inside in found.values() for language in inside}
    if grouped:
        found[OTHER] = [language for language in languages if language not in grouped]
    found[ALL] = list(languages)
    return (
        {name: inside for name, inside in found.items() if inside},
        {name: missing for name, missing in absent.items() if missing},
    )
