"""Refuses YAML whose nesting PyYAML would follow for minutes, or until the stack ends."""

import yaml

DEEPEST, LARGEST_CHARACTERS = 50, 2_000_000  # a list of 30,000 datasets has a million and a half


def check_yaml(text: str) -> None:
    """yaml.YAMLError where a text is no YAML, nests more deeply than DEEPEST, or is larger than any settings are."""
    if len(text) > LARGEST_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text):,} characters, and settings have {LARGEST_CHARACTERS:,} at most")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
