"""What a run is trained on and how, as it is kept beside a checkpoint, and what of it is another when it goes on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn

from drkl._version import __version__
from drkl.data.digest import digest_rows
from drkl.data.rendering import CHAT_NAMED
from drkl.models.fingerprint import describe_model, tokenizer_fingerprint
from drkl.models.load import words_of
from drkl.models.sharded import is_sharded
from drkl.processes import first_alone, gather, joined
from drkl.runs import RunFolder
from drkl.teachers.cached import TeacherCache
from drkl.teachers.served import ServedTeacher
from drkl.training.arguments import DistillationConfig
from drkl.training.pair import Pair
from drkl.training.plan import step_size
from drkl.training.settings import BEST, ROWS_PER_STEP, changed, changes, counted

_SAME_NUMBER = "as many as before, with other content or in another order"
_log = logging.getLogger("drkl")
_begun: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""The first weights of each student in memory, in every training that began with it."""


def describe_inputs(
    pair: Pair, args: DistillationConfig, config: Mapping[str, Any], optimizers: tuple[Any, Any] = (None, None)
) -> dict[str, Any]:
    """Describe all that moves a number of a run, as json has it; every process has to call it.

    Weights, texts and rows are known by hashes of their content, wherever they lie.

    Args:
        pair: models and rows, before the first step.
        args: how to train.
        config: the sections of the run's config.yaml, every value settled.
        optimizers: the optimiser and the schedule that were passed as objects.
    """
    models = _describe_models(pair)
    described = first_alone(lambda: _describe(pair, args, config, optimizers))
    return json.loads(json.dumps(described | models)) | {"machine": _machine(pair, args)}


def _describe_models(pair: Pair) -> dict[str, Any]:
    """The student before its first step, and the teacher; in one process alone where each has them whole."""
    teacher = pair.teacher
    live = None if teacher is None or isinstance(teacher, (TeacherCache, ServedTeacher)) else teacher.model
    together = is_sharded(pair.student) or (live is not None and is_sharded(live))
    keep = joined().is_first

    def describe() -> dict[str, Any]:
        what = _describe_stored(teacher) if live is None else {"kind": "a model"} | describe_model(live, keep=keep)
        return {"student": describe_model(pair.student, keep=keep), "teacher": what}

    return gather([describe()])[0] if together else first_alone(describe)


def _describe_stored(teacher: Any) -> dict[str, Any] | None:
    """A teacher whose weights are not here."""
    if isinstance(teacher, TeacherCache):
        # Not by its files: a cache that is filled has more of them.
        facts = {"kind": "a cache", "weights": teacher.manifest["teacher"]["fingerprint"]}
        return facts | {"config": json.dumps(teacher.stored.described(), sort_keys=True)}
    if isinstance(teacher, ServedTeacher):
        root = teacher.served.root.rstrip("/").rpartition("/")[2]  # where the server has it
        return {"kind": "a server", "weights": f"{teacher.name} {root}", "config": None}
    return None


def _describe(
    pair: Pair, args: DistillationConfig, config: Mapping[str, Any], optimizers: tuple[Any, Any]
) -> dict[str, Any]:
    chooses = bool(pair.eval_rows) and bool(args.load_best_model_at_end or args.early_stop_patience)
    found = counted(config, chooses_best=chooses)
    settings = found["settings"]
    settings[BEST] = bool(pair.eval_rows) and bool(args.load_best_model_at_end)
    settings[ROWS_PER_STEP] = step_size(args, args.world_size)["rows_per_step"]
    if args.per_device_eval_batch_size and chooses:
        found["best"]["training.arguments.per_device_eval_batch_size"] = args.per_device_eval_batch_size
    for name, value in getattr(optimizers[0], "defaults", {}).items():
        if value is None or isinstance(value, (bool, int, float, str, list, tuple)):
            settings[f"optimizers: {name} of the optimiser"] = value
    ids = args.rollouts.is_on  # they draw what is sampled
    rows = {} if pair.stream is not None else {"training rows": digest_rows(pair.rows, ids=ids)}
    return found | {
        "rows": rows | {"held-out rows": digest_rows(pair.eval_rows) if pair.eval_rows else None},
        "texts": _describe_texts(pair, args),
    }


