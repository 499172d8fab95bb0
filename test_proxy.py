#!/usr/bin/env python3
"""Tests of pve_clone_queue_proxy.py, and what they are made of.

    python3 test_proxy.py                    all tests
    python3 test_proxy.py demo               eight clones straight to a simulated PVE, then the same through the proxy
    python3 test_proxy.py bench              how fast the proxy is, against going direct
    python3 test_proxy.py soak [SECONDS]     a long run with random faults
    python3 test_proxy.py fake-pve [PORT]    the simulated PVE alone, to try the proxy by hand

Nothing but Python is needed. `FakePVE` behaves as the real one does, oddities included; its tasks are real child
processes. `ScriptedBackend` is a bare socket that says what a test tells it to. `Proxy` is the program itself, run as a
process of its own and spoken to over real sockets.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.client
import http.server
import json
import os
import random
import re
import select
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pve_clone_queue_proxy as program

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "pve_clone_queue_proxy.py")
TOKEN = "PVEAPIToken=root@pam!t=secret"
LONG = 20.0  # seconds after which a test gives up waiting

# Certificates for loopback made for these tests alone. "old": as PVE's CA and leaf were made years ago, without keyUsage
# and authorityKeyIdentifier; "new": as they are made now.
OLD_CA = """\
-----BEGIN CERTIFICATE-----
MIIBKzCB06ADAgECAgEBMAoGCCqGSM49BAMCMBYxFDASBgNVBAMMC29sZCB0ZXN0
IENBMCAXDTI2MTEyNDE3MDMyOVoYDzIxMjYxMDMxMTcwMzI5WjAWMRQwEgYDVQQD
DAtvbGQgdGVzdCBDQTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABBoLtVOcs/Uv
5NWKXjRrcbLWNygtw4+8wKE3Uymy/ufvNU/j1hQq9lf7dd2A6hxXrFkZOMJU2JS7
kCyAn8o409mjEDAOMAwGA1UdEwQFMAMBAf8wCgYIKoZIzj0EAwIDRwAwRAIgKZmi
11xB3GPrkYLqbfMgdsKzpKB7nEl5O4WoJ3TeARwCIHVYmV3CfxOoaKPnpOE7SjDO
NuKYaZD3wYwYFnefkxzj
-----END CERTIFICATE-----
"""
OLD_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBajCCARCgAwIBAgIBAjAKBggqhkjOPQQDAjAWMRQwEgYDVQQDDAtvbGQgdGVz
dCBDQTAgFw0yNjExMjQxNzAzMjlaGA8yMTI2MTAzMTE3MDMyOVowDjEMMAoGA1UE
AwwDcHZlMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEMVdQbSqp+hPmRd3G33nW
W3Sl+Zwj47EW5C5T6jw2OFa84X0MKEqCf1ewL5nk1t1Vi2QY6eyaiG33pWgQ153t
TaNVMFMwCQYDVR0TBAIwADATBgNVHSUEDDAKBggrBgEFBQcDATAxBgNVHREEKjAo
hwR/AAABhxAAAAAAAAAAAAAAAAAAAAABgglsb2NhbGhvc3SCA3B2ZTAKBggqhkjO
PQQDAgNIADBFAiAXsneV+JBU32Yyjelip4jckH37B2OdWMbao4+4KEf5FQIhALMC
U2m6AjU2LY0W5vuozoAhmC1GSetZFARklJRCWhLY
-----END CERTIFICATE-----
"""
OLD_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg6p/pjUNo1YHRKehl
ubJG6HFsYrphtVhh/OSNC9DQciWhRANCAAQxV1BtKqn6E+ZF3cbfedZbdKX5nCPj
sRbkLlPqPDY4VrzhfQwoSoJ/V7AvmeTW3VWLZBjp7JqIbfelaBDXne1N
-----END PRIVATE KEY-----
"""
NEW_CA = """\
-----BEGIN CERTIFICATE-----
MIIBXzCCAQWgAwIBAgIBATAKBggqhkjOPQQDAjAWMRQwEgYDVQQDDAtuZXcgdGVz
dCBDQTAgFw0yNjExMjQxNjUyMDhaGA8yMTI2MTAzMTE2NTIwOFowFjEUMBIGA1UE
AwwLbmV3IHRlc3QgQ0EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASFnj9INAwD
CUWU+jhf6eSOIOk1ztGTmNwkVpB9Lfl98iVI+zbA1oZavjjjpirNzhAcmqq8j3Ri
gw/Mo7l+OUUQo0IwQDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIBBjAd
BgNVHQ4EFgQUgzg/3DLjinckhHcGVs16vVnUpZkwCgYIKoZIzj0EAwIDSAAwRQIg
MpeyJfOItYugPp/8R5G99SoISnAXdYCuX5+Se9dD0yACIQCCOmdEr1AJpAInihSv
csq64kWDevaAl1aVTLMjSKCRaw==
-----END CERTIFICATE-----
"""
NEW_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBuTCCAV+gAwIBAgIBAjAKBggqhkjOPQQDAjAWMRQwEgYDVQQDDAtuZXcgdGVz
dCBDQTAgFw0yNjExMjQxNjUyMDhaGA8yMTI2MTAzMTE2NTIwOFowDjEMMAoGA1UE
AwwDcHZlMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAExoIQCNk9xZ3G9fjX5FzH
c46IXwcpto6l9m9qwT6kxFdkRSlpLCcZkBLAsEQQBuIo/oN0lKkZRV3+s618ctGd
LKOBozCBoDAJBgNVHRMEAjAAMAsGA1UdDwQEAwIHgDATBgNVHSUEDDAKBggrBgEF
BQcDATAxBgNVHREEKjAohwR/AAABhxAAAAAAAAAAAAAAAAAAAAABgglsb2NhbGhv
c3SCA3B2ZTAdBgNVHQ4EFgQUETzCH5JZrs8VajqaVZZBN1jq93swHwYDVR0jBBgw
FoAUgzg/3DLjinckhHcGVs16vVnUpZkwCgYIKoZIzj0EAwIDSAAwRQIgAiP/fctv
aZry+yqNyTD9Z2nlqPUPbqc/Q6G1lPshbU4CIQCt4dFvQ+LWyTlDtRgrfK+eUOi5
wQSzUimM5TIbIkCRig==
-----END CERTIFICATE-----
"""
NEW_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgCKB4mnCZy4bB7ReD
QXlqUYVPJauwPYYAfN9zwd6yFdyhRANCAATGghAI2T3Fncb1+NfkXMdzjohfBym2
jqX2b2rBPqTEV2RFKWksJxmQEsCwRBAG4ij+g3SUqRlFXf6zrXxy0Z0s
-----END PRIVATE KEY-----
"""


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = LONG) -> Any:
    """The condition's first true value; AssertionError if it has none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what or condition}")
        time.sleep(0.005)
    return value


