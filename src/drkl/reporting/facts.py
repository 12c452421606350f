"""The facts about a run that a report shows beside its numbers: models, data, hardware and commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from drkl.display import as_number, shell_line, shell_word
from drkl.reporting.inputs import Run
from drkl.reporting.text import clip, count, duration, joined, magnitude, short

CONFIG_LIMIT = 20_000


def facts(run: Run) -> list[tuple[str, str]]:
    """The lines under the title: what was distilled, how, and on what."""
    env, student = run.env, run.section("student")
    parameters = _mapping(env.get("parameters"))
    rows = []
    if run.teacher:
        rows.append(("Teacher", run.teacher + _size(parameters.get("teacher"))))
    if run.is_pair:
        return [*rows, ("Student", run.subtitles["student"] or "student"), *_measured(run)]
    layers, init = student.get("layers"), student.get("init", "?")
    origin = f"{init}" + (f", {len(layers) if isinstance(layers, list) else layers} layers" if layers else "")
    if init == "pretrained" and student.get("model"):
        origin = str(student["model"])
    rows.append(("Student", short(origin, 60) + _size(parameters.get("student"))))
    plan = " \N{RIGHTWARDS ARROW} ".join(
        stage.objective + (f" ({count(stage.end - stage.start, 'step')})" if stage.end > stage.start else "")
        for stage in run.stages
    )
    rows.append(("Objective", plan))
    seconds = [stage.seconds for stage in run.stages if stage.seconds is not None]
    if len(seconds) == len(run.stages):
        device = short(str(env.get("device_name") or env.get("device") or ""), 40)
        rows.append(("Trained in", duration(sum(seconds)) + (f" on {device}" if device else "")))
    if started := _date(env.get("started")):
        rows.append(("Started", started))
    return rows


def _measured(run: Run) -> list[tuple[str, str]]:
    """Return the settings with which a pair was evaluated."""
    rows = []
    for key, title in (("protocol", "Protocol"), ("suites", "Suites")):
        if value := run.settings.get(key):
            rows.append((title, short(", ".join(map(str, value)) if isinstance(value, list) else str(value), 80)))
    return rows


def _size(parameters: Any) -> str:
    known = as_number(parameters)
    return "" if known is None else f" \N{MIDDLE DOT} {magnitude(known)} parameters"


def _date(value: Any) -> str:
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return ""


def notes(runs: Sequence[Run]) -> list[str]:
    """Return notes on the numbers: their sample sizes and limits."""
    run = runs[0]
    lines = [_basis(run)] if run.evaluation is not None else []
    lines += [str(note) for own in runs if own.evaluation is not None and (note := own.settings.get("teacher_note"))]
    if len(runs) == 1 and run.evaluation is not None and (scaling := run.evaluation.scaling) is not None:
        lines.append(
            f"The scaled student is the student, {scaling.words}; its intervals hold the temperatures fixed, and it "
            f"answers nothing. {scaling.note}".rstrip()
        )
    if any(one.on_classes for one in runs):
        lines.append(
            "While training, a teacher was known on its k most probable tokens and all others as one class: the KLs "
            "and the teacher's entropy in the training curves are of these k + 1 classes, lower bounds."
        )
    if len(runs) == 1 and not run.is_pair and run.has_teacher and run.task != "classification":
        lines.append(_other_objective(run))
    return lines


def _basis(run: Run) -> str:
    parts = [
        count(value, noun)
        for key, noun in (("num_tokens", "held-out token"), ("num_rows", "held-out text"))
        if (value := run.value("student", key)) is not None
    ]
    prompts, samples = (as_number(run.settings.get(key)) for key in ("prompts", "samples_per_prompt"))
    if prompts and samples:
        parts.append(f"{count(prompts, 'prompt')} with {count(samples, 'sample')} each")
    parts.append("one student" if run.is_pair else "one training seed")
    text = f"The numbers rest on {joined(parts)}."
    if run.evaluation is not None and run.evaluation.numbers.intervals:
        return f"{text} The intervals say what other rows and prompts would change, not what another seed would."
    return f"{text} Without intervals, small differences between models or runs are not evidence."


def _other_objective(run: Run) -> str:
    assert run.folder is not None
    other = "rkl" if run.objective != "rkl" else "drkl"
    root = run.folder.root
    beside = root.parent / f"{run.folder.name}-{other}"
    config, name, own, new = (shell_word(x) for x in (run.folder.config_path, beside.name, root, beside))
    return (
        f"One run cannot say what the objective contributes. To see it, train the same with {other} in the last stage "
        f"and report on both: `drkl distill {config} objective.name={other} run.name={name}`, `drkl evaluate {new}`, "
        f"`drkl report {own} {new}`."
    )


def unevaluated(run: Run) -> str:
    """Return the text that replaces the answers where there is no evaluation."""
    if run.is_pair:
        return "Student and teacher were analysed; what they write was not evaluated."
    assert run.folder is not None
    evaluate = f"`drkl evaluate {shell_word(run.folder.root)}`"
    text = f"This run has not been evaluated. {evaluate} does that; then write the report again."
    for key, title in (("rkl", "reverse KL"), ("nll", "negative log-likelihood")):
        curve = run.stages[-1].curve(key, heldout=True)
        title += " of k + 1 classes" if run.on_classes and key == "rkl" else ""
        if curve:
            return (
                f"{text} At the last check on held-out rows during training, at step {curve.steps[-1]:,.0f}, its "
                f"{title} was {curve.values[-1]:.2f} nats."
            )
    return text


def data_of(run: Run) -> list[tuple[str, str]]:
    """Return the source of the rows, and how many were left out."""
    if run.is_pair:
        known = {key: value for key, value in _mapping(run.settings.get("data")).items() if value not in (None, [], {})}
        return [(short(key).replace("_", " "), short(str(value), 120)) for key, value in known.items()]
    data = _mapping(run.env.get("data"))
    rows = []
    for key, title in (
        ("train_rows", "Training rows"),
        ("rows_read", "Rows read from the stream"),
        ("heldout_rows", "Held-out rows"),
    ):
        if (rows_of := as_number(data.get(key))) is not None:
            rows.append((title, f"{rows_of:,.0f}"))
    if "dropped" in data:
        dropped = {short(k).replace("_", " "): as_number(v) for k, v in _mapping(data["dropped"]).items()}
        rows.append(("Rows dropped", ", ".join(f"{k}: {v:,.0f}" for k, v in dropped.items() if v) or "none"))
    if (cut := as_number(data.get("responses_cut"))) is not None:
        what = "Texts" if run.task == "classification" else "Answers"
        rows.append((f"{what} cut at the end", f"{cut:,.0f}"))
    section = run.section("data")
    sources = section.get("sources")
    places = [place for place in sources if isinstance(place, dict)] if isinstance(sources, list) else []
    names = [place.get("path") or place.get("dataset") for place in places or [section]]
    source = ", ".join(str(name) for name in names if name)
    return [("Source", short(source, 80)), *rows] if source else rows


def settings_text(run: Run) -> str:
    """Return the evaluation's settings as yaml."""
    # The command stands among the commands, without the path of the program.
    settings = {key: value for key, value in run.settings.items() if key != "command"}
    if not settings:
        return ""
    return clip(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100), CONFIG_LIMIT).text


