"""The display of a running comparison: finished runs, running runs, and the time left."""

from __future__ import annotations

import time

from rich.live import Live
from rich.table import Table
from rich.text import Text

from metazo.comparisons.cell import Job
from metazo.comparisons.results import Result
from metazo.io.terminal import Console


class Progress:
    """A live table on a terminal; a line for every finished run elsewhere. Use as a context manager.

    Work is counted in forward passes, so that the estimate of the time left does not depend on the order of runs.
    """

    def __init__(self, console: Console, runs: int, forwards: float):
        self.console = console
        self.runs, self.forwards = runs, forwards  # totals, as far as known
        self.done = self.kept = self.failed = self.diverged = self.not_run = 0
        self.done_forwards = self.ran_forwards = 0.0
        self.started = time.monotonic()
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def extend(self, runs: int, forwards: float) -> None:
        """Add newly planned work to the totals."""
        self.runs += runs
        self.forwards += forwards

    def add(self, result: Result, ran: bool) -> None:
        """Count a run that was done now or (ran=False) by an earlier call, or that has no learning rate."""
        info = result.run_info
        self.done_forwards += info["budget"]
        if info["lr"] is None and info["budget"]:  # zero-shot has no budget
            self.not_run += 1
            return
        self.done += 1
        self.failed += info["status"] == "failed"
        self.diverged += info["status"] == "diverged"
        if not ran:
            self.kept += 1
            return
        self.ran_forwards += info["budget"]
        if not result.finished:
            self.console.say(info["status"], f"{self._name(info)}: {info['reason']}", "yellow")
        elif not self.live:
            metric, dev = info["metric"], result.metrics["dev"]
            score = f", {metric} {dev[metric]:.3f}" if metric in dev else ""
            loss = f"dev loss {dev['loss']:.4f}{score}" if "loss" in dev else "done"
            seconds = result.train_info["wall_seconds"]
            self.console.print(f"{self._counts()}  {self._name(info)}: {loss}  ({seconds:.0f} s)", soft_wrap=True)

    def show(self, running: list[tuple[Job, float]]) -> None:
        if self.live:
            table = Table.grid(padding=(0, 2))
            table.add_row(Text(self._counts(), "bold"), self._left())
            for job, seconds in running:
                table.add_row(Text(self._name(job.info)), f"{seconds:.0f} s")
            self.live.update(table)

    def _counts(self) -> str:
        odd = {"failed": self.failed, "diverged": self.diverged}
        return f"{self.done}/{self.runs} runs" + "".join(f", {n} {what}" for what, n in odd.items() if n)

    def _left(self) -> str:
        elapsed = time.monotonic() - self.started
        if not self.ran_forwards:
            return f"{elapsed:.0f} s"
        left = max(0.0, self.forwards - self.done_forwards) * elapsed / self.ran_forwards
        return f"{elapsed / 60:.1f} min, about {left / 60:.1f} min left"

    @staticmethod
    def _name(info: dict) -> str:
        rate = "" if info["lr"] is None else f", lr {info['lr']:g}"
        return f"{info['task']}, {info['column']}{rate}, {info['kind']} {info['seed']}"
