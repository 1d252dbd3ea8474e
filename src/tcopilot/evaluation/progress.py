"""The progress shown while rows are answered or recorded: a bar in a terminal, elsewhere a line a minute."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from tcopilot.processes import is_first

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 60


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar with rows per second; if the output is not a terminal, log a line from time to time.

    Yields a function that takes the number of newly finished rows and optionally a remark to show.
    """
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[state]}", TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and is_first())) as bar:
        task = bar.add_task(title, total=total, state="")
        began = said = time.monotonic()
        done = 0

        def advance(rows: int, remark: str = "") -> None:
            nonlocal said, done
            now, done = time.monotonic(), done + rows
            speed = f"{done / max(now - began, 1e-9):.1f} rows/s"
            state = f"{speed}, {remark}" if remark else speed
            bar.update(task, advance=rows, state=state)
            if not console.is_terminal and is_first() and now - said >= SECONDS_BETWEEN_LINES:
                said = now
                log.info("%s: %d of %d rows, %s", title, done, total, state)

        yield advance
