"""Questions: what a student in a given state asks each of its teachers.

Shape legend: B rows, K teachers, M questions to each, d student width, e teacher embedding width, a answer width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


@final
class Questions(nn.Module):
    """q_i = W_q( MLP(h) ⊙ W_e e_i ), split into M questions (DiverseDistill, arXiv 2402.14035).

    Args:
        student_dim: d.
        teacher_dim: e, the width of the teachers' embeddings.
        questions: M.
        answer_dim: a, the width of a question.
    """

    def __init__(self, student_dim: int, teacher_dim: int, questions: int, answer_dim: int) -> None:
        super().__init__()
        width = questions * answer_dim
        self.answer_dim = answer_dim
        self.interest = nn.Sequential(nn.Linear(student_dim, width), nn.GELU(), nn.Linear(width, width))
        self.manner = nn.Linear(teacher_dim, width)
        self.question = nn.Linear(width, width)

    def forward(self, hidden_Bd: Tensor, teachers_Ke: Tensor) -> Tensor:
        """Return the questions (B, K, M, a) of hidden states to teachers with these embeddings."""
        asked_BKw = self.interest(hidden_Bd).unsqueeze(1) * self.manner(teachers_Ke)
        questions_BKMa: Tensor = self.question(asked_BKw).unflatten(-1, (-1, self.answer_dim))
        return questions_BKMa
