"""What a file is, by its first bytes: names can be wrong, and most kinds of files begin with their own mark."""

from __future__ import annotations

import codecs
import re
import struct

HEAD_BYTES = 1 << 16
"""How much of a file is looked at."""

READABLE = ("gzip", "bzip2", "xz", "zstd", "parquet", "arrow file", "arrow stream", "npy")
"""Kinds with a mark that are read; everything else with one is refused by its description."""

_MARKS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x5d\x00\x00", "xz"),  # the older form, .lzma
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow file"),
    (b"\xff\xff\xff\xff", "arrow stream"),
    (b"\x93NUMPY", "npy"),
    (b"FEA1", "a file of Feather's first version, which is no longer read: write it again as version 2 (or Parquet)"),
    (b"PARE", "an encrypted Parquet file"),
    (b"Obj\x01", "an Avro file: convert it to Parquet or JSON lines"),
    (b"ORC", "an ORC file: convert it to Parquet"),
    (b"%PDF", "a PDF document: extract its text first"),
    (b"{\\rtf", "an RTF document: save it as plain text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document: save it as plain text"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it, and give the folder"),
    (b"Rar!\x1a\x07", "a RAR archive: unpack it, and give the folder"),
    (b"\x04\x22\x4d\x18", "compressed with lz4: unpack it with 'lz4 -d'"),
    (b"\x1f\x9d", "compressed with compress (.Z): unpack it first"),
    (b"\x89LZO", "compressed with lzop: unpack it first"),
    (b"SQLite format 3\x00", "an SQLite database: export the table with the texts"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file: write its texts as JSON lines, or its ids as .npy"),
    (b"GGUF", "a GGUF model"),
    (b"\x7fELF", "a program (ELF)"),
    (b"\xca\xfe\xba\xbe", "compiled code"),
    (b"\xcf\xfa\xed\xfe", "a program (Mach-O)"),
    (b"\x00asm", "compiled code (WebAssembly)"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"OggS", "an Ogg audio file"),
    (b"fLaC", "a FLAC audio file"),
    (b"ID3", "an MP3 audio file"),
    (b"\x1aE\xdf\xa3", "a Matroska video"),
    (b"WARC/", "a web archive (WARC): extract its texts first"),
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer, not the file itself: run 'git lfs pull'"),
)
_TEXT_MARKS = (b"%PDF", b"\\rtf", b"WARC/", b"/spec/")
"""Marks of kinds whose whole content may be text. Other marks made of letters count only before something that is not
text: a story may begin with ORC.
"""
_UTF16 = "UTF-16 text: convert it to UTF-8, for instance with 'iconv -f UTF-16 -t UTF-8'"
_UTF32 = "UTF-32 text: convert it to UTF-8, for instance with 'iconv -f UTF-32 -t UTF-8'"
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b\b")) + b"\x7f"
_PICKLE = re.compile(rb"\x80[\x02-\x05].", re.DOTALL)


def kind_of_bytes(head: bytes) -> str:
    """What begins with these bytes: `text`, `empty`, one of `READABLE`, or a description of what it is instead.

    A description is the end of a sentence that begins with "is", and says what to do where that is known.
    """
    if not head:
        return "empty"
    for mark, kind in _MARKS:
        if head.startswith(mark) and (mark.endswith(_TEXT_MARKS) or not (mark.isascii() and _is_utf8(head))):
            return kind
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"):
        return _kind_of_zip(head)
    return _kind_without_mark(head)


def _kind_of_zip(head: bytes) -> str:
    if b".npy" in head:
        return "a .npz archive of arrays: save the array of token ids as .npy"
    if b"/data.pkl" in head:
        return "a file of torch.save: save its token ids as .npy (numpy.save)"
    if any(mark in head for mark in (b"[Content_Types].xml", b"word/", b"mimetype")):
        return "an Office document, a book or the like (a zip archive of XML): save it as plain text"
    return "a zip archive: unpack it, and give the folder"


def _kind_without_mark(head: bytes) -> str:
    """Kinds whose mark is not at the beginning, or looks like something else; otherwise text, or binary data."""
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return _UTF32
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _UTF16
    if head[1:4] == b"\x2a\x4d\x18" and head[:1] in b"PQRSTUVWXYZ[\\]^_":
        return "zstd"  # with a frame in front that is skipped, as pzstd writes it
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it, and give the folder"
    if head[:4] == b"RIFF" and head[8:12] in (b"WAVE", b"WEBP", b"AVI "):
        return "an audio, image or video file (RIFF)"
    if head[:1] == b"\x00" and head[4:8] == b"ftyp":
        return "a video or image file (MP4)"
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 32:
        return "a safetensors file: save its token ids as .npy"
    if _PICKLE.match(head):
        return "a pickle, which is never opened, as it can run code: save the texts as JSON lines, or ids as .npy"
    return _text_or_binary(head)


def _text_or_binary(head: bytes) -> str:
    n_zeros = head.count(0)
    if n_zeros * 4 > len(head) > 3 and not _is_binary(head.replace(b"\x00", b"")):
        even, odd = head[::2].count(0), head[1::2].count(0)
        if max(even, odd) > 8 * min(even, odd):
            return _UTF16
        if 0.6 < n_zeros / len(head) < 0.8:
            return _UTF32
    return "binary data, not text" if _is_binary(head) else "text"


def _is_utf8(head: bytes) -> bool:
    """Whether it is text; its last character may be cut off."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return not _is_binary(head)


def _is_binary(head: bytes) -> bool:
    """Whether there are control characters that text does not have: NUL bytes, or many others."""
    n_controls = len(head) - len(head.translate(None, _CONTROLS))
    return n_controls * 50 > len(head) or head.count(0) * 1000 > len(head)
