"""Refuses YAML in which a list or a mapping stands in several places by an alias: ten lines can mean 10^9 items."""

import yaml


def refuse_aliases(text: str) -> None:
    """yaml.YAMLError where `*name` stands for a list or a mapping, or where the text is no YAML. A value may repeat."""
    collections = set()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            collections.add(event.anchor)
        elif isinstance(event, yaml.ScalarEvent):
            collections.discard(event.anchor)  # the name is given anew
        elif isinstance(event, yaml.AliasEvent) and event.anchor in collections:
            raise yaml.YAMLError(
                f"*{event.anchor} in line {event.start_mark.line + 1} stands for a list or a mapping; write it out"
            )
