"""The one exception that users meet, and how its sentences quote what others wrote."""

from reprlib import Repr
from typing import Any

INTERRUPTED = 130  #: exit status of a command after Ctrl-C, as a shell has it


class AdamasError(RuntimeError):
    """A constraint that the user's request does not meet.

    The message is one sentence that names the constraint and the way out. The class derives from
    RuntimeError: vLLM validates its configuration inside pydantic, which would rewrap a ValueError
    into a report of several lines.
    """


def shortened(value: Any) -> str:
    """The repr of a value on one line, with the middle cut out if it is long."""
    shorten = Repr()
    shorten.maxstring = shorten.maxother = 80
    return shorten.repr(value)
