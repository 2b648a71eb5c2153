"""The one exception that users meet."""


class AdamasError(RuntimeError):
    """A constraint that the user's request does not meet.

    The message is one sentence that names the constraint and the way out. The class derives from
    RuntimeError: vLLM validates its configuration inside pydantic, which would rewrap a ValueError
    into a report of several lines.
    """
