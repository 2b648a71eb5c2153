"""The one exception that users meet, and how its sentences quote what others wrote."""

import re
from reprlib import Repr
from typing import Any

from pydantic import ValidationError

LONGEST = 200  #: characters of what another program said that a sentence quotes
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


def reason(error: Exception) -> str:
    """The first sentence of an exception, on one line; of pydantic's report the first argument and what is wrong."""
    text = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        named = f"{first['loc'][0]}={shortened(first['input'])}, " if first["loc"] else ""
        text = named + first["msg"].removeprefix("Value error, ")
    text = " ".join(text.split()) or type(error).__name__
    return re.split(r"[.!?:] +(?=[A-Z])|\.$", text)[0][:LONGEST]
