"""The way in from Python: models in memory or by name, data in every form, and the run folder that comes of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import drkl
from drkl.config import load_config
from drkl.errors import DrklError
from drkl.models.load import load_model
from drkl.runs import RunFolder
from drkl.training.plan import plan_run
from drkl.training.run import distill
from tests.models import tiny, tiny_classifiers

TOKENIZER = tiny.tokenizer()
QUIET_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
ROWS = [{"prompt": f"w{i} w{i + 1}", "response": f"w{i + 2} w{i + 3} w{i}"} for i in range(20)]


def config(folder: Path, **fields: Any) -> drkl.DistillationConfig:
    settings = {
        "use_cpu": True, "precision": "fp32", "disable_tqdm": True, "logging_steps": 1, "eval_steps": 1,
        "save_steps": 1, "tokens_per_step": 60, "max_tokens": 64,
    } | ({} if "num_train_epochs" in fields else {"max_steps": 2}) | fields  # fmt: skip
    if "per_device_train_batch_size" in fields:
        del settings["tokens_per_step"]
    return drkl.DistillationConfig(output_dir=str(folder / "x"), **settings)


def make(folder: Path, model: Any = None, teacher: Any = None, **changes: Any) -> drkl.DistillationTrainer:
    fields = changes.pop("fields", {})
    settings = {
        "args": config(folder, **fields), "train_dataset": ROWS, "eval_dataset": ROWS[:4],
        "processing_class": TOKENIZER,
    } | changes  # fmt: skip
    return drkl.DistillationTrainer(
        tiny.llama(1, layers=2) if model is None else model, tiny.llama(9) if teacher is None else teacher, **settings
    )


def test_rows_that_are_dropped_or_cut_are_counted_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = [{"prompt": "w1 " * 40, "response": "w2"}, {"prompt": "w1", "response": "w2 " * 80}]
    make(tmp_path, train_dataset=[*ROWS, *odd])
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "Warning: train_dataset: 21 of 22 rows kept, 1 dropped (prompt longer than max_prompt_tokens), 1 responses cut "
        "at max_tokens."
    ]
    caplog.clear()
    make(tmp_path)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.slow
def test_a_run_of_models_in_memory_is_a_run_folder(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1, layers=2), tiny.llama(9)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    kept = copy.deepcopy(teacher.state_dict())
    flags = [p.requires_grad for p in teacher.parameters()]
    trainer = make(tmp_path, student, teacher)
    assert trainer.train().global_step == 2
    run = RunFolder(tmp_path / "x")
    assert not run.is_finished() and not run.student_path.exists()
    trainer.save_model()
    assert run.is_finished()
    assert any(not torch.equal(p, before[name]) for name, p in student.named_parameters())  # trained in place
    saved = AutoModelForCausalLM.from_pretrained(run.student_path)
    tiny.assert_alike(saved, student)
    assert all(torch.equal(kept[name], tensor) for name, tensor in teacher.state_dict().items())
    assert [p.requires_grad for p in teacher.parameters()] == flags and not teacher.training
    assert "forward" not in vars(student) and student.config.use_cache
    assert {path.name for path in run.root.iterdir()} == {
        "config.yaml", "env.json", "train.jsonl", "student", "checkpoints", "eval_rows.jsonl",
    }  # fmt: skip
    env = run.read_env()
    assert env["command"] is None and env["steps"] == 2 and env["data"]["train_rows"] == 20
    assert [row["step"] for row in run.read_train_log() if "loss" in row] == [1, 2]


@pytest.mark.slow
def test_every_value_that_trains_the_model_is_in_config_yaml(tmp_path: Path) -> None:
    fields = {"adam_beta2": 0.95, "weight_decay": 0.3, "neftune_noise_alpha": None, "warmup_steps": None}
    trainer = make(tmp_path, fields=fields)
    trainer.train()
    written = yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())
    training = written["training"]
    assert training["weight_decay"] == 0.3 and training["warmup_steps"] == 1 and training["max_grad_norm"] == 1.0
    assert training["lr_scheduler_type"] == "cosine" and training["logging_steps"] == 1
    assert training["arguments"]["adam_beta2"] == 0.95 and training["arguments"]["optim"] == "adamw_torch_fused"
    assert written["rollouts"]["share"] == 0 and written["rollouts"]["sampling_temperature"] == 1
    assert written["objective"] == {
        "name": "drkl", "gamma": 0.5, "target": "teacher", "weight": "constant", "skew": 0.0, "tail": "rkl",
    }  # fmt: skip
    read, _ = load_config(written)
    assert read.training.max_steps == 2 and read.specs()[-1].resolved["training"] == training


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


@pytest.mark.parametrize(
    "fields",
    [
        {"data_seed": 7},
        pytest.param({"load_best_model_at_end": False, "learning_rate": 1.0, "max_steps": 5}, marks=pytest.mark.slow),
        pytest.param({"save_strategy": "best", "learning_rate": 1.0, "max_steps": 5}, marks=pytest.mark.slow),
        pytest.param({"save_strategy": "no", "eval_strategy": "epoch", "num_train_epochs": 1}, marks=pytest.mark.slow),
        pytest.param(
            {"eval_steps": 0.2, "save_steps": 0.4, "learning_rate": 0.5, "max_steps": 10}, marks=pytest.mark.slow
        ),
        pytest.param({"eval_steps": 3, "save_steps": 2, "max_steps": 4}, marks=pytest.mark.slow),
        pytest.param({"disable_dropout": True}, marks=pytest.mark.slow),
        {"model_init_kwargs": {"dtype": torch.bfloat16, "resid_pdrop": 0.4}},
        pytest.param({"held_out": False, "num_train_epochs": 1}, marks=pytest.mark.slow),
        pytest.param(
            {"optim": "adafactor", "lr_scheduler_type": "linear", "per_device_train_batch_size": 4},
            marks=pytest.mark.slow,
        ),
        {
            "rollout_share": {"from": 0.2, "to": 1, "steps": 3},
            "rollout_top_p": 0.9,
            "rollout_max_new_tokens": 6,
            "rollout_sampling_temperature": 0.8,
            "rollout_refresh_every": 2,
            "rollout_replay": 0.3,
            "rollout_replay_memory": 9,
            "max_steps": 5,
            "eval_steps": 5,
            "save_steps": 5,
        },
    ],
)
def test_the_config_yaml_of_a_run_makes_the_same_weights_again(tmp_path: Path, fields: dict[str, Any]) -> None:
    student = tiny.save(tiny.gpt2(1, layers=2), tmp_path / "student")
    teacher = tiny.save(tiny.gpt2(9), tmp_path / "teacher")
    data, heldout = tmp_path / "rows.jsonl", tmp_path / "heldout.jsonl"
    for path, rows in ((data, ROWS), (heldout, ROWS[:4])):
        path.write_text("\n".join(map(json.dumps, rows)))
    eval_dataset = str(heldout) if fields.pop("held_out", True) else None
    trainer = make(
        tmp_path, str(student), str(teacher), train_dataset=str(data), eval_dataset=eval_dataset, processing_class=None,
        fields=fields,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    again, _ = load_config(tmp_path / "x" / "config.yaml", ["run.name=again"])
    distill(again.specs())
    first, second = weights(tmp_path / "x"), weights(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_what_was_an_object_is_named_in_config_yaml_and_refused_there(tmp_path: Path) -> None:
    student = tiny.save(tiny.llama(1, layers=2), tmp_path / "student")
    teacher = tiny.save(tiny.llama(9), tmp_path / "teacher")
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))

    def drkl_of_mine(student_logp: Any, teacher_logp: Any, labels: Any) -> Any:
        return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)

    drkl_of_mine.__name__ = "drkl"  # a name of ours, and still another objective
    settings = {"train_dataset": str(data), "eval_dataset": None, "processing_class": None}
    trainer = make(tmp_path, str(student), str(teacher), fields={"objective": drkl_of_mine}, **settings)
    trainer.train()
    trainer.save_model()
    again, _ = load_config(tmp_path / "x" / "config.yaml", ["run.name=again"])
    assert again.objective.name == "in memory: drkl"
    with pytest.raises(DrklError, match="objective was passed in memory, drkl, so it cannot be made again"):
        distill(again.specs())
    with pytest.raises(DrklError, match="has no held-out rows: it was trained without an eval_dataset"):
        drkl.evaluate_run(tmp_path / "x")

    model = tiny.llama(1, layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings |= {"processing_class": TOKENIZER, "optimizers": (optimizer, None)}
    make(tmp_path, model, str(teacher), **settings).train()
    again, _ = load_config(tmp_path / "x" / "config.yaml", ["run.name=again", f"student.model={student}"])
    with pytest.raises(DrklError, match="optim is 'in memory: SGD'"):
        distill(again.specs())
    assert not (tmp_path / "again").exists()


class Doubling(torch.optim.SGD):
    """As schedule-free optimisers do, it trains at other weights (twice) than those that are meant."""

    trains = False

    def _turn(self, trains: bool) -> None:
        if trains != self.trains:
            self.trains = trains
            for weight in self.param_groups[0]["params"]:
                weight.data *= 2.0 if trains else 0.5

    def train(self) -> None:
        self._turn(True)

    def eval(self) -> None:
        self._turn(False)


@pytest.mark.parametrize("heldout", [True, False])
def test_an_optimiser_that_trains_at_other_weights_gives_those_that_are_meant(tmp_path: Path, heldout: bool) -> None:
    model = tiny.llama(1, layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = Doubling(model.parameters(), lr=0.0)
    settings: dict[str, Any] = {} if heldout else {"eval_dataset": None}
    trainer = make(tmp_path, model, optimizers=(optimizer, None), fields={"max_steps": 2, "save_steps": 1}, **settings)
    trainer.train()
    saved = load_file(tmp_path / "x" / "checkpoints" / "checkpoint-2" / "model.safetensors")
    for weights in (model.state_dict(), saved):
        assert all(torch.equal(weights[name], before[name]) for name in saved)


def test_an_optimiser_of_another_model_is_refused(tmp_path: Path) -> None:
    other = torch.optim.SGD(tiny.llama(3).parameters(), lr=0.1)
    with pytest.raises(DrklError, match="the optimiser holds no parameter of the student that is trained"):
        make(tmp_path, optimizers=(other, None))


def test_early_stopping_needs_held_out_rows(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="early_stop_patience counts held-out losses; pass eval_dataset"):
        make(tmp_path, eval_dataset=None, fields={"early_stop_patience": 1})


def test_what_transformers_refuses_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise ImportError("nothing there")

    monkeypatch.setattr(Trainer, "add_callback", refuse)
    with pytest.raises(DrklError, match=r"Trainer refuses the arguments: nothing there"):
        make(tmp_path)


@pytest.mark.slow
def test_padding_of_classifiers_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    rows = [{"text": "w1 w2"[: 2 + 3 * (i % 2)], "label": i % 3} for i in range(9)]
    kind = {"train_dataset": rows, "eval_dataset": None}
    losses = []
    for pads in ((0, 0), (None, 3)):
        student = tiny_classifiers.make("llama", 1, pad_token_id=pads[0])
        teacher = tiny_classifiers.make("llama", 2, pad_token_id=pads[1])
        trainer = make(tmp_path, student, teacher, processing_class=tiny_classifiers.tokenizer(), **kind)
        losses.append(trainer.train().training_loss)
        assert teacher.config.pad_token_id == pads[1]
    assert losses[0] == losses[1]


def test_the_students_cache_is_left_on(tmp_path: Path) -> None:
    student = tiny.llama(1, layers=2)
    make(tmp_path, student).evaluate()
    assert student.config.use_cache


@pytest.mark.slow
def test_models_by_name_make_a_run_that_the_command_line_goes_on_with(tmp_path: Path) -> None:
    for name, model in (("teacher", tiny.llama(9)), ("student", tiny.llama(1, layers=2))):
        tiny.save(model, tmp_path / name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = drkl.DistillationTrainer(
        model=str(tmp_path / "student"),
        teacher_model=tmp_path / "teacher",
        args=config(tmp_path),
        train_dataset=rows,
        eval_dataset=str(rows),
    )
    trainer.train()
    trainer.save_model()
    specs = load_config(RunFolder(tmp_path / "x").read_config())[0].specs()
    assert specs[-1].teacher is not None and specs[-1].teacher.model == str(tmp_path / "teacher")
    assert specs[-1].student.model == str(tmp_path / "student") and specs[-1].data.eval_path == str(rows)


@pytest.mark.parametrize("batch_size", [8, 3])
def test_rows_are_counted_as_everywhere_else(tmp_path: Path, batch_size: int) -> None:
    trainer = make(tmp_path, fields={"per_device_train_batch_size": batch_size, "num_train_epochs": 1})
    sizes = [len(batch) for batch in trainer.train_dataset]  # type: ignore[attr-defined]
    assert sizes == {8: [8, 8, 4], 3: [3] * 6 + [2]}[batch_size]
    seen = sorted(row.id for batch in trainer.train_dataset for row in batch)  # type: ignore[attr-defined]
    assert seen == sorted(row.id for row in trainer.rows)
    assert trainer.train().global_step == len(sizes)
    assert trainer.state.log_history[-1]["epoch"] == 1.0


@pytest.mark.slow
def test_the_steps_are_those_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    counted = drkl.DistillationTrainer._get_num_items_in_batch

    def record(self: Any, batch_samples: list[Any], device: Any) -> Any:
        seen.append([row_id for batch in batch_samples for row_id in batch["row_ids"]])
        return counted(self, batch_samples, device)

    monkeypatch.setattr(drkl.DistillationTrainer, "_get_num_items_in_batch", record)
    fields = {"max_steps": 6, "gradient_accumulation_steps": 2, "eval_steps": 6, "save_steps": 6}
    trainer = make(tmp_path, fields=fields)
    steps, _ = plan_run([row.length for row in trainer.rows], trainer.config, 1)
    trainer.train()
    assert seen == [[trainer.rows[i].id for i in step] for step in steps]


@pytest.mark.parametrize(("epochs", "steps"), [(2, 6), (0.5, 2), (1.34, 5)])
def test_epochs(tmp_path: Path, epochs: float, steps: int) -> None:
    trainer = make(tmp_path, fields={"per_device_train_batch_size": 8, "num_train_epochs": epochs})
    assert trainer.args.max_steps == steps


def test_gradient_accumulation_cuts_a_step_and_drop_last_leaves_out_what_is_left(tmp_path: Path) -> None:
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    trainer = make(tmp_path, fields=fields)
    assert [len(batch) for batch in trainer.train_dataset] == [4, 4, 4, 4, 2, 2]  # type: ignore[attr-defined]
    trainer = make(tmp_path, fields=fields | {"dataloader_drop_last": True})
    assert [len(batch) for batch in trainer.train_dataset] == [4, 4, 4, 4]  # type: ignore[attr-defined]


def test_strategies_of_an_epoch(tmp_path: Path) -> None:
    fields = {
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch",
        "logging_strategy": "epoch",
    }  # fmt: skip
    trainer = make(tmp_path, fields=fields)
    trainer.train()
    lines = trainer.state.log_history
    assert [line["step"] for line in lines if "loss" in line] == [3, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert [line["epoch"] for line in lines if "eval_loss" in line] == [1.0, 2.0]
    assert all("fkl" in line for line in lines if "loss" in line)
    assert trainer.state.best_global_step in (3, 6)


def test_without_checkpoints_there_is_no_best(tmp_path: Path) -> None:
    trainer = make(tmp_path, fields={"save_strategy": "no"})
    trainer.train()
    trainer.save_model()
    assert RunFolder(tmp_path / "x").is_finished() and not list((tmp_path / "x" / "checkpoints").iterdir())


def test_without_held_out_rows_the_last_weights_stay(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_dataset=None)
    trainer.train()
    trainer.save_model()
    assert "not measured" in (tmp_path / "x" / "student" / "README.md").read_text()
    with pytest.raises(DrklError, match="There are no held-out rows; pass eval_dataset"):
        trainer.evaluate()
    assert trainer.evaluate(ROWS[:3])["eval_loss"] > 0
    last = trainer.run.read_train_log()[-1]
    assert last["other_eval_loss"] > 0 and not any(key.startswith("eval_") for key in last)


@QUIET_PEFT
def test_lora_trains_and_saves_the_adapter_alone(tmp_path: Path) -> None:
    import peft

    student = tiny.llama(1, layers=2)
    base = student.model.layers[0].self_attn.q_proj.weight.detach().clone()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make(tmp_path, student, peft_config=lora)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "x" / "student"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    assert torch.equal(student.model.layers[0].self_attn.q_proj.base_layer.weight, base)
    assert yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())["peft"]["r"] == 2
    loaded = peft.PeftModel.from_pretrained(tiny.llama(1, layers=2), folder)
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(student))


@QUIET_PEFT
def test_a_student_that_has_its_adapter(tmp_path: Path) -> None:
    import peft

    wrapped = peft.get_peft_model(tiny.llama(1, layers=2), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = make(tmp_path, wrapped)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "x" / "student" / "adapter_model.safetensors").is_file()
    with pytest.raises(DrklError, match="model is a PeftModel, which has its adapter"):
        make(tmp_path, wrapped, peft_config=peft.LoraConfig(r=2))


def test_an_encoder_decoder_pair(tmp_path: Path) -> None:
    trainer = make(tmp_path, tiny.t5(1, layers=2), tiny.t5(9))
    trainer.train()
    trainer.save_model()
    assert RunFolder(tmp_path / "x").is_finished()


def test_a_classifier_pair(tmp_path: Path) -> None:
    rows = [{"text": f"w{i} w{i + 1}", "label": tiny_classifiers.CLASSES[i % 3]} for i in range(12)]
    trainer = make(
        tmp_path,
        tiny_classifiers.make(seed=1, num_hidden_layers=2),
        tiny_classifiers.make(seed=9),
        train_dataset=rows,
        eval_dataset=datasets.Dataset.from_list(rows[:4]),
        processing_class=tiny_classifiers.tokenizer(),
    )
    trainer.train()
    trainer.save_model()
    assert yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())["task"] == "classification"
    assert "text-classification" in (tmp_path / "x" / "student" / "README.md").read_text()


@pytest.mark.slow
def test_the_example_of_trl_with_the_import_and_the_class_of_the_arguments_changed(tmp_path: Path) -> None:
    from drkl import DistillationTrainer

    for name, model in (("small", tiny.llama(1, layers=2)), ("large", tiny.llama(9))):
        tiny.save(model, tmp_path / name)
    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }
        for row in ROWS
    ]
    trainer = DistillationTrainer(
        model=str(tmp_path / "small"),
        teacher_model=str(tmp_path / "large"),
        args=config(tmp_path, beta=0.5, teacher_model_init_kwargs={"dtype": "float32"}, use_vllm=False),
        train_dataset=datasets.Dataset.from_list(messages),
    )
    trainer.train()
    assert trainer.objective.name == "gjs"


def test_without_args_every_default_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = drkl.DistillationTrainer(
        tiny.llama(1, layers=2), tiny.llama(9), train_dataset=ROWS, processing_class=TOKENIZER
    )
    assert trainer.run.root == Path("runs/distillation") and trainer.objective.name == "drkl"


def test_the_arguments_of_the_caller_stay_as_they_are(tmp_path: Path) -> None:
    args = config(tmp_path, save_strategy="epoch", num_train_epochs=1)
    before = copy.deepcopy(args.to_dict())
    make(tmp_path, args=args).train()
    assert args.to_dict() == before and args.output_dir == str(tmp_path / "x")


@pytest.mark.slow
def test_resumed_from_the_newest_checkpoint(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == 2

    whole = make(tmp_path / "whole", fields={"max_steps": 4})
    whole.train()
    make(tmp_path, fields={"max_steps": 4}, callbacks=[Stop()]).train()
    again = make(tmp_path, fields={"max_steps": 4})
    again.train(resume_from_checkpoint=True)
    assert [row["step"] for row in RunFolder(tmp_path / "x").read_train_log() if "loss" in row] == [1, 2, 3, 4]
    assert torch.equal(tiny.logits(whole.pair.student), tiny.logits(again.pair.student))


def test_training_again_replaces_the_run_and_nothing_else(tmp_path: Path) -> None:
    first = make(tmp_path)
    first.train()
    first.save_model()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    (tmp_path / "x" / "eval.json").write_text("{}")
    make(tmp_path).train()
    assert (tmp_path / "x" / "notes.txt").is_file()
    assert not (tmp_path / "x" / "eval.json").exists() and not (tmp_path / "x" / "student").exists()


def test_a_folder_of_ones_own_for_the_student(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model(tmp_path / "elsewhere")
    assert load_model(str(tmp_path / "elsewhere"), torch.float32).config.num_hidden_layers == 2
    assert not (tmp_path / "x" / "student").exists()


def test_tokenizer_and_processing_class_are_one_thing(tmp_path: Path) -> None:
    trainer = make(tmp_path, processing_class=None, tokenizer=TOKENIZER)
    assert trainer.processing_class is TOKENIZER
    with pytest.raises(DrklError, match="two names for one thing"):
        make(tmp_path, tokenizer=tiny.tokenizer())


def test_an_objective_that_is_a_function(tmp_path: Path) -> None:
    def halves(student_logp: torch.Tensor, teacher_logp: torch.Tensor | None, labels: Any = None) -> torch.Tensor:
        assert teacher_logp is not None
        return 0.5 * (student_logp.exp() - teacher_logp.exp()).pow(2).sum(-1)

    trainer = make(tmp_path, fields={"objective": halves})
    trainer.train()
    trainer.save_model()
    assert yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())["objective"]["name"] == "in memory: halves"


def test_without_a_teacher_the_data_alone_teach(tmp_path: Path) -> None:
    trainer = drkl.DistillationTrainer(
        tiny.llama(1, layers=2), args=config(tmp_path, objective="ce"), train_dataset=ROWS, processing_class=TOKENIZER
    )
    trainer.train()
    with pytest.raises(DrklError, match="Objective 'drkl' compares with a teacher, but there is none; pass teacher"):
        drkl.DistillationTrainer(tiny.llama(1), args=config(tmp_path), train_dataset=ROWS, processing_class=TOKENIZER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": TrainingArguments(output_dir="x", use_cpu=True)}, "args is a TrainingArguments; expected a drkl.Dis"),
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"train_dataset": [{"prompt": "w1"}]}, "where the student writes every response"),
        ({"tools": [print]}, "tools is TRL's, and not taken here: a sampled answer is one turn of plain text"),
        ({"reward_funcs": print}, "takes no argument 'reward_funcs': the teacher's probabilities judge an answer"),
        ({"rollout_func": print}, "takes no argument 'rollout_func': DistillationConfig.rollout_share=1.0. has"),
        ({"data_collator": print}, "DistillationTrainer takes no argument 'data_collator': drkl pads"),
        ({"nonsense": 1}, "DistillationTrainer takes no argument 'nonsense'"),
        ({"processing_class": None}, "processing_class is missing: both models were passed as objects"),
        ({"processing_class": object()}, "processing_class is a object without a padding"),
        ({"quantization_config": object()}, "quantization_config is for a model given by its name"),
        ({"model": 3}, "model is a int; expected a name, a transformers.PreTrainedModel or a peft.PeftModel"),
        ({"teacher": 3}, "teacher_model is a int; expected a name or a transformers.PreTrainedModel"),
        ({"model": tiny.t5(1)}, "is an encoder-decoder and the teacher"),
        ({"model": tiny_classifiers.make()}, "is a classifier and the teacher"),
        ({"fields": {"teacher_model_name_or_path": "x"}}, "are both given; give one of them"),
        ({"fields": {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}}, "for a teacher given by its name"),
        ({"fields": {"model_init_kwargs": {"dtype": "bfloat16"}}}, "model_init_kwargs is for a model given by its"),
    ],
)
def test_what_cannot_be_trained_says_so(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        make(tmp_path, **changes)


def test_a_student_cannot_teach_itself(tmp_path: Path) -> None:
    model = tiny.llama(1)
    with pytest.raises(DrklError, match="model and teacher_model are the same object"):
        make(tmp_path, model, model)


def test_a_frozen_student_has_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="No parameter of the student requires a gradient"):
        make(tmp_path, tiny.llama(1).requires_grad_(False))


def test_predictions_are_made_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"drkl\.evaluate\(student, teacher, rows\) measures"):
        make(tmp_path).predict(ROWS)
