"""Refuses YAML that a few lines make PyYAML follow for minutes, or until the stack or the memory ends."""

import yaml

DEEPEST, LARGEST_CHARACTERS = 50, 2_000_000  # a list of 30,000 datasets has a million and a half


def check_yaml(text: str) -> None:
    """yaml.YAMLError where a text is no YAML, nests more deeply than DEEPEST, is larger than any settings are, or has
    an alias for a list or a mapping: ten lines of these can mean 10^9 items. A value may repeat."""
    if len(text) > LARGEST_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text):,} characters, and settings have {LARGEST_CHARACTERS:,} at most")
    depth, collections = 0, set()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
        if isinstance(event, yaml.CollectionStartEvent):
            collections.add(event.anchor)
        elif isinstance(event, yaml.ScalarEvent):
            collections.discard(event.anchor)  # the name is given anew
        elif isinstance(event, yaml.AliasEvent) and event.anchor in collections:
            raise yaml.YAMLError(
                f"*{event.anchor} in line {event.start_mark.line + 1} stands for a list or a mapping; write it out"
            )
