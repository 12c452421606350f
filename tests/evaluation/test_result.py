"""The reader and writer of eval.json: what it keeps, what it renames, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drkl.errors import DrklError
from drkl.evaluation.bootstrap import Estimate
from drkl.evaluation.findings import Finding
from drkl.evaluation.result import Evaluation, Numbers

ROOT = Path(__file__).resolve().parents[2]
OLD = sorted((ROOT / "docs" / "results").glob("*.eval.json"))
BINS = {"tokens": [3, 0], "confidence": [0.2, None], "accuracy": [0.1, None]}
FILE: dict[str, Any] = {
    "format": 2,
    "settings": {"sampling_temperature": 1.0, "prompts": 7, "models": {"student": "s"}, "data": {"heldout_rows": 9}},
    "teacher": {"rkl": 0.0, "entropy": 1.0},
    "student": {"rkl": 0.5, "entropy": 2, "fkl": None},
    "intervals": {"student": {"rkl": [0.4, 0.6]}},
    "findings": [
        {"id": "closer", "question": "?", "answer": "yes", "numbers": {"rkl": {"value": 1.0, "interval": [0.0, 2.0]}},
         "text": "."},
    ],
    "sweep": {"student": [
        {"sampling_temperature": 1.5, "rouge_l": 3.0, "intervals": {"rouge_l": [2.0, 4.0]}},
        {"sampling_temperature": 0.5, "rouge_l": None, "intervals": {}},
    ]},
    "coverage": {"student": {"samples": [1, 2], "rouge_l_best": [1.0, None], "distinct_answers": [1.0, 2.0]}},
    "tail": {"ranks": [1, 2], "student": [0.5, None]},
    "reliability": {"edges": [0.0, 0.5, 1.0], "student": BINS, "mass": {"student": BINS}},
    "distributions": {"edges": {"entropy": [0.0, 1.0]}, "student": {"entropy": [3]}},
    "suites": {"dolly": {"student": {"rkl": 0.4}, "intervals": {}}},
    "timing": {"total": 1.0},
}  # fmt: skip


def write(folder: Path, found: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "eval.json").write_text(found if isinstance(found, str) else json.dumps(found))
    return folder


def test_every_section_has_its_type(tmp_path: Path) -> None:
    found = Evaluation.load(write(tmp_path / "pair", FILE))
    assert found["rkl"] == Estimate(0.5, (0.4, 0.6)) and found["fkl"] == Estimate(None, None)
    assert found.value("teacher", "entropy") == 1 and found.value("before", "rkl") is None
    assert (found.models, found.name, found.folder) == (["teacher", "student"], "pair", tmp_path / "pair")
    assert found.findings == [Finding("closer", "?", "yes", {"rkl": Estimate(1.0, (0.0, 2.0))}, ".")]
    assert found.finding("closer") is found.findings[0] and found.finding("varied") is None
    assert [point.sampling_temperature for point in found.sweep["student"]] == [0.5, 1.5]
    assert found.sweep["student"][1].values == {"rouge_l": 3.0}
    assert found.coverage["student"].distinct_answers == [1.0, 2.0]
    assert found.tail is not None and found.tail.means == {"student": [0.5, None]}
    assert found.reliability is not None and found.reliability.mass["student"].counts == [3, 0]
    assert found.distributions is not None and found.distributions.counts["student"] == {"entropy": [3]}
    assert found.suites["dolly"].value("student", "rkl") == 0.4
    assert found.num_units("answers") == 7 and found.num_units("tokens") == 9
    assert found.samples == found.heldout == found.predictions == []
    with pytest.raises(DrklError, match=r"There is no metric 'rlk' of generation\. Did you mean 'rkl'"):
        found["rlk"]


def without(value: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: entry for name, entry in value.items() if name not in names}


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    found = Evaluation.load(write(tmp_path / "a", FILE))
    found.lines["samples"] = [{"model": "student", "text": "x"}]
    folder = found.save(tmp_path / "b")
    written = json.loads((folder / "eval.json").read_text())
    expected = copy.deepcopy(FILE)
    expected["sweep"]["student"].reverse()
    expected["suites"]["dolly"]["intervals"] = {}
    assert written.keys() - expected.keys() == {"files", "checksum"}
    assert without(written, "files", "checksum") == expected
    assert json.loads((folder / "samples.jsonl").read_text()) == {"model": "student", "text": "x"}
    assert not (folder / "heldout.jsonl").exists()


def test_a_run_has_the_name_in_its_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "moved", FILE)
    (folder / "config.yaml").write_text("run: {name: first}\n")
    assert Evaluation.load(folder).name == "first"


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.name)
def test_the_committed_files_of_the_first_format_are_read(path: Path) -> None:
    raw, found = json.loads(path.read_text()), Evaluation.load(path)
    assert "format" not in raw and "after" in raw and "after" not in found.models
    assert found.numbers.values["student"] == raw["after"] and found.name == path.name.removesuffix(".eval.json")
    assert found.findings and {finding.id for finding in found.findings} >= {"overconfident_by_data", "closer"}
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["format"] == 2 and not re.search(r'"after":', text)


def test_lines_of_the_first_format_are_renamed(tmp_path: Path) -> None:
    old = {"settings": {}, "after": {"rkl": 1.0}, "intervals": {"after": {"rkl": [0.5, 2.0]}}}
    folder = write(tmp_path, old)
    line = {"model": "after", "row_id": "a", "num_tokens": 3, "sums": {}, "bins": {}}
    (folder / "heldout.jsonl").write_text(json.dumps(line) + "\n")
    found = Evaluation.load(folder)
    assert found.heldout[0]["model"] == "student" and found["rkl"].interval == (0.5, 2.0)


def broken(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for part in path:
            found = found[int(part)] if part.isdigit() else found[part]
        found[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken("student.rkl", "much"), r"eval\.json: student\.rkl: .*; got 'much'\. `drkl evaluate` writes it anew"),
        (broken("student.rkl", True), r"student\.rkl: "),
        (broken("teacher.entropy", [1]), r"teacher\.entropy: "),
        (broken("teacher", 3), r"teacher: "),
        (broken("student", None), r"student: the numbers of the student are missing"),
        (broken("intervals.student.rkl", [1.0]), r"intervals\.student\.rkl"),
        (broken("intervals", []), r"intervals: "),
        (broken("settings", 3), r"settings: "),
        (broken("settings.sampling_temperature", "hot"), r"settings\.sampling_temperature: "),
        (broken("settings.models", ["s"]), r"settings\.models: "),
        (broken("sweep.student.0.sampling_temperature", None), r"sweep\.student\.0\.sampling_temperature"),
        (broken("sweep.student.0.rouge_l", "x"), r"sweep\.student\.0\.rouge_l"),
        (broken("coverage.student.samples", [1]), r"coverage\.student: expected 1 entries, found 2"),
        (broken("tail.student", [0.5]), r"tail: expected 2 entries, found 1"),
        (broken("reliability.edges", [0.0, 1.0]), r"reliability: expected 1 entries, found 2"),
        (broken("reliability.student", {}), r"reliability\.student"),
        (broken("distributions.edges.entropy", [0.0]), r"distributions: expected 0 entries, found 1"),
        (broken("findings.0.answer", "perhaps"), r"findings\.0\.answer: "),
        (broken("suites.dolly.student", 1), r"suites\.dolly\.student"),
        (broken("classes", "ab"), r"classes: "),
        (broken("format", 3), r"has the format 3, and this drkl reads the formats 1 to 2"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused_by_file_and_key(tmp_path: Path, change: Any, message: str) -> None:
    found = copy.deepcopy(FILE)
    change(found)
    with pytest.raises(DrklError, match=message):
        Evaluation.load(write(tmp_path, found))


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"student\.rkl: .*finite"):
        Evaluation.load(write(tmp_path, json.dumps(FILE).replace('"rkl": 0.5', '"rkl": NaN')))


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "holds a list; expected an object"), ("{", r"eval\.json is not valid json")]
)
def test_other_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DrklError, match=message):
        Evaluation.load(write(tmp_path, text))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="There is no folder"):
        Evaluation.load(tmp_path / "none")
    with pytest.raises(DrklError, match=r"has no eval\.json; `drkl evaluate"):
        Evaluation.load(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("3", r"samples\.jsonl:1 holds a int"), ('{"model": "student"}', r"samples\.jsonl:1 lacks prompt_id, prompt, ")],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    folder = write(tmp_path, FILE)
    (folder / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(DrklError, match=message):
        Evaluation.load(folder).samples  # noqa: B018


def test_one_in_memory_has_no_folder(tmp_path: Path) -> None:
    found = Evaluation(Numbers({"student": {"rkl": 1.0}}), {})
    assert str(found) == "evaluation" and found.folder is None and found.samples == []
    assert Evaluation.load(found.save(tmp_path / "x")).name == "x"


def test_what_is_no_folder_is_refused() -> None:
    with pytest.raises(DrklError, match="Expected an Evaluation, or the folder of one; got a int"):
        Evaluation.load(3)  # type: ignore[arg-type]
