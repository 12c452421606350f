"""The parts of docs/evidence.md that `make docs` makes of the studies in studies/drkl/."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.rows import read_rows
from drkl.display import number
from drkl.evaluation.declared import Metric
from drkl.evaluation.result import SCALED
from drkl.reporting.text import count
from drkl.studies.definition import MODEL, Definition, read_definition
from drkl.studies.grid import cells_of, label
from drkl.studies.metrics import known_metrics
from drkl.studies.result import bracketed, show_p, with_interval
from drkl.studies.words import in_sentence
from scripts import pushes_page
from scripts.families_page import markdown

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "studies" / "drkl"
ON_POLICY = {"rollouts.share": 1.0}
DRKL, RKL, FKL = ({"objective.name": name} for name in ("drkl", "rkl", "fkl"))
TIMED = ROOT / "benchmarks" / "results" / "fused_loss.csv"
STEPS = TIMED.with_name("train_step.csv")
SMALL_COST = 0.02
"""Up to this share of a step is called no extra cost: seconds vary by as much from one run to the next."""


@dataclass(frozen=True)
class Part:
    """A part of the study: one file in studies/drkl/."""

    name: str
    pair: str
    like: str = ""
    """The part whose cells take as long, for the price of one of which no cell has finished."""
    taken: int = 0
    """How many of its cells are those of another part."""

    @property
    def definition(self) -> Definition:
        return read_definition(STUDIES / f"{self.name}.yaml")

    @property
    def result(self) -> dict[str, Any] | None:
        """Its study.json; None before the first cell has finished."""
        path = STUDIES / self.name / "study.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


PARTS = (
    Part("instruction", "SmolLM2-135M-Instruct to ten of its thirty layers, on Dolly"),
    Part("on-policy", "the same, on what the student writes", "instruction", 9),
    Part("near", "a GPT-2 of 4 M parameters to half of its layers, on books"),
    Part("summaries", "a T5 of 9 M parameters to half of its layers, on SciTLDR"),
    Part("classes", "a BERT classifier of 77 intents to half of its layers, on banking77"),
    Part("temperature", "the pair of part 1, with temperatures in the loss", "instruction", 4),
    Part("dialogue", "SmolLM2-135M-Instruct to ten of its thirty layers, on Schema-Guided Dialogue", "instruction"),
    Part("instruction-rest", "the pair of part 1, with the other objectives", "instruction", 9),
    Part("beyond", "the pair of part 1, with one setting of the operator", "instruction", 9),
    Part("near-weights", "the pair of part 3, with other weights of the tail", "near", 10),
    Part("scaled", "the students of part 1, with a temperature fitted after training", "instruction", 15),
    Part("against-drkl", "the students of parts 1, 8 and 9, against DRKL's", "instruction", 18),
)


@dataclass(frozen=True)
class Seen:
    """A verdict that a claim of the article rests on: what the claim says of one metric of one part."""

    part: str
    metric: str
    cell: Mapping[str, Any]
    against: Mapping[str, Any]
    claimed: str = "better"


@dataclass(frozen=True)
class Claim:
    """A statement of the article, in a row of the table."""

    text: str
    seen: tuple[Seen, ...]
    more: str = ""
    """What decides it that is no verdict of a study."""
    decided: str = ""
    """What decides where no verdict does: the cost of the loss, or the pushes of trained students."""
    is_trade: bool = False
    """Whether it claims closeness and variety at once, so that it is said in which pairs both are as claimed."""


def variant(name: str) -> dict[str, str]:
    return {"variant": name}


MAIN = ("instruction", "on-policy", "near", "summaries")
"""Parts 1 to 4, which compare DRKL with reverse KL and with forward KL; part 7 compares it with reverse KL alone."""


def in_parts(metric: str, against: str, claimed: str = "better", *, of: Sequence[str] = ()) -> tuple[Seen, ...]:
    """The same comparison of DRKL in the parts that make it."""
    found = []
    for part in of or (*MAIN, *(["dialogue"] if against == "rkl" else [])):
        if part in ("near", "instruction-rest"):
            found.append(Seen(part, metric, variant("drkl"), variant(against), claimed))
        else:
            share = ON_POLICY if part == "on-policy" else {}
            found.append(Seen(part, metric, DRKL | share, {"objective.name": against} | share, claimed))
    return tuple(found)


CLAIMS = (
    Claim(
        "Reverse KL pushes the target up even where its probability is matched",
        (),
        "The gradient has this term ([article.md](article.md), checked in float64).",
        "pushes",
    ),
    Claim("Its students are overconfident, more than DRKL's", in_parts("overconfidence", "rkl")),
    Claim(
        "They are less diverse than DRKL's (better: a Distinct-2 nearer to the teacher's)",
        in_parts("distinct_2", "rkl"),
    ),
    Claim("Reverse KL starves the tail, DRKL supervises it", in_parts("tail_rkl", "rkl")),
    Claim(
        "DRKL has the better trade-off than reverse KL: closeness kept, more diversity",
        (
            *in_parts("rkl", "rkl", "better or no difference"),
            *in_parts("fkl", "rkl", "better or no difference"),
            *in_parts("distinct_2", "rkl"),
            *in_parts("rouge_l_when_as_varied", "rkl"),
        ),
        is_trade=True,
    ),
    Claim(
        "than forward KL",
        (
            *in_parts("rkl", "fkl"),
            *in_parts("fkl", "fkl"),
            *in_parts("distinct_2", "fkl"),
            *in_parts("rouge_l_when_as_varied", "fkl"),
        ),
        is_trade=True,
    ),
    Claim(
        "than Jensen-Shannon",
        (
            Seen("near", "rkl", variant("drkl"), variant("gjs")),
            Seen("near", "distinct_2", variant("drkl"), variant("gjs")),
            Seen("instruction-rest", "rkl", variant("drkl"), variant("gjs")),
            Seen("instruction-rest", "distinct_2", variant("drkl"), variant("gjs")),
        ),
        is_trade=True,
    ),
    Claim(
        "In summaries, more ROUGE and more lexical diversity than reverse KL",
        (*in_parts("rouge_l", "rkl", of=("summaries",)), *in_parts("distinct_2", "rkl", of=("summaries",))),
    ),
    Claim(
        "A gain on SRKL (Figure 4), as `drkl(skew=0.1)`",
        tuple(
            Seen("instruction-rest", metric, variant("drkl-srkl"), variant("srkl"))
            for metric in ("overconfidence", "distinct_2", "rkl", "rouge_l_when_as_varied")
        ),
    ),
    Claim("No extra cost", (), "", "cost"),
    Claim(
        "Better calibrated classifiers than reverse KL",
        (Seen("classes", "ece", DRKL, RKL),),
    ),
    Claim(
        "Adding a temperature, which the article leaves open: one of 2 in the loss takes overconfidence from reverse "
        "KL, DRKL has less under the same, and is better calibrated than reverse KL with one fitted after training",
        (
            Seen("temperature", "overconfidence", RKL | {"loss.temperature": 2.0}, RKL | {"loss.temperature": 1.0}),
            Seen("temperature", "overconfidence", DRKL | {"loss.temperature": 2.0}, RKL | {"loss.temperature": 2.0}),
            Seen("scaled", "ece", DRKL, RKL | {MODEL: SCALED}),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """What all studies found, as far as they have run."""

    by_part: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Results:
        found = {part.name: part.result for part in PARTS}
        return cls({name: result for name, result in found.items() if result is not None})

    def verdict(self, seen: Seen) -> dict[str, Any] | None:
        """The verdict that was asked for; None where its part has not run so far."""
        for row in self.by_part.get(seen.part, {}).get("verdicts", ()):
            sides = _full(row["axes"], seen.cell), _full(row["baseline"], seen.against)
            if (row["metric"], row["axes"], row["baseline"]) == (seen.metric, *sides):
                return dict(row)
        return None


def _full(axes: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked, with an axis that it leaves open as the row has it; another model is never meant silently."""
    left = {key: value for key, value in axes.items() if key not in asked and key != MODEL}
    return left | dict(asked)


