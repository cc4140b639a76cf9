"""Unpickles the index of a `torch_dist` checkpoint and nothing else.

A pickle is a program for a small machine. The one here knows the instructions, classes and values that
torch.distributed.checkpoint and megatron-core write, so it cannot call anything else, change a class, or take memory
or time out of proportion to the file, as plain `pickle` can be made to even with a list of allowed classes. What passes
here does the same in plain `pickle`, which megatron-core's loader uses.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

from torch import Size
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

#: What an index is made of, by module. dtypes are names in `torch`.
_CLASSES: Mapping[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    # The plans of the ranks that wrote it, which megatron-core keeps in the index.
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}

#: The machine in Python, whose instructions can be chosen, and which type checkers do not know.
_UNPICKLER: Any = pickle._Unpickler  # type: ignore[attr-defined]

#: What pickle protocols 4 and 5 write of such objects. Left out: numbered places of a memo, of which a single one may
#: take 64 GB, byte arrays of a size to come, extensions, persistent ids.
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.SHORT_BINBYTES, pickle.BINBYTES),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.STACK_GLOBAL),
)


def unpickle_index(content: bytes) -> Any:
    """What the pickle holds. Raises whatever a damaged pickle makes its machine raise, an Exception."""
    return _Machine(io.BytesIO(content)).load()


class _Instructions(dict[int, Callable]):
    def __missing__(self, code: int) -> Callable:
        raise pickle.UnpicklingError(f"the instruction {code:#04x} does not belong there")


class _Machine(_UNPICKLER):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)

    def load_newobj(self) -> None:
        _expect(self.stack[-1] == (), "an object is made of something")
        super().load_newobj()

    def load_reduce(self) -> None:
        """Calls what `find_class` gives. With plain values only: to hash nested tuples may take exponential time."""
        function, arguments = self.stack[-2:]
        is_plain = function is _member or all(_is_plain(argument) for argument in arguments)
        _expect(is_plain, "a call with more than plain values")
        super().load_reduce()

    def load_build(self) -> None:
        """Gives an object its values. Given to a class, they would change the class."""
        owner, values = self.stack[-2:]
        _expect(is_dataclass(owner) and not isinstance(owner, type), "values are given to what has none")
        _expect(type(values) is dict or type(owner) is TensorProperties, "values have no names")
        super().load_build()

    def load_setitem(self) -> None:
        _expect(_is_name(self.stack[-2]), "an entry has no name")
        super().load_setitem()

    def load_setitems(self) -> None:
        _expect(all(map(_is_name, self.stack[::2])), "an entry has no name")
        super().load_setitems()

    dispatch = _Instructions(
        {code[0]: _UNPICKLER.dispatch[code[0]] for code in _OPCODES}
        | {pickle.NEWOBJ[0]: load_newobj, pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build}
        | {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}
    )


def _member(kind: object, name: object) -> Enum:
    """In place of getattr, by which Python up to 3.11.3 pickles the member of an enumeration."""
    _expect(isinstance(kind, type) and issubclass(kind, Enum), "getattr of something else than an enumeration")
    _expect(isinstance(name, str) and name in kind.__members__, "getattr of something else than a member")  # type: ignore
    return kind[name]  # type: ignore


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(type(item) is int for item in value)
    return type(value) in (str, int, bool, type(None))


def _is_name(key: object) -> bool:
    if type(key) is MetadataIndex:
        return type(key.fqn) is str and type(key.offset) in (Size, type(None))
    return type(key) is str


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise pickle.UnpicklingError(otherwise)
