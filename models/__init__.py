"""Architectures, one file each, and what runs them. Knows torch and shapes; not where experts or linears run.

`config.py` and the table of architectures need neither torch nor numpy, so importing this room is cheap.
"""

from fiddler.models.architecture import Architecture
from fiddler.models.dbrx import DBRX
from fiddler.models.deepseek import DEEPSEEK, DEEPSEEK2, GLM4_MOE
from fiddler.models.gpt_oss import GPT_OSS
from fiddler.models.granite import GRANITE_MOE
from fiddler.models.llama import LLAMA
from fiddler.models.mixtral import MIXTRAL
from fiddler.models.qwen import OLMOE, QWEN2_MOE, QWEN3_MOE

__all__ = ["ARCHITECTURES", "DENSE_ARCHITECTURES", "LLAMA", "MIXTRAL", "Architecture"]

ARCHITECTURES: dict[str, Architecture] = {
    each.gguf_name: each
    for each in (MIXTRAL, QWEN3_MOE, QWEN2_MOE, OLMOE, GRANITE_MOE, DEEPSEEK, DEEPSEEK2, GLM4_MOE, DBRX, GPT_OSS)
}
"""Every architecture with experts that runs, by its name in GGUF."""

DENSE_ARCHITECTURES: dict[str, Architecture] = {LLAMA.gguf_name: LLAMA}
"""Those without experts. Their names stand in both tables: a file's key `expert_count` tells which it is."""