def environment(run: Run) -> list[tuple[str, str]]:
    """Versions and the machine."""
    known = run.env or ({"versions": run.settings.get("versions")} if run.is_pair else {})
    rows = []
    for key, value in known.items():
        if key not in ("command", "data", "parameters") and value is not None:
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            rows.append((short(str(key)).replace("_", " "), short(text, 120)))
    return rows


def commands(runs: Sequence[Run]) -> list[str]:
    """The lines that make this page again, quoted for a shell; none where an evaluation is only in memory."""
    roots = [run.folder.root for run in runs if run.folder is not None]
    if len(roots) < len(runs):
        return []
    lines = []
    for run, root in zip(runs, roots, strict=True):
        lines += _line(run.settings.get("command") if run.is_pair else run.env.get("command"))
        if not run.is_pair:
            lines.append(shell_line(["drkl", "evaluate", str(root)]))
        if run.analysis is not None:
            lines += _line(_mapping(run.analysis.get("settings")).get("command"))
    lines.append(shell_line(["drkl", "report", *map(str, roots)]))
    return list(dict.fromkeys(lines))


def _line(command: Any) -> list[str]:
    if not isinstance(command, list) or not command:
        return []
    # The path of the program says where it was on one machine, which helps nobody.
    return [shell_line([Path(str(command[0])).name, *(str(word) for word in command[1:])])]


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