def pem_file(text: str) -> str:
    """A temporary file of this content, deleted when the process ends."""
    file = tempfile.NamedTemporaryFile("w", suffix=".pem")
    file.write(text)
    file.flush()
    _pem_files.append(file)
    return file.name


_pem_files: list[Any] = []


def server_context(certificate: str = "new") -> ssl.SSLContext:
    """TLS for a server of these tests."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    cert, key = (NEW_CERT, NEW_KEY) if certificate == "new" else (OLD_CERT, OLD_KEY)
    context.load_cert_chain(pem_file(cert + key))
    return context


def client_context() -> ssl.SSLContext:
    """TLS for a client that trusts anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


# The simulated PVE


@dataclasses.dataclass
class Task:
    """A clone's worker: a real process."""

    upid: str
    source: str
    newid: str
    process: subprocess.Popen[bytes]
    exit_status: str
    leaves_behind: bool
    begin: float
    end: float = 0.0


@dataclasses.dataclass
class CloneRecord:
    """A clone request as it arrived."""

    at: float
    target: str
    source: str
    newid: str
    fields: list[tuple[str, str]]
    body: bytes
    status: int = 0
    upid: str = ""


class FakePVE:
    """Proxmox VE's API as far as the proxy meets it.

    Knobs, to be set by tests: `clone_seconds`; `exits`, exit statuses of the next tasks; `clone_faults` and
    `poll_faults`, what happens to the next such calls (see `misbehave`); `locks`, by VMID; `remote`, whether tasks run
    where the proxy can't see them; `random_fault`, a function that may name one for any request.
    """

    def __init__(self, port: int = 0, *, clone_seconds: float = 0.05, tls: str = "new", auth_delay: float = 0.3) -> None:
        self.clone_seconds = clone_seconds
        self.auth_delay = auth_delay
        self.remote = False
        self.lock = threading.Lock()
        self.locks: dict[str, str] = {}
        self.guests = {"9000", "9001", "9002"}
        self.exits: collections.deque[str] = collections.deque()
        self.clone_faults: collections.deque[str] = collections.deque()
        self.poll_faults: collections.deque[str] = collections.deque()
        self.random_fault: Callable[[str], str | None] = lambda path: None
        self.on_clone: Callable[[CloneRecord], None] = lambda record: None
        self.clones: list[CloneRecord] = []
        self.tasks: dict[str, Task] = {}
        self.polls = 0
        self.requests = 0
        self.overlaps = 0  # times a task began while another one of the same source ran
        self.most_at_once = 0
        self.hanging = threading.Event()  # set: whatever hangs goes on
        self.log: list[str] = []
        context = server_context(tls) if tls else None

        class Handler(FakePVEHandler):
            pve = self

            def setup(handler) -> None:  # noqa: N805
                if context:
                    handler.request.settimeout(10)
                    handler.request = context.wrap_socket(handler.request, server_side=True)
                super().setup()

        self.server = QuietServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening and end what hangs or runs."""
        self.hanging.set()
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            for task in self.tasks.values():
                task.process.kill()
        for task in list(self.tasks.values()):
            task.process.wait()

    def __enter__(self) -> FakePVE:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def running(self) -> list[Task]:
        """The tasks that run; what has ended gives up its lock. To be called with the lock held."""
        running = []
        for task in self.tasks.values():
            if task.end:
                continue
            if task.process.poll() is None:
                running.append(task)
                continue
            task.end = time.monotonic()
            self.locks.pop(task.source, None)
            if task.exit_status.startswith(("OK", "WARNINGS")) or task.leaves_behind:
                self.guests.add(task.newid)
            else:
                self.guests.discard(task.newid)
        return running

    def clone(self, record: CloneRecord, kind: str, node: str, user: str) -> tuple[int, str, str | None]:
        """Status, text and UPID of a clone call."""
        word = "CT" if kind == "lxc" else "VM"
        with self.lock:
            self.clones.append(record)
            self.on_clone(record)
            running = self.running()
            if not record.newid:
                return 400, "Parameter verification failed.", None
            if record.source not in self.guests or not 100 <= int(record.source) <= 999999999:
                return 500, f"unable to find configuration file for {word} {record.source} on node '{node}'", None
            if record.source in self.locks:
                return 500, f"{word} is locked ({self.locks[record.source]})", None
            if record.newid in self.guests:
                return 500, f"{word} {record.newid} already exists on node 'pve'", None
            self.overlaps += any(task.source == record.source for task in running)
            self.locks[record.source] = "disk" if kind == "lxc" else "clone"
            self.guests.add(record.newid)
            process = subprocess.Popen(["sleep", f"{self.clone_seconds:.3f}"])
            pid = process.pid
            with open(f"/proc/{pid}/stat") as file:
                start = int(file.read().rpartition(")")[2].split()[19])
            if self.remote:
                start ^= 1
            real_node = "pve2" if self.remote else "pve"
            begin = f"{int(time.time()):08X}"
            type_ = "vzclone" if kind == "lxc" else "qmclone"
            record.upid = f"UPID:{real_node}:{pid:08X}:{start:08X}:{begin}:{type_}:{record.source}:{user}:"
            status, _, behind = (self.exits.popleft() if self.exits else "OK").partition(" +behind")
            newid = record.newid
            task = Task(record.upid, record.source, newid, process, status, bool(_ + behind), time.monotonic())
            self.tasks[record.upid] = task
            self.most_at_once = max(self.most_at_once, len(running) + 1)
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie stays
        return 200, "OK", record.upid

    def wait_for_clones(self, count: int) -> None:
        """Wait until that many clone calls have arrived."""
        wait_until(lambda: len(self.clones) >= count, f"{count} clone calls at PVE")


class QuietServer(http.server.ThreadingHTTPServer):
    """A server whose connections may break without a word."""

    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections of tests break all the time."""
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)


