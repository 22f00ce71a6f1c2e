"""Text that others wrote, such as an exception's or a file's name, made fit to be shown, sent and written.

It may hold what no encoding has (``os.fsdecode`` of a Latin-1 name gives lone surrogates), be 20 MB long, or raise.
"""

from __future__ import annotations

import traceback
from typing import Any

__all__ = ["escaped", "said", "shortened", "text_of", "traceback_of"]

_SENTENCE = 2_000
_TRACEBACK = 60_000


def escaped(value: Any) -> Any:
    """Text with its lone surrogates as ``\\udce9``; of lists, tuples and dicts what is in them; all else as it is."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {escaped(key): escaped(content) for key, content in value.items()}
    return [escaped(content) for content in value] if isinstance(value, list | tuple) else value


def shortened(text: str, most: int = _SENTENCE) -> str:
    """Text of at most about ``most`` characters: head and tail of what is longer; lone surrogates escaped."""
    if (left_out := len(text) - most) > 0:
        size = f"{left_out / 1e6:,.1f} MB" if left_out >= 1e5 else f"{left_out:,} characters"
        text = f"{text[: most - most // 3]} ... {size} left out ... {text[-(most // 3) :]}"
    return str(escaped(text))


def text_of(error: BaseException) -> str:
    """What an exception says, in a sentence or two, whatever its ``__str__`` does."""
    try:
        return shortened(str(error))
    except Exception as failed:
        return f"(its text cannot be had: __str__ raises {type(failed).__name__})"


def said(error: BaseException) -> str:
    """Type and text of an exception: ``OSError: disk gone``."""
    return f"{type(error).__name__}: {text_of(error)}"


def traceback_of(error: BaseException) -> str:
    """Its traceback with those of its causes; of a very long one, head and tail."""
    return shortened("".join(traceback.format_exception(error)), _TRACEBACK)
