"""Whether both models mean the same by a finished answer: what is asked, refused and mapped, and what is learnt."""

from __future__ import annotations

import ast
import logging
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import drkl
from drkl import DistillationConfig, DrklError
from drkl.config import load_config
from drkl.data import Example
from drkl.data.tokenize import Row, tokenize_examples
from drkl.models.load import load_model
from drkl.models.pair import own_tokenizer
from drkl.rollouts.config import RolloutsConfig
from drkl.rollouts.stops import Agreement, _refusal, agree_on_stops, merged_ids
from drkl.run_models import analyze_run, evaluate_run
from drkl.teachers.live import LiveTeacher
from drkl.teachers.stops import Stops, read_stops, student_stops, teacher_stops
from tests.data.tiny_tokenizers import CHATML, build
from tests.models import tiny
from tests.models.chains import chain
from tests.training import tiny_runs

BASE_END, OWN_END = 2, 4  # </s> and <|im_end|>
STOP_MAP = {"</s>": "<|im_end|>"}
DATA = [{"prompt": "hi" if i % 2 else "a b", "response": "hello"} for i in range(8)]
REFUSED = r"The student stops with '</s>', and the teacher with '<\|im_end\|>'"


def base_tokenizer() -> Any:
    return build(None, eos="</s>")


def instruct_tokenizer() -> Any:
    return build(CHATML)


def teacher_model(end: str = "<|im_end|>") -> PreTrainedModel:
    """It answers hello and stops."""
    tokenizer = instruct_tokenizer()
    return chain(tokenizer, {"\n": "hello", "hello": end})


def student_model(following: dict[str, str] | None = None) -> PreTrainedModel:
    tokenizer = base_tokenizer()
    return chain(tokenizer, {"\n": "hello", "hello": "</s>"} if following is None else following)


def rows(count: int = 5, **changes: Any) -> list[Row]:
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    examples = [Example(str(i), turns) for i in range(count)]
    return tokenize_examples(
        examples, instruct_tokenizer(), max_prompt_tokens=20, max_tokens=changes.pop("max_tokens", 40), **changes
    )[0]


def agree(
    student: PreTrainedModel, teacher: PreTrainedModel, data: Any = None, tokenizer: Any = None, **changes: Any
) -> Agreement:
    stops = read(student, teacher, data, tokenizer, changes.pop("taught", [OWN_END]))
    size = changes.pop("vocab_size", None)
    return agree_on_stops(stops, tokenizer or base_tokenizer(), RolloutsConfig(**changes), vocab_size=size)


