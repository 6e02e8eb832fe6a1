"""`python -m metazo` is the command `metazo`."""

from metazo_cli.main import main

if __name__ == "__main__":
    main()
