"""A typed analysis: the reader and writer of ``analysis.json`` and ``analysis/positions.csv``."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drkl.disk import writing
from drkl.display import shell_word
from drkl.errors import DrklError, did_you_mean
from drkl.evaluation.bootstrap import Estimate
from drkl.evaluation.findings import RENAMED, Finding, of_analysis
from drkl.kept import described
from drkl.runs import RunFolder, json_text, read_sealed, write_together
from drkl.sealed import sealed

FORMAT = 2
"""The format of ``analysis.json``. Format 1 has no ``format`` and no ``findings``; it is still read."""
SECTIONS = ("settings", "counts", "totals", "by_target", "distributions", "gammas", "objectives", "reliability")


@dataclass(frozen=True)
class Analysis:
    """The result of `drkl.analyze`.

    ``analysis["K"]`` is a mean over all positions with its 95 % interval; `tables` has everything else.
    """

    tables: dict[str, Any]
    """The sections of ``analysis.json``, by name: docs/analyze.md describes them."""
    findings: list[Finding]
    """The questions about this student, with their answers."""
    positions: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """The columns of ``positions.csv`` `[n]`: ``row_id``, ``label``, ``q_t``, ``p_t``, ``B``, ``K``, ``D`` and the two
    pushes of reverse KL."""

    def __getitem__(self, name: str) -> Estimate:
        """The mean ``name`` of `tables` ``["totals"]`` with its 95 % interval.

        Raises:
            DrklError: there is no such mean.
        """
        totals = self.tables["totals"]
        if name not in totals:
            known = ", ".join(totals)
            raise DrklError(f"An analysis has no mean {name!r}.{did_you_mean(name, totals)} It has {known}.")
        ends = totals[name]["interval"]
        return Estimate(totals[name]["value"], None if ends is None else (ends[0], ends[1]))

    def finding(self, id: str) -> Finding | None:
        """Return the finding with this id, or None."""
        return next((finding for finding in self.findings if finding.id == id), None)

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``analysis.json``."""
        return {"format": FORMAT, "findings": [finding.to_json() for finding in self.findings], **self.tables}

    def save(self, folder: str | Path) -> Path:
        """Write ``analysis/positions.csv`` and ``analysis.json``, both or none, and return the folder.

        Raises:
            CannotWrite: the folder cannot be written to.
        """
        run = RunFolder(Path(folder))
        files = {run.analysis_folder / "positions.csv": _to_csv(self.positions)} if self.positions else {}
        said = {path.name: described(text.encode()) for path, text in files.items()}
        write_together(files | {run.analysis_path: json_text(sealed(self.to_json() | {"files": said}))})
        return run.root

    @classmethod
    def load(cls, folder: str | Path) -> Analysis:
        """Read the analysis in a run folder, or in another folder that it was saved to.

        Raises:
            DrklError: there is none, it is malformed, or its format is newer.
        """
        run = RunFolder(Path(folder))
        if not run.analysis_path.is_file():
            raise DrklError(f"{str(folder)!r} has no analysis.json; `drkl analyze {shell_word(folder)}` makes it.")
        content = read_analysis(run)
        number = content.get("format", 1)
        if number not in (1, FORMAT):
            raise DrklError(
                f"{run.analysis_path} has format {number!r}, and this drkl reads {FORMAT} and the one before; a newer "
                "drkl wrote it."
            )
        path = run.analysis_folder / "positions.csv"
        try:
            tables = {name: content[name] for name in SECTIONS}
            tables |= {"timing": content["timing"]} if "timing" in content else {}
            tables["totals"] = {RENAMED.get(name, name): entry for name, entry in tables["totals"].items()}
            stored = content.get("findings")
            findings = of_analysis(tables) if stored is None else [Finding.from_json(entry) for entry in stored]
            said = (content.get("files") or {}).get(path.name)
            if path.is_file() and said not in (None, described(path.read_bytes())):
                raise ValueError(f"{path} has another content than was written")
            return cls(tables, findings, _from_csv(path) if path.is_file() else {})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DrklError(
                f"{run.analysis_path} is not what `drkl analyze` writes ({type(error).__name__}: {error}); run it "
                "again."
            ) from error


def read_analysis(run: RunFolder) -> dict[str, Any]:
    """Return what ``analysis.json`` holds.

    Raises:
        DrklError: it is damaged.
    """
    try:
        return read_sealed(run.analysis_path)
    except DrklError as error:
        raise DrklError(f"{error} `drkl analyze {run.root}` writes it again.") from error


def claim_folder(folder: RunFolder) -> None:
    """Make the folder, and write into it, so that long work does not start where it cannot end.

    Raises:
        CannotWrite: the folder cannot be written to.
    """
    with writing(folder.analysis_folder):
        folder.analysis_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.analysis_folder):
            pass


def _to_csv(columns: Mapping[str, np.ndarray]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else _safe(str(value)) for value in row)
    return text.getvalue()


def _safe(text: str) -> str:
    """No spreadsheet takes it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def _from_csv(path: Path) -> dict[str, np.ndarray]:
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    types: dict[str, Any] = {"row_id": str, "label": np.int64}
    columns = zip(*rows, strict=True)
    return {name: np.array(values, types.get(name, np.float64)) for name, values in zip(head, columns, strict=True)}
