"""What a machine with a GPU has, and how the packages that it lacks get there. Needs nothing but Python itself."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.rows import commit

ROOT = Path(__file__).parents[1]
PACKED = ROOT / "build" / "gpu_day"
"""Where `pack` puts what is to be carried to the machine with the checkout; git ignores it."""
LIMIT_MIB = 64
"""What may travel, the checkout included."""
PACKAGES = """
transformers accelerate tokenizers safetensors huggingface_hub regex numpy PyYAML packaging filelock fsspec tqdm
typing_extensions httpx2 httpcore2 h11 anyio certifi idna truststore typer click rich markdown-it-py mdurl Pygments
shellingham annotated-doc annotated-types pydantic pydantic_core typing-inspection Jinja2 MarkupSafe lazy-loader
jaxtyping wadler_lindig psutil gguf datasets pyarrow dill multiprocess xxhash requests urllib3 charset-normalizer
pytest pluggy iniconfig hypothesis sortedcontainers sacrebleu lxml portalocker tabulate colorama nltk defusedxml
absl-py joblib six rouge_score liger-kernel trl
""".split()
"""What drkl, its tests and the peers import on the way, without torch and what torch brings."""
LEFT_OUT_WITH = ("numpy", "pyarrow")
"""Packages that a machine keeps its own of: what else it has was built for that."""
LEFT_OUT_WITHOUT = {"datasets": "pandas"}
"""Packages that are broken without another one, which is too large to carry; rows in memory are read without them."""
UNUSED = (
    "*/tests/*", "*/test/*", "*.pyi", "*.pxi", "*.pxd", "pyarrow/include/*", "pyarrow/*flight*", "pyarrow/*s3*",
    "pyarrow/*encryption*", "pyarrow/libarrow_python.so", "pyarrow/libarrow_python.so.*.*",
)  # fmt: skip
"""Files of packages that no part of this needs; the last two are copies."""
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9}]
SHOWN = """
torch triton transformers accelerate tokenizers safetensors huggingface_hub numpy pydantic datasets pyarrow pandas
peft pytest sacrebleu rouge_score liger_kernel trl
""".split()


def pack(folder: Path, python: str) -> None:
    """Download the wheels of `PACKAGES` for a Python on Linux, and put what they hold into one archive.

    Exits with a message where what travels would be more than `LIMIT_MIB`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "packages.tar.xz"
    with TemporaryDirectory() as wheels:
        _download(Path(wheels), python)
        with lzma.open(archive, "wb", filters=FILTERS) as file, tarfile.open(fileobj=file, mode="w") as packed:
            for wheel in sorted(Path(wheels).glob("*.whl"), key=lambda path: path.name.lower()):
                _add(packed, wheel)
    about = {"python": python, "commit": commit()}
    (folder / "packed.json").write_text(json.dumps(about) + "\n")
    packages, checkout = archive.stat().st_size / 2**20, _checkout_bytes() / 2**20
    print(f"{archive}: {packages:.1f} MiB, for Python {python}; the checkout has {checkout:.1f} MiB")
    if packages + checkout > LIMIT_MIB:
        sys.exit(f"Together that is more than {LIMIT_MIB} MiB: leave out some of PACKAGES in {__file__}")


def _download(wheels: Path, python: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    pins = [
        "--quiet",
        "--no-deps",
        "-c",
        str(ROOT / "constraints.txt"),
        "-c",
        str(ROOT / "benchmarks/requirements.txt"),
    ]
    systems = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28)] + ["manylinux2014_x86_64", "any"]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [word for system in systems for word in ("--platform", system)]
    sources = ["rouge_score"]  # there is no wheel of it
    names = [name for name in PACKAGES if name not in sources]
    for command in (
        [*pip, "download", *pins, *target, "-d", str(wheels), *names],
        [*pip, "wheel", *pins, "--no-build-isolation", "-w", str(wheels), *sources],
    ):
        if subprocess.run(command).returncode:
            sys.exit("pip could not fetch the packages")


def _add(packed: tarfile.TarFile, wheel: Path) -> None:
    """The files of a wheel, in a folder that has the name of its package."""
    with zipfile.ZipFile(wheel) as contents:
        for entry in contents.infolist():
            if entry.is_dir() or any(fnmatch(entry.filename, pattern) for pattern in UNUSED):
                continue
            member = tarfile.TarInfo(f"{_plain(wheel.name.partition('-')[0])}/{entry.filename}")
            member.size = entry.file_size
            with contents.open(entry) as file:
                packed.addfile(member, file)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _checkout_bytes() -> int:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / name for name in names.split("\0") if name)
    return sum(path.lstat().st_size for path in paths if path.is_symlink() or path.exists())


def packed_facts(folder: Path) -> dict[str, str]:
    """The Python and the commit that were packed; nothing where nothing was."""
    path = folder / "packed.json"
    facts: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return facts


def unpack(folder: Path, site: Path) -> str:
    """Unpack what this machine lacks; a line that says what was done."""
    facts, here = packed_facts(folder), "{}.{}".format(*sys.version_info)
    if not facts:
        return f"no packages were carried along in {folder}"
    if facts["python"] != here:
        return f"the packages carried along are for Python {facts['python']}, and this is {here}: they are not used"
    skipped = {name for name in LEFT_OUT_WITH if importlib.util.find_spec(name)}
    skipped |= {name for name, needed in LEFT_OUT_WITHOUT.items() if not importlib.util.find_spec(needed)}
    met = set()
    with tarfile.open(folder / "packages.tar.xz") as packed:
        for member in packed:
            name, _, member.name = member.name.partition("/")
            met.add(name)
            if name not in skipped:
                packed.extract(member, site, filter="data")
    left = ", ".join(sorted(met & skipped))
    return "unpacked what was carried along" + (f", without {left}" if left else "")


def versions() -> dict[str, str]:
    """The version of Python and of every package of `SHOWN`, and the C compiler that Triton needs; or ``missing``."""
    found = {"python": "{}.{}.{}".format(*sys.version_info)}
    for name in SHOWN:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), "missing")
    return found | {"C compiler": compiler}


def main() -> None:
    """Pack."""
    parser = argparse.ArgumentParser(description="Pack the packages that a machine with a GPU may lack.")
    parser.add_argument("--python", default="{}.{}".format(*sys.version_info), help="the Python of that machine")
    parser.add_argument("--packed", type=Path, default=PACKED, help="folder to pack into")
    options = parser.parse_args()
    pack(options.packed, options.python)


if __name__ == "__main__":
    main()
