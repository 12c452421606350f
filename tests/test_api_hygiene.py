"""House rules that a walk over the source can hold: who prints, who imports whom, how a help text begins."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "drkl"
SPEAKS = {"__main__.py", "cli.py", "outputs.py", "terminal.py"}
"""The modules that print and read the command line."""


def module_name(path: Path) -> str:
    parts = ("drkl", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
LIBRARY = {name: path for name, path in MODULES.items() if path.relative_to(SOURCE).as_posix() not in SPEAKS}
each_module = pytest.mark.parametrize("name", MODULES)
each_library_module = pytest.mark.parametrize("name", LIBRARY)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(name: str, node: ast.AST) -> str:
    return f"{MODULES[name].relative_to(SOURCE.parent)}:{getattr(node, 'lineno', 0)}"


@each_library_module
def test_the_library_neither_prints_nor_reads_the_command_line(name: str) -> None:
    found = []
    for node in ast.walk(parsed(MODULES[name])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"{place(name, node)}: print(")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.argv", "sys.stdout", "sys.stderr"):
            found.append(f"{place(name, node)}: {ast.unparse(node)}")
        if isinstance(node, ast.ImportFrom) and node.module == "sys":
            found.append(f"{place(name, node)}: {ast.unparse(node)}")
    assert not found


def texts(tree: ast.Module) -> Iterator[ast.Constant]:
    """Docstrings of every kind, and what stands in a field's help or description."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value
        if isinstance(node, ast.Call):
            named = [word.value for word in node.keywords if word.arg in ("help", "description", "epilog")]
            of_field = node.args if isinstance(node.func, ast.Name) and node.func.id == "help_text" else []
            for text in (*named, *of_field):
                yield from (part for part in ast.walk(text) if isinstance(part, ast.Constant))


@each_module
def test_no_help_text_begins_with_its_genitive(name: str) -> None:
    """The subject comes first: "Random seed of the intervals", not "Of the intervals"."""
    begun = [text for text in texts(parsed(MODULES[name])) if isinstance(text.value, str)]
    assert [f"{place(name, text)}: {text.value}" for text in begun if re.match(r"[Oo]f\b", text.value.strip())] == []


@cache
def flags() -> frozenset[str]:
    """Every option of every command."""
    import typer

    from drkl.cli import app

    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    return frozenset(flag for command in commands for option in command.params for flag in option.opts if "--" in flag)


@each_library_module
def test_the_library_speaks_of_no_flag(name: str) -> None:
    """A message names the argument or the config key: whoever calls from Python has no flags."""
    strings = [node for node in ast.walk(parsed(MODULES[name])) if isinstance(node, ast.Constant)]
    spoken = [(node, flags() & set(re.findall(r"--[a-z][\w-]*", str(node.value)))) for node in strings]
    assert [f"{place(name, node)}: {' '.join(sorted(some))}" for node, some in spoken if some] == []


@cache
def imports(name: str) -> set[str]:
    """The modules of drkl that a module imports, in its functions too; types alone do not count."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    nodes: list[ast.AST] = [parsed(path)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                below = f"{base}.{alias.name}"
                found.add(below if below in MODULES else base)
    return (found & MODULES.keys()) - {name, "drkl"}


@cache
def reached(name: str) -> dict[str, list[str]]:
    """Every module that an import of this one brings, with the way there."""
    ways = {name: [name]}
    waiting = [name]
    while waiting:
        here = waiting.pop(0)
        for there in sorted(imports(here) - ways.keys()):
            ways[there] = [*ways[here], there]
            waiting.append(there)
    return ways


@pytest.mark.slow
def test_no_module_imports_itself_by_a_detour() -> None:
    circles = {
        frozenset(reached(there)[name]): " -> ".join([name, *reached(there)[name]])
        for name in MODULES
        for there in imports(name)
        if name in reached(there)
    }
    assert sorted(circles.values()) == []


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("drkl.evaluation")])
def test_evaluation_needs_nothing_of_training(name: str) -> None:
    ways = [" -> ".join(way) for there, way in reached(name).items() if there.startswith("drkl.training")]
    assert not ways


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_drkl_imports_no_room_and_names_them_all() -> None:
    loaded = fresh("import sys, drkl; print(*sorted(n for n in sys.modules if n.startswith('drkl')))").split()
    assert set(loaded) <= {"drkl", "drkl._version"}
    rooms = {name.split(".")[1] for name, path in MODULES.items() if path.name == "__init__.py" and name != "drkl"}
    names = fresh("import drkl; print(*dir(drkl))").split()
    assert rooms - {"recipes", "teachers"} <= set(names)


@pytest.mark.slow
def test_each_public_name_is_listed_once_and_is_there() -> None:
    stub = ast.parse((SOURCE / "__init__.pyi").read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(stub) if isinstance(node, ast.ImportFrom)]
    names = [alias.asname or alias.name for node in nodes for alias in node.names]
    listed = Counter(name for name in names if not name.startswith("__"))
    assert [name for name, count in listed.items() if count > 1] == []
    code = (
        "import drkl, inspect\n"
        "objects = {name: getattr(drkl, name) for name in drkl.__all__}\n"
        "print(*(n for n, o in objects.items() if callable(o) and not inspect.getdoc(o)))"
    )
    assert fresh(code).split() == []
