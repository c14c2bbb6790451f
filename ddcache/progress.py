"""How long work reports that it goes on; the library itself never prints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int], None]


class Reporter(Protocol):
    """Shows the progress of one stretch of work after another."""

    def track(self, what: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """Open a stretch of `total` units; calling what it yields advances it."""


class Silent:
    """Shows nothing."""

    @contextlib.contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        """Yield a function that does nothing."""
        yield lambda _units: None


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="dim")


class Bars:
    """Progress bars with rate and time left, gone when they are done; on stderr, and only on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextlib.contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        """Show one bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            task = progress.add_task(what, total=total)
            yield lambda units: progress.advance(task, units)
