from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import zarr

from ddcache.cache.reader import Cache
from ddcache.cache.writer import open_writer
from ddcache.config import load_pipeline
from ddcache.errors import CacheError, ConfigError, StaleCacheError, TeacherError
from ddcache.extract import extract_features, prepare
from ddcache.plan import plan_extraction
from tests import tiny
from tests.conftest import file_digests
from tests.tiny import write_pipeline

if TYPE_CHECKING:
    from pathlib import Path


Make = "Callable[..., Pipeline]"


def test_cached_features_are_those_of_the_live_teacher(make: Make) -> None:
    pipeline = make()
    extract_features(pipeline)
    cache, source = Cache.open(pipeline.cache), tiny.source()
    rows = np.random.default_rng(0).permutation(len(source.samples))[:200]
    inputs = source.read(rows)
    with torch.no_grad():
        net, groups = tiny.net().eval(), tiny.groups().eval()
        torch.testing.assert_close(cache.read("big", "body", rows), net.body(inputs["x"]))
        torch.testing.assert_close(cache.read("big", "output", rows), net(inputs["x"]))
        torch.testing.assert_close(cache.read("groups", "table", rows), groups(inputs["group"]).half())
    for name, tensor in inputs.items():
        assert torch.equal(cache.read_inputs(rows)[name], tensor)


def test_a_teacher_keyed_by_an_entity_runs_once_an_entity(make: Make) -> None:
    report = extract_features(make())
    assert report.forward_passes["groups"] == tiny.GROUPS + 2  # the two that showed the shapes


def test_a_second_run_does_no_forward_pass_and_changes_no_file(make: Make) -> None:
    pipeline = make()
    extract_features(pipeline)
    before = file_digests(pipeline.cache)
    report = extract_features(pipeline)
    assert set(report.forward_passes.values()) == {0}
    assert report.shards_written == 0
    assert file_digests(pipeline.cache) == before


@pytest.mark.filterwarnings("ignore:Object at:zarr.errors.ZarrUserWarning")  # the ledger is no part of Zarr
def test_zarr_alone_reads_the_same_numbers(make: Make) -> None:
    pipeline = make()
    extract_features(pipeline)
    root, cache = zarr.open_group(pipeline.cache, mode="r"), Cache.open(pipeline.cache)
    every = np.arange(len(cache.samples))
    row_map = root["teachers/groups/rows/group"][:]
    assert np.array_equal(root["teachers/big/body"][:][:, 0], cache.read("big", "body", every).numpy())
    assert np.array_equal(root["teachers/groups/table"][:][row_map][:, 0], cache.read("groups", "table", every).numpy())
    assert np.array_equal(root["inputs/x"][:], cache.read_inputs(every)["x"].numpy())
    assert {name for name, _ in root.members(max_depth=None)} >= {"teachers/big/output", "teachers/groups/rows/group"}


def test_statistics_are_those_of_all_rows(make: Make) -> None:
    pipeline = make()
    extract_features(pipeline)
    cache = Cache.open(pipeline.cache)
    values = cache.read("big", "body", np.arange(600)).double().numpy()
    statistics = cache.statistics("big", "body")
    assert statistics is not None
    assert statistics.count == 600
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.variance, values.var(0), rtol=1e-5)


