"""Names that become parts of paths."""

from __future__ import annotations

import re

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(NAME_PATTERN)


def parse_name(text: str) -> str:
    """Return `text` if it may be a part of a path, else raise `ValueError`.

    A name starts with a letter or a digit, so neither `..` nor a hidden file can be spelt with it,
    and holds no separator.
    """
    if not _NAME.fullmatch(text) or len(text) > 128:
        raise ValueError(
            f"expected a name of letters, digits, '.', '_' and '-' that starts with a letter or digit "
            f"(at most 128 characters), found {text!r}"
        )
    return text
