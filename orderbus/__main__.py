"""`python -m orderbus` is the same as the command `orderbus`."""

from orderbus.cli import main

if __name__ == "__main__":
    main()