def test_kill_minus_nine_and_extract_again_gives_the_same_files(tmp_path: Path) -> None:
    slow = {
        "teachers__big__factory": "tests.tiny:slow",
        "teachers__big__batch_size": 16,
        "teachers__big__shard_rows": 32,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    extract_features(load_pipeline(write_pipeline(whole, **slow)))
    path = write_pipeline(killed, **slow)
    ledger = killed / "cache" / "teachers" / "big" / "ledger" / "body"
    kills = 0
    for at_least in (2, 9):
        process = subprocess.Popen([sys.executable, "-m", "ddcache.cli", "extract", str(path)])
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if ledger.is_dir() and len(list(ledger.glob("*.json"))) >= at_least:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    assert kills == 2
    with pytest.raises(CacheError, match="only partly cached"):
        Cache.open(killed / "cache").require(["big"])
    report = extract_features(load_pipeline(path))
    # Of the 9 shards that had a record of `body`, the last may have lost its record of `output`.
    assert 0 < report.forward_passes["big"] <= 600 - 8 * 32
    assert file_digests(killed / "cache") == file_digests(whole / "cache")


def test_a_shard_that_is_not_committed_is_refused_by_name(make: Make) -> None:
    pipeline = make(teachers__groups=None)
    extract_features(pipeline)
    cache = Cache.open(pipeline.cache)
    array = cache.tap("big", "body")
    array.shards = {s: r for s, r in array.shards.items() if s != 1}
    assert array.available().sum() == 600 - 128
    with pytest.raises(CacheError, match="big/body rows 128 to 255 .* are not cached yet; run ddcache extract"):
        cache.read("big", "body", np.array([3, 130]))


STALE: list[tuple[str, dict[str, object], str]] = [
    ("weights", {"teachers__big__args": {"seed": 1}}, "teacher.weights"),
    ("arguments", {"teachers__big__args": {"seed": 0}}, "teacher.args.seed"),
    ("autocast", {"teachers__big__autocast": "bfloat16"}, "teacher.autocast"),
    ("dtype", {"teachers__big__taps__body__dtype": "float16"}, "taps.body.dtype"),
    ("module", {"teachers__big__taps__body__module": "body.0"}, "taps.body.module"),
    ("keyed by", {"teachers__big__taps__body__keyed_by": "group"}, "taps.body.keyed_by"),
    ("targets and keys", {"source": {"factory": "tests.tiny:source", "args": {"seed": 1}}}, "target.label"),
    ("inputs", {"source": {"factory": "tests.tiny:source", "args": {"seed": 1}}}, "input.x"),
    ("fewer samples", {"source": {"factory": "tests.tiny:source", "args": {"n": 599}}}, "samples"),
    ("splits", {"source": {"factory": "tests.tiny:source", "args": {"calibration": False}}}, "splits"),
]


@pytest.mark.parametrize(("change", "field"), [s[1:] for s in STALE], ids=[s[0] for s in STALE])
def test_a_stale_cache_is_refused_with_the_field_that_changed(
    make: Make, change: dict[str, object], field: str
) -> None:
    pipeline = make()
    extract_features(pipeline)
    before = file_digests(pipeline.cache)
    with pytest.raises(StaleCacheError) as caught:
        extract_features(make(**change))
    assert any(line.split()[0] == field for line in str(caught.value).split("\n")[1:-1])
    assert file_digests(pipeline.cache) == before


def test_rebuild_extracts_one_teacher_anew_and_keeps_the_others(make: Make) -> None:
    extract_features(make())
    report = extract_features(make(teachers__big__args={"seed": 1}), rebuild=["big"])
    assert report.forward_passes == {"big": 602, "groups": 0}
    with pytest.raises(ConfigError, match="--rebuild"):
        extract_features(make(), rebuild=["bgi"])


def test_a_refusal_beside_a_rebuild_deletes_nothing(make: Make) -> None:
    pipeline = make()
    extract_features(pipeline)
    before = file_digests(pipeline.cache)
    with pytest.raises(StaleCacheError, match="teacher 'big'"):
        extract_features(make(teachers__big__args={"seed": 1}), rebuild=["groups"])
    assert file_digests(pipeline.cache) == before


def test_adding_a_tap_or_teacher_leaves_committed_files_alone(make: Make) -> None:
    teachers = tiny.pipeline(make().cache.parent)["teachers"]
    big = teachers["big"]
    pipeline = make(teachers={"big": {**big, "taps": {"output": big["taps"]["output"]}}})
    extract_features(pipeline)
    before = file_digests(pipeline.cache)
    report = extract_features(make(teachers=teachers))
    after = file_digests(pipeline.cache)
    assert report.forward_passes["big"] == 602
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"teachers/big/zarr.json"}


FAILING: list[tuple[str, dict[str, object], str]] = [
    ("raises", {"how": "raise"}, "teacher 'big' raised RuntimeError: no such picture (samples s0"),
    ("nan", {"how": "nan"}, "teachers.big.taps.output: the teacher gave NaN or infinity at sample s0"),
    ("too large", {"how": "large"}, "does not fit float16; set dtype: float32"),
]


@pytest.mark.parametrize(("args", "message"), [f[1:] for f in FAILING], ids=[f[0] for f in FAILING])
def test_a_failing_sample_is_named_and_nothing_is_taken_for_complete(
    make: Make, args: dict[str, object], message: str
) -> None:
    pipeline = make(
        teachers__big__factory="tests.tiny:broken",
        teachers__big__args=args,
        teachers__big__taps={"output": {"module": "head", "kind": "output"}},
    )
    with pytest.raises(TeacherError) as caught:
        extract_features(pipeline)
    assert message in str(caught.value)
    assert not Cache.open(pipeline.cache).teachers["big"].complete
    healed = make(
        teachers__big__factory="tests.tiny:broken",
        teachers__big__args=args,
        teachers__big__taps={"output": {"module": "head", "kind": "output"}},
        source={"factory": "tests.tiny:source", "args": {"n": 600}},
    )
    with pytest.raises(TeacherError):  # the same again: still refused, not served
        extract_features(healed)


