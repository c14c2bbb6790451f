"""The student: two small embeddings and a small tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.movielens.data import ITEMS, USERS

MEAN = 3.53


class TwoTower(nn.Module):
    """Rates a film from a user's and a film's vector, their product, and their biases; `tower` is the hidden state."""

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS + 1, dim), nn.Embedding(ITEMS + 1, dim)
        self.user_bias, self.item_bias = nn.Embedding(USERS + 1, 1), nn.Embedding(ITEMS + 1, 1)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)
        self.tower = nn.Sequential(nn.Dropout(dropout), nn.Linear(3 * dim + 2, width), nn.ReLU())
        self.head = nn.Linear(width, 1)
        nn.init.constant_(self.head.bias, MEAN)

    def forward(self, user_id: Tensor, item_id: Tensor) -> Tensor:
        """Return the rating, (B,), of users and films, (B,) int64."""
        user, item = self.user(user_id), self.item(item_id)
        pair = torch.cat([user, item, user * item, self.user_bias(user_id), self.item_bias(item_id)], dim=1)
        return self.head(self.tower(pair)).squeeze(-1)


def two_tower(dim: int = 8, width: int = 32, dropout: float = 0.1) -> TwoTower:
    """Build the student."""
    return TwoTower(dim, width, dropout)
