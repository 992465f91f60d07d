"""A model hub on the loopback interface: enough of the Hub's HTTP API for the unmodified `huggingface_hub` client.

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "-c", script], env=hub.client_env(tmp_path))
        hub.files("tester/model")     # path -> bytes at the head of main

Small files travel inside the commit, weights through Git LFS (batch, upload, verify) and back through a redirect, as
on the Hub. Everything is kept in memory. Writing needs the token, reading does not.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from hub_store import Commit, Entry, Refused, Repo, described, through_lfs


class LoopbackHub:
    def __init__(self, user: str = "tester", token: str = "hf_loopback") -> None:
        self.user, self.token = user, token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS: sha256 -> content
        self.requests: list[tuple[str, str, int]] = []  # method, path, status: what the client really asked for
        self.lock = threading.Lock()
        self.open = threading.Event()  # while it is clear, every request waits
        self.open.set()
        self.gone = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def storage(self) -> str:
        """Where weights are stored: the same server under another host name, since the client takes a file's size and
        hash from a redirect only when it leads away from the Hub."""
        return f"http://localhost:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.gone = True  # for connections that clients keep alive
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def client_env(self, home: Path, token: str | None = None, **extra: str) -> dict[str, str]:
        """Environment of a client process: this server is its Hub, and the user's own login and cache are not seen.

        Xet is switched off because its storage protocol is not HTTP + JSON; the client then uses Git LFS.
        """
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token if token is None else token}
        env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
        return env | extra

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repos[repo_id].at(revision)
        assert commit is not None, f"no revision {revision} in {repo_id}"
        return {path: entry.content for path, entry in commit.tree.items()}


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"  # the client keeps connections alive

    def log_message(self, *args: Any) -> None:
        pass  # requests are recorded in hub.requests, not printed

    # --- plumbing ---------------------------------------------------------------------------------------------------

    def _body(self) -> bytes:
        """The request's body; uploads of file objects come chunked, without a length."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _dispatch(self) -> None:
        body = self._body()
        self.hub.open.wait()
        if self.hub.gone:
            self.close_connection = True
            return
        path = urlsplit(self.path).path
        try:
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    with self.hub.lock:
                        return answer(self, body, *(unquote(group or "") for group in match.groups()))
            raise Refused(404, f"{self.command} {path}: not part of this server's API")
        except Refused as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            self._json({"error": str(error)}, error.status, {"X-Error-Message": str(error), **code})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _need_token(self) -> None:
        if not self._authorized():
            raise Refused(401, "Invalid username or password.")

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._authorized()):
            raise Refused(401 if not self._authorized() else 404, "Repository not found", "RepoNotFound")
        return repo

    def _commit_at(self, repo_id: str, revision: str) -> Commit:
        commit = self._repo(repo_id).at(revision or "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- who, repositories -------------------------------------------------------------------------------------------

    def whoami(self, body: bytes) -> None:
        self._need_token()
        token = {"accessToken": {"displayName": "loopback", "role": "write"}, "type": "access_token"}
        self._json({"type": "user", "name": self.hub.user, "fullname": self.hub.user, "orgs": [], "auth": token})

    def create(self, body: bytes) -> None:
        self._need_token()
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repos[repo_id] = Repo(private=bool(private))
        self._json({"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self, body: bytes) -> None:
        """Metadata at the top of a model card must be a YAML mapping, or the Hub does not accept the README."""
        content = json.loads(body)["content"]
        block = re.match(r"\s*---\n(.*?)\n---", content, re.DOTALL)
        try:
            valid = block is None or isinstance(yaml.safe_load(block[1]), dict)
        except yaml.YAMLError:
            valid = False
        if not valid:
            return self._json({"errors": [{"message": "metadata is not a YAML mapping"}], "warnings": []}, 400)
        missing = [] if block else [{"message": "empty or missing yaml metadata in repo card"}]
        self._json({"errors": [], "warnings": missing})

    # --- writing -----------------------------------------------------------------------------------------------------

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        self._need_token()
        tree = self._commit_at(repo_id, revision).tree
        answers = []
        for file in json.loads(body)["files"]:
            lfs = through_lfs(file["path"], file["size"])
            there = tree.get(file["path"])
            oid = None if there is None else there.sha256 if there.lfs else there.blob_id
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        self._need_token()
        self._repo(repo_id)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                at = f"{self.hub.storage}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": at}, "verify": {"href": f"{at}/verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, f"content does not hash to {oid}")
        self.hub.objects[oid] = body
        self._send(200, b"")

    def lfs_verify(self, body: bytes, oid: str) -> None:
        claim = json.loads(body)
        if len(self.hub.objects.get(oid, b"")) != claim["size"] or claim["oid"] != oid:
            raise Refused(404, f"object {oid} of {claim['size']} bytes was not uploaded")
        self._json({})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        self._need_token()
        repo, parent = self._repo(repo_id), self._commit_at(repo_id, revision)
        if revision not in repo.branches:
            raise Refused(412, f"a commit needs a branch, got {revision}")
        tree, summary = dict(parent.tree), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    summary = value["summary"]
                case "file":
                    tree[value["path"]] = Entry(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise Refused(400, f"{value['path']} points to {value['oid']}, which was not uploaded")
                    tree[value["path"]] = Entry(self.hub.objects[value["oid"]], lfs=True)
                case "deletedFile":
                    tree.pop(value["path"], None)
                case "deletedFolder":
                    tree = {
                        path: e for path, e in tree.items() if not path.startswith(value["path"].rstrip("/") + "/")
                    }
                case key:
                    raise Refused(400, f"unknown operation {key}")
        ids = "".join(f"{path}:{entry.blob_id};" for path, entry in sorted(tree.items()))
        oid = hashlib.sha1(f"{parent.oid} {len(repo.commits)} {summary} {ids}".encode()).hexdigest()
        repo.commits.append(Commit(oid, summary, tree))
        repo.branches[revision] = oid
        self._json({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

    # --- reading -----------------------------------------------------------------------------------------------------

    def model_info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        commit = self._commit_at(repo_id, revision)
        info: dict[str, Any] = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit.oid, "tags": []}
        info |= {"author": repo_id.split("/")[0], "private": self._repo(repo_id).private, "downloads": 0, "likes": 0}
        self._json(info | {"siblings": [{"rfilename": path} for path in commit.tree]})

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str = "") -> None:
        tree = self._commit_at(repo_id, revision).tree
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        inside = [path for path in tree if path.startswith(prefix)]
        if prefix and not inside:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        files = [path for path in inside if recursive or "/" not in path[len(prefix) :]]
        folders = {path[: i.start()] for path in inside for i in re.finditer("/", path) if i.start() >= len(prefix)}
        folders = {name for name in folders if recursive or "/" not in name[len(prefix) :]}
        listed = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        self._json(listed + [described(path, tree[path]) for path in sorted(files)])

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit_at(repo_id, revision)
        entry = commit.tree.get(path)
        base = {"X-Repo-Commit": commit.oid}
        if entry is None:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._send(404, b"Entry not found", base | message)
        if not entry.lfs:
            return self._send(200, entry.content, base | {"ETag": f'"{entry.blob_id}"'})
        linked = {"X-Linked-Size": str(len(entry.content)), "X-Linked-Etag": f'"{entry.sha256}"'}
        self._send(302, b"", base | linked | {"Location": f"{self.hub.storage}/lfs/{entry.sha256}"})

    def lfs_get(self, body: bytes, oid: str) -> None:
        if oid not in self.hub.objects:
            raise Refused(404, f"no object {oid}")
        self._send(200, self.hub.objects[oid], {"ETag": f'"{oid}"'})


_ID = "([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{_ID}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{_ID}/commit/([^/]+)", _Handler.commit),
    ("POST", f"/{_ID}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", "/lfs/([0-9a-f]{64})/verify", _Handler.lfs_verify),
    ("GET", f"/api/models/{_ID}", _Handler.model_info),
    ("GET", f"/api/models/{_ID}/revision/([^/]+)", _Handler.model_info),
    ("GET", f"/api/models/{_ID}/tree/([^/]+)(/.*)?", _Handler.tree),
    ("GET HEAD", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET HEAD", "/lfs/([0-9a-f]{64})", _Handler.lfs_get),
]
