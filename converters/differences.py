"""Where llama.cpp computes a converted model otherwise than transformers, whose arithmetic is ours: lines for the user.

Read in llama.cpp's sources of October 2026: `llama-context.cpp`, `llama-graph.cpp` and `models/deepseek2.cpp`.
docs/accuracy.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator

from fiddler.models import MIXTRAL
from fiddler.models.architecture import Scoring, Window
from fiddler.models.config import Config
from fiddler.models.dbrx import DBRX
from fiddler.models.deepseek import DEEPSEEK2, GLM4_MOE
from fiddler.models.qwen import OLMOE
from fiddler.models.rope_scaling import RopeKind

__all__ = ["differences"]

_LATENT_EPSILON = 1e-6  # that transformers has, whatever config.json says


def differences(config: Config) -> Iterator[str]:
    """One line for each part of the model that llama.cpp computes otherwise, or refuses."""
    window, architecture = config.sliding_window, config.architecture
    if architecture.window is Window.EVERY_LAYER and window is not None and window < config.context_length:
        yield (
            f"llama.cpp ignores sliding_window {window} for this architecture: its output will differ "
            f"from position {window} on"
        )
    reads_norm = architecture is DEEPSEEK2 or architecture is GLM4_MOE
    if not reads_norm and config.router.renormalise is not architecture.router.renormalise:
        always = "always" if architecture.router.renormalise else "never"
        key = f"norm_topk_prob {str(config.router.renormalise).lower()}"
        if architecture is DBRX:
            key = "moe_normalize_expert_weights null"
        yield (
            f"llama.cpp {always} divides the routing weights of {architecture.name} by their sum: its output will "
            f"differ ({key})"
        )
    if architecture is OLMOE and config.clamp_kqv is not None:
        yield f"llama.cpp ignores clip_qkv {config.clamp_kqv:g} for this architecture: its output will differ"
    if architecture is OLMOE and config.head_count != config.head_count_kv:
        yield "llama.cpp does not open an OLMoE with fewer KV heads than heads"
    if config.router.groups > 1 and config.router.scoring is Scoring.SOFTMAX:
        yield (
            "llama.cpp ranks groups of experts by their two best, transformers by the best: its output will differ "
            "(topk_method 'group_limited_greedy')"
        )
    if architecture is DEEPSEEK2 and config.rms_epsilon != _LATENT_EPSILON:
        yield (
            f"llama.cpp normalises latents with rms_norm_eps {config.rms_epsilon:g}, transformers with "
            f"{_LATENT_EPSILON:g}: its output may differ"
        )
    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.kind is RopeKind.DIVISORS and architecture.gguf_name != MIXTRAL.gguf_name:
        yield f"llama.cpp does not open a {architecture.name} whose rope_type is 'llama3'"
    if scaling.kind is not RopeKind.YARN:
        return
    if not scaling.truncate:
        yield "llama.cpp ignores YaRN's truncate false: its output will differ"
    if (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
        yield "llama.cpp ignores YaRN's beta_fast and beta_slow for this architecture: its output will differ"
    if architecture is DEEPSEEK2 and (not scaling.log_multiplier or scaling.attention_factor != 1.0):
        yield "llama.cpp takes YaRN's mscale to be mscale_all_dim: its output will differ"
