"""One file by plain HTTPS: resumed where it stopped, with a progress bar and a checksum."""

import hashlib
import os
import re
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from tqdm import tqdm

from data.formats import UserError

BLOCK = 2**20  # bytes read at a time


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects as usual, and keeps the checksum that only the redirect itself carries."""

    linked = None

    def redirect_request(self, request, file, code, message, headers, url):
        tag = headers.get("X-Linked-ETag", "").strip('"')
        self.linked = tag if re.fullmatch("[0-9a-f]{64}", tag) else self.linked
        return super().redirect_request(request, file, code, message, headers, url)


def fetch(url: str, path: Path, sha256: str | None = None, size: int | None = None) -> Path:
    """Download url to path, unless path is there already; returns path.

    What has arrived stands in path.partial until all of it is there, so a stopped download goes on
    where it was. It gets its name once its length and SHA-256 are right. Without `sha256` the one
    that the Hugging Face hub names for its large files (X-Linked-ETag) is taken, if the server is
    the hub; else the length alone is checked. Raises UserError, which says what to put where.
    """
    path = Path(path)
    if path.exists():
        return path
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        expected, linked = receive(url, partial, path.name)
        arrived = partial.stat().st_size
        if arrived < (expected or 0):
            raise HTTPException(f"it stopped at {arrived:,} of {expected:,} bytes")
        check(url, partial, sha256 or linked, size)
        partial.rename(path)
    except (OSError, ValueError, HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{url} could not be downloaded ({reason}): run this again, which goes on where it "
            f"stopped, or put the file at {path} by hand"
        ) from None
    return path


def receive(url: str, partial: Path, name: str) -> tuple[int | None, str | None]:
    """Append to the partial file what it lacks; the length of the whole and the hub's checksum,
    None where the server does not tell."""
    # its last byte is asked for again: past the end of a complete file there is nothing to ask for
    start = max(0, partial.stat().st_size - 1) if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "rlhf"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    redirects = Redirects()
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=30)
    except HTTPError as error:
        if error.code != 416 or not start:
            raise
        partial.unlink()  # longer than the file: it is of some other one
        return receive(url, partial, name)
    with response, open(partial, "ab") as file:
        start = start if response.status == 206 else 0  # 200: the server sends all of it
        file.truncate(start)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name) as bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    return total, redirects.linked


def check(url: str, partial: Path, sha256: str | None, size: int | None) -> None:
    """Remove a complete file that is not the one expected, and say so in a UserError."""
    digest = hashlib.sha256()
    with open(partial, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    arrived = partial.stat().st_size
    wrong = f"{arrived:,} bytes, not {size:,}" if size not in (None, arrived) else ""
    if sha256 and digest.hexdigest() != sha256.lower():
        wrong = f"SHA-256 {digest.hexdigest()}, not {sha256}"
    if wrong:
        partial.unlink()
        raise UserError(f"{url} arrived with {wrong}: another file or a damaged one, not kept")
