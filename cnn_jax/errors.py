"""The one exception that reaches the user as a sentence instead of a traceback."""


class UserError(Exception):
    """A mistake in what the user gave: `str(error)` is one line that says how to mend it.

    `main` prints the line on stderr and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """Returns what went wrong in one line; the kind of error where it has no words."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Returns `text` on one line, with escapes for what a terminal would obey or can't encode.

    File names may hold line ends, control sequences, and bytes that are no text at all.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
