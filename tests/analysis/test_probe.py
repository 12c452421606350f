"""What a top-k cache would lose: against sums in numpy over the same rows, for every kind of model; what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

import drkl
from drkl.analysis.probe import Case, LossSums, probe_pair, probe_specs
from drkl.analysis.topk import KeptLoss, ProbedObjective, percent
from drkl.errors import DrklError
from drkl.evaluation.bootstrap import Estimate
from drkl.losses import TopK
from drkl.training.pair import make_pair
from tests.command_line import Cli
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs
from tests.training.test_python import ROWS, TOKENIZER, config

GAMMA = 0.5
NAMES = ("fkl", "rkl", "drkl")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a teacher and rows are written once."""
    return tmp_path_factory.mktemp("root")


def probe(folder: Path, student: Any = None, teacher: Any = None, **changes: Any) -> drkl.TopKProbe:
    fields = changes.pop("fields", {})
    given = {"args": config(folder, **fields), "processing_class": TOKENIZER, "train_dataset": ROWS} | changes
    student = tiny.llama(1, layers=2) if student is None else student
    return drkl.probe_top_k(tiny.llama(9) if teacher is None else teacher, model=student, **given)


def named(found: drkl.TopKProbe, name: str) -> ProbedObjective:
    return next(one for one in found.objectives if one.name.split(",")[0] == name)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    result: np.ndarray = shifted / shifted.sum()
    return result


def kl(a: np.ndarray, b: np.ndarray) -> float:
    some = a > 0
    return float((a[some] * np.log(a[some] / b[some])).sum())


def value(name: str, q: np.ndarray, p: np.ndarray, target: int) -> float:
    """The definitions, on any list of classes."""
    if name == "fkl":
        return kl(p, q)
    if name == "rkl":
        return kl(q, p)
    pairs = [np.array([one[target], 1 - one[target]]) for one in (q, p)]
    tails = [np.delete(one, target) / (1 - one[target]) for one in (q, p)]
    return kl(*pairs) + GAMMA * kl(*tails)


def merged(probabilities: np.ndarray, ids: list[int]) -> np.ndarray:
    """Those of some ids, and of all others together."""
    others = np.delete(probabilities, ids)
    return np.append(probabilities[ids], others.sum()) if len(others) else probabilities[ids]