def read(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Any = None,
    tokenizer: Any = None,
    taught: Any = (OWN_END,),
) -> Stops:
    tokenizer = tokenizer or base_tokenizer()
    return read_stops(
        student, LiveTeacher(teacher), rows() if data is None else data, tokenizer, taught, pad_id=0,
        teacher_tokenizer=own_tokenizer(teacher, tokenizer),
    )  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base student and an instruct teacher."""
    tiny.save(student_model(), tmp_path / "base", base_tokenizer())
    tiny.save(teacher_model(), tmp_path / "teacher", instruct_tokenizer())
    return tmp_path / "base", tmp_path / "teacher"


# What is asked ------------------------------------------------------------------------------------------------------


def test_a_pair_of_two_stop_tokens_is_refused_with_both_numbers() -> None:
    with pytest.raises(DrklError) as caught:
        agree(student_model(), teacher_model())
    message = str(caught.value)
    # One logit of 12 among zeros.
    rest = 1 / (math.exp(12.0) + len(base_tokenizer()) - 1)
    assert message.startswith("The student stops with '</s>', and the teacher with '<|im_end|>': at the ends of 5 ")
    assert f"gives '</s>' a probability of {rest:.2g}, and '<|im_end|>' 1 (geometric means)" in message
    assert (
        'set rollouts.stop_map: {"</s>": "<|im_end|>"} (in a command \'rollouts.stop_map={"</s>": "<|im_end|>"}\', in '
        'Python rollout_stop_map={"</s>": "<|im_end|>"})' in message
    )


@pytest.mark.parametrize("text", ["<|im_end|>", "<end 'of' \"turn\">", "{end: [$x]}", "\\ é🙂 #"])
def test_the_way_out_is_taken_word_for_word(text: str) -> None:
    tokenizer = base_tokenizer()
    tokenizer.add_tokens([text], special_tokens=True)
    end = tokenizer.convert_tokens_to_ids(text)
    message = str(_refusal(tokenizer, [BASE_END], end, 0.9, "found", "'</s>'"))
    before, pairs = message.split("(in a command ")[0], {"</s>": text}
    assert yaml.safe_load(before[before.index("rollouts.stop_map: ") :])["rollouts.stop_map"] == pairs
    ways = message.split("(in a command ")[1].split("): the models")[0]
    command, python = ways.split(", in Python rollout_stop_map=")
    (word,) = shlex.split(command)
    base = {"data": {"path": "bundled:dolly"}, "student": {"layers": 2}, "rollouts": {"share": 1.0}}
    assert load_config(base, [word])[0].rollouts.stop_map == pairs
    assert DistillationConfig("x", use_cpu=True, rollout_stop_map=ast.literal_eval(python)).rollouts.stop_map == pairs


def test_the_number_is_the_geometric_mean_at_the_last_token() -> None:
    teacher = tiny.llama(4)
    data = [row for count in (1, 2, 3) for row in rows(1, turns="last")[:count]]
    data = [Row(str(i), (1, 7, 9 + i), (8, 11 + i, OWN_END), row.example) for i, row in enumerate(data)]
    data.append(Row("cut", (1, 7), (8, 9), data[0].example))
    found = agree(tiny.llama(1), teacher, data, tiny.tokenizer(), taught=[])
    with torch.no_grad():
        logp = [
            teacher(torch.tensor([row.all_ids])).logits[0, len(row.all_ids) - 2].log_softmax(-1)[OWN_END].item()
            for row in data[:-1]
        ]
    expected = math.exp(sum(logp) / len(logp))
    assert found.note == (
        f"The student stops with '<|im_end|>': at the ends of {len(logp)} finished rows the teacher gives "
        f"'<|im_end|>' a probability of {expected:.2g}."
    )


def test_the_teacher_is_asked_after_the_prompt_as_it_reads_it() -> None:
    """After "a" it stops with the student's token, after "b" with another."""
    tokenizer = instruct_tokenizer()
    teacher = chain(tokenizer, {"a": "</s>", "b": "<|im_end|>"})
    a, b, hi = tokenizer.convert_tokens_to_ids(["a", "b", "hi"])
    row = rows(1)[0]
    alike = Row("0", (hi, b), (OWN_END,), row.example, teacher_prompt_ids=(hi, a))
    assert agree(student_model(), teacher, [alike]).note is not None
    with pytest.raises(DrklError, match="The student stops with"):
        agree(student_model(), teacher, [Row("0", (hi, a), (OWN_END,), row.example, teacher_prompt_ids=(hi, b))])


def test_several_stop_tokens_of_the_student_are_one_event() -> None:
    student = student_model()
    student.generation_config.eos_token_id = [BASE_END, OWN_END]
    found = agree(student, teacher_model())
    assert found.merged_ids == () and found.warning is None
    assert found.note is not None and "gives '</s>' or '<|im_end|>' a probability of 1." in found.note


@pytest.mark.parametrize("kind", ["untrained", "goes on"])
def test_a_teacher_that_stops_with_nothing_is_a_warning(kind: str) -> None:
    teacher = teacher_model("there")
    if kind == "untrained":
        teacher = tiny.llama(1, vocab=len(base_tokenizer()), initializer_range=1.0)
        with torch.no_grad():  # no stop token is likely
            teacher.lm_head.weight[[BASE_END, OWN_END]] = 0.0
            teacher.lm_head.weight.mul_(20.0)
    found = agree(student_model(), teacher)
    assert found.note is None and found.warning is not None and "\n" not in found.warning
    assert "at the ends of 5 finished rows the teacher gives '</s>' a probability of " in found.warning
    assert "no other stop token of its own much more" in found.warning


@pytest.mark.parametrize("kind", ["prompts", "cut"])
def test_without_a_finished_row_there_is_nobody_to_ask(kind: str, folders: tuple[Path, Path]) -> None:
    data = [Row("0", (1, 7), () if kind == "prompts" else (8, 9), rows(1)[0].example)]
    student, teacher = (load_model(str(folder), "fp32") for folder in folders)
    found = agree(student, teacher, data)
    assert found.note is None and found.warning is not None and "\n" not in found.warning
    assert "stops with '</s>', the teacher with '<|im_end|>', and no row has a whole response" in found.warning
    assert 'set rollouts.stop_map: {"</s>": "<|im_end|>"} (in a command' in found.warning
    found = agree(teacher, teacher, data)
    assert found.warning is not None and "stops with '<|im_end|>', and no row has a whole response" in found.warning


def test_a_stop_token_that_the_teacher_does_not_have_is_never_sampled() -> None:
    found = agree(student_model(), teacher_model(), vocab_size=2)
    assert found.warning is not None and "stops with '</s>', beyond the ids 0 to 1 on which" in found.warning


