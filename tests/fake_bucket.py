"""A bucket in memory: a server that speaks enough of Cloud Storage's JSON API on loopback.

TensorStore, which writes the arrays of checkpoints, talks to it, and so does gcsfs where it is
installed. Elsewhere `MemoryBucket` stands for gcsfs, over the same objects.
"""

from __future__ import annotations

import http.server
import io
import itertools
import json
import threading
import urllib.parse
from collections.abc import Callable

import fsspec

OBJECTS: dict[str, tuple[bytes, int]] = {}  # "bucket/name" -> its content and generation
_lock, _generations, _uploads = threading.RLock(), itertools.count(1), {}


def put(name: str, content: bytes) -> int:
    with _lock:
        OBJECTS[name] = content, next(_generations)
        return OBJECTS[name][1]


def names(prefix: str) -> list[str]:
    with _lock:
        return sorted(name for name in OBJECTS if name.startswith(prefix))


class MemoryBucket(fsspec.AbstractFileSystem):
    """The part of gcsfs that is used; folders are the prefixes of names."""

    protocol = ("gs", "gcs")

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path).rstrip("/")
        if path in OBJECTS:
            found = {path: self._info(path)}
        else:
            found = {}
            for name in names(path + "/"):
                here, deeper, _ = name[len(path) + 1 :].partition("/")
                child = f"{path}/{here}"
                folder = {"name": child, "type": "directory", "size": 0}
                found[child] = folder if deeper else self._info(child)
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _info(self, path):
        content, generation = OBJECTS[path]
        return {"name": path, "size": len(content), "type": "file", "generation": generation}

    def info(self, path, **kwargs):
        path = self._strip_protocol(path).rstrip("/")
        if path in OBJECTS:
            return self._info(path)
        self.ls(path)  # raises where nothing is below it
        return {"name": path, "size": 0, "type": "directory"}

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def _rm(self, path):
        with _lock:
            OBJECTS.pop(self._strip_protocol(path), None)

    def cp_file(self, path1, path2, **kwargs):
        if self.isfile(path1):  # a folder is copied with what is in it
            put(self._strip_protocol(path2), OBJECTS[self._strip_protocol(path1)][0])

    def _open(self, path, mode="rb", **kwargs):
        if "r" in mode:
            if path not in OBJECTS:
                raise FileNotFoundError(path)
            return io.BytesIO(OBJECTS[path][0])
        return _Writing(path)


