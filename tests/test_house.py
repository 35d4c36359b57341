"""The walls of the house: who imports whom, what stays lazy, and each room says what it is."""

import ast
import runpy
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import jaxalign

TREE = Path(jaxalign.__file__).parents[1]
DRAWN = runpy.run_path(str(TREE / "docs" / "imports.py"))
MODULES = DRAWN["modules"]()
GRAPH = DRAWN["between_modules"](MODULES)
FLOORS = (
    {
        "errors", "bounds", "terminal", "settings", "config", "arguments", "multihost", "paths",
        "bucket", "programs", "chips", "compiler", "checksums", "interrupts", "lock", "folders",
        "model.spec", "hf.find", "picture", "named", "numerals",
    },
    {"sharding", "frozen", "objectives", "data"},
    {"adapters", "model"},
    {"hf", "train", "generate", "base"},
    {"probe", "evaluate", "merge", "export", "plan", "demo", "prepare"},
    {"compare"},
    {"cli", "commands", "__main__"},
)  # fmt: skip
# Beyond the floors: room -> rooms on its own or a lower floor that it must not see.
APART = {
    "model": {"config", "settings", "adapters"},
    "hf": {"config", "settings", "train", "generate", "data", "objectives"},
    "adapters": {"config", "settings", "data", "objectives", "model"},
    "objectives": {"config", "settings", "data"},
    "data": {"objectives", "sharding"},
    "generate": {"config", "settings", "train"},
    "base": {"train"},
}
# Importing these loads no library of HEAVY.
LIGHT = (
    "errors", "settings", "config", "multihost", "model.spec", "cli", "arguments", "data.batch",
)  # fmt: skip
HEAVY = ("jax", "flax", "optax", "torch", "transformers", "datasets", "grain", "matplotlib")


def floor(module: str) -> int:
    """The number of the floor; the longest name that fits decides."""
    for parts in range(module.count(".") + 1, 0, -1):
        name = ".".join(module.split(".")[:parts])
        for number, rooms in enumerate(FLOORS):
            if name in rooms:
                return number
    raise AssertionError(f"{module} stands on no floor: add its room to FLOORS")


def roots(module: str, inside: bool) -> set[str]:
    """Packages that a module imports."""
    return {name.split(".")[0] for name in DRAWN["imported"](MODULES[module], inside)}


def offenders(find) -> dict[str, object]:
    """Module -> what `find` holds against it, of those with anything."""
    found = {module: find(module) for module in sorted(MODULES)}
    return {module: what for module, what in found.items() if what}


def test_every_room_has_one_floor():
    rooms = [room for rooms in FLOORS for room in rooms]
    assert len(rooms) == len(set(rooms))
    known = {DRAWN["room_of"](module) for module in MODULES if module}
    assert set(rooms) == known  # no floor for a room that is gone


def test_imports_go_down():
    assert not offenders(
        lambda module: module and {o for o in GRAPH[module] if floor(o) > floor(module)}
    )


def test_rooms_that_must_not_know_each_other():
    def known(module):
        apart = APART.get(module.split(".")[0], set())
        return {other for other in GRAPH[module] if DRAWN["room_of"](other) in apart}

    assert not offenders(known)


def test_nothing_imports_in_a_circle():
    """Neither modules, with the imports inside functions, nor rooms."""
    for graph in (GRAPH, DRAWN["between_rooms"](GRAPH)):
        TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_the_picture_of_the_imports_is_drawn_from_the_code():
    page = (TREE / "docs" / "architecture.md").read_text("utf-8")
    assert DRAWN["with_picture"](page) == page, "run: python docs/imports.py"


def test_one_place_writes_to_the_terminal():
    def writes(module):
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(MODULES[module])
            if isinstance(node, ast.Call)
        }
        bars = {name for name in DRAWN["imported"](MODULES[module]) if "rich.progress" in name}
        return calls & {"print", "Console", "sys.stdout.write"} | bars

    assert set(offenders(writes)) == {"terminal"}


def test_torch_and_tensorflow_are_nobodys_need():
    outside = offenders(lambda m: roots(m, inside=False) & {"torch", "tensorflow", "peft"})
    anywhere = offenders(lambda m: roots(m, inside=True) & {"tensorflow"})
    assert not outside
    assert not anywhere  # not even inside a function: TFDS is read without it


def test_flax_modules_live_in_one_file():
    def layers(module):
        names = DRAWN["imported"](MODULES[module])
        return {name for name in names if name.startswith(("flax.linen", "flax.nnx"))}

    assert set(offenders(layers)) == {"model.layers"}


def test_every_module_says_what_it_is():
    def silent(module):
        first = (ast.get_docstring(MODULES[module]) or "").partition("\n")[0]
        return not first.endswith((".", ":", "?"))

    assert not offenders(silent)


def test_public_things_say_what_they_are():
    def silent(module):
        return [
            node.name
            for node in MODULES[module].body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ]

    assert not offenders(silent)


def test_help_and_configuration_do_not_wait_for_jax():
    light = (*LIGHT, *(module for module in MODULES if module.startswith("commands.")))
    names = ["jaxalign", *(f"jaxalign.{name}" for name in light)]
    code = (
        f"import importlib, sys\n"
        f"for name in {names}:\n"
        f"    importlib.import_module(name)\n"
        f"    came = [heavy for heavy in {HEAVY} if heavy in sys.modules]\n"
        f"    assert not came, (name, came)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
