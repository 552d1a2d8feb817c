"""Rust source as tokens without comments and literals: enough to find paths and keywords, not a parser."""

import re
from pathlib import Path
from typing import NamedTuple

_LEXEMES = re.compile(
    r"""
      (?P<line_comment>//[^\n]*)
    | (?P<block_comment>/\*)
    | (?P<raw_string>b?c?r(?P<hashes>\#*)"(?s:.*?)"(?P=hashes))
    | (?P<string>[bc]?"(?:\\(?s:.)|[^"\\])*")
    | (?P<char>b?'(?:\\(?:x[0-9a-fA-F]{2}|u\{[^}]*\}|.)|[^'\\\n])')
    | (?P<lifetime>'[A-Za-z_]\w*)
    | (?P<word>(?:r\#)?[A-Za-z_]\w*)
    | (?P<number>\d[\w.]*)
    | (?P<path_separator>::)
    | (?P<mark>[^\s])
    """,
    re.VERBOSE,
)
_SKIPPED = {"line_comment", "raw_string", "string", "char", "lifetime", "number"}


class Token(NamedTuple):
    text: str
    line: int


def tokens_of(source: str) -> list[Token]:
    """Words, `::` and punctuation of `source`, each with its line (from 1)."""
    found, at, line = [], 0, 1
    while match := _LEXEMES.search(source, at):
        line += source.count("\n", at, match.start())
        end = match.end()
        if match.lastgroup == "block_comment":
            end = _end_of_block_comment(source, match.start())
        elif match.lastgroup not in _SKIPPED and match.group("hashes") is None:
            found.append(Token(match.group(), line))
        line += source.count("\n", match.start(), end)
        at = end
    return found


def _end_of_block_comment(source: str, at: int) -> int:
    depth = 0
    for mark in re.compile(r"/\*|\*/").finditer(source, at):
        depth += 1 if mark.group() == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(source)


def rust_files(folder: Path) -> list[Path]:
    """Every .rs file under `folder`, sorted; none if the folder is missing."""
    return sorted(path for path in folder.rglob("*.rs") if "target" not in path.relative_to(folder).parts)
