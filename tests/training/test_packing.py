"""Batches without padding train what padded ones do: losses, gradients, weights, held-out losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.data.lengths import Lengths
from drkl.errors import DrklError
from drkl.losses.config import LossConfig
from drkl.runs import RunFolder
from drkl.training import packing
from drkl.training.arguments import DistillationConfig
from drkl.training.run import cache_states
from tests.families import builder
from tests.models import tiny, tiny_classifiers
from tests.models.test_varlen import varlen_reference
from tests.training import tiny_runs
from tests.training.test_distributed import distance, launch, settings
from tests.training.test_on_policy import gradients_of
from tests.training.test_resume import assert_equal, cut_off, kill_at_step, reference
from tests.training.test_trainer import assert_same, first_gradients, make_trainer, rows

CLOCK = {"seconds", "tokens_per_second", "train_runtime"} | {
    f"train_{n}_per_second" for n in ("samples", "steps", "tokens")
}
OF_LAYOUT = {"padding_share", "idle_share", "total_flos", "seconds_generating", "seconds_learning"}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1}


def both(tmp_path: Path, **words: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, Any]:
    """The first gradients and the trainers of a padded run and of a packed one."""
    data, parts = words.pop("data", rows(9)), words.pop("parts", 1)
    made = [
        first_gradients(tmp_path / str(on), data, parts, padding_free=on, **{k: _fresh(v) for k, v in words.items()})
        for on in (False, True)
    ]
    (padded, one), (packed, other) = made
    assert not one.pair.packed and other.pair.packed
    return padded, packed, one, other


def _fresh(value: Any) -> Any:
    return value() if callable(value) else value


def assert_same_log(one: Any, other: Any, **tolerance: float) -> None:
    assert len(one) == len(other)
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        for name in line.keys() - CLOCK - OF_LAYOUT:
            assert line[name] == pytest.approx(wanted[name], **tolerance), name


def test_gradients_and_losses_are_those_of_padded_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    padded, packed, one, other = both(tmp_path, heldout=rows(5), parts=2, **EVALUATION)
    assert_same(packed, padded)
    assert_same_log(other.state.log_history, one.state.log_history, rel=1e-9)
    shares = [trainer.state.log_history[0]["padding_share"] for trainer in (one, other)]
    assert shares[0] > 0.1 and shares[1] == 0
    assert caplog.text.count("keeps rows apart by a mask: that of N tokens costs N x N") == 1


def test_of_itself_a_cpu_pads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not make_trainer(tmp_path, rows(3)).pair.packed and "padd" not in caplog.text


@pytest.mark.parametrize(
    ("families", "message"),
    [
        (("mamba", "llama"), r"for the student \(MambaForCausalLM\): it hands a state"),
        (("llama", "opt"), r"for the teacher \(OPTForCausalLM\): it gives a row other logits"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(tmp_path: Path, families: Any, message: str) -> None:
    student, teacher = map(builder.build, families)
    with pytest.raises(DrklError, match=f"padding_free is true, and rows cannot be laid one after the other {message}"):
        make_trainer(tmp_path, rows(3), model=student, teacher=teacher, padding_free=True)


@pytest.mark.parametrize("value", ["automatic", 1.0, [], 2])
def test_the_setting_is_one_of_three(tmp_path: Path, value: Any) -> None:
    with pytest.raises(DrklError, match=r"padding_free is .*; expected 'auto', True or False\."):
        DistillationConfig(output_dir=str(tmp_path), padding_free=value)


def test_the_setting_of_a_config_is_one_of_three(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, training={"padding_free": "automatic"})
    with pytest.raises(
        DrklError, match=r"training\.padding_free: input should be 'auto', True or False, got 'automatic'"
    ):
        tiny_runs.specs(values)


@pytest.mark.parametrize(("value", "expected"), [("True", True), ("false", False), (None, "auto"), ("auto", "auto")])
def test_the_setting_of_a_command_line_is_a_text(tmp_path: Path, value: Any, expected: Any) -> None:
    assert DistillationConfig(output_dir=str(tmp_path), padding_free=value).padding_free == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        {"heldout": lambda: rows(5), **EVALUATION},
        {"activation_checkpointing": True, "max_steps": 3, "save_strategy": "steps", "save_steps": 3},
        {"model": lambda: builder.build("mistral").double(), "teacher": lambda: builder.build("llama", 1).double()},
        {"rollout_share": 1.0, "rollout_max_new_tokens": 6, "heldout": lambda: rows(5), **EVALUATION},
    ],
    ids=lambda words: next(iter(words)),
)
def test_torchs_flash_attention_takes_the_place_of_sdpa_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, words: dict[str, Any]
) -> None:
    """On a CPU, with a loop in place of the kernel of a GPU."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    calls = []

    def attend(*args: Any, **settings: Any) -> Tensor:
        calls.append(args[5])
        return varlen_reference(*args, **settings)

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    monkeypatch.setattr(packing, "_varlen", lambda models, args: list(models.values()))
    padded, packed, one, other = both(tmp_path, **words)
    assert_same(packed, padded)
    assert_same_log(other.state.log_history, one.state.log_history, rel=1e-9)
    assert len(calls) > 12 and "mask" not in caplog.text
    student = other.pair.student
    assert student.config._attn_implementation == other.pair.teacher.model.config._attn_implementation == "sdpa"
    assert not any("varlen" in path.read_text() for path in tmp_path.rglob("config.json"))


