"""Paths given as options."""

from __future__ import annotations

import argparse


def path_text(text: str) -> str:
    """For `add_argument(type=...)`: `text`, if it can be a path. The rest only the system can tell."""
    if "\0" in text:
        raise argparse.ArgumentTypeError("is no path: it holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is no path: it cannot be written as UTF-8") from None
    return text
