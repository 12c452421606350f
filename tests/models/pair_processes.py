"""Started by test_pair_loss_processes in each of two processes: the gradients of `pair_loss` in every wrapper."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from drkl.models.pair_loss import count_tokens, pair_loss
from tests.models import tiny, tiny_classifiers

Batch = dict[str, Tensor]
RANKS = 2
WRONG = ("past the wrapper", "head read outside")
"""The two ways of a loop of one's own that give wrong gradients without a word."""


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated", FutureWarning)
        return get_peft_model(model, config).double()  # type: ignore[arg-type]


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tiny.gpt2(layers=2),
    "llama": lambda: tiny.llama(layers=2),
    "llama untied": lambda: tiny.llama(layers=2, tie_word_embeddings=False),
    "t5": lambda: tiny.t5(layers=2),
    "mt5 untied": lambda: tiny.mt5(layers=2),
    "bart": lambda: tiny.bart(layers=2),
    "classifier": lambda: tiny_classifiers.make("bert", num_hidden_layers=2),
    "lora": lambda: lora(tiny.llama(layers=2, tie_word_embeddings=False)),
}
TEACHERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tiny.gpt2(seed=5),
    "t5": lambda: tiny.t5(seed=5),
    "mt5 untied": lambda: tiny.mt5(seed=5),
    "bart": lambda: tiny.bart(seed=5),
    "classifier": lambda: tiny_classifiers.make("bert", seed=5),
}


def ddp(model: nn.Module, **settings: Any) -> nn.Module:
    return DistributedDataParallel(model, **settings)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of every stack; what a layer itself lists is none."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [block for name in outer for block in lists[name]]


def sharded(model: Any, *groups: Callable[[Any], Any], each_block: bool = True, **settings: Any) -> nn.Module:
    for block in blocks(model) if each_block else ():
        fully_shard(block, **settings)
    for group in groups:
        fully_shard(group(model), **settings)
    fully_shard(model, **settings)
    weights = list(model.parameters())
    assert weights and all(isinstance(weight, DTensor) for weight in weights)
    return model  # type: ignore[no-any-return]


def head(model: Any) -> nn.Module:
    return model.get_output_embeddings()  # type: ignore[no-any-return]


def tied_ends(model: Any) -> list[nn.Module]:
    """All that holds the one weight: of T5 the embeddings of encoder and decoder too."""
    weight = model.get_output_embeddings().weight
    return [module for module in model.modules() if getattr(module, "weight", None) is weight]


def norm_and_head(model: Any) -> list[nn.Module]:
    return [model.base_model.norm, model.get_output_embeddings()]


def fsdp1(model: nn.Module, policy: Any = None) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=policy)


def checkpointed(model: Any, wrap: Callable[[Any], nn.Module]) -> nn.Module:
    model.gradient_checkpointing_enable()
    return wrap(model).train()


LOW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": ddp,
    "ddp, unused found": lambda model: ddp(model, find_unused_parameters=True),
    "ddp, static": lambda model: ddp(model, static_graph=True),
    "fsdp2 root": lambda model: sharded(model, each_block=False),
    "fsdp2 blocks": sharded,
    "fsdp2 head": lambda model: sharded(model, head),
    "fsdp2 tied ends": lambda model: sharded(model, tied_ends),
    "fsdp2 norm and head": lambda model: sharded(model, norm_and_head),
    "fsdp2 reshards": lambda model: sharded(model, head, reshard_after_forward=True),
    "fsdp2 keeps": lambda model: sharded(model, head, reshard_after_forward=False),
    "fsdp1": fsdp1,
    "fsdp1 blocks": lambda model: fsdp1(model, ModuleWrapPolicy({LlamaDecoderLayer})),
    "ddp, compiled": lambda model: ddp(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
    "ddp, checkpointed": lambda model: checkpointed(model, ddp),
    "fsdp2 checkpointed": lambda model: checkpointed(model, sharded),
    "fsdp2 teacher": sharded,
    "fsdp2 low": lambda model: sharded(model.float(), head, mp_policy=LOW),
}
QUICK = [
    ("gpt2", "ddp"),
    ("t5", "ddp"),
    ("gpt2", "fsdp2 blocks"),
    ("gpt2", "fsdp2 tied ends"),
    ("llama untied", "fsdp2 head"),
]
UNTIED = ("llama untied", "mt5 untied")
SLOW = [
    *[(name, wrapper) for name in MODELS for wrapper in ("ddp", "fsdp2 root", "fsdp2 blocks")],
    *[
        (name, wrapper)
        for name in ("gpt2", "t5")
        for wrapper in ("ddp, unused found", "ddp, static", "fsdp2 tied ends")
    ],
    *[(name, wrapper) for name in UNTIED for wrapper in ("fsdp2 head", "fsdp2 reshards", "fsdp2 keeps")],
    *[(name, wrapper) for name in ("llama", "llama untied") for wrapper in ("fsdp1", "fsdp1 blocks")],
    *[("llama", wrapper) for wrapper in ("ddp, compiled", "ddp, checkpointed", "fsdp2 checkpointed")],
    *[("llama untied", wrapper) for wrapper in ("fsdp2 norm and head", "fsdp2 low", "fsdp2 teacher")],
]
SLOW = [case for case in SLOW if case not in QUICK]


def make_student(name: str) -> Any:
    return MODELS[name]().double()


def make_teacher(name: str) -> Any:
    return TEACHERS.get(name, lambda: tiny.llama(seed=5, tie_word_embeddings=False))().double()


