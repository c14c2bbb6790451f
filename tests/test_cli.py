from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ddcache
from ddcache import cli
from tests.tiny import write_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command in this process and gives exit code, stdout and stderr."""
    monkeypatch.chdir(ROOT)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddcache", *map(str, arguments)])
        for name, stderr in (("out", False), ("err", True)):
            monkeypatch.setattr(cli, name, cli.Console(stderr=stderr, width=200))
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return int(code or 0), captured.out, captured.err

    return run


Call = "Callable[..., tuple[int, str, str]]"


def test_the_commands_in_their_order_give_a_table_and_a_report(call: Call, tmp_path: Path) -> None:
    path = write_pipeline(tmp_path)
    code, out, _ = call("plan", path)
    assert code == 0
    assert "pays for itself" in out
    code, out, _ = call("extract", path)
    assert (code, "groups: 32 forward passes" in out) == (0, True)
    code, out, _ = call("extract", path)
    assert (code, "big: 0 forward passes, all of it was cached" in out) == (0, True)
    code, out, _ = call("train", path)
    assert (code, "3 trained, 0 finished before" in out) == (0, True)
    code, out, _ = call("evaluate", path)
    assert code == 0
    assert "diversedistill" in out
    assert (tmp_path / "runs/report.html").exists()
    code, out, _ = call("info", tmp_path / "cache")
    assert (code, "600 samples" in out) == (0, True)


def test_run_does_all_of_it_and_a_second_run_does_nothing_again(call: Call, tmp_path: Path) -> None:
    path = write_pipeline(tmp_path)
    code, out, _ = call("run", path)
    assert (code, "3 trained" in out) == (0, True)
    code, out, _ = call("run", path)
    assert code == 0
    assert "0 trained, 3 finished before" in out
    assert "big: 0 forward passes" in out


@pytest.mark.parametrize("command", ["plan", "extract", "train", "evaluate", "run"])
def test_json_is_one_object_alone_on_stdout(call: Call, tmp_path: Path, command: str) -> None:
    path = write_pipeline(tmp_path)
    call("extract", path)
    call("train", path)
    code, out, _ = call(command, path, "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict)
    code, out, _ = call("info", tmp_path / "cache", "--json")
    assert json.loads(out)["samples"] == 600


MISTAKES: list[tuple[str, dict[str, Any], int, str]] = [
    ("typo", {"teachers__big__tapps": 1}, 2, "teachers.big.tapps: unknown field"),
    ("layer", {"teachers__big__taps__body__module": "bdy"}, 2, "Net has no module 'bdy'; the nearest are ['body'"),
    ("student layer", {"students__small__hidden": "bdy"}, 2, "students.small.hidden: Net has no module 'bdy'"),
    ("method", {"methods": ["nome"]}, 2, "methods.nome: unknown method"),
    ("average without outputs", {"methods": ["average"]}, 2, "teacher 'groups' has no output"),
    ("factory", {"source": "tests.tiny:sauce"}, 2, "source.factory"),
    ("raises", {"teachers__big__factory": "tests.tiny:broken", "teachers__big__args": {"how": "raise"}}, 1, "such pic"),
    ("source raises", {"source": {"factory": "tests.tiny:source", "args": {"n": -1}}}, 1, "source: tests.tiny:source"),
    ("target", {"task__target": "lable"}, 2, "no target 'lable'; it has ['label']"),
]


@pytest.mark.parametrize(("changes", "expected", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_message_without_a_traceback(
    call: Call, tmp_path: Path, changes: dict[str, Any], expected: int, message: str
) -> None:
    code, out, err = call("run", write_pipeline(tmp_path, **changes))
    assert code == expected
    assert message in err.replace("\n", " ")
    assert err.count("error:") == 1
    assert "Traceback" not in out + err
    if expected == 2:
        assert not (tmp_path / "cache").exists()


def test_usage_errors_exit_2(call: Call, tmp_path: Path) -> None:
    assert call("extract")[0] == 2
    assert call("extarct", "x.yaml")[0] == 2
    assert call("run", tmp_path / "none.yaml")[0] == 2
    assert call("info", tmp_path)[0] == 1


def test_a_folder_that_cannot_be_made_is_one_message(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for field in ("cache", "runs"):
        code, _, err = call("run", write_pipeline(tmp_path, **{field: str(tmp_path / "file" / "below")}))
        assert (code, err.count("error:"), "Traceback" in err) == (1, 1, False)


def test_set_overrides_a_field(call: Call, tmp_path: Path) -> None:
    path = write_pipeline(tmp_path)
    code, out, _ = call("plan", path, "--set", "source.args.n=80", "--json")
    assert (code, json.loads(out)["teachers"]["big"]["forward_passes"]) == (0, 80)


def test_ctrl_c_says_how_to_go_on_and_leaves_a_resumable_cache(call: Call, tmp_path: Path) -> None:
    path = write_pipeline(tmp_path, teachers__big__factory="tests.tiny:slow", teachers__big__batch_size=8)
    process = subprocess.Popen(
        [sys.executable, "cli.py", "extract", str(path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    ledger = tmp_path / "cache/teachers/big/ledger/body"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (ledger.is_dir() and list(ledger.glob("*.json"))):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    code, out, _ = call("extract", path, "--json")
    assert code == 0
    assert json.loads(out)["shards_kept"] > 0


def test_help_imports_neither_torch_nor_zarr() -> None:
    code = "import sys; from ddcache.cli import cli; assert not {'torch', 'zarr', 'dask', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_those_that_are_exported() -> None:
    for name in ddcache.__all__:
        assert getattr(ddcache, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ddcache.nothing  # noqa: B018