def _describe_texts(pair: Pair, args: DistillationConfig) -> dict[str, Any]:
    """Hashes of the tokenizers, of the template in effect, and the ids that end an answer."""
    own = None if pair.teacher_tokenizer is None else words_of(pair.teacher_tokenizer)
    readers = {"the tokenizer": pair.words, "the teacher's own tokenizer": own}
    found: dict[str, Any] = {
        name: None if reader is None else tokenizer_fingerprint(reader) for name, reader in readers.items()
    }
    if pair.classes is None:
        templates = [getattr(reader, "chat_template", None) for reader in readers.values()]
        is_chat = args.template in ("auto", "chat") or args.template.startswith(CHAT_NAMED)
        named = "alpaca" if args.template == "auto" else args.template  # of a tokenizer without a chat template
        texts = [(is_chat and template) or named for template in templates]
        found["the template"] = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    else:
        found["the classes"] = list(pair.classes)
    return found | {"the tokens that end an answer": sorted(set(pair.listed_ends))}


def _machine(pair: Pair, args: DistillationConfig) -> dict[str, Any]:
    """What moves the last digits alone."""
    return {
        "drkl": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": args.device.type,
        "threads": torch.get_num_threads(),
        "processes": args.world_size,
        "batches without padding": pair.packed,
    }


def check_inputs(then: Mapping[str, Any], now: Mapping[str, Any], run: RunFolder, student: nn.Module) -> None:
    """Raise `InputsChanged` where a run goes on with other inputs than it began with; what moves last digits is told.

    Args:
        then: `describe_inputs` of the run as it began.
        now: the same of the run as it is to go on.
        run: its folder.
        student: the student in memory. One whose training began with the inputs of ``then`` is the right one, whatever
            its weights are now.
    """
    if then.get("student") in _begun.get(student, []):
        now = {**now, "student": then["student"]}
    if found := list(differences(then, now)):
        raise changed(run.root, found)
    small = [*changes(then["machine"], now["machine"]), *changes(then["divides"], now["divides"])]
    if small:
        _log.warning(
            "Note: the run goes on with %s. Its steps are the same up to rounding, and to the draws of a dropout.",
            "; ".join(small),
        )


def begins_anew(then: Mapping[str, Any] | None, now: Mapping[str, Any], run: RunFolder, student: nn.Module) -> None:
    """Note that a training begins with these inputs, whatever a run without a checkpoint began with before.

    Args:
        then: `describe_inputs` of that run; None where there is none, or it was not kept.
        now: the same of the run that begins.
        run: its folder.
        student: the student in memory.
    """
    _begun.setdefault(student, []).append(now["student"])
    found = list(differences(then, now)) if then else []
    if found and joined().is_first:
        _log.warning(
            "Note: the run in %r has no checkpoint, so it begins anew, with what was changed: %s.",
            str(run.root), "; ".join(found),
        )  # fmt: skip


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is another in the inputs of a run, each with what it was and what it is."""
    content = list(_of_content(then, now))
    yield from content
    if content:  # without an effect they may change
        yield from changes(then["content"], now["content"])
    yield from changes(then["settings"], now["settings"])
    if then["best"] and now["best"]:
        yield from changes(then["best"], now["best"])


def _of_content(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, rows in then["rows"].items():
        if told := _told_rows(rows, now["rows"].get(name)):
            yield f"{name}: {told}"
    for name, value in then["texts"].items():
        if now["texts"].get(name) != value:
            yield f"{name}: another"
    versions = [described["machine"]["transformers"] for described in (then, now)]
    for name, of in (("the teacher", "teacher"), ("the student", "student")):
        yield from _of_model(name, then[of], now[of], same_library=versions[0] == versions[1])


def _told_rows(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str | None:
    """What is another in rows; None where nothing is."""
    before, after = (0 if rows is None else rows["rows"] for rows in (then, now))
    if before != after:
        return f"{before:,} then, {after:,} now"
    if then is None or now is None or then["digest"] != now["digest"]:
        return _SAME_NUMBER if before else None
    return "other ids" if None not in (then["ids"], now["ids"]) and then["ids"] != now["ids"] else None


def _of_model(name: str, then: Any, now: Any, *, same_library: bool) -> Iterator[str]:
    kinds = [None if described is None else described.get("kind") for described in (then, now)]
    if kinds[0] != kinds[1]:
        yield f"{name}: {kinds[0] or 'none'} then, {kinds[1] or 'none'} now"
    elif then is not None:
        if then["weights"] != now["weights"]:
            yield f"{name}: other weights" + (" before its first step" if name == "the student" else "")
        if then["config"] != now["config"] and same_library:  # another version may have other fields
            yield f"{name}: another config"
