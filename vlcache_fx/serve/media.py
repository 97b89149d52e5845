"""What a request may load: pictures in data URLs, and from the hosts and folders that options allow.

Bytes are counted before they are decoded, and pixels before they are decompressed.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from vlcache_fx.serve.errors import RequestError, bad_request
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.remote import fetch

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""Formats of pictures. Others have decoders that are rarely used, and rarely checked."""

PARAM = "image_url"


class MediaLoader:
    """Loads the pictures of requests. Safe in threads: it has no state.

    Args:
        options: limits, and what is allowed.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._options = options

    def load_all(self, messages: Sequence[dict[str, Any]]) -> None:
        """Replace the URLs in messages for a processor by pictures.

        Raises:
            RequestError: a picture is refused, or there are too many.
        """
        parts = list(media_parts(messages))
        if len(parts) > self._options.max_images:
            raise bad_request(
                f"{len(parts)} pictures are too many: max_images is {self._options.max_images}", PARAM
            )
        for part in parts:
            if part["type"] != "image":
                raise bad_request(f"{part['type']} is not supported: send pictures", f"{part['type']}_url")
            part["image"] = self.load(part.pop("url"))

    def load(self, url: str) -> Image:
        """Load a picture, in RGB and upright.

        Raises:
            RequestError: 400 for a URL that is not allowed or no picture, 413 for one that is too large.
        """
        return self._decode(self._read(url))

    def _read(self, url: str) -> bytes:
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return self._checked(self._from_data_url(url))
        try:
            parts = urlsplit(url)
        except ValueError:
            raise bad_request("the URL of a picture is malformed", PARAM) from None
        match scheme:
            case "http" | "https":
                return self._checked(self._from_host(url, parts))
            case "file":
                return self._checked(self._from_file(parts))
        raise bad_request(
            "pictures come as data: URLs, or from http(s) and file URLs that the server allows", PARAM
        )

    def _from_data_url(self, url: str) -> bytes:
        head, comma, data = url.partition(",")
        if not comma:
            raise bad_request("the data: URL of a picture has no comma before its data", PARAM)
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(data)
        # Four letters are three bytes: refuse before decoding.
        if len(data) // 4 * 3 > self._options.max_image_bytes + 3:
            raise self._too_many_bytes()
        try:
            return base64.b64decode(data.encode("ascii"), validate=True)
        except (binascii.Error, ValueError):
            raise bad_request("the data: URL of a picture is no valid base64", PARAM) from None

    def _from_host(self, url: str, parts: SplitResult) -> bytes:
        # Programs read such URLs in different ways: what is checked here might not be where one connects.
        if "@" in parts.netloc or any(sign <= " " or sign == "\\" for sign in url):
            raise bad_request(
                "the URL of a picture is malformed: it has a user name, spaces or backslashes", PARAM
            )
        allowed = {host.lower() for host in self._options.media_hosts}
        try:
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise bad_request("the URL of a picture has a malformed port", PARAM) from None
        usual = {"http": 80, "https": 443}[parts.scheme.lower()]
        names = {f"{host}:{port or usual}"} | ({host} if port in (None, usual) else set())
        if not host or not names & allowed:
            raise bad_request(
                "pictures of this host are not allowed: the server's option --allow-media-host names hosts",
                PARAM,
            )
        return fetch(url, self._options.max_image_bytes, self._options.media_timeout_s)

    def _from_file(self, parts: SplitResult) -> bytes:
        refusal = bad_request(
            "this file is not allowed: the server's option --allow-media-folder names folders", PARAM
        )
        if parts.netloc not in ("", "localhost"):
            raise refusal
        try:
            # With links followed, and what they lead to is what is checked and opened.
            path = Path(url2pathname(parts.path)).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise refusal from None
        if not any(path.is_relative_to(folder) for folder in self._options.media_folders):
            raise refusal
        return self._read_file(path, refusal)

    def _read_file(self, path: Path, refusal: RequestError) -> bytes:
        try:
            # Not a link that was put there meanwhile, and not a pipe that never ends.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            raise refusal from None
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise refusal
            with os.fdopen(os.dup(handle), "rb") as file:
                return file.read(self._options.max_image_bytes + 1)
        finally:
            os.close(handle)

    def _checked(self, data: bytes) -> bytes:
        if len(data) > self._options.max_image_bytes:
            raise self._too_many_bytes()
        return data

    def _too_many_bytes(self) -> RequestError:
        limit = self._options.max_image_bytes
        return RequestError(413, f"a picture is too large: max_image_bytes is {limit}", param=PARAM)

    def _decode(self, data: bytes) -> Image:
        from PIL import Image, ImageOps

        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > self._options.max_image_pixels:
                raise self._too_many_pixels()
            return ImageOps.exif_transpose(image).convert("RGB")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise self._too_many_pixels() from None
        except RequestError:
            raise
        except Exception:  # noqa: BLE001 - decoders raise errors of any kind
            kinds = ", ".join(FORMATS)
            raise bad_request(f"a picture cannot be decoded: it must be one of {kinds}", PARAM) from None

    def _too_many_pixels(self) -> RequestError:
        limit = self._options.max_image_pixels
        return RequestError(413, f"a picture has too many pixels: max_image_pixels is {limit}", param=PARAM)


def data_url(image: Image) -> str:
    """A picture as requests send it."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def media_parts(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The parts of messages that are not text."""
    for message in messages:
        if isinstance(message["content"], list):
            yield from (part for part in message["content"] if part["type"] != "text")
