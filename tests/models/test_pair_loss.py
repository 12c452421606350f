"""One process: every family gives the loss of its logits; what a batch, a model or an option may be."""

from __future__ import annotations

import copy
import doctest
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaForCausalLM,
)

import drkl
from drkl.errors import DrklError
from drkl.losses import LMHead, TopK
from drkl.models.forward import hidden_states, lm_head
from drkl.models.pair_loss import count_tokens, pair_loss
from tests.models import tiny, tiny_classifiers
from tests.models.pair_processes import make_batch, make_student, make_teacher
from tests.models.test_forward import CONFIGS

DECODERS = sorted(CONFIGS)
SEQ2SEQ: dict[str, Callable[..., Any]] = {
    "t5": tiny.t5,
    "t5 untied": lambda seed=0: tiny.t5(seed, tie_word_embeddings=False),
    "mt5": tiny.mt5,
    "bart": tiny.bart,
}


def number(loss: Tensor) -> float:
    """What `float` warns of, where a loss has a graph."""
    return loss.item()


def reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """From logits and aligned labels, where a label counts."""
    logq, logp = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    return (logq.exp() * (logq - logp)).sum(-1)[labels != -100].mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def assert_same(student: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    """Values and gradients agree to float64's rounding, a few hundred times over."""
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-11, atol=1e-14)
    ours.backward()
    first = gradients(student)
    theirs.backward()
    second = gradients(student)
    scale = max(float(gradient.abs().max()) for gradient in second.values())
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert float((gradient - second[name]).abs().max()) <= 1e-11 * scale, name


def double(model: Any) -> Any:
    return model.double()


def other(model: Any) -> Any:
    """A teacher of the same sizes."""
    torch.manual_seed(9)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return teacher


def pair_of(name: str) -> tuple[Any, Any, dict[str, Tensor]]:
    return make_student(name), make_teacher(name), make_batch(name)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_give_the_loss_of_their_shifted_logits(name: str) -> None:
    student = double(CONFIGS[name]())
    teacher, batch = other(student), make_batch("gpt2")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    theirs = reverse_kl(student(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1], labels)
    assert_same(student, pair_loss(student, teacher, batch, objective="rkl"), theirs)
    assert int(count_tokens(batch, student)) == int((labels != -100).sum())


def test_ids_may_count_as_one_class() -> None:
    student = double(CONFIGS["gpt2"]())
    teacher, batch, ids = other(student), make_batch("gpt2"), [3, 7]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def probabilities(model: Any) -> Tensor:
        probs = model(**inputs).logits[:, :-1].softmax(-1)
        others = [token for token in range(probs.shape[-1]) if token not in ids]
        return torch.cat([probs[..., ids].sum(-1, keepdim=True), probs[..., others]], -1)

    theirs = reverse_kl(probabilities(student).log(), probabilities(teacher).log(), batch["labels"][:, 1:])
    assert_same(student, pair_loss(student, teacher, batch, objective="rkl", merged_ids=ids), theirs)


@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoders_give_the_loss_of_their_logits(name: str, fed: bool) -> None:
    student, teacher = double(SEQ2SEQ[name]()), double(SEQ2SEQ[name](seed=4))
    batch = make_batch("t5")
    if fed:
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)
        batch["decoder_attention_mask"] = batch["attention_mask"]
    theirs = reverse_kl(student(**batch).logits, teacher(**batch).logits, batch["labels"])
    assert_same(student, pair_loss(student, teacher, batch, objective="rkl"), theirs)
    assert int(count_tokens(batch, student)) == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("name", tiny_classifiers.SIZES)
