"""Students for the digits: a multilayer perceptron on the pixels."""

from __future__ import annotations

from torch import Tensor, nn


class Mlp(nn.Module):
    """Two hidden layers; `body` gives the hidden state (batch, width), `head` the logits (batch, 10)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits, (B, 10)."""
        logits: Tensor = self.head(self.body(image))
        return logits


def mlp(width: int = 32) -> Mlp:
    """Return the untrained student."""
    return Mlp(width)
