"""A small Hugging Face Hub on this machine, for the real client: what it asks for, and ways to go wrong."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"


@dataclass
class Repository:
    """Commits are whole trees; ``refs`` are branches and tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        tree = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits[oid], self.refs[branch] = tree, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class FakeHub:
    """Serves repositories until :meth:`stop`.

    Attributes:
        repositories: {repo id: Repository}.
        requests: (method, path) of everything that was asked.
        cut: {file name: bytes after which the connection breaks}, at every download.
        sizes: {file name: what the Hub says is its size}.
        broken: the status with which everything is answered.
        large: endings of the names of files that go to the store for large files, as weights do on the Hub
            (`Git LFS <https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md>`_), and are fetched from there.
        store: what is there, by SHA-256.
        full: whether the store takes nothing more.
        store_tokens: what the store was told about who asks.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.broken: int | None = None
        self.large: tuple[str, ...] = ()
        self.store: dict[str, bytes] = {}
        self.full = False
        self.store_tokens: set[str] = set()
        self.connections: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # Another host, as far as clients know.
        self.store_url = f"http://localhost:{self.server.server_port}/store"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()
        for connection in list(self.connections):  # which clients keep open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def repository(self, repo_id: str, files: dict[str, bytes] | None = None, **kind: bool) -> Repository:
        repository = self.repositories[repo_id] = Repository(**kind)
        repository.commit(files or {".gitattributes": b""})
        return repository

    def downloads(self, filename: str) -> int:
        return sum(method == "GET" and path.endswith(f"/{filename}") for method, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self):
        super().finish()
        self.hub.connections.discard(self.connection)

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path)))
        self.body = self._read()
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if self.hub.broken:
            return self._json({"error": "out of order"}, self.hub.broken)
        if parts[0] == "store":
            return self._store(parts[-1])
        if self.token not in ("", WRITER, READER, STRANGER):
            return self._error(401, message="Invalid credentials in Authorization header")
        if parts[:3] == ["api", "repos", "create"]:
            return self._create()
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:])
        if parts[1:2] and parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch("/".join(parts[:2]).removesuffix(".git"))
        if parts[2:3] == ["resolve"]:
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._error(404)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # -- answers ----------------------------------------------------------------------------------------------------

    def _json(self, content: object, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **headers})

    def _error(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._json({"error": message or code}, status, **{name: text for name, text in headers.items() if text})

    def _send(self, content: bytes, status: int, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):
            self.wfile.write(content[:cut])
            self.wfile.flush()
            if cut is not None and cut < len(content):
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

    # -- what there is ----------------------------------------------------------------------------------------------

    def _repository(self, repo_id: str, write: bool = False) -> Repository | None:
        """The repository, if this token may; otherwise the answer is given."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token not in (WRITER, READER)):
            # The Hub does not tell strangers what does not exist from what they may not see.
            self._error(404 if self.token else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and self.token not in (WRITER, READER):
            self._error(403 if self.token else 401, "GatedRepo", "Access to this model is restricted")
        elif write and self.token != WRITER:
            # To those who are not logged in, the client says that there is no such repository.
            self._error(403 if self.token else 401, "" if self.token else "RepoNotFound", "You don't have the rights")
        else:
            return repository
        return None

    def _create(self) -> None:
        if self.token != WRITER:
            return self._error(403 if self.token else 401, message="You don't have the rights to create a model")
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        found = {"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id}
        if repo_id in self.hub.repositories:
            return self._json({**found, "error": "You already created this model repo"}, 409)
        self.hub.repository(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._json(found)

    def _api(self, repo_id: str, rest: list[str]) -> None:
        kind, name = rest[:2] or ("revision", "main")
        repository = self._repository(repo_id, write=self.command == "POST")
        if repository is None:
            return None
        if kind == "branch":
            if name in repository.refs:
                return self._error(409, message="Reference already exists")
            repository.refs[name] = repository.refs["main"]
            return self._json({})
        if kind == "tag":
            repository.refs[json.loads(self.body)["tag"]] = repository.resolve(name)
            return self._json({})
        commit = repository.resolve(name)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {name}")
        if kind == "revision":
            files = [{"rfilename": file} for file in repository.commits[commit]]
            return self._json({"id": repo_id, "sha": commit, "siblings": files, "private": repository.private})
        if kind == "preupload":
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            tree = repository.commits[commit]
            oids = {path: _blob_oid(tree[path]) for path in paths if path in tree}
            modes = {path: "lfs" if path.endswith(self.hub.large) and self.hub.large else "regular" for path in paths}
            mode = {"shouldIgnore": False}
            answers = [{"path": p, "oid": oids.get(p), "uploadMode": modes[p], **mode} for p in paths]
            return self._json({"files": answers})
        if kind == "commit":
            lines = [json.loads(line) for line in self.body.splitlines()]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            files |= {x["value"]["path"]: self.hub.store[x["value"]["oid"]] for x in lines if x["key"] == "lfsFile"}
            oid = repository.commit(files, name)
            url = f"{self.hub.url}/{repo_id}/commit/{oid}"
            return self._json({"success": True, "commitOid": oid, "commitUrl": url})
        return self._error(404)

    def _resolve(self, repo_id: str, revision: str, filename: str) -> None:
        repository = self._repository(repo_id)
        if repository is None:
            return None
        commit = repository.resolve(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[commit].get(filename)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if filename in self.hub.sizes:
            headers["X-Linked-Size"] = str(self.hub.sizes[filename])
        if self.hub.large and filename.endswith(self.hub.large):
            oid = hashlib.sha256(content).hexdigest()
            self.hub.store[oid] = content
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{oid}"'}
            return self._send(b"", 302, {**headers, **linked, "Location": f"{self.hub.store_url}/{filename}/{oid}"})
        return self._content(content, filename, headers)

    # -- large files ------------------------------------------------------------------------------------------------

    def _batch(self, repo_id: str) -> None:
        if self._repository(repo_id, write=True) is None:
            return None
        answers = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.store:
                answer["actions"] = {"upload": {"href": f"{self.hub.store_url}/{asked['oid']}", "header": {}}}
            answers.append(answer)
        return self._json({"transfer": "basic", "objects": answers})

    def _store(self, oid: str) -> None:
        self.hub.store_tokens.add(self.token)
        if self.command != "PUT":
            content = self.hub.store[oid]
            return self._content(content, self.path.split("/")[-2], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
        if self.hub.full:
            return self._error(507, message="no room")
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, message="other content")
        self.hub.store[oid] = self.body
        return self._json({})

    def _content(self, content: bytes, filename: str, headers: dict[str, str]) -> None:
        first = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        if int(first or 0):
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return self._send(
            content[int(first or 0) :], 206 if int(first or 0) else 200, headers, self.hub.cut.get(filename)
        )


def _blob_oid(content: bytes) -> str:
    """Git's name for the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
