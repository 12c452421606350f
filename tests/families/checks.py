"""What drkl does with one architecture, beside plain PyTorch on one unpadded row after the other."""

from __future__ import annotations

import copy
import gc
import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import drkl
from drkl.models import load_model, sample_texts
from drkl.models.adapter import merge_adapter
from tests.families.builder import BOS, EOS, LAYERS, build, tokenizer

COLUMNS = ("load", "prune", "distil", "evaluate", "LoRA", "save")
WORKS, REFUSED, DIFFERS, FAILS = "works", "refused", "differs", "fails"

TOLERANCE = 1e-4
"""Of the largest number: fp32 (6e-8) through 4 layers, on padded batches and on single rows, gives 1e-6 to 1e-5."""
STEPS, RATE = 3, 1e-3
GAMMA = 0.5


@dataclass
class Cell:
    """What became of one column of one row."""

    status: str
    message: str = ""


@dataclass(frozen=True)
class Pair:
    """A row of data: of an encoder-decoder, what the encoder reads and what the decoder writes."""

    prompt: list[int]
    response: list[int]


def pairs(seed: int, *lengths: tuple[int, int]) -> list[Pair]:
    """Rows of bytes, each ended by the end of a turn; no two of a length, so that a batch is padded."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(20, 200, (count,), generator=draw).tolist()

    return [Pair([BOS, *ids(prompt - 1)], [*ids(response - 1), EOS]) for prompt, response in lengths]


TRAINED = pairs(1, (9, 8), (17, 13))
HELD_OUT = pairs(2, (14, 11), (8, 7))
PROMPTS = [pair.prompt for pair in pairs(3, (7, 2), (15, 2))]
NEW_TOKENS = 6


# --- plain PyTorch, from the equations ---------------------------------------------------------------------------


def forward(model: Any, **inputs: Tensor | None) -> Tensor:
    """The model's own logits `[tokens, vocab]` of one row without padding or cache."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False  # type: ignore[assignment]
    logits: Tensor = model(**inputs).logits[0]
    return logits


def response_logits(model: Any, pair: Pair) -> Tensor:
    """The logits that predict a response `[response, vocab]`."""
    if model.config.is_encoder_decoder:
        fed = [start_of(model), *pair.response[:-1]]
        return forward(model, input_ids=torch.tensor([pair.prompt]), decoder_input_ids=torch.tensor([fed]))
    ids = torch.tensor([[*pair.prompt, *pair.response[:-1]]])
    return forward(model, input_ids=ids)[-len(pair.response) :]


@torch.no_grad()
def logits_of(model: Any, pair: Pair) -> Tensor:
    return response_logits(model, pair)


def start_of(model: Any) -> int:
    return int(model.config.decoder_start_token_id)


