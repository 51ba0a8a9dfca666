"""Errors that a user can act on: what, where, why, and one thing to try."""

import difflib
from collections.abc import Iterable

LONGEST = 1000  # characters of a problem


class GazeError(Exception):
    """A problem of the user's input or files. The command line prints it without a traceback.

    problem: what is wrong, where and why, in a sentence or two; cut where a file's own words make it too long.
    hint: one thing to try, or "".
    """

    def __init__(self, problem: str, hint: str = ""):
        problem = problem if len(problem) <= LONGEST else f"{problem[:LONGEST]}..."
        super().__init__(f"{problem}\n  try: {hint}" if hint else problem)
        self.problem = problem
        self.hint = hint


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint that names the choice most like `name`, then all choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}choices: {', '.join(choices)}"
