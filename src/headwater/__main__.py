"""``python -m headwater`` is the command line too."""

from headwater.cli import main

if __name__ == "__main__":
    main()