def make_batch(name: str) -> Batch:
    """Four rows, of which the processes get one and three: they count 2 and 13 tokens."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, 60, (4, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    if name == "classifier":
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([2, 0, -100, 1])}
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :-2] = labels[1:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def part(batch: Batch, rows: slice) -> Batch:
    return {key: value[rows] for key, value in batch.items()}


def rows_of(rank: int) -> slice:
    return slice(0, 1) if rank == 0 else slice(1, 4)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole, by their names without what wrappers put into them."""
    found = {}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        for name, weight in model.named_parameters():
            for part_of_name in ("module.", "_fsdp_wrapped_module.", "_orig_mod."):
                name = name.replace(part_of_name, "")
            if weight.grad is not None:
                found[name] = whole(weight.grad).clone()
    return found


def one_case(name: str, wrapper: str, rank: int) -> dict[str, Any]:
    student, teacher, batch = WRAPPERS[wrapper](make_student(name)), make_teacher(name), make_batch(name)
    teacher = teacher.float() if wrapper == "fsdp2 low" else teacher
    teacher = sharded(teacher, head) if wrapper == "fsdp2 teacher" else teacher
    mine = part(batch, rows_of(rank))
    loss = pair_loss(student, teacher, mine, objective="rkl")
    loss.backward()
    found = {"loss": loss.detach().double().reshape(1), "gradients": gradients(student)}
    student.zero_grad()
    if name == "classifier" or wrapper in ("fsdp2 low", "fsdp2 teacher", "ddp, static"):
        return found
    return found | {"accumulated": accumulated(student, teacher, batch, rank), "given": given(student, teacher, mine)}


def accumulated(student: Any, teacher: nn.Module, batch: Batch, rank: int) -> dict[str, Tensor]:
    """The same step from two micro-batches, the first without communication; rank 0's second one counts nothing."""
    empty = part(batch, slice(3, 4)) | {"labels": torch.full_like(batch["labels"][3:], -100)}
    parts = [[part(batch, slice(0, 1)), empty], [part(batch, slice(1, 2)), part(batch, slice(2, 4))]][rank]
    count = torch.stack([count_tokens(micro, student) for micro in parts]).sum()
    dist.all_reduce(count)
    for number, micro in enumerate(parts):
        last = number == len(parts) - 1
        context = contextlib.nullcontext()
        if hasattr(student, "no_sync"):
            context = contextlib.nullcontext() if last else student.no_sync()  # type: ignore[assignment]
        else:
            student.set_requires_gradient_sync(last)
        with context:
            pair_loss(student, teacher, micro, objective="rkl", num_tokens=count).backward()
    found = gradients(student)
    student.zero_grad()
    return found


def given(student: Any, teacher: Any, batch: Batch) -> dict[str, Tensor]:
    """The same step from states and a head of the teacher that are known already."""
    from drkl.models.forward import hidden_states, lm_head

    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if teacher.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = teacher.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    with torch.no_grad():
        hidden = hidden_states(teacher, inputs)
    pair_loss(student, None, batch, objective="rkl", teacher_hidden=hidden, teacher_head=lm_head(teacher)).backward()
    found = gradients(student)
    student.zero_grad()
    return found


def wrong(how: str, rank: int) -> dict[str, Tensor]:
    """What a loop of one's own gets that reads states or head around the wrapper."""
    from drkl import fused_distillation_loss

    wrapper = "ddp" if how == "past the wrapper" else "fsdp2 head"
    student: Any = WRAPPERS[wrapper](make_student("llama untied"))
    teacher, batch = make_teacher("llama untied"), make_batch("llama untied")
    count = (batch["labels"][:, 1:] != -100).sum()
    mine = part(batch, rows_of(rank))
    labels = mine.pop("labels")[:, 1:]
    model = student.module if wrapper == "ddp" else student
    with torch.no_grad():
        states = teacher.model(**mine).last_hidden_state[:, :-1]
    if wrapper == "ddp":
        hidden, weight = model.model(**mine).last_hidden_state[:, :-1], model.lm_head.weight
    else:
        kept: list[Tensor] = []
        handle = student.model.register_forward_hook(lambda _m, _a, output: kept.append(output.last_hidden_state))
        student(**mine)
        handle.remove()
        hidden, weight = kept[0][:, :-1], model.lm_head.weight
    loss = fused_distillation_loss(
        hidden, weight, states, teacher.lm_head.weight, labels, objective="rkl", num_tokens=count
    )
    (RANKS * loss).backward()
    return gradients(student)


def refusals(rank: int) -> dict[str, str]:
    """What is said of wrappers in which two processes would not give the gradients of one."""
    batch, teacher = part(make_batch("llama"), rows_of(rank)), make_teacher("llama")
    student = make_student("llama untied")
    wrapped = WRAPPERS["ddp"](make_student("llama"))
    parts_only = make_student("llama untied")
    for block in blocks(parts_only):
        fully_shard(block)
    divided: Any = WRAPPERS["fsdp2 root"](make_student("llama"))
    divided.set_gradient_divide_factor(1.0)
    tied = make_student("llama")
    found = {}
    cases = {"bare": student, "module": wrapped.module, "parts": parts_only, "divided": divided}
    for name, model in cases.items():
        try:
            pair_loss(model, teacher, batch)  # type: ignore[arg-type]
            found[name] = "nothing"
        except ValueError as error:
            found[name] = str(error)
    try:
        WRAPPERS["fsdp2 head"](tied)
        pair_loss(tied, teacher, batch).backward()
        found["tie"] = "nothing"
    except (ValueError, AssertionError) as error:
        found["tie"] = str(error)
    return found


def main(rank: int, folder: Path, quick: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    cases = QUICK if quick else SLOW
    found: dict[str, Any] = {f"{name} | {wrapper}": one_case(name, wrapper, rank) for name, wrapper in cases}
    if quick:
        found |= {how: wrong(how, rank) for how in WRONG} | {"refusals": refusals(rank)}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "quick")
