"""`python -m selective_dpo`: the command line, for launchers that start modules."""

from selective_dpo.cli import entry_point

if __name__ == "__main__":
    entry_point()
