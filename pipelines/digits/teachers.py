"""Three frozen teachers of the digits, of different architectures, and `prepare`, which trains them once.

Shape legend: B batch, T tokens, D width, C channels.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddcache import Source, TeacherError
from pipelines import weights as stored

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Return the mixed tokens, (B, T, D)."""
        size, length, width = tokens_BTD.shape
        qkv = self.qkv(self.norm_attention(tokens_BTD)).view(size, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(size, length, width)
        tokens_BTD = tokens_BTD + self.out(mixed)
        result: Tensor = tokens_BTD + self.mlp(tokens_BTD)
        return result


class VisionTransformer(nn.Module):
    """The foundation teacher: a convolutional stem to 16 tokens, transformer blocks, the tokens' mean."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(width),
        )
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits, (B, 10)."""
        tokens_BTD = self.stem(image).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens_BTD)).mean(1))
        return logits


class ConvNet(nn.Module):
    """An expert that sees pixels: four convolutions."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()

        def layer(fan_in: int, fan_out: int) -> list[nn.Module]:
            return [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]

        self.early = nn.Sequential(*layer(1, channels), *layer(channels, channels), nn.MaxPool2d(2))
        self.late = nn.Sequential(*layer(channels, 2 * channels), *layer(2 * channels, 2 * channels), nn.MaxPool2d(2))
        self.embed = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * channels, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits, (B, 10)."""
        logits: Tensor = self.head(self.embed(self.late(self.early(image))))
        return logits


class GradientHistograms(nn.Module):
    """Histograms of oriented gradients (Dalal & Triggs 2005): 8 directions, cells of 4 x 4 and of 2 x 2 pixels."""

    width = 8 * (3 * 3 + 4 * 4)

    def __init__(self) -> None:
        super().__init__()
        sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        self.kernels: Tensor
        self.angles: Tensor
        self.register_buffer("kernels", torch.stack([sobel, sobel.T])[:, None], persistent=False)
        self.register_buffer("angles", torch.arange(8) * (2 * math.pi / 8), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the histograms, (B, width)."""
        dx, dy = F.conv2d(image, self.kernels, padding=1).split(1, dim=1)
        # The gradient's component along each direction, where positive: soft bins, without the jump of an angle at pi.
        along = (dx * self.angles.cos()[:, None, None] + dy * self.angles.sin()[:, None, None]).clamp_min(0)
        cells = [F.avg_pool2d(along, 4, stride=2), F.avg_pool2d(along, 2, stride=2)]
        return torch.cat([F.normalize(cell.flatten(1), dim=1).sqrt() for cell in cells], dim=1) * 4


class HistogramMlp(nn.Module):
    """An expert that sees edges: a perceptron on histograms of gradients."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.histograms = GradientHistograms()
        self.body = nn.Sequential(
            nn.Linear(GradientHistograms.width, width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(0.3),
        )
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits, (B, 10)."""
        logits: Tensor = self.head(self.body(self.histograms(image)))
        return logits


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained: AdamW and one cycle, on randomly turned, scaled and shifted images.

    No label smoothing: it takes from the logits what distillation lives on (Mueller et al. 2019).
    """

    epochs: int
    lr: float
    weight_decay: float = 0.02
    batch_size: int = 32
    degrees: float = 12.0
    scale: float = 0.12
    pixels: float = 0.8


TEACHERS: dict[str, tuple[Callable[[], nn.Module], Recipe]] = {
    "vit": (VisionTransformer, Recipe(epochs=50, lr=1.5e-3, weight_decay=0.1)),
    "convnet": (ConvNet, Recipe(epochs=40, lr=5e-3)),
    "histograms": (HistogramMlp, Recipe(epochs=100, lr=2e-3, degrees=8.0, scale=0.08, pixels=0.5)),
}


def vit(weights: str) -> nn.Module:
    """Return the foundation teacher, 325 thousand parameters."""
    return _load("vit", Path(weights))


def convnet(weights: str) -> nn.Module:
    """Return the expert on pixels, 82 thousand parameters."""
    return _load("convnet", Path(weights))


def histograms(weights: str) -> nn.Module:
    """Return the expert on edges, 120 thousand parameters."""
    return _load("histograms", Path(weights))


def prepare(source: Source, weights: str, seed: int = 0, epochs: int | None = None) -> None:
    """Train the teachers on the labelled rows of `source`, each once: a file that matches is left alone.

    Args:
        source: what teachers may be fitted on; ddcache hands over the train and transfer rows only.
        weights: the folder of `<teacher>.safetensors`.
        seed: of initial weights, order, dropout and distortions.
        epochs: instead of each recipe's own, for a quick try.
    """
    data = {"samples": source.samples.digests(), "inputs": source.digests()}
    for name, (build, recipe) in TEACHERS.items():
        recipe = recipe if epochs is None else replace(recipe, epochs=epochs)
        made_from = stored.digest({**data, "recipe": asdict(recipe), "seed": seed})
        path = Path(weights) / f"{name}.safetensors"
        if stored.is_made_from(path, made_from):
            continue
        begun = time.perf_counter()
        stored.save(_train(build, source, recipe, seed).state_dict(), path, made_from)
        _log.info("digits: trained teacher %s in %.1f s", name, time.perf_counter() - begun)


def _load(name: str, path: Path) -> nn.Module:
    module = TEACHERS[name][0]()
    try:
        module.load_state_dict(stored.load(path))
    except RuntimeError as error:
        raise TeacherError(
            f"digits: {path} does not hold the weights of {name}: {error}; remove it and run ddcache extract"
        ) from error
    return module


def _train(build: Callable[[], nn.Module], source: Source, recipe: Recipe, seed: int) -> nn.Module:
    label_all = source.samples.targets["digit"]
    rows = np.flatnonzero(label_all >= 0)
    image, label = source.read(rows)["image"], torch.from_numpy(label_all[rows])
    # The global generator, not one of our own: initialisers and dropout draw from it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build().train()
        optimiser = torch.optim.AdamW(module.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        batches = math.ceil(len(image) / recipe.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=recipe.epochs * batches)
        for _ in range(recipe.epochs):
            for some in torch.randperm(len(image)).split(recipe.batch_size):
                loss = F.cross_entropy(module(_distort(image[some], recipe)), label[some])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
    return module.eval()


def _distort(image: Tensor, recipe: Recipe) -> Tensor:
    """Return each image, (B, 1, 8, 8), turned, scaled and shifted by a random amount."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(image)) * 2 - 1) * limit

    angle, scale = uniform(math.radians(recipe.degrees)), 1 + uniform(recipe.scale)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift_x, shift_y = uniform(recipe.pixels / 4), uniform(recipe.pixels / 4)  # the image spans -1 to 1
    matrix = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(matrix, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)
