"""MovieLens-100K as a source: 100,000 ratings of 1,682 films by 943 users (Harper & Konstan, ACM TiiS 5(4), 2015)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddcache import ArraySource, Samples, SourceError

USERS, ITEMS = 943, 1682
RATINGS = 100_000
WHERE = (
    "MovieLens-100K is at https://grouplens.org/datasets/movielens/100k/ (GroupLens, University of Minnesota; research "
    "use, no redistribution). Unpack it and name the folder: --set source.args.root=FOLDER "
    "--set prepare.args.root=FOLDER"
)

Ints = npt.NDArray[np.int64]


def ratings(root: str, seed: int = 0, transfer: int = 72_000, calibration: int = 8_000) -> ArraySource:
    """Read the ratings and split them: 80 % labelled for training (of these some for calibration), 10 % val, 10 % test.

    Transfer samples are pairs that nobody rated, drawn with the training ratings' own frequencies of users and films.

    Args:
        root: folder that holds `u.data`.
        seed: of the split and of the transfer pairs.
        transfer: how many pairs without a rating.
        calibration: how many of the labelled ratings no teacher is fitted on.

    Raises:
        SourceError: the file is missing or is not MovieLens-100K.
    """
    user, item, rating = read_ratings(Path(root))
    rng = np.random.default_rng(seed)
    splits = np.empty(RATINGS, dtype="<U11")
    order = rng.permutation(RATINGS)
    tenth = RATINGS // 10
    for name, rows in (
        ("test", order[:tenth]),
        ("val", order[tenth : 2 * tenth]),
        ("calibration", order[2 * tenth : 2 * tenth + calibration]),
        ("train", order[2 * tenth + calibration :]),
    ):
        splits[rows] = name
    seen = splits == "train"
    new_user, new_item = _unrated_pairs(user, item, seen, transfer, rng)
    user_id, item_id = np.concatenate([user, new_user]), np.concatenate([item, new_item])
    samples = Samples(
        keys=user_id * 10_000 + item_id,
        splits=np.concatenate([splits, np.full(transfer, "transfer")]),
        targets={"rating": np.concatenate([rating, np.full(transfer, np.nan)]).astype(np.float32)},
        entities={"user_id": user_id, "item_id": item_id},
    )
    return ArraySource(samples, {"user_id": user_id, "item_id": item_id})


def read_ratings(root: Path) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Return users (from 1), films (from 1) and stars, (100000,) each, in the file's order.

    Raises:
        SourceError: the file is missing or is not MovieLens-100K.
    """
    lines = read_lines(root, "u.data")
    try:
        table = np.array([line.split("\t")[:3] for line in lines], dtype=np.int64)
        user, item, stars = table.T
    except ValueError as error:
        raise SourceError(
            f"{root / 'u.data'}: expected 'user<TAB>item<TAB>rating<TAB>time' in every line: {error}"
        ) from error
    right = len(table) == RATINGS and user.min() >= 1 and user.max() <= USERS and item.min() >= 1
    if not (right and item.max() <= ITEMS and stars.min() >= 1 and stars.max() <= 5):
        raise SourceError(
            f"{root / 'u.data'}: expected {RATINGS:,} ratings of MovieLens-100K, found {len(table):,}. {WHERE}"
        )
    return user, item, stars.astype(np.float32)


def read_lines(root: Path, name: str) -> list[str]:
    """Return the lines of one of the data set's files.

    Raises:
        SourceError: it is missing; says where to get it, and its licence.
    """
    try:
        return (root / name).read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise SourceError(f"cannot read {root / name}: {error.strerror}. {WHERE}") from error


def _unrated_pairs(
    user: Ints, item: Ints, seen: npt.NDArray[np.bool_], count: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Draw `count` distinct pairs without a rating; users and films as often as in the ratings that `seen` marks."""
    rated = np.zeros((USERS + 1, ITEMS + 1), dtype=bool)
    rated[user, item] = True
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < count:
        users, items = rng.choice(user[seen], 2 * count), rng.choice(item[seen], 2 * count)
        codes = (users * (ITEMS + 1) + items)[~rated[users, items]]
        drawn = np.concatenate([drawn, codes])
        # np.unique sorts, so keep first occurrences in the order drawn.
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    new_user, new_item = np.divmod(drawn[:count], ITEMS + 1)
    return new_user, new_item