def gradient(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    found = np.zeros_like(at)
    for j in range(len(at)):
        step = np.zeros_like(at)
        step[j] = 1e-5
        found[j] = (function(at + step) - function(at - step)) / 2e-5
    return found


def summed(
    name: str, ours: list[np.ndarray], theirs: list[np.ndarray], lists: list[list[int]], T: float
) -> tuple[float, np.ndarray]:
    """An objective's sum over positions on some ids and the rest, and its gradient on all logits, end to end."""
    total, gradients = 0.0, []
    for q_logits, p_logits, ids in zip(ours, theirs, lists, strict=True):
        p = softmax(p_logits / T)

        def at(z: np.ndarray, p: np.ndarray = p, ids: list[int] = ids) -> float:
            return value(name, merged(softmax(z / T), ids), merged(p, ids), ids.index(int(p.argmax())))

        total += at(q_logits)
        gradients.append(gradient(at, q_logits))
    return total, np.concatenate(gradients)


def logits_of(model: PreTrainedModel, rows: list[Any]) -> list[np.ndarray]:
    """Those that predict a row's response, row after row, each alone."""
    found = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        with torch.no_grad():
            every = model(input_ids=ids).logits[0].double().numpy()
        found += list(every[len(row.prompt_ids) - 1 : -1])
    return found


def test_against_sums_in_numpy(tmp_path: Path) -> None:
    student, teacher, T, ks = tiny.llama(1, layers=2), tiny.llama(9), 2.0, [1, 4, 16]
    rows = ROWS[:3]
    fields = {"objective": "drkl", "temperature": T}
    found = probe(tmp_path, student, teacher, train_dataset=rows, k=ks, fields=fields)
    read = make_pair(student, teacher, config(tmp_path, **fields), rows, None, TOKENIZER).rows
    ours, theirs = logits_of(student, list(read)), logits_of(teacher, list(read))
    assert found.rows == 3 and found.positions == len(ours) and found.vocab_size == tiny.VOCAB
    assert found.hidden_bytes == 16 * 4 and found.objectives[0].own and found.objectives[0].name.startswith("drkl")
    tops = [np.argsort(-z, kind="stable") for z in theirs]
    whole = {name: summed(name, ours, theirs, [[*range(len(top))] for top in tops], T) for name in NAMES}
    for k in ks:
        mass = next(one for one in found.masses if one.k == k)
        known = [softmax(z / T)[top[:k]] for z, top in zip(theirs, tops, strict=True)]
        assert mass.mass.value == pytest.approx(np.mean([p.sum() for p in known]), rel=1e-5)
        tail = [(p.sum() - p[0]) / (1 - p[0]) for p in known]
        assert mass.tail_mass.value == pytest.approx(np.mean(tail), rel=1e-5, abs=1e-6)
        # ids of two bytes, logits of four; the label's logit, and the rest at temperatures 1 and 2
        assert mass.bytes_per_position == 6 * k + 12
        for name in NAMES:
            kept, turned = summed(name, ours, theirs, [[*top[:k]] for top in tops], T)
            exact, right = whole[name]
            cosine = turned @ right / np.linalg.norm(turned) / np.linalg.norm(right)
            measured = named(found, name)
            assert measured.value.value == pytest.approx(exact / len(ours), rel=1e-5)
            assert measured.kept[k].share.value == pytest.approx(kept / exact, rel=1e-4)
            assert measured.kept[k].angle.value == pytest.approx(np.degrees(np.arccos(cosine)), rel=1e-3)


def check_all_but_one(found: drkl.TopKProbe) -> None:
    """With all tokens but one, the rest is that one: nothing is lost."""
    for one in found.objectives:
        [loss] = one.kept.values()
        assert loss.share.value == pytest.approx(1.0, abs=1e-4), one.name
        assert loss.angle.value == pytest.approx(0.0, abs=1e-2), one.name
    assert found.masses[0].mass.value is not None and 0.9 < found.masses[0].mass.value < 1


def test_all_tokens_but_one_keep_everything(tmp_path: Path) -> None:
    found = probe(tmp_path, train_dataset=ROWS[:6], k=[tiny.VOCAB - 1])
    check_all_but_one(found)
    with_teacher = {name for name, kind in drkl.OBJECTIVES.items() if kind().needs_teacher}
    assert {one.name.split(",")[0] for one in found.objectives} == with_teacher
    kinds = {one.name: one.on_classes for one in found.objectives}
    assert {name for name, kind in kinds.items() if kind == "approximation"} == {"akl", "ab", "todi"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    [
        lambda: (tiny.t5(1), tiny.t5(2)),
        lambda: (tiny.bart(1), tiny.bart(2)),
        lambda: (tiny.gpt2(1), tiny.gpt2(2)),
        lambda: (tiny.llama(1, layers=2), tiny.llama(9).to(torch.bfloat16)),
    ],
    ids=["t5", "bart", "gpt2", "bf16 teacher"],
)
def test_other_models(tmp_path: Path, pair: Callable[[], tuple[Any, Any]]) -> None:
    student, teacher = pair()
    check_all_but_one(probe(tmp_path, student, teacher, k=[tiny.VOCAB - 1]))
    found = probe(
        tmp_path, student, teacher, k=[8], fields={"objective": "dkd", "objective_params": {"target": "label"}}
    )
    assert found.objectives[0].own and found.objectives[0].name == "this run's dkd"
    for one in found.objectives:
        share = one.kept[8].share.value
        assert share is not None and 0 < share < (1 + 1e-6 if one.on_classes == "bound" else 2)
    assert found.hidden_bytes == 16 * teacher.dtype.itemsize


@pytest.mark.slow
def test_a_student_with_an_adapter_and_unequal_vocabularies(tmp_path: Path) -> None:
    student = tiny.llama(1, vocab=70, layers=2)
    plain = probe(tmp_path, student, k=[8])
    assert plain.vocab_size == tiny.VOCAB
    pair = make_pair(
        tiny.llama(1, vocab=70, layers=2), tiny.llama(9), config(tmp_path), ROWS, None, TOKENIZER,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    own = [(drkl.make_objective("drkl"), 1.0)]
    adapted = probe_pair(pair, own, student=pair.student_name, k=[8])
    # An adapter starts as no change at all.
    assert adapted.to_json()["objectives"] == plain.to_json()["objectives"]


def test_models_are_left_as_they_are(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1, layers=2).train(), tiny.llama(9).train()
    weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    probe(tmp_path, student, teacher, train_dataset=ROWS[:3], k=[4])
    assert student.training and teacher.training and all(p.requires_grad for p in student.parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in student.state_dict().items())
    assert not any(tmp_path.iterdir())


def test_whole_rows_are_taken_evenly_spaced(tmp_path: Path) -> None:
    every = probe(tmp_path, k=[4])
    each = every.positions // len(ROWS)
    assert every.rows == len(ROWS) and every.positions == len(ROWS) * each
    some = probe(tmp_path, k=[4], positions=5 * each + 1)
    chosen = [ROWS[i] for i in (0, 5, 10, 14, 19)]
    assert (some.rows, some.positions) == (5, 5 * each)
    same = probe(tmp_path, train_dataset=chosen, k=[4])
    assert same.to_json()["objectives"] == some.to_json()["objectives"]
    one = probe(tmp_path, k=[4], positions=1)
    assert one.rows == 1 and one.positions == each  # a row is taken whole
    assert one.objectives[0].kept[4].share.interval is None  # of one row there is no spread


def test_intervals_hold_their_value_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    few: Any = {"train_dataset": ROWS[:8]}
    first, same, other = (probe(tmp_path, k=[4], seed=seed, **few) for seed in (0, 0, 1))
    assert first.to_json() == same.to_json() != other.to_json()
    assert probe(tmp_path, k=np.int64(4), **few).to_json() == first.to_json()
    for one in first.objectives:
        for estimate in (one.value, *one.kept[4]):
            assert estimate.interval is not None and estimate.value is not None
            assert estimate.interval[0] < estimate.value < estimate.interval[1]


def test_a_student_that_is_its_teacher_has_nothing_to_lose(tmp_path: Path) -> None:
    found = probe(tmp_path, tiny.llama(9), tiny.llama(9), train_dataset=ROWS[:6], k=[4])
    shares = [one.kept[4] for one in found.objectives if one.name != "ab"]
    assert all(loss.share.value is None and loss.angle.value is None for loss in shares)
    assert "is 0 here" in found.advice()[0] and json.dumps(found.to_json(), allow_nan=False)


def test_objectives_that_cannot_be_had_are_named_with_the_reason(tmp_path: Path) -> None:
    fields = {"objective": "ab", "objective_params": {"alpha": 0.5, "beta": -0.5}}
    found = probe(tmp_path, train_dataset=ROWS[:6], k=[4], fields=fields)
    own = found.objectives[0]
    assert own.own and own.kept == {} and own.on_classes is None and own.reason is not None
    assert "alpha + beta is 0" in own.reason and own.value.value is not None
    assert found.advice() == [
        f"{own.name} cannot be had from k tokens and the rest: {own.reason} Keep hidden states, at 64 bytes a position."
    ]

    def mine(student_logp: Any, teacher_logp: Any, labels: Any) -> Any:
        return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)

    found = probe(tmp_path, train_dataset=ROWS[:6], k=[4], fields={"objective": mine})
    assert found.objectives[0].name == "this run's mine" and found.objectives[0].kept == {}
    assert "does not say that all classes are alike" in found.advice()[0]


def test_the_advice() -> None:
    def found(shares: dict[int, tuple[float, float]], hidden: int, **changes: Any) -> str:
        kept = {k: KeptLoss(Estimate(share), Estimate(angle)) for k, (share, angle) in shares.items()}
        masses = [drkl.analysis.topk.KeptMass(k, 1.0, 6 * k + 8, Estimate(1.0), Estimate(1.0)) for k in shares]
        one = ProbedObjective("rkl", 1.0, True, changes.get("kind", "bound"), None, Estimate(1.0), kept)
        [text] = drkl.TopKProbe("t", "s", 9, 90, 1000, hidden, masses, [one]).advice()
        return text

    assert found({16: (0.94, 1.0), 64: (0.96, 2.0), 256: (0.99, 1.0)}, 1152) == (
        "k = 64 keeps 96.0 % of the value of rkl and turns its gradient by 2.0 degrees, at 392 bytes a position. "
        "Hidden states are exact, at 1,152."
    )
    assert found({16: (0.99, 6.0), 256: (0.99, 1.0)}, 1152) == (
        "k = 256 keeps 99.0 % of the value of rkl and turns its gradient by 1.0 degrees, at 1,544 bytes a position. "
        "Hidden states are exact and no larger: 1,152."
    )
    assert "No k of those tried (16) keeps 95 % of the value of rkl" in found(
        {16: (1.2, 1.0)}, 64, kind="approximation"
    )
    assert [percent(share) for share in (1.0, 0.5, 0.9996, 0.999999, 1 - 2**-23, 1.2)] == [
        "100.0 %", "50.0 %", "99.96 %", "99.9999 %", "100.0 %", "120.0 %",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_cache_of_hidden_states_gives_the_numbers_of_the_teacher(tmp_path: Path, cli: Cli) -> None:
    values = tiny_runs.config(tmp_path)
    student = tiny.save(tiny.llama(4, layers=2), tmp_path / "student")
    values["student"] = {"init": "pretrained", "model": str(student)}
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    live = cli("cache", path, "--probe", "--k", 4, "--format", "json")
    assert live.code == 0, live.err
    assert cli("cache", path, "--output", tmp_path / "cache").code == 0
    shutil.move(tmp_path / "teacher", tmp_path / "gone")
    cached = cli("cache", path, "--probe", "--k", 4, "--format", "json", f"teacher.cache={tmp_path / 'cache'}")
    assert cached.code == 0, cached.err
    for ours, theirs in zip(json.loads(cached.out)["objectives"], json.loads(live.out)["objectives"], strict=True):
        assert ours["value"]["value"] == pytest.approx(theirs["value"]["value"], rel=1e-5)
        assert ours["kept"][0]["share"]["value"] == pytest.approx(theirs["kept"][0]["share"]["value"], rel=1e-5)


def test_the_command(tmp_path: Path, cli: Cli) -> None:
    stages = [
        {"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 4}, "loss": {"temperature": 2.0}}
    ]
    path = tiny_runs.write_config(tiny_runs.config(tmp_path, stages=stages), tmp_path / "c.yaml")
    done = cli("cache", path, "--probe", "--k", 16, "--k", 4, "--positions", 60)
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    count = re.search(r"(\d+) positions of (\d+) rows, 64 tokens", said)
    assert count is not None and 40 < int(count[1]) <= 60
    assert f"Student: prune of {tmp_path / 'teacher'}, before training." in said
    assert "the value of fkl at temperature 2 and its gradient" in said
    for part in ("hidden states", "k = 4 ", "k = 16 ", "drkl, γ 0.5 at T = 1 (this run)", "fkl at T = 2 (this run)",
                 "akl at T = 1 (approximation)", "both models read: done"):  # fmt: skip
        assert part in said, part
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_json_stands_alone(tmp_path: Path, cli: Cli) -> None:
    path = tiny_runs.write_config(tiny_runs.config(tmp_path), tmp_path / "c.yaml")
    done = cli("cache", path, "--probe", "--format", "json", "loss.temperature=2.0")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [one["k"] for one in found["masses"]] == [16] and "both models read: done" in done.err
    assert {one["temperature"] for one in found["objectives"]} == {2.0}


@pytest.mark.slow
def test_a_trained_student(tmp_path: Path, cli: Cli) -> None:
    values = tiny_runs.config(tmp_path, peft={"r": 2, "target_modules": ["q_proj"], "export": "merged"})
    run = tiny_runs.train(values)
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    found = [cli("cache", path, "--probe", "--k", 4, "--student", name) for name in (run.root, run.student_path)]
    assert all(done.code == 0 for done in found), found[0].err
    assert found[0].out == found[1].out and f"Student: {run.student_path}." in "".join(found[0].out.splitlines())
    start = probe_specs(tiny_runs.specs(values), k=[4])
    trained = probe_specs(tiny_runs.specs(values), k=[4], student=str(run.root))
    assert trained.objectives[0].value.value < start.objectives[0].value.value  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": [tiny.VOCAB]}, "k is 64; expected whole numbers from 1 to 63, below the 64 ids"),
        ({"k": [0]}, "k is 0; expected whole numbers from 1 to 63"),
        ({"k": [2.5]}, "k is 2.5; expected whole numbers"),
        ({"k": True}, "k is True; expected whole numbers"),
        ({"k": "16"}, "k is '1'; expected whole numbers"),
        ({"seed": -1}, "seed is -1; expected a whole number of at least 0"),
        ({"positions": None}, "positions is None; expected a whole number"),
        ({"positions": 0}, "positions is 0; expected a whole number of at least 1"),
        ({"fields": {"objective": "ce"}}, "learns from no teacher"),
        ({"fields": {"kd_weight": 0.0}}, "learns from no teacher"),
        ({"fields": {"rollout_share": 0.5}}, "rollout_share is above 0"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        probe(tmp_path, **changes)


def test_teachers_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="There is no teacher to probe"):
        drkl.probe_top_k(None, ROWS, model=tiny.llama(1), args=config(tmp_path), processing_class=TOKENIZER)
    with pytest.raises(DrklError, match="compared on 12 ids, fewer than any k that is tried by itself; give k, from 1"):
        pair = make_pair(tiny.llama(1), tiny.llama(9), config(tmp_path), ROWS, None, TOKENIZER)
        pair.vocabulary = {"student": 64, "teacher": 64, "shared": 12}
        probe_pair(pair, [(drkl.make_objective("rkl"), 1.0)], student="s")
    rows = [{"text": f"w{i} w{i + 1}", "label": tiny_classifiers.CLASSES[i % 3]} for i in range(6)]
    with pytest.raises(DrklError, match="The models are classifiers: their class logits are few"):
        drkl.probe_top_k(
            tiny_classifiers.make(seed=1), rows, model=tiny_classifiers.make(seed=2), args=config(tmp_path),
            processing_class=tiny_classifiers.tokenizer(),
        )  # fmt: skip
    with pytest.raises(DrklError, match=r"few logits are known of the teacher at http://127\.0\.0\.1:9/v1"):
        probe(tmp_path, teacher=drkl.ServedTeacher("http://127.0.0.1:9/v1", "x", 4))
    pair = make_pair(tiny.llama(1), tiny.llama(9), config(tmp_path), ROWS, None, TOKENIZER)

    class Sparse:
        head = None
        model = tiny.llama(9)

        def states(self, batch: Any) -> TopK:
            raise AssertionError("nothing is read")

    pair.teacher, pair.teacher_name = Sparse(), "the served one"  # type: ignore[assignment]
    with pytest.raises(DrklError, match="A few logits are known of the teacher 'the served one'"):
        probe_pair(pair, [(drkl.make_objective("rkl"), 1.0)], student="s", k=[4])


@pytest.mark.slow
def test_a_cache_of_a_few_logits(tmp_path: Path, cli: Cli) -> None:
    values = tiny_runs.config(tmp_path)
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    assert cli("cache", path, "--output", tmp_path / "cache", "--kind", "topk", "--k", 8).code == 0
    # Whatever else the run asks for that this cache has not, this comes first.
    done = cli("cache", path, "--probe", "--k", 4, f"teacher.cache={tmp_path / 'cache'}", "loss.temperature=3.0")
    assert done.code == 2 and f"few logits are known of the teacher in the cache '{tmp_path / 'cache'}'" in done.err
    with pytest.raises(DrklError, match="Take the teacher itself, or a cache of its hidden states"):
        probe(tmp_path, teacher=drkl.TeacherCache.open(tmp_path / "cache"), fields={"temperature": 3.0})


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_logits_that_are_no_numbers(tmp_path: Path, who: str) -> None:
    models = {"student": tiny.llama(1, layers=2), "teacher": tiny.llama(9)}
    with torch.no_grad():
        models[who].model.norm.weight.fill_(3e38)  # finite, as the weights of any model that is loaded
    with pytest.raises(DrklError, match=f"The {who}'s logits are not numbers in row 'row-1'"):
        probe(tmp_path, models["student"], models["teacher"], train_dataset=ROWS[:1], k=[4], fields={"objective": "ab"})


def test_a_token_that_the_teacher_excludes() -> None:
    """Reverse KL is infinite, and there is no share of that; forward KL is what it is without the token."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(12, 9, generator=generator) for _ in range(2))
    theirs[:, 4] = -torch.inf
    cases = [Case(name, drkl.make_objective(name), 1.0, True) for name in ("rkl", "fkl", "tvd")]
    sums = LossSums(6, cases, [3, 8])
    sums.add(ours, theirs, torch.zeros(12, dtype=torch.long), np.arange(12) % 6)
    rkl, fkl, tvd = sums.result(0, teacher="t", student="s", vocab_size=9, hidden_bytes=1).objectives
    assert rkl.value == Estimate(None) and rkl.kept[3] == KeptLoss(Estimate(None), Estimate(None))
    pairs = [(softmax(a), softmax(b)) for a, b in zip(ours.double().numpy(), theirs.double().numpy(), strict=True)]
    exact = [kl(p, q) for q, p in pairs]
    assert fkl.value.value == pytest.approx(np.mean(exact), rel=1e-5)
    for one in (fkl, tvd):
        assert one.kept[8].share.value == pytest.approx(1.0, rel=1e-4) and one.kept[8].angle.interval is not None
        assert one.kept[3].share.value is not None and 0 < one.kept[3].share.value < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("{c}", "--k", "4", "--k", "8", "--output", "x", "--kind", "topk"),
            "`--k` is given 2 times, and a cache has one",
        ),
        (("{c}", "--probe", "--temperature", "2"), "`--probe` writes no cache, and takes no `--temperature`"),
        (("{c}", "--probe", "--kind", "top"), "kind is 'top'; expected one of hidden, topk"),
        (("{c}", "--positions", "4", "--dry-run"), "`--positions` goes with `--probe`"),
        (("{c}", "--student", "x", "--output", "x"), "`--student` goes with `--probe`"),
        (("{c}", "--format", "json", "--output", "x"), "`--format` goes with `--probe`"),
        (("{c}", "--probe", "--output", "x"), "`--probe` writes no cache, and takes no `--output`"),
        (("{c}", "--probe", "--part", "1/2"), "`--probe` writes no cache, and takes no `--part`"),
        (("{c}", "--probe", "--dry-run"), "`--probe` writes no cache, and takes no `--dry-run`"),
        (("--verify", "x", "--probe"), "`--probe` measures a CONFIG, and `--verify` reads a cache"),
        (("--probe",), "Give either a CONFIG or `--verify FOLDER`"),
        (("{c}", "--probe", "--format", "csv"), "--format is 'csv'; expected text or json"),
        (("{c}", "--probe", "--k", "64"), "--k is 64; expected whole numbers from 1 to 63"),
        (("{c}", "--probe", "--student", "nowhere/x"), "nowhere/x"),
        (("{c}", "--probe", "--student", ""), "--student is empty; expected a run folder, or the path or Hub id"),
        (("{c}", "--probe", "--student", "{r}"), "has no student yet; `drkl distill --resume"),
        (
            ("{c}", "--probe", "teacher.dtype=auto", "teacher.server=http://127.0.0.1:9/v1"),
            "known of the teacher at http",
        ),
        (("{c}", "--probe", "loss.kd_weight=0"), "learns from no teacher"),
        (("{c}", "--probe", "nothing"), "The config has teacher: null, so there is nothing to probe"),
    ],
)
def test_flags_that_do_not_fit(tmp_path: Path, root: Path, cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    values = tiny_runs.config(root)
    if "nothing" in arguments:
        arguments = arguments[:-1]
        values |= {"teacher": None, "objective": {"name": "ce"}}
        values["student"] = {"init": "pretrained", "model": str(root / "teacher")}
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("{}")
    done = cli("cache", *(one.format(c=path, r=unfinished) for one in arguments))
    assert done.code == 2 and message in done.err, done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
@pytest.mark.parametrize(("p_top", "masses"), [(0.5, (0.892, 0.970, 0.981)), (0.99, (0.9978, 0.9994, 0.9996))])
def test_a_tail_of_zipf(p_top: float, masses: tuple[float, ...]) -> None:
    """The mass in k tokens says little of what is kept of the tail's divergence, which does not know p_top at all."""
    vocab, n = 49152, 16
    tail = np.arange(1.0, vocab) ** -1.6
    p = np.concatenate([[p_top], (1 - p_top) * tail / tail.sum()])
    noise = np.random.default_rng(0).normal(size=(n, vocab))
    theirs = torch.tensor(np.log(p), dtype=torch.float32).repeat(n, 1)
    ours = theirs + torch.tensor(noise, dtype=torch.float32)
    K = drkl.decoupled("rkl", "rkl", gamma=1.0, target_weight=0.0)
    sums = LossSums(n, [Case("rkl", drkl.make_objective("rkl"), 1.0, True), Case("K", K, 1.0, False)], [8, 64, 128])
    sums.add(ours, theirs, torch.zeros(n, dtype=torch.long), np.arange(n))
    found = sums.result(0, teacher="t", student="s", vocab_size=vocab, hidden_bytes=1)
    assert [round(one.mass.value or 0, 4 if p_top > 0.9 else 3) for one in found.masses] == [*masses]
    assert [round(one.tail_mass.value or 0, 2) for one in found.masses] == [0.78, 0.94, 0.96]
    for place, k in enumerate((8, 64, 128)):
        q_tail, p_tail, kept, exact = np.exp(noise[:, 1:]) * p[1:], p[1:] / p[1:].sum(), 0.0, 0.0
        for one in q_tail / q_tail.sum(-1, keepdims=True):
            exact += kl(one, p_tail)
            known = [*range(k - 1)]
            kept += kl(merged(one, known), merged(p_tail, known))
        share = found.objectives[1].kept[k].share.value
        assert share == pytest.approx(kept / exact, rel=1e-3)
        assert share < (found.objectives[0].kept[k].share.value or 0) < masses[place]