def test_nothing_is_refused_where_the_teacher_writes() -> None:
    for data in (None, []):
        agreement = agree(student_model(), teacher_model(), data, source="teacher")
        assert agreement.warning is None and OWN_END in agreement.learnt


def test_the_teachers_answers_end_as_its_own_template_ends(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Where neither its settings nor the template of the rows says so; the student learns that end."""
    model = teacher_model()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    teacher = tiny.save(model, tmp_path / "unlisted", instruct_tokenizer())
    trainer = python_run(
        tmp_path / "run", str(folders[0]), str(teacher), rollout_source="teacher", tokenizer=base_tokenizer(),
        data=[{"prompt": "hi"}], max_prompt_tokens=60,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["rollout_finished"] == 1 and trainer.state.log_history[0]["num_tokens"] == 2
    assert OWN_END in trainer.pair.student.generation_config.eos_token_id


def test_the_teachers_answers_end_with_the_special_token_that_it_is_sure_of(tmp_path: Path) -> None:
    """Where nothing calls it an end; else each of them would go on to its greatest length."""
    teacher = chain(base_tokenizer(), {"hi": "hello", "hello": "<|im_end|>"})
    data = [{"prompt": "hi", "response": "hello"}] * 8  # which end with </s>
    settings: dict[str, Any] = {"rollout_source": "teacher", "tokenizer": base_tokenizer(), "template": "plain"}
    trainer = python_run(tmp_path, student_model(), teacher, data=data, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["rollout_finished"] == 1
    assert OWN_END in trainer.pair.student.generation_config.eos_token_id


# Whose stop tokens --------------------------------------------------------------------------------------------------


def test_the_students_stop_tokens_are_those_of_its_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, teacher = folders
    written = instruct_tokenizer()
    assert student_stops(load_model(base, "fp32"), written) == [BASE_END]
    model = load_model(teacher, "fp32")
    assert teacher_stops(model, own_tokenizer(model, base_tokenizer())) == [OWN_END]
    # Its settings count too, and where it has no tokenizer they do alone.
    settings = GenerationConfig(eos_token_id=[3, BASE_END])
    settings.save_pretrained(base)
    assert student_stops(load_model(base, "fp32"), written) == [BASE_END, 3]
    for file in base.glob("tokenizer*"):
        file.unlink()
    assert student_stops(load_model(base, "fp32"), written) == [3, BASE_END]
    assert student_stops(student_model(), written) == [BASE_END]
    # Nothing but the run's tokenizer says anything.
    endless = tiny.llama(vocab=64, eos_token_id=None)
    assert student_stops(endless, written) == [OWN_END]
    # Nothing but its chat template.
    written.eos_token = None
    assert student_stops(endless, written) == [OWN_END]
    nothing = tiny.t5(layers=1)
    nothing.generation_config.eos_token_id = None
    with pytest.raises(DrklError, match="so its answers could never end"):
        student_stops(nothing, written)


@pytest.mark.parametrize("made", ["pruned", "random", "loaded"])
def test_a_student_made_from_the_teacher_stops_as_it_does(folders: tuple[Path, Path], made: str) -> None:
    """The end of a turn in its template is in no setting."""
    tokenizer = build(CHATML, eos="</s>")
    tiny.save(chain(tokenizer, {"\n": "hello", "hello": "<|im_end|>"}), folders[1], tokenizer)
    model = load_model(folders[1], "fp32")
    student = model
    if made == "pruned":
        student = drkl.prune(model, layers=1)
    if made == "random":
        student = AutoModelForCausalLM.from_config(model.config)
    assert read(student, model).student == [BASE_END, OWN_END]
    assert agree(student, model).note is not None


# The map ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pairs",
    [STOP_MAP, {"2": "4"}, {"</s>": "4"}, {"</s>": "<|im_end|>", "2": "<|im_end|>"}],
    ids=str,
)
def test_a_mapped_pair_passes(pairs: dict[str, str]) -> None:
    found = agree(student_model(), teacher_model(), stop_map=pairs)
    assert found.merged_ids == (BASE_END, OWN_END) and found.warning is None
    assert found.note is not None and "gives '</s>' or '<|im_end|>' a probability of 1." in found.note


def test_ids_need_no_quotes() -> None:
    pairs: Any = {2: 4, "</s>": "<|im_end|>"}
    assert RolloutsConfig(stop_map=pairs).stop_map == {"2": "4", "</s>": "<|im_end|>"}


def test_pairs_make_one_event() -> None:
    tokenizer = base_tokenizer()
    assert merged_ids({"</s>": "<|im_end|>", "<s>": "<|im_end|>"}, tokenizer, [1, 2], [4], None) == (1, 2, 4)
    assert merged_ids({"</s>": "<|im_end|>", "<s>": "hi"}, tokenizer, [1, 2], [4, 15], None) == (1, 2, 4, 15)
    assert merged_ids({}, tokenizer, [1, 2], [4], None) == ()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"<eot>": "<|im_end|>"}, r"has '<eot>', which .*; expected a stop token of the student: '</s>' \(id 2\)\."),
        ({"zzz": "<|im_end|>"}, r"has 'zzz', which the tokenizer does not know; expected a stop token of the student"),
        ({"</s>": "hi hi"}, r"has 'hi hi', which is 3 tokens; expected a stop token of the teacher: '<\|im_end\|>'"),
        ({"hi": "<|im_end|>"}, r"has 'hi', with which the student does not stop; expected .*: '</s>' \(id 2\)\."),
        ({"</s>": "hello"}, r"has 'hello', with which the teacher does not stop; expected .*: '<\|im_end\|>' \(id 4\)"),
        ({"17": "<|im_end|>"}, r"has '17', with which the student does not stop"),
        ({"</s>": "</s>"}, r"has '</s>': '</s>', one token to both models; leave it out"),
        ({"</s>": "<|im_end|>", "2": "<s>"}, r"maps '2' to '<\|im_end\|>' and to '<s>'; expected one of them"),
    ],
    ids=str,
)
def test_entries_that_are_no_such_pair_are_refused(pairs: dict[str, str], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        merged_ids(pairs, base_tokenizer(), [2], [4, 2, 1], None)


def test_a_token_beyond_the_shared_vocabulary_is_refused() -> None:
    with pytest.raises(DrklError, match=r"has '<\|im_end\|>' \(id 4\), but .* are compared on the ids 0 to 3"):
        merged_ids(STOP_MAP, base_tokenizer(), [2], [4], 4)


def test_a_map_to_a_token_that_the_teacher_does_not_stop_with_does_not_pass() -> None:
    teacher = teacher_model()
    teacher.generation_config.eos_token_id = [OWN_END, 3]
    with pytest.raises(DrklError, match=r"stops with '</s>' or '<\|im_start\|>', and the teacher with '<\|im_end\|>'"):
        agree(student_model(), teacher, stop_map={"</s>": "<|im_start|>"})


# Runs ---------------------------------------------------------------------------------------------------------------


def run_config(root: Path, folders: tuple[Path, Path], **rollouts: Any) -> dict[str, Any]:
    values = tiny_runs.config(root, training={"max_steps": 1}, rollouts={"share": 0.5, "max_new_tokens": 4} | rollouts)
    values["teacher"]["model"], values["student"] = str(folders[1]), {"init": "pretrained", "model": str(folders[0])}
    values["evaluation"] = {}
    return values


def test_a_config_is_refused_and_passes_with_a_map(folders: tuple[Path, Path], tmp_path: Path) -> None:
    values = run_config(tmp_path, folders)
    values["data"] |= {"path": str(tiny_runs.write_rows(tmp_path / "rows.jsonl", response="hello"))}
    with pytest.raises(DrklError, match=REFUSED):
        tiny_runs.train(values)
    assert not (tmp_path / "runs").exists()
    told: list[str] = []
    specs = tiny_runs.specs(values, ["rollouts.stop_map={'</s>': '<|im_end|>'}"])
    run = tiny_runs.distill(specs, listener=tiny_runs.Listener(on_message=told.append))
    assert any("'</s>' or '<|im_end|>'" in line for line in told)
    saved = GenerationConfig.from_pretrained(run.student_path)
    assert set(saved.eos_token_id) == {BASE_END, OWN_END}
    assert run.read_env()["merged_ids"] == [BASE_END, OWN_END]


@pytest.mark.slow
def test_an_evaluation_and_an_analysis_score_the_event(folders: tuple[Path, Path], tmp_path: Path) -> None:
    values = run_config(tmp_path, folders, stop_map=STOP_MAP)
    values["training"]["learning_rate"] = 1e-30
    values["data"] |= {"path": str(tiny_runs.write_rows(tmp_path / "rows.jsonl", response="hello"))}
    values["evaluation"] = {"prompts": 1, "samples_per_prompt": 1, "sweep": [], "max_new_tokens": 2}
    run = tiny_runs.train(values)
    evaluation = evaluate_run(run.root)
    assert evaluation.settings["merged_ids"] == [BASE_END, OWN_END]
    # Its models differ in the token that they end with, and in nothing else.
    assert evaluation.value("student", "rkl") == pytest.approx(0, abs=1e-5)
    assert evaluation.value("student", "agreement") == 1
    totals = analyze_run(run.root, positions=4).tables["totals"]
    assert totals["accuracy"]["value"] == 1 and abs(totals["target_gap"]["value"]) < 1e-5


def python_run(folder: Path, student: Any, teacher: Any, **fields: Any) -> drkl.DistillationTrainer:
    words = {
        "learning_rate": 0.5, "max_steps": 1, "rollout_share": 1.0, "rollout_max_new_tokens": 8, "objective": "rkl",
        "logging_steps": 1,
    } | fields  # fmt: skip
    tokenizer = words.pop("tokenizer", instruct_tokenizer())
    data = words.pop("data", DATA)
    args = drkl.DistillationConfig(
        output_dir=str(folder), use_cpu=True, precision="fp32", disable_tqdm=True, tokens_per_step=200, max_tokens=64,
        eval_strategy="no", lr_scheduler_type="constant", **words,
    )  # fmt: skip
    return drkl.DistillationTrainer(student, teacher, args, data, processing_class=tokenizer)


def test_a_student_learns_to_stop_on_its_own_answers(tmp_path: Path) -> None:
    """It never stops at first; with its own token or the teacher's is all the same."""
    trainer = python_run(
        tmp_path, student_model({"\n": "hello", "hello": "hello"}), teacher_model(), rollout_stop_map=STOP_MAP,
        max_steps=12,
    )  # fmt: skip
    assert trainer.pair.merged_ids == (BASE_END, OWN_END)
    hello = base_tokenizer().convert_tokens_to_ids("hello")

    def stop() -> list[float]:
        with torch.no_grad():
            probs = trainer.pair.student(torch.tensor([[hello]])).logits[0, 0].softmax(-1)
        return [float(probs[token]) for token in (BASE_END, OWN_END)]

    assert sum(stop()) < 1e-4
    trainer.train()
    assert sum(stop()) > 0.9
    assert set(trainer.pair.student.generation_config.eos_token_id) == {BASE_END, OWN_END}
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.1 * losses[0]


def test_objects_are_refused_and_mapped_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DrklError, match=REFUSED):
        python_run(tmp_path, student_model(), teacher_model())
    with pytest.raises(DrklError, match=REFUSED):
        python_run(tmp_path, student_model(), teacher_model(), rollout_source="mixed")
    with caplog.at_level(logging.WARNING, "drkl"):
        trainer = python_run(
            tmp_path, student_model(), teacher_model(), rollout_stop_map=STOP_MAP, tokenizer=base_tokenizer(),
            template="plain",
        )  # fmt: skip
    # The rows end with </s>, and the teacher with <|im_end|>: one event, so nothing is said.
    assert trainer.pair.merged_ids == (BASE_END, OWN_END)
    assert not [record for record in caplog.records if record.name == "drkl"]


