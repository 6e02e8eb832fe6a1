"""`python -m metazo` is the command `metazo`."""

from metazo_cli.main import entry_point

if __name__ == "__main__":
    entry_point()
