"""The walls of the house: who imports whom, what stays lazy, and each room says what it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxalign

HOUSE = Path(jaxalign.__file__).parent
FLOORS = (
    {
        "errors",
        "bounds",
        "terminal",
        "settings",
        "config",
        "multihost",
        "paths",
        "bucket",
        "programs",
        "chips",
        "compiler",
        "checksums",
        "interrupts",
        "lock",
        "folders",
        "model.spec",
        "hf.find",
    },
    {"sharding", "objectives", "data"},
    {"adapters", "model"},
    {"hf", "train", "generate", "base"},
    {"probe", "evaluate", "merge", "export", "plan", "demo"},
    {"cli", "arguments", "__main__"},
)
# Beyond the floors: room -> rooms on its own or a lower floor that it must not see.
APART = {
    "model": {"config", "settings"},
    "hf": {"config", "settings", "train", "generate", "data", "objectives"},
    "adapters": {"config", "settings", "data", "objectives"},
    "objectives": {"config", "settings", "data"},
    "data": {"objectives", "sharding"},
    "generate": {"config", "settings", "train"},
    "base": {"train"},
}
LIGHT = (
    "errors",
    "settings",
    "config",
    "multihost",
    "model.spec",
    "cli",
    "arguments",
    "__main__",
    "data.batch",
)


def name_of(file: Path) -> str:
    """`model.spec` for jaxalign/model/spec.py, `data` for jaxalign/data/__init__.py."""
    parts = file.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): ast.parse(file.read_text("utf-8")) for file in HOUSE.rglob("*.py")}


def floor(module: str) -> int:
    """The number of the floor; the longest name that fits decides."""
    for parts in range(module.count(".") + 1, 0, -1):
        name = ".".join(module.split(".")[:parts])
        for number, rooms in enumerate(FLOORS):
            if name in rooms:
                return number
    raise AssertionError(f"{module} stands on no floor: add its room to FLOORS")


def imports(tree: ast.AST, everywhere: bool = True) -> set[str]:
    """Modules a file imports; not `everywhere`: outside of functions and `if TYPE_CHECKING`."""
    found = set()
    waiting = list(ast.iter_child_nodes(tree))
    while waiting:
        node = waiting.pop()
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from jaxalign.hf import names` imports jaxalign.hf.names.
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if everywhere or not lazy:
            waiting += ast.iter_child_nodes(node)
    return found


def ours(tree: ast.AST) -> set[str]:
    """Our modules that a file imports, wherever in the file."""
    names = {name.removeprefix("jaxalign.") for name in imports(tree)}
    return names & set(MODULES) - {""}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {""}))
def test_imports_go_down(module):
    found = ours(MODULES[module])
    upward = {other for other in found if floor(other) > floor(module)}
    assert not upward, f"{module} imports {upward} from a higher floor"
    apart = {other for other in found if other.split(".")[0] in APART.get(module.split(".")[0], ())}
    assert not apart, f"{module} must not know {apart}"


def test_every_room_has_one_floor():
    rooms = [room for rooms in FLOORS for room in rooms]
    assert len(rooms) == len(set(rooms))
    for module in set(MODULES) - {""}:
        floor(module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_torch_and_tensorflow_are_nobodys_need(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module], everywhere=False)}
    assert not roots & {"torch", "tensorflow", "peft"}
    assert not {name.split(".")[0] for name in imports(MODULES[module])} & {
        "tensorflow"
    }  # not even inside a function: TFDS is read without it


def test_flax_modules_live_in_one_file():
    found = {
        module
        for module, tree in MODULES.items()
        if {name for name in imports(tree) if name.startswith(("flax.linen", "flax.nnx"))}
    }
    assert found == {"model.layers"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is(module):
    text = ast.get_docstring(MODULES[module])
    assert text
    assert text.splitlines()[0].endswith((".", ":", "?"))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_public_things_say_what_they_are(module):
    silent = [
        node.name
        for node in MODULES[module].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not silent


def test_help_and_configuration_do_not_wait_for_jax():
    heavy = ("jax", "flax", "optax", "torch", "transformers", "datasets", "grain", "matplotlib")
    names = ["jaxalign", *(f"jaxalign.{name}" for name in LIGHT if name != "__main__")]
    code = (
        f"import importlib, sys\n"
        f"for name in {names}:\n"
        f"    importlib.import_module(name)\n"
        f"    came = [heavy for heavy in {heavy} if heavy in sys.modules]\n"
        f"    assert not came, (name, came)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HOUSE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
