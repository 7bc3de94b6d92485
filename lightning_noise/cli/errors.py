"""Errors of a configuration in a few lines.

A value may match one of several types. jsonargparse reports for each type, at each depth, why the value does not match.
:func:`shorten` follows the report to its one cause.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from lightning_noise._usage import nearest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
else:
    ArgumentParser = object  # the package can do without jsonargparse

__all__ = ["ShortErrors", "shorten"]

_KEY = re.compile(r'Parser key "(.+?)":')
_CLASS = re.compile(r"Problem with given class_path '(.+?)':")
_FILE = re.compile(r"- Expected a (?:config )?path .*\n- ")  # a value may also be the path of a file
_CALLABLE = re.compile(r"(?s)Type .+? expects a function or a callable class: (.+?)(?:\.? Got value: .*)?$")
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes\nSubtypes: \[(?P<types>.*)\]\n"
    r"(?s:Errors:\n(?P<errors>.*)\nGiven value type: .*?\nGiven value: (?P<value>.*))"
)
_MISMATCH = re.compile(r"Expected |Not a valid subclass of |Import path |Subclasses are disabled|Dict must")
_UNKNOWN = re.compile(r"(?:Option|Validation failed: Key) '(\w+)' is not (?:accepted|expected)")
_LONGEST = 100  # characters of a value


class ShortErrors(ArgumentParser):
    """A mixin for parsers of jsonargparse that reports an error in a few lines, without the usage.

    If a constructor refuses a value, that is an error of the configuration, too. With the environment variable
    ``JSONARGPARSE_DEBUG`` the errors are those of jsonargparse.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:  # an inner parser, whose error the outer one reports
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        usage = parser.format_usage()
        subcommands = re.findall(r"\w+", "".join(re.findall(r"{([\w,]+)} \.\.\.", usage)))
        program = [parser.prog.replace(" [options]", ""), *[word for word in sys.argv[1:2] if word in subcommands]]
        cause = _find_cause(message)
        option = f"--{cause.place[0]}.help={cause.classes[0]}" if cause.classes else "--help"
        text = _explain(cause, re.findall(r"--([\w.]+)", usage))
        self.exit(2, f"error: {text}\nFor help, type: {' '.join([*program, option])}\n")

    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().instantiate_classes(*args, **kwargs)
        except ValueError as error:
            if not _UNION.match(str(error)) or not _refuses(error):
                raise  # a bug needs its traceback
            self.error(str(error), error)


def shorten(message: str) -> str:
    """Returns the cause in an error message of jsonargparse: where it is, what is wrong, and what to type.

    Example:
        >>> print(shorten('''Parser key "trainer.callbacks":
        ...   Problem with given class_path 'lightning_noise.noise.Impulse':
        ...     Option 'lo' is not accepted'''))
        trainer.callbacks, Impulse: Option 'lo' is not accepted; did you mean 'low'? (the arguments of Impulse are low, high)
    """
    return _explain(_find_cause(message))


class _Cause(NamedTuple):
    """What is wrong, and where.

    Attributes:
        place: The keys and classes on the way there.
        classes: The paths of these classes.
        text: What is wrong.
        rank: 2, or 1 if a value matches none of several types, or 0 if a value does not match a type.
        types: The types of the value.
        value: The value.
    """

    place: tuple[str, ...]
    classes: tuple[str, ...]
    text: str
    rank: int = 2
    types: str = ""
    value: str = ""