def drkl_of(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """B + gamma K at each position: the target is the teacher's most probable token, the tail all others."""
    target = teacher_logits.argmax(-1, keepdim=True)
    logq, logp = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    tail = torch.ones_like(logq, dtype=torch.bool).scatter(-1, target, False)

    def parts(logx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        others = logx[tail].view(logx.shape[0], -1)
        rest = others.logsumexp(-1)
        return logx.gather(-1, target).squeeze(-1), rest, others - rest[:, None]

    (q_t, q_rest, q_hat), (p_t, p_rest, p_hat) = parts(logq), parts(logp)
    two_classes = q_t.exp() * (q_t - p_t) + q_rest.exp() * (q_rest - p_rest)
    return two_classes + GAMMA * (q_hat.exp() * (q_hat - p_hat)).sum(-1)


def reverse_kl_of(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    logq, logp = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (logq.exp() * (logq - logp)).sum(-1)


def plain_loss(
    student: Any, teacher: Any, rows: Sequence[Pair], objective: Callable[[Tensor, Tensor], Tensor] = drkl_of
) -> Tensor:
    """The mean over all response tokens."""
    total = torch.zeros(())
    for pair in rows:
        with torch.no_grad():
            teacher_logits = response_logits(teacher, pair)
        total = total + objective(response_logits(student, pair).float(), teacher_logits.float()).sum()
    return total / sum(len(pair.response) for pair in rows)


def plain_training(student: Any, teacher: Any) -> None:
    """Three steps of AdamW on all rows, gradients clipped to norm 1."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=EPSILON, weight_decay=0.0)
    student.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        plain_loss(student, teacher, TRAINED).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    student.eval()


EPSILON = 1e-4
"""AdamW's: with the usual 1e-8 a gradient that is 0 but for rounding makes a whole step in either direction."""


@torch.no_grad()
def plain_greedy(model: Any, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
    """The most probable tokens, one forward of everything before for each; and how far the second was behind."""
    written: list[int] = []
    leads: list[float] = []
    while len(written) < NEW_TOKENS and written[-1:] != [EOS]:
        if model.config.is_encoder_decoder:
            fed = torch.tensor([[start_of(model), *written]])
            logits = forward(model, input_ids=torch.tensor([prompt]), decoder_input_ids=fed)[-1]
        else:
            logits = forward(model, input_ids=torch.tensor([[*prompt, *written]]))[-1]
        best = logits.topk(2)
        written.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]) / float(logits.abs().max()))
    return written, leads


# --- the columns -------------------------------------------------------------------------------------------------


class Different(Exception):
    """A number that is not the reference's, without an error."""


def check(row: str, folder: Path) -> dict[str, Cell]:
    """Try every column of a row of the table; files go into an empty folder."""
    gc.freeze()  # what is imported already: every collection of a run would search it again, for half of the time
    try:
        work = Work(build(row), folder)
        cells = {column: attempt(getattr(work, column.lower())) for column in COLUMNS}
    finally:
        gc.unfreeze()
    for cell in cells.values():
        cell.message = re.sub(rf"{re.escape(str(folder))}[\w/.-]*", "FOLDER", cell.message)
    return cells


def attempt(column: Callable[[], str | None]) -> Cell:
    try:
        note = column()
    except drkl.DrklError as error:
        return Cell(REFUSED, one_line(error))
    except Different as error:
        return Cell(DIFFERS, one_line(error))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = next((f for f in reversed(frames) if "/drkl/" in f.filename), frames[-1])
        where = " > ".join(dict.fromkeys(f"{Path(f.filename).name}:{f.lineno}" for f in (ours, frames[-1])))
        return Cell(FAILS, f"{type(error).__name__}: {one_line(error)} ({where})")
    return Cell(WORKS, note or "")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def same(what: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise Different(f"{what}: shape {list(found.shape)}, not {list(expected.shape)}")
    off = float((found - expected).abs().max())
    scale = max(float(expected.abs().max()), 1e-3)
    if not off <= TOLERANCE * scale:
        raise Different(f"{what}: off by {off:.1e} of {scale:.1e}")


@dataclass
class Work:
    """The models of a row, and what one column leaves for the next."""

    teacher: PreTrainedModel
    folder: Path
    student: PreTrainedModel | None = None
    trained: Path | None = None
    tokens: Any = field(default_factory=tokenizer)

    def __post_init__(self) -> None:
        self.name = str(self.folder / "teacher")
        self.teacher.save_pretrained(self.name)
        self.tokens.save_pretrained(self.name)

    def load(self) -> None:
        loaded = load_model(self.name, "fp32")
        for pair in HELD_OUT:
            same("logits of the loaded model", logits_of(loaded, pair), logits_of(self.teacher, pair))

    def prune(self) -> str:
        """Some layers have to work; others may be refused where a config cannot say what they compute."""
        wanted: list[tuple[Any, list[int]]] = [(2, [0, LAYERS - 1]), ([1, 2], [1, 2]), ([0, 1], [0, 1])]
        refused: list[str] = []
        for layers, kept in wanted:
            try:
                small = drkl.prune(self.teacher, layers=layers)
            except drkl.DrklError as error:
                refused.append(one_line(error))
                continue
            check_layers(self.teacher, small, kept)
            read_back(small, self.folder / "pruned")
            self.student = self.student or small
        if self.student is None:
            raise drkl.DrklError(refused[0])
        return " ".join(refused)

    def distil(self) -> None:
        student = self._student()
        reference = copy.deepcopy(student)
        trainer = self._trainer(student, "distil")
        before = trainer.evaluate()
        same(
            "held-out loss",
            torch.tensor(before["eval_loss"]),
            plain_loss(reference, self.teacher, HELD_OUT).detach(),
        )
        start = weights(reference)
        trainer.train()
        plain_training(reference, self.teacher)
        here, there = weights(student), weights(reference)
        way = (there - start).norm()
        if not float((here - there).norm()) <= TRAINED_TOLERANCE * float(way):
            raise Different(f"weights after {STEPS} steps: off by {float((here - there).norm() / way):.1e} of the way")
        trainer.save_model()
        self.trained = self.folder / "distil" / "student"

    def evaluate(self) -> None:
        greedy = sample_texts(
            self.teacher, self.tokens, PROMPTS, samples_per_prompt=4, max_new_tokens=NEW_TOKENS, greedy=True
        )
        for prompt, answers in zip(PROMPTS, greedy, strict=True):
            expected, leads = plain_greedy(self.teacher, prompt)
            for answer in answers:
                compare_answers(list(answer.token_ids), expected, leads)
        student = self._student()
        result = drkl.evaluate(
            student, self.teacher, self._rows(HELD_OUT), self.tokens, prompts=2, samples_per_prompt=4,
            max_new_tokens=NEW_TOKENS, sweep=[],
        )  # fmt: skip
        expected_kl = plain_loss(student, self.teacher, HELD_OUT, reverse_kl_of).detach()
        same("reverse KL of the evaluation", torch.tensor(result["rkl"].value), expected_kl)

    def lora(self) -> None:
        from peft import LoraConfig

        base = self.folder / "base"
        student = self._student()
        student.save_pretrained(base)
        self.tokens.save_pretrained(base)
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=linear_names(student, stacks_of(self.teacher)))
        trainer = self._trainer(str(base), "lora", peft_config=adapter)
        trainer.train()
        trainer.save_model()
        model: Any = trainer.pair.student.eval()
        within = [logits_of(model, pair) for pair in HELD_OUT]
        plain = [logits_of(student, pair) for pair in HELD_OUT]
        if all(torch.equal(a, b) for a, b in zip(within, plain, strict=True)):
            raise Different("the adapter changes nothing")
        found = {
            "the adapter in its folder": load_model(self.folder / "lora" / "student", "fp32"),
            "the merged adapter": merge_adapter(copy.deepcopy(trainer.pair.adapter)),
        }
        for what, other in found.items():
            for logits, pair in zip(within, HELD_OUT, strict=True):
                same(f"logits of {what}", logits_of(other, pair), logits)

    def save(self) -> None:
        if self.trained is None:
            student = self._student()
            trainer = self._trainer(student, "saved")
            trainer.save_model()
            self.trained = self.folder / "saved" / "student"
        else:
            student = self._student()
        for read in (type(student).from_pretrained, lambda name: load_model(name, "fp32")):
            again = read(self.trained).eval()
            for pair in HELD_OUT:
                same("logits of the saved student", logits_of(again, pair), logits_of(student, pair))

    def _student(self) -> PreTrainedModel:
        """The pruned model; of what cannot be pruned a copy with other weights."""
        if self.student is None:
            self.student = copy.deepcopy(self.teacher)
            torch.manual_seed(7)
            with torch.no_grad():
                for parameter in self.student.parameters():
                    if parameter.is_floating_point() and parameter.dim() > 1:
                        parameter.add_(torch.randn(parameter.shape) * 0.1)
        return self.student

    def _trainer(self, student: Any, name: str, **more: Any) -> Any:
        args = drkl.DistillationConfig(
            output_dir=str(self.folder / name), objective="drkl", objective_params={"gamma": GAMMA}, max_steps=STEPS,
            per_device_train_batch_size=len(TRAINED), learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0,
            weight_decay=0.0, adam_epsilon=EPSILON, max_grad_norm=1.0, max_tokens=64, precision="fp32", use_cpu=True,
            save_strategy="no", eval_strategy="no", logging_steps=1, disable_tqdm=True, report_to=[],
        )  # fmt: skip
        return drkl.DistillationTrainer(
            model=student, teacher_model=self.teacher, args=args, train_dataset=self._rows(TRAINED),
            eval_dataset=self._rows(HELD_OUT), processing_class=self.tokens, **more,
        )  # fmt: skip

    def _rows(self, data: Sequence[Pair]) -> list[dict[str, list[int]]]:
        if self.teacher.config.is_encoder_decoder:
            return [{"input_ids": pair.prompt, "labels": pair.response} for pair in data]
        return [
            {"input_ids": pair.prompt + pair.response, "labels": [-100] * len(pair.prompt) + pair.response}
            for pair in data
        ]


TRAINED_TOLERANCE = 1e-3
"""Of the way that the weights went: the gradients' rounding, over the square root of their square plus epsilon."""


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().float() for parameter in model.parameters()])


