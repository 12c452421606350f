"""Versions, device and commit of a run."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from drkl._version import __version__
from drkl.models.precision import cpu_capabilities

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "safetensors", "numpy", "peft")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, the code's git commit, device and threads; no paths, no host names."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "drkl": __version__,
        "python": platform.python_version(),
        **versions,
        "git_commit": git_commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "device_name": device_name(device),
        "num_threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """The name of the card or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def git_commit() -> str | None:
    """The commit of drkl's own checkout; ``+changes`` where files differ; None for an installed wheel."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