def test_classifiers_give_the_loss_of_their_classes(name: str, column: bool) -> None:
    student, teacher = double(tiny_classifiers.make(name)), double(tiny_classifiers.make(name, seed=4))
    batch = make_batch("classifier")
    if name in ("bert", "roberta"):
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    if name == "bert":
        batch["token_type_ids"][:, 4:] = 1
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    theirs = reverse_kl(student(**inputs).logits, teacher(**inputs).logits, batch["labels"])
    if column:
        batch["labels"] = batch["labels"][:, None]
    assert_same(student, pair_loss(student, teacher, batch, objective="rkl"), theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "neox"])
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    student = CONFIGS[name]()
    teacher, rows = other(student), [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    total, count = torch.zeros(()), 0
    for row in rows:
        batch = {"input_ids": torch.tensor([row]), "labels": torch.tensor([row])}
        total = total + (len(row) - 1) * pair_loss(student, teacher, batch)
        count += len(row) - 1
    for side in ("left", "right"):
        pads = [6 - len(row) for row in rows]
        at_left = side == "left"
        filled = [
            ([0] * pad + row, [0] * pad + [1] * len(row), [-100] * pad + row)
            if at_left
            else (row + [0] * pad, [1] * len(row) + [0] * pad, row + [-100] * pad)
            for row, pad in zip(rows, pads, strict=True)
        ]
        ids, mask, labels = (torch.tensor(part) for part in zip(*filled, strict=True))
        if at_left:
            labels[1, 3] = -100  # a collator's labels let the first real token count, which padding would predict
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        torch.testing.assert_close(pair_loss(student, teacher, batch), total / count, rtol=1e-4, atol=1e-6)


def test_positions_of_the_batch_are_kept() -> None:
    student, teacher, batch = pair_of("gpt2")
    positions = torch.arange(8).flip(0).expand(4, 8)
    moved = pair_loss(student, teacher, batch | {"position_ids": positions}, objective="rkl")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "position_ids": positions}
    logits = [model(**inputs).logits[:, :-1] for model in (student, teacher)]
    torch.testing.assert_close(moved, reverse_kl(*logits, batch["labels"][:, 1:]))


def test_keys_that_are_no_inputs_are_left_alone() -> None:
    student, teacher, batch = pair_of("llama")
    more = {"length": torch.tensor([8] * 4), "token_type_ids": torch.zeros(4, 8), "row_ids": list("abcd"), "past": None}
    assert number(pair_loss(student, teacher, batch | more)) == number(pair_loss(student, teacher, batch))


@pytest.mark.filterwarnings("ignore:You're using a .* tokenizer")
def test_the_batches_of_transformers_collators() -> None:
    tokens = tiny.tokenizer()
    rows = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}]
    batch = DataCollatorForLanguageModeling(tokens, mlm=False)(rows)
    assert number(pair_loss(tiny.llama(), tiny.llama(seed=1), batch)) > 0
    pairs = [row | {"labels": row["input_ids"][::-1]} for row in rows]
    for model in (None, tiny.t5()):
        batch = DataCollatorForSeq2Seq(tokens, model=model)(pairs)
        assert ("decoder_input_ids" in batch) == (model is not None)
        assert number(pair_loss(tiny.t5(), tiny.t5(seed=1), batch)) > 0
    texts = [row | {"labels": 1} for row in rows]
    batch = DataCollatorWithPadding(tokens)(texts)
    assert number(pair_loss(tiny_classifiers.make(), tiny_classifiers.make(seed=1), batch)) > 0


def test_the_options_are_those_of_distillation_loss() -> None:
    student, teacher, batch = pair_of("llama")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = [model(**inputs).logits[:, :-1].detach() for model in (student, teacher)]
    for options in (
        {"objective": "drkl"},
        {"objective": "fkl", "temperature": 2.0, "t2_scaling": True, "kd_weight": 0.25},
        {"objective": drkl.make_objective("gjs", beta=0.3)},
        {"objective": "ce"},
        {"objective": "rkl", "vocab_size": 60},
        {"objective": "rkl", "num_tokens": 7},
        {"objective": "rkl", "num_tokens": torch.tensor(7)},
    ):
        ours = pair_loss(student, teacher, batch, **options)  # type: ignore[arg-type]
        theirs = drkl.distillation_loss(*logits, batch["labels"][:, 1:], **options)  # type: ignore[arg-type]
        torch.testing.assert_close(ours.detach(), theirs)
    named = pair_loss(student, teacher, batch, objective="drkl", objective_params={"gamma": 0.2})
    assert number(named) == number(pair_loss(student, teacher, batch, objective=drkl.make_objective("drkl", gamma=0.2)))


