"""What teaches: a model that runs beside the student, or its states from a cache."""

from __future__ import annotations

from drkl.teachers.cached import TeacherCache
from drkl.teachers.live import LiveTeacher

Teacher = LiveTeacher | TeacherCache
