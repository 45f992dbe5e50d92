"""``python -m isohub``: the command line, for where no script was installed. Side: caller."""

from isohub.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
