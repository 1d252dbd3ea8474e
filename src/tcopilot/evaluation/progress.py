"""The bar that a terminal shows while rows are answered."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from tcopilot.data.metrics import Metric, show
from tcopilot.processes import is_first


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, Metric, dict[float, float]], None]]:
    """A bar with examples per second and the running score; silent where the output is no terminal."""
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[state]}", TimeRemainingColumn())
    silent = not (console.is_terminal and is_first())
    with Progress(*columns, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(title, total=total, state="")

        def advance(rows: int, metric: Metric, means: dict[float, float]) -> None:
            ends = list(means.items())[:: len(means) - 1 or 1]
            shown = ", ".join(f"{show(mean, metric.unit, 1)} at λ={weight:g}" for weight, mean in ends)
            speed = bar.tasks[0].speed or 0.0
            bar.update(task, advance=rows, state=f"{speed:.1f}/s, {metric.name} {shown}")

        yield advance
