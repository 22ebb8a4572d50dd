"""A small Hugging Face Hub on loopback: the requests of huggingface_hub for downloads and uploads."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers from the folders root/OWNER/NAME of models and root/datasets/OWNER/NAME of data sets."""

    root: Path
    fetched: list[str]
    created: list[dict]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer secret":
            return self.send(401, b'{"error": "Invalid credentials"}', {}, True)
        if path == "/api/repos/create":
            request = json.loads(content)
            self.created.append(request)
            self.folder(request["organization"], request["name"]).mkdir(parents=True, exist_ok=True)
            return self.send_json({"url": f"https://huggingface.co/{request['organization']}/{request['name']}"})
        _, _, _, owner, name, action, *_ = path.split("/")
        if action == "preupload":
            files = json.loads(content)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.send_json({"files": modes})
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                path = self.folder(owner, name) / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"https://huggingface.co/{owner}/{name}/commit/{self.commit}"
        return self.send_json({"success": True, "commitOid": self.commit, "commitUrl": url})

    def folder(self, owner: str, name: str) -> Path:
        return self.root / owner / name

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        is_api, path = path.startswith("api/"), path.removeprefix("api/").removeprefix("models/")
        root = self.root / "datasets" if path.startswith("datasets/") else self.root
        owner, name, *more = path.removeprefix("datasets/").split("/")
        folder = root / owner / name
        if not folder.is_dir():
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        if is_api and more and more[0] == "tree":
            listed = [{"type": "file", "path": path, "size": size, "oid": "0" * 40} for path, size in sizes.items()]
            return self.send(200, json.dumps(listed).encode(), {}, body)
        if is_api:
            if more and more[1] not in ("main", "v1", self.commit):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            siblings = [{"rfilename": path} for path in sizes]
            about = {"id": f"{owner}/{name}", "sha": self.commit, "siblings": siblings}
            return self.send(200, json.dumps(about).encode(), {}, body)
        inner = "/".join(more[2:])  # resolve/COMMIT/path
        if not (folder / inner).is_file():
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
        if body:
            self.fetched.append(inner)
        content = (folder / inner).read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send(200, content, {"ETag": tag, "X-Repo-Commit": self.commit}, body)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, True)

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def use_hub(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Direct huggingface_hub to a port of this machine."""
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextlib.contextmanager
def running_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HubHandler]]:
    """Run a hub; yield its handler class, with `root` and the requests so far."""
    handler = type("Handler", (HubHandler,), {"root": folder / "hub", "fetched": [], "created": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, server.server_port)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield handler
    server.shutdown()
    server.server_close()
