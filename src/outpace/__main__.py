"""`python -m outpace` is the `outpace` command."""

from .cli import main

if __name__ == "__main__":
    main()
