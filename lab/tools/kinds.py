"""Whether settings and arguments are of the kinds, and names among the names, that they should be.

Nothing here imports torch.
"""

import difflib
import numbers
import sys
import types
import typing
from collections.abc import Callable, Sequence

LARGEST = sys.float_info.max
WORDS = {int: "an int below 2**63", float: "a finite float", tuple: "some integers"}
WORDS |= {Callable: "a function", types.NoneType: "None"}


def require(condition: bool, message: str):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def shown(value) -> str:
    """A value in a message: short, and in one line."""
    if hasattr(value, "dtype"):
        return f"{type(value).__name__} {value.dtype} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:60] + "..."


def fits(value, hint) -> bool:
    """Whether a value is what an annotation says. Integers below 2**63, floats finite."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return any(fits(value, each) for each in inner)
    if kind is typing.Literal:
        return value in inner
    if kind is tuple:
        return isinstance(value, Sequence) and all(fits(each, inner[0]) for each in value)
    if kind in (int, float):
        number, limit = (numbers.Integral, 2**63 - 1) if kind is int else (numbers.Real, LARGEST)
        return isinstance(value, number) and not isinstance(value, bool) and abs(value) <= limit
    return callable(value) if kind is Callable else isinstance(value, kind)


def spelled(hint) -> str:
    """An annotation in words."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(spelled(each) for each in inner)
    fields = [*getattr(kind, "__dataclass_fields__", {}).values()]
    if fields and isinstance(fields[0].default, str | int):  # settings
        return f"a {kind.__name__}, such as {kind.__name__}({fields[0].name}={fields[0].default!r})"
    return WORDS.get(kind) or f"a {kind.__name__}"


def require_kind(name: str, value, hint):
    """A value is what an annotation says -> the value; a number as Python's own, a name as known.

    ValueError says what was found, and what is expected.
    """
    if typing.get_origin(hint) is typing.Literal:
        return one_of(name, value, typing.get_args(hint))
    require(fits(value, hint), f"{name} is {shown(value)}; expected {spelled(hint)}")
    for kind in (hint, *typing.get_args(hint)):
        if kind in (int, float) and isinstance(value, numbers.Real):
            return kind(value)
    return value


def require_kinds(config):
    """The fields of a dataclass hold what their annotations say."""
    for name, hint in typing.get_type_hints(type(config)).items():
        kinds, value = typing.get_args(hint), getattr(config, name)
        optional = types.NoneType in kinds  # such as `int | None`
        if optional and value is None:
            continue
        kind = kinds[0] if optional else hint
        setattr(config, name, require_kind(name, value, kind))


def require_least(config, **least):
    """Fields that are at least so much, or None."""
    for name, low in least.items():
        value = getattr(config, name)
        require(value is None or value >= low, f"{name} is {value}; it must be at least {low}")


def one_of(what: str, name: str, known) -> str:
    """The known name that is meant, whatever its case, blanks, hyphens and underscores.

    ValueError, with the nearest name, where there is no such name.

    >>> one_of("method", "Mode_Finding", ("NGD", "mode finding"))
    'mode finding'
    """
    named = {plain(option): option for option in known}
    if not isinstance(name, str) or plain(name) not in named:
        names = ", ".join(known)
        hint = did_you_mean(name, known)
        raise ValueError(f"unknown {what} {shown(name)}{hint} (there are: {names})")
    return named[plain(name)]


def some_of(what: str, text: str, known) -> list[str]:
    """The known names that a text names, with commas between them; each once, see `one_of`."""
    return list(dict.fromkeys(one_of(what, name, known) for name in text.split(",")))


def did_you_mean(name: str, known) -> str:
    """The hint that ends a message about an unknown name.

    >>> did_you_mean("choise", ["choice", "cloze"])
    '; did you mean choice?'
    """
    named = {plain(option): option for option in known}
    similar = difflib.get_close_matches(plain(name), named, 1)
    return f"; did you mean {named[similar[0]]}?" if similar else ""


def plain(name) -> str:
    """A name without what people write in several ways: case, blanks and punctuation."""
    return "".join(letter for letter in str(name).lower() if letter.isalnum())
