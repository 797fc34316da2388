"""No function is longer than 60 lines or takes more than 9 parameters, but for those listed here with a reason."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = "converters", "fiddler", "kernels", "models"
MAX_LINES, MAX_PARAMETERS = 60, 9

ONE_KERNEL = "compiled as a whole: Numba compiles a callee again with every caller, so its parts stay together"
SCALARS = "compiled code: addresses, sizes and strides go as scalars, which Numba passes in registers"
TRITON = "a Triton kernel: pointers, sizes and strides are its only kinds of argument"
INSTRUCTIONS = "writes the instructions of one tile; what it computes at the top is used down to the last line"

EXCEPTIONS = {
    "fiddler.chat.Chat.__init__": "the Python API: its parameters are its options",
    "fiddler.cli.run.run": "a command: its parameters are its options",
    "fiddler.gpu.attention_kernels._attend": TRITON,
    "fiddler.gpu.attention_kernels._attend_tile": TRITON,
    "fiddler.gpu.block_expert_kernels._down": TRITON,
    "fiddler.gpu.block_expert_kernels._up": TRITON,
    "fiddler.gpu.block_gemv._gemv": TRITON,
    "fiddler.gpu.decode_kernels._gemv": TRITON,
    "fiddler.gpu.decode_kernels._gemv_per_head": TRITON,
    "fiddler.gpu.decode_kernels._heads": TRITON,
    "fiddler.gpu.expert_kernels._down": TRITON,
    "fiddler.gpu.expert_kernels._up": TRITON,
    "fiddler.gpu.int8_activations._round_hidden": TRITON,
    "fiddler.gpu.int8_expert_kernels._down": TRITON,
    "fiddler.gpu.int8_expert_kernels._up": TRITON,
    "fiddler.gpu.int8_gemv._gemv": TRITON,
    "fiddler.gpu.kv_kernels._rotate_store": TRITON,
    "fiddler.gpu.kv_rows.read_rows": TRITON,
    "fiddler.gpu.kv_rows.write_pairs": TRITON,
    "fiddler.gpu.latent_kernels._attend_latent": TRITON,
    "fiddler.gpu.latent_kernels._merge_latent": TRITON,
    "fiddler.gpu.router_kernels._choose": TRITON,
    "fiddler.gpu.router_kernels._choose_each": TRITON,
    "fiddler.gpu.router_kernels._route": TRITON,
    "fiddler.gpu.signal_kernels._hand_over": TRITON,
    "fiddler.gpu.signal_kernels._take_sums": TRITON,
    "fiddler.loading.load": "the Python API: its parameters are its options",
    "fiddler.offload.grouped_block_kernels.down_blocks": TRITON,
    "fiddler.offload.grouped_block_kernels.up_blocks": TRITON,
    "fiddler.offload.grouped_kernels._down": TRITON,
    "fiddler.offload.grouped_kernels._up": TRITON,
    "kernels.attention.attend_each": "the way into `attend`, whose arguments these are",
    "kernels.attention_kernels._attend_group": SCALARS,
    "kernels.attention_kernels.attend": SCALARS,
    "kernels.decode.CompiledDecodeStep.__init__": "the way into `decode`, whose arguments these are",
    "kernels.decode_step.decode": ONE_KERNEL,
    "kernels.expert_ffn.expert_ffn": "the way into `grouped_products`, whose arguments these are",
    "kernels.formats.triton_words.group_dot": TRITON,
    "kernels.formats.triton_words.nibble_dots": TRITON,
    "kernels.matmul.amx_blocks.multiply_tiles": ONE_KERNEL,
    "kernels.matmul.amx_tiles.matrix_tile": INSTRUCTIONS,
    "kernels.matmul.blocks._block_product": SCALARS,
    "kernels.matmul.block_tiles.block_tile": SCALARS,
    "kernels.matmul.blocks._packed_product": SCALARS,
    "kernels.matmul.blocks._packed_product_of": SCALARS,
    "kernels.matmul.blocks._row_product": SCALARS,
    "kernels.matmul.blocks._row_product_of": SCALARS,
    "kernels.matmul.decoded_blocks.multiply_blocks": SCALARS,
    "kernels.matmul.decoded_blocks.multiply_decoded": SCALARS,
    "kernels.matmul.dot_blocks.multiply_dots": SCALARS,
    "kernels.matmul.dot_tiles._generate_tile": INSTRUCTIONS,
    "kernels.matmul.dot_tiles.dot_tile": SCALARS,
    "kernels.matmul.epilogues.store_hidden": SCALARS,
    "kernels.matmul.grouped._take_tasks": SCALARS,
    "kernels.matmul.grouped.grouped_products": ONE_KERNEL,
    "kernels.matmul.grouped.run": "the way into `grouped_products`, whose arguments these are",
    "kernels.matmul.int8_blocks.multiply_int8": SCALARS,
    "kernels.matmul.int8_tiles.int8_tile": SCALARS,
    "kernels.matmul.outer_blocks.multiply_outer": SCALARS,
    "kernels.matmul.outer_blocks.multiply_outer_floats": SCALARS,
    "kernels.matmul.outer_tiles.outer_tile": INSTRUCTIONS,
    "kernels.norm_router._route": SCALARS,
    "kernels.token_layer._divide_and_compute": "those of `grouped_products`, and what divides the layer",
}
"""Function -> why it is longer or takes more."""


def functions(node, name):
    """Every function in a syntax tree, with its name; a method's `self` is no parameter of it."""
    for child in ast.iter_child_nodes(node):
        inner = (
            f"{name}.{child.name}" if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else name
        )
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            a = child.args
            named = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p is not None]
            parameters = len(named) - (named[:1] in (["self"], ["cls"]))
            yield inner, child.end_lineno - child.lineno + 1, parameters
        yield from functions(child, inner)


def too_large():
    found = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            if "demo" in path.parts:
                continue  # scripts that were run once
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for name, lines, parameters in functions(ast.parse(path.read_text(encoding="utf-8")), module):
                if lines > MAX_LINES or parameters > MAX_PARAMETERS:
                    found[name] = f"{lines} lines, {parameters} parameters"
    return found


def test_functions_are_short_and_take_few_parameters():
    new = {name: size for name, size in too_large().items() if name not in EXCEPTIONS}
    assert not new, f"at most {MAX_LINES} lines and {MAX_PARAMETERS} parameters: {new}"


def test_every_exception_is_still_one():
    assert EXCEPTIONS.keys() <= too_large().keys(), "shortened, moved or renamed: take it out of EXCEPTIONS"


def test_long_functions_and_long_lists_of_parameters_are_seen():
    source = "class C:\n    def f(self, a, *b, c, **d):\n        def g():\n            x = 1\n            return x\n"
    assert list(functions(ast.parse(source), "m")) == [("m.C.f", 4, 4), ("m.C.f.g", 3, 0)]
