"""Which files of a folder are its images."""

from __future__ import annotations

from pathlib import Path

from dpnp_training.data.files import Files, OnError, Reader, list_files, with_suffix


def folder_rows(root: Path, readers: list[Reader], split: str, cache_dir: Path, on_error: OnError) -> Files:
    """The images of a folder, sub-folders included.

    Args:
        root: the folder. If it has a sub-folder named like ``split``, that is taken.
        readers: of the formats that may be there; the folder must hold files of one of them only.
        split: ``train`` stands for all files where there is no such sub-folder.
        cache_dir: where what was found is kept.
        on_error: see :class:`dpnp_training.data.files.Files`.

    Raises:
        ValueError: no file that fits, files of several formats, an unknown split, or an unreadable file.
    """
    if (root / split).is_dir():
        root = root / split
    elif split != "train":
        raise ValueError(f"split = {split!r}; {str(root)!r} has no sub-folder of that name")
    paths = list_files(root)
    if not paths:
        raise ValueError(f"source = {str(root)!r} holds no image: the folder is empty")
    found = [(reader, with_suffix(paths, reader.suffixes) if reader.suffixes else paths) for reader in readers]
    found = [(reader, files) for reader, files in found if files]
    if not found:
        suffixes = " ".join(suffix for reader in readers for suffix in reader.suffixes)
        raise ValueError(
            f"source = {str(root)!r} holds no image: none of its {len(paths)} files (the first is {paths[0]}) ends in {suffixes}"
        )
    if len(found) > 1:
        kinds = ", ".join(f"{len(files)} of {reader.format} (first: {files[0]})" for reader, files in found)
        raise ValueError(
            f"source = {str(root)!r} holds files of several formats: {kinds}; give each a folder of its own"
        )
    reader, files = found[0]
    return Files(root, files, reader, cache_dir, on_error)
