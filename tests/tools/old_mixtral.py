"""Write a Mixtral GGUF as llama.cpp's convert.py did in December 2023: `python tests/tools/old_mixtral.py NEW OLD`.

One tensor an expert, which the `gguf` package still writes; and only the keys of that time: neither the vocabulary's
size, nor a head's width, nor the pre-tokenizer, nor a sliding window. In a float16 file the router is float16, too, as
every matrix was. Streams from the mapping, so that a file of any size takes little memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

_LATER = ("vocab_size", "attention.key_length", "attention.value_length", "attention.sliding_window")


def write_old_mixtral(source: Path, target: Path, *, router: bool = True, split: int = 0) -> Path:
    """Write `source`, a file with stacks of experts, to `target`, and return that.

    router: of a float16 file as float16, which rounds it; False: as it is. split: tensors of a part of a split file; 0:
    one file.
    """
    reader = gguf.GGUFReader(source)
    later = {*(f"llama.{key}" for key in _LATER), "tokenizer.ggml.pre", "general.quantization_version"}
    writer = gguf.GGUFWriter(target, "llama", split_max_tensors=split)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in later:
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=element)
    f16 = any(tensor.tensor_type == gguf.GGMLQuantizationType.F16 for tensor in reader.tensors)
    for tensor in reader.tensors:
        if "_exps." in tensor.name:
            for expert, matrix in enumerate(tensor.data):
                name = tensor.name.replace("_exps.", f".{expert}.")
                writer.add_tensor(name, matrix, raw_dtype=tensor.tensor_type)
        elif f16 and router and ".ffn_gate_inp." in tensor.name:
            writer.add_tensor(tensor.name, tensor.data.astype(np.float16))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path)
    options = parser.parse_args()
    write_old_mixtral(options.new, options.old)


if __name__ == "__main__":
    main()
