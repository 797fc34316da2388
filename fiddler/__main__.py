"""`python -m fiddler`."""

from fiddler.cli.app import main

main()