class FakePVEHandler(http.server.BaseHTTPRequestHandler):
    """pveproxy's way with HTTP."""

    pve: FakePVE
    protocol_version = "HTTP/1.1"
    timeout = 5
    disable_nagle_algorithm = True
    served = 0

    def version_string(self) -> str:
        """What it calls itself."""
        return "pve-api-daemon/3.0"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def handle_expect_100(self) -> bool:
        """Ignored: no 100 ever comes."""
        return True

    def send(self, status: int, reason: str, body: bytes | None, *fields: tuple[str, str]) -> None:
        """An answer; an empty body has no Content-Length, and an error closes the connection."""
        self.served += 1
        if status >= 400 or self.served >= 100:
            self.close_connection = True
        head = [f"HTTP/1.1 {status} {reason}", f"Server: {self.version_string()}", "Cache-Control: max-age=0"]
        head.append(f"Connection: {'close' if self.close_connection else 'Keep-Alive'}")
        head += [f"{name}: {value}" for name, value in fields]
        if body:
            head.append(f"Content-Length: {len(body)}")
        self.wfile.write("\r\n".join([*head, "", ""]).encode("latin-1") + (body or b""))

    def send_data(self, data: object, status: int = 200, reason: str = "OK", message: str | None = None) -> None:
        """An answer of the API."""
        content = {"data": data} if message is None else {"data": data, "message": message + "\n"}
        body = json.dumps(content).encode()
        self.send(status, reason, body, ("Content-Type", "application/json;charset=UTF-8"))

    def send_error_text(self, status: int, text: str) -> None:
        """An error: its text is in the reason phrase."""
        self.send_data(None, status, text, text)

    def misbehave(self, fault: str) -> bool:
        """Do what a fault says; False if the call is to go on. `reset`, `reset-in-head`, `reset-in-body`, `close`,
        `hang`, `garbage`, `json:...` (a 200 with that body), `STATUS TEXT`. Behind a `+` the call is carried out first."""
        if fault == "reset":
            self.reset()
        elif fault == "reset-in-head":
            self.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Le")
            self.reset()
        elif fault == "reset-in-body":
            self.connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"data":"UPID')
            self.reset()
        elif fault == "close":
            self.close_connection = True
        elif fault == "hang":
            self.pve.hanging.wait(60)
            self.close_connection = True
        elif fault == "garbage":
            self.connection.sendall(b"\0\1 no HTTP at all\r\n\r\n")
            self.close_connection = True
        elif fault.startswith("json:"):
            self.send(200, "OK", fault[5:].encode(), ("Content-Type", "application/json"))
        else:
            status, _, text = fault.partition(" ")
            self.send_error_text(int(status), text)
        return True

    def reset(self) -> None:
        """Close with a RST."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A TLS close would say goodbye first.
        os.close(self.connection.detach())

    def user(self) -> str | None:
        """Who asks; None if PVE does not know."""
        match = re.fullmatch(r"PVEAPIToken=([^=]+)=secret", self.headers.get("Authorization", ""))
        if match:
            return match[1]
        if "PVEAuthCookie=PVE:root@pam:good" in self.headers.get("Cookie", ""):
            if self.command == "GET" or self.headers.get("CSRFPreventionToken") == "token":
                return "root@pam"
        return None

    def answer(self) -> None:
        """Any request."""
        pve = self.pve
        with pve.lock:
            pve.requests += 1
        path, _, query = self.path.partition("?")
        parts = [part for part in urllib.parse.unquote(path, "latin-1").split("/") if part]
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if self.command not in ("GET", "POST", "PUT", "DELETE"):
            self.send_error_text(501, f"Unexpected method '{self.command}'")
            return
        if has_body and self.command not in ("POST", "PUT") and self.headers.get("Content-Length") != "0":
            self.send_error_text(501, f"Unexpected content for method '{self.command}'")
            return
        if "Transfer-Encoding" in self.headers:
            self.send_error_text(501, "chunked transfer encoding not supported")
            return
        length = int(self.headers.get("Content-Length", "0"))
        if parts[-1:] == ["upload"]:
            self.upload(length)
            return
        if length > 512 * 1024:
            self.send_error_text(501, "for data too large")
            return
        body = self.rfile.read(length)
        fault = pve.random_fault(path)
        if fault and self.misbehave(fault):
            return
        self.call(parts, query, body)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = answer

    def call(self, parts: list[str], query: str, body: bytes) -> None:
        """A call of the API, its body read."""
        if parts[:1] != ["api2"] or len(parts) < 3:
            self.send(200, "OK", b"<!doctype html><title>pve - Proxmox Virtual Environment</title>",
                      ("Content-Type", "text/html; charset=utf-8"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"))
            return
        if parts[2:] == ["access", "domains"]:
            self.send_data([{"realm": "pam", "type": "pam"}])
            return
        if parts[2:] == ["access", "ticket"]:
            self.login(parts[1], body)
            return
        user = self.user()
        if user is None:
            self.pve.hanging.wait(self.pve.auth_delay)
            self.send_error_text(401, "No ticket" if not self.headers.get("Authorization") else "invalid token value!")
            return
        match parts[2:]:
            case ["version"]:
                self.send_data({"version": "9.0.3", "release": "9.0", "repoid": "025864202ebb6109"})
            case ["cluster", "nextid"]:
                with self.pve.lock:
                    self.send_data(str(next(i for i in range(100, 10**6) if str(i) not in self.pve.guests)))
            case ["nodes", node, ("lxc" | "qemu") as kind, source, "clone"] if self.command == "POST":
                self.clone(kind, node, source, query, body, user)
            case ["nodes", _, "tasks", upid, "status"]:
                self.task_status(upid)
            case ["nodes", _, _, _, "vncwebsocket"] if self.headers.get("Upgrade") == "websocket":
                self.console()
            case ["nodes", _, "download"]:
                self.download(int(dict(urllib.parse.parse_qsl(query))["bytes"]))
            case ["empty"]:
                self.send(200, "OK", None)
            case _:
                self.send_error_text(501, f"Method '{self.command} /{'/'.join(parts[2:])}' not implemented")

    def login(self, format_: str, body: bytes) -> None:
        """A ticket for a password."""
        if b"password=good" in body:
            self.send_data({"ticket": "PVE:root@pam:good", "CSRFPreventionToken": "token"})
        elif format_ == "extjs":
            content = b'{"data":null,"success":0,"message":"authentication failure\\n","status":401}'
            self.send(200, "OK", content, ("Content-Type", "application/json;charset=UTF-8"))
        else:
            self.pve.hanging.wait(self.pve.auth_delay)
            self.send_error_text(401, "authentication failure")

    def clone(self, kind: str, node: str, source: str, query: str, body: bytes, user: str) -> None:
        """A clone, unless a fault comes first."""
        pve = self.pve
        parameters = dict(urllib.parse.parse_qsl(query))
        if body.startswith(b"{"):
            parameters.update({name: str(value) for name, value in json.loads(body).items()})
        else:
            parameters.update(urllib.parse.parse_qsl(body.decode("latin-1")))
        newid = parameters.get("newid", "")
        record = CloneRecord(time.monotonic(), self.path, source, newid, list(self.headers.items()), body)
        with pve.lock:
            fault = pve.clone_faults.popleft() if pve.clone_faults else ""
        if fault and not fault.startswith("+"):
            with pve.lock:
                pve.clones.append(record)
            self.misbehave(fault)
            return
        record.status, text, upid = pve.clone(record, kind, node, user)
        if fault.startswith("+"):
            self.misbehave(fault[1:])
        elif upid:
            self.send_data(upid)
        else:
            self.send_error_text(record.status, text)

    def task_status(self, upid: str) -> None:
        """Running or stopped."""
        pve = self.pve
        with pve.lock:
            pve.polls += 1
            fault = pve.poll_faults.popleft() if pve.poll_faults else ""
            task = pve.tasks.get(upid)
            pve.running()
        if fault:
            self.misbehave(fault)
            return
        if not task:
            self.send_error_text(400, "Parameter verification failed.")
            return
        data = {"upid": upid, "node": upid.split(":")[1], "pid": task.process.pid, "type": "vzclone", "id": task.source}
        if task.end:
            self.send_data({**data, "status": "stopped", "exitstatus": task.exit_status})
        else:
            self.send_data({**data, "status": "running"})

    def upload(self, length: int) -> None:
        """A file of any size; the connection closes after it."""
        left = length
        while left:
            count = len(self.rfile.read1(min(left, 1 << 20)))
            if not count:
                return
            left -= count
        self.close_connection = True
        self.send_data(f"received {length}")

    def download(self, length: int) -> None:
        """A file; the connection's end is its end."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n\r\n")
        piece = bytes(1 << 20)
        while length:
            length -= self.connection.send(piece[:length])

    def console(self) -> None:
        """A WebSocket that sends a greeting with its 101 and then echoes."""
        self.close_connection = True
        key = self.headers["Sec-WebSocket-Key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key).digest()).decode()
        self.connection.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept.encode() + b"\r\n\r\n\x82\x05hello"
        )
        self.connection.settimeout(None)
        while data := self.rfile.read1(65536):
            self.connection.sendall(data)


