"""Distillation: what supervises a student, given its state and the teachers' cached features. Knows only torch."""

from ddcache.distill.average import Average
from ddcache.distill.base import Batch, Distiller, StudentState, TapSpec, Task, TeacherSpec
from ddcache.distill.diverse import DiverseDistill
from ddcache.distill.kd import KnowledgeDistillation
from ddcache.distill.methods import METHODS, build_distiller, check_settings, parse_method
from ddcache.distill.none import NoDistillation

__all__ = [
    "METHODS",
    "Average",
    "Batch",
    "Distiller",
    "DiverseDistill",
    "KnowledgeDistillation",
    "NoDistillation",
    "StudentState",
    "TapSpec",
    "Task",
    "TeacherSpec",
    "build_distiller",
    "check_settings",
    "parse_method",
]
