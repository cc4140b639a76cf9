"""Seeded damage to the contents of files: flipped bits, cuts, deep nesting, huge numbers, values of other kinds."""

import json
import random
from typing import Any

_NUMBERS = [0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**18, -(2**40)]
_VALUES: list[Any] = [
    *(None, True, False, "", "x", "\0", "../x", "\ud800", [], {}, [None], [[]], {"": None}, 1e308, -1.5, 1e-320),
    *_NUMBERS,
    *(10**40, "9" * 400, ["x"] * 3, {"a": {"b": [1, {"c": None}]}}),
]
_LITERALS = ["1e999", "-1e999", "NaN", "Infinity", "1" * 5000, "[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500]


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Somewhere in the first kilobytes as often as not, since headers are there."""
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        end = min(len(found), rng.choice([16, 256, 4096, len(found)]))
        place = rng.randrange(end) if end else 0
        kind = rng.randrange(6)
        if kind < 2 and found:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            size = rng.choice([4, 8])
            found[place : place + size] = (rng.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == 3:
            del found[place : place + rng.choice([1, 8, 1000, len(found)])]
        elif kind == 4:
            found[place:place] = rng.randbytes(rng.choice([1, 4, 100]))
        else:
            found[place:place] = found[place : place + rng.choice([1, 16, 500])]
    return bytes(found)


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """One value or name of it for another; or its text, at any place."""
    if rng.random() < 0.25:
        return damage_bytes(rng, content)
    values = json.loads(content)
    for _ in range(rng.choice([1, 1, 3])):
        values = _with_another_value(rng, values)
    text = json.dumps(values)
    if rng.random() < 0.15:
        words = [word for word in ("null", "true", "false", "0", "1") if word in text]
        text = text.replace(rng.choice(words), rng.choice(_LITERALS), 1) if words else rng.choice(_LITERALS)
    return text.encode(errors="surrogatepass")


def _with_another_value(rng: random.Random, values: Any) -> Any:
    places = list(_places(values))
    if not places or rng.random() < 0.03:
        return rng.choice(_VALUES)
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "\0", "../x", key + "x"])] = holder.pop(key)
    elif kind == 2:
        holder[key] = rng.choice(places)[0]
        if _is_a_ring(values):
            holder[key] = None
    else:
        holder[key] = rng.choice(_VALUES)
    return values


def _places(value: Any, depth: int = 0) -> Any:
    """(holder, key) of all values within; of long lists and tables some, so that others are met as well."""
    if isinstance(value, (dict, list)) and depth < 50:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:20]:
            yield value, key
            yield from _places(value[key], depth + 1)


def _is_a_ring(values: Any) -> bool:
    try:
        return len(json.dumps(values)) > 10**7
    except (ValueError, RecursionError):
        return True


def damage_text(words: list[str]) -> Any:
    """Of a language with these words: bytes, or a few words put in, doubled or nested deeply."""

    def damage(rng: random.Random, content: bytes) -> bytes:
        if rng.random() < 0.4:
            return damage_bytes(rng, content)
        text = content.decode()
        for _ in range(rng.choice([1, 2, 5])):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(words) * rng.choice([1, 1, 1, 3, 20_000]) + text[place:]
        return text[:2_000_000].encode(errors="surrogatepass")

    return damage
