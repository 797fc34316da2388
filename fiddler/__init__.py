"""Run Mixture-of-Experts language models larger than the GPU, unquantised.

    import fiddler
    engine = fiddler.load("mixtral.gguf")
    print(engine.generate("Once upon a time", fiddler.Sampling(temperature=0.0), max_tokens=64).text)

Names are imported when first used: `import fiddler` itself is quick.
"""

from __future__ import annotations

import os.path

TYPE_CHECKING = False  # typing takes 2 ms, in which Ctrl-C gives a traceback
if TYPE_CHECKING:
    from fiddler.chat import Chat
    from fiddler.converters import convert
    from fiddler.engine import Engine
    from fiddler.errors import FiddlerError
    from fiddler.generation.beam_search import Beam
    from fiddler.generation.completion import Completion
    from fiddler.generation.request import Request
    from fiddler.loading import load
    from fiddler.sampling.constraint import Constraint
    from fiddler.sampling.sampler import Sampling

__all__ = [
    "Beam",
    "Chat",
    "Completion",
    "Constraint",
    "Engine",
    "FiddlerError",
    "Request",
    "Sampling",
    "convert",
    "load",
]
__version__ = "0.1.0"

_here = os.path.dirname(__file__)  # noqa: PTH120  # pathlib takes longer to import
if not os.path.isdir(os.path.join(_here, "kernels")):  # noqa: PTH112, PTH118
    __path__.append(os.path.dirname(_here))  # noqa: PTH120  # a clone: three rooms stand beside this one, not inside it

_MODULES = {
    "Beam": "fiddler.generation.beam_search",
    "Chat": "fiddler.chat",
    "Completion": "fiddler.generation.completion",
    "Constraint": "fiddler.sampling.constraint",
    "Engine": "fiddler.engine",
    "FiddlerError": "fiddler.errors",
    "Request": "fiddler.generation.request",
    "Sampling": "fiddler.sampling.sampler",
    "convert": "fiddler.converters",
    "load": "fiddler.loading",
}


if not TYPE_CHECKING:  # a type checker would take it for any name, misspelt ones too

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            from importlib import import_module

            return getattr(import_module(_MODULES[name]), name)
        raise AttributeError(f"module 'fiddler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
