#!/usr/bin/env python3
"""Packs a folder into a tar archive, compressed by LZMA: pack.py FOLDER ARCHIVE. Standard library; `cargo xtask gpu` calls it."""

import os
import sys
import tarfile


def main(folder, archive):
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for name in sorted(os.listdir(folder)):
            tar.add(os.path.join(folder, name), arcname=name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
