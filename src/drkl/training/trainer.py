"""`DistillationTrainer`: `transformers.Trainer` with the distillation loss, its token count and a run folder."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from drkl.data.batching import Steps
from drkl.data.collate import collate, teacher_inputs
from drkl.data.stored import column
from drkl.disk import cannot_write, writing
from drkl.errors import DrklError
from drkl.locks import ANALYSIS, EVALUATION, TRAINING, first_holding
from drkl.losses import IGNORE_INDEX, LMHead, release_buffers
from drkl.losses.topk import TopK
from drkl.models.at_head import call_at_head
from drkl.models.forward import decoder_start, hidden_states, without_mask
from drkl.models.load import one_tokenizer
from drkl.models.pair_loss import model_inputs
from drkl.models.sharded import is_sharded, load_whole, reshard, whole_state
from drkl.models.varlen import with_varlen
from drkl.models.weights import check_numbers, listed, not_loaded
from drkl.objectives import Objective
from drkl.processes import first_alone, gather, lost_another
from drkl.rollouts.steps import planned_lengths
from drkl.runs import RunFolder
from drkl.teachers.live import LiveTeacher
from drkl.teachers.served import ServedTeacher
from drkl.teachers.teacher import Teacher
from drkl.training import trl
from drkl.training.arguments import DistillationConfig
from drkl.training.best import find_best
from drkl.training.callbacks import (
    AnswersWatch,
    BeforeFirstStep,
    EarlyStop,
    Epochs,
    LastStep,
    OnBegin,
    OnProgress,
    TrainLog,
)
from drkl.training.checkpoints import (
    Reached,
    check_state,
    logged_until,
    mark_complete,
    plain_errors,
    plan_digest,
    reached_at,
    readable,
    step_of,
    wanted_checkpoint,
)
from drkl.training.checks import check_disk, check_there
from drkl.training.faults import Fault, Way, find_fault, state_faults
from drkl.training.feeding import Fed, Feeding
from drkl.training.finite import FiniteSteps
from drkl.training.forward import STATISTICS_POSITIONS, StatisticsSums, loss_of, means_of
from drkl.training.heap import freed_memory_kept
from drkl.training.heldout import NonFiniteLoss
from drkl.training.heldout_answers import HeldOutAnswers
from drkl.training.inputs import begins_anew, check_inputs, describe_inputs
from drkl.training.logs import texts_digest
from drkl.training.loop import check_optimizer, loop_arguments
from drkl.training.measures import Measures, make_measures
from drkl.training.on_policy import OnPolicy, check_rollouts, check_whole
from drkl.training.packing import settle_packing
from drkl.training.pair import Pair, make_pair
from drkl.training.placing import place, rotate, set_aside_later, staging, tidy
from drkl.training.plan import MicroBatches, Places, cuts_by_cost, plan_run
from drkl.training.record import RunRecord
from drkl.training.served import questions_in
from drkl.training.settings import changed
from drkl.training.sharding import check_kind, load_optimizer, save_optimizer, weights_in
from drkl.training.spare import SpareMemory
from drkl.training.stopping import Stopping
from drkl.training.streaming import StreamedBatches

OTHER_ROWS = "other_"
_log = logging.getLogger("drkl")


class DistillationTrainer(Trainer):
    """Trains a student on an objective; the loop, checkpoints and parallelism are transformers' and accelerate's.

    The student that is passed is trained in place. ``args.output_dir`` becomes a run folder: ``config.yaml``,
    ``env.json``, ``train.jsonl`` and ``checkpoints/`` while it trains, ``student/`` when `save_model` is called.
    A run folder that is there already is replaced when training starts, unless it is resumed.

    Args:
        model: the student: a `PreTrainedModel`, a `peft.PeftModel`, or a name or folder to load.
        teacher_model: the teacher, likewise; it gets no gradient and is left as it is. None where the objective
            needs none.
        args: how to train; None takes every default and the run folder ``runs/distillation``.
        train_dataset: training rows: a `datasets.Dataset`, a list of dicts, or a file; with prompt and response (or
            completion), messages, text, text and label, or ``input_ids`` and ``labels``. With ``rollout_share=1`` the
            prompts alone are enough.
        eval_dataset: held-out rows, likewise. None trains without a held-out loss, and ends with the last weights.
        processing_class: the tokenizer; None takes that of the student's name, or the teacher's where the student has
            none, or has no chat template.
        callbacks: as in `transformers.Trainer`.
        optimizers: as in `transformers.Trainer`.
        peft_config: a `peft.LoraConfig`; the adapter alone is trained, and saved.
        quantization_config: for loading a ``model`` given by its name.
        tokenizer: another name for ``processing_class``.
        tools: TRL's; refused.

    Raises:
        DrklError: models that are no pair, rows that cannot be used, or an argument that means nothing here.
    """

    loss_is_scaled_for_ga = True  # divided by the tokens of the whole optimiser step already

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        teacher_model: str | PreTrainedModel | Teacher | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        *,
        tokenizer: Any = None,
        **other: Any,
    ) -> None:
        trl.check_trainer_arguments(tools, other)
        if args is None:
            args = DistillationConfig(output_dir="runs/distillation")
        if not isinstance(args, DistillationConfig):
            raise DrklError(
                f"args is a {type(args).__name__}; expected a drkl.DistillationConfig, which has every field of "
                "transformers.TrainingArguments and those of the distillation."
            )
        pair = make_pair(
            model,
            teacher_model,
            args,
            train_dataset,
            eval_dataset,
            one_tokenizer(processing_class, tokenizer),
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._set_up(pair, args, callbacks, optimizers)

    def _set_up(
        self,
        pair: Pair,
        args: DistillationConfig,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[Any, Any],
    ) -> None:
        self.pair, self.config = pair, args
        self.teacher, self.tokenizer = pair.teacher, pair.tokenizer
        self.rows, self.eval_rows, self.vocab_size = pair.rows, pair.eval_rows[: args.eval_rows], pair.vocab_size
        self.objective: Objective = args.make_objective()
        self.loss_config = args.loss_config
        if self.teacher is None and args.kd_weight > 0 and self.objective.needs_teacher:
            raise DrklError(
                f"Objective {self.objective.name!r} compares with a teacher, but there is none; pass teacher_model, or "
                "train on the data alone with objective='ce'."
            )
        for note in pair.notes:
            _log.info(note)
        settle_packing(pair, args)
        self.run = RunFolder(Path(str(args.output_dir)))
        any_rows: Any = pair.rows
        samples = args.rollouts.is_on
        if samples:
            check_rollouts(pair, args)
        steps, ends = Steps.of([]), [args.max_steps]
        if pair.stream is None:
            lengths = planned_lengths(any_rows, pair.max_new_tokens) if samples else column(any_rows, "length")
            steps, ends = plan_run(lengths, args, args.world_size)
        self._steps = steps
        self._on_policy = OnPolicy(pair, args, self.run, steps, ends) if samples else None
        self._streamed: StreamedBatches | None = None
        inner = loop_arguments(args, self.run, len(steps) or args.max_steps, heldout=bool(self.eval_rows))
        # Old checkpoints are removed here: transformers does so before the new one is marked whole.
        self._keep_checkpoints, inner.save_total_limit = inner.save_total_limit, None
        check_optimizer(optimizers[0], pair.student)
        if args.early_stop_patience and not self.eval_rows:
            raise DrklError("early_stop_patience counts held-out losses; pass eval_dataset, or leave it out.")
        self._measures = make_measures(self.eval_rows, pair, args, self.run) if self.eval_rows else None
        check_disk(self.run, pair.student)
        own = self._own_callbacks(ends)
        self._use_cache = getattr(pair.student.config, "use_cache", None)  # transformers turns it off
        self._set_up_loop(inner, steps, [*own, *(callbacks or [])], optimizers)
        if self._on_policy is not None:
            check_whole(self)
        if self._use_cache is not None:
            pair.student.config.use_cache = self._use_cache
        self.remove_callback(PrinterCallback)
        # Not given to transformers, which would change the student's special tokens to the tokenizer's.
        self.processing_class = pair.tokenizer
        self.record = RunRecord(self.run, pair, args)
        self.record.optimizers = optimizers
        self._sums: dict[str, float] = {}
        self._since = time.monotonic()
        self._feeding = Feeding()
        self._finite, self._memory = FiniteSteps(self), SpareMemory(self)
        self._from = Reached(0)
        """Where the training began."""
        self._inputs: dict[str, Any] | None = None
        """What `describe_inputs` found before the first step."""
        self._whole: Path | None = None
        """The checkpoint that it went on from."""
        self._student_step: int | None = None
        """The step of the best weights, once they are in memory again."""
        self.on_message: Callable[[str], None] = _log.info
        """Called with what a run says as it goes on."""
        self.on_begin: Callable[[], None] = lambda: None
        """Called in every process before anything of the run is written."""
        self._stopping = Stopping(self)
        self.num_tokens_seen = 0
        self._row_ids: list[str] = []

    def _own_callbacks(self, ends: Sequence[int]) -> list[TrainerCallback]:
        """The callbacks of every run; ``ends`` are the steps after which an epoch ends."""
        args = self.config
        self._train_log, self._watch, self._epochs = TrainLog(self.run), AnswersWatch(), Epochs(ends, args)
        begin = OnBegin(self._go_on)
        own: list[TrainerCallback] = [begin, self._train_log, self._epochs, LastStep()]
        if args.early_stop_patience:
            own.append(EarlyStop(args.early_stop_patience))
        if self._on_policy is not None:
            own.append(self._watch)
        answers = None if self._measures is None else self._measures.answers
        if answers is not None:
            own.append(BeforeFirstStep(lambda: self._log_first_answers(answers)))
        return own

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):  # its parts lie where they are used
            super()._move_model_to_device(model, device)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        # transformers' own asks the config how the model was sharded, which a caller need not have written there.
        student: Any = self.student
        student.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            student.set_requires_gradient_sync(True)

    def _set_up_loop(
        self,
        inner: DistillationConfig,
        steps: Sequence[Sequence[int]],
        callbacks: list[TrainerCallback],
        optimizers: tuple[Any, Any],
    ) -> None:
        """Set up transformers' own trainer, which is given micro-batches whole."""
        pair, on_policy = self.pair, self._on_policy is not None
        reshard(pair.student)  # it has been tried
        pad_id, start = pair.pad_id, decoder_start(pair.student)
        parts = inner.gradient_accumulation_steps * inner.world_size
        alike = cuts_by_cost(self.config, self.config.world_size)
        packed = pair.packed
        batches: Any = Places(len(steps) * parts)
        if not on_policy:
            batches = MicroBatches(pair.rows, steps, parts, alike=alike, packed=packed)
        if pair.stream is not None:
            self._streamed = batches = StreamedBatches(pair.stream, self.config, parts, pair.check_more, packed=packed)
            inner.dataloader_num_workers, inner.dataloader_prefetch_factor = 0, None  # it reads ahead by itself
            inner.dataloader_persistent_workers = False

        def to_batch(items: list[Any]) -> Any:
            return items[0] if on_policy else collate(items[0], pad_id=pad_id, decoder_start=start, packed=packed)

        try:
            super().__init__(
                model=pair.student,
                args=inner,
                train_dataset=batches,
                eval_dataset=[0] if self.eval_rows else None,  # never read: `evaluate` has its own rows
                data_collator=to_batch,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        except OSError as error:
            raise cannot_write(self.run.root, error) from error
        except (ValueError, RuntimeError, ImportError) as error:
            if isinstance(error, DrklError):
                raise
            raise DrklError(f"transformers.Trainer refuses the arguments: {' '.join(str(error).split())}") from error
        self._sharded_by_caller = is_sharded(pair.student) and not self.is_fsdp_enabled
        if self._sharded_by_caller:
            self.is_distributed_loading_by_transformers = True  # so that accelerate wraps nothing around it

    @property
    def student(self) -> nn.Module:
        """The model being trained, whatever is wrapped around it."""
        unwrapped: nn.Module = self.accelerator.unwrap_model(self.model)
        return unwrapped

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train, and write the run folder but for the student, which `save_model` writes.

        SIGTERM, SIGINT and SIGHUP, where a main thread leaves them to Python, wait for the end of the step: it is saved
        as a checkpoint, then SIGINT raises KeyboardInterrupt and the others `drkl.signals.Stopped`, a SystemExit. A
        second signal, or 25 seconds, end training at once.

        Args:
            resume_from_checkpoint: a checkpoint of this run, or True for its newest whole one.
            **kwargs: as in `transformers.Trainer.train`.

        Returns:
            transformers' `TrainOutput`.

        Raises:
            DrklError: a loss or a gradient that is not finite, a folder that cannot be written, or no checkpoint.
        """
        held = self.record.keeps_folder  # by who prepared it
        with nullcontext() if held else first_holding(self.run.root, TRAINING, EVALUATION, ANALYSIS):
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume_from_checkpoint: str | Path | bool | None, **kwargs: Any) -> Any:
        apart = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        checkpoint = first_alone(lambda: wanted_checkpoint(self.run, resume_from_checkpoint, optimizer=apart))
        # What cannot be gone on from is refused before anything of the run is touched.
        self._from, self._whole, self._student_step = Reached(0), checkpoint, None
        if checkpoint is not None:
            check_kind(checkpoint, by_accelerate=self.is_fsdp_enabled)
            check_state(checkpoint)
            self._from = reached_at(checkpoint)
        self._settle_inputs(checkpoint)
        if checkpoint is not None:
            self.on_message(f"Going on from {checkpoint.name}.")
        self.num_tokens_seen = self._from.num_tokens
        self._feeding.begin(self._from.fed)
        self._finite.begin(self._from)
        if self._on_policy is not None:
            self._on_policy.begin(checkpoint)
            self._on_policy.check_server()
        if self._streamed is not None:
            self._streamed.begin(checkpoint)
        from_step = step_of(checkpoint) if checkpoint else -1
        self.on_begin()
        if self.is_world_process_zero():
            self.record.begin(self.args.max_steps, resumed=checkpoint is not None)
            with writing(self.run.checkpoints_path, then="resume the run"):
                tidy(self.run.checkpoints_path)
                if resume_from_checkpoint is not True:
                    set_aside_later(self.run.checkpoints_path, from_step)
        self.accelerator.wait_for_everyone()
        due = self._from.evaluation_due
        history = None if checkpoint is None else logged_until(checkpoint)
        self._watch.begin(self._train_log.begin(from_step, history, measured=not due))
        if self._measures is not None and self.is_world_process_zero():
            self._measures.begin(from_step - due, history or (), self._from.texts)
        # It would be a second evaluation of the step that a run goes on from.
        self.args.eval_on_start = self.config.eval_on_start and checkpoint is None
        student = self.pair.student
        training = student.training
        tokenizer, self.processing_class = self.processing_class, None
        if self._use_cache is not None:
            student.config.use_cache = False
        try:
            stopping, memory = self._stopping.training(checkpoint), self._memory.around()
            with freed_memory_kept(self.args.device), with_varlen(self.pair.varlen), memory, stopping:
                output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
            read = None if self._streamed is None else self._streamed.account(self.state.global_step)
        finally:
            if self._streamed is not None:
                self._streamed.end()
            student.__dict__.pop("forward", None)  # accelerate's, with autocast
            self.processing_class = tokenizer
            self._rest_optimizer()
            if self._use_cache is not None:
                student.config.use_cache = self._use_cache
            student.train(training)
            release_buffers()
        if self.is_world_process_zero():
            self.record.trained(self.state, self._train_log.seconds, read, student_step=self._student_step)
        self.accelerator.wait_for_everyone()
        return output

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Write the student as ``from_pretrained`` reads it, tokenizer and model card included; of LoRA the adapter.

        Args:
            output_dir: a folder; None is ``student/`` of the run folder, which finishes the run.

        Raises:
            DrklError: it cannot be written there.
        """
        if _internal_call:
            super().save_model(None if output_dir is None else str(output_dir), _internal_call=True)
            return
        self._finite.check_weights()
        writes = self.is_world_process_zero()
        state: dict[str, Tensor] | None = None
        if is_sharded(self.student):
            state = whole_state(self.student if self.pair.adapter is None else self.pair.adapter, keep=writes)
        if writes:
            self.record.save_student(None if output_dir is None else Path(output_dir), self.state, state)
        self.accelerator.wait_for_everyone()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The summed loss of a micro-batch over the valid tokens of the whole optimiser step, all ranks together."""
        row_ids, sampled, places = inputs.pop("row_ids"), inputs.pop("sampled", None), inputs.pop("places", None)
        teacher_batch, teacher_keep = teacher_inputs(inputs)
        labels = inputs.pop("labels")
        keep = labels != IGNORE_INDEX
        num_tokens = torch.as_tensor(
            keep.sum() if num_items_in_batch is None else num_items_in_batch, device=labels.device
        )
        teacher_hidden: Tensor | TopK | None = None
        teacher_head = None
        if self._uses_teacher:
            assert self.teacher is not None
            comes_again = sampled is None or not bool(sampled.any())
            teacher_hidden = self.teacher.hidden_at(
                teacher_batch, teacher_keep, labels=labels[keep], remember=comes_again
            )
            teacher_head = self.teacher.head
        every = -(-int(num_tokens) // STATISTICS_POSITIONS)
        of_sampled = None if sampled is None else sampled[keep]
        statistics = None
        if bool(keep.any()) and self._will_log():
            statistics = StatisticsSums(every, of_sampled, temperature=self.loss_config.temperature, places=places)
        seen: list[tuple[Tensor, LMHead | None]] = []

        def at_head(hidden: Tensor, head: LMHead | None) -> Tensor:
            states = hidden[keep]
            seen.append((states.detach(), head))
            return loss_of(
                states,
                head,
                teacher_hidden,
                teacher_head,
                labels[keep],
                self.loss_config,
                sampled=of_sampled,
                objective=self.objective,
                num_tokens=num_tokens,
                vocab_size=self.vocab_size,
                merged_ids=self.pair.merged_ids or None,
                observe=statistics,
            )

        read = without_mask(self.pair.student, inputs)
        loss = call_at_head(model, model_inputs(self.pair.student, read, "student"), at_head, "student")
        self._feeding.add(inputs, row_ids)
        if not torch.isfinite(loss):
            hidden, head = seen[0]
            batches = read, teacher_batch
            return self._finite.refuse_loss(
                loss, row_ids, lambda: self._fault_of(hidden, teacher_hidden, (head, teacher_head), batches)
            )
        for name, value in (statistics.sums if statistics else {}).items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        # Ranks' gradients are averaged; the sum over ranks is what was divided by the global count.
        return loss * self.accelerator.num_processes

    @property
    def _uses_teacher(self) -> bool:
        return self.teacher is not None and self.loss_config.kd_weight > 0 and self.objective.needs_teacher

    def _will_log(self) -> bool:
        """Whether the present step ends with a line in the log."""
        step = self.state.global_step + 1
        every = max(1, int(self.state.logging_steps))
        first = step == 1 and self.args.logging_first_step
        return first or step % every == 0 or step >= self.state.max_steps or self._epochs.logs_at(step)

    def _fault_of(
        self, hidden: Tensor, teacher_hidden: Tensor | TopK | None, heads: Any, batches: tuple[Any, Any]
    ) -> Fault:
        teacher = self.teacher if self._uses_teacher else None
        student: Any = self.student

        def read_teacher() -> None:
            if isinstance(teacher, LiveTeacher):
                teacher.hidden(batches[1])

        again = (lambda: hidden_states(student, batches[0])), read_teacher
        return find_fault(Way(student, hidden, teacher, teacher_hidden, self.objective, heads, again))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, part by part, in halves where memory ran out."""
        started = time.monotonic()
        state = self.accelerator.gradient_state
        syncs = state.sync_gradients
        batches = inputs.get("parts", [inputs])

        def one_pass(batch: dict[str, Any]) -> Tensor:
            if batch is batches[-1]:
                return super(DistillationTrainer, self).training_step(model, batch, num_items_in_batch)
            state._set_sync_gradients(False)  # DeepSpeed's engine would take a step after each part
            with self.accelerator.no_sync(model):
                loss = super(DistillationTrainer, self).training_step(model, batch, num_items_in_batch)
            state._set_sync_gradients(syncs)
            return loss

        loss = self._memory.micro_batch(model, batches, one_pass)
        if self._on_policy is not None:
            self._on_policy.learnt(time.monotonic() - started)
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # transformers asks only after another step
            with self._stopping.steps():
                super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        none_taken = self.state.global_step == self._globalstep_last_logged
        with self._stopping.step_end():
            if self.control.should_log and none_taken and self._finite.has_news:
                self.log(self._finite.numbers())  # there are no means since the last line
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _catch_up(self) -> None:
        """Measure and save what was left to do after the step that a run goes on from."""
        came, control = self._from, self.control
        self._load_rng_state(str(self._whole))
        control.should_evaluate, control.should_save = True, came.save_due
        try:
            super()._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, 0, None, time.time())
        finally:
            control.should_evaluate = control.should_save = False

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers', over the parts of a micro-batch."""
        return sum(super(DistillationTrainer, self).floating_point_ops(part) for part in inputs.get("parts", [inputs]))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        for part in inputs.get("parts", [inputs]):
            super()._track_num_input_tokens({"attention_mask": torch.ones_like(part["input_ids"])} | part)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of the next step; answers are written first where they are due."""
        self._finite.step_begins()
        self._memory.step_begins()
        if self._uses_teacher and isinstance(self.teacher, ServedTeacher):
            self._stopping.remember()
        if self._on_policy is None:
            samples = super().get_batch_samples(epoch_iterator, num_batches, device)
            self._ask_ahead(samples[0], self._batches_of(self.state.global_step + 1))
            return samples
        for _ in range(num_batches):
            next(epoch_iterator)
        with self._finite.answers():
            batches, num_tokens = self._on_policy.micro_batches(self.state.global_step)
        self.num_tokens_seen += num_tokens
        self._row_ids = [row_id for batch in batches for part in batch["parts"] for row_id in part["row_ids"]]
        self._ask_ahead([part for batch in batches for part in batch["parts"]])
        return batches, torch.tensor(num_tokens, device=device)

    def _ask_ahead(self, *steps: Iterable[dict[str, Any]]) -> None:
        """Let the server of a served teacher work on whole steps: this one's rows, and the next one's beside it."""
        if self._uses_teacher and isinstance(self.teacher, ServedTeacher):
            for batches in steps:
                self.teacher.prepare(questions_in(batches))

    def _batches_of(self, step: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of this process in a step, as they were planned; none after the last."""
        args = self.args
        parts = args.gradient_accumulation_steps * args.world_size
        data: Any = self.train_dataset
        if step < self.state.max_steps:
            for place in range(step * parts + args.process_index, (step + 1) * parts, args.world_size):
                yield self.data_collator([data[place]])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = self._finite.clip(model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            grad_norm = self._finite.clip(model, torch.inf)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm if self._finite.is_taken(norm) else None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        # Labels are aligned here: every one that is not ignored counts, the first column too.
        if not batch_samples:
            return None
        own = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batch_samples]
        of_all = self.accelerator.gather(torch.tensor([own], device=device)) if self.args.world_size > 1 else [own]
        counts = [int(count) for micro_step in zip(*of_all, strict=True) for count in micro_step]  # as the step was cut
        for number, batch in enumerate(batch_samples):
            first = sum(counts[: number * self.args.world_size + self.args.process_index])
            batch["places"] = torch.arange(first, first + own[number])
        self.num_tokens_seen += sum(counts)
        self._row_ids = [row_id for batch in batch_samples for row_id in batch["row_ids"]]
        return torch.tensor(sum(counts), device=device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; an optimiser that is not installed is a DrklError."""
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ImportError, ValueError) as error:
            raise DrklError(f"optim is {self.args.optim!r}: {' '.join(str(error).split())}") from error

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the held-out loss and its statistics; every mean is over all response tokens.

        Args:
            eval_dataset: held-out rows as the trainer takes them; None is the trainer's own.
            ignore_keys: has no effect.
            metric_key_prefix: what the names of the numbers begin with; in the log ``other_`` stands before that of
                an ``eval_dataset`` given here.

        Raises:
            DrklError: there are no held-out rows, or the loss is not finite.
        """
        measures = self._measures
        if eval_dataset is not None:
            rows = self.pair.rows_of(eval_dataset)
            measures = make_measures(rows, self.pair, self.config, self.run)
        if measures is None:
            raise DrklError("There are no held-out rows; pass eval_dataset to the trainer, or here.")
        own = eval_dataset is None
        values = self._measure(measures, keep=own and metric_key_prefix == "eval")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        # In the log, ``eval_`` are the run's own held-out rows, by which its curves and its warnings go.
        self.log(metrics if own else {f"{OTHER_ROWS}{name}": value for name, value in metrics.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, measures: Measures | HeldOutAnswers, *, keep: bool) -> dict[str, float]:
        model: Any = self.student
        training = model.training
        model.eval()
        self._rest_optimizer()
        step = self.state.global_step
        keep = keep and self.is_world_process_zero()
        try:
            with self._finite.answers():
                return measures.evaluate(model, self.objective, self.loss_config, step=step, keep=keep)
        except NonFiniteLoss as error:
            raise self._finite.at_heldout_rows(error.fault, error.rows) from error
        finally:
            model.train(training)

    def _rest_optimizer(self) -> None:
        """Have the weights be those that are meant: a schedule-free optimiser trains at others, and says so itself."""
        if callable(rest := getattr(self.optimizer, "eval", None)):
            rest()

    def _log_first_answers(self, answers: HeldOutAnswers) -> None:
        """Log what the student writes before its first step."""
        self.log({f"eval_{name}": value for name, value in self._measure(answers, keep=True).items()})

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: `drkl.evaluate` measures a student, on held-out rows and on what it writes."""
        raise DrklError("A DistillationTrainer makes no predictions; drkl.evaluate(student, teacher, rows) measures.")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what `compute_loss` gathered since the last training line."""
        if "loss" in logs:
            logs |= means_of(self._sums_of_all())
            now, fed = time.monotonic(), self._feeding.of_all()
            logs["tokens_per_second"] = (fed.tokens - self._feeding.before.tokens) / max(now - self._since, 1e-9)
            logs["num_tokens"] = self.num_tokens_seen
            logs |= self._finite.numbers()
            logs |= fed.shares() | (self._on_policy.numbers() if self._on_policy is not None else {})
            logs |= self._streamed.numbers(self.state.global_step) if self._streamed is not None else {}
            self._feeding.begin(Fed())
            self._sums, self._since = {}, now
        # Not since `start_time`: transformers' rates go by the clock of the wall, which may jump.
        super().log(logs)

    def check_inputs(self, then: Mapping[str, Any]) -> None:
        """Refuse to go on with a run that began with other inputs; every process has to call it.

        Args:
            then: the ``inputs`` that a checkpoint, or env.json, has of that run.

        Raises:
            InputsChanged: they are others, each with what it was and what it is.
        """
        now = self._describe_inputs()
        first_alone(lambda: check_inputs(then, now, self.run, self.pair.student))

    def _describe_inputs(self) -> dict[str, Any]:
        """What the run is trained on, and how, before its first step."""
        if self._inputs is None:
            config = self.record.settled(self.args.max_steps)
            self._inputs = describe_inputs(self.pair, self.config, config, self.record.optimizers)
        return self._inputs

    def _settle_inputs(self, checkpoint: Path | None) -> None:
        """Refuse other inputs than those of the checkpoint that a run goes on from; of one that begins keep them."""
        if checkpoint is None:
            self._inputs = None  # trained before, the student has other weights
            begins_anew(self.record.earlier, self._describe_inputs(), self.run, self.pair.student)
        else:
            self.check_inputs(self._from.inputs)
            plan = plan_digest(self._steps[: self._from.step])
            if self._streamed is None and self._from.plan not in (None, plan):  # a stream compares the rows themselves
                raise changed(self.run.root, [f"the rows of the steps up to {checkpoint.name}: others"])
        self.record.inputs = self._describe_inputs() | self._from.inputs

    def _sums_of_all(self) -> dict[str, float]:
        """The sums of all processes: rows are dealt out by length, so that those of one are no sample."""
        sums: Counter[str] = Counter()
        for part in gather([self._sums]):
            sums.update(part)
        return dict(sums)

    def _go_on(self) -> None:
        self._settle_best(read=True)
        # transformers forgets the steps between the last line of the log and the checkpoint.
        came = self._from
        self._globalstep_last_logged = came.step if came.logged_step is None else came.logged_step
        self._tr_loss += came.loss_sum(self.args.process_index, self.args.world_size)
        if came.evaluation_due:
            self._catch_up()

    def on_progress(self, hook: OnProgress) -> None:
        """Call ``hook(steps done, steps in all, newest numbers)`` after every step."""
        self._train_log.on_progress = hook
        if self._on_policy is not None:
            self._on_policy.on_writing(lambda done, of: self._train_log.writing(self.state, done, of))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Only a step that is also saved can be the best that is kept.
        saved = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        return saved and super()._determine_best_metric(metrics, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # By the names of the model in memory, as transformers' loop reads them back; by those of a family's files it
        # would find no experts, and go on with the weights that are there.
        student: Any = self.student
        if self._sharded_by_caller:
            state_dict = whole_state(student, keep=self.args.should_save)
        if self.args.should_save:
            student.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded_by_caller:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir), writes=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with readable(resume_from_checkpoint, "weights"):
            if self._sharded_by_caller:
                self._issue_warnings_after_load(load_whole(self.student, weights_in(resume_from_checkpoint)))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            check_numbers(self.student, "The student in it")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(str(checkpoint), "optimiser's state"):
            if self._sharded_by_caller and checkpoint is not None:
                load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and (broken := state_faults(self.optimizer, self.student)):
                raise DrklError(f"its numbers are not finite ({listed(broken)})")

    def _load_scaler(self, checkpoint: str | None) -> None:
        with readable(str(checkpoint), "loss scale"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(str(checkpoint), "random state"):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(staging(self.run.checkpoints_path))  # of a checkpoint that is being written

    def _settle_best(self, *, read: bool = False, ended: bool = False) -> None:
        """Have the state speak of the best checkpoint that is there; its path is that of another time and place."""
        state, folder = self.state, self.run.checkpoints_path
        state.best_model_checkpoint = None
        if state.best_global_step is not None:
            best = first_alone(lambda: find_best(folder, state, read=read, ended=ended, whole=self._whole))
            state.best_global_step, state.best_metric = best.step, best.loss
            state.best_model_checkpoint = None if best.path is None else str(best.path)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._whole = None  # it was so long ago
        self._settle_best(read=True, ended=True)
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        if self._sharded_by_caller:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            with readable(str(self.state.best_model_checkpoint), "weights"):
                super()._load_best_model()
                check_numbers(self.student, "The student in it")
        self._student_step = self.state.best_global_step

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that is not this student's; transformers only warns, of tied weights too."""
        student = self.student
        missing, foreign = not_loaded(student, set(load_result.missing_keys)), load_result.unexpected_keys
        if missing or foreign:
            parts = [f"{len(missing)} of its weights are missing ({listed(missing)})"] if missing else []
            parts += [f"{len(foreign)} are not its own ({listed(foreign)})"] if foreign else []
            raise DrklError(f"they are not those of the student, a {type(student).__name__}: {'; '.join(parts)}.")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._finite.check_weights(optimizer=True)
        folder = staging(self.run.checkpoints_path) / f"checkpoint-{self.state.global_step}"
        self._rest_optimizer()
        what, then = f"the checkpoint of step {self.state.global_step}", "resume the run: earlier checkpoints are kept"
        try:
            with writing(folder, what=what, then=then), plain_errors():
                check_there(self.run)  # transformers would make it again, with nothing of the run in it
                super()._save_checkpoint(model, trial)
                losses = tuple(gather([float(self._tr_loss)]))  # and every process has written its part
                fed = self._feeding.of_all()
                first_alone(lambda: self._complete(folder, losses, fed))
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, RuntimeError) and not lost_another(error):  # of a way of sharding, for instance
                raise DrklError(f"Cannot make {what}: {' '.join(str(error).split())[:500]}") from error
            raise
        self._stopping.saved()
        self._settle_best()

    def _complete(self, written: Path, losses: tuple[float, ...], fed: Fed) -> None:
        """Make a checkpoint count, and remove old ones. Called in one process."""
        state = self.state
        step = state.global_step
        state.best_model_checkpoint = None
        state.save_to_json(str(written / "trainer_state.json"))  # where it lies is found out when it is read
        if self._on_policy is not None:
            self._on_policy.save(written)
        if self._streamed is not None:
            self._streamed.save(written)
        plan = plan_digest(self._steps[:step])
        tokens, logged, finite = self.num_tokens_seen, self._globalstep_last_logged, self._finite
        texts = texts_digest(self.run.rollouts_path, step)
        reached = Reached(
            step, tokens, logged, losses, plan, fed, self.record.inputs, finite.skipped, finite.in_row, texts=texts
        )
        mark_complete(written, self._stopping.marked(reached))
        self._train_log.sync()
        place(written)
        if self._keep_checkpoints:
            rotate(self.run.checkpoints_path, self._keep_checkpoints, state.best_global_step, step)
