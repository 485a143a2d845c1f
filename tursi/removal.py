"""Removing a folder that somebody hostile may have filled. Standard library only."""

# ruff: noqa: PTH106
# Because pathlib knows no folders by descriptor, and is slow to import.

import os

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str) -> None:
    """Remove the folder ``path`` and all that is in it; raises ``OSError`` where that can't be.

    Nothing is followed, and it takes two descriptors and no deeper a stack however
    deep the folders are: what is below is moved up before it is removed. Nobody
    else may write into it any more.
    """
    top = os.open(path, _FOLDER)
    # A name that is there already could be of a folder that isn't empty.
    prefix, moved = os.urandom(8).hex(), 0
    try:
        while folders := _empty(top):
            for name in folders:
                below = _open(name, top)
                try:
                    for child in _empty(below):
                        # To move a folder is to write into it.
                        os.chmod(child, 0o700, dir_fd=below)
                        moved += 1
                        os.rename(child, f"{prefix}-{moved}", src_dir_fd=below, dst_dir_fd=top)
                finally:
                    os.close(below)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(path)


def _open(name: str, folder: int) -> int:
    os.chmod(name, 0o700, dir_fd=folder)
    return os.open(name, _FOLDER, dir_fd=folder)


def _empty(folder: int) -> list[str]:
    """Unlink everything but the folders in it, which are the answer."""
    with os.scandir(folder) as found:
        entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
    for name, is_folder in entries:
        if not is_folder:
            os.unlink(name, dir_fd=folder)
    return [name for name, is_folder in entries if is_folder]
