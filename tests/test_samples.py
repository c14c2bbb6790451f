from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddcache.cache.layout import row_domain
from ddcache.cache.samples import Samples
from ddcache.errors import CacheError, ConfigError, SourceError
from ddcache.sources import ArraySource, SubsetSource
from tests.tiny import source


def table(n: int = 4, **columns: object) -> Samples:
    fields: dict[str, object] = {"keys": np.arange(n), "splits": np.array(["train"] * n), **columns}
    return Samples(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"keys": np.array([1, 2, 2, 3])}, r"found 1 repeats, for example \[2\]"),
        ({"splits": np.array(["train", "trian", "val", "test"])}, r"found \['trian'\]"),
        ({"targets": {"y": np.zeros(3)}}, r"expected one value of y a key"),
        ({"targets": {"y": np.array([0, 1, -2, 0])}}, "expected integers from 0"),
        ({"keys": np.array([1.0, 2.0, 3.0, 4.0])}, "expected integers or strings"),
        ({"targets": {"row": np.zeros(4)}}, "'row' is taken"),
        ({"entities": {"../up": np.zeros(4, int)}}, "column name"),
        ({"targets": {"y": np.zeros(4)}, "entities": {"y": np.zeros(4, int)}}, "different names"),
    ],
)
def test_a_table_that_could_misalign_rows_is_refused(columns: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        table(**columns)


@given(
    st.lists(st.one_of(st.integers(-(2**62), 2**62)), unique=True, min_size=1, max_size=30),
    st.data(),
)
def test_a_table_survives_the_way_through_arrow(keys: list[int], data: st.DataObject) -> None:
    n = len(keys)
    splits = data.draw(st.lists(st.sampled_from(["train", "transfer", "val", "test"]), min_size=n, max_size=n))
    names = data.draw(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5), min_size=n, max_size=n)
    )
    rating = data.draw(st.lists(st.one_of(st.floats(-5, 5, width=32), st.just(float("nan"))), min_size=n, max_size=n))
    label = data.draw(st.lists(st.integers(-1, 9), min_size=n, max_size=n))
    before = Samples(
        np.array(keys),
        np.array(splits),
        {"rating": np.array(rating, np.float32), "label": np.array(label)},
        {"name": np.array(names)},
    )
    after = Samples.from_arrow(before.to_arrow())
    assert after.digests() == before.digests()
    assert after.targets["rating"].dtype == np.float32


def test_unlabelled_targets_are_null_in_arrow() -> None:
    arrow = table(targets={"y": np.array([0, -1, 2, -1]), "z": np.array([0.5, np.nan, 1, 2])}).to_arrow()
    assert arrow.column("y").to_pylist() == [0, None, 2, None]
    assert arrow.column("z").to_pylist() == [0.5, None, 1.0, 2.0]


@pytest.mark.parametrize("drop", ["row", "key", "split"])
def test_an_arrow_table_of_another_shape_is_a_cache_error(drop: str) -> None:
    with pytest.raises(CacheError):
        Samples.from_arrow(table().to_arrow().drop_columns([drop]))
    with pytest.raises(CacheError, match="count from 0"):
        Samples.from_arrow(table().to_arrow().take(pa.array([1, 0, 2, 3])))


def test_digests_see_every_change_and_nothing_else() -> None:
    base = table(targets={"y": np.array([0, 1, 2, 3])})
    same = table(targets={"y": np.array([0, 1, 2, 3], dtype=np.int32)})
    assert base.digests() == same.digests()
    moved = base.take(np.array([1, 0, 2, 3]))
    relabelled = table(targets={"y": np.array([0, 1, 2, 2])})
    assert moved.digests()["keys"] != base.digests()["keys"]
    assert relabelled.digests()["target.y"] != base.digests()["target.y"]
    assert relabelled.digests()["keys"] == base.digests()["keys"]


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), min_size=1, max_size=60))
def test_a_row_domain_numbers_entities_in_order_of_first_occurrence(pairs: list[tuple[int, str]]) -> None:
    samples = table(
        len(pairs), entities={"user": np.array([p[0] for p in pairs]), "item": np.array([p[1] for p in pairs])}
    )
    domain = row_domain(samples, ("user", "item"))
    slow: dict[tuple[int, str], int] = {}
    for pair in pairs:
        slow.setdefault(pair, len(slow))
    assert domain.row_map is not None
    assert domain.row_map.tolist() == [slow[pair] for pair in pairs]
    assert [pairs[i] for i in domain.representatives] == list(slow)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(1, 39))
def test_appending_samples_leaves_the_rows_of_entities_where_they_are(values: list[int], cut: int) -> None:
    cut = min(cut, len(values) - 1)
    whole = row_domain(table(len(values), entities={"e": np.array(values)}), ("e",))
    part = row_domain(table(cut, entities={"e": np.array(values[:cut])}), ("e",))
    assert part.row_map is not None
    assert whole.row_map is not None
    assert part.row_map.tolist() == whole.row_map[:cut].tolist()


def test_an_unknown_entity_column_is_named() -> None:
    with pytest.raises(ConfigError, match="no entity column 'user'"):
        row_domain(table(), ("user",))


def test_a_subset_source_cannot_see_the_other_splits() -> None:
    whole = source()
    part = SubsetSource(whole, "train", "transfer")
    assert set(part.samples.splits.tolist()) == {"train", "transfer"}
    rows = np.array([0, 5, 17])
    original = [whole.samples.keys.tolist().index(key) for key in part.samples.keys[rows]]
    assert (part.read(rows)["x"] == whole.read(np.array(original))["x"]).all()


def test_inputs_of_another_length_are_refused() -> None:
    with pytest.raises(SourceError, match="input 'x': expected 4 rows"):
        ArraySource(table(), {"x": np.zeros((3, 2))})
