"""``python -m stillframe`` is the command line."""

from stillframe.cli import main

if __name__ == "__main__":
    main()
