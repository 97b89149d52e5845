"""What a request may load, and what not."""

from __future__ import annotations

import base64
import io
import os
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.media import MediaLoader
from vlcache_fx.serve.options import ServeOptions


def png(width: int = 6, height: int = 4, colour: tuple[int, ...] = (1, 2, 3), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), colour).save(file, format="PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def loader(**given: Any) -> MediaLoader:
    return MediaLoader(ServeOptions(("reference",), **given))


def refused(url: str, **given: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        loader(**given).load(url)
    assert caught.value.status in (400, 413)
    assert caught.value.param == "image_url"
    return caught.value


def test_data_urls() -> None:
    image = loader().load(data_url(png()))
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((6, 4), "RGB", (1, 2, 3))
    assert loader().load(data_url(png(mode="RGBA", colour=(1, 2, 3, 255)))).mode == "RGB"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@@", "no valid base64"),
        ("data:image/png;base64,AAA", "no valid base64"),
        ("data:image/png;base64,é", "no valid base64"),
        ("data:image/png;base64,", "cannot be decoded"),
        ("data:,hello", "cannot be decoded"),
        (data_url(b"no picture"), "cannot be decoded: it must be one of BMP, GIF, JPEG, PNG, WEBP"),
        (data_url(png()[:45]), "cannot be decoded"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "cannot be decoded"),
        ("/etc/passwd", "data: URLs"),
        ("etc/passwd", "data: URLs"),
        ("iVBORw0KGgo=", "data: URLs"),
        ("", "data: URLs"),
        ("ftp://host/a.png", "data: URLs"),
        ("gopher://127.0.0.1:6379/_", "data: URLs"),
        ("file:///etc/passwd", "this file is not allowed: the server's option --allow-media-folder"),
        ("FILE:///etc/passwd", "this file is not allowed"),
        ("file:/etc/passwd", "this file is not allowed"),
        ("file://host/etc/passwd", "this file is not allowed"),
        ("http://169.254.169.254/latest/meta-data", "--allow-media-host"),
        ("http://localhost/a.png", "--allow-media-host"),
        ("HTTPS://example.com/a.png", "--allow-media-host"),
        ("http://[::1]/a.png", "--allow-media-host"),
        ("http://[::1/a.png", "malformed"),
        ("http:///a.png", "--allow-media-host"),
        ("http://host:99999/a.png", "malformed port"),
    ],
)
def test_other_urls_are_refused(url: str, message: str) -> None:
    assert message in refused(url).message


def test_bytes_are_counted_before_they_are_decoded() -> None:
    url = data_url(png(40, 40))
    error = refused(url, max_image_bytes=50)
    assert (error.status, "max_image_bytes is 50" in error.message) == (413, True)
    assert loader(max_image_bytes=len(png(40, 40))).load(url).size == (40, 40)
    assert refused("data:," + "a" * 60, max_image_bytes=50).status == 413


def test_pixels_are_counted_before_they_are_decompressed() -> None:
    error = refused(data_url(png(200, 100)), max_image_pixels=19_999)
    assert (error.status, "max_image_pixels is 19999" in error.message) == (413, True)
    assert loader(max_image_pixels=20_000).load(data_url(png(200, 100))).size == (200, 100)


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_decompression_bombs_are_refused(side: int) -> None:
    """A file of some bytes that claims a picture of gigabytes; PIL itself warns or fails at these sizes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    assert refused(data_url(bomb)).status == 413


def test_files_below_allowed_folders(tmp_path: Path) -> None:
    folder, outside = tmp_path / "pictures", tmp_path / "secret.png"
    (folder / "more").mkdir(parents=True)
    for path in (folder / "more" / "a b.png", outside, tmp_path / "pictures2.png"):
        path.write_bytes(png())
    (folder / "link.png").symlink_to(outside)
    (folder / "inside.png").symlink_to(folder / "more" / "a b.png")
    os.mkfifo(folder / "pipe")
    media = loader(media_folders=(folder,))
    assert media.load(f"file://{folder}/more/a%20b.png").size == (6, 4)
    assert media.load(f"file://localhost{folder}/inside.png").size == (6, 4)
    for name in (
        "link.png",
        "../secret.png",
        "%2e%2e/secret.png",
        "more",
        "pipe",
        "none.png",
        "a\0b",
        "../pictures2.png",
    ):
        assert (
            "this file is not allowed" in refused(f"file://{folder}/{name}", media_folders=(folder,)).message
        )
    assert refused(f"file://{folder}/inside.png", media_folders=(folder,), max_image_bytes=9).status == 413


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path:
            case "/a.png":
                self._send(200, png())
            case "/big":
                self._send(200, bytes(100_000))
            case "/away":
                self._send(302, b"", Location="/a.png")
            case "/slow":
                self.send_response(200)
                self.end_headers()
                for _ in range(20):
                    time.sleep(0.05)
                    try:
                        self.wfile.write(b"a")
                    except OSError:
                        return
            case _:
                self._send(404, b"")

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_allowed_hosts(host: str) -> None:
    assert loader(media_hosts=(host,)).load(f"http://{host}/a.png").size == (6, 4)
    # A host without a port stands for the usual port of each scheme.
    assert "--allow-media-host" in refused(f"http://{host}/a.png", media_hosts=("127.0.0.1",)).message
    assert "--allow-media-host" in refused(f"http://localhost:1#@{host}/", media_hosts=(host,)).message
    for url in (
        f"http://{host}@evil/",
        f"http://evil@{host}/",
        f"http://{host}\\@evil/",
        f"http://{host}/a b",
    ):
        assert "malformed" in refused(url, media_hosts=(host,)).message
    for sign in "\t\n\r":
        assert "malformed" in refused(f"http://{host}/a{sign}.png", media_hosts=(host,)).message


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [("away", 400, "status 302"), ("none", 400, "status 404"), ("big", 413, "max_image_bytes is 1000")],
)
def test_what_hosts_answer(host: str, path: str, status: int, message: str) -> None:
    error = refused(f"http://{host}/{path}", media_hosts=(host,), max_image_bytes=1000)
    assert (error.status, message in error.message) == (status, True)


def test_slow_and_absent_hosts(host: str) -> None:
    assert "took too long" in refused(f"http://{host}/slow", media_hosts=(host,), media_timeout_s=0.2).message
    assert "does not answer" in refused("http://127.0.0.1:1/a", media_hosts=("127.0.0.1:1",)).message


def test_messages(host: str) -> None:
    def messages(*kinds: str) -> list[dict[str, Any]]:
        parts = [{"type": kind, "url": data_url(png())} for kind in kinds]
        return [{"role": "system", "content": "text"}, {"role": "user", "content": parts}]

    given = messages("image", "image")
    loader().load_all(given)
    assert [part["image"].size for part in given[1]["content"]] == [(6, 4)] * 2
    assert not any("url" in part for part in given[1]["content"])
    with pytest.raises(RequestError, match="3 pictures are too many: max_images is 2"):
        loader(max_images=2).load_all(messages("image", "image", "image"))
    for kind in ("video", "audio"):
        with pytest.raises(RequestError, match=f"{kind} is not supported"):
            loader(media_hosts=(host,)).load_all(messages(kind))
