"""The one error that decoding raises about a file."""

from __future__ import annotations


class MediaError(ValueError):
    """A file that is not served.

    The message is meant for whoever sent the file: it names what is wrong and, where a limit is
    exceeded, the limit and the value. It never holds a path or the text of a trace.
    """
