"""A stub of the Hugging Face Hub on this machine: enough of its HTTP interface for huggingface_hub 2.4.0, transformers
5.19.0 and datasets 5.2.0.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

OWNER = "someone"


class Hub:
    """Serves the directories under ``root`` (``models/someone/name``, ``datasets/someone/name``) as repositories with
    one revision, ``main``.

    Files are sent inline with the commit, never as LFS or Xet objects: a server may choose so, and these are small.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.requests, self.unknown = root, [], []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """For child processes: they read the endpoint when they import the client. ``home`` gets their caches."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_stub",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return {**os.environ, **own}

    def repository(self, name: str, kind: str = "models") -> Path:
        return self.root / kind / name

    def put(self, name: str, directory: Path, kind: str = "models") -> None:
        """Make a repository of ``directory`` without a client."""
        shutil.copytree(directory, self.repository(name, kind))

    def files(self, name: str, kind: str = "models") -> set[str]:
        root = self.repository(name, kind)
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}

    def commit(self, root: Path) -> str:
        """The name of the revision: it changes with the files."""
        parts = [f"{path}:{path.stat().st_mtime_ns}" for path in sorted(root.rglob("*"))]
        return hashlib.sha1("".join(parts).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/":
            return self.answer({})
        if path == "/api/whoami-v2":
            return self.answer(
                {"name": OWNER, "type": "user", "auth": {"type": "access_token", "accessToken": {"role": "write"}}}
            )
        if found := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|commits|refs)(?:/([^/]+))?.*)?", path
        ):
            return self.describe(*found.groups())
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(self.hub.repository(found[2], "datasets" if found[1] else "models"), found[4])
        return self.do_not_know(path)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
            self.hub.repository(name, f"{wanted.get('type') or 'model'}s").mkdir(parents=True, exist_ok=True)
            return self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(preupload|commit|paths-info)/([^/]+)", path):
            root = self.hub.repository(found[2], found[1])
            if not root.is_dir():
                return self.missing("RepoNotFound")
            if found[3] == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if found[3] == "paths-info":
                wanted = re.findall(r"paths=([^&]+)", body.decode()) or json.loads(body or b"{}").get("paths", [])
                return self.answer(
                    [self.entry(root, root / unquote(name)) for name in wanted if (root / unquote(name)).is_file()]
                )
            for line in map(json.loads, body.splitlines()):
                target = root / line["value"].get("path", "")
                if line["key"] == "file":
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
                elif line["key"] == "deletedFile":
                    target.unlink()
                elif line["key"] != "header":
                    return self.do_not_know(f"commit of {line['key']}")
            oid = self.hub.commit(root)
            return self.answer(
                {
                    "success": True,
                    "commitOid": oid,
                    "commitUrl": f"{self.hub.url}/{found[2]}/commit/{oid}",
                    "hookOutput": "",
                }
            )
        return self.do_not_know(path)

    def describe(self, kind, name, what, revision):
        root = self.hub.repository(name, kind)
        if not root.is_dir():
            return self.missing("RepoNotFound")
        oid = self.hub.commit(root)
        if revision not in (None, "main", oid):
            return self.missing("RevisionNotFound")
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        if what == "tree":
            return self.answer([self.entry(root, path) for path in files])
        if what == "commits":
            return self.answer(
                [{"id": oid, "title": "", "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}]
            )
        if what == "refs":
            return self.answer(
                {
                    "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": oid}],
                    "tags": [],
                    "converts": [],
                }
            )
        siblings = [{"rfilename": path.relative_to(root).as_posix()} for path in files]
        return self.answer(
            {
                "id": name,
                "modelId": name,
                "sha": oid,
                "private": False,
                "tags": [],
                "siblings": siblings,
                "downloads": 0,
                "likes": 0,
            }
        )

    def entry(self, root, path):
        return {
            "type": "file",
            "path": path.relative_to(root).as_posix(),
            "size": path.stat().st_size,
            "oid": _etag(path),
        }

    def send_file(self, root, name):
        path = root / name
        if not root.is_dir():
            return self.missing("RepoNotFound")
        if not path.is_file():
            return self.missing("EntryNotFound", {"X-Repo-Commit": self.hub.commit(root)})
        return self.answer(
            path.read_bytes(),
            {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": self.hub.commit(root), "Accept-Ranges": "bytes"},
        )

    def missing(self, code, headers=()):
        return self.answer({"error": code}, {"X-Error-Code": code, **dict(headers)}, status=404)

    def do_not_know(self, path):
        self.hub.unknown.append(f"{self.command} {path}")
        return self.answer({"error": "not in the stub"}, status=501)

    def answer(self, content, headers=(), status=200):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **dict(headers),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()
