"""What all tests need of the process they run in."""

import signal

# Where the suite is started in the background, the shell has it ignore SIGINT, and so would every child: a test that
# interrupts one needs the default back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
