r"""Draws the pages of a PDF: a process of its own, because PDFium is one big parser of strangers' files.

It is run as a script, reads the PDF from its input, and writes for each page a line of JSON and then so many
bytes of PNG. It imports nothing of this package, so that it starts at once.

    {"page": 1, "pages": 12, "bytes": 48211}\n <48211 bytes> {"page": 2, ...
"""

import io
import json
import sys

MEMORY = 2 * 2**30
"""Most bytes of address space, where the system can be told."""


def main(most_pages: int, side: int, seconds: int) -> int:
    """Draw at most so many pages, their longer sides so many px; return the exit code."""
    _bound(seconds)
    import pypdfium2 as pdfium

    out = sys.stdout.buffer
    try:
        document = pdfium.PdfDocument(sys.stdin.buffer.read())
        pages = len(document)
        for number in range(min(pages, most_pages)):
            data = _draw(document[number], side)
            head = {"page": number + 1, "pages": pages, "bytes": len(data)}
            out.write(json.dumps(head).encode() + b"\n" + data)
            out.flush()
    except pdfium.PdfiumError as error:
        out.write(json.dumps({"error": str(error)}).encode() + b"\n")
        return 1
    return 0


def _draw(page: "pdfium.PdfPage", side: int) -> bytes:  # type: ignore[name-defined]  # noqa: F821
    """Return a page as PNG on white, its longer side `side` px."""
    width, height = page.get_size()
    picture = page.render(scale=side / max(width, height, 1.0)).to_pil()
    encoded = io.BytesIO()
    picture.convert("RGB").save(encoded, format="PNG")
    return encoded.getvalue()


def _bound(seconds: int) -> None:
    """Hold this process to so many seconds of work, bounded memory, and no files."""
    try:
        import resource
    except ImportError:  # not a POSIX system; the parent's clock is left
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:4])))
