"""Names of tasks, groups and tags in the definitions of lm-evaluation-harness, read as text.

The harness itself parses its fourteen thousand YAML files, which takes half a minute; to look for names takes a second.
"""

import re
from pathlib import Path

_NAME = r"""["']?([\w.-]+)["']?[ \t]*$"""
_DEFINITION = re.compile(rf"^(?:task|group):[ \t]*{_NAME}", re.MULTILINE)
_MENTION = re.compile(rf"^(?:tag:[ \t]*|[ \t]*-[ \t]+){_NAME}", re.MULTILINE)  # a tag, or in a list of tags or tasks


def find_names(home: Path) -> dict[str, Path]:
    """Name -> the folder of the file that defines it, or else of one that mentions it. home: of all definitions."""
    defined: dict[str, Path] = {}
    mentioned: dict[str, Path] = {}
    for file in sorted(home.rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        for found, pattern in ((defined, _DEFINITION), (mentioned, _MENTION)):
            for name in pattern.findall(text):
                found.setdefault(name, file.parent)
    return mentioned | defined
