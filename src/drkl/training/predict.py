"""Predict the memory of a run from its config and its rows, without a weight being loaded."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from drkl.data.batching import bucket_by_length
from drkl.data.stored import column, take
from drkl.data.tokenize import Row
from drkl.losses import LMHead, fused
from drkl.losses.topk import TopK
from drkl.models.adapter import add_adapter
from drkl.models.dropout import disable_dropout
from drkl.models.forward import hidden_states, is_encoder_decoder, output_head
from drkl.models.load import count_parameters, load_config, without_weights
from drkl.models.precision import DTYPES
from drkl.models.readout import CHUNK, SHORT_TOKENS_PER_BATCH
from drkl.models.student import depth, source_model
from drkl.parsing import parse_json
from drkl.training.forward import STATISTICS_POSITIONS, StatisticsSums, loss_of
from drkl.training.memory import MOMENTS, Memory
from drkl.training.plan import cut_lengths
from drkl.training.spec import RunSpec
from drkl.training.tracing import LiveBytes, backward, bytes_of, traced

ACTIVATIONS_PER_TOKEN = 34
"""Bytes that are kept in fp16 per layer, token and hidden unit (Korthikanti et al. 2022), where no more is known."""
_STATISTICS = 6
"""About so many tensors `[positions, vocab]` are made of those that are logged, where the loss itself has two."""
_SCORES = 4
"""Tensors `[answers, vocab]` in fp32 that choosing a token takes."""
Parts = dict[str, int]


@dataclass(frozen=True)
class Shape:
    """A padded batch."""

    rows: int
    tokens: int
    decoder_tokens: int | None
    """The decoder's, in an encoder-decoder; ``tokens`` are then the encoder's."""
    positions: int
    """Those that have a loss."""

    @property
    def size(self) -> int:
        """Positions, padding included."""
        return self.rows * (self.tokens + (self.decoder_tokens or 0))

    def as_record(self) -> dict[str, int]:
        """The fields that there are, by their names."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Known:
    """What is known of a run before anything is loaded.

    Attributes:
        spec: the stage.
        arguments: its `DistillationConfig`.
        student: the student's config.
        teacher: the teacher's config; None where there is none, or it is behind a server.
        held: how the teacher is held: ``live``, ``hidden`` (its head alone), ``topk`` or ``none``.
        k: tokens that are known of it, of kind ``topk``.
        vocab_size: the ids on which the two are compared; None for all.
        micro: the largest micro-batch.
        positions: those that have a loss, of each micro-batch; which of them needs most is another matter.
        heldout: the largest held-out batch; None where there is none.
        heldout_positions: positions of all held-out rows of a process.
        train_positions: positions of all rows that are trained on.
        answers: answers that are written at once by this process, and the most tokens of one with its prompt; None
            where none is written here.
        several: whether a process takes several micro-batches in a step.
        sharding: `sharding_of` the stage.
        processes: how many there are.
        device: the device's type.
        follows: whether the student is the one that the stage before writes.
    """

    spec: RunSpec
    arguments: Any
    student: Any
    teacher: Any
    held: str
    k: int
    vocab_size: int | None
    micro: Shape
    positions: Sequence[int]
    heldout: Shape | None
    heldout_positions: int
    train_positions: int
    answers: tuple[int, int] | None
    several: bool
    sharding: str
    processes: int
    device: str
    follows: bool = False


def shape_of(rows: Sequence[Any]) -> Shape:
    """The padded batch that rows make."""
    positions = sum(row.num_trained for row in rows)
    if isinstance(rows[0], Row) and rows[0].encoder_decoder:
        prompts, responses = max(len(r.prompt_ids) for r in rows), max(len(r.response_ids) for r in rows)
        return Shape(len(rows), prompts, responses, positions)
    return Shape(len(rows), max(row.length for row in rows), None, positions)


def micro_batches(
    rows: Sequence[Any], steps: Sequence[Sequence[int]], parts: int, *, alike: bool = False
) -> tuple[Shape, list[int]]:
    """The largest of the micro-batches that steps are cut into, and the positions of each that have a loss.

    Args:
        rows: tokenised rows.
        steps: the indices of the rows of every optimiser step.
        parts: micro-batches in a step, over all processes.
        alike: as for `MicroBatches`.
    """
    lengths, trained = column(rows, "length"), column(rows, "trained")
    largest: tuple[int, int, list[int]] = (0, 0, [])
    counts: set[int] = set()
    for step in steps:
        own = lengths[step].tolist()
        for part in cut_lengths(own, parts, alike=alike):
            if part:
                members = [step[place] for place in part]
                count = int(trained[members].sum())
                counts.add(count)
                largest = max(largest, (len(part) * max(own[place] for place in part), count, members))
    return shape_of(take(rows, largest[2])), sorted(counts)


