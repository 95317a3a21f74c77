"""The key that every site's folder holds, for tests that need a folder and no network."""

from __future__ import annotations

from pathlib import Path

from security.private_files import make_private_folder, write_private_file


def give_key(folder: Path) -> None:
    """Put a file where a site's node key lies; to whoever does not speak to a network it is just a secret."""
    make_private_folder(folder / "keys")
    if not (folder / "keys" / "node.key").exists():
        write_private_file(folder / "keys" / "node.key", b"a key")
