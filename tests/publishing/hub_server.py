"""A small Hub on loopback for the real client, with what pushing and loading a model needs.

It keeps repositories with commits and branches in memory. As on the Hub, small files are sent inside the commit and
others by the LFS protocol. Faults can be switched on.
"""

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

OWNER_TOKEN, READER_TOKEN = "hf_owner", "hf_reader"
LFS_SIZE = 20_000  # bytes; a model card is smaller, weights are larger


@dataclass
class Repository:
    private: bool
    branches: dict = field(default_factory=dict)  # name -> commit
    commits: dict = field(default_factory=dict)  # commit -> {path: content or LFS id as str}
    history: list = field(default_factory=list)  # commits of users, oldest first
    messages: dict = field(default_factory=dict)  # commit -> (summary, description)


class HubServer:
    """Runs in a thread; `endpoint` is its address."""

    def __init__(self):
        self.reset()
        routes = [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/models/{owner}/{name}", self.info),
            Route("/api/models/{owner}/{name}/revision/{revision}", self.info),
            Route("/api/models/{owner}/{name}/tree/{revision}", self.tree),
            Route("/api/models/{owner}/{name}/tree/{revision}/{path:path}", self.tree),
            Route("/api/models/{owner}/{name}/branch/{branch}", self.branch, methods=["POST"]),
            Route("/api/models/{owner}/{name}/preupload/{revision}", self.preupload, methods=["POST"]),
            Route("/api/models/{owner}/{name}/commit/{revision}", self.commit, methods=["POST"]),
            Route("/{owner}/{name}.git/info/lfs/objects/batch", self.lfs_batch, methods=["POST"]),
            Route("/lfs/{oid}", self.lfs_put, methods=["PUT"]),
            Route("/lfs/{oid}", self.lfs_get),
            Route("/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve, methods=["GET", "HEAD"]),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: self.refuse})
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.endpoint = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def reset(self):
        self.repositories = {}
        self.objects = {}
        self.requests = Counter()
        self.cut_uploads = 0  # number of uploads whose connection breaks halfway

    def stop(self):
        self._server.should_exit = True
        self._thread.join(timeout=10)

    async def refuse(self, request, error):
        return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)

    def _count(self, request):
        self.requests[request.method + " " + request.url.path] += 1
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in (OWNER_TOKEN, READER_TOKEN):
            raise HTTPException(401, "Invalid user token.")
        return token

    def _writer(self, request):
        token = self._count(request)
        if not token:
            raise HTTPException(401, "Please log in.")
        if token != OWNER_TOKEN:
            raise HTTPException(403, "This token has no write access.")

    def _repository(self, request):
        token = self._count(request)
        name = "{owner}/{name}".format(**request.path_params)
        found = self.repositories.get(name)
        if found is None or (found.private and token != OWNER_TOKEN):
            # The Hub does not reveal whether a private one exists.
            status = 404 if token else 401
            raise HTTPException(status, "Repository not found", headers={"X-Error-Code": "RepoNotFound"})
        return name, found

    def _commit_of(self, request):
        name, repository = self._repository(request)
        revision = request.path_params.get("revision", "main")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise HTTPException(404, f"Invalid rev id: {revision}", headers={"X-Error-Code": "RevisionNotFound"})
        return name, repository, commit

    async def whoami(self, request):
        self._writer(request)
        return JSONResponse({"name": "me", "type": "user", "orgs": []})

    async def validate_yaml(self, request):
        self._count(request)
        return JSONResponse({"errors": [], "warnings": []})

    async def create(self, request):
        self._writer(request)
        wanted = await request.json()
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if not name.startswith(("me/", "org/")):
            raise HTTPException(403, "You don't have the rights to create a model under this namespace")
        if name in self.repositories:
            error = {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
            return JSONResponse(error, status_code=409)
        repository = self.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        _add_commit(repository, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return JSONResponse({"url": f"{self.endpoint}/{name}", "name": name})

    async def info(self, request):
        name, repository, commit = self._commit_of(request)
        files = [{"rfilename": path} for path in repository.commits[commit]]
        return JSONResponse({"id": name, "sha": commit, "private": repository.private, "siblings": files, "tags": []})

    async def tree(self, request):
        _, repository, commit = self._commit_of(request)
        below = request.path_params.get("path", "")
        entries = []
        for path, content in repository.commits[commit].items():
            if not path.startswith(f"{below}/" if below else ""):
                continue
            data = self._data(content)
            entry = {"type": "file", "path": path, "size": len(data), "oid": _git_blob(data)}
            if isinstance(content, str):
                entry["lfs"] = {"oid": content, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return JSONResponse(entries)

    async def branch(self, request):
        self._writer(request)
        _, repository = self._repository(request)
        if request.path_params["branch"] in repository.branches:
            raise HTTPException(409, "Reference already exists")
        repository.branches[request.path_params["branch"]] = repository.branches["main"]
        return Response(status_code=201)

    async def preupload(self, request):
        self._writer(request)
        _, repository, commit = self._commit_of(request)
        files = []
        for file in (await request.json())["files"]:
            present = repository.commits[commit].get(file["path"])
            is_large = file["size"] >= LFS_SIZE
            oid = present if isinstance(present, str) else present and _git_blob(present)
            mode = "lfs" if is_large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": files})

    async def lfs_batch(self, request):
        self._writer(request)
        self._repository(request)
        answers = []
        for wanted in (await request.json())["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                answer["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}", "header": {}}}
            answers.append(answer)
        return JSONResponse({"transfer": "basic", "objects": answers})

    async def lfs_put(self, request):
        self._count(request)
        is_cut = self.cut_uploads > 0
        self.cut_uploads -= is_cut
        parts = []
        async for part in request.stream():
            parts.append(part)
            if is_cut and part:
                request.receive.__self__.transport.abort()  # like a pulled cable
                return Response(status_code=500)
        data = b"".join(parts)
        if hashlib.sha256(data).hexdigest() != request.path_params["oid"]:
            raise HTTPException(400, "Wrong content")
        self.objects[request.path_params["oid"]] = data
        return Response()

    async def lfs_get(self, request):
        return Response(self.objects[request.path_params["oid"]], media_type="application/octet-stream")

    async def commit(self, request):
        self._writer(request)
        name, repository, parent = self._commit_of(request)
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        files = dict(repository.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.objects:
                files[value["path"]] = value["oid"]
            else:
                raise HTTPException(400, f"Cannot commit {line['key']} {value.get('path')}")
        branch, answer = request.path_params["revision"], {}
        if request.query_params.get("create_pr") == "1":
            number = sum(known.startswith("refs/pr/") for known in repository.branches) + 1
            branch = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.endpoint}/{name}/discussions/{number}"
        oid = _add_commit(repository, branch, files)
        repository.history.append(oid)
        repository.messages[oid] = (lines[0]["value"]["summary"], lines[0]["value"]["description"])
        return JSONResponse({"commitUrl": f"{self.endpoint}/{name}/commit/{oid}", "commitOid": oid, **answer})

    async def resolve(self, request):
        _, repository, commit = self._commit_of(request)
        headers = {"X-Repo-Commit": commit}
        content = repository.commits[commit].get(request.path_params["path"])
        if content is None:
            raise HTTPException(404, "Entry not found", headers={**headers, "X-Error-Code": "EntryNotFound"})
        data = self._data(content)
        if isinstance(content, str):
            headers |= {"X-Linked-Etag": f'"{content}"', "X-Linked-Size": str(len(data))}
            # To another host, like the Hub: the client also follows redirects within a host when it asks for metadata.
            storage = self.endpoint.replace("127.0.0.1", "localhost")
            return RedirectResponse(f"{storage}/lfs/{content}", status_code=302, headers=headers)
        return Response(data, headers={**headers, "ETag": f'"{_git_blob(data)}"'})

    def _data(self, content):
        return self.objects[content] if isinstance(content, str) else content


def _add_commit(repository, branch, files):
    oid = hashlib.sha1(repr((len(repository.commits), time.time())).encode()).hexdigest()
    repository.commits[oid] = files
    repository.branches[branch] = oid
    return oid


def _git_blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
