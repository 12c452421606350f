"""Toy dynamics at tiny sizes: the teachers are as asked, the paths are sound, a sweep can be gone on with."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from drkl.errors import DrklError
from drkl.objectives import OBJECTIVES, make_objective
from drkl.objectives.variants import parse_variant, parse_variants
from drkl.toy.dynamics import ToyProblem, ToySetting, gradient_on_logits, teacher_logits, with_entropy
from drkl.toy.metrics import METRICS, ToyTeacher, measure
from drkl.toy.sweep import COLUMNS, DEFAULT_OBJECTIVES, ends, read_csv, sweep
from tests.command_line import Cli
from tests.rounding import assert_near

TINY = {"vocab": 30, "entropy": 2.0, "contexts": 12, "rank": 2, "teacher_rank": 10, "steps": 20}


def tiny(**changes: object) -> ToySetting:
    return ToySetting(**{**TINY, **changes})  # type: ignore[arg-type]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def last(rows: list[dict[str, float]], key: str) -> float:
    step = max(row["step"] for row in rows)
    return float(np.mean([row[key] for row in rows if row["step"] == step]))


@pytest.mark.parametrize("kind", ["free", "capacity"])
@pytest.mark.parametrize(("vocab", "entropy"), [(1000, 4.15), (1000, 1.4), (1000, 6.8), (4, 0.01), (5000, 3.0)])
def test_every_context_has_the_asked_entropy(kind: str, vocab: int, entropy: float) -> None:
    logits = teacher_logits(ToySetting(kind, vocab, entropy, contexts=8), seed=3).double()
    p = torch.softmax(logits, -1).numpy()
    found = -(p * np.log(p, where=p > 0, out=np.zeros_like(p))).sum(-1)
    assert np.abs(found - entropy).max() < 1e-3


def test_the_scale_is_found_from_far_away() -> None:
    logits = normal(6, 50, seed=0) * torch.tensor([[1e-3], [0.1], [1.0], [10.0], [100.0], [300.0]])
    logp = with_entropy(logits, 2.5).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    assert torch.allclose(entropy, torch.tensor(2.5, dtype=torch.float64), atol=1e-3)


def test_the_teacher_is_of_its_rank_and_contexts_differ() -> None:
    logits = teacher_logits(tiny(vocab=60, contexts=40), seed=0)
    assert int(torch.linalg.matrix_rank(logits.double(), rtol=1e-5)) == TINY["teacher_rank"]
    assert len(set(logits.argmax(-1).tolist())) > 5
    free = teacher_logits(tiny(kind="free"), seed=0).sort(-1).values
    assert not torch.allclose(free[0], free[1])


@pytest.mark.parametrize("kind", ["free", "capacity"])
def test_all_seeds_at_once_are_each_alone(kind: str) -> None:
    setting = tiny(kind=kind)
    for name in ("rkl", "drkl", "ce"):
        together = ToyProblem(setting, [0, 1, 2]).run(make_objective(name))
        alone = ToyProblem(setting, [1]).run(make_objective(name))
        for row, other in zip([row for row in together if row["seed"] == 1], alone, strict=True):
            # Where two tokens are nearly as likely, rounding decides which is the first.
            smooth = {key: value for key, value in other.items() if key != "agreement" and not key.startswith("rival")}
            assert {key: row[key] for key in smooth} == pytest.approx(smooth, abs=1e-4, rel=1e-4), name


@pytest.mark.parametrize("init", ["random", "warm"])
def test_the_same_seed_gives_the_same_path(init: str) -> None:
    setting = tiny(init=init)
    objective = parse_variant("rkl+gjs:0.5").objective
    once, twice = (ToyProblem(setting, [4]).run(objective) for _ in range(2))
    assert once == twice
    assert once != ToyProblem(setting, [5]).run(objective)


def test_a_warm_start_is_nearer_and_shared() -> None:
    cold, warm = (ToyProblem(tiny(init=init, steps=100), [0, 1]) for init in ("random", "warm"))
    starts = [problem.run(make_objective("rkl"), points=1)[0]["fkl"] for problem in (cold, warm, warm)]
    assert starts[1] < 0.9 * starts[0]
    assert starts[1] == starts[2]


@pytest.mark.parametrize("name", ["fkl", "rkl", "gjs", "drkl", "symmetric_kl", "srkl", "sfkl", "dkd", "rkl+gjs:0.5"])
def test_free_logits_reach_the_teacher(name: str) -> None:
    setting = tiny(kind="free", steps=300)
    rows = ToyProblem(setting, [0, 1]).run(parse_variant(name).objective, points=2)
    assert last(rows, "tvd") < 0.02
    assert last(rows, "agreement") == 1.0
    assert last(rows, "entropy") == pytest.approx(2.0, abs=0.05)


def test_with_a_gap_reverse_kl_is_overconfident_and_drkl_meets_the_target() -> None:
    problem = ToyProblem(ToySetting(vocab=200, entropy=3.2, contexts=64, rank=4, teacher_rank=32), [0, 1])
    rkl, drkl = (problem.run(parse_variant(spec).objective, points=1) for spec in ("rkl", "drkl:0.1"))
    p_t = last(rkl, "p_t")
    assert last(rkl, "q_t") > 1.2 * p_t
    assert last(rkl, "entropy") < 3.2 - 0.5
    assert last(drkl, "q_t") == pytest.approx(p_t, rel=0.05)
    assert last(drkl, "target_error") < 0.1 * last(rkl, "target_error")


@pytest.mark.parametrize("spec", DEFAULT_OBJECTIVES)
def test_the_gradient_is_that_of_the_definition(spec: str) -> None:
    objective = parse_variant(spec).objective
    student, teacher = normal(7, 20, seed=0), 2 * normal(7, 20, seed=1)
    labels = torch.arange(7)
    leaf = student.clone().requires_grad_()
    value = objective(torch.log_softmax(leaf, -1), torch.log_softmax(teacher, -1), labels)
    (expected,) = torch.autograd.grad(value.sum(), leaf)
    assert torch.allclose(gradient_on_logits(objective, student, teacher, labels), expected, atol=1e-10)


def test_an_objective_without_a_closed_form_is_differentiated() -> None:
    student, teacher = normal(5, 9, seed=0), normal(5, 9, seed=1)
    assert not make_objective("ab", alpha=0.0, beta=0.0).has_closed_form
    found = gradient_on_logits(make_objective("ab", alpha=0.0, beta=0.0), student, teacher, None)
    log_ratio = torch.log_softmax(student, -1) - torch.log_softmax(teacher, -1)
    expected = log_ratio - torch.softmax(student, -1) * log_ratio.sum(-1, keepdim=True)
    assert torch.allclose(found, expected)


def test_rows_are_differentiated_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = normal(7, 20, seed=0), normal(7, 20, seed=1), torch.arange(7)
    for name in ("rkl", "ce"):
        whole = gradient_on_logits(make_objective(name), student, teacher, labels)
        with monkeypatch.context() as patch:
            patch.setattr("drkl.toy.dynamics.BLOCK_ELEMENTS", 50)
            in_blocks = gradient_on_logits(make_objective(name), student, teacher, labels)
        assert_near(in_blocks, whole, terms=20, scale=10.0)


def test_labels_are_drawn_from_the_teacher() -> None:
    problem = ToyProblem(tiny(kind="free", contexts=2, vocab=6, entropy=1.2), [0])
    generator = [torch.Generator().manual_seed(0)]
    drawn = torch.stack([problem._labels(generator) for _ in range(4000)])
    shares = torch.stack([(drawn == token).float().mean(0) for token in range(6)], -1)
    assert torch.allclose(shares, problem.teacher.model.probs, atol=0.03)


def test_metrics_against_numpy() -> None:
    random = np.random.default_rng(0)
    z, y = 2 * random.normal(size=(9, 25)), 2 * random.normal(size=(9, 25))
    y[0] = z[0]
    q, p = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (z, y))
    m, rows, t = (p + q) / 2, np.arange(9), p.argmax(-1)
    head = np.zeros_like(p, dtype=bool)
    for row in rows:
        order = np.argsort(-p[row])
        head[row, order[: 1 + int(np.argmax(np.cumsum(p[row, order]) >= 0.5))]] = True

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray((a * np.log(a / b)).sum(-1))

    half = np.abs(p - q) / 2
    rest = q.copy()
    rest[rows, t] = -1
    rival = rest.argmax(-1)
    expected = {
        "q_t": q[rows, t], "p_t": p[rows, t], "target_error": np.abs(q[rows, t] - p[rows, t]),
        "entropy": -(q * np.log(q)).sum(-1), "max_q": q.max(-1), "fkl": kl(p, q), "rkl": kl(q, p),
        "js": (kl(p, m) + kl(q, m)) / 2, "tvd": half.sum(-1), "head_error": (half * head).sum(-1),
        "tail_error": (half * ~head).sum(-1), "agreement": q.argmax(-1) == t,
        "rival_q": q[rows, rival], "rival_p": p[rows, rival],
        "rival_rank": 1 + np.argsort(np.argsort(-p, -1), -1)[rows, rival],
    }  # fmt: skip
    found = measure(torch.from_numpy(z), ToyTeacher.of(torch.from_numpy(y)))
    assert list(found) == list(METRICS) == list(expected)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key].numpy(), values, atol=1e-12, err_msg=key)


def test_a_sweep_writes_csv_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, variants = [tiny(), tiny(kind="free")], parse_variants(["rkl", "drkl:0.1", "drkl@student"])
    sweep(settings, variants[:1], [0, 1], tmp_path)
    part = tmp_path / "parts" / tiny().name / "rkl.csv"
    written = part.stat().st_mtime_ns
    told: list[tuple[str, int, int]] = []
    rows = sweep(settings, variants, [0, 1], tmp_path, on_progress=lambda *what: told.append(what))
    assert part.stat().st_mtime_ns == written
    first, second = (setting.name for setting in settings)
    assert told == [(first, 2, 3), (first, 3, 3), (second, 2, 3), (second, 3, 3)]

    monkeypatch.setattr("drkl.toy.sweep.ToyProblem", None)
    assert sweep(settings, variants, [0, 1], tmp_path) == rows == read_csv(tmp_path / "toy.csv")
    with (tmp_path / "toy.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert {(line["objective"], line["gamma"]) for line in lines} == {
        ("rkl", ""), ("drkl", "0.1"), ("drkl@student", ""),
    }  # fmt: skip
    assert {line["setting"] for line in lines} == {"capacity-v30-h2-random-r2", "free-v30-h2-random"}
    assert len(lines) == 2 * 3 * 2 * 21
    assert all(math.isfinite(float(line[key])) for line in lines for key in METRICS)


def test_a_result_that_is_damaged_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    variants = parse_variants(["rkl"])
    rows = sweep([tiny()], variants, [0], tmp_path)
    part = tmp_path / "parts" / tiny().name / "rkl.csv"
    whole = part.read_bytes()
    seal = part.with_suffix(".xxh3")
    for damaged, sealed in (
        (whole.replace(b"1", b"7", 1), True),
        (whole[:-9], True),
        (whole[:-9], False),
        (b"", False),
    ):
        part.write_bytes(damaged)
        if not sealed:
            seal.unlink()
        caplog.clear()
        assert sweep([tiny()], variants, [0], tmp_path) == rows
        assert part.read_bytes() == whole and f"{part} is damaged" in caplog.text
    seal.unlink()  # as an earlier drkl left it
    caplog.clear()
    assert sweep([tiny()], variants, [0], tmp_path) == rows and not caplog.text
    (part.with_name("setting.json")).write_text("[]")
    with pytest.raises(DrklError, match=r"setting\.json holds a list"):
        sweep([tiny()], variants, [0], tmp_path)


@pytest.mark.slow
def test_the_number_of_jobs_changes_nothing(tmp_path: Path) -> None:
    settings = [tiny(init="warm"), tiny(kind="free")]
    variants = parse_variants(["rkl", "ce"])
    alone, shared = (sweep(settings, variants, [0, 1], tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2))
    assert alone == shared
    assert (tmp_path / "1" / "toy.csv").read_bytes() == (tmp_path / "2" / "toy.csv").read_bytes()


def test_a_folder_of_another_setting_is_refused(tmp_path: Path) -> None:
    variants = parse_variants(["rkl"])
    sweep([tiny()], variants, [0], tmp_path)
    for other, seeds in ((tiny(contexts=11), [0]), (tiny(), [0, 1])):
        with pytest.raises(DrklError, match=r"holds results with (contexts 12|seeds \[0\]), not"):
            sweep([other], variants, seeds, tmp_path)


def test_ends_are_the_last_steps(tmp_path: Path) -> None:
    rows = sweep([tiny()], parse_variants(["rkl", "fkl"]), [0, 1], tmp_path)
    found = ends(rows)
    assert [end["objective"] for end in found] == ["rkl", "fkl"]
    values = [float(row["tvd"]) for row in rows if row["objective"] == "fkl" and row["step"] == 20]
    assert len(values) == found[1]["seeds"] == 2
    assert found[1]["tvd"] == pytest.approx(np.mean(values))
    assert found[1]["tvd_spread"] == pytest.approx(max(values) - min(values))


def test_every_registered_objective_is_in_the_default_sweep_once() -> None:
    variants = parse_variants(DEFAULT_OBJECTIVES)
    assert set(OBJECTIVES) < {variant.label for variant in variants}
    assert len(variants) == len(DEFAULT_OBJECTIVES) == len({variant.slug for variant in variants})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "open"}, "kind is 'open'"),
        ({"init": "hot"}, "init is 'hot'"),
        ({"entropy": 3.5}, r"below log\(30\) = 3.40"),
        ({"entropy": 0.0}, "above 0"),
        ({"steps": 0}, "steps is 0"),
        ({"vocab": 1}, "vocab is 1"),
        ({"rank": 10}, "no lower rank"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_a_setting_out_of_its_domain_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        tiny(**changes)


@pytest.mark.slow
def test_the_command(cli: Cli, tmp_path: Path) -> None:
    size = ("--vocab", 20, "--entropy", 2, "--seeds", 2, "--steps", 4, "--contexts", 6, "--rank", 2, "--jobs", 1)
    call = ("toy", "--output", tmp_path / "toy", "--objectives", "rkl,drkl:0.1,drkl:1", "--setting", "free", *size)
    done = cli(*call)
    assert done.code == 0, done.err
    name = "free-v20-h2-random"
    files = {path.name for path in (tmp_path / "toy").iterdir()}
    assert files == {"parts", "toy.csv", "ends.csv", f"{name}.svg", f"{name}.gif", "map-free.svg"}
    drawn = [tmp_path / "toy" / f"{figure}.svg" for figure in (name, "map-free")]
    before = [path.read_bytes() for path in drawn]
    assert all(text.startswith(b"<?xml") for text in before)
    assert (tmp_path / "toy" / f"{name}.gif").read_bytes()[:4] == b"GIF8"
    assert "drkl" in done.out and name in done.out
    assert cli(*call).code == 0
    assert [path.read_bytes() for path in drawn] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--setting", "fre"), "--setting has 'fre'; expected one or more of free, capacity. Did you mean 'free'?"),
        (("--init", "hot"), "--init has 'hot'"),
        (("--entropy", "high"), "--entropy is 'high'; expected numbers"),
        (("--entropy", "9"), "below log(1000)"),
        (("--objectives", "rlk"), "Did you mean 'rkl'?"),
        (("--objectives", ","), "--objectives is ','"),
        (("--rank", "64"), "no capacity gap"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    cli: Cli, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = cli("toy", "--output", tmp_path / "toy", *options)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "toy").exists()


def test_a_file_in_place_of_the_folder_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("")
    done = cli("toy", "--output", tmp_path / "toy", "--quick")
    assert done.code == 2 and "toy" in done.err and "Traceback" not in done.err
