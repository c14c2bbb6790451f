"""What a language model reads of a film and of a user."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.movielens.data import ITEMS, USERS, read_lines

if TYPE_CHECKING:
    from pathlib import Path

    from ddcache import Samples

FAVOURITES = 10
"""Films that a user's text names as liked."""


def item_facts(root: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return titles, 0/1 genres (1683, 19) and years (1683,), by film id; row 0 is nobody's."""
    titles, genres, years = [""] * (ITEMS + 1), np.zeros((ITEMS + 1, 19), np.float32), np.full(ITEMS + 1, 1990.0)
    for line in read_lines(root, "u.item"):
        fields = line.split("|")
        item = int(fields[0])
        titles[item] = fields[1]
        genres[item] = [float(flag) for flag in fields[5:24]]
        if fields[2][-4:].isdigit():
            years[item] = float(fields[2][-4:])
    return titles, genres, years.astype(np.float32)


def item_texts(root: Path) -> list[str]:
    """Return a sentence a film, by id: title with year, and genres."""
    names = [line.split("|")[0] for line in read_lines(root, "u.genre") if "|" in line]
    titles, genres, _ = item_facts(root)
    texts = [""]
    for item in range(1, ITEMS + 1):
        kinds = [name for name, flag in zip(names, genres[item], strict=True) if flag]
        texts.append(f"{titles[item]}. Genres: {', '.join(kinds)}.")
    return texts


def user_texts(root: Path, samples: Samples) -> list[str]:
    """Return some sentences a user, by id: age, gender, occupation, and which films they rated highest and lowest.

    Args:
        root: folder of the data set.
        samples: the samples that teachers may see; only their ratings are used.
    """
    titles, _, _ = item_facts(root)
    rating = samples.targets["rating"]
    rows = np.flatnonzero(~np.isnan(rating))
    # By rating, then by film id: the order of the samples must not matter.
    rows = rows[np.lexsort((samples.entities["item_id"][rows], -rating[rows]))]
    rated: dict[int, list[tuple[str, float]]] = {}
    for user, item, stars in zip(
        samples.entities["user_id"][rows], samples.entities["item_id"][rows], rating[rows], strict=True
    ):
        rated.setdefault(int(user), []).append((titles[item], float(stars)))
    texts = [""] * (USERS + 1)
    for line in read_lines(root, "u.user"):
        number, age, gender, occupation, _zip = line.split("|")
        person = {"M": "man", "F": "woman"}[gender]
        films = rated.get(int(number), [])
        liked = "; ".join(title for title, stars in films[:FAVOURITES] if stars >= 4)
        disliked = "; ".join(title for title, stars in films[-3:] if stars <= 2)
        texts[int(number)] = (
            f"A {age} year old {person}, {occupation}."
            + (f" Likes {liked}." if liked else "")
            + (f" Dislikes {disliked}." if disliked else "")
        )
    return texts
