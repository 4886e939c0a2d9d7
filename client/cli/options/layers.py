"""Options that a file or the environment may give, too: flag, else ``FARSHORE_…``, else file, else default.

Used by ``serve``. Must not know what the options mean: a value from a file or from the environment is read as
the option would read it.
"""

import argparse
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farshore.errors import InvalidRequest
from farshore.text import quoted

PREFIX = "FARSHORE_"


class Layers:
    """The options that ``parser`` has when this object is made. Afterwards the parser sets only those that
    the command line gives; :meth:`complete` sets the others."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._actions: dict[str, argparse.Action] = {}
        self._defaults: dict[str, Any] = {}
        for action in parser._actions:
            names = [name[2:] for name in action.option_strings if name.startswith("--")]
            if not names or action.default is argparse.SUPPRESS:
                continue
            self._actions[names[0]] = action
            self._defaults[names[0]] = action.default
            # The help text names the default, which the parser no longer has.
            action.help = ((action.help or "") % {"default": action.default}).replace("%", "%%")
            action.default = argparse.SUPPRESS

    def complete(
        self, args: argparse.Namespace, *, file: Path | None, environment: Mapping[str, str]
    ) -> None:
        """Sets each option that the command line did not give, and ``args.given``: the destinations of those
        that the command line, the environment or the file gives. Raises InvalidRequest, which names the file
        or the variable and the key, for a value that the option would refuse and for an unknown key."""
        written = self._read(file) if file is not None else {}
        given = {action.dest for action in self._actions.values() if hasattr(args, action.dest)}
        for name, action in self._actions.items():
            if hasattr(args, action.dest):
                continue
            variable = PREFIX + name.replace("-", "_").upper()
            if variable in environment:
                value = _converted(action, environment[variable], variable)
            elif name in written:
                value = _converted(action, written[name], f"{file}: {name}")
            else:
                default = _converted(action, self._defaults[name], f"--{name}", is_default=True)
                setattr(args, action.dest, default)
                continue
            given.add(action.dest)
            setattr(args, action.dest, value)
        args.given = frozenset(given)

    def _read(self, file: Path) -> dict[str, Any]:
        # Imported here: the client alone is installed without it.
        import yaml

        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidRequest(f"{file}: can't be read: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{file}: not valid YAML: {' '.join(str(error).split())[:160]}") from error
        if not isinstance(content, dict):
            raise InvalidRequest(f"{file}: must hold options by name, such as `attention-workers: 4`")
        found: dict[str, Any] = {}
        for key, value in content.items():
            name = str(key).replace("_", "-")
            if name not in self._actions:
                near = difflib.get_close_matches(name, self._actions, n=1)
                hint = f"did you mean {near[0]}?" if near else f"use {', '.join(sorted(self._actions))}"
                raise InvalidRequest(f"{file}: unknown key {quoted(str(key))}: {hint}")
            found[name] = value
        return found


class WatchedFile:
    """A file whose content may change. It is read at each look: a ConfigMap's files are links that Kubernetes
    replaces."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen = self._content()

    def changed(self) -> bool:
        """Whether the content is another one than at the last look. A file that can't be read, as while it is
        replaced, has not changed."""
        before, now = self._seen, self._content()
        if now is None or now == before:
            return False
        self._seen = now
        return True

    def forget(self) -> None:
        """Makes the next look a change."""
        self._seen = None

    def _content(self) -> bytes | None:
        try:
            return self._file.read_bytes()
        except OSError:
            return None


def _converted(action: argparse.Action, value: Any, where: str, *, is_default: bool = False) -> Any:
    """``value`` as the option reads it. ``where``: its origin, for messages."""
    if is_default:
        # Like argparse: a default that is a text is read as a given one is.
        return action.type(value) if isinstance(value, str) and callable(action.type) else value
    if action.nargs == 0:
        if isinstance(value, bool) or str(value).lower() in ("true", "false", "1", "0"):
            return str(value).lower() in ("true", "1")
        raise InvalidRequest(f"{where}: {quoted(str(value))} is neither true nor false")
    if action.nargs in ("+", "*"):
        return [str(item) for item in (value if isinstance(value, list) else str(value).split())]
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    try:
        converted = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise InvalidRequest(f"{where}: {error}") from error
    if action.choices is not None and converted not in action.choices:
        raise InvalidRequest(f"{where}: {quoted(text)}: use one of {', '.join(map(str, action.choices))}")
    return converted