def test_held_out_rows_of_weights_in_float32_stay_padded(tmp_path: Path) -> None:
    pair = make_trainer(tmp_path, rows(3), model=tiny.llama(1)).pair
    pair.packed = True
    assert pair.packs_heldout
    pair.varlen = [pair.student]
    assert not pair.packs_heldout


class OnGpu:
    """Arguments of a run on a GPU."""

    def __init__(self, padding_free: Any) -> None:
        self.padding_free = padding_free
        self.device, self.precision = torch.device("cuda"), "bf16"
        self.process_index, self.tokens_per_step = 0, 1024
        self.per_device_train_batch_size = self.per_device_eval_batch_size = None


@pytest.mark.parametrize(
    ("flash", "fault", "packs", "said"),
    [
        ("both", None, True, ""),
        ("none", None, False, "Batches are padded: attention of the student's (sdpa) and the teacher's (sdpa) would"),
        (
            "student",
            None,
            False,
            "Batches are padded: attention of the teacher's (sdpa) would keep rows apart by a mask.",
        ),
        ("both", "it fails", False, "Batches are padded: rows cannot be laid one after the other for the student"),
    ],
)
def test_of_itself_a_gpu_packs_where_both_models_have_a_flash_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, flash: str, fault: Any,
    packs: bool, said: str,
) -> None:  # fmt: skip
    pair = make_trainer(tmp_path, rows(3)).pair
    monkeypatch.setattr(
        packing, "uses_flash", lambda model: flash == "both" or (flash == "student" and model is pair.student)
    )
    monkeypatch.setattr(packing, "packing_fault", lambda model, most, dtype: fault)
    monkeypatch.setattr(packing, "place", lambda student, args: None)
    arguments: Any = OnGpu("auto")
    with caplog.at_level("INFO", logger="drkl"):
        packing.settle_packing(pair, arguments)
    assert pair.packed is packs
    assert said in caplog.text if said else not caplog.text


