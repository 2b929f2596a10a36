"""Command lines made from dataclasses, failures told in one line, and tables for people."""

import argparse
import dataclasses
import difflib
import signal
import sys
import types
import typing

BARS = "▁▂▃▄▅▆▇█"


class Usage(ValueError):
    """Wrong usage of a command line: exit code 2, where other failures exit with 1."""


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with the description as it is written, and room for the names of the flags."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=118)


class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error, and the nearest name for a wrong one."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options, allow_abbrev=False, formatter_class=Help)

    def error(self, message):
        raise Usage(f"{message} (--help lists the flags)")

    def parse(self, argv):
        args, unknown = self.parse_known_args(argv)
        for word in unknown:
            name = word.split("=")[0]
            near = nearest(name, [flag for action in self._actions for flag in action.option_strings])
            self.error(f"unknown {'flag' if word.startswith('-') else 'argument'} {name}{near}")
        return vars(args)


def nearest(name, known) -> str:
    """The hint that ends a message about an unknown name."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def add_flags(parser: Parser, *configs: type, skip=()):
    """A flag for every field of the dataclasses, with its help text; what is not given stays out of the result."""
    for config in configs:
        group = parser.add_argument_group(config.__doc__.split("\n")[0].split(";")[0].rstrip("."))
        hints = typing.get_type_hints(config, include_extras=True)
        for field in (field for field in dataclasses.fields(config) if field.name not in skip):
            kind, text = hints[field.name].__origin__, hints[field.name].__metadata__[0]
            default = "none" if field.default in (None, ()) else field.default
            text = f"{text} [{default}]".replace("%", "%%")
            flag, options = "--" + field.name.replace("_", "-"), {"default": argparse.SUPPRESS, "help": text}
            if kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            else:
                read, shown = reader(kind)
                group.add_argument(flag, type=read, metavar=shown, **options)


def reader(kind):
    """The function that turns a flag's text into a value of this type, and how --help writes the value."""
    if typing.get_origin(kind) is typing.Literal:
        names = typing.get_args(kind)

        def read(text):
            if text in names:
                return text
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}{nearest(text, names)}")

        return read, "|".join(names)
    if typing.get_origin(kind) is tuple:

        def integers(text):
            return tuple(int(part) for part in text.split(",") if part)

        return integers, "INT,INT"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner, shown = reader(next(part for part in typing.get_args(kind) if part is not type(None)))

        def optional(text):
            return None if text.lower() == "none" else inner(text)

        optional.__name__ = inner.__name__  # argparse names it where the text is wrong
        return optional, shown
    return kind, kind.__name__.upper()


def build(config: type, values: dict):
    """The dataclass, of those values that are its fields; what does not fit together is wrong usage."""
    names = {field.name for field in dataclasses.fields(config)}
    try:
        return config(**{name: value for name, value in values.items() if name in names})
    except (ValueError, TypeError) as error:
        raise Usage(str(error)) from error


def run(main, text: str | None = None):
    """Call main(argv) as a program: its return value is the exit code, and a user's mistake is told in one line. A
    text is what --help prints, where main has no flags.

    `python -X dev SCRIPT` shows the traceback as well.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)  # Windows would refuse the bars
    if text and {"-h", "--help"} & {*sys.argv[1:]}:
        print(text)
        return
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Usage) else 1)
    except KeyboardInterrupt:
        print(f"\n{sys.argv[0]}: interrupted", file=sys.stderr)
        sys.exit(130)


class Interrupt:
    """While it is entered, Ctrl-C (or a termination signal) only sets `asked`, so that a step is never cut in two.
    A second Ctrl-C stops at once."""

    asked = False

    def __enter__(self):
        self.old = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def table(rows, header=None, left=1) -> str:
    """Rows of cells as aligned text, the first `left` columns to the left, the others to the right."""
    rows = [[str(cell) for cell in row] for row in ([header, *rows] if header else rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if header:
        rows.insert(1, ["-" * width for width in widths])
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return "\n".join("  ".join(f(*c) for f, *c in zip(align, row, widths, strict=True)).rstrip() for row in rows)


def bar_line(values) -> str:
    """A bar a value, as high as its share of the largest.

    >>> bar_line([1, 2, 4, 8])
    '▂▃▅█'
    """
    top = max(*values, 1e-12)
    return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in values)
