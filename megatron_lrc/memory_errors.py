"""Memory that ran out, told from other errors without torch: its libraries have no error class in common."""

#: In what they say: CUDA and NCCL, the CPU's allocator, cuBLAS.
_SIGNS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
#: What follows in torch's message is advice about its allocator, which the commands have set.
_ADVICE = "If reserved but unallocated memory is large"


def is_out_of_memory(error: BaseException) -> bool:
    is_one = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    return is_one or isinstance(error, MemoryError)


def cause_of(error: BaseException) -> str:
    """What the library says of it, in a line: how much was wanted, and how much there is."""
    return " ".join(str(error).partition(_ADVICE)[0].split()).rstrip(".") or type(error).__name__
