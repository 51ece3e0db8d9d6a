"""Unpack Jane Austen's six novels from a Debian package and split them into training, validation and held-out text.

In: apt-get, which fetches r-cran-janeaustenr. Out: data/{train,validation,heldout}.bin and the excerpt heldout.txt.
Why: the byte model needs prose that anyone may use, and one novel ("Persuasion") that training never sees.
"""

import argparse
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
HELD_OUT_NOVEL = "PERSUASION"
VALIDATION_BYTES = 96 * 1024
EXCERPT_BYTES = 128 * 1024
HERE = Path(__file__).resolve().parent


def unpack_package(folder: Path) -> Path:
    """Download the package into `folder`, unpack it there without installing it, and return R's database of novels."""
    subprocess.run(["apt-get", "-qq", "download", PACKAGE], cwd=folder, check=True)
    (archive,) = folder.glob(f"{PACKAGE}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    subprocess.run(["dpkg-deb", "-f", archive, "Package", "Version", "Homepage"], check=True)
    return folder / DATABASE


def read_objects(database: bytes) -> Iterator[bytes]:
    """Yield the serialized objects of an R lazy-load database: each is a 4-byte length, then a zlib stream."""
    while database:
        (size,) = struct.unpack_from(">I", database)
        stream = zlib.decompressobj()
        item = stream.decompress(database[4:])
        if len(item) != size:
            raise ValueError(f"R database: an object has {len(item)} bytes, its header says {size}: damaged package?")
        yield item
        database = stream.unused_data


def read_lines(item: bytes) -> list[str]:
    """Decode an R character vector (XDR, version 3: R Internals, section 1.8): header, encoding, length, strings."""
    magic, version, encoding_size = item[:2], *struct.unpack_from(">I8xI", item, 2)
    offset = 18 + encoding_size
    kind, count = struct.unpack_from(">II", item, offset)
    if (magic, version, kind) != (b"X\n", 3, 16):
        raise ValueError(f"expected an R character vector (X, 3, 16), found {(magic, version, kind)}")
    offset += 8
    lines = []
    for _ in range(count):
        (size,) = struct.unpack_from(">4xI", item, offset)
        lines.append(item[offset + 8 : offset + 8 + size].decode())
        offset += 8 + size
    return lines


def read_novels(database: Path) -> dict[str, bytes]:
    """Return the novels as UTF-8 text, by their title in capitals."""
    novels = [read_lines(item) for item in read_objects(database.read_bytes())]
    return {lines[0].upper(): ("\n".join(lines).strip() + "\n").encode() for lines in novels}


def split_at_chapter(novel: bytes, at_least: int) -> tuple[bytes, bytes]:
    """Cut a novel before the first chapter that starts at or after byte `at_least`."""
    cut = novel.index(b"\nChapter ", at_least) + 1
    return novel[:cut], novel[cut:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder for the three .bin files")
    data = parser.parse_args().data
    with tempfile.TemporaryDirectory() as folder:
        novels = read_novels(unpack_package(Path(folder)))
    validation, heldout = split_at_chapter(novels.pop(HELD_OUT_NOVEL), VALIDATION_BYTES)
    excerpt = heldout[: heldout.rindex(b"\n", 0, EXCERPT_BYTES) + 1]
    parts = {"train.bin": b"\n\n".join(novels.values()), "validation.bin": validation, "heldout.bin": heldout}
    data.mkdir(parents=True, exist_ok=True)
    for path, text in {**{data / name: text for name, text in parts.items()}, HERE / "heldout.txt": excerpt}.items():
        path.write_bytes(text)
        print(f"{path}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
