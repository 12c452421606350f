"""A cache of the teacher's k largest logits: they are the teacher's, and training reads them; the rest is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file

import drkl
from drkl.analysis.config import AnalysisConfig
from drkl.analysis.watch import GradientWatch
from drkl.errors import DrklError
from drkl.losses.config import LossConfig
from drkl.losses.topk import TopK
from drkl.models.forward import output_head
from drkl.models.readout import batches, to_batch
from drkl.objectives import OBJECTIVES, make_objective
from drkl.runs import RunFolder, read_json, read_yaml
from drkl.teachers.cached import TeacherCache
from drkl.teachers.live import LiveTeacher
from drkl.teachers.stored import StoredTopK, stored_in
from drkl.training.caching import _Batches, cache_teacher
from drkl.training.estimate import estimate
from drkl.training.faults import Way, find_fault
from drkl.training.forward import loss_of
from drkl.training.run import cache_states
from tests.command_line import Cli
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs
from tests.training.test_caching import QUIET_PEFT, cache_of, log_of
from tests.training.test_python import ROWS, TOKENIZER, config, make

Models = Callable[[], tuple[Any, Any]]
V = tiny.VOCAB


def llamas() -> tuple[Any, Any]:
    return tiny.llama(1, layers=2), tiny.llama(9)


def topk_of(folder: Path, models: Models = llamas, **changes: Any) -> TeacherCache:
    return cache_of(folder, *models(), **({"kind": "topk", "k": 8} | changes))


def same(found: TopK, expected: TopK) -> bool:
    names = ("ids", "logits", "log_rest", "label_logits")
    return all(torch.equal(getattr(found, name), getattr(expected, name)) for name in names)


@pytest.mark.parametrize(
    "models",
    [
        llamas,
        pytest.param(lambda: (tiny.t5(1), tiny.t5(2)), marks=pytest.mark.slow),
        pytest.param(lambda: (tiny.llama(1, vocab=70, layers=2), tiny.llama(9)), marks=pytest.mark.slow),
        pytest.param(lambda: (llamas()[0], tiny.llama(9).to(torch.bfloat16)), marks=pytest.mark.slow),
    ],
    ids=["llama", "t5", "unequal vocabularies", "bf16 teacher"],
)
@torch.no_grad()
def test_it_has_the_live_teachers_numbers_bit_for_bit(tmp_path: Path, models: Models) -> None:
    student, teacher = models()
    cache = topk_of(tmp_path, models, temperatures=(2.0,))
    trainer = make(tmp_path, student, teacher)
    live, count, size = LiveTeacher(teacher), 0, trainer.vocab_size or V
    for batch in _Batches([(trainer.pair, trainer.config)]):
        wide = live.head.weight[:size].float()
        logits = live.states(batch).float() @ wide.T * live.head.scale
        expected = TopK.of_logits(logits, 8, (1.0, 2.0), batch.labels)
        assert same(cache.states(batch), expected)
        count += len(logits)
    assert count and cache.kind == "topk" and cache.head is None and cache.manifest["vocab_size"] == size


def test_it_is_made_of_a_cache_of_hidden_states_without_the_teacher(tmp_path: Path, cli: Cli) -> None:
    values = tiny_runs.config(tmp_path)
    student = tiny.save(tiny.llama(1, layers=2), tmp_path / "student")
    values["student"] = {"init": "pretrained", "model": str(student)}
    path = tiny_runs.write_config(values, tmp_path / "run.yaml")
    direct, states, made = (tmp_path / name for name in ("direct", "states", "made"))
    cli("cache", path, "--kind", "topk", "--k", "5", "--output", direct)
    cli("cache", path, "--output", states)
    shutil.rmtree(values["teacher"]["model"])
    cli("cache", path, f"teacher.cache={states}", "--kind", "topk", "--k", "5", "--output", made)
    assert read_json(made / "manifest.json") == read_json(direct / "manifest.json")
    with pytest.raises(DrklError, match=r"of kind topk\. Of a cache of hidden states one of kind topk can be made"):
        values["teacher"]["cache"] = str(made)
        cache_states(tiny_runs.specs(values), tmp_path / "again", kind="topk")


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"ce"}))
@torch.no_grad()
def test_with_all_but_one_of_the_tokens_every_objective_is_that_of_the_whole_vocabulary(
    every_token: tuple[Any, TeacherCache, LiveTeacher, Any], name: str
) -> None:
    student, cache, live, batch = every_token
    objective, settings = make_objective(name), {"vocab_size": V, "reduction": "none"}
    values = [
        loss_of(
            batch.states(student), output_head(student), teacher.states(batch), teacher.head, batch.labels,
            LossConfig(temperature=2.0), objective=objective, **settings,
        )
        for teacher in (cache, live)
    ]  # fmt: skip
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def every_token(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TeacherCache, LiveTeacher, Any]:
    student, teacher = llamas()
    folder = tmp_path_factory.mktemp("every")
    cache = topk_of(folder, lambda: (student, teacher), k=V - 1, temperatures=(2.0,))
    batch = _Batches([((trainer := make(folder, student, teacher)).pair, trainer.config)])[0]
    return student, cache, LiveTeacher(teacher), batch


def train(folder: Path, cache: TeacherCache, models: Models = llamas, **changes: Any) -> drkl.DistillationTrainer:
    trainer = make(folder, models()[0], cache, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"objective": "fkl", "temperature": 2.0, "kd_weight": 0.5}, marks=pytest.mark.slow),
        pytest.param({"objective": "drkl", "objective_params": {"target": "label"}}, marks=pytest.mark.slow),
    ],
)
def test_training_twice_gives_the_same_bits(tmp_path: Path, fields: dict[str, Any]) -> None:
    topk_of(tmp_path, temperatures=(2.0,))
    (tmp_path / "b").mkdir()
    one, two = (
        train(folder, TeacherCache.open(tmp_path / "cache"), fields=fields) for folder in (tmp_path, tmp_path / "b")
    )
    first, second = one.pair.student.state_dict(), two.pair.student.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert log_of(one.run) == log_of(two.run)
    assert all(0 < line["teacher_mass"] < 1 for line in log_of(one.run) if "loss" in line)
    assert any(not torch.equal(first[name], value) for name, value in llamas()[0].state_dict().items())


@pytest.mark.slow
@QUIET_PEFT
@pytest.mark.parametrize(
    ("models", "changes"),
    [
        (llamas, {}),
        (llamas, {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}),
        (lambda: (tiny.t5(1), tiny.t5(2)), {}),
        (llamas, {"fields": {"objective": "gjs", "temperature": 2.0, "kd_weight": 0.5}}),
        (llamas, {"fields": {"objective": "drkl", "objective_params": {"target": "label"}, "eval_rows": 2}}),
    ],
)
def test_with_all_but_one_of_the_tokens_training_is_that_with_the_teacher(
    tmp_path: Path, models: Models, changes: dict[str, Any]
) -> None:
    student, teacher = models()
    live = make(tmp_path, student, teacher, **changes)
    live.train()
    topk_of(tmp_path, models, k=V - 1, temperatures=(2.0,))
    (tmp_path / "b").mkdir()
    cached = train(tmp_path / "b", TeacherCache.open(tmp_path / "cache"), models, **changes)
    # Adam divides by the size of a gradient, and so gives its last digits the size of a step.
    for name, value in live.pair.student.state_dict().items():
        torch.testing.assert_close(cached.pair.student.state_dict()[name], value, rtol=0, atol=2e-3)
    for ours, theirs in zip(log_of(cached.run), log_of(live.run), strict=True):
        assert {"teacher_mass", "eval_teacher_mass"} & set(ours)
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


def test_the_log_has_the_masses_and_the_numbers_of_the_classes(tmp_path: Path) -> None:
    cache, (student, teacher) = topk_of(tmp_path, temperatures=(2.0,)), llamas()
    trainer = make(tmp_path, student, cache, fields={"temperature": 2.0})
    line = trainer.evaluate()
    [batch] = batches(trainer.eval_rows, pad_id=trainer.pair.pad_id)
    with torch.no_grad():
        q, p = (output_head(model).logits(batch.states(model)).double() for model in (student, teacher))
    rows = {name: [] for name in ("teacher_mass", "teacher_tail_mass", "agreement", "fkl", "rkl", "teacher_entropy")}
    for ours, theirs in zip(q, p, strict=True):
        top = sorted(range(V), key=lambda i: (-float(theirs[i]), i))[:8]
        warm = (theirs / 2).softmax(-1)
        rows["teacher_mass"].append(float(warm[top].sum()))
        rows["teacher_tail_mass"].append(float(warm[top[1:]].sum() / (1 - warm[top[0]])))
        rows["agreement"].append(float(ours.argmax() == top[0]))
        a, b = ours.softmax(-1), theirs.softmax(-1)
        a, b = (torch.cat([one[top], 1 - one[top].sum(0, keepdim=True)]) for one in (a, b))
        rows["fkl"].append(float((b * (b / a).log()).sum()))
        rows["rkl"].append(float((a * (a / b).log()).sum()))
        rows["teacher_entropy"].append(-float((b * b.log()).sum()))
    for name, values in rows.items():
        assert line[f"eval_{name}"] == pytest.approx(sum(values) / len(values), rel=1e-4), name


def test_a_line_says_what_the_student_will_not_see(tmp_path: Path) -> None:
    cache = topk_of(tmp_path)
    [note] = [note for note in make(tmp_path, llamas()[0], cache).pair.notes if "will" in note or "sees" in note]
    assert note.startswith("The student sees the teacher's 8 most probable tokens, and all others as one class: at 120")
    assert "approximation" not in note and note.endswith("The probe of `drkl cache` says what that loses.")
    notes = make(tmp_path, llamas()[0], cache, fields={"objective": "akl"}).pair.notes
    assert any("The value of akl is an approximation then, and no lower bound." in note for note in notes)
    assert not any("sees" in note for note in make(tmp_path, llamas()[0], cache, fields={"objective": "ce"}).pair.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": None, "kind": "sparse"}, "kind is 'sparse'; expected one of hidden, topk"),
        ({"kind": "hidden"}, "k goes with kind 'topk', and kind is 'hidden', which is exact at every temperature"),
        ({"kind": "hidden", "k": None, "temperatures": (2.0,)}, "temperatures goes with kind 'topk'"),
        ({"k": 0}, "k is 0; expected a whole number from 1 to 63"),
        ({"k": V}, "k is 64; expected a whole number from 1 to 63, below the 64 ids that student and teacher"),
        ({"k": None}, "k is 64; expected"),
        ({"k": True}, "k is True; expected"),
        ({"temperatures": (-1.0,)}, "temperatures has -1.0; expected finite numbers above 0"),
        ({"temperatures": (float("nan"),)}, "temperatures has nan"),
        ({"temperatures": ("2",)}, r"temperatures is \('2',\); expected a list of numbers"),
        ({"temperatures": 2.0}, "temperatures is 2.0; expected a list of numbers"),
    ],
)
def test_what_a_cache_of_this_kind_cannot_have(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        topk_of(tmp_path, **changes)


def test_a_classifier_and_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    rows = [{"text": f"w{i} w{i + 1}", "label": tiny_classifiers.CLASSES[i % 3]} for i in range(12)]
    with pytest.raises(DrklError, match="kind is 'topk', and the teacher is a classifier: its class logits are few"):
        cache_teacher(
            tiny_classifiers.make(seed=2), rows, model=tiny_classifiers.make(seed=1), args=config(tmp_path),
            kind="topk", processing_class=tiny_classifiers.tokenizer(), output_dir=tmp_path / "cache",
        )  # fmt: skip
    broken = tiny.llama(9)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(DrklError, match=r"The teacher.* has weights that are not finite numbers.*model\.norm\.weight"):
        topk_of(tmp_path, lambda: (llamas()[0], broken))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": {"temperature": 3.0}}, "temperature of the loss is 3, .* beyond its 8 add up to at 1 and 2 alone"),
        (
            {"fields": {"objective": "ab", "objective_params": {"alpha": -0.5, "beta": 0.5}}},
            "Objective 'ab' cannot be had from a teacher's k most probable tokens .*: where alpha",
        ),
        ({"fields": {"rollout_share": 0.5}}, "a teacher cache has the data's alone"),
        ({"train_dataset": [*ROWS, {"prompt": "w9", "response": "w9"}]}, "lacks 1 of 21 training rows, first 'row-21'"),
        ({"fields": {"template": "plain"}}, "other settings than template auto, .*, kind topk, k 8 or"),
    ],
)
def test_what_cannot_be_learnt_from_it(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    cache = topk_of(tmp_path, temperatures=(2.0,))
    with pytest.raises(DrklError, match=message):
        make(tmp_path, llamas()[0], cache, **changes)


def test_where_the_objective_reads_no_teacher_its_temperature_is_nobodys(tmp_path: Path) -> None:
    cache = topk_of(tmp_path)
    for fields in ({"objective": "ce", "temperature": 3.0}, {"kd_weight": 0.0, "temperature": 3.0}):
        values = make(tmp_path, llamas()[0], cache, fields=fields).evaluate()
        assert 0 < values["eval_teacher_tail_mass"] < values["eval_teacher_mass"] < 1


def test_a_student_of_another_vocabulary(tmp_path: Path) -> None:
    cache = topk_of(tmp_path, lambda: (tiny.llama(1, vocab=70, layers=2), tiny.llama(9, vocab=80)))
    size = cache.manifest["vocab_size"]
    assert size < 70
    with pytest.raises(DrklError, match=f"is over the first {size} ids, and this student is compared .* on 80"):
        make(tmp_path, tiny.llama(1, vocab=80, layers=2), cache)


def test_one_text_with_two_last_tokens_is_two_rows_and_another_one_is_named(tmp_path: Path) -> None:
    """The last token is not read, so that the texts are one to the teacher; the logits of their labels are two."""
    rows = [{"input_ids": [5, 6, 7, last], "labels": [-100, -100, 7, last]} for last in (8, 9)]
    student, teacher = llamas()
    args = config(tmp_path)
    cache = cache_teacher(
        teacher,
        rows,
        model=student,
        args=args,
        processing_class=TOKENIZER,
        output_dir=tmp_path / "cache",
        kind="topk",
        k=4,
    )
    assert cache is not None and cache.manifest["rows"] == 2
    pair = make(tmp_path, student, cache, train_dataset=rows, eval_dataset=None).pair
    with torch.no_grad():
        [logits] = [LiveTeacher(teacher).head.logits(LiveTeacher(teacher).states(to_batch(pair.rows, [0], pad_id=0)))]
    for row, last in enumerate((8, 9)):
        found = cache.states(to_batch(pair.rows, [row], pad_id=0))
        assert isinstance(found, TopK) and found.label_logits is not None
        torch.testing.assert_close(found.label_logits, logits[[0, 1], [7, last]])
    other = [{"input_ids": [5, 6, 7, 10], "labels": [-100, -100, 7, 10]}]
    with pytest.raises(DrklError, match="has 1 of 1 training rows with another last token, first 'row-1', and so not"):
        make(tmp_path, student, cache, train_dataset=other, eval_dataset=None)
    batch = to_batch(pair.rows, [1], pad_id=0)
    assert cache.hidden_at(batch.inputs, batch.keep).label_logits is None  # type: ignore[union-attr]


def test_pushes_on_the_target_need_the_whole_distribution(tmp_path: Path) -> None:
    trainer = make(tmp_path, llamas()[0], topk_of(tmp_path))
    with pytest.raises(DrklError, match=r"is known on its largest logits alone. Leave analysis.watch_every out"):
        GradientWatch.for_trainer(trainer, AnalysisConfig(watch_every=1))


@pytest.mark.slow
def test_two_stages_with_two_temperatures_from_the_command_line(tmp_path: Path, cli: Cli) -> None:
    stage = {"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 4}, "loss": {"temperature": 3.0}}
    values = tiny_runs.config(tmp_path, stages=[stage], loss={"temperature": 2.0})
    del values["student"]
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    done = cli("cache", path, "--output", tmp_path / "cache", "--kind", "topk", "--k", 8, "--temperature", 1.5)
    assert done.code == 0, done.err
    assert "has 8 logits and the rest of 40 rows" in " ".join(done.out.split())
    assert TeacherCache.open(tmp_path / "cache").manifest["temperatures"] == [1.0, 1.5, 2.0, 3.0]
    (tmp_path / "teacher" / "model.safetensors").unlink()
    student = tiny.save(llamas()[0], tmp_path / "student")
    cached = [f"teacher.cache={tmp_path / 'cache'}", "student.init=pretrained", f"student.model={student}"]
    done = cli("distill", path, *cached)
    assert done.code == 0, done.err
    assert "The student sees the teacher's 8 most probable tokens" in " ".join(done.out.split())
    run = RunFolder(tmp_path / "runs" / "r")
    assert run.read_env()["topk"]["k"] == 8 and "of k + 1 classes, lower bounds" in run.read_env()["topk"]["log"]
    assert (
        "its teacher's 8 most probable tokens, with all others as one class."
        in (run.student_path / "README.md").read_text()
    )
    for one in (*run.stages(), run):
        assert all("teacher_tail_mass" in line for line in one.read_train_log() if "loss" in line)
    assert read_yaml(run.config_path)["teacher"]["cache"] == str(tmp_path / "cache")
    # A temperature that the last stage alone has is found before the first one trains.
    done = cli("distill", path, *cached, "run.name=late", "loss.temperature=2.5")
    assert done.code == 2 and "The temperature of the loss is 2.5" in " ".join(done.err.split())
    assert not (tmp_path / "runs" / "late").exists()
    with pytest.raises(DrklError, match=r"The temperature of the loss is 2.5"):
        estimate(tiny_runs.specs(values, [*cached, "loss.temperature=2.5"]))


@pytest.mark.slow
def test_the_folder_is_the_same_whatever_the_number_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drkl.teachers.cached.SHARD_BYTES", 1000)
    specs, kind = tiny_runs.specs(tiny_runs.config(tmp_path)), {"kind": "topk", "k": 5}
    whole = cache_states(specs, tmp_path / "one", **kind)
    assert whole is not None and whole.manifest["shards"] > 4
    for part in (2, 0, 1):
        cache_states(specs, tmp_path / "three", part=part, parts=3, **kind)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "three").iterdir()}
    with pytest.raises(DrklError, match="is a cache of something else: k is 5, not 6"):
        cache_states(specs, tmp_path / "one", kind="topk", k=6)
    with pytest.raises(DrklError, match='is a cache of something else: kind is "topk", not "hidden"'):
        cache_states(specs, tmp_path / "one")


def test_an_estimate_has_the_rows_and_the_bytes_of_the_cache(tmp_path: Path, cli: Cli) -> None:
    values = tiny_runs.config(tmp_path)
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    done = cli("cache", path, "--dry-run", "--kind", "topk", "--k", 8, "--temperature", 2)
    assert done.code == 0, done.err
    said = yaml.safe_load(done.out)
    cache = cache_states(tiny_runs.specs(values), tmp_path / "cache", kind="topk", k=8, temperatures=(2.0,))
    assert cache is not None
    assert all(said[name] == cache.manifest[name] for name in ("rows", "positions", "k", "temperatures", "vocab_size"))
    [values] = [load_file(one) for one in (tmp_path / "cache").glob("values-*")]
    assert sum(value.nbytes for value in values.values()) == said["positions"] * said["bytes_per_position"]
    assert values["ids"].dtype == torch.uint16
    assert said["bytes_per_position_of_kinds"] == {"hidden": 64, "topk, k 8": 8 * (2 + 4) + 3 * 4}


def test_a_manifest_that_does_not_say_what_is_stored(tmp_path: Path) -> None:
    topk_of(tmp_path)
    manifest = read_json(tmp_path / "cache" / "manifest.json")
    assert stored_in(manifest) == StoredTopK(8, (1.0,), V, torch.float32)
    for name, value in (("k", "8"), ("temperatures", None), ("dtype", "cat"), ("kind", "other")):
        assert stored_in(manifest | {name: value}) is None


def test_excluded_tokens_missing_ids_and_large_vocabularies_come_back_as_they_were() -> None:
    none = float("-inf")
    known = TopK(
        ids=torch.tensor([[3, 1, -1], [2, 0, 1]]),
        logits=torch.tensor([[2.0, none, none], [1.0, 0.5, -3.0]]),
        log_rest=torch.tensor([[none, none], [0.25, 0.125]]),
        vocab_size=4,
        temperatures=(1.0, 2.0),
        label_logits=torch.tensor([none, 0.5]),
    )
    for size, dtype in ((4, torch.uint16), (65535, torch.uint16), (65536, torch.int32)):
        stored = StoredTopK(3, (1.0, 2.0), size, torch.float32)
        tensors = stored.tensors(known)
        assert tensors["ids"].dtype == dtype
        assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
        assert sum(value.nbytes for value in tensors.values()) == 2 * stored.bytes_per_position
        assert same(stored.restored(tensors, with_labels=True), known)


@pytest.mark.slow
def test_every_turn_of_a_conversation_and_the_last_one_alone_are_read_from_one_cache(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": f"w{i + n} w{i}"} for i in range(4)]}
        for n in range(6)
    ]
    data: dict[str, Any] = {"train_dataset": rows, "eval_dataset": None}
    student, teacher = llamas()
    args = config(tmp_path, turns="all")
    made = cache_teacher(
        teacher,
        rows,
        model=student,
        args=args,
        processing_class=TOKENIZER,
        output_dir=tmp_path / "cache",
        kind="topk",
        k=5,
    )
    assert made is not None
    for turns in ("all", "last"):
        trainer = make(tmp_path, llamas()[0], TeacherCache.open(tmp_path / "cache"), fields={"turns": turns}, **data)
        trainer.train()
        for batch in batches(trainer.pair.rows, pad_id=trainer.pair.pad_id):
            with torch.no_grad():
                live = LiveTeacher(teacher)
                logits = live.head.logits(live.states(batch))
            expected, found = TopK.of_logits(logits, 5, labels=batch.labels), made.states(batch)
            assert isinstance(found, TopK) and torch.equal(found.ids, expected.ids)
            assert found.label_logits is not None and expected.label_logits is not None
            torch.testing.assert_close(found.label_logits, expected.label_logits, rtol=0, atol=1e-5)


def test_an_infinite_loss_is_laid_to_no_hidden_state(tmp_path: Path) -> None:
    cache = topk_of(tmp_path)
    batch = next(iter(batches(make(tmp_path, llamas()[0], cache).pair.rows, pad_id=0)))
    student = llamas()[0]
    objective = make_objective("rkl")
    way = Way(student, torch.zeros(2, 4), cache, cache.states(batch), objective)
    assert "the loss itself" in find_fault(way).tensor


def test_logits_of_a_cache_that_are_no_numbers_are_laid_to_the_cache(tmp_path: Path) -> None:
    cache = topk_of(tmp_path)
    known = cache.states(next(iter(batches(make(tmp_path, llamas()[0], cache).pair.rows, pad_id=0))))
    assert isinstance(known, TopK)
    known.logits[0, 0] = float("nan")
    fault = find_fault(Way(llamas()[0], torch.zeros(2, 4), cache, known, make_objective("fkl")))
    assert "1 of the teacher's largest logits, of the cache" in fault.tensor and "make it again" in fault.remedy
