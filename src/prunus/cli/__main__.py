"""`python -m prunus.cli`: the same as the command `prunus`."""

from prunus.cli import main

main()
