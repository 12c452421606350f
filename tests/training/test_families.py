"""Decoder-only and encoder-decoder pairs through the same loss, against a loop written out; whole runs of T5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from typer.testing import CliRunner

from drkl import make_objective
from drkl.cli import app
from drkl.data.collate import collate
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses.config import LossConfig
from drkl.models.at_head import call_at_head
from drkl.models.forward import decoder_start
from drkl.models.pair_loss import model_inputs
from drkl.teachers.live import LiveTeacher
from drkl.training.estimate import estimate
from drkl.training.forward import loss_of
from drkl.training.heldout import HeldOut
from tests.data.tiny_tokenizers import build
from tests.models import tiny
from tests.training import tiny_runs

PAIRS: dict[str, Any] = {
    "gpt2": (tiny.gpt2, {}),
    "t5": (tiny.t5, {}),
    "t5 v1.1": (tiny.t5, {"tie_word_embeddings": False}),
    "mt5": (tiny.mt5, {}),
    "bart": (tiny.bart, {}),
}
PROMPTS = [(5, 6, 7, 8), (10,), (20, 21)]
RESPONSES = [(8, 9, 4), (11, 12, 13, 14, 4), (30, 4)]


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    family, changes = PAIRS[name]
    return family(1, layers=2, **changes).double(), family(2, layers=3, **changes).double()


def rows(model: PreTrainedModel) -> list[Row]:
    apart = decoder_start(model) is not None
    return [
        Row(str(i), prompt, response, None, encoder_decoder=apart)  # type: ignore[arg-type]
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]


def batch_of(model: PreTrainedModel, data: list[Row], pad_id: int = 0) -> dict[str, Any]:
    return collate(data, pad_id=pad_id, decoder_start=decoder_start(model))


def fused(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Any], objective: str, num_tokens: float
) -> Tensor:
    live, keep = LiveTeacher(teacher), batch["labels"] != -100
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "row_ids")}
    hidden = live.hidden_at(inputs, keep)
    settings: dict[str, Any] = {"objective": make_objective(objective), "num_tokens": num_tokens}

    def at_head(states: Tensor, head: Any) -> Tensor:
        return loss_of(states[keep], head, hidden, live.head, batch["labels"][keep], LossConfig(), **settings)

    loss = call_at_head(student, model_inputs(student, inputs, "student"), at_head)
    return loss


def by_hand(student: PreTrainedModel, teacher: PreTrainedModel, objective: str) -> Tensor:
    """Row by row, unpadded; the sum of KLs at the positions that predict a response token over their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        if student.config.is_encoder_decoder:
            inputs = {
                "input_ids": torch.tensor([prompt]),
                "decoder_input_ids": torch.tensor([[student.config.decoder_start_token_id, *response[:-1]]]),
            }
            first = 0
        else:
            inputs, first = {"input_ids": torch.tensor([[*prompt, *response]])}, len(prompt) - 1
        logits = student(**inputs).logits[0]
        with torch.no_grad():
            teacher_logits = teacher(**inputs).logits[0]
        for t in range(len(response)):
            logq = logits[first + t] - torch.logsumexp(logits[first + t], 0)
            logp = teacher_logits[first + t] - torch.logsumexp(teacher_logits[first + t], 0)
            if objective == "fkl":
                total = total + (logp.exp() * (logp - logq)).sum()
            else:
                total = total + (logq.exp() * (logq - logp)).sum()
            count += 1
    return total / count


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", ["fkl", "rkl"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_loss_is_that_of_a_loop_written_out(name: str, objective: str) -> None:
    student, teacher = pair(name)
    expected = by_hand(student, teacher, objective)
    theirs = gradients(student, expected)
    loss = fused(student, teacher, batch_of(student, rows(student)), objective, sum(map(len, RESPONSES)))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(expected.detach()) > 0.01
    ours = gradients(student, loss)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_batch_and_padding_leave_the_loss_unchanged(name: str) -> None:
    student, teacher = pair(name)
    data, count = rows(student), sum(map(len, RESPONSES))

    @torch.no_grad()
    def value(some: list[Row], pad_id: int = 0) -> float:
        return float(fused(student, teacher, batch_of(student, some, pad_id), "rkl", count))

    assert value(data) == pytest.approx(value(data[::-1], pad_id=7), rel=1e-6)
    assert value(data) == pytest.approx(sum(value([row]) for row in data), rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_a_position_that_does_not_count_gets_no_gradient(name: str) -> None:
    student, teacher = pair(name)
    batch = batch_of(student, rows(student))
    batch["labels"][:, -1] = -100
    batch["labels"][1] = -100
    seen: list[Tensor] = []
    body = student.get_decoder() if student.config.is_encoder_decoder else student.base_model

    def keep(module: Any, args: Any, out: Any) -> None:
        out.last_hidden_state.retain_grad()
        seen.append(out.last_hidden_state)

    handle = body.register_forward_hook(keep)
    fused(student, teacher, batch, "fkl", 5).backward()
    handle.remove()
    counted = batch["labels"] != -100
    assert not seen[0].grad[~counted].any() and seen[0].grad[counted].abs().sum(-1).gt(0).all()


def test_an_empty_part_of_a_step_costs_nothing() -> None:
    student, teacher = pair("t5")
    loss = fused(student, teacher, batch_of(student, []), "rkl", 5)
    assert float(loss.detach()) == 0.0
    loss.backward()


def test_held_out_loss_is_the_same_number() -> None:
    student, teacher = pair("t5")
    heldout = HeldOut(rows(student), 0, LiveTeacher(teacher), rows_per_batch=1, decoder_start=0)
    values = heldout.evaluate(student, make_objective("rkl"), LossConfig())
    assert values["loss"] == pytest.approx(float(by_hand(student, teacher, "rkl").detach()), rel=1e-5)
    assert values["rkl"] == pytest.approx(values["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    family, changes = PAIRS[name]
    dropouts = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "t5": {"dropout_rate": 0.0}}
    student = family(1, layers=2, **changes, **dropouts[name]).double().train()
    teacher = pair(name)[1]
    batch = batch_of(student, rows(student))
    plain = gradients(student, fused(student, teacher, batch, "rkl", 10))
    student.activation_checkpointing_enable({"use_reentrant": False})
    runs: list[int] = []
    layer = student.get_decoder().block[1] if name == "t5" else student.base_model.h[1]
    inside = layer.layer[0] if name == "t5" else layer.attn
    inside.register_forward_hook(lambda *_: runs.append(1))
    again = gradients(student, fused(student, teacher, batch, "rkl", 10))
    assert plain.keys() == again.keys()
    for key in plain:
        torch.testing.assert_close(again[key], plain[key], rtol=1e-9, atol=1e-12)
    assert len(runs) == 2  # and again in the backward pass


def t5_config(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    values = tiny_runs.config(tmp_path, **sections)
    tiny.save(tiny.t5(initializer_factor=1.0), tmp_path / "teacher")
    return values


@pytest.mark.slow
def test_a_t5_pair_from_training_to_the_page(tmp_path: Path) -> None:
    values = t5_config(tmp_path, student={"init": "prune", "layers": 2, "encoder_layers": 1})
    plan = estimate(tiny_runs.specs(values))
    assert plan["parameters"]["student"] < plan["parameters"]["teacher"]
    run = tiny_runs.train(values)
    student = AutoModelForSeq2SeqLM.from_pretrained(run.student_path)
    assert (student.config.num_layers, student.config.num_decoder_layers) == (1, 2)
    assert "AutoModelForSeq2SeqLM" in (run.student_path / "README.md").read_text()
    runner = CliRunner()
    for command in (["evaluate"], ["report"], ["generate", "--prompt", "w1 w2", "--max-new-tokens", "3"]):
        done = runner.invoke(app, [command[0], str(run.root), *command[1:]], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    evaluation = json.loads(run.eval_path.read_text())
    assert evaluation["teacher"]["fkl"] == 0.0 and evaluation["student"]["fkl"] > 0
    assert (run.root / "report.html").is_file()


@pytest.mark.parametrize("teacher_is_apart", [True, False])
def test_a_mixed_pair_is_refused(tmp_path: Path, teacher_is_apart: bool) -> None:
    values = tiny_runs.config(tmp_path)
    if teacher_is_apart:
        tiny.save(tiny.t5(), tmp_path / "teacher")
    tiny.save(tiny.llama() if teacher_is_apart else tiny.t5(), tmp_path / "other")
    values["student"] = {"init": "pretrained", "model": str(tmp_path / "other")}
    kinds = ("a decoder-only model", "an encoder-decoder")
    message = rf"is {kinds[not teacher_is_apart]} and the teacher '.*' {kinds[teacher_is_apart]}"
    for refuse in (tiny_runs.train, lambda v: estimate(tiny_runs.specs(v))):
        with pytest.raises(DrklError, match=message):
            refuse(values)


def test_decoders_that_start_differently_are_refused(tmp_path: Path) -> None:
    values = t5_config(tmp_path)
    tiny.save(tiny.t5(decoder_start_token_id=4), tmp_path / "other")
    values["student"] = {"init": "pretrained", "model": str(tmp_path / "other")}
    with pytest.raises(DrklError, match=r"starts with the token 4 and the teacher's with 0"):
        tiny_runs.train(values)


@pytest.mark.slow
def test_a_pair_that_differs_in_padding_is_compared_on_what_it_shares(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    tiny.save(tiny.llama(5, vocab=80, layers=2), tmp_path / "other")
    values["student"] = {"init": "pretrained", "model": str(tmp_path / "other")}
    known = len(tiny.tokenizer().get_vocab())
    said: list[str] = []
    run = tiny_runs.train(values, listener=tiny_runs.Listener(on_message=said.append))
    assert run.read_env()["vocabulary"] == {"shared": known, "student": 80, "teacher": 64}
    assert any(f"scores 80 ids and the teacher 64; their tokenizers share the first {known}" in text for text in said)
    done = CliRunner().invoke(app, ["evaluate", str(run.root)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    after = json.loads(run.eval_path.read_text())["student"]
    assert after["rkl"] > 0 and after["num_tokens"] > 0


def test_the_trimmed_loss_is_that_of_the_shared_ids() -> None:
    student, teacher = tiny.llama(1, vocab=80, layers=2).double(), tiny.llama(2).double()
    data = rows(student)
    heldout = HeldOut(data, 0, LiveTeacher(teacher), vocab_size=60)
    values = heldout.evaluate(student, make_objective("fkl"), LossConfig())
    total = 0.0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            both = [
                m(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1, :60] for m in (student, teacher)
            ]
        logq, logp = (logits.log_softmax(-1) for logits in both)
        total += float((logp.exp() * (logp - logq)).sum())
    assert values["loss"] == pytest.approx(total / 10, rel=1e-5)
    assert values["fkl"] == pytest.approx(total / 10, rel=1e-5)


@pytest.mark.slow
def test_a_random_student_with_more_ids_than_the_teacher(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    values["student"] = {"init": "random", "config": {"vocab_size": 80}}
    values["training"] |= {"max_steps": 2}
    known = len(tiny.tokenizer().get_vocab())
    assert estimate(tiny_runs.specs(values))["stages"]
    assert tiny_runs.train(values).read_env()["vocabulary"] == {"shared": known, "student": 80, "teacher": 64}


@pytest.mark.slow
def test_a_tokenizer_with_tokens_added_at_its_end(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    words = [f"w{i}" for i in range(36)]
    tiny.save(tiny.llama(vocab=66, layers=2), tmp_path / "other", build(extra=words))
    values["student"] = {"init": "pretrained", "model": str(tmp_path / "other")}
    run = tiny_runs.train(values)
    assert run.read_env()["vocabulary"]["shared"] == len(tiny.tokenizer().get_vocab())


def test_a_row_with_a_token_that_one_of_the_two_does_not_know(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    tiny.save(tiny.llama(layers=2), tmp_path / "other", build(extra=[f"w{i}" for i in range(10)]))
    values["student"] = {"init": "pretrained", "model": str(tmp_path / "other")}
    with pytest.raises(DrklError, match=r"has the token 'w\d+' \(id \d+\), but the student and the teacher share"):
        tiny_runs.train(values)
