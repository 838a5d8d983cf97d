"""The part of the Hugging Face Hub's HTTP API that loading and pushing models uses, on loopback and in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class NotHereError(Exception):
    """A 404 whose X-Error-Code makes huggingface_hub raise its own error."""

    def __init__(self, code: str, message: str, commit: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.commit = commit


class Repo:
    """Commits by hash, each the full content, and the branches that name them."""

    def __init__(self) -> None:
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: Files) -> str:
        content = repr((len(self.commits), sorted(files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise NotHereError("RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class HubServer:
    """A Hub for one `with` block, at `url`; processes started with `environment` speak to it.

    Whoever writes needs a token, as on the Hub: any will do. All files are uploaded as regular ones, which the server
    is the one to decide: none goes through LFS or Xet.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        """Method and path of each request so far."""
        self.me: dict[str, Any] = {"role": "write", "orgs": {}}
        """What every token may do, and its owner's roles in organisations by their names."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(self, repo_id: str, folder: str | Path, revision: str = "main") -> str:
        """A new commit on that branch with the files of `folder`, and its hash; the repository is made if need be."""
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.repos.setdefault(repo_id, Repo()).commit(revision, files)

    def files(self, repo_id: str, revision: str = "main") -> Files:
        """Content of the files by their path, at a branch or commit."""
        repo = self.repo(repo_id)
        return repo.commits[repo.resolve(revision)]

    def environment(self, home: str | Path, offline: bool = False) -> dict[str, str]:
        """The environment of a process whose Hub is this one, with its cache under `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        mine = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1"}
        return {**kept, **mine, "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise NotHereError("RepoNotFound", "Repository not found")
        return self.repos[repo_id]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        method = "GET" if self.command == "HEAD" else self.command
        if method == "POST" and not self.headers.get("Authorization"):
            return self._send(401, {"error": "Invalid username or password."})
        for wanted, pattern, answer in ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                try:
                    return answer(self, *[unquote(group or "") for group in match.groups()])
                except NotHereError as error:
                    headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
                    if error.commit:
                        headers["X-Repo-Commit"] = error.commit
                    return self._send(404, {"error": str(error)}, **headers)
        return self._send(501, {"error": f"hub_server.py has no {method} {path}"})

    def _send(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self._send(409, {**answer, "error": "You already created this model repo"})
        self.hub.repos[repo_id] = Repo()
        return self._send(200, answer)

    def _whoami(self) -> None:
        if not self.headers.get("Authorization"):
            return self._send(401, {"error": "Invalid username or password."})
        orgs = [{"name": name, "roleInOrg": role} for name, role in self.hub.me["orgs"].items()]
        access = {"accessToken": {"displayName": "test", "role": self.hub.me["role"]}}
        return self._send(200, {"type": "user", "name": "me", "orgs": orgs, "auth": access})

    def _validate_yaml(self) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _branch(self, repo_id: str, branch: str) -> None:
        repo = self.hub.repo(repo_id)
        if branch in repo.branches:
            return self._send(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.resolve(json.loads(self.body).get("startingPoint", "main"))
        return self._send(200, {})

    def _preupload(self, repo_id: str, revision: str) -> None:
        files = self.hub.files(repo_id, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            answer = {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            if file["path"] in files:
                answer["oid"] = _git_hash(files[file["path"]])
            answers.append(answer)
        self._send(200, {"files": answers})

    def _commit(self, repo_id: str, revision: str) -> None:
        files = dict(self.hub.files(repo_id, revision))
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] != "header":
                return self._send(501, {"error": f"hub_server.py has no {operation['key']} in commits"})
        sha = self.hub.repo(repo_id).commit(revision, files)
        return self._send(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    def _info(self, repo_id: str, revision: str) -> None:
        sha = self.hub.repo(repo_id).resolve(revision or "main")
        siblings = [{"rfilename": path} for path in self.hub.files(repo_id, sha)]
        self._send(200, {"id": repo_id, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def _refs(self, repo_id: str) -> None:
        branches = self.hub.repo(repo_id).branches
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches.items()]
        self._send(200, {"branches": listed, "tags": [], "converts": []})

    def _tree(self, repo_id: str, revision: str, folder: str) -> None:
        """All files below the folder: with `recursive` as without."""
        prefix = f"{folder}/" if folder else ""
        found = {path: data for path, data in self.hub.files(repo_id, revision).items() if path.startswith(prefix)}
        if not found:
            raise NotHereError("EntryNotFound", f"{folder} does not exist on {revision}")
        listed = [
            {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)} for path, data in found.items()
        ]
        self._send(200, listed)

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha = self.hub.repo(repo_id).resolve(revision)
        files = self.hub.files(repo_id, sha)
        if path not in files:
            raise NotHereError("EntryNotFound", "Entry not found", sha)
        self._send(200, files[path], **{"X-Repo-Commit": sha, "ETag": f'"{_git_hash(files[path])}"'})


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler._create),
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/validate-yaml", _Handler._validate_yaml),
    ("POST", f"/api/models/{_REPO}/branch/([^/]+)", _Handler._branch),
    ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", _Handler._preupload),
    ("POST", f"/api/models/{_REPO}/commit/([^/]+)", _Handler._commit),
    ("GET", f"/api/models/{_REPO}(?:/revision/([^/]+))?", _Handler._info),
    ("GET", f"/api/models/{_REPO}/refs", _Handler._refs),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)/?(.*)", _Handler._tree),
    ("GET", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler._resolve),
]
