"""`python -m fiddler`."""

from fiddler.cli import main

main()
