"""Knowledge distillation from one teacher's outputs."""

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from ddcache.distill.base import (
    Batch,
    Distiller,
    StudentState,
    Task,
    TeacherSpec,
    as_output,
    presence,
    require_outputs,
    rows_of,
    stack_outputs,
)
from ddcache.distill.losses import weighted_divergence
from ddcache.errors import ConfigError


@final
class KnowledgeDistillation(Distiller):
    """`kd:<teacher>`: match the teacher's output beside the labels.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2:
    T² KL(teacher || student) at temperature T. For a regression, the squared error to the teacher's prediction.

    Args:
        student_dim: d, unused.
        teachers: exactly the one teacher, which must have an output.
        task: what the student learns.
        output_weight: of the teacher's term, on the train and transfer parts; the task term has weight 1.
    """

    splits = ("transfer",)
    takes_teacher = True

    def __init__(
        self, student_dim: int, teachers: Sequence[TeacherSpec], task: Task, *, output_weight: float = 4.0
    ) -> None:
        super().__init__(student_dim, teachers, task)
        require_outputs("kd", teachers)
        if len(teachers) != 1:
            raise ConfigError(
                f"kd: expected one teacher, found {[t.name for t in teachers]}; use 'average' for several"
            )
        self.output_weight = output_weight

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """The teacher's output."""
        return {teacher.name: (teacher.output,) for teacher in self.teachers if teacher.output is not None}

    def terms(self, state: StudentState, batch: Batch) -> dict[str, Tensor]:
        """Return `task` and `output`."""
        output_Bx = as_output(state.output, self.task.kind)
        divergence = weighted_divergence(
            output_Bx.unsqueeze(1),
            stack_outputs(self.teachers, batch, output_Bx, self.task.kind),
            presence(self.teachers, batch).float(),
            rows_of(state, batch, "train", "transfer"),
            self.task.kind,
            self.task.temperature,
        )
        return {"task": self.task_term(state, batch), "output": self.output_weight * divergence}