def parts(results: Results) -> dict[str, str]:
    """Return the parts of the page by their names."""
    pushes = read_rows(pushes_page.ROWS)
    return {
        "price": _price(results),
        "means": _means(results),
        "scaled": _scaled(results),
        "primary": _primary(results),
        "exploratory": _exploratory(results),
        "predictions": predictions(results),
        "settings": _settings(),
        "cost": _cost(),
        "claims": claims(results, pushes),
        "pushes": pushes_page.table(pushes),
    }


# Price ----------------------------------------------------------------------------------------------------------------


def _price(results: Results) -> str:
    rows, spent, left = [], 0.0, 0.0
    took = {name: _seconds(name, result) for name, result in results.by_part.items()}
    for place, part in enumerate(PARTS, 1):
        result, cells, own = results.by_part.get(part.name), len(cells_of(part.definition)), took.get(part.name, [])
        done = 0 if result is None else len(done_cells(result))
        taken = done - len(own)
        open_cells = cells - done - max(part.taken - taken, 0)
        like = own or took.get(part.like)
        price = open_cells * fmean(like) / 3600 if like else None
        spent, left = spent + sum(own) / 3600, left + (price or 0.0)
        seeds = len(part.definition.axes["run.seed"])
        rows.append(
            [f"{place}. [{part.name}](../studies/drkl/{part.name}.yaml)", part.pair, f"{done} of {cells}",
             str(seeds), number(sum(own) / 3600, 1), number(price, 1) if open_cells else "0"]
        )  # fmt: skip
    rows.append(["all", "", "", "", number(spent, 1), number(left, 1)])
    return markdown(["part", "pair", "runs done", "seeds", "hours spent", "hours left, as priced"], rows)


