"""What the terminal shows: results on stdout; progress and errors on stderr. Loads nothing heavy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from headwater.errors import HeadwaterError

if TYPE_CHECKING:
    from headwater.doctor import Finding

debugging = False
"""Whether ``--debug`` was given."""
notes = Console(stderr=True, highlight=False, soft_wrap=True)
REFUSED, INTERRUPTED = 2, 130


def version() -> str:
    """Of the installed package."""
    return metadata.version("headwater")


def answering(again: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Wrap a command: an error made on purpose becomes a panel and exit code 2; Ctrl-C says how to go on (``again``) and exits with 130."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def told(*args: Any, **kwargs: Any) -> None:
            try:
                command(*args, **kwargs)
            except HeadwaterError as error:
                if debugging:
                    raise
                refuse(error)
                raise typer.Exit(REFUSED) from None
            except KeyboardInterrupt:
                if debugging:
                    raise
                notes.print(f"\nStopped: {again}.")
                raise typer.Exit(INTERRUPTED) from None

        return told

    return wrap


def refuse(error: HeadwaterError) -> None:
    """An error as given / expected / mend: in a frame on a terminal, as plain lines elsewhere."""
    rows = (("Given", error.given), ("Expected", error.expected), ("To mend it", error.mend))
    if not notes.is_terminal:
        notes.print("\n".join(f"{name}: {said}" for name, said in rows if said), markup=False)
        return
    body = Text("\n").join(Text.assemble((f"{name:<11}", "bold"), said) for name, said in rows if said)
    notes.print(Panel(body, title=type(error).__name__, title_align="left", border_style="red", padding=(1, 2)), soft_wrap=False)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """A line for a piece of work: a spinner while it lasts, and how long it took."""
    started = time.perf_counter()
    if notes.is_terminal:
        with notes.status(f"{what} …"):
            yield
    else:
        notes.print(f"{what} …", markup=False)
        yield
    notes.print(f"[green]✓[/green] {what} [dim]({time.perf_counter() - started:.1f} s)[/dim]")


def note(line: str) -> None:
    """A line about the work, on stderr."""
    notes.print(line, markup=False)


def say(line: str = "") -> None:
    """A line of the result, on stdout."""
    typer.echo(line)


def told(findings: Iterable[Finding]) -> bool:
    """Print each finding as it is made; whether all passed."""
    failed = []
    for finding in findings:
        say(str(finding))
        if not finding.passed:
            failed.append(finding)
    say()
    say(f"{len(failed)} of the checks failed: {'; '.join(f.name for f in failed)}." if failed else "All checks passed.")
    if failed:
        say("Please report this output together with the line of versions above.")
    return not failed