def test_a_function_is_an_objective() -> None:
    def reverse(student_logp: Tensor, teacher_logp: Tensor, labels: Tensor) -> Tensor:
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)

    student, teacher, batch = pair_of("t5")
    named = pair_loss(student, teacher, batch, objective="rkl")
    assert_same(student, pair_loss(student, teacher, batch, objective=reverse), named)


@pytest.mark.parametrize("options", [{"objective": "ce"}, {"kd_weight": 0.0}])
def test_without_an_objective_that_compares_no_teacher_is_needed(options: dict[str, Any]) -> None:
    student, teacher, batch = pair_of("llama")
    teacher.forward = None  # nobody calls it
    alone = pair_loss(student, None, batch, **options)
    assert number(alone) == number(pair_loss(student, teacher, batch, **options))
    torch.testing.assert_close(alone.detach(), student(**batch).loss.detach(), check_dtype=False)


@pytest.mark.parametrize("name", ["llama", "t5", "mt5 untied", "bart", "classifier"])
def test_known_states_take_the_place_of_the_teacher(name: str) -> None:
    student, teacher, batch = pair_of(name)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if name in SEQ2SEQ or name == "mt5 untied":
        inputs["decoder_input_ids"] = teacher.prepare_decoder_input_ids_from_labels(labels=labels)
        inputs["decoder_attention_mask"] = torch.ones_like(labels)
    with torch.no_grad():
        states = hidden_states(teacher, inputs)
    expected = number(pair_loss(student, teacher, batch))
    if name == "classifier":
        assert number(pair_loss(student, None, batch, teacher_hidden=states[:, 0])) == pytest.approx(
            expected, rel=1e-12
        )
        return
    if name == "llama":
        labels = torch.cat([labels[:, 1:], torch.full((4, 1), -100)], 1)
    for hidden in (states, states[labels != -100]):
        head = lm_head(teacher)
        for known in ({"teacher": teacher}, {"teacher": None, "teacher_head": head}):
            loss = pair_loss(student, batch=batch, teacher_hidden=hidden, **known)
            assert number(loss) == pytest.approx(expected, rel=1e-12)
    if name == "llama":
        loss = pair_loss(student, None, batch, teacher_hidden=states, teacher_head=teacher.lm_head.weight)
        assert number(loss) == pytest.approx(expected, rel=1e-12)
        logits = head.logits(states[labels != -100])
        topk = TopK.of_logits(logits, logits.shape[1] - 1)
        assert number(pair_loss(student, None, batch, teacher_hidden=topk)) == pytest.approx(expected, rel=1e-9)
        with pytest.raises(DrklError, match="takes the place of a teacher"):
            pair_loss(student, teacher, batch, teacher_hidden=topk)


def test_the_teacher_runs_in_eval_mode_without_gradients_and_is_put_back() -> None:
    student, teacher, batch = pair_of("gpt2")
    expected = number(pair_loss(student, teacher, batch))
    teacher.train()
    teacher.transformer.h[0].eval()
    modes = [module.training for module in teacher.modules()]
    loss = pair_loss(student, teacher, batch)
    assert number(loss) == expected
    assert [module.training for module in teacher.modules()] == modes and len(set(modes)) == 2
    loss.backward()
    assert all(weight.grad is None for weight in teacher.parameters())


