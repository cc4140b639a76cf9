"""Reads damaged files one after the other, with a gigabyte to grow by, and says which made a reader do what it may not.

    python tests/fuzz_process.py FOLDER [FORMATS [NUMBER]]

Lines of JSON: [format, number] before each case, and [format, number, what happened] after one that failed. Whoever
reads them ends the process when it is silent for too long. FORMATS, with commas between them, and NUMBER repeat
one case.
"""

import json
import os
import random
import resource
import sys
import traceback
import warnings
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from fuzz_formats import FORMATS, SENTENCES, Format

GROWTH_BYTES = 1 << 30
_OF_MEMORY = ("MemoryError", "allocate", "not enough memory")


def main(folder: Path, names: list[str], only: int | None) -> None:
    warnings.simplefilter("ignore")
    for name in names:
        one = FORMATS[name]
        place = folder / str(list(FORMATS).index(name))
        place.mkdir(parents=True)
        one.make(place)
        one.read(place)
        content = (place / one.file).read_bytes()
        allow_growth()
        for number in range(one.cases) if only is None else [only]:
            say([name, number])
            (place / one.file).write_bytes(one.damage(random.Random(f"{name} {number}"), content))
            if found := what_happens(one, place):
                say([name, number, found])


def allow_growth() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def what_happens(one: Format, place: Path) -> str:
    """Of a read, if it is neither right nor a sentence; "" otherwise."""
    try:
        one.read(place)
    except MemoryError as error:  # without its frames, which hold the memory
        return f"memory: {traceback.format_tb(error.__traceback__, 6)}"
    except SENTENCES as error:
        chain = "".join(traceback.format_exception(error))
        if any(words in chain for words in _OF_MEMORY):
            return f"memory: {chain[-1500:]}"
        return ""
    except BaseException:  # a library in Rust panics with one that is no Exception
        return traceback.format_exc()[-3000:]
    return ""


def say(line: list) -> None:
    print(json.dumps(line), flush=True, file=OUT)


if __name__ == "__main__":
    OUT = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no line of ours
    folder, chosen, number = [*sys.argv[1:], "", ""][:3]
    main(Path(folder), chosen.split(",") if chosen else list(FORMATS), int(number) if number else None)
