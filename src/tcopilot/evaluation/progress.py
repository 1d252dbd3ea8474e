"""The bar that a terminal shows while rows are answered or recorded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from tcopilot.processes import is_first


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with rows per second; silent where the output is no terminal.

    It yields a function that takes the number of further rows done and, if there is one, a remark to be shown.
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
