"""A section of the bench: its figures, what they are judged by, and what went wrong."""

from __future__ import annotations

import contextlib
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from atlas_rl.bench.gpu.machine import Machine
from atlas_rl.bench.gpu.plan import Plan

TRACE_LINES = 6
GRACE = 45.0
"""Seconds that a part may run over its section's time."""


@dataclass(kw_only=True)
class Section:
    name: str
    machine: Machine
    plan: Plan
    deadline: float
    copy_rate: Callable[[], float]
    """Measured bytes per second of a copy, read and written."""
    save: Callable[[dict[str, Any]], None]
    """Called with what there is after every part."""
    results: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.perf_counter()

    def part(self, name: str, run: Callable[[], Any], needs: float = 1.0) -> Any:
        """Run a part that takes about so many seconds and keep what it returns; what it raises is written down."""
        if self.seconds_left < needs:
            self.skipped[name] = f"no time left: {max(0.0, self.seconds_left):.0f} s of about {needs:.0f} s"
            say(f"  {self.name}: {name} skipped, {self.skipped[name]}")
            return None
        start = time.perf_counter()
        try:
            with _time_limit(self.seconds_left + GRACE):
                result = run()
                self.machine.synchronize()  # what fails on the device belongs to the part that launched it
        except Exception as error:
            self.errors[name] = last_lines(error)
            say(f"  {self.name}: {name} raised {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            self.machine.release()
            self.save(self.to_dict())
            return None
        self.results[name] = result
        self.save(self.to_dict())
        say(f"  {self.name}: {name} {time.perf_counter() - start:.1f} s")
        return result

    def judge(self, what: str, measured: float | None, target: float, *, at_least: bool = True) -> None:
        """Hold a figure against its target; None or NaN passes none."""
        known = measured is not None and math.isfinite(measured)
        passed = known and (measured >= target if at_least else measured <= target)
        verdict = "not measured" if measured is None else "passed" if passed else "missed"
        sign = ">=" if at_least else "<="
        self.checks.append({"what": what, "target": f"{sign} {target:g}", "measured": measured, "verdict": verdict})

    def to_dict(self) -> dict[str, Any]:
        return {"results": self.results, "checks": self.checks, "errors": self.errors, "skipped": self.skipped}


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what waits for another thread for ever; again and again, as it may wait for its end too."""

    def interrupt(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 20.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def last_lines(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return "\n".join(lines[-TRACE_LINES:])


def say(text: str) -> None:
    print(text, flush=True)
