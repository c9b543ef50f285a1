"""Errors that a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one sentence that names the field, the value and the fix.

    The command-line programs print the sentence and exit with code 2.
    """


class RunFailed(Exception):
    """A run that cannot go on, told in one sentence; the command-line programs end with code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ``" Did you mean 'x'?"``, or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known)}."
