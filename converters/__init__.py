"""Converts Hugging Face checkpoints to GGUF. `convert` is imported on first use: importing gguf takes half a second.

No module here may be called `convert`: importing it would replace the function of that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fiddler.converters.conversion import ConversionReport, convert

__all__ = ["ConversionReport", "convert"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fiddler.converters import conversion

    return getattr(conversion, name)