def largest_heldout_batch(rows: Sequence[Any]) -> Shape | None:
    """The largest batch of a held-out loss."""
    groups = bucket_by_length([row.length for row in rows], SHORT_TOKENS_PER_BATCH)
    shapes = [shape_of([rows[i] for i in group]) for group in groups]
    return max(shapes, key=lambda one: (one.size, one.positions), default=None)


def predict(known: Known) -> Memory:
    """Predict the memory of each process of a run."""
    notes: list[str] = []
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        student = _student(known)
        teacher = None if known.held in ("none", "topk") else _teacher(known)
        trained = [p for p in student.parameters() if p.requires_grad]
        base = {
            "student_weights": bytes_of([*student.parameters(), *student.buffers()]),
            "teacher_weights": _teacher_bytes(teacher, known),
        }
        state, extra = _optimiser(trained, known, notes)
        kept = _kept_states(teacher, known)
        try:
            moments = _training(student, teacher, known)
            if known.heldout is not None:
                moments["heldout"] = _heldout(student, teacher, known)
        except Exception as error:  # a family that asks its numbers for more than a truth
            notes.append(
                f"The activations are a rule of thumb: {type(student).__name__} cannot be run without numbers "
                f"({type(error).__name__})."
            )
            moments = _by_rule(student, trained, known)
    gradients = bytes_of(trained)
    moments["update"] = {"gradients": gradients}
    if known.answers is not None:
        moments["answers"] = {"answers": _answers(student, known)}
    for parts in moments.values():
        parts |= base | {"optimiser": state, "teacher_states": kept}
    moments["update"]["optimiser"] += extra
    if known.several:
        for name in ("teacher", "loss"):
            if name in moments:
                moments[name]["gradients"] = max(moments[name].get("gradients", 0), gradients)
    if (start := _start(known)) is not None:
        moments["start"] = base | {"start": start}
    _divide(moments, student, teacher, trained, known)
    if "quantization_config" in known.spec.student.model_init_kwargs:
        notes.append("The student is quantised, and its weights are counted as if they were not.")
    clean = {name: {part: size for part, size in moments[name].items() if size} for name in MOMENTS if name in moments}
    return Memory(known.processes, known.device, clean, known.micro.as_record(), tuple(notes))


def _student(known: Known) -> PreTrainedModel:
    """The student as it is trained, without numbers."""
    spec = known.spec
    config = copy.deepcopy(known.student)
    _choose_attention(config, spec.student.model_init_kwargs)
    model = without_weights(config, DTYPES[spec.student.dtype], "", classifier=spec.classifies)
    if spec.student.disable_dropout:
        disable_dropout(model)
    if spec.student.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    if spec.peft is not None:
        # Other starts need the weights, and have the same size.
        add_adapter(model, spec.peft.lora | {"init_lora_weights": True}, 0, check=False)
    fsdp_config = spec.training.arguments.get("fsdp_config")
    again = isinstance(fsdp_config, Mapping) and fsdp_config.get("activation_checkpointing")
    if spec.training.gradient_checkpointing or again:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _choose_attention(config: Any, options: Mapping[str, Any]) -> None:
    if (name := options.get("attn_implementation")) is not None:
        config._attn_implementation = name


def _teacher(known: Known) -> PreTrainedModel:
    assert known.spec.teacher is not None
    config = copy.deepcopy(known.teacher)
    _choose_attention(config, known.spec.teacher.model_init_kwargs)
    resolved = known.spec.resolved["teacher"]["dtype"]
    if known.held == "live":
        dtype = DTYPES["bf16" if resolved == "auto" else resolved]
    else:
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    return without_weights(config, dtype, "", classifier=known.spec.classifies).requires_grad_(False)


def _teacher_bytes(teacher: PreTrainedModel | None, known: Known) -> int:
    if teacher is None:
        return 0
    if known.held == "live":
        return bytes_of([*teacher.parameters(), *teacher.buffers()])
    head = output_head(teacher)
    return 0 if head is None else bytes_of(t for t in (head.weight, head.bias) if t is not None)


