"""The `shapwrap` command."""

import sys


def main() -> None:
    """Entry point; says what to install where the command's own packages are missing."""
    try:
        from shapwrap.cli.app import run
    except ImportError as error:
        sys.exit(f"shapwrap: {error}. The command needs: pip install 'shapwrap[cli]'")
    run()
