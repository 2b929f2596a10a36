"""Command lines made from dataclasses, failures told in one line, and tables for people."""

import argparse
import ctypes
import dataclasses
import os
import shlex
import signal
import sys
import threading
import types
import typing
from contextlib import contextmanager
from pathlib import Path

from lab.tools.kinds import did_you_mean, one_of, some_of

BARS = "▁▂▃▄▅▆▇█"


class Usage(ValueError):
    """Wrong usage of a command line: exit code 2, where other failures exit with 1."""


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with the description as it is written, and room for the names of the flags."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=118)


class Parser(argparse.ArgumentParser):
    """argparse that tells an error in one line, with the nearest name for a wrong one."""

    def __init__(self, program: str, **options):
        self.flags = []  # all of them, to suggest one
        options |= {"allow_abbrev": False, "formatter_class": Help}
        super().__init__(program, **options)

    def add_argument(self, *names, group=None, **options):
        """As argparse does it, in a group of --help where one is given."""
        if group is None:
            action = super().add_argument(*names, **options)
        else:
            action = group.add_argument(*names, **options)
        self.flags += action.option_strings
        return action

    def error(self, message):
        raise Usage(f"{message} (--help lists the flags)")

    def parse(self, argv) -> dict:
        """The values of the flags. Usage names the first one that does not exist."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            kind = "flag" if name.startswith("-") else "argument"
            self.error(f"unknown {kind} {name}{did_you_mean(name, self.flags)}")
        return vars(args)


# ---- flags made from dataclasses


def add_flags(parser: Parser, *configs: type, skip=()):
    """Add a flag for every field of the dataclasses, with its help text.

    A field is annotated with type and help: `steps: Annotated[int, "optimiser steps"]`.
    A flag that is not given stays out of what `parse` returns.
    """
    for config in configs:
        # The first sentence of the docstring heads the flags.
        title = config.__doc__.split("\n")[0].split(";")[0]
        group = parser.add_argument_group(title.rstrip("."))
        hints = typing.get_type_hints(config, include_extras=True)
        for field in dataclasses.fields(config):
            if field.name not in skip:
                kind, text = typing.get_args(hints[field.name])
                add_flag(parser, group, field, kind, text)


def add_flag(parser: Parser, group, field, kind, text: str):
    """Add the flag of one field: its type is `kind`, its help `text` with the default behind it."""
    default = "none" if field.default in (None, ()) else field.default
    options = {
        "group": group,
        "default": argparse.SUPPRESS,
        "help": f"{text} [{default}]".replace("%", "%%"),
    }
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"], options["metavar"] = reader(kind)
    parser.add_argument("--" + field.name.replace("_", "-"), **options)


def reader(kind):
    """A type -> the function that reads it from a flag's text, and how --help writes the value."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return name_reader(inner), "|".join(inner)
    if origin is tuple:
        return integers, "INT,INT"
    if origin in (types.UnionType, typing.Union):  # such as `int | None`
        kinds = [option for option in inner if option is not types.NoneType]
        read, metavar = reader(kinds[0])
        return optional_reader(read), metavar
    return kind, kind.__name__.upper()


def name_reader(names, what: str = "value", several=False):
    """The function that reads one of these names, or several with commas between them."""
    known = some_of if several else one_of

    def read(text):
        try:
            return known(what, text, names)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def optional_reader(read):
    """The function that reads a value, or None from the text `none`."""

    def optional(text):
        return None if text.lower() == "none" else read(text)

    optional.__name__ = read.__name__  # argparse names it where the text is wrong
    return optional


def integers(text: str) -> tuple[int, ...]:
    """Read integers with commas between them."""
    return tuple(int(number) for number in text.split(",") if number)


def make_config(config: type, values: dict):
    """Make the dataclass of those values that are its fields. Usage where they do not fit."""
    names = {field.name for field in dataclasses.fields(config)}
    own = {name: value for name, value in values.items() if name in names}
    try:
        return config(**own)
    except (ValueError, TypeError) as error:
        raise Usage(str(error)) from error


