"""The entry of `fiddler` and of `python -m fiddler`: first what Ctrl-C does, then all that takes time to import."""

from __future__ import annotations

import sys

from fiddler.cli.interrupts import exit_on_interrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit."""
    exit_on_interrupt()
    sys.argv[0] = sys.argv[0].removesuffix("-python")  # usage lines and completion name the command: see bin/fiddler
    from fiddler.cli.collector import CollectorPause

    with CollectorPause():
        from fiddler.cli.app import main as run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
