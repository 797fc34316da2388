"""What a path may lead to other than a file with content: folders, pipes, devices, endless and unreadable files."""

from __future__ import annotations

import os
import socket
from pathlib import Path

KINDS = ("folder", "pipe", "socket", "zero", "sparse", "missing", "loop", "unreadable")


def replace_by(path: Path, kind: str) -> Path:
    """Put something of this kind where the path is, in place of what is there."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 64 << 30)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "unreadable":
        path.touch(0o000)  # root may read it, but in `permissions_count`
    return path
