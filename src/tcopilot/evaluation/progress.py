"""The progress bar shown in a terminal while rows are answered or recorded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from tcopilot.processes import is_first


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar with rows per second; silent if the output is not a terminal.

    Yields a function that takes the number of newly finished rows and optionally a remark to show.
    """
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[state]}", TimeRemainingColumn())
    silent = not (console.is_terminal and is_first())
    with Progress(*columns, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(title, total=total, state="")

        def advance(rows: int, remark: str = "") -> None:
            speed = f"{bar.tasks[0].speed or 0.0:.1f} rows/s"
            bar.update(task, advance=rows, state=f"{speed}, {remark}" if remark else speed)

        yield advance
