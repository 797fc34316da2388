"""Architectures, one file each, and what runs them. Knows torch and shapes; not where experts or linears run.

`config.py` and the table of architectures need neither torch nor numpy, so importing this room is cheap.
"""

from fiddler.models.architecture import Architecture
from fiddler.models.mixtral import MIXTRAL

__all__ = ["ARCHITECTURES", "MIXTRAL", "Architecture"]

ARCHITECTURES: dict[str, Architecture] = {each.gguf_name: each for each in (MIXTRAL,)}
"""Every architecture that runs, by its name in GGUF."""