def test_the_students_mode_is_its_own() -> None:
    student, teacher, batch = pair_of("gpt2")
    student.train()
    torch.manual_seed(0)
    first = number(pair_loss(student, teacher, batch))
    assert student.training
    assert number(pair_loss(student, teacher, batch)) != first  # dropout
    student.eval()
    assert number(pair_loss(student, teacher, batch)) == number(pair_loss(student, teacher, batch))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradients_flow_through_checkpointed_layers() -> None:
    student, teacher, batch = pair_of("llama")
    pair_loss(student, teacher, batch).backward()
    expected = gradients(student)
    student.gradient_checkpointing_enable()
    student.train()
    pair_loss(student, teacher, batch).backward()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("name", ["llama", "t5", "classifier"])
def test_a_batch_in_which_nothing_counts_is_zero_with_a_graph(name: str) -> None:
    student, teacher, batch = pair_of(name)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    if name == "llama":
        batch["labels"][:, 0] = 5  # no position predicts the first token
    loss = pair_loss(student, teacher, batch)
    assert number(loss) == 0
    loss.backward()
    found = gradients(student)
    assert found and all(float(gradient.abs().max()) == 0 for gradient in found.values())


def test_no_gradients_are_made_where_none_are_wanted() -> None:
    student, teacher, batch = pair_of("llama")
    expected = number(pair_loss(student, teacher, batch))
    with torch.no_grad():
        loss = pair_loss(student, teacher, batch)
    assert not loss.requires_grad
    assert number(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_may_differ(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher, batch = tiny.llama(), tiny.llama(seed=5), make_batch("llama")
    exact = number(pair_loss(student, teacher, batch))
    loss = pair_loss(student.to(student_dtype), teacher.to(teacher_dtype), batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert number(loss) == pytest.approx(exact, rel=0.2)  # bf16 weights are 0.4 % off, and logits reach ten


def test_autocast_reaches_the_student() -> None:
    student, teacher, batch = tiny.llama(), tiny.llama(seed=5), make_batch("llama")
    dtypes = []
    student.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = pair_loss(student, teacher, batch)
    loss.backward()
    assert dtypes == [torch.bfloat16] and student.lm_head.weight.grad.dtype == torch.float32


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one state in a process, and a trainer of another test may have set its precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_what_accelerate_puts_around_the_forward_stays_there() -> None:
    from accelerate import Accelerator

    student, teacher, batch = tiny.llama(), tiny.llama(seed=5), make_batch("llama")
    student = Accelerator(cpu=True, mixed_precision="bf16").prepare(student)
    dtypes = []
    student.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: dtypes.append(output.dtype))
    wrapped = student.forward
    pair_loss(student, teacher, batch).backward()
    assert dtypes == [torch.bfloat16]
    assert student.forward is wrapped


def test_nothing_is_left_in_the_student() -> None:
    student, teacher, batch = pair_of("llama")
    before = [dict(module.__dict__) for module in (student, student.lm_head)]
    pair_loss(student, teacher, batch)
    with pytest.raises(DrklError, match="labels run from"):
        pair_loss(student, teacher, batch | {"labels": batch["input_ids"] + 1000}, objective="ce")
    assert [dict(module.__dict__) for module in (student, student.lm_head)] == before
    assert not student.lm_head._forward_hooks
    assert student(**batch).logits.shape == (4, 8, tiny.VOCAB)


def adapted(config: Any, model: Any = None) -> Any:
    from peft import get_peft_model

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", ".*tied", UserWarning)
        return double(get_peft_model(model or tiny.llama(tie_word_embeddings=False), config))


def test_lora_students() -> None:
    from peft import LoraConfig

    student, teacher, batch = pair_of("lora")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = [model(**inputs).logits[:, :-1] for model in (student, teacher)]
    theirs = reverse_kl(*logits, batch["labels"][:, 1:])
    assert_same(student, pair_loss(student, teacher, batch, objective="rkl"), theirs)
    trained_head = adapted(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        trained_head.get_output_embeddings().weight.mul_(1.5)
    theirs = reverse_kl(trained_head(**inputs).logits[:, :-1], logits[1], batch["labels"][:, 1:])
    assert_same(trained_head, pair_loss(trained_head, teacher, batch, objective="rkl"), theirs)
    with trained_head.disable_adapter():
        logits[0] = trained_head(**inputs).logits[:, :-1]
        theirs = reverse_kl(*logits, batch["labels"][:, 1:])
        torch.testing.assert_close(pair_loss(trained_head, teacher, batch, objective="rkl"), theirs)


def test_adapters_that_cannot_be_read_are_refused() -> None:
    from peft import LoraConfig, PromptTuningConfig

    teacher, batch = make_teacher("llama"), make_batch("llama")
    with pytest.raises(DrklError, match=r"the head's weight itself \(an adapter on the head: leave it out"):
        pair_loss(adapted(LoraConfig(r=2, target_modules=["q_proj", "lm_head"])), teacher, batch)
    on_head, states = adapted(LoraConfig(r=2, target_modules=["lm_head"])), torch.zeros(4, 8, 16, dtype=torch.float64)
    with pytest.raises(DrklError, match="The teacher's output head is a peft"):
        pair_loss(make_student("llama"), on_head, batch, teacher_hidden=states)
    prompts = adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(DrklError, match="puts positions of its own before the batch's"):
        pair_loss(prompts, teacher, batch)


@pytest.mark.parametrize("way", [*(pytest.param(way, marks=pytest.mark.slow) for way in ("whole", "in place")), "body"])
def test_compiled_students(way: str) -> None:
    from torch._dynamo.testing import CompileCounter

    student, teacher, batch = tiny.llama(layers=1), tiny.llama(seed=5), make_batch("llama")
    expected = number(pair_loss(student, teacher, batch))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled: Any = torch.compile(student, backend=counter) if way == "whole" else student
    if way != "whole":
        (student if way == "in place" else student.base_model).compile(backend=counter)
    counts = []
    for _ in range(4):
        loss = pair_loss(compiled, teacher, batch)
        counts.append(counter.frame_count)
    loss.backward()
    assert number(loss) == pytest.approx(expected, rel=1e-5)
    assert counts[0] > 0 and len(set(counts[1:])) == 1  # compiled once, not in every call


class Doubled(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = super().forward(input_ids, attention_mask)
        output.logits = output.logits * 2
        return output


class Twice(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = super().forward(input_ids, attention_mask)
        self.lm_head(self.model.embed_tokens(torch.ones(4, 8, dtype=torch.int64)))
        return output


def test_families_that_do_more_with_their_head_are_refused() -> None:
    config, teacher, batch = tiny.llama().config, tiny.llama(), make_batch("llama")
    with pytest.raises(DrklError, match="does not compute its logits as softcap"):
        pair_loss(Doubled(config), teacher, batch)
    with pytest.raises(DrklError, match="called its output head 2 times"):
        pair_loss(Twice(config), teacher, batch)


@pytest.mark.parametrize(
    ("student", "teacher", "change", "words"),
    [
        ("llama", "t5", {}, "is a decoder-only model and the teacher T5ForConditionalGeneration is an encoder-decoder"),
        ("classifier", "llama", {}, "is a sequence classifier and the teacher LlamaForCausalLM is a decoder-only"),
        ("t5", "bart", {}, "decoder starts with the token 0 and the teacher's with 4"),
        (
            "llama",
            "llama",
            {"labels": None},
            "The batch has 'input_ids', 'attention_mask'; expected 'labels'",
        ),
        ("llama", "llama", {"labels": torch.ones(4, 8)}, "labels are torch.float32; expected whole numbers"),
        ("llama", "llama", {"labels": torch.ones(4, 7).long()}, r"\[4, 8\] and labels \[4, 7\]; expected the same"),
        ("llama", "llama", {"labels": torch.ones(4).long()}, r"labels have shape \[4\]; expected \[batch, tokens\]"),
        ("llama", "llama", {"input_ids": None}, "The batch has no 'input_ids'"),
        ("classifier", "classifier", {"labels": torch.ones(4, 8).long()}, r"expected \[batch\], one class number"),
    ],
)
def test_a_batch_or_a_pair_that_does_not_fit_is_refused(
    student: str, teacher: str, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(DrklError, match=words):
        pair_loss(make_student(student), make_teacher(teacher), make_batch(student) | change)


def test_models_that_do_not_fit_are_refused() -> None:
    student, teacher, batch = pair_of("llama")
    engine: Any = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = student
    masked = BertForMaskedLM(BertConfig(**tiny_classifiers.SIZES["bert"], vocab_size=64))
    for model, words in (
        (nn.DataParallel(student), "student is in a DataParallel, which copies the model in every step"),
        (nn.Linear(2, 2), "student is a Linear; expected a transformers PreTrainedModel"),
        (masked, "student is a BertForMaskedLM; expected a decoder-only language model"),
        (engine, "student is in a DeepSpeedEngine, which scales"),
        (double(tiny.llama(vocab=60)), "The teacher scores 64 tokens and the student 60"),
    ):
        with pytest.raises(DrklError, match=words):
            pair_loss(model, teacher, batch)
    with pytest.raises(DrklError, match="teacher is a str; expected a transformers PreTrainedModel"):
        pair_loss(student, "llama", batch)  # type: ignore[arg-type]
    small = pair_loss(double(tiny.llama(vocab=62)), teacher, batch, vocab_size=60)
    assert number(small) > 0
    packed = double(tiny.llama(tie_word_embeddings=False))
    packed.lm_head.weight = nn.Parameter(torch.ones(64, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(DrklError, match="holds no weights in memory as floating point numbers"):
        pair_loss(packed, teacher, batch)
    packed.lm_head = type("Linear4bit", (nn.Linear,), {"forward": lambda self, x: x})(16, 64, bias=False)
    with pytest.raises(DrklError, match=r"Linear4bit, not a torch\.nn\.Linear"):
        pair_loss(packed, teacher, batch)


def test_classes_in_another_order_are_refused() -> None:
    student, batch = make_student("classifier"), make_batch("classifier")
    turned = tiny_classifiers.make(seed=5, classes=("loan", "card", "other"))
    with pytest.raises(DrklError, match=r"in another order \(class 0: 'card', its own 'loan'\)"):
        pair_loss(student, double(turned), batch)
    fresh = double(tiny_classifiers.make(classes=("LABEL_0", "LABEL_1", "LABEL_2")))
    assert number(pair_loss(fresh, make_teacher("classifier"), batch)) > 0


def test_a_teacher_that_is_missing_or_given_twice_is_refused() -> None:
    student, teacher, batch = pair_of("llama")
    states = torch.randn(4, 8, 16, dtype=torch.float64)
    with pytest.raises(DrklError, match="compares with a teacher, and there is none"):
        pair_loss(student, None, batch)
    with pytest.raises(DrklError, match="teacher_hidden is given without a head"):
        pair_loss(student, None, batch, teacher_hidden=states)
    with pytest.raises(DrklError, match="teacher and teacher_head are both given"):
        pair_loss(student, teacher, batch, teacher_hidden=states, teacher_head=LMHead(torch.ones(64, 16)))
    for wrong in (states[:, 1:], states[:3], states[0]):
        with pytest.raises(DrklError, match=r"expected \[4, 8, 'hidden'\]"):
            pair_loss(student, teacher, batch, teacher_hidden=wrong)


def test_the_example_of_the_docstring() -> None:
    from drkl.models import pair_loss as module

    failed, tried = doctest.testmod(module)
    assert tried > 3 and failed == 0


def test_it_is_a_public_name() -> None:
    assert drkl.pair_loss is pair_loss
