"""The gate: how much each teacher is worth to the student, sample by sample.

It reads the student's hidden state and the teacher's embedding only, so that the worth of a teacher is known before
the teacher is run (DESIGN: relevance and skipping).

Shape legend: B rows, K teachers, d student width, e teacher embedding width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def present_softmax(scores_BK: Tensor, present_BK: Tensor) -> Tensor:
    """Return the softmax over the present teachers of each row; a row without any gets zeros.

    Args:
        scores_BK: (B, K) finite scores.
        present_BK: (B, K) bool.

    Returns:
        (B, K); a row sums to 1, or to 0 where no teacher is present.
    """
    # The lowest finite number instead of -inf: exp still gives 0 beside any present teacher, and a row of nothing but
    # absent ones stays finite, forwards and backwards, until its zeros are put in.
    masked_BK = scores_BK.masked_fill(~present_BK, torch.finfo(scores_BK.dtype).min)
    return F.softmax(masked_BK, dim=1).masked_fill(~present_BK, 0.0)


@final
class Gate(nn.Module):
    """g = softmax_i( e_i · W_g h / √e + b_i ).

    Args:
        student_dim: d.
        teacher_dim: e, the width of the teachers' embeddings.
        bias: K initial values of b, such as the logarithms of static stacking weights.
    """

    def __init__(self, student_dim: int, teacher_dim: int, bias: Sequence[float]) -> None:
        super().__init__()
        self.interest = nn.Linear(student_dim, teacher_dim, bias=False)  # b_i already shifts each teacher's score
        # From zero, so that the gate starts at softmax(b) whatever the scale of h, and moves only where labels say so.
        nn.init.zeros_(self.interest.weight)
        self.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float32))

    def forward(self, hidden_Bd: Tensor, teachers_Ke: Tensor, present_BK: Tensor) -> Tensor:
        """Return the weights (B, K) of the present teachers."""
        scores_BK = self.interest(hidden_Bd) @ teachers_Ke.T / math.sqrt(teachers_Ke.shape[1]) + self.bias
        return present_softmax(scores_BK, present_BK)


@final
class UniformGate(nn.Module):
    """The ablation: every present teacher is worth the same."""

    def forward(self, hidden_Bd: Tensor, teachers_Ke: Tensor, present_BK: Tensor) -> Tensor:
        """Return the weights (B, K) of the present teachers."""
        return present_softmax(hidden_Bd.new_zeros(len(hidden_Bd), len(teachers_Ke)), present_BK)
