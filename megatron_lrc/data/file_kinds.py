"""What is in a file, by its name: a kind that is read, one that is known not to be, or nothing that is known.

.jsonl, .json        one object per line; also packed
.parquet             one document per row; columns are the keys (`tables.py`)
.txt                 the whole file is one document, under the first key; also packed (`packings.py`)
"""

import os

from megatron_lrc.data.packings import PACKINGS

KINDS = (".jsonl", ".json", ".parquet", ".txt")
#: What holds no JSON lines, whatever its first bytes look like: part of a file is not the file.
_OTHER_KINDS = {
    "an archive": ".7z .ar .cab .deb .iso .jar .rar .rpm .tar .tbz .tbz2 .tgz .txz .tzst .whl .zip",
    "packed in a way that is not read": ".br .lz .lz4 .lzma .lzo .snappy .sz .z",
    "a table of another kind": (
        ".arrow .avro .csv .db .duckdb .feather .h5 .hdf5 .ods .orc .sqlite .sqlite3 .tsv .xls .xlsx"
    ),
    "part of a file": ".aria2 .crdownload .download .incomplete .part .partial .tmp",
    "a file of tensors or objects": ".bin .ckpt .gguf .idx .npy .npz .onnx .pickle .pkl .pt .pth .safetensors",
    "a document that is no plain text": ".doc .docx .epub .odt .pdf .ppt .pptx .rtf",
    "no text": ".avi .bmp .flac .gif .ico .jpeg .jpg .mkv .mov .mp3 .mp4 .ogg .png .tif .tiff .wav .webm .webp",
}
_OTHER_KIND_OF = {suffix: kind for kind, suffixes in _OTHER_KINDS.items() for suffix in suffixes.split()}


def suffixes_of(path: str) -> tuple[str, str]:
    """What is in a file and how it is packed, in lower case: (".jsonl", ".gz"); "" for what the name does not say."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    return (os.path.splitext(stem)[1], suffix) if suffix in PACKINGS else (suffix, "")


def kind_of(path: str) -> str | None:
    """The suffix that says what is in a file, without its packing; None for a file of no kind that is read."""
    inner, packing = suffixes_of(path)
    return inner if inner in KINDS and not (packing and inner == ".parquet") else None


def other_kind_of(path: str) -> str | None:
    """ "an archive" and the like: what a file is that is known not to be read. None for any other."""
    inner, packing = suffixes_of(path)
    if packing and inner == ".parquet":
        return "a packed parquet file, which cannot be read in part"
    return _OTHER_KIND_OF.get(inner)


def is_hidden(path: str) -> bool:
    """As shells have it: the name begins with a dot (.cache, .ipynb_checkpoints, an editor's or a copy's own files)."""
    return os.path.basename(path).startswith(".")
