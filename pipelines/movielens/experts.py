"""`prepare`: fits the rating head of MiniLM and the two collaborative experts, once, on training ratings only.

Shape legend: n ratings, U users + 1, I films + 1, D width.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pipelines import weights as stored
from pipelines.movielens.teachers import (
    HEAD,
    ITEM_ROWS,
    MINILM_SHA256,
    TEXTS,
    USER_ROWS,
    FactorisationTeacher,
    History,
    PairHead,
    TwoTowerTeacher,
    load_minilm,
    tokenize,
)
from pipelines.movielens.texts import item_facts, item_texts, user_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from ddcache import Source

_log = logging.getLogger(__name__)

VERSION = 2
"""Part of what weights are made from; raise it when the training below changes."""


def prepare(source: Source, root: str, weights: str, seed: int = 0, epochs: int | None = None) -> None:
    """Fit the teachers that don't exist yet, or were fitted on other samples.

    Args:
        source: what teachers may see; ddcache hands over train and transfer rows only.
        root: folder of MovieLens-100K.
        weights: folder for what is fitted.
        seed: of initial weights, order and Gibbs sampling.
        epochs: instead of each teacher's own, for a quick try.
    """
    folder = Path(weights)
    folder.mkdir(parents=True, exist_ok=True)
    user, item, rating = labelled(source)
    texts = {"items": item_texts(Path(root)), "users": user_texts(Path(root), source.samples)}
    (folder / TEXTS).write_text(json.dumps(texts), encoding="utf-8")
    facts = {"samples": source.samples.digests(), "seed": seed, "epochs": epochs, "version": VERSION}
    head_facts = {**facts, "texts": texts, "files": MINILM_SHA256}

    def fit_head() -> dict[str, Tensor]:
        _, genres, years = item_facts(Path(root))
        content = torch.cat(
            [embed(texts["items"]), torch.from_numpy(genres), torch.from_numpy(years)[:, None] / 100 - 19.8], 1
        )
        return train_head(content, user, item, rating, epochs or 12).state_dict()

    def fit_twotower() -> dict[str, Tensor]:
        return train_twotower(user, item, rating, epochs or 12).state_dict()

    def fit_bmf() -> dict[str, Tensor]:
        return sample_bmf(user, item, rating, epochs or 120).state_dict()

    _once(folder / "minilm_head.safetensors", head_facts, fit_head, seed)
    _once(folder / "twotower.safetensors", facts, fit_twotower, seed)
    _once(folder / "bmf.safetensors", facts, fit_bmf, seed)


def labelled(source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Return user ids, film ids (n,) int64 and ratings (n,) float32 of the samples that have one."""
    rating = source.samples.targets["rating"]
    rows = np.flatnonzero(~np.isnan(rating))
    entities = source.samples.entities
    return tuple(torch.from_numpy(a[rows]) for a in (entities["user_id"], entities["item_id"], rating))  # type: ignore[return-value]


def _once(path: Path, facts: dict[str, object], fit: Callable[[], dict[str, Tensor]], seed: int) -> None:
    made_from = stored.digest(facts)
    if stored.is_made_from(path, made_from):
        return
    begun = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stored.save(fit(), path, made_from)
    _log.info("movielens: made %s in %.0f s", path.name, time.perf_counter() - begun)


@torch.inference_mode()
def embed(texts: list[str], batch_size: int = 64) -> Tensor:
    """Return MiniLM's sentence embeddings, (texts, 384): mean over real tokens of the last layer."""
    model = load_minilm()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = torch.empty(len(texts), 384)
    for at in range(0, len(order), batch_size):
        some = order[at : at + batch_size]
        tokens = tokenize([texts[i] for i in some])
        mask = tokens["attention_mask"][..., None].float()
        vectors[some] = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    return vectors


class HeadTrainer(nn.Module):
    """Fills the tables of a `PairHead` from film contents and ratings: films to users to films, two hops."""

    def __init__(self, content_ID: Tensor) -> None:
        super().__init__()
        self.head = PairHead(**HEAD)
        dim = HEAD["dim"]
        self.content: Tensor
        self.register_buffer("content", content_ID)
        self.film = nn.Sequential(nn.Linear(content_ID.shape[1], dim), nn.Dropout(HEAD["dropout"]))
        self.user_mix = nn.Linear(2 * dim, dim)
        self.item_mix = nn.Linear(2 * dim, dim)

    def fill(self, user: Tensor, item: Tensor, rating: Tensor) -> None:
        """Compute the head's tables from these ratings, differentiably."""
        head, history = self.head, History.of(user, item, rating)
        film_ID = self.film(self.content)
        scale_U1 = (history.count_U + 1).rsqrt()[:, None]
        history_U2D = torch.cat([history.residual_UI @ film_ID, history.rated_UI @ film_ID], dim=1) * scale_U1
        head.mean = history.mean
        head.user = self.user_mix(history_U2D)
        audience_ID = history.residual_UI.T @ head.user * (history.count_I + 1).rsqrt()[:, None]
        head.item = self.item_mix(torch.cat([film_ID, audience_ID], dim=1))
        head.user_facts = torch.stack([(history.count_U + 1).log(), history.bias_U], dim=1)
        head.item_facts = torch.stack([(history.count_I + 1).log(), history.bias_I], dim=1)


