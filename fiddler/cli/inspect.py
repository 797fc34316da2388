"""The command `inspect`: prints what a model file says about itself. Reads no tensor data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fiddler.cli.options import check_local

__all__ = ["inspect"]


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", readable=False, help="Model to inspect.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's architecture, sizes, tensors and tokenizer, without reading tensor data."""
    check_local(model)
    from fiddler.files.inspection import describe, to_text

    description = describe(model)
    from fiddler.kernels import available_tiers, choose_tier

    tiers = [tier.name for tier in available_tiers()]
    description["kernels"] = {"runs": choose_tier().name, "available": tiers}
    if as_json:
        import json

        print(json.dumps(description, indent=2))
    else:
        print(to_text(description))
