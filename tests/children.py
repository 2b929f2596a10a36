"""Child processes, forked because importing torch takes seconds, and killed where a test wants."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

from lab.tools import cli


def program(module, line: str) -> int:
    """Call a script as a program -> its exit code."""
    sys.argv = [f"{module.__name__}.py", *line.split()]
    try:
        cli.program(module.main)
    except SystemExit as stop:
        return stop.code or 0


def child(work: Callable, fault: Callable = lambda: None) -> tuple[int, str]:
    """Work in a child process -> its exit code, below 0 if it was killed, and what it says."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        code = 99
        try:
            os.dup2(writing, 2)
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            fault()
            code = work()
            code = code if type(code) is int else 0
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with open(reading, errors="replace") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said


def kill_at(step: int):
    """kill -9 this process where, so many times, files are to be written, renamed or removed."""
    events = {"os.rename", "os.remove", "os.mkdir", "os.truncate"}
    seen = []

    def hook(event, values):
        writes = event == "open" and isinstance(values[2], int) and values[2] & 3
        if writes or event in events:
            seen.append(event)
            if len(seen) == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
