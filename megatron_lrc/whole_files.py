"""Text files that appear whole or not at all, whatever ends the program that writes them."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """In UTF-8; an earlier file of this name is replaced."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
