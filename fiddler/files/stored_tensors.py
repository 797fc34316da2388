"""Which tensors of a file hold those of its model. Knows names; neither shapes nor data.

llama.cpp's files from before April 2024 have a tensor for each of a Mixtral's experts, `blk.N.ffn_gate.E.weight`, in
place of the stack `blk.N.ffn_gate_exps.weight`. llama.cpp itself refuses them since.
"""

from __future__ import annotations

from collections.abc import Collection

from fiddler.errors import FileFormatError
from fiddler.models.config import Config

__all__ = ["stored_names"]


def stored_names(config: Config, tensors: Collection[str], *, tied: bool) -> dict[str, tuple[str, ...]]:
    """The tensors of the file that hold each tensor of the model: the one of that name, or one an expert of a stack.

    tensors: the names in the file, which may lack some of the result.
    Raises FileFormatError where the file has stacks and single experts, or far fewer tensors than experts.
    """
    expected = config.tensors(tied=tied)
    # of each stack, the name of a single expert's tensor
    singles = {
        name: name.replace(tensor.name, tensor.of_expert) for name, tensor in expected.items() if tensor.of_expert
    }
    of_any, found = set(singles.values()), None
    if singles:
        found = next((name for name in tensors if _of_any_expert(name) in of_any), None)
    if found is None:
        return {name: (name,) for name in expected}
    if config.expert_count * len(singles) > len(tensors):  # some are missing: the result would be large
        raise FileFormatError(f"expert_count is {config.expert_count}, but there are only {len(tensors)} tensors")
    stack = next((name for name in singles if name in tensors), None)
    if stack is not None:
        raise FileFormatError(
            f"tensor {stack} holds all experts of a layer, tensor {found} a single one; a file must have one kind of "
            "them: convert the model again"
        )
    experts = range(config.expert_count)
    return {
        name: tuple(singles[name].format(expert) for expert in experts) if name in singles else (name,)
        for name in expected
    }


def _of_any_expert(name: str) -> str:
    """The name of a single expert's tensor with `{}` in place of the expert's number."""
    parts = name.split(".")
    return ".".join((*parts[:3], "{}", *parts[4:]))
