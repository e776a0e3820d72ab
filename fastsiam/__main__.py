"""`python -m fastsiam`: the same as the command `fastsiam`."""

from fastsiam.cli import main

main()
