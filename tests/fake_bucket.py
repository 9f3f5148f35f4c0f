"""A bucket in memory: a local server for the part of Cloud Storage's JSON API that is used.

TensorStore, which writes the arrays of checkpoints, connects to it, and so does gcsfs if it is
installed. If not, `MemoryBucket` takes the place of gcsfs, over the same objects.
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

OBJECTS: dict[str, tuple[bytes, int]] = {}  # "bucket/name" -> (content, generation)
_lock, _generations, _uploads = threading.RLock(), itertools.count(1), {}


def put(name: str, content: bytes) -> int:
    with _lock:
        OBJECTS[name] = content, next(_generations)
        return OBJECTS[name][1]


def names(prefix: str) -> list[str]:
    with _lock:
        return sorted(name for name in OBJECTS if name.startswith(prefix))


class MemoryBucket(fsspec.AbstractFileSystem):
    """The part of gcsfs that is used; the prefixes of names are its folders."""

    protocol = ("gs", "gcs")

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path).rstrip("/")
        if path in OBJECTS:
            entries = {path: self._info(path)}
        else:
            entries = {}
            for name in names(path + "/"):
                child_name, is_folder, _ = name[len(path) + 1 :].partition("/")
                child = f"{path}/{child_name}"
                folder = {"name": child, "type": "directory", "size": 0}
                entries[child] = folder if is_folder else self._info(child)
        if not entries:
            raise FileNotFoundError(path)
        return list(entries.values()) if detail else list(entries)

    def _info(self, path):
        content, generation = OBJECTS[path]
        return {"name": path, "size": len(content), "type": "file", "generation": generation}

    def info(self, path, **kwargs):
        path = self._strip_protocol(path).rstrip("/")
        if path in OBJECTS:
            return self._info(path)
        self.ls(path)  # raises if nothing is below it
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
        if self.isfile(path1):  # a folder exists as soon as a file in it does
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

    def _parse_url(self) -> tuple[str, str, dict[str, str], str]:
        """Returns (bucket, object, query, path before them) of the request."""
        url = urllib.parse.urlsplit(self.path)
        before, _, rest = url.path.partition("/b/")
        bucket, _, name = rest.partition("/o")
        unquote = urllib.parse.unquote
        query = dict(urllib.parse.parse_qsl(url.query))
        return unquote(bucket), unquote(name.removeprefix("/")), query, before

    def _resource(self, name: str) -> dict[str, object]:
        """Returns an object's description, as the API has it."""
        content, generation = OBJECTS[name]
        bucket, _, key = name.partition("/")
        return {
            "kind": "storage#object",
            "name": key,
            "bucket": bucket,
            "id": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "etag": str(generation),
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def do_GET(self) -> None:
        bucket, key, query, _ = self._parse_url()
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
                return self._json(self._resource(name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        headers = {"x_goog_generation": str(generation), "ETag": str(generation)}
        byte_range = self.headers.get("Range")
        if not byte_range:
            return self._answer(200, content, **headers)
        first, _, last = byte_range.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1 if first and last else len(content), len(content))
        if start >= len(content):
            return self._answer(416)
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._answer(206, content[start:stop], **headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in names(f"{bucket}/{prefix}"):
            key = name.partition("/")[2]
            if not (query.get("startOffset", "") <= key < query.get("endOffset", "\U0010ffff")):
                continue
            child_name, is_folder, _ = key[len(prefix) :].partition(delimiter or "\0")
            if is_folder:
                prefixes.add(prefix + child_name + "/")
            else:
                items.append(self._resource(name))
        self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def do_POST(self) -> None:
        bucket, _, query, before = self._parse_url()
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
            boundary = body.split(b"\n", 1)[0].strip()
            _, resource, content = body.split(boundary, 2)[:3]
            resource = json.loads(resource.replace(b"\r\n", b"\n").split(b"\n\n", 1)[1])
            content = content.split(b"\n\n", 1)[1].rsplit(b"\n" + boundary, 1)[0]
            return self._put(f"{bucket}/{resource['name']}", content, query)
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
        self._resume(self._parse_url()[2], body)

    def _resume(self, query: dict[str, str], body: bytes) -> None:
        name, content = _uploads[query["upload_id"]]
        content += body
        if self.headers.get("Content-Range", "/0").endswith("/*"):
            return self._answer(308, Range=f"bytes=0-{len(content) - 1}")
        return self._put(name, bytes(content), query)

    def _put(self, name: str, content: bytes, query: dict[str, str]) -> None:
        with _lock:
            generation = str(OBJECTS[name][1]) if name in OBJECTS else "0"
            if query.get("ifGenerationMatch", generation) != generation:
                return self._json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
            put(name, content)
            return self._json(self._resource(name))

    def _copy(self, verb: str) -> None:
        source, target = urllib.parse.urlsplit(self.path).path.split(f"/{verb}/")
        bucket, _, key = source.partition("/b/")[2].partition("/o/")
        target_bucket, _, new_key = target.rpartition("o/")
        source = f"{bucket}/{urllib.parse.unquote(key)}"
        bucket = target_bucket.removeprefix("b/").strip("/") or bucket  # moveTo names none
        target = f"{bucket}/{urllib.parse.unquote(new_key)}"
        with _lock:
            if source not in OBJECTS:
                return self._json({"error": {"code": 404, "message": "Not Found"}}, 404)
            put(target, OBJECTS[source][0])
            if verb == "moveTo":
                del OBJECTS[source]
            return self._json(
                {"done": True, "resource": self._resource(target)} | self._resource(target)
            )

    def do_DELETE(self) -> None:
        bucket, key, _, _ = self._parse_url()
        with _lock:
            removed = OBJECTS.pop(f"{bucket}/{key}", None)
        self._answer(204 if removed else 404)


def set_up_orbax(setattr: Callable[..., None]) -> None:
    """Makes Orbax reach the bucket by fsspec.

    Otherwise it would use TensorFlow's file system and a client of Google's, as on a TPU's host.
    `setattr` may be that of pytest's monkeypatch.
    """
    from etils.epath import gpath
    from orbax.checkpoint._src.path import gcs_utils

    setattr(gpath, "_is_tf_installed", lambda: False)
    setattr(gcs_utils, "get_bucket", lambda name: object())


def serve() -> http.server.ThreadingHTTPServer:
    """Starts a server at http://127.0.0.1:PORT, with the port of its `server_address`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
