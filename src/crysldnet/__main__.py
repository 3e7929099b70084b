"""Run the command line as ``python -m crysldnet``."""

from crysldnet.cli import main

if __name__ == "__main__":
    main()