def _inputs(shape: Shape) -> dict[str, Tensor]:
    ids = torch.ones(shape.rows, shape.tokens, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.decoder_tokens is not None:
        ids = torch.ones(shape.rows, shape.decoder_tokens, dtype=torch.long, device="meta")
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    return batch


def _chosen(hidden: Tensor, count: int) -> Tensor:
    """The states of ``count`` positions."""
    return hidden.flatten(0, -2)[torch.zeros(count, dtype=torch.long, device="meta")]


def _signal(teacher: PreTrainedModel | None, known: Known, count: int, width: int) -> tuple[Any, LMHead | None]:
    """What the loss is given of the teacher at so many positions, and its head."""
    if known.held == "topk":
        if known.spec.classifies:
            return torch.empty(count, width, device="meta"), None
        size = known.vocab_size or width
        k = min(known.k, size)
        ids = torch.empty(count, k, dtype=torch.long, device="meta")
        temperatures = (1.0, known.spec.loss.temperature)
        rest = torch.empty(count, len(set(temperatures)), device="meta")
        return TopK(ids, torch.empty(count, k, device="meta"), rest, size, tuple(dict.fromkeys(temperatures)),
                    torch.empty(count, device="meta")), None  # fmt: skip
    if teacher is None:
        return None, None
    head = output_head(teacher)
    if head is None:
        return torch.empty(count, known.teacher.num_labels, device="meta"), None
    return torch.empty(count, head.weight.shape[1], dtype=head.weight.dtype, device="meta"), head.detached()


def _loss(states: Tensor, head: LMHead | None, signal: Any, known: Known, **settings: Any) -> Tensor:
    theirs, their_head = signal
    objective = known.arguments.make_objective()
    return loss_of(
        states, head, theirs, their_head, torch.ones(len(states), dtype=torch.long, device="meta"), known.spec.loss,
        objective=objective, vocab_size=None if head is None else known.vocab_size, **settings,
    )  # fmt: skip


def _worst_chunk(head: LMHead | None, known: Known) -> tuple[int, int]:
    """Positions of the largest chunk that any micro-batch has in the loss, and every which of them is logged."""
    if head is None:
        return max(1, known.micro.positions), 1
    most = fused.chunk_rows(head.weight, 4)
    chunks = [(fused.even(count, most), -(-count // STATISTICS_POSITIONS)) for count in known.positions if count]
    return max(chunks, key=lambda chunk: 2 * chunk[0] + _STATISTICS * -(-chunk[0] // chunk[1]), default=(1, 1))


def _training(student: PreTrainedModel, teacher: PreTrainedModel | None, known: Known) -> dict[str, Parts]:
    """A micro-batch: the teacher, the student and the loss, and the way back."""
    moments: dict[str, Parts] = {}
    if teacher is not None and known.held == "live" and known.spec.uses_teacher:
        moments["teacher"] = {"activations": _read(teacher, known.micro, known.device)}
    precision = known.arguments.precision
    autocast = None if precision == "fp32" else DTYPES[precision]
    live = LiveBytes()
    live.watch(student)
    with traced(live, known.device, autocast) as kept:
        head = output_head(student)
        count, every = _worst_chunk(head, known)
        width = known.student.num_labels if head is None else head.vocab_size
        signal = _signal(teacher if known.spec.uses_teacher else None, known, count, width)
        given = live.now
        hidden = hidden_states(student, _inputs(known.micro))
        body = live.now - given
        highest = live.peak - given
        states = _chosen(hidden, count)
        # What the positions beyond the first chunk add: their states, and the gradients on them.
        more = max(0, known.micro.positions - count) * (states.shape[-1] * (states.element_size() + 4) + 4)
        live.restart()
        loss = _loss(states, head, signal, known, observe=StatisticsSums(every))
        peak = max(live.peak, highest + given) + more
        moments["loss"] = {"activations": body, "loss": peak - body}
        kept.clear()
        del hidden, states
        live.restart()
        backward(loss)
        moments["backward"] = {
            "gradients": live.gradients_at_peak,
            "activations": live.peak - live.gradients_at_peak + more,
        }
    if known.several:
        moments["backward"]["gradients"] = bytes_of(p for p in student.parameters() if p.requires_grad)
    return moments


def _read(model: PreTrainedModel, shape: Shape, device: str) -> int:
    """The most that a model needs to read a batch without gradients, the states at its positions included."""
    training = model.training
    live = LiveBytes()
    live.watch(model)
    with traced(live, device), torch.no_grad():
        model.eval()
        _chosen(hidden_states(model, _inputs(shape)), max(1, shape.positions))
        model.train(training)
    return live.peak


def _heldout(student: PreTrainedModel, teacher: PreTrainedModel | None, known: Known) -> Parts:
    """A held-out batch: the larger model reads it, then its positions are compared chunk by chunk."""
    assert known.heldout is not None
    models = [student, *([teacher] if teacher is not None and known.held == "live" else [])]
    reading = _read(max(models, key=lambda model: model.num_parameters()), known.heldout, known.device)
    head = output_head(student)
    live = LiveBytes()
    with traced(live, known.device), torch.no_grad():
        count = min(CHUNK, max(1, known.heldout.positions))
        width = known.student.num_labels if head is None else head.vocab_size
        states = torch.empty(count, width if head is None else head.weight.shape[1], dtype=student.dtype, device="meta")
        signal = _signal(teacher, known, count, width)
        detached = None if head is None else head.detached()
        _loss(states, detached, signal, known, reduction="none", observe=StatisticsSums())
    states_of_all = known.heldout.positions * states.shape[-1] * states.element_size()
    compared = states_of_all + live.peak
    return {"activations": reading} if reading >= compared else {"activations": states_of_all, "loss": live.peak}


def _by_rule(student: PreTrainedModel, trained: Sequence[Tensor], known: Known) -> dict[str, Parts]:
    """The same by rules of thumb."""
    text = known.student.get_text_config()
    wide = 2 if known.arguments.precision == "fp32" else 1
    layers = depth(known.student)
    kept = layers * 2 * wide if known.spec.training.gradient_checkpointing else layers * ACTIVATIONS_PER_TOKEN * wide
    activations = kept * text.hidden_size * known.micro.size
    head = output_head(student)
    loss = 0
    if head is not None:
        loss = 8 * head.vocab_size * fused.chunk_rows(head.weight, 4)
        loss += 4 * head.weight.numel() * any(head.weight is weight for weight in trained)
    return {
        "loss": {"activations": activations, "loss": loss},
        "backward": {"activations": activations // 2, "gradients": bytes_of(trained)},
    }


def _optimiser(trained: Sequence[nn.Parameter], known: Known, notes: list[str]) -> tuple[int, int]:
    """Bytes of the optimiser's state, and those that a step takes for a moment."""
    arguments = known.arguments
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if "8bit" in name:
        return 2 * sum(parameter.numel() for parameter in trained), 0
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        fused_step = bool(options.pop("fused", False))
        if known.device == "cuda" and "foreach" in kind.__init__.__code__.co_varnames:
            options["foreach"] = not fused_step
        optimizer = kind(trained, **options)
        live = LiveBytes()
        live.leave_out(trained)
        with live, torch.no_grad():
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            gradients = live.now
            optimizer.step()
        state = live.now - gradients
        extra = 0 if fused_step else max(0, live.peak - live.now)
    except Exception as error:
        notes.append(f"The optimiser {name} is counted as two moments of each weight ({type(error).__name__}).")
        state, extra = 2 * bytes_of(trained), 0
    finally:
        for parameter in trained:
            parameter.grad = None
    return state, extra


def _kept_states(teacher: PreTrainedModel | None, known: Known) -> int:
    """The teacher's states of held-out rows, and those that it remembers."""
    if known.held == "none" or not known.spec.uses_teacher:
        return 0
    if known.held == "topk":
        return known.heldout_positions * (12 * known.k + 8)
    assert teacher is not None
    head = output_head(teacher)
    width = known.teacher.num_labels if head is None else head.weight.shape[1]
    each = width * teacher.dtype.itemsize
    heldout = known.heldout_positions * each
    config = known.spec.teacher
    if known.held != "live" or config is None or known.device != "cpu" or known.spec.rollouts.is_on:
        return heldout  # what a teacher remembers waits in the memory of the processor
    return heldout + min(config.remember_mb * 2**20, known.train_positions * each // known.processes)


def _start(known: Known) -> int | None:
    """While the student is made: the whole model that it is cut from, and a file that is read into another dtype.

    Both wait in the memory of the processor.
    """
    student, teacher = known.spec.student, known.spec.teacher
    if student.init == "random" or known.device != "cpu" or known.follows:
        return None
    source = source_model(student, teacher.source if teacher else None)
    config = load_config(source, **student.model_init_kwargs)
    numbers, wanted = count_parameters(config, classifier=known.spec.classifies), DTYPES[student.dtype]
    stored = getattr(config, "dtype", None) or wanted
    file = 0 if stored == wanted else numbers * stored.itemsize
    return file + (numbers * wanted.itemsize if student.init == "prune" else 0) or None


def _answers(student: PreTrainedModel, known: Known) -> int:
    """What writing answers takes: the cache of every token, and the scores of the next one."""
    assert known.answers is not None
    count, tokens = known.answers
    source = known.spec.rollouts.source
    wide = 4 if known.arguments.precision == "fp32" else 2
    total = 0
    if source in ("student", "mixed"):
        weights = bytes_of(student.parameters())
        total += _cache_of(known.student, min(wide, student.dtype.itemsize)) * count * tokens
        total += 0 if wide == 4 or student.dtype.itemsize == 2 else weights // 2
    if source in ("teacher", "mixed") and known.teacher is not None:
        total += _cache_of(known.teacher, 2) * count * tokens
    return total + _SCORES * 4 * count * int(known.student.get_text_config().vocab_size)


def _cache_of(config: Any, itemsize: int) -> int:
    """Bytes that a cache of keys and values has for each token."""
    text = config.get_text_config(decoder=True) if is_encoder_decoder(config) else config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    groups = getattr(text, "num_key_value_heads", None) or heads
    each = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // heads
    both = 2 if is_encoder_decoder(config) else 1  # what the decoder wrote, and what the encoder read
    return 2 * both * depth(config) * groups * each * itemsize


def sharding_of(spec: RunSpec) -> str:
    """How a run shards its student: ``fsdp``, ``zero-1``, ``zero-2``, ``zero-3``, or an empty text for not at all."""
    arguments = spec.training.arguments
    if arguments.get("fsdp") or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp"
    config = arguments.get("deepspeed")
    if isinstance(config, str):
        with contextlib.suppress(OSError, ValueError):
            config = parse_json(Path(config).expanduser().read_text(encoding="utf-8"))
    stage = (config.get("zero_optimization") or {}).get("stage", 0) if isinstance(config, Mapping) else 0
    return f"zero-{stage}" if stage in (1, 2, 3) else ""


_DIVIDED = {
    "fsdp": ("student_weights", "gradients", "optimiser"),
    "zero-3": ("student_weights", "gradients", "optimiser"),
    "zero-2": ("gradients", "optimiser"),
    "zero-1": ("optimiser",),
}


def _divide(
    moments: dict[str, Parts],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    trained: Sequence[Tensor],
    known: Known,
) -> None:
    """Divide what is divided between the processes, and add what they need for it."""
    count, half = known.processes, known.arguments.precision != "fp32"
    divided = _DIVIDED.get(known.sharding, ())
    if count == 1:
        return
    for name, parts in moments.items():
        if not known.sharding and name != "start":
            parts["buckets"] = bytes_of(trained)  # DistributedDataParallel's own copy of the gradients
        if known.sharding.startswith("zero") and half:
            # DeepSpeed computes in half precision, and updates weights in fp32.
            parts["optimiser"] = parts.get("optimiser", 0) + 4 * sum(p.numel() for p in trained)
        # FSDP2 keeps weights in fp32 where it computes in half precision.
        wider = 4 // student.dtype.itemsize if known.sharding == "fsdp" and half else 1
        for part in divided if name != "start" else ():
            parts[part] = -(-wider * parts.get(part, 0) // count)
    if "student_weights" in divided:
        largest, root = _groups(student)
        config = known.spec.training.arguments.get("fsdp_config")
        stays = isinstance(config, Mapping) and config.get("reshard_after_forward") is False
        # The layer that computes and the next one; or all of them, where they stay until the way back.
        whole = sum(p.numel() for p in student.parameters()) if stays else min(2 * largest, _in_layers(student)) + root
        for name in ("loss", "backward", "heldout"):
            if name in moments:
                gradients = largest + root if name == "backward" else 0
                moments[name]["gathered"] = (whole + gradients) * (2 if half else 4)
    if teacher is not None and known.held == "live" and getattr(known.spec.teacher, "shard", False):
        largest, root = _groups(teacher)
        for name, parts in moments.items():
            parts["teacher_weights"] = -(-parts.get("teacher_weights", 0) // count)
            if name in ("teacher", "loss", "heldout"):
                parts["gathered"] = parts.get("gathered", 0) + (2 * largest + root) * teacher.dtype.itemsize


def _groups(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters of a model's largest layer, and of what stands outside of its layers."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in _layers(model)]
    return max(layers, default=0), max(0, whole - sum(layers))


def _in_layers(model: PreTrainedModel) -> int:
    """Parameters of a model's layers."""
    return sum(parameter.numel() for layer in _layers(model) for parameter in layer.parameters())


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)
