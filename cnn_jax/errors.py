"""The one exception that reaches the user as a sentence instead of a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input: `str(error)` is one line that says how to correct it.

    `main` prints the line on stderr and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """Returns an error's message on one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Returns `text` on one line, with escapes for characters that can't be printed.

    File names may contain line ends, control sequences, and bytes that are not text.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns " (did you mean X?)" for the most similar known word, or an empty string."""
    return did_you_mean(closest(word, known))


def closest(word: str, known: Iterable[str]) -> str:
    """Returns the known word that is most similar to `word`, or an empty string."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), "")


def did_you_mean(guess: str) -> str:
    """Returns " (did you mean GUESS?)", or an empty string without a guess."""
    return f" (did you mean {guess}?)" if guess else ""
