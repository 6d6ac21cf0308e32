"""Where the layers live. The executor and the jobs know the interface in `base` alone."""

from gptj_stream.store.base import Store
from gptj_stream.store.resident import ResidentStore

__all__ = ["ResidentStore", "Store"]
