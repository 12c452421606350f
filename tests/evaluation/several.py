"""Started by test_several in one process, or in every process of a group: what each of them finds, written to files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

import drkl
from drkl.errors import DrklError
from drkl.processes import join_launched
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs
from tests.training.test_python import ROWS, TOKENIZER, config

SETTINGS: dict[str, Any] = {
    "prompts": 7, "samples_per_prompt": 3, "max_new_tokens": 5, "sweep": (0.5, 1.0), "seeds": (1, 2), "batch_size": 4,
}  # fmt: skip
FEW = ROWS[:1]


def texts(count: int) -> list[dict[str, str]]:
    names = tiny_classifiers.CLASSES
    return [
        {"text": " ".join(f"w{(i + j) % 20}" for j in range(1 + i % 7)), "label": names[i % 3]} for i in range(count)
    ]


class Cases:
    """Each method is a case; ``folder`` is this number of processes', ``inputs`` everybody's."""

    def __init__(self, folder: Path, inputs: Path) -> None:
        self.folder, self.inputs = folder, inputs
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.many = distributed.is_initialized()

    def evaluate(self, name: str, student: Any, teacher: Any, rows: Any, *args: Any, **words: Any) -> Any:
        return drkl.evaluate(student, teacher, rows, *args, output_dir=self.folder / name, name=name, **words).to_json()

    def rows(self) -> Any:
        student, teacher = tiny.llama(1, layers=2), tiny.llama(9)
        return self.evaluate("rows", student, teacher, self.inputs / "rows.jsonl", TOKENIZER, **SETTINGS)

    def again(self) -> Any:
        """The teacher's states and answers are those that `rows` kept."""
        student, teacher = tiny.llama(2, layers=2), tiny.llama(9)
        return self.evaluate("again", student, teacher, self.inputs / "rows.jsonl", TOKENIZER, **SETTINGS)

    def few(self) -> Any:
        return self.evaluate("few", tiny.gpt2(1, layers=2), tiny.gpt2(2), FEW, TOKENIZER, **SETTINGS | {"prompts": 1})

    def alone(self) -> Any:
        """Without a teacher, and nothing is written."""
        return drkl.evaluate(tiny.llama(1), None, ROWS, TOKENIZER, **SETTINGS).to_json()

    def encoder_decoder(self) -> Any:
        return self.evaluate("t5", tiny.t5(1, layers=2), tiny.t5(2), self.inputs / "rows.jsonl", TOKENIZER, **SETTINGS)

    def suites(self) -> Any:
        where = self.inputs / "rows.jsonl"
        words: dict[str, Any] = {"suites": (f"dolly={where}", f"vicuna={where}"), "protocol": "minillm", "max_rows": 9}
        return self.evaluate(
            "suites", tiny.llama(1), tiny.llama(9), None, TOKENIZER, **words, max_new_tokens=3, max_prompt_tokens=90
        )

    def classifier(self) -> Any:
        models = (tiny_classifiers.make("bert", seed) for seed in (1, 2))
        return self.evaluate("classifier", *models, texts(300), tiny_classifiers.tokenizer())

    def cached(self) -> Any:
        student, cache = tiny.llama(1, layers=2), drkl.TeacherCache.open(self.inputs / "cache")
        return self.evaluate("cached", student, cache, ROWS, TOKENIZER, **SETTINGS)

    def analysis(self) -> Any:
        made = drkl.analyze(
            tiny.llama(1, layers=2), tiny.llama(9), self.inputs / "rows.jsonl", TOKENIZER, positions=200,
            objectives=["rkl", "drkl", "fkl", "ce"], output_dir=self.folder / "analysis",
        )  # fmt: skip
        return made.to_json()

    def analysis_of_few(self) -> Any:
        made = drkl.analyze(tiny.llama(1), tiny.llama(9), FEW, TOKENIZER, objectives=["rkl"])
        return made.to_json() | {"positions": {name: values.tolist() for name, values in made.positions.items()}}

    def probe(self) -> Any:
        made = drkl.probe_top_k(
            tiny.llama(9), self.inputs / "rows.jsonl", model=tiny.llama(1, layers=2), args=config(self.folder),
            processing_class=TOKENIZER, k=[2, 4], positions=700,
        )  # fmt: skip
        return made.to_json()

    def goes_on(self) -> Any:
        """An evaluation that ends in the middle, and another one."""

        def stop(what: str, done: int, of: int) -> None:
            if what.startswith("student: sampling") and self.rank == 0 and done > of / 2:
                raise DrklError("stopped")

        student, teacher, given = tiny.llama(3), tiny.llama(9), (self.inputs / "rows.jsonl", TOKENIZER)
        said = self.refused(lambda: self.evaluate("goes on", student, teacher, *given, on_progress=stop, **SETTINGS))
        kept = sorted(path.suffix for path in (self.folder / "goes on" / ".evaluation").iterdir())
        assert said == "stopped" and kept.count(".safetensors") == 1 and ".jsonl" in kept, (said, kept)
        return self.evaluate("goes on", student, teacher, *given, **SETTINGS)

    @staticmethod
    def refused(work: Callable[[], Any]) -> str:
        try:
            work()
        except Exception as error:
            return str(error)
        raise AssertionError("nothing was refused")

    # Of several processes alone; what each of them says is returned.

    def other_rows(self) -> Any:
        some = ROWS[self.rank :]
        return self.refused(lambda: drkl.evaluate(tiny.llama(1), None, some, TOKENIZER, **SETTINGS))

    def other_weights(self) -> Any:
        model = tiny.llama(self.rank)
        return self.refused(lambda: drkl.analyze(model, tiny.llama(9), ROWS, TOKENIZER, objectives=["rkl"]))

    def one_fails(self) -> Any:
        return self.failing(ValueError("no reason"))

    def one_is_out_of_memory(self) -> Any:
        return self.failing(MemoryError("no room"))

    def failing(self, error: Exception) -> Any:
        def fail(what: str, done: int, of: int) -> None:
            if self.rank == 1 and what.startswith("student: reading"):
                raise error

        return self.refused(lambda: drkl.evaluate(tiny.llama(1), None, ROWS, TOKENIZER, on_progress=fail, **SETTINGS))

    def one_has_no_file(self) -> Any:
        path = self.inputs / ("rows.jsonl" if self.rank == 0 else "nothing.jsonl")
        return self.refused(lambda: drkl.evaluate(tiny.llama(1), None, path, TOKENIZER, **SETTINGS))

    def sharded(self) -> Any:
        model: Any = fully_shard(tiny.llama(1))
        return self.refused(lambda: drkl.evaluate(model, None, ROWS, TOKENIZER, **SETTINGS))


ALL = [
    "rows", "again", "few", "alone", "encoder_decoder", "suites", "classifier", "cached", "analysis",
    "analysis_of_few", "probe", "goes_on",
]  # fmt: skip
REFUSED = ["other_rows", "other_weights", "one_fails", "one_is_out_of_memory", "one_has_no_file", "sharded"]


def write_inputs(folder: Path) -> None:
    """What every number of processes reads."""
    folder.mkdir()
    tiny_runs.write_rows(folder / "rows.jsonl", 300)
    student, teacher = tiny.llama(1, layers=2), tiny.llama(9)
    drkl.cache_teacher(
        teacher, ROWS, model=student, args=config(folder), output_dir=folder / "cache", processing_class=TOKENIZER
    )


def main(folder: Path, inputs: Path) -> None:
    """Write what this process finds in each case to a file of its own."""
    join_launched()
    cases = Cases(folder, inputs)
    for name in ALL + (REFUSED if cases.many else []):
        found = getattr(cases, name)()
        (folder / f"{name}-{cases.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["DRKL_CACHE"] = str(Path(sys.argv[1]) / "shared")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
