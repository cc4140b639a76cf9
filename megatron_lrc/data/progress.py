"""The line that a data preparation prints now and then."""

import time
from collections.abc import Callable

from megatron_lrc.data.restart import Done
from megatron_lrc.data.writing import DatasetWriter


class Progress:
    """A line every `interval` documents: documents, tokens, MB/s of text, share of the work done and time left.

    The work is all of the files, of `total_bytes` on disk, or as much of them as gives `max_tokens`.
    """

    def __init__(
        self,
        writer: DatasetWriter,
        done: Done,
        *,
        interval: int,
        total_bytes: int,
        max_tokens: int | None,
        report: Callable[[str], None],
    ):
        self._writer, self._before, self._report = writer, done, report
        self._interval, self._total_bytes, self._max_tokens = interval, total_bytes, max_tokens
        self._share_before = self._share(done)
        self._start = time.monotonic()
        self._next = 0

    def update(self, done: Done) -> None:
        if self._writer.documents >= self._next:
            self._next = self._writer.documents + self._interval
            self._report(self.line(done))

    def line(self, done: Done) -> str:
        seconds = max(time.monotonic() - self._start, 1e-6)
        speed = (done.text_bytes - self._before.text_bytes) / seconds
        share = self._share(done)
        gained = share - self._share_before
        left = int((1 - share) / gained * seconds) if gained > 0 else 0
        return (
            f"{self._writer.documents:,} documents  {self._writer.tokens:,} tokens  {speed / 1e6:.2f} MB/s  "
            f"{100 * share:.0f}%  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )

    def _share(self, done: Done) -> float:
        of_files = done.disk_bytes / max(self._total_bytes, 1)
        of_tokens = self._writer.tokens / self._max_tokens if self._max_tokens else 0.0
        return min(max(of_files, of_tokens), 1.0)