def test_where_torchs_flash_attention_fails_a_mask_is_taken_if_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where an attention has dropout; without being asked batches are padded."""
    pair = make_trainer(tmp_path, rows(3), model=tiny.llama(1, layers=2, attention_dropout=0.1).double()).pair
    monkeypatch.setattr(packing, "_varlen", lambda models, args: list(models.values()))
    for wanted in ("auto", True):
        arguments: Any = OnGpu(wanted)
        arguments.precision = "fp32"
        with caplog.at_level("INFO", logger="drkl"):
            packing.settle_packing(pair, arguments)
        assert pair.packed is (wanted is True) and not pair.varlen
        said = "Torch's FlashAttention is not used" if pair.packed else "Batches are padded"
        assert f"{said}: rows cannot be laid one after the other for the student" in caplog.text
        assert ("by a mask" in caplog.text) is pair.packed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "qwen3", "phi3", "gpt_neox"])
def test_families(tmp_path: Path, family: str) -> None:
    """Five steps in float64; Gemma 2 takes its softmax, over more columns where rows are packed, in float32."""

    def make(seed: int) -> PreTrainedModel:
        return builder.build(family, seed).double()

    words = {"max_steps": 5, "tokens_per_step": 60, "disable_dropout": True, "optim": "sgd", "learning_rate": 0.1}
    _, _, one, other = both(
        tmp_path, data=rows(30), model=lambda: make(0), teacher=lambda: make(1), heldout=rows(5), **words, **EVALUATION
    )
    rounding = 1e-4 if family == "gemma2" else 1e-8
    weights = other.pair.student.state_dict()
    assert_same(weights, one.pair.student.state_dict(), rtol=rounding, atol=rounding / 10)
    assert_same_log(other.state.log_history, one.state.log_history, rel=rounding)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        {"parts": 16},
        {"data": rows(1)},
        {"data": [replace(row, prompt_ids=(9,), response_ids=(7, 4)) for row in rows(6)]},
        {"data": [replace(row, prompt_ids=(9,), response_ids=(7,)) for row in rows(6)]},
        {"activation_checkpointing": True},
        {"per_device_train_batch_size": 4, "tokens_per_step": None, "per_device_eval_batch_size": 2},
        {"objective": "ce"},
        {"teacher_remember_mb": 1, "same_batches": True, "max_steps": 3},
        {"objective": "gjs", "kd_weight": 0.5, "temperature": 2.0},
        {"include_num_input_tokens_seen": "non_padding"},
    ],
    ids=lambda words: next(iter(words)),
)
def test_every_setting(tmp_path: Path, words: dict[str, Any]) -> None:
    padded, packed, one, other = both(tmp_path, heldout=lambda: rows(5), **words, **EVALUATION)
    assert_same(packed, padded)
    assert_same_log(other.state.log_history, one.state.log_history, rel=1e-9)
    assert other.state.num_input_tokens_seen == one.state.num_input_tokens_seen


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "eps"), [("fp32", 2**-23), ("bf16", 2**-8)])
def test_precisions(tmp_path: Path, precision: str, eps: float) -> None:
    """Both are sums over layers of some ten roundings of half an eps each, about the loss of exact numbers."""
    words = {"model": lambda: tiny.llama(1, layers=2), "teacher": lambda: tiny.llama(9), "precision": precision}
    padded, packed, one, other = both(tmp_path, **words)
    exact, _ = first_gradients(tmp_path / "exact", rows(9), 1)
    size = max(float(gradient.abs().max()) for gradient in exact.values())
    bound = 2 * 2 * 10 * eps
    for name, gradient in packed.items():
        assert float((gradient.double() - padded[name].double()).abs().max()) <= bound * size, name
    losses = [trainer.state.log_history[0]["loss"] for trainer in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=bound)


@pytest.mark.slow
def test_the_loss_of_a_row_is_untouched_by_the_others(tmp_path: Path) -> None:
    """Rows without a weight in the loss: their tokens, whatever they are, move nothing."""
    data = rows(8)
    silent = [replace(row, trained=(False,) * len(row.response_ids)) for row in data[:4]]
    other = [replace(row, prompt_ids=tuple(60 - token for token in row.prompt_ids)) for row in silent]
    made = [first_gradients(tmp_path, [*part, *data[4:]], 1, padding_free=True) for part in (silent, other)]
    (gradients, _), (changed, _) = made
    embeddings = next(name for name in gradients if "embed" in name)
    for name in gradients.keys() - {embeddings}:
        assert torch.equal(gradients[name], changed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_sampled_answers(tmp_path: Path, share: float) -> None:
    made = []
    for on in (False, True):
        gradients, trainer = gradients_of(
            tmp_path / str(on), rows(9), rollout_share=share, padding_free=on, heldout=rows(5), max_steps=3,
            loss=LossConfig(kd_weight=0.6), gradient_accumulation_steps=2, **EVALUATION,
        )  # fmt: skip
        made.append((gradients, trainer))
    (padded, one), (packed, other) = made
    assert one.answers == other.answers and one.answers
    assert_same(packed, padded)
    lines = [trainer.state.log_history for trainer in (other, one)]
    assert_same_log(*lines, rel=1e-8)
    assert all(line["padding_share"] == 0 for line in lines[0] if "padding_share" in line)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_a_cached_teacher(tmp_path: Path, kind: str) -> None:
    values = settings(tmp_path, kind)
    cache_states(tiny_runs.specs(values), tmp_path / "cache", kind=kind, k=8 if kind == "topk" else None)
    values["teacher"] |= {"cache": str(tmp_path / "cache")}
    assert_alike_runs(values)


def assert_alike_runs(values: dict[str, Any]) -> tuple[RunFolder, RunFolder]:
    """Runs of a config in fp32, padded and packed: their weights and their logs."""
    runs = []
    for on in (False, True):
        changes = {"run": values["run"] | {"name": f"packed-{on}"}}
        changes["training"] = values["training"] | {"padding_free": on}
        runs.append(tiny_runs.train(values | changes))
    padded, packed = runs
    assert distance(padded, packed) < 1e-4
    for line, wanted in zip(packed.read_train_log(), padded.read_train_log(), strict=True):
        assert line.keys() == wanted.keys()
        for name in line.keys() & {"loss", "eval_loss", "fkl", "nll", "eval_nll", "num_tokens"}:
            assert line[name] == pytest.approx(wanted[name], rel=1e-4), name
    return padded, packed


@pytest.mark.slow
def test_an_adapter_and_a_resolved_config(tmp_path: Path) -> None:
    values = settings(tmp_path, "lora", peft={"r": 2, "target_modules": ["q_proj", "v_proj"], "export": "merged"})
    tiny.save(tiny.llama(5, layers=2), tmp_path / "other")
    values["student"] = {"init": "pretrained", "model": str(tmp_path / "other"), "disable_dropout": True}
    _, packed = assert_alike_runs(values)
    assert "padding_free: true" in packed.config_path.read_text()


@pytest.mark.slow
def test_a_packed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    values, whole = reference(tmp_path, training={"padding_free": True})
    run = cut_off(values, kill_at_step("r", 5))
    tiny_runs.train(values, mode="resume")
    assert_equal(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["off_policy", "rollouts"])
def test_two_processes(tmp_path: Path, case: str) -> None:
    more: dict[str, Any] = {"rollouts": {"share": 0.5, "max_new_tokens": 6}} if case == "rollouts" else {}
    values = settings(tmp_path, "r", training={"padding_free": True}, **more)
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    done = launch(2, "-m", "drkl", "distill", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("keeps rows apart by a mask") + done.stdout.count("keeps rows apart by a mask") == 1
    several = RunFolder(tmp_path / "runs" / "r")
    alone = tiny_runs.train(values | {"run": values["run"] | {"name": "alone"}})
    padded = tiny_runs.train(
        values | {"run": values["run"] | {"name": "padded"}, "training": values["training"] | {"padding_free": False}}
    )
    for other in (alone, padded):
        assert distance(several, other) < 1e-4
    lines = [line for line in several.read_train_log() if "padding_share" in line]
    assert lines and all(line["padding_share"] == 0 for line in lines)


@pytest.mark.slow
def test_an_encoder_decoder_and_a_classifier_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"T5ForConditionalGeneration.: it is an encoder-decoder"):
        packing.settle_packing(_pair(tiny.t5()), OnGpu(True))  # type: ignore[arg-type]
    with pytest.raises(DrklError, match=r"ForSequenceClassification.: it is a classifier"):
        packing.settle_packing(_pair(tiny_classifiers.make()), OnGpu(True))  # type: ignore[arg-type]


def _pair(student: PreTrainedModel) -> Any:
    class Pair:
        teacher = None
        lengths = Lengths(8, 16)

    pair = Pair()
    pair.student = student  # type: ignore[attr-defined]
    return pair


@pytest.mark.slow
def test_the_prompt_that_a_teacher_reads_in_its_own_way(tmp_path: Path) -> None:
    data = [replace(row, teacher_prompt_ids=(50, 51, *row.prompt_ids), sampled=True) for row in rows(9)]
    padded, packed, one, other = both(tmp_path, data=data, heldout=lambda: data[:4], **EVALUATION)
    assert_same(packed, padded)
    assert_same_log(other.state.log_history, one.state.log_history, rel=1e-9)
    plain, _ = first_gradients(tmp_path / "plain", rows(9), 1)
    assert any(not torch.equal(plain[name], packed[name]) for name in plain)
