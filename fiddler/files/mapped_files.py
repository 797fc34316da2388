"""The table of mapped model files: where each lies in memory, and the line for the user where it cannot be read.

Compiled code reads the table when a mapped file was cut short (`fiddler.files.bus_error`). Knows addresses
and names; installs nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref

import numpy as np

__all__ = ["ROWS", "add_mapping", "table_address"]

ROWS = 1024
"""Rows of the table; files beyond that are mapped all the same, and are not in it."""

_table = (ctypes.c_uint64 * (4 * ROWS))()  # of each file: begin, end, address and length of its line; begin 0: none
_lines: dict[int, bytes] = {}


def table_address() -> int:
    """Address of the table: uint64 [ROWS, 4] of begin and end of a mapping, and address and length of its line."""
    return ctypes.addressof(_table)


def add_mapping(mapping: mmap.mmap, shown_path: str) -> None:
    """List a mapping, as long as it lives. shown_path: its file for an error message, one printable line."""
    row = next((row for row in range(ROWS) if not _table[4 * row]), None)
    if row is None:
        return
    view = np.frombuffer(mapping, np.uint8)
    begin = int(view.ctypes.data)
    text = f"error: {shown_path}: was cut short while in use, or its disk failed; restore the file and start again\n"
    line = _lines[row] = text.encode("utf-8", "replace")
    address = ctypes.cast(ctypes.c_char_p(line), ctypes.c_void_p).value or 0
    page = mmap.PAGESIZE
    _table[4 * row + 1 : 4 * row + 4] = [begin + -(-view.nbytes // page) * page, address, len(line)]
    _table[4 * row] = begin  # last: from now on the row counts
    weakref.finalize(mapping, _remove, row).atexit = False


def _remove(row: int) -> None:
    _table[4 * row] = 0
    del _lines[row]
