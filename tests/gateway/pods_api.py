"""As much of a Kubernetes API server as it takes to list and watch the pods of one namespace."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

#: How often a watch looks whether the server has ended.
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Change:
    """What a watch reports."""

    version: int
    kind: str
    pod: dict[str, Any]


class PodsApi:
    """Serves over HTTP what the rules of a Role allow. Use it as a context manager."""

    def __init__(self, namespace: str, rules: Sequence[Mapping[str, Any]]) -> None:
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self._namespace = namespace
        self._verbs = {
            verb
            for rule in rules
            if "" in rule["apiGroups"] and "pods" in rule["resources"]
            for verb in rule["verbs"]
        }
        # What follows is shared with the server's threads, under this lock.
        self._changed = threading.Condition()
        self._pods: dict[str, dict[str, Any]] = {}
        self._changes: list[Change] = []
        self._is_closed = False
        #: Paths of calls that the rules do not allow.
        self.refused: list[str] = []
        #: Verbs of calls that they do.
        self.used: set[str] = set()

    def set_pod(
        self, name: str, ip: str, labels: Mapping[str, str], *, ready: bool, ending: bool = False
    ) -> None:
        """Adds a running pod or changes it."""
        with self._changed:
            kind = "MODIFIED" if name in self._pods else "ADDED"
            version = len(self._changes) + 2
            metadata: dict[str, Any] = {
                "name": name,
                "namespace": self._namespace,
                "uid": f"uid-{name}",
                "labels": dict(labels),
                "resourceVersion": str(version),
            }
            if ending:
                metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            self._pods[name] = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": metadata,
                "spec": {"containers": [{"name": "scheduler"}]},
                "status": {
                    "phase": "Running",
                    "podIP": ip,
                    "conditions": [{"type": "Ready", "status": str(ready)}],
                },
            }
            self._changes.append(Change(version, kind, self._pods[name]))
            self._changed.notify_all()

    def write_kubeconfig(self, path: Path) -> None:
        """Writes what a client needs to find this server."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": url}}],
            "users": [{"name": "test", "user": {"token": "test"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(config), encoding="utf-8")

    def __enter__(self) -> "PodsApi":
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                api._answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                """Says nothing; tests read what happened from the server's fields."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        verb = "watch" if query.get("watch") == "true" else "list"
        with self._changed:
            if url.path != self._path or verb not in self._verbs:
                self.refused.append(handler.path)
                handler.send_error(HTTPStatus.FORBIDDEN)
                return
            self.used.add(verb)
        wanted = dict(
            term.split("=", 1) for term in query.get("labelSelector", "").split(",") if term
        )
        if verb == "watch":
            self._stream(handler, self._later(int(query["resourceVersion"]), wanted))
        else:
            self._send_list(handler, wanted)

    def _send_list(self, handler: BaseHTTPRequestHandler, wanted: Mapping[str, str]) -> None:
        with self._changed:
            document = {
                "apiVersion": "v1",
                "kind": "PodList",
                "metadata": {"resourceVersion": str(len(self._changes) + 1)},
                "items": [pod for pod in self._pods.values() if _has(pod, wanted)],
            }
        body = json.dumps(document).encode()
        handler.send_response(HTTPStatus.OK)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _later(self, version: int, wanted: Mapping[str, str]) -> Iterator[Change]:
        """Changes after a version, as they come, until the server ends."""
        position = version - 1
        while True:
            with self._changed:
                while position == len(self._changes) and not self._is_closed:
                    self._changed.wait(_POLL_S)
                if self._is_closed:
                    return
                change = self._changes[position]
            position += 1
            if _has(change.pod, wanted):
                yield change

    def _stream(self, handler: BaseHTTPRequestHandler, changes: Iterator[Change]) -> None:
        handler.send_response(HTTPStatus.OK)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.close_connection = True
        try:
            for change in changes:
                line = json.dumps({"type": change.kind, "object": change.pod}).encode() + b"\n"
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                handler.wfile.flush()
            handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            # The client is gone; it may come back and list again.
            return


def _has(pod: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    labels: Mapping[str, str] = pod["metadata"]["labels"]
    return wanted.items() <= labels.items()