# A bare backend, a bare client, and the program itself


class Wire:
    """A socket with a buffer, for saying and hearing exactly what a test wants."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        sock.settimeout(LONG)

    @classmethod
    def to(cls, port: int, tls: bool = False) -> Wire:
        """A connection to a port of this host."""
        sock = socket.create_connection(("127.0.0.1", port), LONG)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(client_context().wrap_socket(sock) if tls else sock)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Send it all."""
        self.sock.sendall(data)

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()

    def reset(self) -> None:
        """Close with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def more(self) -> bool:
        """Wait for more bytes; False at the end."""
        data = self.sock.recv(65536)
        self.buffer += data
        return bool(data)

    def until(self, mark: bytes) -> bytes:
        """Everything up to and with the mark."""
        while mark not in self.buffer:
            if not self.more():
                raise EOFError(f"no {mark!r} in {self.buffer[:200]!r}")
        before, self.buffer = self.buffer.split(mark, 1)
        return before + mark

    def exactly(self, count: int) -> bytes:
        """That many bytes."""
        while len(self.buffer) < count:
            if not self.more():
                raise EOFError(f"{len(self.buffer)} of {count} bytes")
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def rest(self) -> bytes:
        """Everything up to the end."""
        while self.more():
            pass
        data, self.buffer = self.buffer, b""
        return data

    def head(self) -> Message:
        """A head, its body not read."""
        lines = self.until(b"\r\n\r\n")[:-4].split(b"\r\n")
        fields = [tuple(line.split(b": ", 1)) for line in lines[1:]]
        return Message(lines[0], fields, b"")  # type: ignore[arg-type]

    def message(self, no_body: bool = False) -> Message:
        """A whole message, its body by its own framing (or up to the close)."""
        message = self.head()
        if message.first[9:10] == b"1" and message.first[9:12] != b"101":
            return message
        chunked = message.get("transfer-encoding") == b"chunked"
        length = message.get("content-length")
        if no_body or message.first[9:12] in (b"204", b"304", b"101"):
            pass
        elif chunked:
            while size := int(self.until(b"\r\n"), 16):
                message.body += self.exactly(size)
                self.exactly(2)
            self.until(b"\r\n")
        elif length is not None:
            message.body = self.exactly(int(length))
        elif message.first.startswith(b"HTTP/"):
            message.body = self.rest()
        return message

    def closed(self) -> bool:
        """Whether the peer closes, by FIN or RST, without another byte."""
        try:
            return not self.buffer and not self.more()
        except OSError:
            return True


@dataclasses.dataclass
class Message:
    """A request or response as it came over the wire."""

    first: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def status(self) -> int:
        """A response's status."""
        return int(self.first[9:12])

    def all(self, name: str) -> list[bytes]:
        """The values of a field."""
        return [value for field, value in self.fields if field.lower() == name.lower().encode()]

    def get(self, name: str) -> bytes | None:
        """The value of a field; the last one if it stands twice."""
        values = self.all(name)
        return values[-1] if values else None


