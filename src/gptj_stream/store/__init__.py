"""Where the layers live, and how they come and go."""

from gptj_stream.store.file_home import FileHome
from gptj_stream.store.home import Home, MemoryHome, PassiveHome
from gptj_stream.store.store import ResidentStore, Store, state_parts

__all__ = ["FileHome", "Home", "MemoryHome", "PassiveHome", "ResidentStore", "Store", "state_parts"]
