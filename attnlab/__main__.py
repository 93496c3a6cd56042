"""``python -m attnlab``: the command line without an installation."""

from attnlab.cli import main

main()
