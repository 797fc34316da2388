"""Weights of the demo model as views: their format, and sizes against the tensors' sizes in the file."""

from __future__ import annotations

from fiddler import kernels
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import mapped_experts, variant_for
from fiddler.kernels.formats.half import BF16, F16
from fiddler.loading import DEMO_MODEL

TIER = kernels.choose_tier()


def test_experts_of_a_file_know_their_format_and_sizes():
    model_file = ModelFile.open(DEMO_MODEL)
    config, tensors = model_file.config, model_file.file.tensors
    for layer, experts in enumerate(mapped_experts(model_file, TIER, exact=False)):
        names = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
        assert {experts.format.name.upper()} == {tensors[name].type for name in names}
        assert config.expert_count * experts.expert_bytes == sum(tensors[name].nbytes for name in names)
        assert config.expert_feed_forward_length * experts.hidden_row_bytes == experts.expert_bytes
        assert experts.hidden_row_bytes == 6 * config.embedding_length


def test_a_files_type_chooses_its_format_and_the_activations():
    for kind, weight_format, activations in (("BF16", BF16, "bf16"), ("F16", F16, "f32")):
        variant = variant_for(TIER, kind, exact=False)
        assert (variant.weights, variant.activations) == (weight_format.name, activations)
        assert variant_for(TIER, kind, exact=True).activations == "f32"