def test_a_wrong_module_name_of_the_last_teacher_costs_no_work(make: Make) -> None:
    pipeline = make(teachers__groups__taps={"table": {"module": "tabel"}})
    with pytest.raises(ConfigError, match="nearest are \\['table'\\]"):
        extract_features(pipeline)
    assert not pipeline.cache.exists()


def test_an_entity_column_that_is_not_there_is_refused_before_any_work(make: Make) -> None:
    pipeline = make(teachers__groups__keyed_by="groop")
    with pytest.raises(ConfigError, match=r"no entity column 'groop'; it has \['group'\]"):
        extract_features(pipeline)
    assert not pipeline.cache.exists()


def test_a_factory_that_gives_other_weights_each_time_is_refused(make: Make) -> None:
    taps = {"all": {"module": ""}}
    teachers = {"odd": {"role": "expert", "factory": "tests.tiny:unseeded", "taps": taps}}
    pipeline = make(teachers=teachers, methods=["none"])
    with pytest.raises(StaleCacheError, match="returned other weights the second time"):
        extract_features(pipeline)


def test_two_writers_at_once_are_refused(make: Make) -> None:
    pipeline = make()
    with open_writer(pipeline.cache), pytest.raises(CacheError, match="another process is writing"):
        extract_features(pipeline)


def test_a_folder_with_other_things_in_it_is_not_taken_over(make: Make) -> None:
    pipeline = make()
    pipeline.cache.mkdir()
    (pipeline.cache / "thesis.txt").write_text("mine")
    with pytest.raises(CacheError, match="holds other things, such as thesis.txt"):
        extract_features(pipeline)


def test_a_damaged_chunk_is_never_served(make: Make) -> None:
    pipeline = make()
    extract_features(pipeline)
    chunk = pipeline.cache / "teachers/big/body/c/2/0/0"
    data = bytearray(chunk.read_bytes())
    data[1000] ^= 1
    chunk.write_bytes(data)
    cache = Cache.open(pipeline.cache)
    cache.read("big", "body", np.array([0]))
    with pytest.raises(CacheError, match="teachers/big/body rows 256 to 383: the chunk is damaged"):
        cache.read("big", "body", np.array([300]))


@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_extract_makes_a_lost_chunk_again_and_only_that(make: Make, damage: str) -> None:
    pipeline = make()
    extract_features(pipeline)
    before = file_digests(pipeline.cache)
    chunk = pipeline.cache / "teachers/big/body/c/2/0/0"
    chunk.unlink() if damage == "removed" else chunk.write_bytes(chunk.read_bytes()[:100])
    report = extract_features(pipeline)
    assert report.forward_passes == {"big": 128, "groups": 0}
    assert file_digests(pipeline.cache) == before


DAMAGED = ["zarr.json", "samples.parquet", "teachers/big/zarr.json", "teachers/big/ledger/body.parquet"]


@pytest.mark.parametrize("name", [*DAMAGED, "teachers/big/body/zarr.json"])
def test_a_damaged_record_is_a_cache_error(make: Make, name: str) -> None:
    pipeline = make()
    extract_features(pipeline)
    path = pipeline.cache / name
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], bytes([*whole[:60], whole[60] ^ 4, *whole[61:]]), b""):
        path.write_bytes(damage)
        with pytest.raises(CacheError):
            Cache.open(pipeline.cache).read("big", "body", np.array([0]))


def test_the_plan_tells_bytes_and_passes_exactly(make: Make) -> None:
    pipeline = make()
    before = plan_extraction(pipeline)
    report = extract_features(pipeline)
    after = plan_extraction(pipeline)
    info = Cache.open(pipeline.cache).info()["teachers"]
    for name, teacher in before.teachers.items():
        assert teacher.nbytes == {tap: array["nbytes"] for tap, array in info[name]["taps"].items()}
        assert teacher.remaining == teacher.forward_passes == report.forward_passes[name] - 2
        assert after.teachers[name].remaining == 0
    assert before.seconds > 0
    assert before.files == 5 * 2 + 1


def test_prepare_is_shown_train_and_transfer_rows_only(make: Make) -> None:
    prepare(make(prepare={"factory": "tests.tiny:spy", "args": {"mark": "!"}}))
    assert tiny.seen[-1] == {"train", "transfer", "!"}