def test_off_policy_and_the_teachers_answers_are_as_before(tmp_path: Path) -> None:
    assert python_run(tmp_path, student_model(), teacher_model(), rollout_share=0.0).pair.merged_ids == ()
    assert python_run(tmp_path, student_model(), teacher_model(), rollout_source="teacher").pair.merged_ids == ()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_lora_student(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def student() -> Any:
        return get_peft_model(student_model(), LoraConfig(r=2, target_modules=["q_proj"]))

    with pytest.raises(DrklError, match=REFUSED):
        python_run(tmp_path, student(), teacher_model())
    trainer = python_run(tmp_path, student(), teacher_model(), rollout_stop_map=STOP_MAP)
    trainer.train()
    assert trainer.pair.merged_ids == (BASE_END, OWN_END)


def ending_mt5(end: int) -> PreTrainedModel:
    """An encoder-decoder that gives one token nearly everything, whatever it reads."""
    model = tiny.mt5(2, layers=1, eos_token_id=end, dropout_rate=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.shared.weight.fill_(1.0)
        model.decoder.final_layer_norm.weight.fill_(1.0)
        model.lm_head.weight[end] = 20.0 / 16  # of 16 ones
    return model


def test_an_encoder_decoder(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=REFUSED):
        python_run(tmp_path, ending_mt5(BASE_END), ending_mt5(OWN_END))
    trainer = python_run(tmp_path, ending_mt5(BASE_END), ending_mt5(OWN_END), rollout_stop_map=STOP_MAP)
    trainer.train()
    assert trainer.pair.merged_ids == (BASE_END, OWN_END)
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-6  # they differ in nothing but the token