# ---- programs


def read_first(read, text: str):
    """Read the command line by read(argv, text), of flags.py; --help or an error ends the program.

    A program does so before it imports torch, which takes seconds; its main reads it once more.
    """
    keep_freed_memory()
    with told_in_one_line(), steady_output():
        read(sys.argv[1:], text)


def keep_freed_memory():
    """Let new tensors take the memory of earlier ones, in large pages.

    Otherwise Linux gives it back, and fetches it anew page by page: a tenth of a training step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks when it is imported
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # glibc has it
            library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: keep so many free bytes
            library.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: of tensors below this size


def program(main):
    """Call main(argv) as a program. Its return value is the exit code."""
    with told_in_one_line(), steady_output() as output:
        code = main(sys.argv[1:])
    code = code or output.code
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # One of several processes: threads of torch may still hold objects of Python, and would
        # abort the process where Python ends before them. What was printed is flushed already.
        os._exit(code)
    sys.exit(code)


@contextmanager
def told_in_one_line():
    """A user's mistake (ValueError, OSError) ends the program with one line.

    `python -X dev SCRIPT` shows the traceback as well.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        if sys.flags.dev_mode:
            raise
        message = " ".join(str(error).split()) or "out of memory"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Usage) else 1)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def note(text: str):
    """Tell the user, beside the results, what was not quite as expected."""
    if os.environ.get("RANK", "0") == "0":  # of several processes the first
        print(f"note: {text}", file=sys.stderr)


def command(*words) -> str:
    """A command line that a shell takes, whatever characters its words have."""
    return shlex.join(str(word) for word in words)


class SteadyOutput:
    """Standard output. Where it is closed or full, the program goes on without it."""

    def __init__(self, stream):
        self.stream = stream
        self.code = 0  # 1: the reader did not go away, and yet could not be told everything

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.attempt(self.stream.write, text) or len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *values):
        try:
            return function(*values)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                note(f"standard output cannot be written ({error.strerror}); going on without it")
                self.code = 1
            # What the stream still holds must go somewhere when it is closed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def steady_output():
    """While it is entered, printing cannot fail. Streams that are missing lead nowhere."""
    before = sys.stdout, sys.stderr
    streams = []
    for stream in before:
        if stream is None:  # closed, as by `>&-`
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):  # Windows would refuse to print the bars
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
        streams.append(stream)
    sys.stdout, sys.stderr = output, _ = SteadyOutput(streams[0]), streams[1]
    try:
        yield output
        output.flush()
    finally:
        sys.stdout, sys.stderr = before


class Interrupt:
    """While it is entered, Ctrl-C or a termination signal only sets `asked`.

    So a training step is never cut in two. A second Ctrl-C stops at once.
    """

    asked = False

    def __enter__(self):
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # no other one gets signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# ---- tables


def table(rows, header=None, left: int = 1) -> str:
    """Rows of cells as aligned text: the first `left` columns to the left, others to the right.

    >>> print(table([["fox", 3], ["elephant", 12]], header=["animal", "n"]))
    animal     n
    --------  --
    fox        3
    elephant  12
    """
    # Every cell as text, and the width of each column.
    lines = [[str(cell) for cell in row] for row in rows]
    if header:
        lines.insert(0, [str(cell) for cell in header])
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    if header:
        lines.insert(1, ["-" * width for width in widths])

    # Every line, filled up to these widths.
    text = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        for column in range(left):
            cells[column] = line[column].ljust(widths[column])
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def bar_line(values) -> str:
    """A bar for each value, as high as its share of the largest.

    >>> bar_line([1, 2, 4, 8])
    '▂▃▅█'
    """
    largest = max(*values, 1e-12)
    levels = [int(value / largest * len(BARS)) for value in values]
    return "".join(BARS[min(level, len(BARS) - 1)] for level in levels)
