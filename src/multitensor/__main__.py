"""`python -m multitensor` is the command `multitensor`."""

from multitensor.cli.main import main

if __name__ == "__main__":
    main()
