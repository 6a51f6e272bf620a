"""`python -m ragline`, for where the command is not on the path."""

from ragline.cli import main

main()
