"""Whether an error says that memory does not suffice."""

from __future__ import annotations

from accelerate.utils.memory import should_reduce_batch_size


def is_lack_of_memory(error: BaseException) -> bool:
    """Of a device or of the machine."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and should_reduce_batch_size(error))