def train_head(content: Tensor, user: Tensor, item: Tensor, rating: Tensor, epochs: int) -> PairHead:
    """Train the rating head; a tenth of the ratings at a time is predicted from the other nine tenths.

    Predicting a rating from a history that holds it would teach the head to read it off.
    """
    content = content.clone()
    content[1:] = (content[1:] - content[1:].mean(0)) / (content[1:].std(0) + 1e-3)
    trainer = HeadTrainer(content)

    kept = torch.ones(len(user), dtype=torch.bool)

    def hold_out(held: Tensor) -> None:
        nonlocal kept
        kept = ~held

    def loss(some: Tensor) -> Tensor:
        trainer.fill(user[kept], item[kept], rating[kept])  # again for every batch: it is part of the graph
        return (trainer.head(user[some], item[some]) - rating[some]).square().mean()

    _descend(trainer, hold_out, loss, len(user), epochs, lr=3e-3, weight_decay=0.01)
    trainer.eval()
    with torch.no_grad():
        trainer.fill(user, item, rating)
    return trainer.head


def train_twotower(user: Tensor, item: Tensor, rating: Tensor, epochs: int) -> TwoTowerTeacher:
    """Train the expert with history; as for the head, a rating is predicted from a history without it."""
    module = TwoTowerTeacher()

    def hold_out(held: Tensor) -> None:
        module.fill(user[~held], item[~held], rating[~held])

    def loss(some: Tensor) -> Tensor:
        return (module(user[some], item[some]) - rating[some]).square().mean()

    _descend(module, hold_out, loss, len(user), epochs, lr=5e-3, weight_decay=1.0)
    module.fill(user, item, rating)
    return module.eval()


def _descend(
    module: nn.Module,
    hold_out: Callable[[Tensor], None],
    loss: Callable[[Tensor], Tensor],
    count: int,
    epochs: int,
    *,
    lr: float,
    weight_decay: float,
    batch_size: int = 1024,
) -> None:
    """AdamW with one cycle; an epoch goes through tenths of the ratings, each held out while its batches are fitted."""
    module.train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    tenths = np.array_split(np.arange(count), 10)
    steps = epochs * sum(-(-len(tenth) // batch_size) for tenth in tenths)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(count)
        for tenth in tenths:
            rows = order[torch.from_numpy(tenth)]
            held = torch.zeros(count, dtype=torch.bool)
            held[rows] = True
            hold_out(held)
            for some in rows.split(batch_size):
                value = loss(some)
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                optimiser.step()
                schedule.step()


def sample_bmf(
    user: Tensor, item: Tensor, rating: Tensor, sweeps: int, dim: int = 16, kept: int = 24, noise: float = 0.8
) -> FactorisationTeacher:
    """Sample the posterior of a matrix factorisation by Gibbs sampling (Salakhutdinov & Mnih 2008).

    One component starts at one for every user, another for every film, so that the other side's can become a bias
    from the first sweep on; all components are sampled alike. `noise` is the variance of a rating.
    """
    mean = rating.mean()
    residual = (rating - mean).double()
    users, items = 0.1 * torch.randn(USER_ROWS, dim).double(), 0.1 * torch.randn(ITEM_ROWS, dim).double()
    users[:, 0], items[:, 1] = 1.0, 1.0
    module = FactorisationTeacher(kept, dim)
    module.mean = mean
    every = max(1, sweeps // 2 // kept)
    for sweep in range(sweeps):
        users = _sample_side(users, user, items[item], residual, noise)
        items = _sample_side(items, item, users[user], residual, noise)
        back = sweeps - 1 - sweep
        if back % every == 0 and back // every < kept:
            module.user[kept - 1 - back // every] = users.float()
            module.item[kept - 1 - back // every] = items.float()
    return module.eval()


def _sample_side(own: Tensor, index: Tensor, other_nD: Tensor, residual_n: Tensor, noise: float) -> Tensor:
    """Draw the prior's mean and precision given the vectors of one side, then the vectors given the ratings."""
    count, dim = own.shape
    mu, precision = _sample_prior(own)
    outer = torch.zeros(count, dim, dim).double().index_add_(0, index, other_nD[:, :, None] * other_nD[:, None] / noise)
    linear = torch.zeros(count, dim).double().index_add_(0, index, other_nD * residual_n[:, None] / noise)
    lower = torch.linalg.cholesky(outer + precision)
    centre = torch.cholesky_solve((linear + precision @ mu)[..., None], lower)
    draw = torch.linalg.solve_triangular(lower.mT, torch.randn(count, dim, 1).double(), upper=True)
    return (centre + draw)[..., 0]


def _sample_prior(own: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from the Gaussian-Wishart posterior with mu_0 = 0, beta_0 = 2, nu_0 = D, W_0 = identity."""
    count, dim = own.shape
    beta, nu = 2.0, float(dim)
    mean = own.mean(0)
    centred = own - mean
    scatter = torch.eye(dim).double() + centred.T @ centred + count * beta / (count + beta) * torch.outer(mean, mean)
    # Bartlett: with L Lᵀ the inverse of the scatter, L A (L A)ᵀ is Wishart if A is lower triangular, its squared
    # diagonal chi-squared and the rest normal.
    bartlett = torch.randn(dim, dim).double().tril(-1)
    bartlett += torch.diag(torch.distributions.Chi2((nu + count - torch.arange(dim)).double()).sample().sqrt())
    factor = torch.linalg.cholesky(torch.linalg.inv(scatter)) @ bartlett
    precision = factor @ factor.T
    spread = torch.linalg.cholesky(torch.linalg.inv((beta + count) * precision))
    mu = count * mean / (count + beta) + spread @ torch.randn(dim).double()
    return mu, precision