def compare_answers(found: list[int], expected: list[int], leads: list[float]) -> None:
    """Equal tokens up to the first that two computations may rank otherwise."""
    for position, (ours, theirs, lead) in enumerate(zip(found, expected, leads, strict=False)):
        if ours != theirs and lead < TOLERANCE:
            return
        if ours != theirs:
            raise Different(f"greedy answer {found}, not {expected}, from token {position} on")
    if len(found) != len(expected):
        raise Different(f"greedy answer {found}, not {expected}")


def read_back(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    again = load_model(folder, "fp32")
    for pair in HELD_OUT:
        same("logits of the pruned model, saved", logits_of(again, pair), logits_of(model, pair))


# --- pruning: what a layer computed ------------------------------------------------------------------------------


@torch.no_grad()
def check_layers(teacher: PreTrainedModel, small: PreTrainedModel, kept: list[int]) -> None:
    """Every kept layer, given the teacher's input of that layer, gives the teacher's output.

    Masks, positions and whatever else a layer is given are the smaller model's own.
    """
    for name, stack in stacks_of(teacher).items():
        layers: Any = small.get_submodule(name)
        if len(layers) != len(kept):
            raise Different(f"{name} has {len(layers)} layers after pruning, not {len(kept)}")
        for pair in HELD_OUT:
            with recorded([stack[index] for index in kept]) as seen:
                expected = logits_of(teacher, pair)
            with replayed(list(layers), seen) as found, encoded_by(small, teacher, pair):
                logits = logits_of(small, pair)
            for index, (ours, theirs) in enumerate(zip(found, seen, strict=True)):
                if len(ours) != len(theirs):
                    raise Different(f"{name}.{kept[index]} ran {len(theirs)} times, and {len(ours)} after pruning")
                for output, (_, wanted) in zip(ours, theirs, strict=True):
                    same(f"output of {name}.{kept[index]} on the teacher's input", output, wanted)
            if kept[-1] == len(stack) - 1 and name == list(stacks_of(teacher))[-1]:
                same("logits of the pruned model on the teacher's last states", logits, expected)


def stacks_of(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The lists of layers of the text model, outermost first: of an encoder-decoder two."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        apart = inside or _APART & {*name.split(".")}
        if isinstance(module, nn.ModuleList) and len(module) == LAYERS and not apart:
            found[name] = module
    # Beside an encoder for speech the text model says what it is.
    return {name: stack for name, stack in found.items() if "language_model" in name} or found


def linear_names(model: PreTrainedModel, stacks: Iterable[str]) -> list[str]:
    """The matrices within these lists of layers, but for one that peft refuses beside Mamba's fused kernel."""
    has_mamba = any(name.endswith("conv1d") for name, _ in model.named_modules())
    return [
        f"{stack}.{name}"
        for stack in stacks
        for name, module in model.get_submodule(stack).named_modules()
        if type(module) in (nn.Linear, Conv1D, FalconLinear) and not (has_mamba and name.endswith("out_proj"))
    ]


_APART = {
    "vision_tower", "audio_tower", "visual", "vision_model", "patcher", "local_encoder", "depth_decoder",
    "image_encoder", "embed_tokens_extend", "encoder_config",
}  # fmt: skip
"""Models beside the text model."""


Call = tuple[dict[str, Any], Tensor]
"""What a layer was given, by name, and its hidden states."""


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[list[Call]]]:
    """Every call of these layers."""
    seen: list[list[Call]] = [[] for _ in layers]

    def keep(calls: list[Call]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = {
                name: value.clone() for name, value in named(module, args, kwargs).items() if is_state(name, value)
            }
            calls.append((given, tensor_of(output).clone()))

        return hook

    handles = [layer.register_forward_hook(keep(c), with_kwargs=True) for layer, c in zip(layers, seen, strict=True)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed(layers: Sequence[nn.Module], seen: Sequence[Sequence[Call]]) -> Iterator[list[list[Tensor]]]:
    """Inside, the layers are given the states that were recorded; their own outputs."""
    found: list[list[Tensor]] = [[] for _ in layers]

    def give(calls: Sequence[Call], outputs: list[Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            states = calls[len(outputs)][0] if len(outputs) < len(calls) else {}
            names = list(named(module, args, {}))
            return (
                tuple(states.get(name, value) for name, value in zip(names, args, strict=True)),
                kwargs | {name: value for name, value in states.items() if name in kwargs},
            )

        return hook

    def keep(outputs: list[Tensor]) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.append(tensor_of(output).clone())

    handles = [
        hook
        for layer, calls, outputs in zip(layers, seen, found, strict=True)
        for hook in (
            layer.register_forward_pre_hook(give(calls, outputs), with_kwargs=True),
            layer.register_forward_hook(keep(outputs)),
        )
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def named(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


def is_state(name: str, value: Any) -> bool:
    """Whether a layer is given this by the layer before, not by the model around them."""
    around = ("mask", "position", "per_layer_input", "rotary", "cos", "sin", "bias")
    return isinstance(value, Tensor) and value.is_floating_point() and not any(part in name for part in around)


@contextmanager
def encoded_by(small: Any, teacher: Any, pair: Pair) -> Iterator[None]:
    """Inside, the smaller model's decoder reads what the teacher's encoder gives."""
    if not teacher.config.is_encoder_decoder:
        yield
        return
    states = teacher.get_encoder()(input_ids=torch.tensor([pair.prompt])).last_hidden_state

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        output.last_hidden_state = states
        return output

    handle = small.get_encoder().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def tensor_of(output: Any) -> Tensor:
    given: Tensor = output if isinstance(output, Tensor) else output[0]
    return given