class ScriptedBackend:
    """A plain HTTP backend whose every connection follows a script of the test's."""

    def __init__(self, script: Callable[[Wire], None]) -> None:
        self.script = script
        self.requests: list[Message] = []
        self.connections = 0
        self.open = 0
        self.failures: list[BaseException] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self.connections += 1
                    self.open += 1
                threading.Thread(target=self._serve, args=(Wire(sock),), daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        try:
            self.script(wire)
        except (OSError, EOFError):
            pass
        except BaseException as error:
            self.failures.append(error)
        finally:
            wire.close()
            with self._lock:
                self.open -= 1

    def request(self, wire: Wire) -> Message:
        """The next request on a connection, noted."""
        message = wire.message()
        self.requests.append(message)
        return message

    def close(self) -> None:
        """Stop accepting."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def __enter__(self) -> ScriptedBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def answering(*answers: bytes) -> Callable[[ScriptedBackend], Callable[[Wire], None]]:
    """A script: each request gets the next answer, the last one for ever."""

    def script_of(backend: ScriptedBackend) -> Callable[[Wire], None]:
        left = collections.deque(answers)

        def script(wire: Wire) -> None:
            while True:
                backend.request(wire)
                wire.send(left.popleft() if len(left) > 1 else left[0])

        return script

    return script_of


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Proxy:
    """The program as a process of its own, listening on a free port."""

    def __init__(self, backend: str, *flags: str, env: dict[str, str] | None = None, port: int = 0) -> None:
        command = [sys.executable, PROGRAM, "-listen", f"127.0.0.1:{port}", "-backend", backend, *flags]
        environment = {key: value for key, value in os.environ.items() if key != "JOURNAL_STREAM"} | (env or {})
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.tls = "-tls-cert" in flags
        self.log: list[str] = []
        self._logged = threading.Condition()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.port = int(self.wait_log(r"LISTENING: 127\.0\.0\.1:(\d+)")[1])

    def _read_log(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._logged:
                self.log.append(line.rstrip("\n"))
                self._logged.notify_all()
        with self._logged:
            self.log.append("(end of log)")
            self._logged.notify_all()

    def wait_log(self, pattern: str, count: int = 1, seconds: float = LONG) -> re.Match[str]:
        """Wait for that many log lines that match; the last one's match."""

        def found() -> list[re.Match[str]]:
            return [match for line in self.log if (match := re.search(pattern, line))]

        with self._logged:
            if not self._logged.wait_for(lambda: len(found()) >= count or "(end of log)" in self.log, seconds):
                raise AssertionError(f"no log line {pattern!r} (x{count}) in:\n" + "\n".join(self.log))
            if len(found()) < count:
                raise AssertionError(f"the log ended without {pattern!r}:\n" + "\n".join(self.log))
            return found()[count - 1]

    def lines(self, pattern: str) -> list[str]:
        """The log lines so far that match."""
        return [line for line in self.log if re.search(pattern, line)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit status. What it logged must hold no traceback."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(LONG * 3)
        self._reader.join(LONG)
        assert self.process.stderr
        self.process.stderr.close()
        if any("Traceback" in line for line in self.log):
            raise AssertionError("a traceback in the log:\n" + "\n".join(self.log))
        return status

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL if sys.exc_info()[0] else signal.SIGTERM)

    def wire(self) -> Wire:
        """A bare connection."""
        return Wire.to(self.port, self.tls)

    def ask(self, data: bytes, no_body: bool = False) -> Message:
        """The answer to one request on a connection of its own."""
        with self.wire() as wire:
            wire.send(data)
            return wire.message(no_body)

    def get(self, path: str, *fields: str) -> Message:
        """The answer to a GET."""
        lines = [f"GET {path} HTTP/1.1", "Host: pve", *fields, "Connection: close", "", ""]
        return self.ask("\r\n".join(lines).encode())

    def clone(self, newid: object, source: object = 9000, **more: Any) -> Message:
        """The answer to a clone call."""
        return self.ask(clone_request(newid, source, **more))

    def memory(self, field: str = "VmRSS") -> int:
        """Kilobytes of memory, as /proc has them."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        """How many it runs."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))


def clone_request(newid: object, source: object = 9000, token: str = TOKEN, path: str = "", extra: str = "") -> bytes:
    """A clone call as clients send it."""
    body = f"newid={newid}"
    path = path or f"/api2/json/nodes/pve/lxc/{source}/clone"
    return (
        f"POST {path} HTTP/1.1\r\nHost: pve:8006\r\nAuthorization: {token}\r\n{extra}"
        f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """The results of that many calls made at the same time."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


# The demo, and the simulated PVE by hand


DEMO_CLONES = 8
DEMO_SECONDS = 0.8


def timeline(name: str, queued: float, started: float | None, ended: float, origin: float, scale: float) -> str:
    """A line of the demo: dots while it waited, blocks while it ran."""
    colours = sys.stdout.isatty()
    begin = ended if started is None else started
    before, wait = int((queued - origin) * scale), round((begin - queued) * scale)
    run = max(1, round((ended - begin) * scale))
    bar = "." * wait + ("\033[32m" if colours else "") + "#" * run + ("\033[0m" if colours else "")
    return f"  {name} |{' ' * before}{bar}  waited {begin - queued:4.1f} s, ran {ended - begin:4.1f} s"


def demo() -> int:
    """Show the problem and its solution on a simulated PVE; the exit status."""
    # Tests of locks release them by tasks that end, so that the demo's straight clones must be over before it goes on.
    with FakePVE(clone_seconds=DEMO_SECONDS) as pve:
        print(f"{DEMO_CLONES} concurrent clones of one template, sent straight to a simulated PVE:\n")

        def straight(index: int) -> tuple[int, str]:
            with Wire.to(pve.port, tls=True) as wire:
                wire.send(clone_request(200 + index))
                answer = wire.message()
            return answer.status, answer.first[9:].decode()

        results = at_once(DEMO_CLONES, straight)
        for index, (_, text) in enumerate(results):
            print(f"  {200 + index}  {text}")
        succeeded = sum(status == 200 for status, _ in results)
        print(f"\n{succeeded} of {DEMO_CLONES} succeeded.\n")
        with pve.lock:
            tasks = list(pve.tasks.values())
        for task in tasks:
            task.process.wait()

        print(f"The same {DEMO_CLONES} through the proxy (. waits, # runs):\n")
        with Proxy(pve.url) as proxy:
            origin = time.monotonic()
            ended = {}

            def through(index: int) -> int:
                status = proxy.clone(300 + index).status
                ended[300 + index] = time.monotonic()
                return status

            statuses = at_once(DEMO_CLONES, through)
        makespan = max(ended.values()) - origin
        started = {int(record.newid): record.at for record in pve.clones if record.status == 200}
        for newid in sorted(ended, key=lambda newid: started.get(newid, 0.0)):
            print(timeline(str(newid), origin, started.get(newid), ended[newid], origin, 60 / makespan))
        succeeded_through = sum(status == 200 for status in statuses)
        total = DEMO_CLONES * DEMO_SECONDS
        print(f"\n{succeeded_through} of {DEMO_CLONES} succeeded, one at a time, in {makespan:.2f} s; "
              f"the clones alone take {total:.2f} s ({makespan / total:.3f} times).")
    return 0 if succeeded_through == DEMO_CLONES and succeeded < DEMO_CLONES else 1


def fake_pve(port: int) -> int:
    """Run the simulated PVE until Ctrl-C."""
    seconds = float(os.environ.get("FAKE_PVE_CLONE_SECONDS", "2"))
    with FakePVE(port, clone_seconds=seconds, auth_delay=3) as pve:
        print(f"fake PVE: {pve.url}", flush=True)
        print(f"""
It knows the templates 9000, 9001 and 9002 on the node pve; a clone takes {seconds:g} s (FAKE_PVE_CLONE_SECONDS).
A clone straight to it, and one through the proxy (python3 pve_clone_queue_proxy.py -backend {pve.url}):

  curl -k -H 'Authorization: {TOKEN}' -d newid=101 {pve.url}/api2/json/nodes/pve/lxc/9000/clone
  curl    -H 'Authorization: {TOKEN}' -d newid=102 http://127.0.0.1:8081/api2/json/nodes/pve/lxc/9000/clone
""", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


def main(arguments: list[str]) -> int:
    """Run what the command line asks for."""
    mode = arguments[0] if arguments else ""
    if mode == "demo":
        return demo()
    if mode == "fake-pve":
        return fake_pve(int(arguments[1]) if len(arguments) > 1 else 8006)
    unittest.main(module=sys.modules["__main__"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