CORES = 2


def _seconds(part: str, result: Mapping[str, Any]) -> list[float]:
    """What each finished cell of the study's own took, its share of the start among it, as if it had had both cores."""
    seconds = []
    for cell in _own(done_cells(result)):
        made = json.loads((STUDIES / part / cell["run"] / "env.json").read_text(encoding="utf-8"))
        seconds.append(sum(cell["seconds"].values()) * min(made["num_threads"], CORES) / CORES)
    return seconds


def done_cells(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of a study that are done."""
    return [cell for cell in result["cells"] if cell["state"] == "done"]


def _own(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells that are not those of another study."""
    return [cell for cell in cells if not cell["run"].startswith("..")]


NOTHING = "No part has run so far."


# Tables ---------------------------------------------------------------------------------------------------------------

SHOWN = ("rkl", "fkl", "agreement", "overconfidence", "ece", "tail_rkl", "distinct_2", "self_bleu", "distinct_answers",
         "teacher_nll_of_answers", "rouge_l_when_as_varied", "rouge_l_best_when_as_varied")  # fmt: skip
"""The metrics of the tables of means and of exploratory verdicts, of those that a part decides on."""
CLASS_SHOWN = ("ece", "overconfidence", "brier", "fkl", "rkl", "agreement", "accuracy")


def _metrics(result: Mapping[str, Any]) -> list[Metric]:
    known = known_metrics(result["task"])
    shown = CLASS_SHOWN if result["task"] == "classification" else SHOWN
    return [known[key] for key in shown if key in {row["metric"] for row in result["verdicts"]}]


def _means(results: Results) -> str:
    """The mean of every kind of cell over its seeds, a table for each part."""
    sections = []
    for part in PARTS:
        if (result := results.by_part.get(part.name)) is None:
            continue
        metrics, kinds = _metrics(result), _kinds(result)
        teacher = next(iter(kinds.values()))[0]["teacher"]
        rows = [["teacher", "", *(metric.show(teacher.get(metric.key)) for metric in metrics)]]
        for name, cells in kinds.items():
            values = [[cell["metrics"][m.key] for cell in cells if cell["metrics"].get(m.key) is not None]
                      for m in metrics]  # fmt: skip
            shown = [_with_spread(metric, own) for metric, own in zip(metrics, values, strict=True)]
            rows.append([name, str(len(cells)), *shown])
        heads = [f"{metric.title}{f', {metric.unit}' if metric.unit else ''}" for metric in metrics]
        sections.append(f"**{part.name}**\n\n{markdown(['', 'seeds', *heads], rows)}")
    return "\n\n".join(sections) or NOTHING


SCALED_SHOWN = ("ece", "overconfidence", "fkl", "rkl")


def _scaled(results: Results) -> str:
    """Means over seeds before and after a temperature on the logits, of every kind of cell; each part's own cells."""
    rows = []
    for part in PARTS:
        if (result := results.by_part.get(part.name)) is None:
            continue
        known = known_metrics(result["task"])
        for name, cells in _kinds(result).items():
            own = [cell for cell in _own(cells) if cell["scaled"]]
            if not own:
                continue
            shown = []
            for metric in (known[key] for key in SCALED_SHOWN):
                pair = [fmean(cell[model][metric.key] for cell in own) for model in ("metrics", SCALED)]
                fine = metric.finer.fine_enough(*pair)
                shown.append(f"{fine.show(pair[0])} → {fine.show(pair[1])}")
            rows.append([part.name, name, str(len(own)), *shown])
    titles = [known_metrics("generation")[key].title for key in SCALED_SHOWN]
    return markdown(["part", "cells", "seeds", *titles], rows) if rows else NOTHING


def _kinds(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for cell in done_cells(result):
        axes = {key: value for key, value in cell["axes"].items() if key != "run.seed"}
        kinds.setdefault(label(axes), []).append(cell)
    return kinds


def _with_spread(metric: Metric, values: Sequence[float]) -> str:
    """The mean, and half of its 95 % t interval over seeds."""
    if not values:
        return ""
    mean, half = pushes_page.with_spread(values)
    if half is None:
        return metric.finer.fine_enough(mean).show(mean)
    shown = metric.finer.fine_enough(mean, half).fine_enough(10 * half)
    return f"{shown.show(mean)} ± {shown.show(half)}"


def _primary(results: Results) -> str:
    rows = []
    for part in PARTS:
        result = results.by_part.get(part.name, {})
        for row in result.get("verdicts", ()):
            if not row["exploratory"]:
                rows.append([part.name, *_cells(row, result["task"]), str(row["seeds"]), show_p(row["p_holm"])])
    head = ["part", "metric", "cell", "against", "verdict", "difference", "interval over prompts", "seeds", "p (Holm)"]
    return markdown(head, rows) if rows else NOTHING


def _cells(row: Mapping[str, Any], task: str) -> list[str]:
    metric = known_metrics(task)[row["metric"]]
    unit = f" ({metric.unit})" if metric.unit else ""
    return [f"{metric.title}{unit}", label(row["axes"]), label(row["baseline"]), bold(row["verdict"]),
            _difference(metric, row), bracketed(metric, row["difference"], row["prompts_interval"])]  # fmt: skip


def bold(verdict: str) -> str:
    """A verdict that decides something in bold."""
    return verdict if verdict == "undecided" else f"**{verdict}**"


def _difference(metric: Metric, row: Mapping[str, Any]) -> str:
    return with_interval(metric, row["difference"], row["interval"])


def _exploratory(results: Results) -> str:
    """For each part, metrics by pairs of kinds: the verdict and the difference."""
    sections = []
    for part in PARTS:
        if (result := results.by_part.get(part.name)) is None:
            continue
        rows = [row for row in result["verdicts"] if row["exploratory"] and row["difference"] is not None]
        metrics = [metric for metric in _metrics(result) if any(row["metric"] == metric.key for row in rows)]
        pairs = list(dict.fromkeys((label(row["axes"]), label(row["baseline"])) for row in rows))
        cells = {(row["metric"], label(row["axes"]), label(row["baseline"])): row for row in rows}
        table = []
        for pair in pairs:
            own = [cells.get((metric.key, *pair)) for metric in metrics]
            table.append(
                [f"{pair[0]} against {pair[1]}"]
                + ["" if row is None else f"{bold(row['verdict'])} {_difference(metric, row)}"
                   for metric, row in zip(metrics, own, strict=True)]
            )  # fmt: skip
        if table:
            heads = [f"{metric.title}{f', {metric.unit}' if metric.unit else ''}" for metric in metrics]
            sections.append(f"**{part.name}**\n\n{markdown(['', *heads], table)}")
    return "\n\n".join(sections) or NOTHING


EARLIER = "earlier run"
"""What the text of a prediction has that rests on an earlier run."""
KNOWN_SEED = "scaled"
"""The part that was predicted with one of its seeds known."""


def predictions(results: Results) -> str:
    """Each prediction with its verdict, and how many came true."""
    rows, counts, nothing = [], {True: 0, False: 0, None: 0}, 0
    known = dict(counts)
    for part in PARTS:
        result = results.by_part.get(part.name)
        asked = part.definition.model_dump(mode="json")["predictions"] if result is None else result["predictions"]
        for one in asked:
            came = one.get("came_true") if result is not None else None
            counts[came] += 1
            known[came] += part.name == KNOWN_SEED or EARLIER in one["text"]
            nothing += came is True and one.get("expect") == "undecided"
            outcome = {True: "came true", False: "did not come true", None: "open"}[came]
            verdict = "not run" if result is None else one.get("verdict") or ""
            rows.append([part.name, one["text"].strip(), one.get("expect") or "", verdict, outcome])
    told = (
        f"{counts[True]} came true ({nothing} of them expected nothing to be decided), {counts[False]} did not, "
        f"{counts[None]} are open. Of those that rest on numbers of an earlier run or of a seed that had run, "
        f"{known[True]} came true, {known[False]} did not, {known[None]} are open."
    )
    return f"{markdown(['part', 'prediction', 'expected', 'verdict', 'outcome'], rows)}\n\n{told}"


SETTINGS = ROOT / "docs" / "results" / "settings.csv"
KEPT = 0.8
"""Of the fall in reverse KL that DRKL's step has, a setting that is to be tried keeps this share at least."""


def _settings() -> str:
    """What a step of each setting changes at first order, a table for each student, the one that is chosen in bold."""
    with SETTINGS.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    metrics = ("soft_agreement", "overconfidence", "fkl", "rkl")
    sections = []
    for student in dict.fromkeys(line["student"] for line in lines):
        own = [line for line in lines if line["student"] == student]
        rows = []
        for line in own:
            bold = "**" if line["setting"] in chosen_settings(own)[:1] else ""
            changes = [number(float(line[f"d_{metric}"]), 4, signed=bool(line["loss"])) for metric in metrics]
            rows.append([f"{bold}`{line['setting']}`{bold}" if line["loss"] else line["setting"], *changes])
        head = ["setting", "agreement, smoothed", "overconfidence", "forward KL", "reverse KL"]
        sections.append(f"**{student}**\n\n{markdown(head, rows)}")
    return "\n\n".join(sections)


def chosen_settings(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """The settings that keep DRKL's calibration and closeness by the gradients, that with most agreement first."""
    known = {line["setting"]: {key: float(line[key]) for key in line if key.startswith("d_")} for line in lines}
    own = known["drkl:0.5"]
    fit = [
        name
        for name, change in known.items()
        if name not in ("its value", "drkl:0.5")
        and change["d_overconfidence"] <= own["d_overconfidence"]
        and change["d_rkl"] <= KEPT * own["d_rkl"]
    ]
    return sorted(fit, key=lambda name: -known[name]["d_soft_agreement"])


def _cost() -> str:
    """The loss of DRKL beside that of reverse KL, each row two lines of benchmarks/results/fused_loss.csv."""
    head = ["positions", "vocabulary", "vector instructions", "reverse KL, s", "DRKL, s", "ratio"]
    rows = [
        [number(int(positions), 0), number(int(vocab), 0), instructions, number(rkl, 3), number(drkl, 3),
         number(drkl / rkl, 2)]
        for (positions, vocab, instructions), rkl, drkl in _timed()
    ]  # fmt: skip
    return markdown(head, rows)


def _timed() -> list[tuple[tuple[str, str, str], float, float]]:
    """Seconds of both losses by positions, vocabulary and instructions, the least of the rounds of today's code."""
    with TIMED.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["code"] == "today"]
    found = {
        (line["variant"], line["positions"], line["vocab"], line["instructions"]): float(line["least_s"])
        for line in lines
    }
    places = [key[1:] for key in found if key[0] == "fused rkl" and ("fused drkl", *key[1:]) in found]
    return [(place, found["fused rkl", *place], found["fused drkl", *place]) for place in places]


# Claims -------------------------------------------------------------------------------------------------------------


def claims(results: Results, pushes: pushes_page.Rows) -> str:
    """Each claim of the article, what it is here, and what that rests on."""
    rows = []
    for claim in CLAIMS:
        found = [(seen, results.verdict(seen)) for seen in claim.seen]
        texts = [seen_in_words(seen, row, results) for seen, row in found]
        said, more = claim.decided or outcome(found), claim.more or (_both(found) if claim.is_trade else "")
        if said == "cost":
            said, more = _cost_in_words()
        if said == "pushes":
            by_part, texts = pushes_page.outcome(pushes)
            said = in_one_word(by_part)
        rows.append([claim.text, f"**{said}**", "<br>".join(filter(None, [more, *texts]))])
    return markdown(["the article says", "here", "verdicts behind it"], rows)


def _cost_in_words() -> tuple[str, str]:
    """The outcome for the claim of no extra cost, by what the loss adds to a whole step, and the numbers behind it."""
    ratios = [drkl / rkl for _, rkl, drkl in _timed()]
    (place, rkl, drkl) = next(line for line in _timed() if line[0] == ("1024", "49152", "AVX512"))
    with STEPS.open(encoding="utf-8", newline="") as file:
        step = next(line for line in csv.DictReader(file) if line["variant"] == "drkl, objective drkl")
    added = (drkl - rkl) / int(place[0]) * float(step["tokens_per_step"]) / float(step["median_s_per_step"])
    said = (
        f"The loss takes {number(min(ratios), 2)} to {number(max(ratios), 2)} times as long as reverse KL's. That adds "
        f"{number(100 * added, 1)} % to a training step, and up to {number(100 * SMALL_COST, 0)} % counts as none here."
    )
    return ("held" if added <= SMALL_COST else "not held"), said


def _both(found: Sequence[tuple[Seen, Mapping[str, Any] | None]]) -> str:
    """In which parts closeness by reverse KL and variety are both as a claim has them."""
    held = {(seen.part, seen.metric) for seen, row in found if holds(seen, row) == "held"}
    parts_of = dict.fromkeys(seen.part for seen, _ in found)
    both = [part for part in parts_of if {(part, "rkl"), (part, "distinct_2")} <= held]
    return f"Closeness by reverse KL and variety both in: {', '.join(both) or 'none'}."


def holds(seen: Seen, row: Mapping[str, Any] | None) -> str:
    """Whether a verdict is as the claim has it."""
    if row is None or row["difference"] is None:
        return "not run"
    if row["verdict"] == "undecided":
        return "undecided"
    return "held" if row["verdict"] in seen.claimed.split(" or ") else "not held"


def outcome(found: Sequence[tuple[Seen, Mapping[str, Any] | None]]) -> str:
    """One word for a claim where its verdicts agree, else how many say what."""
    return in_one_word([holds(seen, row) for seen, row in found])


def in_one_word(said: Sequence[str]) -> str:
    """One word where all say the same, else how many say what."""
    counts = Counter(said)
    if len(counts) == 1:
        return next(iter(counts))
    order = ("held", "not held", "undecided", "not run")
    return ", ".join(f"{what} in {counts[what]}" for what in order if counts[what])


def seen_in_words(seen: Seen, row: Mapping[str, Any] | None, results: Results) -> str:
    metric = known_metrics(results.by_part[seen.part]["task"] if seen.part in results.by_part else "generation").get(
        seen.metric
    )
    pair = f"{label(seen.cell)} against {label(seen.against)}"
    title = in_sentence(metric.title) if metric else seen.metric
    if row is None or metric is None:
        return f"{seen.part}, {pair}, {title}: not run"
    return f"{seen.part}, {pair}, {title}: {row['verdict']}, {_difference(metric, row)}, {_basis(row)}"


def _basis(row: Mapping[str, Any]) -> str:
    """How many seeds a verdict rests on, and whether it was corrected for its family."""
    return f"{count(row['seeds'], 'seed')}{', exploratory' if row['exploratory'] else ''}"
