"""The imports of the package, and their picture in docs/architecture.md: python docs/imports.py"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PAGE = Path(__file__).with_name("architecture.md")
HOUSE = PAGE.parents[1] / "jaxalign"
BEGIN, END = "<!-- imports: drawn by docs/imports.py -->", "<!-- end of imports -->"
ROOMS_INSIDE = ("model.spec", "hf.find")  # facts and places that rooms below `model` and `hf` need
EVERYWHERE = "errors"  # imported by almost every room, so the picture leaves it out
Graph = dict[str, set[str]]


def name_of(file: Path) -> str:
    """`model.spec` of jaxalign/model/spec/__init__.py; empty for the package itself."""
    parts = file.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, ast.Module]:
    """Name -> syntax tree."""
    return {name_of(file): ast.parse(file.read_text("utf-8")) for file in HOUSE.rglob("*.py")}


def _statements(tree: ast.AST, inside: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing and (inside or not function):
            yield from _statements(node, inside)


def imported(tree: ast.AST, inside: bool = True) -> set[str]:
    """What a file imports when it runs: `a.b` of `from a import b`; `inside` functions, too."""
    found = set()
    for node in _statements(tree, inside):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def between_modules(trees: Mapping[str, ast.Module]) -> Graph:
    """Module -> modules of the package that it imports."""
    graph = {}
    for module, tree in trees.items():
        names = {name.partition("jaxalign.")[2] for name in imported(tree)}
        ours = {name if name in trees else name.rpartition(".")[0] for name in names}
        graph[module] = ours & set(trees) - {module, ""}
    return graph


def room_of(module: str) -> str:
    """The package or top-level module, or one of ROOMS_INSIDE."""
    inside = (room for room in ROOMS_INSIDE if f"{module}.".startswith(f"{room}."))
    return next(inside, module.split(".")[0])


def between_rooms(graph: Graph) -> Graph:
    """Room -> rooms that its modules import."""
    found: Graph = {room_of(module): set() for module in graph if module}
    for module, others in graph.items():
        if module:
            found[room_of(module)] |= {room_of(other) for other in others} - {room_of(module)}
    return found


def reached(graph: Graph, start: str) -> set[str]:
    """Everything that `start` imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def picture() -> str:
    """A Mermaid chart: an arrow for each import between rooms that no longer way implies."""
    graph = between_rooms(between_modules(modules()))
    lines = ["```mermaid", "flowchart TD"]
    for room in sorted(set(graph) - {EVERYWHERE}):
        implied = {far for other in graph[room] for far in reached(graph, other)}
        near = sorted(graph[room] - implied - {EVERYWHERE})
        lines += [f"    {room} --> {' & '.join(near)}"] if near else []
    return "\n".join([*lines, "```"])


def with_picture(page: str) -> str:
    """The page with the picture of today."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{picture()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_picture(PAGE.read_text("utf-8")), "utf-8")