class _Writing(io.BytesIO):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def close(self) -> None:
        if not self.closed:
            put(self.path, self.getvalue())
        super().close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def _where(self) -> tuple[str, str, dict[str, str], str]:
        """(bucket, object, query, what is before them)."""
        url = urllib.parse.urlsplit(self.path)
        before, _, rest = url.path.partition("/b/")
        bucket, _, name = rest.partition("/o")
        unquote = urllib.parse.unquote
        query = dict(urllib.parse.parse_qsl(url.query))
        return unquote(bucket), unquote(name.removeprefix("/")), query, before

    def _about(self, name: str) -> dict[str, object]:
        content, generation = OBJECTS[name]
        bucket, _, key = name.partition("/")
        about = {"kind": "storage#object", "name": key, "bucket": bucket, "id": name}
        about |= {"size": str(len(content)), "generation": str(generation), "metageneration": "1"}
        return about | {"etag": str(generation), "updated": "2026-01-01T00:00:00.000Z"}

    def do_GET(self) -> None:
        bucket, key, query, _ = self._where()
        name = f"{bucket}/{key}"
        if not key and "/o" not in self.path:
            return self._json({"kind": "storage#bucket", "name": bucket})
        if not key:
            return self._list(bucket, query)
        with _lock:
            if name not in OBJECTS:
                return self._json({"error": {"code": 404, "message": "Not Found"}}, 404)
            content, generation = OBJECTS[name]
            if query.get("alt") != "media":
                return self._json(self._about(name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        about = {"x_goog_generation": str(generation), "ETag": str(generation)}
        asked = self.headers.get("Range")
        if not asked:
            return self._answer(200, content, **about)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1 if first and last else len(content), len(content))
        if start >= len(content):
            return self._answer(416)
        about["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._answer(206, content[start:stop], **about)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in names(f"{bucket}/{prefix}"):
            key = name.partition("/")[2]
            if not (query.get("startOffset", "") <= key < query.get("endOffset", "\U0010ffff")):
                continue
            here, deeper, _ = key[len(prefix) :].partition(delimiter or "\0")
            if deeper:
                prefixes.add(prefix + here + "/")
            else:
                items.append(self._about(name))
        self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def do_POST(self) -> None:
        bucket, _, query, before = self._where()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        verb = next((v for v in ("rewriteTo", "copyTo", "moveTo") if f"/{v}/" in self.path), None)
        if verb:
            return self._copy(verb)
        if "upload_id" in query:
            return self._resume(query, body)
        if "upload" not in before:
            return self._json({"kind": "storage#bucket", "name": bucket})
        kind = query.get("uploadType")
        if kind == "multipart":
            edge = body.split(b"\n", 1)[0].strip()
            _, about, content = body.split(edge, 2)[:3]
            about = json.loads(about.replace(b"\r\n", b"\n").split(b"\n\n", 1)[1])
            content = content.split(b"\n\n", 1)[1].rsplit(b"\n" + edge, 1)[0]
            return self._put(f"{bucket}/{about['name']}", content, query)
        name = query.get("name") or json.loads(body or b"{}").get("name")
        if kind == "resumable":
            with _lock:
                number = str(next(_generations))
                _uploads[number] = (f"{bucket}/{name}", bytearray())
            host = self.headers["Host"]
            place = f"http://{host}/upload/storage/v1/b/{bucket}/o?upload_id={number}"
            return self._answer(200, Location=place)
        return self._put(f"{bucket}/{name}", body, query)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._resume(self._where()[2], body)

    def _resume(self, query: dict[str, str], body: bytes) -> None:
        name, content = _uploads[query["upload_id"]]
        content += body
        if self.headers.get("Content-Range", "/0").endswith("/*"):
            return self._answer(308, Range=f"bytes=0-{len(content) - 1}")
        return self._put(name, bytes(content), query)

    def _put(self, name: str, content: bytes, query: dict[str, str]) -> None:
        with _lock:
            there = str(OBJECTS[name][1]) if name in OBJECTS else "0"
            if query.get("ifGenerationMatch", there) != there:
                return self._json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
            put(name, content)
            return self._json(self._about(name))

    def _copy(self, verb: str) -> None:
        source, target = urllib.parse.urlsplit(self.path).path.split(f"/{verb}/")
        bucket, _, key = source.partition("/b/")[2].partition("/o/")
        where, _, new = target.rpartition("o/")
        source = f"{bucket}/{urllib.parse.unquote(key)}"
        bucket = where.removeprefix("b/").strip("/") or bucket  # moveTo names none
        target = f"{bucket}/{urllib.parse.unquote(new)}"
        with _lock:
            if source not in OBJECTS:
                return self._json({"error": {"code": 404, "message": "Not Found"}}, 404)
            put(target, OBJECTS[source][0])
            if verb == "moveTo":
                del OBJECTS[source]
            return self._json({"done": True, "resource": self._about(target)} | self._about(target))

    def do_DELETE(self) -> None:
        bucket, key, _, _ = self._where()
        with _lock:
            gone = OBJECTS.pop(f"{bucket}/{key}", None)
        self._answer(204 if gone else 404)


def set_up_orbax(setattr: Callable[..., None]) -> None:
    """Orbax goes to the bucket by fsspec, where on a TPU's host it takes TensorFlow's file system
    and a client of Google's; `setattr` may be that of pytest's monkeypatch."""
    from etils.epath import gpath
    from orbax.checkpoint._src.path import gcs_utils

    setattr(gpath, "_is_tf_installed", lambda: False)
    setattr(gcs_utils, "get_bucket", lambda name: object())


def serve() -> http.server.ThreadingHTTPServer:
    """A running server; its address is http://127.0.0.1:PORT of `server_address`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
