#!/usr/bin/env python3
"""Packs a folder into a tar archive, compressed by LZMA: pack.py FOLDER ARCHIVE. Standard library; `cargo xtask gpu` calls it.

The binaries have most of their code in common, so the dictionary reaches over all of them: unpacking takes as much memory."""

import lzma
import os
import sys
import tarfile

DICTIONARY = 256 << 20


def main(folder, archive):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": DICTIONARY}]
    with lzma.open(archive, "wb", filters=filters) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name in sorted(os.listdir(folder)):
            tar.add(os.path.join(folder, name), arcname=name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
