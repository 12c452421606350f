"""What `make docs` makes of the verdicts of the studies in studies/drkl/ for docs/choosing.md and README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drkl.display import ABSENT
from drkl.evaluation.declared import Metric
from drkl.evaluation.result import SCALED
from drkl.studies.definition import MODEL
from drkl.studies.metrics import known_metrics
from drkl.studies.result import finer
from scripts.evidence_page import (
    DRKL,
    FKL,
    ON_POLICY,
    RKL,
    Results,
    Seen,
    bold,
    in_parts,
    outcome,
    seen_in_words,
    variant,
)
from scripts.families_page import markdown


@dataclass(frozen=True)
class Choice:
    """What to use in a case, and the verdicts that this rests on; a row of the page once one of them has run."""

    case: str
    use: str
    because: str
    seen: tuple[Seen, ...]


def hot(temperature: float) -> dict[str, Any]:
    """The cells of reverse KL with a temperature in the loss."""
    return RKL | {"loss.temperature": temperature}


FAR, NEAR = "A student far from its teacher (over a nat), ", "A student near its teacher (below a tenth of a nat), "
CHOICES = (
    Choice(
        FAR + "trained on the data, and you would take reverse KL",
        "`drkl`",
        "It is less overconfident, nearer to the teacher's variety, and as close by reverse KL. Its answers are less "
        "likely to the teacher.",
        (
            Seen("instruction", "overconfidence", DRKL, RKL),
            Seen("instruction", "distinct_2", DRKL, RKL),
            Seen("instruction", "rkl", DRKL, RKL, "better or no difference"),
            Seen("instruction", "fkl", DRKL, RKL),
            Seen("instruction", "teacher_nll_of_answers", DRKL, RKL, "worse"),
        ),
    ),
    Choice(
        FAR + "trained on the data, and what counts is that its confidence is right, that it agrees with the teacher, "
        "or that its variety is the teacher's",
        "`fkl`",
        "Beside DRKL and reverse KL it is hardly overconfident, agrees more, and is nearer to the teacher's variety. "
        "It is farther by reverse KL, and its answers are less likely to the teacher.",
        (
            Seen("instruction", "overconfidence", DRKL, FKL, "worse"),
            Seen("instruction", "agreement", DRKL, FKL, "worse"),
            Seen("instruction", "distinct_2", DRKL, FKL, "worse"),
            Seen("instruction", "rkl", DRKL, FKL),
            Seen("instruction", "teacher_nll_of_answers", DRKL, FKL),
        ),
    ),
    Choice(
        FAR + "trained on the data, and all of this counts",
        "`decoupled` with `on_target=fkl`, `on_tail=rkl`, `weight=teacher`",
        "Against DRKL it is less overconfident, agrees more, and is closer by forward KL, at a small price by reverse "
        "KL; its answers are less likely to the teacher. It was tried on one pair.",
        (
            Seen("beyond", "overconfidence", variant("fkl-rkl"), variant("drkl")),
            Seen("beyond", "agreement", variant("fkl-rkl"), variant("drkl")),
            Seen("beyond", "fkl", variant("fkl-rkl"), variant("drkl")),
            Seen("beyond", "rkl", variant("fkl-rkl"), variant("drkl"), "worse"),
            Seen("beyond", "teacher_nll_of_answers", variant("fkl-rkl"), variant("drkl"), "worse"),
        ),
    ),
    Choice(
        "The same, and the distance by reverse KL counts most",
        "`akl`",
        "Against DRKL it is closer by both KLs, agrees more, and is less overconfident and more varied; its tails are "
        "farther, and its answers are less likely to the teacher. It is the best of ten objectives on one pair, which "
        "nothing confirms so far.",
        (
            Seen("against-drkl", "rkl", variant("akl"), variant("drkl")),
            Seen("against-drkl", "fkl", variant("akl"), variant("drkl")),
            Seen("against-drkl", "agreement", variant("akl"), variant("drkl")),
            Seen("against-drkl", "overconfidence", variant("akl"), variant("drkl")),
            Seen("against-drkl", "distinct_2", variant("akl"), variant("drkl")),
            Seen("against-drkl", "tail_rkl", variant("akl"), variant("drkl"), "worse"),
            Seen("against-drkl", "teacher_nll_of_answers", variant("akl"), variant("drkl"), "worse"),
            Seen("instruction-rest", "rkl", variant("akl"), variant("rkl")),
        ),
    ),
    Choice(
        "The same, and you would take SRKL",
        "`srkl`; `drkl` with `skew=0.1` where its confidence has to be right",
        "Decoupled it is less overconfident and more varied, but farther by reverse KL, and it agrees less.",
        (
            Seen("instruction-rest", "overconfidence", variant("drkl-srkl"), variant("srkl")),
            Seen("instruction-rest", "rkl", variant("drkl-srkl"), variant("srkl"), "worse"),
            Seen("instruction-rest", "distinct_2", variant("drkl-srkl"), variant("srkl")),
            Seen("instruction-rest", "agreement", variant("drkl-srkl"), variant("srkl"), "worse"),
        ),
    ),
    Choice(
        "The same, and which γ",
        "0.5; not 0.1",
        "A tenth trains the tail too little. A floor under the tail's weight (`weight=floor`) brings the tail closer "
        "than reverse KL does, but not the whole.",
        (
            Seen("instruction-rest", "tail_rkl", variant("drkl-0.1"), variant("drkl"), "worse"),
            Seen("instruction-rest", "rkl", variant("drkl-0.1"), variant("rkl"), "worse"),
            Seen("instruction-rest", "tail_rkl", variant("drkl-floor"), variant("rkl")),
            Seen("instruction-rest", "rkl", variant("drkl-floor"), variant("drkl"), "no difference"),
        ),
    ),
    Choice(
        "The same, and a temperature in the loss",
        "1, as it is without one",
        "It costs agreement, and the answers are less likely to the teacher. A temperature after training leaves the "
        "agreement as it is.",
        (
            Seen("temperature", "agreement", hot(2.0), hot(1.0), "worse"),
            Seen("temperature", "teacher_nll_of_answers", hot(2.0), hot(1.0), "worse"),
            Seen("temperature", "rkl", hot(4.0), hot(1.0), "worse"),
            Seen("temperature", "overconfidence", hot(2.0), hot(1.0)),
        ),
    ),
    Choice(
        FAR + "trained on what it writes itself",
        "`rkl`; `drkl` where its confidence has to be right",
        "The confidence of DRKL's student is the nearest to the teacher's. By reverse KL it is farther than reverse "
        "KL's student, and closer than forward KL's; from the teacher's variety, too, it is farther than reverse KL's.",
        (
            Seen("on-policy", "overconfidence", DRKL | ON_POLICY, RKL | ON_POLICY),
            Seen("on-policy", "overconfidence", DRKL | ON_POLICY, FKL | ON_POLICY),
            Seen("on-policy", "rkl", DRKL | ON_POLICY, RKL | ON_POLICY, "worse"),
            Seen("on-policy", "rkl", DRKL | ON_POLICY, FKL | ON_POLICY),
            Seen("on-policy", "distinct_2", DRKL | ON_POLICY, RKL | ON_POLICY, "worse"),
        ),
    ),
    Choice(
        "A student in between (0.9 nats in the pair measured), trained on the data",
        "`fkl`; `drkl` rather than `rkl`",
        "Forward KL is the least overconfident, agrees more than reverse KL, and is closer than it by reverse KL too; "
        "its answers are less likely to the teacher. DRKL is less overconfident than reverse KL, and agrees as much.",
        (
            Seen("dialogue", "overconfidence", DRKL, RKL),
            Seen("dialogue", "agreement", DRKL, RKL, "better or no difference"),
            Seen("dialogue", "rkl", DRKL, RKL, "better or no difference"),
            Seen("dialogue", "overconfidence", DRKL, FKL, "worse"),
            Seen("dialogue", "rkl", FKL, RKL),
            Seen("dialogue", "agreement", FKL, RKL),
            Seen("dialogue", "teacher_nll_of_answers", FKL, RKL, "worse"),
        ),
    ),
    Choice(
        NEAR + "which is unsure (its top token had 15 and 18 % in the pairs measured)",
        "`rkl` or `fkl`, or `drkl` with `weight=teacher`",
        "A constant γ below 1 − q_t trains the tail less than reverse KL does. There is next to no overconfidence. "
        "`weight=teacher` was tried on the first pair.",
        (
            Seen("near", "rkl", variant("drkl"), variant("rkl"), "worse"),
            Seen("summaries", "rkl", DRKL, RKL, "worse"),
            Seen("near-weights", "rkl", variant("drkl-teacher"), variant("drkl")),
        ),
    ),
    Choice(
        "The same, and which γ",
        "1, or `weight=teacher`; not 0.1",
        "The farther γ is below 1 − q_t, the less the tail is trained.",
        (
            Seen("near-weights", "rkl", variant("drkl-1"), variant("rkl"), "no difference"),
            Seen("near-weights", "rkl", variant("drkl-teacher"), variant("rkl"), "no difference"),
            Seen("near", "rkl", variant("drkl-0.1"), variant("rkl"), "worse"),
            Seen("near", "agreement", variant("drkl-0.1"), variant("rkl"), "worse"),
        ),
    ),
    Choice(
        "Summaries, and you want more ROUGE or more variety than reverse KL gives",
        "none is known to give it",
        "DRKL's summaries are as varied, and whether their ROUGE-L is another is not decided.",
        (
            Seen("summaries", "distinct_2", DRKL, RKL, "no difference"),
            Seen("summaries", "rouge_l", DRKL, RKL, "better or no difference"),
        ),
    ),
    Choice(
        "A classifier whose confidence has to be right",
        "a temperature after training, on any objective; without one `dkd`, and `drkl` rather than `rkl`",
        "One number that is fitted on held-out rows does more than DRKL; by the means it costs closeness by reverse "
        "KL. DRKL's student is closer by it than reverse KL's.",
        (
            Seen("classes", "ece", DRKL, RKL | {MODEL: SCALED}, "worse"),
            Seen("classes", "ece", {"objective.name": "dkd"}, RKL),
            Seen("classes", "ece", DRKL, RKL),
            Seen("classes", "ece", DRKL, FKL, "worse"),
            Seen("classes", "rkl", DRKL, RKL),
        ),
    ),
)


def parts(results: Results) -> dict[str, str]:
    """Return the table of docs/choosing.md by its name."""
    rows = []
    for choice in CHOICES:
        found = [(seen, results.verdict(seen)) for seen in choice.seen]
        if not any(row for _, row in found):
            continue
        texts = [seen_in_words(seen, row, results) for seen, row in found]
        sure = outcome(found).replace("held", "decided")
        rows.append([choice.case, f"**{choice.use}**", choice.because, f"**{sure}**<br>{'<br>'.join(texts)}"])
    return {"choices": markdown(["your case", "use", "because", "evidence"], rows)}


CASES = {
    "instruction": "far from its teacher",
    "on-policy": "far, trained on what it writes",
    "dialogue": "in between, in dialogues",
    "near": "near its teacher",
    "summaries": "near, on summaries",
}
SHOWN = ("overconfidence", "rkl", "fkl", "agreement", "distinct_2")
EXPLORATORY = "\\*"
"""What marks an exploratory verdict: an asterisk, as Markdown writes one."""


def _to_its_interval(metric: Metric, row: Mapping[str, Any]) -> str:
    """A difference with as many digits as its interval needs."""
    return finer(metric, row["difference"], row["interval"]).show(row["difference"], signed=True)


def digest(results: Results) -> dict[str, str]:
    """Return the table of README.md by its name: DRKL against reverse KL and forward KL in parts 1 to 4 and 7."""
    known, rows = known_metrics("generation"), []
    for part, case in CASES.items():
        for title, name in (("reverse KL", "rkl"), ("forward KL", "fkl")):
            found = [results.verdict(in_parts(key, name, of=(part,))[0]) for key in SHOWN]
            cells = [
                ABSENT
                if row is None or row["difference"] is None
                else f"{bold(row['verdict'])} {_to_its_interval(known[key], row)}{EXPLORATORY * row['exploratory']}"
                for key, row in zip(SHOWN, found, strict=True)
            ]
            seeds = max((row["seeds"] for row in found if row), default=0)
            rows.append([f"{case}, {title}", str(seeds), *cells])
    head = ["the student, and DRKL against", "seeds", "overconfidence", "reverse KL, nats", "forward KL, nats",
            "same top token, points", "Distinct-2"]  # fmt: skip
    return {"digest": markdown(head, rows)}
