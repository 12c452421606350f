"""One run, fully described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drkl.data.config import DataConfig, TokenizerConfig
from drkl.losses.config import LossConfig
from drkl.models.config import PeftConfig, StudentConfig
from drkl.objectives.config import ObjectiveConfig
from drkl.runs import RunFolder
from drkl.teachers.config import TeacherConfig
from drkl.training.config import RunConfig, TrainingConfig


@dataclass(frozen=True)
class RunSpec:
    """Everything one run needs; its ``resolved`` mapping is what ``config.yaml`` holds."""

    folder: RunFolder
    run: RunConfig
    teacher: TeacherConfig | None
    student: StudentConfig
    data: DataConfig
    objective: ObjectiveConfig
    loss: LossConfig
    training: TrainingConfig
    resolved: dict[str, Any]
    peft: PeftConfig | None = None
    task: str = "generation"
    tokenizer: TokenizerConfig | None = None
    """How to make the tokenizer, in the first of several stages; None where a model brings one."""

    @property
    def classifies(self) -> bool:
        """Whether the models give texts a class."""
        return self.task == "classification"

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss reads the teacher; its KLs are reported on held-out rows wherever there is one."""
        return self.loss.kd_weight > 0 and self.objective.make().needs_teacher
