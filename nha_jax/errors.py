"""Errors that a user can mend."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Bad input, told in one sentence that names the field, the value and the fix.

    The command-line programs print the sentence and exit with code 2.
    """


class RunFailed(Exception):
    """A run that cannot go on, told in one sentence; the command-line programs end with code 1."""


def out_of_memory(error: Exception, fix: str) -> UserError | None:
    """What a user is told of a device's error if it is one of memory; ``fix``: what needs less."""
    found = re.search(r"RESOURCE_EXHAUSTED: (.*)|out of memory.*", str(error), re.IGNORECASE)
    if found is None:
        return None
    reason = (found[1] or found[0]).removesuffix(".")
    return UserError(f"the device is out of memory ({reason}): {fix}.")


@contextlib.contextmanager
def memory_told(fix: str) -> Iterator[None]:
    """A device that is out of memory becomes ``UserError``, with what needs less."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if told := out_of_memory(error, fix):
            raise told from error
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ``" Did you mean 'x'?"``, or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known)}."