def _find_cause(message: str, place: tuple[str, ...] = (), classes: tuple[str, ...] = ()) -> _Cause:
    message = _FILE.sub("", textwrap.dedent(message).strip())
    if match := _KEY.match(message):
        return _find_cause(message[match.end() :], (*place, match[1]), classes)
    if match := _CLASS.match(message):
        path = () if _object(match[1]) is None else (match[1],)
        names = (name.split(".")[-1] for name in path)
        return _find_cause(message[match.end() :], (*place, *names), (*classes, *path))
    if match := _CALLABLE.match(message):
        return _find_cause(match[1], place, classes)
    if match := _UNION.match(message):
        word = re.search(r"Expected a dot import path string: (.+)", match["errors"])
        value = word[1] if word else match["value"]  # the item of a list, if the value is a list
        text = f"expected {_readable(match['types'])}; got {_cut(_readable(value))}"
        mismatch = _Cause(place, classes, text, 1, match["types"], value)
        causes = [_find_cause(error, place, classes) for error in _items(match["errors"])]
        return max(mismatch, *causes, key=lambda cause: (len(cause.place), cause.rank))
    if _MISMATCH.match(message):
        return _Cause(place, classes, _cut(_readable(message)), 0)
    return _Cause(place, classes, message)


def _items(errors: str) -> list[str]:
    """Returns the items of a list, whose further lines are indented."""
    return ["  " + item for item in re.split(r"(?m)^- ", textwrap.dedent(errors))[1:]]


def _readable(text: str) -> str:
    """Returns types and values as people write them."""
    text = text.split("\nSubclass types expect")[0].replace(". Got value: ", "; got ")
    for pattern, replacement in {
        r"Not a valid subclass of|Expected an? (?=<class|typing)": "expected ",
        r"Expected a dot import path string:": "expected a class; got",
        r"<class '([\w.]+)'>": r"\1",
        r"[\w.]*\bCallable\[(?:\.\.\.|\[[^]]*\]), [\w.]+\]": "a function",
        r"\b(?:[a-z_]\w*\.)+(?=[A-Z])": "",  # modules
        r"NoneType": "null",
        r", null$": " or null",
        r"NestedArg\(key='(.+?)', val='?(.*?)'?\)": r"\1=\2",
        r"Namespace": "",
    }.items():
        text = re.sub(pattern, replacement, text)
    return text


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _explain(cause: _Cause, options: Collection[str] = ()) -> str:
    return ", ".join(cause.place) + ": " * bool(cause.place) + cause.text + _advise(cause, options)


def _advise(cause: _Cause, options: Collection[str]) -> str:
    """Returns what to type instead, as the end of the sentence."""
    if (match := _UNKNOWN.match(cause.text)) and cause.classes:
        if match[1] == "class_path":
            return "; write the arguments of a class under init_args"
        names = list(inspect.signature(_object(cause.classes[-1])).parameters)
        found = (
            f"the arguments of {cause.place[-1]} are {', '.join(names)}" if names else f"{cause.place[-1]} takes no arguments"
        )
        return f"{_suggest(match[1], names)} ({found})"
    if match := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", cause.text):
        return _suggest(match[2], dir(sys.modules.get(match[1])))
    if match := re.match(r"(?:unrecognized arguments: --|.+ does not accept option ')([\w.]+)", cause.text):
        return _suggest(match[1], options)
    if cause.value.startswith("{") and "'class_path'" not in cause.value:
        return "; write class_path: … and init_args: {…}"
    classes = map(_object, re.findall(r"[\w.]+\.\w+", cause.types))
    return _suggest(cause.value, {each.__name__ for kind in classes if isinstance(kind, type) for each in _subclasses(kind)})


def _object(path: str) -> Any:
    """Returns what a path stands for, if its module is imported."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _subclasses(kind: type) -> Iterator[type]:
    yield kind
    for child in kind.__subclasses__():
        yield from _subclasses(child)


def _suggest(word: str, names: Iterable[str]) -> str:
    near = nearest(word, names, 0.75)
    return f"; did you mean {near!r}?" if near else ""


def _refuses(error: BaseException) -> bool:
    """Returns whether an error, or that from which it was raised first, says that a value is wrong."""
    if error.__cause__ is not None:
        return _refuses(error.__cause__)
    return isinstance(error, ValueError | TypeError) or type(error).__name__ == "MisconfigurationException"
