"""A run that is killed (SIGKILL) in the middle, in a process of its own."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

from metazo.steplog.writer import StepLog


def killed_at(step: int, run: Callable[[Path], object], out: Path) -> None:
    """Take the run in `out` until the record of `step` is written, and kill it there."""
    pid = os.fork()
    if pid == 0:
        try:
            append = StepLog.append

            def killing(self, record):
                append(self, record)
                if record.step == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            StepLog.append = killing  # type: ignore[method-assign]
            run(out)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # whatever happens: the child must not go on with the other tests
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
