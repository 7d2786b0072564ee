"""`python -m loadstone` is the `loadstone` command."""

from loadstone.cli.app import main

if __name__ == "__main__":
    main()
