"""`python -m louver`: the command line."""

from louver.cli import main

if __name__ == "__main__":
    main()
