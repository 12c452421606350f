"""What teaches: a model that runs beside the student, its states from a cache, or a server that has it."""

from __future__ import annotations

from drkl.teachers.cached import TeacherCache
from drkl.teachers.live import LiveTeacher
from drkl.teachers.served import ServedTeacher

Teacher = LiveTeacher | TeacherCache | ServedTeacher
