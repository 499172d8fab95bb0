#!/usr/bin/env python3
"""Tests of pve_clone_queue_proxy.py, and what they are made of.

    python3 test_proxy.py                    all tests
    python3 test_proxy.py CLASS[.TEST]...    these tests, with the options of unittest
    python3 test_proxy.py demo               twelve clients straight to a simulated PVE, then the same through the proxy
    python3 test_proxy.py bench [PART]...    how fast the proxy is: clones, bursts, growth, proxies, relay, memory
    python3 test_proxy.py soak [SECONDS]     a long run with random faults
    python3 test_proxy.py fake-pve [PORT]    the simulated PVE alone, to try the proxy by hand
    python3 test_proxy.py --help             this text

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
import functools
import hashlib
import http.client
import http.server
import itertools
import json
import math
import os
import random
import re
import resource
import select
import selectors
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
import unittest.mock
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn, Self

import pve_clone_queue_proxy as program

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "pve_clone_queue_proxy.py")
TOKEN = "PVEAPIToken=root@pam!ci=secret"
LONG = 20.0  # seconds after which a test gives up waiting
PARALLEL = 10  # test classes at a time


def pem(kind: str, encoded: str) -> str:
    """A PEM file of this content."""
    return f"-----BEGIN {kind}-----\n{encoded}\n-----END {kind}-----\n"


# Certificates for loopback made for these tests alone. "old": as PVE's CA and leaf were made years ago, without keyUsage
# and authorityKeyIdentifier; "new": as they are made now.
OLD_CA = pem("CERTIFICATE", """\
MIIBKzCB06ADAgECAgEBMAoGCCqGSM49BAMCMBYxFDASBgNVBAMMC29sZCB0ZXN0IENBMCAXDTI2MTEyNDE3MDMyOVoYDzIxMjYxMDMxMTcwMzI5WjAWMRQwEgYDVQQD
DAtvbGQgdGVzdCBDQTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABBoLtVOcs/Uv5NWKXjRrcbLWNygtw4+8wKE3Uymy/ufvNU/j1hQq9lf7dd2A6hxXrFkZOMJU2JS7
kCyAn8o409mjEDAOMAwGA1UdEwQFMAMBAf8wCgYIKoZIzj0EAwIDRwAwRAIgKZmi11xB3GPrkYLqbfMgdsKzpKB7nEl5O4WoJ3TeARwCIHVYmV3CfxOoaKPnpOE7SjDO
NuKYaZD3wYwYFnefkxzj""")  # fmt: skip
OLD_CERT = pem("CERTIFICATE", """\
MIIBajCCARCgAwIBAgIBAjAKBggqhkjOPQQDAjAWMRQwEgYDVQQDDAtvbGQgdGVzdCBDQTAgFw0yNjExMjQxNzAzMjlaGA8yMTI2MTAzMTE3MDMyOVowDjEMMAoGA1UE
AwwDcHZlMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEMVdQbSqp+hPmRd3G33nWW3Sl+Zwj47EW5C5T6jw2OFa84X0MKEqCf1ewL5nk1t1Vi2QY6eyaiG33pWgQ153t
TaNVMFMwCQYDVR0TBAIwADATBgNVHSUEDDAKBggrBgEFBQcDATAxBgNVHREEKjAohwR/AAABhxAAAAAAAAAAAAAAAAAAAAABgglsb2NhbGhvc3SCA3B2ZTAKBggqhkjO
PQQDAgNIADBFAiAXsneV+JBU32Yyjelip4jckH37B2OdWMbao4+4KEf5FQIhALMCU2m6AjU2LY0W5vuozoAhmC1GSetZFARklJRCWhLY""")  # fmt: skip
OLD_KEY = pem("PRIVATE KEY", """\
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg6p/pjUNo1YHRKehlubJG6HFsYrphtVhh/OSNC9DQciWhRANCAAQxV1BtKqn6E+ZF3cbfedZbdKX5nCPj
sRbkLlPqPDY4VrzhfQwoSoJ/V7AvmeTW3VWLZBjp7JqIbfelaBDXne1N""")  # fmt: skip
NEW_CA = pem("CERTIFICATE", """\
MIIBXzCCAQWgAwIBAgIBATAKBggqhkjOPQQDAjAWMRQwEgYDVQQDDAtuZXcgdGVzdCBDQTAgFw0yNjExMjQxNjUyMDhaGA8yMTI2MTAzMTE2NTIwOFowFjEUMBIGA1UE
AwwLbmV3IHRlc3QgQ0EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASFnj9INAwDCUWU+jhf6eSOIOk1ztGTmNwkVpB9Lfl98iVI+zbA1oZavjjjpirNzhAcmqq8j3Ri
gw/Mo7l+OUUQo0IwQDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIBBjAdBgNVHQ4EFgQUgzg/3DLjinckhHcGVs16vVnUpZkwCgYIKoZIzj0EAwIDSAAwRQIg
MpeyJfOItYugPp/8R5G99SoISnAXdYCuX5+Se9dD0yACIQCCOmdEr1AJpAInihSvcsq64kWDevaAl1aVTLMjSKCRaw==""")  # fmt: skip
NEW_CERT = pem("CERTIFICATE", """\
MIIBuTCCAV+gAwIBAgIBAjAKBggqhkjOPQQDAjAWMRQwEgYDVQQDDAtuZXcgdGVzdCBDQTAgFw0yNjExMjQxNjUyMDhaGA8yMTI2MTAzMTE2NTIwOFowDjEMMAoGA1UE
AwwDcHZlMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAExoIQCNk9xZ3G9fjX5FzHc46IXwcpto6l9m9qwT6kxFdkRSlpLCcZkBLAsEQQBuIo/oN0lKkZRV3+s618ctGd
LKOBozCBoDAJBgNVHRMEAjAAMAsGA1UdDwQEAwIHgDATBgNVHSUEDDAKBggrBgEFBQcDATAxBgNVHREEKjAohwR/AAABhxAAAAAAAAAAAAAAAAAAAAABgglsb2NhbGhv
c3SCA3B2ZTAdBgNVHQ4EFgQUETzCH5JZrs8VajqaVZZBN1jq93swHwYDVR0jBBgwFoAUgzg/3DLjinckhHcGVs16vVnUpZkwCgYIKoZIzj0EAwIDSAAwRQIgAiP/fctv
aZry+yqNyTD9Z2nlqPUPbqc/Q6G1lPshbU4CIQCt4dFvQ+LWyTlDtRgrfK+eUOi5wQSzUimM5TIbIkCRig==""")  # fmt: skip
NEW_KEY = pem("PRIVATE KEY", """\
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgCKB4mnCZy4bB7ReDQXlqUYVPJauwPYYAfN9zwd6yFdyhRANCAATGghAI2T3Fncb1+NfkXMdzjohfBym2
jqX2b2rBPqTEV2RFKWksJxmQEsCwRBAG4ij+g3SUqRlFXf6zrXxy0Z0s""")  # fmt: skip


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = LONG) -> Any:
    """The condition's first true value; AssertionError if it has none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what or condition}")
        time.sleep(0.005)
    return value


def pem_file(text: str) -> str:
    """A file of this content; its folder is deleted when the process ends."""
    path = os.path.join(_pem_folder.name, hashlib.sha256(text.encode()).hexdigest() + ".pem")
    with open(path, "w") as file:
        file.write(text)
    return path


_pem_folder = tempfile.TemporaryDirectory()


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


class Closing:
    """Closed when its `with` ends."""

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# The simulated PVE


CT, VM = "lxc", "qemu"
WORDS = {CT: "CT", VM: "VM"}
FOLDERS = {CT: "lxc", VM: "qemu-server"}
# What a clone locks its target with while it runs; VMs have a lock of another name.
TARGET_LOCKS = {CT: "create", VM: "clone"}
CLONE_TASKS = {CT: "vzclone", VM: "qmclone"}
DESTROY_TASKS = {CT: "vzdestroy", VM: "qmdestroy"}
# A user's name may hold anything but blanks, `:` and `/`; a token's has two characters or more.
USER_ID = r"[^\s:/]+@[A-Za-z][A-Za-z0-9._-]*"
TOKEN_NAME = r"[A-Za-z][A-Za-z0-9._-]+"
KILLED = "unexpected status"  # of a task whose worker was killed with -9
INTERRUPTED = "clone failed: interrupted by signal"  # of one that was stopped by hand


@dataclasses.dataclass(eq=False)
class Refused(Exception):
    """A call that PVE refuses: the status, its text, and what is wrong with which parameter."""

    status: int
    text: str
    errors: dict[str, str] | None = None


def wrong_parameter(name: str, what: str) -> Refused:
    """The refusal of a parameter that does not pass PVE's check."""
    return Refused(400, "Parameter verification failed.", {name: what})


def decode_urlencoded(data: str) -> dict[str, object]:
    """Parameters as PVE decodes them: `;` separates like `&`, of `a=1=2` the 2 is dropped, an `a` without `=` is none, and
    a name that comes again makes a list."""
    decoded: dict[str, list[str]] = {}
    for pair in re.split("[&;]", data):
        name, *values = (urllib.parse.unquote_plus(part) for part in pair.split("="))
        if values:
            decoded.setdefault(name, []).append(values[0])
    return {name: values[0] if len(values) == 1 else values for name, values in decoded.items()}


def parameters_of(query: str, body: bytes, content_type: str) -> dict[str, object]:
    """A call's parameters: the query wins over the body, and the body is JSON only if it is said to be."""
    if re.split(r"\s*[;,]", content_type)[0] == "application/json":
        try:
            decoded = json.loads(body)
        except ValueError:
            raise Refused(501, "malformed JSON string") from None
        parameters = decoded if isinstance(decoded, dict) else {}
    else:
        parameters = decode_urlencoded(body.decode("latin-1"))
    return parameters | decode_urlencoded(query)


def vmid_of(parameters: dict[str, object], name: str) -> str:
    """A parameter that is a VMID; leading zeros are dropped."""
    value = parameters.get(name)
    if value is None:
        raise wrong_parameter(name, "property is missing and it is not optional")
    if not re.fullmatch("[0-9]+", str(value)):
        raise wrong_parameter(name, f"type check ('integer') failed - got '{value}'")
    vmid = str(value).lstrip("0")
    if not re.fullmatch("[1-9][0-9]{2,8}", vmid):
        raise wrong_parameter(name, f"value must be from 100 to 999999999, not {vmid}")
    return vmid


@dataclasses.dataclass
class Task:
    """A worker: a real process."""

    upid: str
    type: str  # `vzclone` and so on
    source: str
    user: str  # or a token, as `USER!NAME`
    newid: str  # what it makes, to be removed if it fails; empty if nothing
    process: subprocess.Popen[bytes]
    exit_status: str
    leaves_behind: bool
    begin: float
    end: float = 0.0
    seconds: float = 0.0  # how long its process lived

    def belongs_to(self, caller: str) -> bool:
        """Whether that user or token started it. A token sees its own tasks alone, a user also those of his tokens."""
        token = re.fullmatch(f"({USER_ID})!{TOKEN_NAME}", self.user)
        return caller == self.user or (token is not None and caller == token[1])

    def describe(self) -> dict[str, object]:
        """As it is listed; a token is split off its user."""
        _, node, pid, pstart, starttime, *_ = self.upid.split(":")
        token = re.fullmatch(f"({USER_ID})!({TOKEN_NAME})", self.user)
        owner = {"user": token[1], "tokenid": token[2]} if token else {"user": self.user}
        numbers = {"pid": int(pid, 16), "pstart": int(pstart, 16), "starttime": int(starttime, 16)}
        return {"upid": self.upid, "node": node, **numbers, "type": self.type, "id": self.source, **owner}

    def reap(self) -> None:
        """Let no zombie stay."""
        self.process.wait()
        self.seconds = time.monotonic() - self.begin


@dataclasses.dataclass
class CloneRecord:
    """A clone request as it arrived, and what came of it."""

    at: float
    target: str
    source: str
    newid: str  # as PVE reads it; empty if there is none, or no usable one
    fields: list[tuple[str, str]]
    body: bytes
    status: int = 0
    upid: str = ""
    fault: str = ""
    refused: Refused | None = None


class FakePVE(Closing):
    """Proxmox VE's API as far as the proxy meets it.

    Knobs, to be set by tests:

    - `clone_seconds`; `exits`, exit statuses of the next tasks (behind ` +behind` the target stays); `locks`, by VMID;
      `remote`, whether tasks run where the proxy can't see them;
    - `clone_faults` and `poll_faults`, what happens to the next such calls (see `misbehave`); `random_fault`, which may
      name one for any `relay`, `clone` or `poll`;
    - `daemon_away`: pveproxy answers, pvedaemon does not run; `go_away` and `come_back`: nobody listens;
    - `auth_delay` before a 401, `head_delay` before a head that is too long ends its connection, `post_seconds` before
      the answer to a clone call, `daemon_delay` before a 596;
    - `list_age`, how old the list of running tasks may be; `privileged`, the users who see the tasks of all.

    Guests are in `guests`, those of them that are VMs in `vms` too. `lock` guards everything; methods whose names begin
    with `_`, and `running` and `kind`, are to be called with it held.
    """

    def __init__(self, port: int = 0, *, clone_seconds: float = 0.05, tls: str = "new", auth_delay: float = 0.3) -> None:
        self.clone_seconds = clone_seconds
        self.auth_delay = auth_delay
        self.head_delay = 0.1
        self.daemon_delay = 0.1
        self.post_seconds = 0.0
        self.list_age = 10.0
        self.remote = self.away = self.daemon_away = False
        self.lock = threading.Lock()
        self.locks: dict[str, str] = {}
        self.guests = {"8000", "8001", "9000", "9001", "9002"}
        self.vms = {"8000", "8001"}
        self.privileged = {"root@pam"}
        self.exits: collections.deque[str] = collections.deque()
        self.clone_faults: collections.deque[str] = collections.deque()
        self.poll_faults: collections.deque[str] = collections.deque()
        self.random_fault: Callable[[str], str] = lambda kind: ""
        self.on_clone: Callable[[CloneRecord], None] = lambda record: None
        self.clones: list[CloneRecord] = []
        self.tasks: dict[str, Task] = {}
        self.requests = self.polls = 0
        self.overlaps = 0  # times a clone's task began while another one of the same source ran
        self.most_at_once = 0
        self.hanging = threading.Event()  # set: whatever hangs goes on
        self.connections: set[FakePVEHandler] = set()
        self.context = server_context(tls) if tls else None
        self._listed: list[Task] = []
        self._listed_at = 0.0
        # Held for life, without listening: while PVE is away the kernel gives its port to nobody else.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", port))
        self.port: int = self._reserved.getsockname()[1]
        self._listen()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def _listen(self) -> None:
        class Handler(FakePVEHandler):
            pve = self

        self.server = QuietServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def go_away(self) -> None:
        """Listen no more, as when pveproxy is stopped: idle connections end now, others with their next answer."""
        self.away = True
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            idle = [connection.connection for connection in self.connections if connection.idle]
        for sock in idle:
            with contextlib.suppress(OSError):
                # Below TLS, whose own shutdown must not be called while another thread reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def come_back(self) -> None:
        self.away = False
        self._listen()

    def close(self) -> None:
        """Stop listening and end what hangs or runs."""
        self.hanging.set()
        self.server.shutdown()
        self.server.server_close()
        self._reserved.close()
        with self.lock:
            tasks = list(self.tasks.values())
        for task in tasks:
            task.process.kill()
            task.process.wait()

    # Guests

    def kind(self, vmid: str) -> str | None:
        """Whether a guest is a CT or a VM; None if there is none of this number."""
        if vmid not in self.guests:
            return None
        return VM if vmid in self.vms else CT

    def destroy(self, vmid: str) -> None:
        """Remove a guest, whatever its state."""
        with self.lock:
            self._remove(vmid)

    def _remove(self, vmid: str) -> None:
        self.guests.discard(vmid)
        self.vms.discard(vmid)
        self.locks.pop(vmid, None)

    def delete(self, kind: str, vmid: str, user: str) -> str:
        """Destroy a guest for a client: the UPID of a task whose work is already done."""
        with self.lock:
            self.running()
            if self.kind(vmid) != kind:
                raise Refused(500, f"Configuration file 'nodes/pve/{FOLDERS[kind]}/{vmid}.conf' does not exist")
            if vmid in self.locks:
                raise Refused(500, f"{WORDS[kind]} is locked ({self.locks[vmid]})")
            self._remove(vmid)
            return self._start_task(DESTROY_TASKS[kind], vmid, user, 0.0, "OK")

    def list_guests(self, *kinds: str) -> list[dict[str, object]]:
        """The guests of these kinds, those being made among them."""
        with self.lock:
            self.running()
            return [self._describe(vmid) for vmid in sorted(self.guests, key=int) if self.kind(vmid) in kinds]

    def _describe(self, vmid: str) -> dict[str, object]:
        lock = {"lock": self.locks[vmid]} if vmid in self.locks else {}
        kind = self.kind(vmid)
        return {"id": f"{kind}/{vmid}", "type": kind, "vmid": int(vmid), "node": "pve", "status": "stopped", **lock}

    def next_id(self, parameters: dict[str, object]) -> str:
        """The smallest free VMID, or the one asked for if it is free."""
        with self.lock:
            self.running()
            if "vmid" not in parameters:
                return next(vmid for vmid in map(str, range(100, 10**6)) if vmid not in self.guests)
            vmid = vmid_of(parameters, "vmid")
            if vmid in self.guests:
                raise wrong_parameter("vmid", f"VM {vmid} already exists")
            return vmid

    # Tasks

    def running(self) -> list[Task]:
        """The tasks that run; what has ended gives up its lock."""
        unended = [task for task in self.tasks.values() if not task.end]
        for task in unended:
            if task.process.poll() is not None:
                self._end_task(task)
        return [task for task in unended if not task.end]

    def _end_task(self, task: Task) -> None:
        """Note a task's end, and do what its worker did last. One that was killed with -9 did nothing: its source keeps
        `disk`, its target `create`."""
        task.end = time.monotonic()
        if task.exit_status == KILLED or not task.newid:
            return
        if task.type == CLONE_TASKS[CT] and self.locks.get(task.source) == "disk":
            del self.locks[task.source]
        self.locks.pop(task.newid, None)
        if not task.exit_status.startswith(("OK", "WARNINGS")) and not task.leaves_behind:
            self._remove(task.newid)

    def _start_task(self, type_: str, source: str, user: str, seconds: float, exit_status: str, newid: str = "") -> str:
        """Start a worker; its UPID. That brings the list of running tasks up to date."""
        process = subprocess.Popen(["sleep", f"{seconds:.3f}"])
        with open(f"/proc/{process.pid}/stat") as file:
            pstart = int(file.read().rpartition(")")[2].split()[19])
        node = "pve"
        if self.remote:
            node, pstart = "pve2", pstart ^ 1
        upid = f"UPID:{node}:{process.pid:08X}:{pstart:08X}:{int(time.time()):08X}:{type_}:{source}:{user}:"
        exit_status, behind, _ = exit_status.partition(" +behind")
        task = Task(upid, type_, source, user, newid, process, exit_status, bool(behind), time.monotonic())
        self.tasks[upid] = task
        self._list_running()
        threading.Thread(target=task.reap, daemon=True).start()
        return upid

    def _list_running(self) -> None:
        self._listed, self._listed_at = self.running(), time.monotonic()

    def list_tasks(self, user: str, parameters: dict[str, object]) -> list[dict[str, object]]:
        """The running tasks that a caller may see. The list is brought up to date when a task starts and every
        `list_age` seconds, so that it may still have some that are over. All are listed for any node, for tests that
        pretend that theirs run elsewhere."""
        source, type_ = parameters.get("vmid"), parameters.get("typefilter")
        with self.lock:
            if time.monotonic() - self._listed_at >= self.list_age:
                self._list_running()
            tasks = [task for task in self._listed if user in self.privileged or task.belongs_to(user)]
        tasks = [task for task in tasks if source in (None, task.source) and type_ in (None, task.type)]
        return [{**task.describe(), "status": "RUNNING"} for task in tasks]

    def task_status(self, upid: str, user: str) -> dict[str, object]:
        """Whether a task runs, and how it ended."""
        with self.lock:
            self.running()
            task = self.tasks.get(upid)
        if not task:
            parsable = re.fullmatch(r"UPID:[\w-]+:[0-9A-F]{8}:[0-9A-F]{8,9}:[0-9A-F]{8}:[^:\s]+:[^:\s]*:[^:\s]+:", upid)
            raise wrong_parameter("upid", "no such task" if parsable else "unable to parse worker upid")
        if user not in self.privileged and not task.belongs_to(user):
            raise Refused(403, "Permission check failed (/nodes/pve, Sys.Audit)")
        state = {"status": "stopped", "exitstatus": task.exit_status} if task.end else {"status": "running"}
        return {**task.describe(), **state}

    def interrupt(self, upid: str, exit_status: str) -> None:
        """End a task that runs: its worker is `KILLED`, or `INTERRUPTED` and cleans up."""
        with self.lock:
            task = self.tasks[upid]
            if task not in self.running():
                raise AssertionError(f"{upid} has ended by itself")
            task.exit_status = exit_status
            task.process.kill()
        task.process.wait()

    # Clones

    def clone(self, record: CloneRecord, kind: str, node: str, user: str) -> None:
        """Carry a clone call out; the record tells what came of it."""
        with self.lock:
            self.clones.append(record)
            self.on_clone(record)
            self.running()
            record.refused = record.refused or self._refusal(record, kind, node)
            if not record.refused:
                self._start_clone(record, kind, user)
            record.status = record.refused.status if record.refused else 200

    def _refusal(self, record: CloneRecord, kind: str, node: str) -> Refused | None:
        """Why a clone can't be made. That the source is locked comes before the new number is looked at."""
        word, source, newid = WORDS[kind], record.source, record.newid
        if self.kind(source) != kind:
            return Refused(500, f"unable to find configuration file for {word} {source} on node '{node}'")
        if source in self.locks:
            return Refused(500, f"{word} is locked ({self.locks[source]})")
        taken = self.kind(newid)
        if kind == CT and taken:
            return Refused(500, f"{WORDS[taken]} {newid} already exists on node 'pve'")
        if taken == VM:
            return Refused(500, f"unable to create VM {newid}: config file already exists")
        return None

    def _start_clone(self, record: CloneRecord, kind: str, user: str) -> None:
        """Lock what a clone locks and start its worker. The source is locked for CTs only."""
        source, newid, type_ = record.source, record.newid, CLONE_TASKS[kind]
        if newid in self.guests:  # a VM's clone finds out in its task that a CT has the number
            file = f"/etc/pve/nodes/pve/{FOLDERS[kind]}/{newid}.conf"
            status = f"close (rename) atomic file '{file}' failed: File exists"
            record.upid = self._start_task(type_, source, user, 0.0, status)
            return
        if kind == CT:
            self.locks[source] = "disk"
        self.locks[newid] = TARGET_LOCKS[kind]
        self.guests.add(newid)
        (self.vms.add if kind == VM else self.vms.discard)(newid)
        if record.fault == "no-worker":
            record.refused = Refused(500, "got no worker upid - start worker failed")
            return
        running = [task for task in self.running() if task.type in CLONE_TASKS.values()]
        self.overlaps += any(task.source == source for task in running)
        self.most_at_once = max(self.most_at_once, len(running) + 1)
        status = self.exits.popleft() if self.exits else "OK"
        record.upid = self._start_task(type_, source, user, self.clone_seconds, status, newid)

    def finish(self, next_seconds: float = 0.05) -> None:
        """End the tasks that run now, as if their work were done; wait for one if there is none yet. What starts later
        takes so many seconds."""

        def kill() -> list[Task]:
            with self.lock:
                running = self.running()
                if running:
                    self.clone_seconds = next_seconds
                for task in running:
                    task.process.kill()
            return running

        for task in wait_until(kill, "a task to run"):
            task.process.wait()

    def idle(self) -> bool:
        with self.lock:
            return not self.running()

    def unlock(self, vmid: str) -> None:
        with self.lock:
            del self.locks[vmid]

    def wait_for_clones(self, count: int) -> None:
        wait_until(lambda: len(self.clones) >= count, f"{count} clone calls at PVE")


class QuietServer(http.server.ThreadingHTTPServer):
    """A server whose connections may break without a word."""

    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)


class FakePVEHandler(http.server.BaseHTTPRequestHandler):
    """pveproxy's way with HTTP."""

    # All these run a call; only the first is meant for programs. What an answer looks like in the others is of no interest here.
    FORMATS: ClassVar = {
        **dict.fromkeys(("json", "extjs"), "application/json;charset=UTF-8"),
        **dict.fromkeys(("html", "htmljs"), "text/html;charset=UTF-8"),
        "png": "image/png",
        "spiceconfig": "application/x-virt-viewer;charset=UTF-8",
    }
    # Not anchored, as PVE's own pattern: a request line may stand anywhere in a line.
    REQUEST_LINE = re.compile(r"([A-Z]+) (\S+) (HTTP/1\.[01])")
    FIELD_LINE = re.compile(r"([^:\s]+)\s*:\s*(.*)")
    MOST_LINES = 63  # of a head, the empty one included
    MOST_BYTES = 8191  # of its fields, without their line ends
    FRAGMENTS: ClassVar = {  # what faults say before they end the connection
        **dict.fromkeys(("reset", "close", "hang"), b""),
        "reset-in-head": b"HTTP/1.1 200 OK\r\nContent-Le",
        "reset-in-body": b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"data":"UPID',
        "garbage": b"\0\1 no HTTP at all\r\n\r\n",
    }

    pve: FakePVE
    timeout = 5
    disable_nagle_algorithm = True
    served = 0
    idle = True  # between two requests
    request_version = "HTTP/1.0"  # of the answer to what is no request
    format = "json"
    from_pvedaemon = False

    def setup(self) -> None:
        if self.pve.context:
            self.request.settimeout(10)
            self.request = self.pve.context.wrap_socket(self.request, server_side=True)
        super().setup()
        with self.pve.lock:
            self.pve.connections.add(self)

    def finish(self) -> None:
        with self.pve.lock:
            self.pve.connections.discard(self)
        with contextlib.suppress(OSError):
            super().finish()
        self.request.close()

    # Reading a head

    def handle_one_request(self) -> None:
        self.close_connection = self.idle = True
        with contextlib.suppress(EOFError, TimeoutError):
            try:
                if self.read_head():
                    self.answer()
            except Refused as refused:
                self.refuse(refused)

    def read_line(self) -> str:
        line = self.rfile.readline(1 << 16)
        if not line.endswith(b"\n"):
            raise EOFError
        return line[:-1].removesuffix(b"\r").decode("latin-1")

    def read_head(self) -> bool:
        """Read a head as PVE does; False if it is beyond the limits. Then PVE reads on as if a new request began here if the
        connection was used before, and otherwise lets it time out."""
        while not (line := self.read_line()):
            pass  # empty lines before a request are skipped
        self.idle = False
        self.format, self.from_pvedaemon = "json", False
        request_line = self.REQUEST_LINE.search(line)
        if not request_line:
            raise Refused(400, "bad request")
        self.command, self.path, self.request_version = request_line.groups()
        lines = self.read_field_lines()
        if lines is not None:
            self.take_fields(lines)
        elif self.served:
            self.close_connection = False
        else:
            self.pve.hanging.wait(self.pve.head_delay)
        return lines is not None

    def read_field_lines(self) -> list[str] | None:
        """The lines of the fields; None if they are too many. The one that was too many is lost, and what comes behind it
        not yet read."""
        lines: list[str] = []
        size = 0
        while True:
            line = self.read_line()
            size += len(line)
            if len(lines) == self.MOST_LINES or size > self.MOST_BYTES:
                return None
            if not line:
                return lines
            lines.append(line)

    def take_fields(self, lines: list[str]) -> None:
        """Take the fields in: `fields` as they came, `headers` with `-` for each `_` in a name."""
        self.fields: list[tuple[str, str]] = []
        for line in lines:
            if match := self.FIELD_LINE.match(line):
                self.fields.append((match[1], match[2]))
            elif line[0].isspace() and self.fields:
                name, value = self.fields.pop()
                self.fields.append((name, f"{value} {line.lstrip()}"))
            else:
                raise Refused(506, "unable to parse request header")
        self.headers = http.client.HTTPMessage()
        for name, value in self.fields:
            self.headers[name.replace("_", "-")] = value
        connection = self.headers.get("Connection", "")
        self.close_connection = "close" in connection.lower() or (self.request_version == "HTTP/1.0" and not connection)

    # Answering

    def send(self, status: int, reason: str, body: bytes | None, *fields: tuple[str, str]) -> None:
        """An answer; an empty body has no Content-Length, and an error closes the connection. What comes from pvedaemon
        brings a `Connection: close` of its own along, though this connection stays."""
        self.served += 1
        if status >= 400 or self.served >= 100 or self.pve.away:
            self.close_connection = True
        reason = reason.split("\n", 1)[0]
        head = [f"{self.request_version} {status} {reason}", "Server: pve-api-daemon/3.0", "Cache-Control: max-age=0"]
        if self.close_connection or self.from_pvedaemon:
            head.append("Connection: close")
        if not self.close_connection:
            head.append("Connection: Keep-Alive")
        head += [f"{name}: {value}" for name, value in fields]
        if body:
            head.append(f"Content-Length: {len(body)}")
        self.wfile.write("\r\n".join([*head, "", ""]).encode("latin-1") + (body or b""))

    def send_content(self, content: dict[str, object], status: int = 200, reason: str = "OK") -> None:
        self.send(status, reason, json.dumps(content).encode(), ("Content-Type", self.FORMATS[self.format]))

    def send_data(self, data: object) -> None:
        self.send_content({"data": data} | ({"success": 1} if self.format in ("extjs", "htmljs") else {}))

    def refuse(self, refused: Refused) -> None:
        """An error: its text is in the reason phrase, but the web GUI gets a 200 that tells of it."""
        errors = {"errors": refused.errors} if refused.errors else {}
        content: dict[str, object] = {"data": None, **errors, "message": refused.text + "\n"}
        if self.format in ("extjs", "htmljs"):
            self.send_content({**content, "success": 0, "status": refused.status})
        else:
            self.send_content(content, refused.status, refused.text)

    def misbehave(self, fault: str) -> None:
        """Do what a fault says: `reset`, `reset-in-head`, `reset-in-body`, `close`, `hang`, `garbage`, `json:...` (a 200
        with that body), `STATUS TEXT` (an empty body from 595 on). Behind a `+` the call is carried out first. Of clones
        there are two more: `no-worker`, a refusal that leaves source and target locked, and `daemon-stopped`, a 596 after
        `daemon_delay` with the clone carried out then."""
        status, _, text = fault.partition(" ")
        if fault.startswith("json:"):
            self.send(200, "OK", fault[5:].encode(), ("Content-Type", "application/json"))
        elif status.isdigit() and int(status) >= 595:  # pveproxy's own, for want of an answer
            self.send(int(status), text, None)
        elif status.isdigit():
            self.refuse(Refused(int(status), text))
        else:
            self.close_connection = True
            if fault == "hang":
                self.pve.hanging.wait(60)
            self.connection.sendall(self.FRAGMENTS[fault])
            if fault.startswith("reset"):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())  # a TLS close would say goodbye first

    def user(self) -> str:
        """Who asks, by token or else by ticket; a ticket needs its second token for all but reading."""
        authorization = self.headers.get("Authorization", "")
        if authorization.startswith("PVEAPIToken"):
            token = re.fullmatch(f"PVEAPIToken[= ]({USER_ID}!{TOKEN_NAME})=secret", authorization)
            if not token:
                raise Refused(401, "invalid token value!")
            return token[1]
        cookie = re.search(r"PVEAuthCookie=([^;\s]+)", self.headers.get("Cookie", ""))
        if not cookie:
            raise Refused(401, "No ticket")
        ticket = re.fullmatch(f"PVE:({USER_ID}):good", urllib.parse.unquote(cookie[1]))
        if not ticket:
            raise Refused(401, "permission denied - invalid PVE ticket")
        if self.command != "GET" and self.headers.get("CSRFPreventionToken") != "token":
            raise Refused(401, "Permission denied - invalid csrf token")
        return ticket[1]

    def answer(self) -> None:
        with self.pve.lock:
            self.pve.requests += 1
        target = urllib.parse.urlsplit(self.path)
        # Decoded first and split then; a line end at the path's end is lost on PVE's patterns.
        path = urllib.parse.unquote(target.path, "latin-1").removesuffix("\n")
        parts = [part for part in path.split("/") if part]
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if self.command not in ("GET", "POST", "PUT", "DELETE"):
            raise Refused(501, f"Unexpected method '{self.command}'")
        if has_body and self.command not in ("POST", "PUT") and self.headers.get("Content-Length") != "0":
            raise Refused(501, f"Unexpected content for method '{self.command}'")
        if "Transfer-Encoding" in self.headers:
            raise Refused(501, "chunked transfer encoding not supported")
        length = int(self.headers.get("Content-Length", "0"))
        if parts[-1:] == ["upload"]:
            self.upload(length)
            return
        if length > 512 * 1024:
            raise Refused(501, "for data too large")
        body = self.rfile.read(length)
        if parts[-1:] not in (["clone"], ["status"], ["version"]) and (fault := self.pve.random_fault("relay")):
            self.misbehave(fault)
        else:
            self.call(parts, target.query, body)

    def call(self, parts: list[str], query: str, body: bytes) -> None:
        """A call of the API, its body read, or the web GUI's page."""
        match parts:
            case ["api2", format_, "access", "ticket"]:
                self.format = format_ if format_ in self.FORMATS else "json"
                self.login(parameters_of("", body, self.headers.get("Content-Type", "")))
            case ["api2", _, "access", "domains"]:
                self.send_data([{"realm": "pam", "type": "pam"}])
            case ["api2", format_, _, *_]:
                self.call_by_user(format_, parts[2:], query, body)
            case _:
                fields = ("Content-Type", "text/html; charset=utf-8"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")
                self.send(200, "OK", b"<!doctype html><title>pve - Proxmox Virtual Environment</title>", *fields)

    def call_by_user(self, format_: str, parts: list[str], query: str, body: bytes) -> None:
        """A call that only somebody whom PVE knows may make."""
        try:
            user = self.user()
        except Refused as refused:
            self.pve.hanging.wait(self.pve.auth_delay)
            self.send(401, refused.text, None)
            return
        if format_ not in self.FORMATS:
            raise Refused(501, f"no formatter for uri /{'/'.join(parts)}, format {format_}")
        self.format = format_
        match parts:
            case ["version"]:
                self.send_data({"version": "9.0.3", "release": "9.0", "repoid": "025864202ebb6109"})
            case ["empty"]:
                self.send(200, "OK", None)
            case ["nodes", _, _, _, "vncwebsocket"] if self.headers.get("Upgrade") == "websocket":
                self.console()
            case ["nodes", _, "download"]:
                self.download(int(dict(urllib.parse.parse_qsl(query))["bytes"]))
            case ["nodes" | "cluster", *_]:
                self.from_pvedaemon = True
                if self.pve.daemon_away:
                    self.misbehave("595 Connection refused")
                else:
                    parameters = parameters_of(query, body, self.headers.get("Content-Type", ""))
                    self.call_pvedaemon(user, parts, parameters, body)
            case _:
                raise self.unknown(parts)

    def call_pvedaemon(self, user: str, parts: list[str], parameters: dict[str, object], body: bytes) -> None:
        """A call that pveproxy hands on to pvedaemon."""
        pve = self.pve
        match [self.command, *parts]:
            case ["GET", "cluster", "nextid"]:
                self.send_data(pve.next_id(parameters))
            case ["GET", "cluster", "resources"]:
                self.send_data(pve.list_guests(CT, VM))
            case ["GET", "nodes", _, ("lxc" | "qemu") as kind]:
                self.send_data(pve.list_guests(kind))
            case ["DELETE", "nodes", _, ("lxc" | "qemu") as kind, vmid]:
                self.send_data(pve.delete(kind, vmid, user))
            case ["GET", "nodes", _, "tasks"] if parameters.get("source") == "active":
                self.send_data(pve.list_tasks(user, parameters))
            case ["GET", "nodes", _, "tasks", upid, "status"]:
                self.task_status(upid, user)
            case ["POST", "nodes", node, ("lxc" | "qemu") as kind, source, "clone"]:
                record = CloneRecord(time.monotonic(), self.path, source, "", self.fields, body)
                self.clone(record, kind, node, parameters, user)
            case _:
                raise self.unknown(parts)

    def unknown(self, parts: list[str]) -> Refused:
        """The refusal of a call that there is not."""
        return Refused(501, f"Method '{self.command} /{'/'.join(parts)}' not implemented")

    def login(self, parameters: dict[str, object]) -> None:
        if parameters.get("password") == "good":
            self.send_data({"ticket": f"PVE:{parameters.get('username')}:good", "CSRFPreventionToken": "token"})
            return
        if self.format == "json":
            self.pve.hanging.wait(self.pve.auth_delay)
        raise Refused(401, "authentication failure")

    def clone(self, record: CloneRecord, kind: str, node: str, parameters: dict[str, object], user: str) -> None:
        """A clone, unless a fault comes first."""
        pve = self.pve
        try:
            if isinstance(parameters.get("newid"), list | dict):
                raise Refused(403, "Permission check failed")  # no permission is found for such a path
            record.newid = vmid_of(parameters, "newid")
        except Refused as refused:
            record.refused = refused
        with pve.lock:
            record.fault = fault = pve.clone_faults.popleft() if pve.clone_faults else pve.random_fault("clone")
        if fault == "daemon-stopped":
            pve.hanging.wait(pve.daemon_delay)
            self.misbehave("596 Connection timed out")
            pve.clone(record, kind, node, user)
            return
        if fault and fault != "no-worker" and not fault.startswith("+"):
            with pve.lock:
                pve.clones.append(record)
            self.misbehave(fault)
            return
        pve.clone(record, kind, node, user)
        pve.hanging.wait(pve.post_seconds)
        if fault.startswith("+"):
            self.misbehave(fault[1:])
        elif record.refused:
            raise record.refused
        else:
            self.send_data(record.upid)

    def task_status(self, upid: str, user: str) -> None:
        pve = self.pve
        with pve.lock:
            pve.polls += 1
            fault = pve.poll_faults.popleft() if pve.poll_faults else pve.random_fault("poll")
        if fault:
            self.misbehave(fault)
        else:
            self.send_data(pve.task_status(upid, user))

    def upload(self, length: int) -> None:
        """A file of any size; the connection closes after it."""
        left = length
        while left and (piece := self.rfile.read1(min(left, 1 << 20))):
            left -= len(piece)
        self.close_connection = True
        if not left:
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


class Wire(Closing):
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

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def send_until_stopped(self) -> None:
        """Send until the peer takes no more for a while."""
        self.sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                self.send(bytes(1 << 20))

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
        status = message.first[9:12] if message.first.startswith(b"HTTP/") else b""
        length = message.get("content-length")
        if no_body or status.startswith(b"1") or status in (b"204", b"304"):
            pass
        elif message.get("transfer-encoding") == b"chunked":
            while size := int(self.until(b"\r\n"), 16):
                message.body += self.exactly(size)
                self.exactly(2)
            self.until(b"\r\n")
        elif length is not None:
            message.body = self.exactly(int(length))
        elif status:
            message.body = self.rest()
        return message

    def ask(self, data: bytes, no_body: bool = False) -> Message:
        self.send(data)
        return self.message(no_body)

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

    @property
    def target(self) -> bytes:
        return self.first.split()[1]

    def all(self, name: str) -> list[bytes]:
        return [value for field, value in self.fields if field.lower() == name.lower().encode()]

    def get(self, name: str) -> bytes | None:
        """The value of a field; the last one if it stands twice."""
        values = self.all(name)
        return values[-1] if values else None


class ScriptedBackend(Closing):
    """A backend whose every connection follows a script of the test's, from its first byte on; one that brings none, since
    the proxy looks whether anybody is there, does not count."""

    def __init__(self, script: Callable[[Wire], None], tls: bool = False) -> None:
        self.script = script
        self.context = server_context() if tls else None
        self.requests: list[Message] = []
        self.connections = 0
        self.open = 0
        self.failures: list[BaseException] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(Wire(sock),), daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        with wire, contextlib.suppress(OSError, EOFError):
            if self.context:
                wire.sock = self.context.wrap_socket(wire.sock, server_side=True)
            if not wire.more():
                return
            with self._lock:
                self.connections += 1
                self.open += 1
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

    def asked(self) -> bool:
        return bool(self.requests)

    def idle(self) -> bool:
        return not self.open

    def request(self, wire: Wire) -> Message:
        """The next request on a connection, noted."""
        message = wire.message()
        self.requests.append(message)
        return message

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def replying(reply: Callable[[Message], bytes]) -> ScriptedBackend:
    """A backend that gives each request what the function makes of it."""

    def script(wire: Wire) -> None:
        while True:
            wire.send(reply(backend.request(wire)))

    backend = ScriptedBackend(script)
    return backend


def answering(*answers: bytes) -> ScriptedBackend:
    """A backend that gives each request the next answer, the last one for ever."""
    left = collections.deque(answers)
    return replying(lambda request: left.popleft() if len(left) > 1 else left[0])


def saying(answer: bytes, then: Callable[[Wire], object] = lambda wire: None, tls: bool = False) -> ScriptedBackend:
    """A backend that answers a request's head, whatever its body, goes on so, and closes."""

    def script(wire: Wire) -> None:
        backend.requests.append(wire.head())
        wire.send(answer)
        then(wire)

    backend = ScriptedBackend(script, tls)
    return backend


def silent(wire: Wire) -> None:
    """A script: read and say nothing."""
    wire.rest()


def ok(body: bytes) -> bytes:
    """A good answer."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def echoing() -> ScriptedBackend:
    """A backend that answers with the request's target."""
    return replying(lambda request: ok(request.target))


def by_path(answers: list[bytes]) -> ScriptedBackend:
    """A backend that gives a request for /N the Nth answer, and then closes."""

    def script(wire: Wire) -> None:
        wire.send(answers[int(backend.request(wire).target[1:])])

    backend = ScriptedBackend(script)
    return backend


ENDLESS = 3600.0  # seconds of a clone that lasts until `finish`
OK = ok(b"ok")
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\n"  # without the end of its head
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
UPGRADE = (b"GET /api2/json/nodes/pve/lxc/100/vncwebsocket?port=5900&vncticket=x HTTP/1.1\r\nHost: h\r\n"
           b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
           b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: PVEAPIToken=root@pam!ci=secret\r\n\r\n")  # fmt: skip


class Proxy(Closing):
    """The program as a process of its own, listening on a free port; `constants` are set before it runs."""

    def __init__(self, backend: str, *flags: str, env: dict[str, str] | None = None, port: int = 0, constants: str = "") -> None:
        program_arguments = [PROGRAM]
        if constants:
            code = f"import os, sys; sys.path.insert(0, {HERE!r}); import pve_clone_queue_proxy as program\n"
            program_arguments = ["-c", f"{code}{constants}\nos._exit(program.main(sys.argv[1:]))"]
        command = [sys.executable, *program_arguments, "-listen", f"127.0.0.1:{port}", "-backend", backend, *flags]
        environment = {key: value for key, value in os.environ.items() if key != "JOURNAL_STREAM"} | (env or {})
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.tls = "-tls-cert" in flags
        self.wires: list[Wire] = []
        self.log: list[str] = []
        self._logged = threading.Condition()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.port = int(self.wait_log(r"LISTENING: 127\.0\.0\.1:(\d+)")[1])

    def _read_log(self) -> None:
        assert self.process.stderr
        for line in itertools.chain(self.process.stderr, ["(end of log)"]):
            with self._logged:
                self.log.append(line.rstrip("\n"))
                self._logged.notify_all()

    def wait_log(self, pattern: str, count: int = 1, seconds: float = LONG) -> re.Match[str]:
        """Wait for that many log lines that match; the last one's match."""

        def found() -> list[re.Match[str]]:
            return [match for line in self.log if (match := re.search(pattern, line))]

        with self._logged:
            self._logged.wait_for(lambda: len(found()) >= count or "(end of log)" in self.log, seconds)
            if len(found()) < count:
                raise AssertionError(f"no log line {pattern!r} (x{count}) in:\n" + "\n".join(self.log))
            return found()[count - 1]

    def lines(self, pattern: str) -> list[str]:
        """The log lines so far that match."""
        return [line for line in self.log if re.search(pattern, line)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal (0: wait for its end); its exit status. What it logged must hold no traceback."""
        if number and self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(LONG * 3)
        self._reader.join(LONG)
        for wire in self.wires:
            wire.close()
        assert self.process.stderr
        self.process.stderr.close()
        if any("Traceback" in line for line in self.log):
            raise AssertionError("a traceback in the log:\n" + "\n".join(self.log))
        return status

    def close(self) -> None:
        self.stop(signal.SIGKILL if sys.exc_info()[0] else signal.SIGTERM)

    def wire(self) -> Wire:
        return Wire.to(self.port, self.tls)

    def tunnel(self) -> Wire:
        """An upgraded connection."""
        wire = self.wire()
        wire.send(UPGRADE)
        wire.head()
        return wire

    def ask(self, data: bytes, no_body: bool = False) -> Message:
        """The answer to one request on a connection of its own."""
        with self.wire() as wire:
            return wire.ask(data, no_body)

    def get(self, path: str, *fields: str) -> Message:
        lines = [f"GET {path} HTTP/1.1", "Host: pve", *fields, "Connection: close", "", ""]
        return self.ask("\r\n".join(lines).encode())

    def clone(self, newid: object, source: object = 9000, **more: Any) -> Message:
        return self.ask(clone_request(newid, source, **more))

    def status(self, field: str) -> str:
        """A line of its /proc/PID/status."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(line.split()[1] for line in file if line.startswith(field + ":"))

    def memory(self, field: str = "VmRSS") -> int:
        """Kilobytes of memory."""
        return int(self.status(field))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))


def clone_request(newid: object, source: object = 9000, token: str = TOKEN, path: str = "", extra: str = "") -> bytes:
    """A clone call as clients send it."""
    body = f"newid={newid}"
    path = path or f"/api2/json/nodes/pve/lxc/{source}/clone"
    return (
        f"POST {path} HTTP/1.1\r\nHost: pve:8006\r\nAuthorization: {token}\r\n{extra}"
        f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


@dataclasses.dataclass
class Choice:
    """How a client that chose its VMID itself has fared."""

    tries: int
    newid: int
    status: int
    text: str  # of the last answer's status line
    upid: str = ""


@dataclasses.dataclass
class Chooser:
    """A client that chooses its VMID as real ones do, clones, and chooses again when the number is taken (or on any 500).

    It speaks to a port of this host, be it PVE's or the proxy's, each request on a connection of its own. `start` is the
    smallest number it wants, `address` the one it comes from. A method for each way to choose.
    """

    port: int
    tls: bool = False
    token: str = TOKEN
    tries: int = 5
    source: int = 9000
    start: int = 100
    address: str = "127.0.0.1"
    patience: float = 600.0  # seconds it waits for an answer

    def by_list(self) -> Choice:
        """The smallest number that no guest has, as the cmux client does it."""
        return self._clone(self._unlisted)

    def by_nextid(self) -> Choice:
        """PVE's own choice, as proxmoxer's users, Ansible and Packer do it."""
        return self._clone(self._nextid)

    def by_probe(self) -> Choice:
        """The first number from `start` on that PVE says is free, as Telmate's provider does it."""
        return self._clone(lambda: self._probe(self.start))

    def by_nextid_then_probe(self) -> Choice:
        """PVE's own choice, and the next ones if that is no longer free, as bpg's provider does it."""
        return self._clone(lambda: self._probe(self._nextid()))

    def _clone(self, choose: Callable[[], int]) -> Choice:
        """Choose and clone, again and again if need be. A choice that can't be made ends it, with the number 0."""
        for tries in range(1, self.tries + 1):
            newid = 0
            try:
                newid = choose()
                return Choice(tries, newid, 200, "OK", self._ask(clone_request(newid, self.source, self.token)))
            except Refused as refused:
                choice = Choice(tries, newid, refused.status, refused.text)
            if not newid or (choice.status != 500 and "already exists" not in choice.text):
                break
        return choice

    def _unlisted(self) -> int:
        taken = {int(guest["vmid"]) for kind in (CT, VM) for guest in self._get(f"/api2/json/nodes/pve/{kind}")}
        return next(number for number in itertools.count(self.start) if number not in taken)

    def _nextid(self) -> int:
        return int(self._get("/api2/json/cluster/nextid"))

    def _probe(self, number: int) -> int:
        """The first number from this one on that is free."""
        while True:
            try:
                return int(self._get(f"/api2/json/cluster/nextid?vmid={number}"))
            except Refused as refused:
                if refused.status != 400:
                    raise
            number += 1

    def _get(self, path: str) -> Any:
        request = f"GET {path} HTTP/1.1\r\nHost: pve\r\nAuthorization: {self.token}\r\nConnection: close\r\n\r\n"
        return self._ask(request.encode())

    def _ask(self, request: bytes) -> Any:
        """The data of a good answer; Refused if it is another one."""
        sock = socket.create_connection(("127.0.0.1", self.port), self.patience, (self.address, 0))
        with Wire(client_context().wrap_socket(sock) if self.tls else sock) as wire:
            wire.sock.settimeout(self.patience)
            answer = wire.ask(request)
        if answer.status != 200:
            raise Refused(answer.status, answer.first[13:].decode("latin-1"))
        return json.loads(answer.body)["data"]


@contextlib.contextmanager
def unused_port() -> Iterator[int]:
    """A port on which nobody listens, given to nobody else meanwhile."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()[1]


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """The results of that many calls made at the same time."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


# Tests of the simulated PVE itself


def padding(count: int) -> str:
    """So many header lines that say nothing."""
    return "".join(f"X-{number}: x\r\n" for number in range(count))


class SimulatedPVE(unittest.TestCase):
    """What the other tests rely on: it is as odd as the real one."""

    def setUp(self) -> None:
        self.pve = self.enterContext(FakePVE(tls="", clone_seconds=ENDLESS))

    def ask(self, target: str, method: str = "GET", *, body: str = "", token: str = TOKEN, extra: str = "") -> Message:
        """The answer to one request on a connection of its own."""
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        with Wire.to(self.pve.port) as wire:
            return wire.ask(f"{method} {target} HTTP/1.1\r\nAuthorization: {token}\r\n{extra}{length}\r\n{body}".encode())

    def data(self, target: str, token: str = TOKEN) -> Any:
        return json.loads(self.ask("/api2/json" + target, token=token).body)["data"]

    def clone(self, newid: object, source: object = 9000, kind: str = "lxc", token: str = TOKEN) -> Message:
        return self.ask(f"/api2/json/nodes/pve/{kind}/{source}/clone", "POST", body=f"newid={newid}", token=token)

    def text(self, answer: Message) -> str:
        return answer.first[9:].decode()

    def test_a_head_beyond_the_limits_on_a_fresh_connection_gets_no_answer(self) -> None:
        for fields, answered in [
            (padding(62), True), (padding(63), False), (f"X:{'x' * 8189}\r\n", True), (f"X:{'x' * 8190}\r\n", False)
        ]:  # fmt: skip
            with self.subTest(len(fields)), Wire.to(self.pve.port) as wire:
                wire.send(f"GET / HTTP/1.1\r\n{fields}\r\n".encode())
                if answered:
                    self.assertEqual(wire.message().status, 200)
                else:
                    self.assertTrue(wire.closed())

    def test_a_head_beyond_the_limits_on_a_used_connection_smuggles_a_request(self) -> None:
        call = "X-a: POST /api2/json/nodes/pve/lxc/9000/clone?newid=953 HTTP/1.1"
        with Wire.to(self.pve.port) as wire:
            self.assertEqual(wire.ask(GET).status, 200)
            smuggling = f"GET / HTTP/1.1\r\n{padding(64)}{call}\r\nAuthorization: {TOKEN}\r\n\r\n".encode()
            self.assertIn(b"vzclone", wire.ask(smuggling).body)
        self.assertEqual([record.newid for record in self.pve.clones], ["953"])
        with Wire.to(self.pve.port) as wire:
            wire.ask(GET)
            answer = wire.ask(f"GET / HTTP/1.1\r\n{padding(65)}{call}\r\n\r\n".encode())
            self.assertEqual(self.text(answer), "400 bad request", "only the line behind the dropped one can be one")

    def test_underscores_in_names_are_hyphens(self) -> None:
        with Wire.to(self.pve.port) as wire:
            self.assertEqual(wire.ask(clone_request(201).replace(b"Content-Length", b"Content_Length")).status, 200)

    def test_paths_and_formats(self) -> None:
        self.pve.locks["9000"] = "backup"
        for target, text in [
            ("json//nodes/pve%2flxc/9000/%63lone%0a", "500 CT is locked (backup)"),
            ("htmljs/nodes/pve/lxc/9000/clone", "200 OK"),
            *((f"{name}/nodes/pve/lxc/9000/clone", "500 CT is locked (backup)") for name in ("html", "png", "spiceconfig")),
            ("text/nodes/pve/lxc/9000/clone", "501 no formatter for uri /nodes/pve/lxc/9000/clone, format text"),
            ("json/nodes/pve/lxc/9000/clone%00", "501 Method 'POST /nodes/pve/lxc/9000/clone\0' not implemented"),
        ]:
            with self.subTest(target):
                self.assertEqual(self.text(self.ask(f"/api2/{target}", "POST", body="newid=201")), text)

    def test_parameters(self) -> None:
        form, as_json = "", "application/json"
        for query, body, content_type, newid in [
            ("newid=7", "newid=8", form, "7"), ("", "a=1;newid=201&b", form, "201"), ("", "newid=904=5", form, "904"),
            ("", "new%69d=+2%301", form, " 201"), ("", "newid=1;newid=2&newid=3", form, ["1", "2", "3"]),
            ("", "newid=", form, ""), ("", "newid", form, None), ("newid=3", "newid=1&newid=2", form, "3"),
            ("", '{"newid":9}', as_json, 9), ("", '{"newid":9}', form, None),
            ("", '{"newid":"9"}', "application/json; charset=utf-8", "9"),
        ]:  # fmt: skip
            with self.subTest(query=query, body=body):
                self.assertEqual(parameters_of(query, body.encode(), content_type).get("newid"), newid)
        self.assertEqual(self.text(self.clone("1&newid=1")), "403 Permission check failed")
        for newid in ("", "x", "99"):
            with self.subTest(newid):
                self.assertEqual(self.text(self.clone(newid)), "400 Parameter verification failed.")
        self.assertEqual(self.clone("0201").status, 200)
        self.assertIn("201", self.pve.guests)

    def test_refusals_of_clones_and_their_order(self) -> None:
        self.assertEqual(self.text(self.clone(201)), "200 OK")
        for newid, source, kind, text in [
            (201, 9000, "lxc", "CT is locked (disk)"),
            (202, 201, "lxc", "CT is locked (create)"),
            (201, 9001, "lxc", "CT 201 already exists on node 'pve'"),
            (8000, 9001, "lxc", "VM 8000 already exists on node 'pve'"),
            (202, 8000, "lxc", "unable to find configuration file for CT 8000 on node 'pve'"),
            (8001, 8000, "qemu", "unable to create VM 8001: config file already exists"),
        ]:
            with self.subTest(text):
                self.assertEqual(self.text(self.clone(newid, source, kind)), f"500 {text}")
        upid = json.loads(self.clone(201, 8000, "qemu").body)["data"]
        status = f"/nodes/pve/tasks/{upid}/status"
        wait_until(lambda: self.data(status)["status"] == "stopped")
        self.assertRegex(self.data(status)["exitstatus"], r"^close \(rename\) atomic file '.*/201\.conf' failed: File exists$")
        self.assertEqual([self.clone(newid, 8000, "qemu").status for newid in (301, 302)], [200, 200], "no lock on a VM")
        self.assertEqual(self.pve.overlaps, 1)

    def test_new_guests_are_listed_and_their_numbers_not_free(self) -> None:
        self.assertEqual(self.data("/cluster/nextid"), "100")
        self.clone(100)
        self.clone(101, 8000, "qemu")
        self.assertEqual(self.data("/cluster/nextid"), "102")
        self.assertEqual(self.data("/cluster/nextid?vmid=102"), "102")
        answer = self.ask("/api2/json/cluster/nextid?vmid=100")
        self.assertEqual(self.text(answer), "400 Parameter verification failed.")
        self.assertEqual(json.loads(answer.body)["errors"], {"vmid": "VM 100 already exists"})
        containers = {guest["vmid"]: guest.get("lock") for guest in self.data("/nodes/pve/lxc")}
        self.assertEqual(containers, {100: "create", 9000: "disk", 9001: None, 9002: None})
        self.assertIn(101, [guest["vmid"] for guest in self.data("/nodes/pve/qemu")])
        self.assertEqual(len(self.data("/cluster/resources")), 7)
        self.assertEqual(self.text(self.ask("/api2/json/nodes/pve/lxc/100", "DELETE")), "500 CT is locked (create)")
        self.pve.finish()
        self.assertEqual(self.ask("/api2/json/nodes/pve/lxc/100", "DELETE").status, 200)
        self.assertEqual(self.data("/cluster/nextid"), "100")

    def test_running_tasks_are_listed_for_their_owner_and_the_list_may_be_old(self) -> None:
        other = "PVEAPIToken=o?d%d#@pve!ci=secret"
        upid = json.loads(self.clone(201, token=other).body)["data"]
        self.assertTrue(upid.endswith(":o?d%d#@pve!ci:"))
        path = "/nodes/pve/tasks?source=active&vmid=9000&typefilter=vzclone"
        self.assertEqual([(task["upid"], task["status"]) for task in self.data(path, other)], [(upid, "RUNNING")])
        self.assertEqual(self.data(path), [], "a token sees its own alone")
        self.pve.privileged.add("root@pam!ci")
        self.assertEqual(len(self.data(path)), 1)
        self.assertEqual(self.data(path.replace("9000", "9001")), [])
        self.pve.finish(ENDLESS)
        status = f"/nodes/pve/tasks/{urllib.parse.quote(upid)}/status"
        wait_until(lambda: self.data(status, other)["status"] == "stopped")
        self.assertEqual(len(self.data(path)), 1, "still listed")
        self.clone(202, 9001)
        self.assertEqual(self.data(path), [], "a task's start brings the list up to date")
        self.pve.list_age = 0
        self.pve.finish()
        wait_until(lambda: not self.data("/nodes/pve/tasks?source=active"))

    def test_logins(self) -> None:
        cookie = "Cookie: PVEAuthCookie=PVE:root@pam:good\r\n"
        self.pve.auth_delay = 0.0
        for method, token, extra, text in [
            ("GET", "PVEAPIToken=root@pam!ci=wrong", "", "401 invalid token value!"),
            ("GET", "PVEAPIToken=root@pam!t=secret", "", "401 invalid token value!"),
            ("GET", "x", "", "401 No ticket"),
            ("POST", "x", cookie, "401 Permission denied - invalid csrf token"),
        ]:
            with self.subTest(text):
                answer = self.ask("/api2/json/version", method, token=token, extra=extra)
                self.assertEqual((self.text(answer), answer.get("content-length"), answer.body), (text, None, b""))
        cookie += "CSRFPreventionToken: token\r\n"
        self.assertEqual(self.ask("/api2/json/version", "POST", token="x", extra=cookie).status, 200)
        answer = self.ask("/api2/json/access/ticket", "POST", body="username=root@pam&password=bad")
        self.assertEqual((answer.status, json.loads(answer.body)["data"]), (401, None))

    def test_answers_of_pvedaemon_say_close_and_keep_alive(self) -> None:
        with Wire.to(self.pve.port) as wire:
            for path, connection in [("/cluster/nextid", [b"close", b"Keep-Alive"]), ("/version", [b"Keep-Alive"])]:
                answer = wire.ask(f"GET /api2/json{path} HTTP/1.1\r\nAuthorization: {TOKEN}\r\n\r\n".encode())
                self.assertEqual(answer.all("connection"), connection)

    def test_workers_that_are_killed_stopped_or_not_started(self) -> None:
        self.clone(201)
        self.clone(202, 9001)
        killed, stopped = self.pve.tasks
        self.pve.interrupt(killed, KILLED)
        self.pve.interrupt(stopped, INTERRUPTED)
        self.pve.clone_faults.append("no-worker")
        self.assertEqual(self.text(self.clone(203, 9002)), "500 got no worker upid - start worker failed")
        statuses = [self.data(f"/nodes/pve/tasks/{upid}/status")["exitstatus"] for upid in (killed, stopped)]
        self.assertEqual(statuses, ["unexpected status", "clone failed: interrupted by signal"])
        self.assertEqual(self.pve.locks, {"9000": "disk", "201": "create", "9002": "disk", "203": "create"})
        self.assertNotIn("202", self.pve.guests)

    def test_pve_away(self) -> None:
        with Wire.to(self.pve.port) as idle:
            idle.ask(GET)
            self.pve.daemon_away = True
            answer = self.clone(201)
            self.assertEqual((self.text(answer), answer.body, self.pve.clones), ("595 Connection refused", b"", []))
            self.pve.daemon_away = False
            self.pve.clone_faults.append("daemon-stopped")
            answer = self.clone(201)
            self.assertEqual((self.text(answer), answer.get("content-length")), ("596 Connection timed out", None))
            wait_until(lambda: "201" in self.pve.guests, "the clone to run all the same")
            self.pve.go_away()
            self.assertTrue(idle.closed())
        with self.assertRaises(ConnectionRefusedError):
            Wire.to(self.pve.port)
        self.pve.come_back()
        self.assertEqual(self.ask("/").status, 200)

    def test_clients_that_choose_their_numbers(self) -> None:
        chooser = Chooser(self.pve.port, tries=2)
        for number, choose in enumerate([chooser.by_list, chooser.by_nextid, chooser.by_probe, chooser.by_nextid_then_probe], 100):
            with self.subTest(choose.__name__):
                choice = choose()
                self.assertEqual((choice.tries, choice.newid, choice.status), (1, number, 200))
                self.pve.finish(ENDLESS)
        self.pve.clone_faults.append("500 CT 104 already exists on node 'pve'")
        choice = chooser.by_list()
        self.assertEqual((choice.tries, choice.newid, choice.status), (2, 104, 200))
        choice = chooser.by_nextid()
        self.assertEqual((choice.tries, choice.newid, choice.text), (2, 105, "CT is locked (disk)"))
        self.pve.daemon_away = True
        choice = chooser.by_probe()
        self.assertEqual((choice.tries, choice.newid, choice.status), (1, 0, 595))


# Tests of single functions


class Flags(unittest.TestCase):
    def test_defaults(self) -> None:
        settings = program.parse_flags([])
        self.assertEqual(settings.listen, ("", 8081))
        self.assertEqual(settings.backend.geturl(), "https://127.0.0.1:8006")
        self.assertEqual((settings.insecure, settings.poll_delay, settings.task_timeout), (True, 0.5, 300))
        self.assertEqual((settings.request_timeout, settings.queue_size, settings.lock_timeout), (30, 100, 300))

    def test_go_syntax(self) -> None:
        settings = program.parse_flags(
            ["--listen", "[::1]:1", "-backend=http://pve.example:80", "-insecure=false", "--verbose", "-queue-size=3"]
        )
        self.assertEqual(settings.listen, ("::1", 1))
        self.assertEqual(settings.backend.geturl(), "http://pve.example:80")
        self.assertEqual((settings.insecure, settings.verbose, settings.queue_size), (False, True, 3))
        self.assertTrue(program.parse_flags(["-insecure=false", "-insecure"]).insecure)
        self.assertFalse(program.parse_flags(["-insecure", "false"]).insecure)

    def test_durations_in_gos_syntax(self) -> None:
        for text, seconds in [
            ("300ms", 0.3), ("1.5h", 5400), ("1m30s", 90), (".5s", 0.5), ("0", 0), ("5m", 300), ("1h30m", 5400),
            ("2.s", 2), ("100us", 1e-4), ("7µs", 7e-6), ("1000000ns", 1e-3), ("+3s", 3),
        ]:  # fmt: skip
            with self.subTest(text):
                self.assertAlmostEqual(program.parse_duration(text), seconds)

    def test_durations_that_go_refuses(self) -> None:
        for text in ["", "5", "s", "1 s", "-1s", "1x", "1s ", ".s", "1e3s", "٣s", "1_0s", "0x1s", "9" * 40 + "h", "+"]:
            with self.subTest(text), self.assertRaises(program.WrongValue):
                program.parse_duration(text)

    def test_errors_name_flag_and_value(self) -> None:
        for line, word in [
            ("-poll-delay 5", "'5'"), ("-poll-delay", "expected one argument"), ("-nonsense", ""), ("-insecure=maybe", "'maybe'"),
            ("-insecure no", "'no'"), ("-listen 8081", "'8081'"), ("-listen :99999", "':99999'"),
            ("-backend https://host/path", "'https://host/path'"), ("-backend ftp://host", ""), ("-backend https://u@host", ""),
            ("-queue-size 0", "'0'"), ("-queue-size +5", "'+5'"), ("-task-timeout 0", ""), ("-answer never", "'never'"),
            ("-tls-cert x", "-tls-key"), ("-- x", "x"),
        ]:  # fmt: skip
            with self.subTest(line), self.assertRaises(program.FlagError) as caught:
                program.parse_flags(line.split())
            self.assertIn(re.split("[ =]", line)[0], str(caught.exception))
            self.assertIn(word, str(caught.exception))


class CloneRecognition(unittest.TestCase):
    """A path is a clone when PVE reads it as one."""

    def call_of(self, line: str, vms: bool = False) -> program.CloneCall | None:
        return program.clone_call(program.Request(f"{line} HTTP/1.1\r\nHost: pve\r\n"), vms)

    def test_spellings_that_pve_accepts(self) -> None:
        path = "/api2/json/nodes/pve/lxc/9000/clone"
        for target in [
            path, path + "/", path + "?newid=5", path + "%0A", path + "/%0a", "http://elsewhere" + path,
            "/api2/json//nodes/pve/lxc/9000//clone", "/api2/json/nodes/pve/lxc/9000/%63lone",
            "/api2/json/nodes/pve%2Flxc/9000/clone", "/%61pi2/json/nodes/any%20thing/lxc/1/clone",
            "/api2/json/nodes/localhost/lxc/00000000000000000000001/clone",
        ]:  # fmt: skip
            with self.subTest(target):
                self.assertIsNotNone(self.call_of(f"POST {target}"))

    def test_everything_else_is_relayed(self) -> None:
        for line in [
            "GET /api2/json/nodes/pve/lxc/9000/clone", "PUT /api2/json/nodes/pve/lxc/9000/clone",
            "POST /api2/extjs/nodes/pve/lxc/9000/clone", "POST /api2/json/nodes/pve/qemu/9000/clone",
            "POST /api2/json/nodes/pve/lxc/9000/clone/x", "POST /api2/json/nodes/pve/lxc/9000/snapshot",
            "POST /api2/json/nodes/pve/lxc/9000/%2563lone", "POST /api2/json/nodes/pve/lxc/x9000/clone",
            "POST /api2/json/nodes/pve/lxc/%D9%A3/clone", "POST /api2/json/nodes/pve/lxc/clone",
            "POST /?/api2/json/nodes/pve/lxc/9000/clone",
        ]:  # fmt: skip
            with self.subTest(line):
                self.assertIsNone(self.call_of(line))

    def test_vms_when_asked_for(self) -> None:
        self.assertEqual(self.call_of("POST /api2/json/nodes/n/qemu/9/clone", vms=True), ("qemu", "n", "9", "", ""))

    def test_newid_in_all_three_places(self) -> None:
        for query, body, newid in [
            ("newid=7", b"", "7"), ("a=1&newid=7", b"full=1&newid=8", "7"), ("newid=7", b"[" * 100000, "7"),
            ("", b"full=1&newid=8", "8"), ("", b'{"newid": 9}', "9"), ("", b'{"newid": "10"}', "10"),
            ("", b'{"newid": [1]}', ""), ("", b'{"newid":' * 100000, ""), ("full=1", b"", ""),
        ]:  # fmt: skip
            with self.subTest(query=query, body=body[:30]):
                self.assertEqual(program.newid_of(query, body), newid)


class LockTexts(unittest.TestCase):
    """Which texts of PVE's about a clone of 9000 to 105 mean that it may be tried again."""

    def check(self, errors: str, known: bool, *texts: str) -> None:
        """These texts are among those errors, or are not."""
        call = program.CloneCall("lxc", "pve", "9000", "105", "")
        for text in texts:
            with self.subTest(text=text):
                self.assertEqual(program.is_one_of(errors, call, text), known)

    def test_refusals(self) -> None:
        self.check(
            program.LOCKED, True, "CT is locked (disk)", "CT is locked (backup)", "VM is locked (clone)",
            "can't lock file '/run/lock/lxc/pve-config-9000.lock' - got timeout",
            "cfs-lock 'firewall-vm-105' error: got lock request timeout")  # fmt: skip
        self.check(
            program.LOCKED, False, "CT is locked (disk) at somewhere", "CT is locked", "",
            "can't lock file '/run/lock/lxc/pve-config-105.lock' - got timeout",
            "cfs-lock 'firewall-vm-9000' error: got lock request timeout",
            "can't lock file '/var/log/pve/tasks/.active.lock' - got timeout",
            "CT 105 already exists on node 'pve'", "got no worker upid - start worker failed")  # fmt: skip

    def test_exit_statuses(self) -> None:
        self.check(
            program.CONTENTION, True,
            "clone failed: can't lock file '/var/lock/pve-manager/pve-storage-local-lvm' - got timeout",
            "clone failed: cfs-lock 'storage-x' error: got lock request timeout",
            "clone failed: can't add VM 105 to pool 'p': cfs-lock 'file-user_cfg' error: got lock request timeout",
            "can't lock file '/var/lock/qemu-server/lock-9000.conf' - got timeout")  # fmt: skip
        self.check(
            program.CONTENTION, False, "unexpected status", "CT is locked (disk)",
            "can't lock file '/var/lock/qemu-server/lock-105.conf' - got timeout",
            "clone failed: can't lock file '/run/lock/lxc/pve-config-105.lock' - got timeout",
            "can't lock file '/var/lock/pve-manager/pve-storage-local-lvm' - got timeout",
            "clone failed: unable to create image: got lock timeout - aborting command")  # fmt: skip


class Upids(unittest.TestCase):
    def test_what_is_polled(self) -> None:
        def upid_in(data: object, status: int = 200) -> str | None:
            return program.upid_of(program.Answer(status, "OK", [], json.dumps({"data": data}).encode()))

        typical = "UPID:pve:000010C3:0004305D:6B051704:vzclone:9000:root@pam!ci:"
        good: list[object] = [typical, "UPID:" + "x" * 495, "UPID:a%62", "UPID:a?b", "UPID:a#b", "UPID:é", "UPID:"]
        bad: list[object] = ["UPID:" + "x" * 496, "UPID:a b", "UPID:a/b", "UPID:a\n", "UPID:a\x1bb", "UPID:a\xa0b", "UPID:a\x7f",
                             "upid:x", "xUPID:x", None, 5, ["UPID:x"], {}]  # fmt: skip
        for data in good + bad:
            with self.subTest(data):
                self.assertEqual(upid_in(data), data if data in good else None)
        self.assertIsNone(upid_in(typical, 500))

    def test_the_very_process_is_found_and_its_end_seen(self) -> None:
        child = subprocess.Popen(["sleep", "60"])
        with open(f"/proc/{child.pid}/stat") as file:
            start = int(file.read().rpartition(")")[2].split()[19])
        upid = f"UPID:pve:{child.pid:08X}:{{:08X}}:6B051704:vzclone:9000:root@pam:"
        self.assertFalse(self.is_here(upid.format(start + 1)))
        with program.TaskProcess(upid.format(start), 0.0) as process:
            process.sleep(0.01)
            self.assertEqual((process.is_here, process.ended_at), (True, 0.0))
            child.kill()
            begin = time.monotonic()
            process.sleep(LONG)
            self.assertGreater(process.ended_at, 0.0)
            self.assertTrue(self.is_here(upid.format(start)), "a zombie still counts as running")
            process.sleep(LONG)  # no longer than until it may have been reaped
            self.assertLess(time.monotonic() - begin, LONG)
        child.wait()
        self.assertFalse(self.is_here(upid.format(start)))

    def is_here(self, upid: str) -> bool:
        """Whether a task's process is seen on this host."""
        with program.TaskProcess(upid, 0.0) as process:
            return process.is_here

    def test_nonsense_has_no_process(self) -> None:
        for upid in ["UPID:x", "UPID:pve:00000000:00000000:", "UPID:pve:FFFFFFFF:00000001:"]:
            self.assertFalse(self.is_here(upid))


# The program's command line


class CommandLine(unittest.TestCase):
    def run_program(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, timeout=LONG)

    def check_failure(self, status: int, *arguments: str) -> None:
        """It exits with this status and one line, which tells of the last argument."""
        with self.subTest(arguments):
            result = self.run_program(*arguments)
            self.assertEqual((result.returncode, len(result.stderr.splitlines())), (status, 1), result.stderr)
            self.assertIn(arguments[-1], result.stderr)

    def test_wrong_flags_exit_with_2_and_one_line(self) -> None:
        missing = "/nonexistent.pem"
        for flags in ["-poll-delay x", f"-insecure=false -ca {missing}", "extra", f"-tls-cert {missing} -tls-key {missing}"]:
            self.check_failure(2, *flags.split())
        self.check_failure(2, "-insecure=false", "-ca", PROGRAM)

    def test_addresses_that_fail_exit_with_1(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            for address in [f"127.0.0.1:{taken.getsockname()[1]}", "192.0.2.1:80", "no-such-host.invalid:80"]:
                self.check_failure(1, "-listen", address)

    def test_help_and_version(self) -> None:
        self.assertIn("-task-timeout", self.run_program("-help").stdout)
        self.assertIn(program.VERSION, self.run_program("--version").stdout)

    def test_all_addresses_in_one_socket_with_a_warning(self) -> None:
        command = [sys.executable, PROGRAM, "-listen", ":0", "-backend", "http://127.0.0.1:1"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            match = re.search(r"LISTENING: \S*:(\d+) ", process.stderr.readline())
            assert match
            self.assertIn("clear text", process.stderr.readline())
            for host in ["127.0.0.1", "::1"] if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6") else ["127.0.0.1"]:
                socket.create_connection((host, int(match[1])), LONG).close()
            process.terminate()
            self.assertEqual(process.wait(LONG), 0)

    def test_journal_priorities(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, env={"JOURNAL_STREAM": "1:2"}) as proxy:
            self.assertEqual(proxy.clone(201, source=777).status, 500)
            proxy.wait_log(r"^<4>CLONE FAILED: node=pve vmid=777 newid=201 status=500 unable to find configuration file")
            proxy.wait_log(r"^<6>CLONE QUEUED: node=pve vmid=777")


# Relaying


class Relaying(unittest.TestCase):
    def test_target_fields_and_body_go_through_byte_for_byte(self) -> None:
        answer = (b"HTTP/1.1 299 Very \xfcnusual  Reason\r\nX-One: 1\r\nset-cookie: a=1\r\nSET-COOKIE: b=2\r\n"
                  b"Content-Length: 4\r\nX-Last: \r\n\r\n\0\1\r\n")  # fmt: skip
        with answering(answer) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(b"PUT /a%2Fb//c/?q=%20&a;b HTTP/1.1\r\nHost: the.host:99\r\nX-b: 2\r\nx-A:  1 \r\nX-b: 3\r\n"
                      b"Content-Length: 5\r\n\r\n12\r\n3")  # fmt: skip
            got = wire.until(b"\r\n\r\n") + wire.exactly(4)
            self.assertEqual(got, answer)
            request = backend.requests[0]
            self.assertEqual(request.first, b"PUT /a%2Fb//c/?q=%20&a;b HTTP/1.1")
            self.assertEqual(request.fields, [(b"Host", b"the.host:99"), (b"X-b", b"2"), (b"x-A", b"1"), (b"X-b", b"3"),
                                              (b"Content-Length", b"5"), (b"X-Forwarded-For", b"127.0.0.1")])  # fmt: skip
            self.assertEqual(request.body, b"12\r\n3")

    def test_hop_by_hop_fields_are_dropped_both_ways(self) -> None:
        answer = (b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Mine\r\nKeep-Alive: 5\r\nX-Mine: 1\r\nTrailer: T\r\n"
                  b"Proxy-Authenticate: x\r\nUpgrade: h2c\r\nContent-Length: 0\r\nX-Kept: 1\r\n\r\n")  # fmt: skip
        with answering(answer) as backend, Proxy(backend.url) as proxy:
            response = proxy.ask(
                b"GET / HTTP/1.1\r\nHost: a\r\nConnection: X-Yours, Host, authorization, Cookie, Content-Length, "
                b"CSRFPreventionToken\r\nX-Yours: 1\r\nTE: trailers\r\nProxy-Connection: x\r\nUpgrade: h2c\r\n"
                b"Keep-Alive: 1\r\nAuthorization: me\r\nCookie: c\r\nCSRFPreventionToken: t\r\nX-Kept: 1\r\n\r\n"
            )
            self.assertEqual(response.fields, [(b"Content-Length", b"0"), (b"X-Kept", b"1")])
            self.assertEqual([name for name, _ in backend.requests[0].fields],
                             [b"Host", b"Authorization", b"Cookie", b"CSRFPreventionToken", b"X-Kept",
                              b"X-Forwarded-For"])  # fmt: skip

    def test_forwarded_for_is_one_address(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            for values, address in [
                ([], b"127.0.0.1"), (["192.0.2.7"], b"192.0.2.7"), (["10.0.0.1, 192.0.2.7"], b"192.0.2.7"),
                (["10.0.0.1", "2001:db8::1"], b"2001:db8::1"), (["::ffff:192.0.2.9"], b"192.0.2.9"),
                (["192.0.2.7, nonsense"], b"127.0.0.1"), (["192.0.2.7:80"], b"127.0.0.1"),
                (["fe80::1%x AUTH FAILED"], b"fe80::1"),
            ]:  # fmt: skip
                with self.subTest(values):
                    proxy.get("/", *(f"x-Forwarded-for: {value}" for value in values))
                    self.assertEqual(backend.requests[-1].all("x-forwarded-for"), [address])

    def test_http_1_0_request_without_host_gets_the_backends(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            self.assertEqual(wire.ask(b"GET / HTTP/1.0\r\n\r\n").body, b"ok")
            self.assertTrue(wire.closed())
            self.assertEqual(backend.requests[0].get("host"), f"127.0.0.1:{backend.port}".encode())

    def test_absolute_form_uses_path_and_query_alone_and_an_empty_line_is_skipped(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            for sent, got in [
                (b"GET http://evil.example/a?b", b"GET /a?b"), (b"GET https://evil.example", b"GET /"),
                (b"GET HTTP://evil.example?q", b"GET /?q"), (b"\r\nGET /", b"GET /"),
            ]:  # fmt: skip
                with self.subTest(sent):
                    self.assertEqual(proxy.ask(sent + b" HTTP/1.1\r\nHost: h\r\n\r\n").status, 200)
                    self.assertEqual(backend.requests[-1].first, got + b" HTTP/1.1")
                    self.assertEqual(backend.requests[-1].get("host"), b"h")

    def test_pipelined_requests_are_answered_in_order(self) -> None:
        with echoing() as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(b"".join(b"POST /%d HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc" % i for i in range(20)))
            self.assertEqual([wire.message().body for _ in range(20)], [b"/%d" % i for i in range(20)])
            self.assertEqual([request.body for request in backend.requests], [b"abc"] * 20)

    def test_answers_framed_for_the_client(self) -> None:
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nT: 1\r\n\r\n"
        table = [
            (chunked, b"1.1", [(b"Transfer-Encoding", b"chunked")], b"abcde", False),
            (chunked, b"1.0", [(b"Connection", b"close")], b"abcde", True),
            (b"HTTP/1.1 200 OK\r\n\r\nto the end", b"1.1", [(b"Connection", b"close")], b"to the end", True),
            (b"HTTP/1.1 204 No Content\r\n\r\n", b"1.1", [], b"", False),
            (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", b"1.1", [(b"Content-Length", b"9")], b"", False),
            (OK, b"1.0", [(b"Content-Length", b"2"), (b"Connection", b"keep-alive")], b"ok", False),
            (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"1.1", [(b"Content-Length", b"2")], b"ok", False),
        ]
        with by_path([row[0] for row in table]) as backend, Proxy(backend.url) as proxy:
            for index, (answer, version, fields, body, closes) in enumerate(table):
                with self.subTest(answer=answer, version=version), proxy.wire() as wire:
                    request = b"GET /%d HTTP/%b\r\nHost: h\r\nConnection: keep-alive\r\n\r\n" % (index, version)
                    response = wire.ask(request)
                    self.assertEqual((response.fields, response.body), (fields, body))
                    if closes:
                        self.assertTrue(wire.closed())
                    else:
                        self.assertEqual(wire.ask(request).body, body)

    def test_head_answers_have_no_body(self) -> None:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"
        with answering(answer) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n" * 2)
            for _ in range(2):
                self.assertEqual(wire.message(no_body=True).get("content-length"), b"99")

    def test_interim_answers_reach_http_1_1_clients(self) -> None:
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        with answering(interim * 2 + OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(GET)
            self.assertEqual([wire.message().status for _ in range(3)], [103, 103, 200])
            self.assertEqual(proxy.ask(b"GET / HTTP/1.0\r\n\r\n").status, 200)
        with answering(interim * 11 + OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            self.assertEqual(wire.ask(GET).status, 502)

    def test_expect_is_answered_here(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            answer = wire.ask(POST + b"Expect: 100-Continue\r\nContent-Length: 3\r\n\r\n")
            self.assertEqual(answer.first, b"HTTP/1.1 100 Continue")
            self.assertEqual(wire.ask(b"abc").body, b"ok")
            self.assertEqual((backend.requests[0].get("expect"), backend.requests[0].body), (None, b"abc"))
            answer = wire.ask(POST + b"Expect: magic\r\nContent-Length: 3\r\n\r\nabc")  # which PVE does not mind either
            self.assertEqual((answer.body, backend.requests[1].get("expect")), (b"ok", None))

    def test_error_of_an_unreachable_backend_has_pves_shape_and_for_head_no_body(self) -> None:
        with unused_port() as port, Proxy(f"https://127.0.0.1:{port}") as proxy, proxy.wire() as wire:
            response = proxy.get("/")
            self.assertEqual(response.status, 502)
            self.assertEqual(json.loads(response.body), {"data": None, "message": response.first[13:].decode()})
            self.assertIn(b"can't be reached", response.first)
            wire.send(b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n")
            self.assertEqual(wire.rest().split(b"\r\n\r\n")[1:], [b""])

    def test_failed_logins_are_logged_with_the_clients_address(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            for format_, status in [("json", 401), ("extjs", 200)]:
                request = (f"POST /api2/{format_}/access/ticket HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 192.0.2.7\r\n"
                           "Content-Length: 31\r\n\r\npassword=%s&username=root@pam")  # fmt: skip
                self.assertEqual(proxy.ask((request % "evil").encode()).status, status)
                self.assertEqual(proxy.ask((request % "good").encode()).status, 200)
                proxy.wait_log(rf"AUTH FAILED: client=192\.0\.2\.7 path=/api2/{format_}/access/ticket$")
            proxy.stop()
            self.assertEqual(len(proxy.lines("AUTH FAILED")), 2)

    def test_certificates_old_and_new_are_verified(self) -> None:
        for kind, ca, other in [("old", OLD_CA, NEW_CA), ("new", NEW_CA, OLD_CA)]:
            with self.subTest(kind), FakePVE(tls=kind) as pve:
                with Proxy(pve.url, "-insecure=false", "-ca", pem_file(ca)) as proxy:
                    self.assertEqual(proxy.get("/").status, 200)
                with Proxy(pve.url, "-insecure=false", "-ca", pem_file(other)) as proxy:
                    self.assertRegex(proxy.get("/").first, b" 502 .*certificate verify failed")


class BackendConnections(unittest.TestCase):
    """Which connections are used again, and which never."""

    def test_safe_requests_share_a_connection_and_others_do_not(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            with proxy.wire() as wire:  # on one connection: its thread has given the backend's back when it reads on
                for _ in range(5):
                    self.assertEqual(wire.ask(GET).status, 200)
            self.assertEqual(backend.connections, 1)
            for _ in range(3):
                proxy.ask(POST + b"Content-Length: 1\r\n\r\nx")
            self.assertEqual(backend.connections, 4)

    def test_only_so_many_idle_ones_are_kept(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            for _ in range(3 * program.POOL_SIZE):  # each on a new connection, which is kept
                self.assertEqual(wire.ask(b"DELETE / HTTP/1.1\r\nHost: h\r\n\r\n").body, b"ok")
            self.assertLess(proxy.descriptors(), program.POOL_SIZE + 20)

    def test_a_connection_that_turns_out_closed_is_not_the_clients_problem(self) -> None:
        used_again: list[bool] = []

        def close_at_the_second_request(wire: Wire) -> None:
            if backend.connections == 1:
                used_again.append(wire.more())  # the close must not be seen before that is sent
                wire.reset()

        with saying(OK, close_at_the_second_request) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            for _ in range(2):
                self.assertEqual(wire.ask(GET).status, 200)
            self.assertEqual((used_again, backend.connections), ([True], 2))

    def test_not_used_again(self) -> None:
        for what, request, answer in [
            ("carried a chunked request", POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", OK),
            ("has a byte beyond its answer", GET, OK + b"H"),
            ("answered with close", GET, OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")),
            ("answered in HTTP/1.0", GET, OK.replace(b"1.1", b"1.0")),
        ]:
            with self.subTest(what), answering(answer, OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
                for each in (request, GET):
                    self.assertEqual(wire.ask(each).body, b"ok")
                self.assertEqual(backend.connections, 2)

    def test_bytes_behind_an_answer_that_only_tls_knows_of(self) -> None:
        def say_more(wire: Wire) -> None:
            wire.send(b"ok" + ok(b"evil"))
            wire.more()

        with saying(OK[:-2], say_more, tls=True) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            for _ in range(3):
                self.assertEqual(wire.ask(GET).body, b"ok")
            self.assertEqual(backend.connections, 3)

    def test_bytes_that_follow_later_spoil_no_other_answer(self) -> None:
        sent = threading.Event()

        def say_more(wire: Wire) -> None:
            if backend.connections == 1:
                wire.send(ok(b"evil"))
                sent.set()
                wire.more()

        with saying(OK, say_more) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.ask(GET)
            self.assertTrue(sent.wait(LONG))
            self.assertEqual(wire.ask(GET).body, b"ok")


# The status of the refusal, what such requests have in common, and in what they differ.
BAD_REQUESTS: list[tuple[int, bytes, list[bytes]]] = [
    (400, b"%b\r\nHost: h\r\n\r\n", [
        b"GET /", b"GET / http/1.1", b"GET / HTTP/1.10", b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ", b"GET\t/ HTTP/1.1",
        b" GET / HTTP/1.1", b"G@T / HTTP/1.1"]),
    (400, b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n", [
        b"/a b", b"/\xe9", b"/\x01", b"/a#b", b"a", b"*", b"//api2/json/nodes/pve/lxc/1/clone", b"http://h//x", b"http://u:p@h/",
        b"http:///x", b"ftp://h/"]),
    (400, b"GET / HTTP/1.1\r\n%b\r\n\r\n", [b"X: no Host", b"Host: h\r\nHost: h", b"Host: h/x", b"Host: u@h"]),
    (400, b"GET / HTTP/1.1\r\nHost: h\r\n%b\r\n\r\n", [
        b"X: a\r\n b", b"X : a", b"nonsense", b": x", b"X(y): x", b"X\xe9: x", b"X: a\0b", b"X: a\rb", b"X: a\x1bb", b"X: a\x7fb",
        b"X_Forwarded-For: 192.0.2.1"]),
    (400, b"GET / HTTP/1.1\nHost: h%b", [b"\r\n\r\n", b"\n\n"]),
    (400, b"%b", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"]),  # TLS
    (400, POST + b"Content-Length: %b\r\n\r\nabc", [
        b"+3", b"1_0", b"-1", b"", b"0x3", b"1000000000000000000", b"3, 4", b"3\r\nContent-Length: 4",
        b"3\r\nTransfer-Encoding: chunked", b"3\r\nContent_Length: 0", b"3\r\nTransfer_Encoding: chunked"]),
    (400, POST + b"Transfer-Encoding: %b\r\n\r\n", [b"chunked\r\nTransfer-Encoding: chunked", b"\x0bchunked"]),
    (501, POST + b"Transfer-Encoding: %b\r\n\r\n", [b"gzip, chunked", b"chunked, chunked", b"xchunked"]),
    (400, b"POST / HTTP/1.0\r\nHost: h\r\n%b\r\n\r\n0\r\n\r\n", [b"Transfer-Encoding: chunked"]),
    (400, b"%b HTTP/1.1\r\nHost: h:443\r\n\r\n", [b"CONNECT h:443", b"CONNECT /", b"CONNECT http://h/", b"OPTIONS *"]),
    (400, b"%b\r\n\r\n", [b"GET / HTTP/2.0\r\nHost: h", b"GET / HTTP/0.9\r\nHost: h", b"PRI * HTTP/2.0\r\n\r\nSM"]),
    (414, b"GET /%b", [b"a" * 17000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", b"a" * 20000]),
    (431, b"GET / HTTP/1.1\r\nHost: h\r\n%b", [
        b"X: 1\r\n" * 100 + b"\r\n", b"X: " + b"a" * 66000 + b"\r\n\r\n", b"X: " + b"a" * 80000]),
]  # fmt: skip

BAD_CHUNKS = [
    *(size + b"\r\nabc\r\n0\r\n\r\n" for size in [
        b"+3", b"0x3", b"1_0", b" 3", b"3 ", b"", b"1" * 17, b"3;" + b"x" * 300, b"3;a\x00b",
    ]),
    b"3\nabc\r\n0\r\n\r\n", b"3\r\nabcd\r\n0\r\n\r\n", b"3\r\nabc\n0\r\n\r\n",
    b"3\r\nabc\r\n0\r\nbad trailer\r\n\r\n", b"3\r\nabc\r\n0\r\n" + b"T: " + b"x" * 70000 + b"\r\n\r\n",
]  # fmt: skip

BAD_ANSWERS = [
    *(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\nok" for fields in [
        b"Content-Length: 2\r\nContent-Length: 3", b"Content-Length: 2\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: gzip",
        b"Content-Length: +2", b"X: a\rSet-Cookie: evil\r\nContent-Length: 2", b"X: a\nSet-Cookie: evil\r\nContent-Length: 2",
        b"X: a\r\n b\r\nContent-Length: 2", b"X: \0\r\nContent-Length: 2", b"X: " + b"a" * 70000,
    ]),
    b"HTTP/1.1 OK\r\n\r\n", b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/2.0 200 OK\r\n\r\n", b"SSH-2.0-OpenSSH\r\n\r\n",
    SWITCHING,  # which nobody asked for
    b"", b"HTTP/1.1 200 OK\r\nContent-Le",
]  # fmt: skip


class Strictness(unittest.TestCase):
    def test_bad_requests_get_a_reason_and_never_reach_the_backend(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            for status, common, differences in BAD_REQUESTS:
                for difference in differences:
                    with self.subTest(common=common, difference=difference[:60]), proxy.wire() as wire:
                        response = wire.ask(common % difference)
                        self.assertEqual(response.status, status, response.first)
                        self.assertEqual(response.get("connection"), b"close")
                        self.assertEqual(json.loads(response.body)["message"].encode(), response.first[13:])
                        self.assertTrue(wire.closed())
            self.assertEqual(backend.connections, 0)

    def test_bad_chunks_are_refused_and_cut_off(self) -> None:
        got: list[bytes] = []
        with ScriptedBackend(lambda wire: got.append(wire.rest())) as backend, Proxy(backend.url) as proxy:
            for body in BAD_CHUNKS:
                with self.subTest(body[:60]):
                    got.clear()
                    response = proxy.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n" + body)
                    self.assertIn(response.status, (400, 431), response.first)
                    wait_until(lambda: got, "the backend's connection to be closed")
                    self.assertNotIn(b"\r\n0\r\n", got[0], "an incomplete body was made to look complete")

    def test_good_chunks_pass(self) -> None:
        body = b'3;ext="a"\r\nabc\r\n0A\r\n0123456789\r\n000\r\nT: 1\r\nU: 2\r\n\r\n'
        with answering(OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            for byte in POST + b"Transfer-Encoding: Chunked\r\n\r\n" + body:
                wire.send(bytes([byte]))
            self.assertEqual(wire.message().status, 200)
            self.assertEqual(backend.requests[0].body, b"abc0123456789")
            self.assertEqual(backend.requests[0].all("transfer-encoding"), [b"chunked"])

    def test_bad_answers_become_a_502(self) -> None:
        with by_path(BAD_ANSWERS) as backend, Proxy(backend.url) as proxy:
            for index, answer in enumerate(BAD_ANSWERS):
                with self.subTest(answer[:80]):
                    response = proxy.get(f"/{index}")
                    self.assertEqual(response.status, 502)
                    self.assertNotIn(b"evil", response.first + response.body)

    def test_answers_that_break_off_never_look_complete(self) -> None:
        chunked, chunk = b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\n12345\r\n"
        table = [b"Content-Length: 10\r\n\r\n12345", chunked + chunk, chunked + b"9\r\n12345", chunked + chunk + b"x\r\n",
                 chunked + chunk + b"0\r\nT: 1\r\n"]  # fmt: skip
        with by_path([b"HTTP/1.1 200 OK\r\n" + rest for rest in table]) as backend, Proxy(backend.url) as proxy:
            for (index, rest), version in itertools.product(enumerate(table), (b"1.1", b"1.0")):
                with self.subTest(rest, version=version), proxy.wire() as wire:
                    with self.assertRaises((EOFError, ConnectionResetError)):
                        wire.ask(b"GET /%d HTTP/%b\r\nHost: h\r\n\r\n" % (index, version))

    def test_a_fuzzer_finds_nothing(self) -> None:
        """Mutated requests: no traceback, no leak, and a victim always gets its own answer."""
        rng = random.Random(20261124)
        good = [
            b"GET /a HTTP/1.1\r\nHost: h\r\nCookie: a=b\r\n\r\n", POST + b"Content-Length: 5\r\n\r\n12345", UPGRADE,
            POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n0\r\n\r\n", clone_request(101),
        ]  # fmt: skip
        tokens = [b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n",
                  b"0\r\n\r\n", b"HTTP/1.1", b"GET ", b"//", b"%", b"\xff", b"Expect: 100-continue\r\n", b"9" * 30]  # fmt: skip
        with echoing() as backend, Proxy(backend.url, "-request-timeout", "2s") as proxy:
            proxy.get("/warm")
            descriptors, threads = proxy.descriptors(), proxy.threads()
            with proxy.wire() as victim:
                for round_ in range(300):
                    data = bytearray(rng.choice(good))
                    for _ in range(rng.randint(1, 4)):
                        at = rng.randrange(len(data))
                        data[at : at + rng.randint(0, 4)] = rng.choice([b"", rng.randbytes(1), rng.choice(tokens)])
                    with contextlib.suppress(OSError), proxy.wire() as wire:
                        wire.send(bytes(data))
                        wire.sock.shutdown(socket.SHUT_WR)
                    path = b"/victim%d" % round_
                    self.assertEqual(victim.ask(b"GET " + path + b" HTTP/1.1\r\nHost: h\r\n\r\n").body, path)
            wait_until(lambda: proxy.threads() <= threads and proxy.descriptors() <= descriptors, "no leak")
            self.assertFalse(backend.failures, backend.failures)


class Streaming(unittest.TestCase):
    def test_the_first_byte_is_passed_on_when_it_arrives(self) -> None:
        go_on = threading.Event()
        parts = (b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n")

        def send_parts(wire: Wire) -> None:
            for part in parts:
                go_on.wait(LONG)
                go_on.clear()
                wire.send(part)

        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        with saying(head, send_parts) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(GET)
            wire.head()
            for part in parts:
                go_on.set()
                self.assertEqual(wire.exactly(len(part)), part)

    def test_the_backend_sees_the_body_while_the_client_sends(self) -> None:
        seen: list[bytes] = []

        def read(wire: Wire) -> None:
            for _ in range(3):
                seen.append(wire.exactly(4))
            wire.send(OK)

        with saying(b"", read) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(POST + b"Content-Length: 12\r\n\r\n")
            for part in (b"0000", b"0001", b"0002"):
                wire.send(part)
                wait_until(functools.partial(seen.count, part), "the part at the backend")
            self.assertEqual(wire.message().status, 200)
            self.assertEqual(b"".join(seen), b"000000010002")

    def test_an_early_answer_reaches_the_client(self) -> None:
        too_large = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig"
        for tls, then in itertools.product((False, True), (Wire.close, Wire.rest)):
            with self.subTest(then.__name__, tls=tls), saying(too_large, then, tls) as backend, Proxy(backend.url) as proxy:
                with proxy.wire() as wire:
                    response = wire.ask(POST + b"Content-Length: 1000000000\r\n\r\n" + b"x" * 100000)
                    self.assertEqual((response.status, response.body), (413, b"big"))
                    self.assertEqual(response.get("connection"), b"close")
                    self.assertTrue(wire.closed())

    def test_a_backend_that_leaves_or_talks_nonsense_in_mid_upload_is_a_502(self) -> None:
        for answer, then, tls, reason in [
            (b"", Wire.close, False, b""), (b"", Wire.close, True, b""), (b"", Wire.reset, False, b""),
            (b"", Wire.reset, True, b""), (SWITCHING + OK, Wire.rest, False, b"malformed"),
        ]:  # fmt: skip
            with self.subTest(answer, tls=tls), saying(answer, then, tls) as backend, Proxy(backend.url) as proxy:
                response = proxy.ask(POST + b"Content-Length: 10\r\n\r\n12345")
                self.assertEqual(response.status, 502)
                self.assertIn(reason, response.first)

    def test_a_client_that_leaves_in_mid_upload_ends_the_backends_connection(self) -> None:
        for framing in (b"Transfer-Encoding: chunked\r\n\r\n4\r\n", b"Content-Length: 12\r\n\r\n"):
            got: list[bytes] = []

            def read(wire: Wire, got: list[bytes] = got) -> None:
                with contextlib.suppress(OSError):
                    while wire.more():
                        pass
                got.append(wire.buffer)

            with self.subTest(framing), saying(b"", read) as backend, Proxy(backend.url) as proxy:
                with proxy.wire() as wire:
                    wire.send(POST + framing + b"1234")
                wait_until(functools.partial(list, got), "the backend to see the end")
                self.assertNotIn(b"0\r\n\r\n", got[0])

    def test_a_client_that_leaves_while_the_backend_does_not_read(self) -> None:
        done = threading.Event()
        with saying(b"", lambda wire: done.wait(LONG)) as backend, Proxy(backend.url) as proxy:
            self.assertEqual(proxy.ask(b"bad\r\n\r\n").status, 400)  # so that what is opened once is open
            descriptors = proxy.descriptors()
            with proxy.wire() as wire:
                wire.send(POST + b"Content-Length: 1000000000\r\n\r\n")
                wire.send_until_stopped()
                wire.reset()
            wait_until(lambda: proxy.descriptors() <= descriptors, "both connections to be closed", 5)
            done.set()

    def test_a_client_that_leaves_frees_the_backend(self) -> None:
        for answer in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n1"):
            with self.subTest(answer), saying(answer, Wire.rest) as backend, Proxy(backend.url) as proxy:
                with proxy.wire() as wire:
                    wire.send(GET)
                    wait_until(backend.asked, "the request at the backend")
                    if answer:
                        wire.until(b"\r\n\r\n1")
                wait_until(backend.idle, "the backend to see the end")

    def test_large_bodies_in_little_memory(self) -> None:
        size = 128 << 20
        with FakePVE() as pve, Proxy(pve.url) as proxy:

            def upload(_: int) -> None:
                with proxy.wire() as wire:
                    wire.send(b"POST /api2/json/nodes/pve/storage/local/upload HTTP/1.1\r\nHost: h\r\n"
                              b"Content-Length: %d\r\n\r\n" % size)  # fmt: skip
                    for _ in range(size >> 20):
                        wire.send(bytes(1 << 20))
                    self.assertEqual(json.loads(wire.message().body)["data"], f"received {size}")

            def download(_: int) -> None:
                with proxy.wire() as wire:
                    wire.send(f"GET /api2/json/nodes/pve/download?bytes={size} HTTP/1.1\r\nHost: h\r\n"
                              f"Authorization: {TOKEN}\r\n\r\n".encode())  # fmt: skip
                    wire.head()
                    count, space = len(wire.buffer), bytearray(1 << 20)
                    while got := wire.sock.recv_into(space):
                        count += got
                    self.assertEqual(count, size)

            at_once(2, lambda which: (upload, download)[which](which))
            self.assertLess(proxy.memory("VmHWM"), 60 * 1024)


class Deadlines(unittest.TestCase):
    def test_a_silent_backend_is_a_504_and_a_silent_upload_a_408(self) -> None:
        with ScriptedBackend(silent) as backend, Proxy(backend.url, "-request-timeout", "200ms") as proxy:
            self.assertRegex(proxy.get("/").first, b" 504 .*no answer within 0.2 s")
            self.assertEqual(proxy.ask(POST + b"Content-Length: 5\r\n\r\n123").status, 408)

    def test_silence_is_bounded_and_length_is_not(self) -> None:
        stalls = threading.Event()

        def drip(wire: Wire) -> None:
            for _ in range(10 if not stalls.is_set() else 5):
                wire.send(b"0123456789")
                threading.Event().wait(0.1)  # the drip itself
            wire.more()

        head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
        with saying(head, drip) as backend, Proxy(backend.url, "-request-timeout", "600ms") as proxy:
            self.assertEqual(len(proxy.get("/").body), 100)
            stalls.set()
            with self.assertRaises((EOFError, ConnectionResetError)):
                proxy.get("/")

    def test_slow_clients_keep_nobody_out(self) -> None:
        """More dripping clients than connections: the oldest give way."""
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            bring(proxy, *[b"GET / HT"] * (program.MAX_CONNECTIONS + 20))
            wait_until(lambda: proxy.threads() > program.MAX_CONNECTIONS - 20, "the drips to be accepted")
            for _ in range(20):
                self.assertEqual(proxy.get("/").status, 200)

    def test_too_many_connections_get_a_503(self) -> None:
        hold = threading.Event()

        def answer_later(wire: Wire) -> None:
            hold.wait(LONG)
            wire.send(OK)

        with saying(b"", answer_later) as backend, Proxy(backend.url) as proxy:
            wires = bring(proxy, *[GET] * program.MAX_CONNECTIONS)
            wait_until(lambda: len(backend.requests) == len(wires), "all requests at the backend")
            response = proxy.get("/")
            self.assertEqual((response.status, response.get("retry-after")), (503, b"5"))
            hold.set()
            for wire in wires:
                self.assertEqual(wire.message().status, 200)
            wait_until(lambda: proxy.get("/").status == 200, "room again")


class Tunnels(unittest.TestCase):
    def test_a_console_over_tls(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy, proxy.wire() as wire:
            wire.send(UPGRADE + b"early")
            head = wire.head()
            self.assertEqual(head.status, 101)
            self.assertEqual((head.get("upgrade"), head.get("connection")), (b"websocket", b"Upgrade"))
            self.assertEqual(wire.exactly(12), b"\x82\x05helloearly")
            size = 20 << 20
            threading.Thread(target=wire.send, args=(bytes(size),), daemon=True).start()
            self.assertEqual(wire.exactly(size), bytes(size))
            self.assertLess(proxy.memory(), 60 * 1024)

    def test_back_pressure_both_ways(self) -> None:
        """A side that does not read stops the other, and memory stays flat."""
        sent = [0, 0]

        def flood(wire: Wire, which: int = 0) -> None:
            wire.sock.settimeout(None)
            with contextlib.suppress(OSError):
                while True:
                    sent[which] += wire.sock.send(bytes(1 << 16))

        def stopped() -> bool:
            before = list(sent)
            threading.Event().wait(0.2)
            return all(before) and before == sent

        with saying(SWITCHING, flood) as backend, Proxy(backend.url) as proxy, proxy.tunnel() as wire:
            threading.Thread(target=flood, args=(wire, 1), daemon=True).start()
            wait_until(stopped, "both sides to be stopped")
            self.assertLess(proxy.memory(), 60 * 1024)
            wire.sock.shutdown(socket.SHUT_RDWR)

    def test_a_reset_behind_a_full_buffer_ends_it(self) -> None:
        done = threading.Event()
        with saying(SWITCHING, lambda wire: done.wait(LONG)) as backend, Proxy(backend.url) as proxy:
            with proxy.tunnel() as wire:
                threads = proxy.threads()
                wire.send_until_stopped()
                wire.reset()
            wait_until(lambda: proxy.threads() < threads, "the tunnel's thread to end", 5)
            done.set()

    def test_half_close_is_carried_over(self) -> None:
        with saying(SWITCHING, lambda wire: wire.send(b"got " + wire.rest())) as backend:
            with Proxy(backend.url) as proxy, proxy.tunnel() as wire:
                wire.send(b"all of this")
                wire.sock.shutdown(socket.SHUT_WR)
                self.assertEqual(wire.rest(), b"got all of this")
                wait_until(backend.idle, "the backend's end")

    def test_what_was_said_before_a_close_arrives_at_a_slow_reader_that_says_no_more(self) -> None:
        def say_much_at_the_end(wire: Wire) -> None:
            wire.rest()
            wire.send(bytes(24_000_000))

        with saying(SWITCHING, say_much_at_the_end) as backend, Proxy(backend.url) as proxy, proxy.tunnel() as wire:
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
            wire.sock.shutdown(socket.SHUT_WR)
            count = len(wire.buffer)
            while data := wire.sock.recv(1024):
                count += len(data)
            self.assertEqual(count, 24_000_000)

    def test_close_is_carried_over(self) -> None:
        with saying(SWITCHING, Wire.rest) as backend, Proxy(backend.url) as proxy:
            with proxy.tunnel():
                threads = proxy.threads()
            wait_until(backend.idle, "the backend's end")
            wait_until(lambda: proxy.threads() < threads, "the tunnel's thread to end")

    def test_a_refused_upgrade_is_an_ordinary_answer(self) -> None:
        forbidden = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno"
        with answering(forbidden, OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            self.assertEqual(wire.ask(UPGRADE).status, 403)
            self.assertEqual(wire.ask(GET).body, b"ok")

    def test_other_upgrades_are_not_offered(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            proxy.ask(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
                      b"HTTP2-Settings: x\r\n\r\n")  # fmt: skip
            self.assertEqual([name for name, _ in backend.requests[0].fields], [b"Host", b"X-Forwarded-For"])


# The clone queue


def bring(proxy: Proxy, *requests: bytes) -> list[Wire]:
    """Connections on which these requests were sent, open until the test or the proxy closes them."""
    wires = []
    for request in requests:
        wire = proxy.wire()
        wire.send(request)
        wires.append(wire)
    proxy.wires += wires
    return wires


def queue_up(proxy: Proxy, *requests: bytes) -> list[Wire]:
    """The same for clones, queued in this order."""
    wires = []
    for request in requests:
        head, _, body = request.partition(b"\r\n\r\n")
        query = head.split()[1].decode().partition("?")[2]
        line = rf"CLONE QUEUED: .* newid={program.newid_of(query, body) or '-'} "
        queued = len(proxy.lines(line))
        wires += bring(proxy, request)
        proxy.wait_log(line, queued + 1)
    return wires


CLONE_HEAD = b"POST /api2/json/nodes/pve/lxc/9000/clone%%b HTTP/1.1\r\nHost: h\r\nAuthorization: %b\r\n" % TOKEN.encode()


class Cloning(unittest.TestCase):
    def test_twenty_at_once_are_cloned_one_at_a_time(self) -> None:
        with FakePVE(clone_seconds=0.03) as pve, Proxy(pve.url) as proxy:
            answers = at_once(20, lambda index: proxy.clone(200 + index))
            self.assertEqual([answer.status for answer in answers], [200] * 20)
            self.assertEqual((len(pve.clones), pve.overlaps, pve.most_at_once), (20, 0, 1))
            self.assertEqual({json.loads(answer.body)["data"] for answer in answers}, set(pve.tasks))

    def test_the_answer_is_pves_own_and_comes_when_the_task_has_ended(self) -> None:
        with FakePVE(clone_seconds=0.2) as pve, Proxy(pve.url) as proxy:
            answer = proxy.clone(201)
            (task,) = pve.tasks.values()
            self.assertIsNotNone(task.process.poll())
            self.assertEqual((answer.first, answer.body), (b"HTTP/1.1 200 OK", json.dumps({"data": task.upid}).encode()))
            self.assertEqual([name for name, _ in answer.fields],
                             [b"Server", b"Cache-Control", b"Content-Type", b"Content-Length"])  # fmt: skip

    def test_log_lines(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, "-poll-delay", "20ms") as proxy:
            (wire,) = queue_up(proxy, clone_request(201))
            proxy.wait_log("TASK POLLING")
            pve.finish()
            self.assertEqual(wire.message().status, 200)
            upid = re.escape(pve.clones[0].upid)
            for pattern in [
                r"CLONE QUEUED: node=pve vmid=9000 newid=201 waiting=0 client=127\.0\.0\.1 user=root@pam!ci$",
                r"CLONE START: node=pve vmid=9000 newid=201 waited=\d+\.\ds$",
                rf"CLONE TASK: node=pve vmid=9000 upid={upid} newid=201$",
                r"TASK POLLING: status=running node=pve vmid=9000 newid=201 \(elapsed: \d+\.\ds\)$",
                rf"CLONE COMPLETE: node=pve vmid=9000 upid={upid} \(elapsed: \d+\.\ds\) newid=201$",
            ]:
                proxy.wait_log(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d " + pattern)

    def test_exit_statuses(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            pve.exits.extend(["WARNINGS: 2", "clone failed: disk full", "OK"])
            self.assertEqual([proxy.clone(201 + index).status for index in range(3)], [200] * 3)
            proxy.stop()
            self.assertEqual(len(proxy.lines("CLONE COMPLETE")), 2)
            proxy.wait_log(r"TASK FINISHED: status=stopped exitstatus=clone failed: disk full node=pve vmid=9000")

    def test_every_spelling_is_queued_and_sent_as_it_came_and_so_are_vms_when_asked_for(self) -> None:
        paths = ["/api2/json//nodes/pve/lxc/9000/clone/", "/api2/json/nodes/pve/lxc/9000/%63lone?full=1",
                 "/api2/json/nodes/pve%2Flxc/9000/clone", "/api2/json/nodes/a%20b%0ac/lxc/9000/clone",
                 *["/api2/json/nodes/pve/qemu/8001/clone"] * 4]  # fmt: skip
        with FakePVE() as pve, Proxy(pve.url, "-qemu") as proxy:
            answers = at_once(len(paths), lambda index: proxy.clone(201 + index, path=paths[index]))
            self.assertEqual([answer.status for answer in answers], [200] * len(paths))
            self.assertEqual((sorted(record.target for record in pve.clones), pve.most_at_once), (sorted(paths), 1))
            proxy.wait_log(r"CLONE START: node=a\\x20b\\x0ac vmid=9000")

    def test_bodies_in_every_form_arrive_with_a_length(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            for query, rest in [
                (b"", b"Transfer-Encoding: chunked\r\n\r\n5\r\nnewid\r\n4\r\n=201\r\n0\r\n\r\n"),
                (b"", b'Content-Type: application/json\r\nContent-Length: 13\r\n\r\n{"newid":202}'),
                (b"?newid=203", b"\r\n"),
                (b"", b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"),
            ]:
                with proxy.wire() as wire:
                    response = wire.ask(CLONE_HEAD % query + rest)
                    if response.status == 100:
                        response = wire.ask(b"newid=204")
                    self.assertEqual(response.status, 200)
            self.assertEqual([record.newid for record in pve.clones], ["201", "202", "203", "204"])
            for record in pve.clones:
                fields = {name.lower(): value for name, value in record.fields}
                self.assertEqual(fields["content-length"], str(len(record.body)))
                self.assertFalse({"transfer-encoding", "expect"} & set(fields))

    def test_bodies_over_512_kib_are_refused(self) -> None:
        size = 512 * 1024
        head = CLONE_HEAD % b""
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            self.assertEqual(proxy.ask(head + b"Content-Length: %d\r\n\r\n" % (size + 1)).status, 413)
            chunk = b"%x\r\n" % (size + 1) + b"x" * (size + 1)
            self.assertEqual(proxy.ask(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk).status, 413)
            self.assertEqual(pve.clones, [])
            body = b"newid=201&".ljust(size, b"x")
            self.assertEqual(proxy.ask(head + b"Content-Length: %d\r\n\r\n" % size + body).status, 200)

    def test_refused_bodies_leave_no_reader_to_the_garbage_collector(self) -> None:
        """It would run anywhere, also where the lock is held that the reader asks for."""
        body = b"x" * (512 * 1024 + 1)
        request = CLONE_HEAD % b"" + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % len(body) + body
        with FakePVE(tls="") as pve, Proxy(pve.url, constants="import gc; gc.set_threshold(100, 1, 1)") as proxy:
            statuses = at_once(6, lambda index: {proxy.ask(request).status for _ in range(60)})
            self.assertEqual(statuses, [{413}] * 6)

    def test_a_full_queue_says_503_at_once_and_before_pve_is_asked(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, "-queue-size", "2") as proxy:
            wires = queue_up(proxy, clone_request(201))
            pve.wait_for_clones(1)
            wires += queue_up(proxy, clone_request(202), clone_request(203))
            asked = pve.requests - pve.polls
            answer = proxy.clone(204)
            self.assertEqual(answer.status, 503)
            self.assertGreater(int(answer.get("retry-after") or 0), 0)
            self.assertIn("full", json.loads(answer.body)["message"])
            self.assertEqual(pve.requests - pve.polls, asked)
            pve.finish()
            self.assertEqual([wire.message().status for wire in wires], [200] * 3)
            proxy.wait_log(r"CLONE REJECTED: .*node=pve vmid=9000")

    def test_relaying_goes_on_while_clones_wait(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            wires = queue_up(proxy, *(clone_request(201 + index) for index in range(3)))
            pve.wait_for_clones(1)
            self.assertEqual(proxy.get("/").status, 200)
            refusal = proxy.ask(clone_request(300, path="/api2/extjs/nodes/pve/lxc/9000/clone"))
            self.assertEqual((refusal.status, json.loads(refusal.body)["status"]), (200, 500))
            pve.finish()
            self.assertEqual([wire.message().status for wire in wires], [200] * 3)

    def test_tasks_elsewhere_are_polled(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            pve.remote = True
            wire = queue_up(proxy, clone_request(201))[0]
            wait_until(lambda: pve.polls > 2, "polls")
            finish(pve, wire)
            self.assertTrue(pve.idle())

    def test_tasks_elsewhere_are_hardly_polled_before_the_last_one_of_their_source_had_ended(self) -> None:
        polls: list[float] = []

        def note_time(kind: str) -> str:
            polls.extend([time.monotonic()] if kind == "poll" else [])
            return ""

        with FakePVE(clone_seconds=0.8) as pve, Proxy(pve.url) as proxy:
            pve.remote, pve.random_fault = True, note_time
            for newid, source, usual in ((201, 9000, 0.0), (202, 9001, 0.0), (203, 9000, 0.8)):
                polls.clear()
                begin = time.monotonic()
                self.assertEqual(proxy.clone(newid, source).status, 200)
                self.assertGreater(len(polls), 0)
                self.assertGreater(polls[0] - begin, usual / 2)

    def test_tasks_here_wake_the_worker(self) -> None:
        states: list[str] = []

        def note_state(kind: str) -> str:
            if kind == "poll":
                pid = next(iter(pve.tasks.values())).process.pid
                with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as file:
                    states.append(file.read().rpartition(")")[2].split()[0])
            return ""

        with FakePVE(clone_seconds=0.3) as pve, Proxy(pve.url, "-poll-delay", "1h") as proxy:
            pve.random_fault = note_state
            self.assertEqual(proxy.clone(201).status, 200)
            self.assertGreater(pve.polls, 0)
            self.assertLessEqual(set(states), {"Z", "X"}, "it is asked for only when it has ended")

    def test_answered_when_started(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, "-answer", "started") as proxy:
            self.assertEqual(proxy.clone(201).status, 200)
            second = queue_up(proxy, clone_request(202))[0]
            with pve.lock:
                self.assertEqual((len(pve.running()), len(pve.clones)), (1, 1), "the first still runs, the second waits")
            pve.finish()
            self.assertEqual(second.message().status, 200)
            self.assertEqual((pve.overlaps, len(pve.clones)), (0, 2))
            proxy.wait_log("CLONE COMPLETE", 2)

    def test_verbose_logs_requests_but_neither_queries_nor_credentials(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, "-verbose") as proxy:
            ticket = "Cookie: PVEAuthCookie=PVE:root@pam:good\r\nCSRFPreventionToken: token\r\n"
            path = "/api2/json/nodes/pve/lxc/9000/clone?a=s3cr3t"
            self.assertEqual(proxy.clone(201, token="x", extra=ticket, path=path).status, 200)
            proxy.clone(202, token="PVEAPIToken=root@pam!ci=wrong-s3cr3t")
            proxy.get("/x?s3cr3t", "Authorization: s3cr3t")
            proxy.wait_log(r"RELAYED: GET /x status=200 bytes=\d+ time=")
            proxy.stop()
            self.assertEqual(proxy.lines("s3cr3t|secret|good|CSRF"), [])


class Strangers(unittest.TestCase):
    def test_who_cannot_log_in_cannot_use_the_queue(self) -> None:
        with FakePVE(auth_delay=ENDLESS) as pve, Proxy(pve.url) as proxy:
            bad = bring(proxy, *(clone_request(300 + index, token="PVEAPIToken=a@b!cc=dd") for index in range(100)))
            wait_until(lambda: pve.requests >= 100, "the strangers at PVE")
            # PVE has not refused one of them yet, and nobody waits for that.
            self.assertEqual(proxy.clone(201).status, 200)
            pve.hanging.set()
            for wire in bad:
                response = wire.message()
                self.assertEqual((response.status, response.first[13:]), (401, b"invalid token value!"))
            self.assertEqual(len(pve.clones), 1)

    def test_any_other_answer_lets_in(self) -> None:
        not_found = b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"
        with replying(lambda request: not_found if b"version" in request.target else OK) as backend, Proxy(backend.url) as proxy:
            self.assertEqual(proxy.clone(201).body, b"ok")

    def test_pve_out_of_reach_is_said_at_once(self) -> None:
        with unused_port() as port, Proxy(f"http://127.0.0.1:{port}", "-lock-timeout", "0") as proxy:
            self.assertEqual(proxy.clone(201).status, 502)
            proxy.stop()
            self.assertEqual(proxy.lines("CLONE QUEUED"), [])
        with ScriptedBackend(silent) as backend, Proxy(backend.url, "-request-timeout", "100ms") as proxy:
            self.assertEqual(proxy.clone(201).status, 504)


class PveFaults(unittest.TestCase):
    def test_answers_to_the_post(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, "-request-timeout", "1s", "-lock-timeout", "0") as proxy:
            for fault, status in [
                ("reset", 502), ("reset-in-head", 502), ("reset-in-body", 502), ("close", 502), ("garbage", 502),
                ("hang", 504), ("+reset", 502), ("+hang", 504), ("595 Connection refused", 595), ("+596 Connection timed out", 596),
                ("599 Too many", 599), ("500 no quorum", 500), ("403 Permission check failed", 403),
                ("json:no json", 200), ("json:[1]", 200), ('json:{"data":null}', 200), ('json:{"data":{"x":1}}', 200),
                ("json:" + "[" * 20000, 200), ('json:{"data":"UPID:x/../../y"}', 200),
                (f'json:{{"data":"{"UPID:" + "x" * 600}"}}', 200),
            ]:  # fmt: skip
                with self.subTest(fault[:40]):
                    newid = 201 + len(pve.clones)
                    pve.clone_faults.append(fault)
                    answer = proxy.clone(newid, source=9001)
                    pve.hanging.set()
                    self.assertEqual(answer.status, status, answer)
                    self.assertEqual([record.newid for record in pve.clones].count(str(newid)), 1, "sent once")
                    if status in (502, 504):
                        message = json.loads(answer.body)["message"]
                        self.assertIn("the outcome of the clone is unknown", message)
                        self.assertNotRegex(message, "already exists|got timeout|got no worker upid")
                    wait_until(pve.idle)
                    pve.hanging.clear()
            self.assertEqual(proxy.clone(300).status, 200, "the worker goes on")
            pve.hanging.set()

    def test_a_strange_upid_is_polled_as_it_is(self) -> None:
        def reply(request: Message) -> bytes:
            is_clone = request.target.endswith(b"/clone")
            return ok(b'{"data":"UPID:a%62?#\xc3\xa9"}' if is_clone else b'{"data":{"status":"stopped","exitstatus":"OK"}}')

        with replying(reply) as backend, Proxy(backend.url) as proxy:
            self.assertEqual(proxy.clone(201).status, 200)
            self.assertEqual(backend.requests[-1].target, b"/api2/json/nodes/pve/tasks/UPID%3Aa%2562%3F%23%C3%A9/status")
            proxy.wait_log("CLONE COMPLETE")

    def test_polls_that_fail_are_repeated(self) -> None:
        faults = ["reset", "reset-in-head", "reset-in-body", "close", "garbage", "401 permission denied - invalid ticket",
                  "500 oops", "596 Connection timed out", "json:no json", "json:[1]", 'json:{"data":[]}',
                  'json:{"data":{"status":7}}', 'json:{"data":{"status":"stopped","exitstatus":7}}',
                  "400 Parameter verification failed."]  # fmt: skip
        with FakePVE(clone_seconds=0.3) as pve, Proxy(pve.url, "-poll-delay", "10ms") as proxy:
            pve.poll_faults.extend(faults)
            self.assertEqual(proxy.clone(201).status, 200)
            self.assertGreater(pve.polls, len(faults))
            proxy.wait_log("TASK POLL ERROR: node=pve vmid=9000 newid=201: ")
            proxy.wait_log("CLONE COMPLETE")

    def test_a_task_that_takes_too_long_holds_the_queue(self) -> None:
        for remote in (False, True):
            flags = ("-task-timeout", "400ms", "-poll-delay", "50ms")
            with self.subTest(remote=remote), FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, *flags) as proxy:
                pve.remote = remote
                first, second = queue_up(proxy, clone_request(201), clone_request(202, source=9001))
                answer = first.message()
                content, (upid,) = json.loads(answer.body), pve.tasks
                self.assertEqual((answer.status, content["data"]), (504, upid))
                self.assertIn(upid, content["message"])
                self.assertEqual(len(pve.clones), 1, "the second waits")
                pve.finish()
                self.assertEqual(second.message().status, 200)
                self.assertEqual(pve.most_at_once, 1)
                proxy.wait_log(r"CLONE TIMEOUT: node=pve vmid=9000 newid=201 upid=UPID:\S+ \(elapsed: \d+\.\ds\)")

    def test_a_task_that_nobody_can_tell_of_is_given_up(self) -> None:
        for remote in (False, True):
            flags = ("-task-timeout", "300ms", "-poll-delay", "50ms")
            with self.subTest(remote=remote), FakePVE(clone_seconds=0.1) as pve, Proxy(pve.url, *flags) as proxy:
                pve.remote = remote
                pve.poll_faults.extend(["400 no such task"] * 1000)
                self.assertEqual(proxy.clone(201).status, 504)
                proxy.wait_log("CLONE ERROR: .* no longer waited for")
                pve.poll_faults.clear()
                self.assertEqual(proxy.clone(202).status, 200)

    def test_a_task_that_outlives_its_polls_holds_the_queue_by_its_process(self) -> None:
        flags = ("-task-timeout", "200ms", "-poll-delay", "50ms")
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, *flags) as proxy:
            pve.poll_faults.extend(["401 permission denied - invalid ticket"] * 1000)
            self.assertEqual(proxy.clone(201).status, 504)
            proxy.wait_log("TASK POLL ERROR", 3)
            self.assertEqual(proxy.lines("no longer waited for"), [])
            pve.finish()
            proxy.wait_log("no longer waited for")

    def test_an_unexpected_failure_answers_500_and_the_worker_goes_on(self) -> None:
        backend = unittest.mock.Mock(program.Backend)
        backend.exchange.side_effect = RuntimeError("unexpected")
        clones = work_on_clones(backend)
        with self.assertLogs(program.log, "ERROR"):
            for newid in (201, 202):
                client = self.enterContext(PretendedClient())
                job = clones.admit(job_of(client, newid=newid))
                self.assertTrue(client.event.wait(LONG))
                answer = clones.collect(job, client)
                self.assertEqual(answer and answer.status, 500)

    def test_the_process_ends_when_a_vital_thread_dies(self) -> None:
        code = (f"import sys; sys.path.insert(0, {HERE!r}); import pve_clone_queue_proxy as p, signal\n"
                "def fail(self): raise RuntimeError('dead')\n"
                "p.CloneQueue.get = fail\n"
                "sys.exit(p.main(['-listen', '127.0.0.1:0']))")  # fmt: skip
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG)
        self.assertEqual(result.returncode, 1)
        self.assertIn("the clone worker thread failed", result.stderr)


SETTINGS = program.parse_flags([])


class PretendedClient(program.Client, Closing):
    """A client that is there until it hangs up."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        super().__init__(self.near.fileno(), "192.0.2.1")

    def hang_up(self) -> None:
        self.far.close()

    def close(self) -> None:
        self.near.close()
        self.far.close()


def job_of(client: program.Client, source: int = 9000, newid: object = 201, user: str = "") -> program.CloneJob:
    """A job of that client's, equal to those with the same numbers and user; odd sources are on another node."""
    call = program.CloneCall("lxc", f"pve{source % 2}", str(source), str(newid), user)
    return program.CloneJob(call, program.Outgoing("POST", str(newid), []), [], repr(call).encode(), client)


def work_on_clones(backend: program.Backend) -> program.CloneQueue:
    """A queue whose worker runs and asks that backend."""
    clones = program.CloneQueue(SETTINGS)
    worker = program.CloneWorker(SETTINGS, backend, clones, lambda newid: None)
    threading.Thread(target=worker.run, daemon=True).start()
    return clones


def refusal(text: str) -> program.Answer:
    """PVE's answer to a clone that it refuses."""
    return program.Refusal(500, text).answer()


class Clock:
    """In place of the program's `time` during a test, which logs nothing: it stands still until it is moved."""

    def __init__(self, test: unittest.TestCase) -> None:
        self.now = 1000.0
        test.enterContext(unittest.mock.patch.object(program, "time", self))
        test.enterContext(unittest.mock.patch.object(program.log, "disabled", True))

    def monotonic(self) -> float:
        return self.now

    time = monotonic


class Leaving(unittest.TestCase):
    def test_a_clone_whose_client_left_is_not_started(self) -> None:
        def half_close(wire: Wire) -> None:
            wire.sock.shutdown(socket.SHUT_WR)

        def send_another_request_and_close(wire: Wire) -> None:
            wire.send(GET)
            wire.close()

        for leave in (Wire.close, Wire.reset, half_close, send_another_request_and_close):
            with self.subTest(leave.__name__), FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
                first, leaver, last = queue_up(proxy, *(clone_request(newid) for newid in (201, 202, 203)))
                leave(leaver)
                proxy.wait_log(r"CLONE ABANDONED: .*node=pve vmid=9000")
                pve.finish()
                self.assertEqual((first.message().status, last.message().status), (200, 200))
                self.assertEqual(sorted(record.newid for record in pve.clones), ["201", "203"])

    def test_a_running_clone_whose_client_left_holds_the_queue(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            first = bring(proxy, clone_request(202))[0]
            pve.wait_for_clones(1)
            first.close()
            proxy.wait_log(r"CLONE ABANDONED: .*\(running\)")
            second = queue_up(proxy, clone_request(203, source=9001))[0]
            self.assertEqual(len(pve.clones), 1)
            pve.finish()
            self.assertEqual((second.message().status, pve.most_at_once), (200, 1))

    def test_a_wanted_place_is_taken_from_who_left(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, "-queue-size", "2") as proxy:
            first = bring(proxy, clone_request(201))[0]
            pve.wait_for_clones(1)
            leaver, second = queue_up(proxy, clone_request(202), clone_request(203))
            leaver.close()
            third = queue_up(proxy, clone_request(204))[0]
            self.assertEqual(proxy.clone(205).status, 503)
            pve.finish()
            self.assertEqual([wire.message().status for wire in (first, second, third)], [200] * 3)
            self.assertEqual([record.newid for record in pve.clones], ["201", "203", "204"])

    def test_an_equal_request_takes_over_what_waits_runs_or_has_ended(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            first, leaver = queue_up(proxy, clone_request(201), clone_request(202))
            leaver.close()
            waiting = bring(proxy, clone_request(202))[0]
            proxy.wait_log(r"CLONE RESUMED: .*\(waiting\)")
            pve.finish(ENDLESS)
            pve.wait_for_clones(2)
            waiting.close()
            running = bring(proxy, clone_request(202))[0]
            proxy.wait_log(r"CLONE RESUMED: .*\(running\)")
            running.close()
            proxy.wait_log("CLONE ABANDONED", 3)
            pve.finish()
            proxy.wait_log("CLONE COMPLETE", 2)
            answer = proxy.clone(202)
            self.assertEqual(json.loads(answer.body)["data"], pve.clones[1].upid)
            self.assertEqual(first.message().status, 200)
            self.assertEqual(len(pve.clones), 2)
            # Delivered, it is never given again: PVE itself answers.
            self.assertIn(b"already exists", proxy.clone(202).first)
            self.assertEqual(len(pve.clones), 3)

    def test_another_request_takes_nothing_over(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            queue_up(proxy, clone_request(201))
            pve.wait_for_clones(1)
            queue_up(proxy, clone_request(202))[0].close()
            proxy.wait_log("CLONE ABANDONED")
            others = queue_up(proxy, clone_request(202, token="PVEAPIToken=root@pam!other=secret"),
                           clone_request(203), clone_request(202, path="/api2/json/nodes/pve/lxc/9000/clone/"))  # fmt: skip
            pve.finish()
            self.assertEqual(sorted(wire.message().status for wire in others), [200, 200, 500])
            proxy.stop()
            self.assertEqual(proxy.lines("CLONE RESUMED"), [])

    def test_two_live_clients_never_share_a_success(self) -> None:
        with FakePVE(clone_seconds=0.2) as pve, Proxy(pve.url) as proxy:
            answers = at_once(2, lambda _: proxy.clone(201))
            self.assertEqual(sorted(answer.status for answer in answers), [200, 500])
            self.assertTrue(any(b"already exists" in answer.first for answer in answers))

    def test_impatient_clients_that_retry_end_up_with_one_container_each(self) -> None:
        with FakePVE(clone_seconds=0.25) as pve, Proxy(pve.url) as proxy:

            def insist(index: int) -> Message:
                for _ in range(100):
                    with proxy.wire() as wire:
                        wire.sock.settimeout(0.4)
                        wire.send(clone_request(201 + index))
                        with contextlib.suppress(TimeoutError):
                            return wire.message()
                        # It leaves by a half-close, to see whether an answer was on its way in that very moment.
                        wire.sock.settimeout(LONG)
                        wire.sock.shutdown(socket.SHUT_WR)
                        if wire.buffer or wire.more():
                            return wire.message()
                raise AssertionError("no answer in 100 tries")

            answers = at_once(8, insist)
            self.assertEqual([answer.status for answer in answers], [200] * 8)
            self.assertEqual(len({json.loads(answer.body)["data"] for answer in answers}), 8)
            self.assertEqual((len(pve.clones), pve.overlaps), (8, 0))

    def test_claiming_and_leaving_never_both_win(self) -> None:
        sent: list[str] = []

        def refuse(outgoing: program.Outgoing, seconds: float) -> program.Answer:
            sent.append(outgoing.target)
            return refusal("no")

        self.enterContext(unittest.mock.patch.object(program.log, "disabled", True))
        clones = work_on_clones(unittest.mock.Mock(program.Backend, exchange=refuse))
        dropped = ran = 0
        for newid in map(str, range(2000)):
            with PretendedClient() as client:
                job = clones.admit(job_of(client, newid=newid))
                client.hang_up()
                deadline = time.monotonic() + LONG
                while not job.outcome:
                    os.sched_yield()
                    self.assertLess(time.monotonic(), deadline)
            self.assertEqual(job.outcome == "failed", bool(sent) and sent[-1] == newid)
            dropped += job.outcome == "abandoned"
            ran += job.outcome == "failed"
        self.assertEqual((dropped + ran, len(sent)), (2000, ran))
        self.assertGreater(dropped, 0)
        self.assertEqual(clones.snapshot()["waiting"], [])

    def test_kept_answers_are_forgotten(self) -> None:
        clock, clones = Clock(self), program.CloneQueue(SETTINGS)

        def come_and_go(seconds: float) -> program.CloneJob:
            clock.now += seconds
            clones.look_around()
            with PretendedClient() as client:
                job = clones.admit(job_of(client))
                client.hang_up()
                clones.look_around()
            return job

        with PretendedClient() as client:
            job = clones.admit(job_of(client))
            self.assertIs(clones.get(), job)
            client.hang_up()
            clones.look_around()
        clones.settle(job, program.Ended("failed", refusal("x"), "x", "CLONE FAILED: x"))
        self.assertEqual((job.outgoing.body, job.outgoing.lines, job.poll_fields), (None, b"", []), "no secret is kept")
        self.assertIs(come_and_go(program.KEEP_SECONDS - 1), job)
        self.assertIsNotNone(job.answer)
        self.assertIsNot(come_and_go(2), job)
        self.assertIsNone(job.answer)


# What the tests from here on share


def expect_cloned(*wires: Wire) -> None:
    """These clients must get their containers."""
    answers = [wire.message().first for wire in wires]
    if set(answers) - {b"HTTP/1.1 200 OK"}:
        raise AssertionError(f"not all were cloned: {answers}")


def finish(pve: FakePVE, *wires: Wire, then: float = 0.05) -> None:
    """End the clones that run, with which these clients must get their containers; what starts later takes `then` seconds."""
    pve.finish(then)
    expect_cloned(*wires)


def expect_shutting_down(*wires: Wire) -> None:
    """These clients must be told to come back."""
    answers = [wire.message() for wire in wires]
    if any((answer.status, answer.get("retry-after")) != (503, b"5") for answer in answers):
        raise AssertionError(f"not told to come back: {answers}")


WITH_STATUS = ("-status-listen", "127.0.0.1:0")
OTHER_TOKEN = "PVEAPIToken=root@pam!other=secret"


def status_port(proxy: Proxy) -> int:
    """The port of the status page of a proxy that runs with WITH_STATUS."""
    return int(proxy.wait_log(r"STATUS PAGE: 127\.0\.0\.1:(\d+)")[1])


def status_page(proxy: Proxy, path: str, method: str = "GET") -> Message:
    """One of its pages."""
    with Wire.to(status_port(proxy)) as wire:
        return wire.ask(f"{method} {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode(), no_body=method == "HEAD")


def snapshot_of(proxy: Proxy) -> Any:
    """What it shows."""
    return json.loads(status_page(proxy, "/status.json").body)


def snapshot_with(proxy: Proxy, outcome: str, count: int) -> Any:
    """What it shows as soon as so many clones have ended in that way."""
    return wait_until(lambda: (now := snapshot_of(proxy))["totals"][outcome] == count and now, f"{count} {outcome}")


def metric_of(proxy: Proxy, name: str) -> float:
    """The value of one of its metrics, named with its labels."""
    lines = status_page(proxy, "/metrics").body.decode().splitlines()
    return next(float(value) for key, _, value in (line.rpartition(" ") for line in lines) if key == "pve_clone_queue_" + name)


def start_program(
    test: unittest.TestCase, backend: str, *flags: str, prepare: str = "", keep: int | None = None
) -> tuple[subprocess.Popen[bytes], bytes]:
    """The program behind those Python statements, perhaps with a listening socket that the service manager kept for it. Its
    stderr is read no further than to the line that tells where it listens."""
    if keep is not None:
        prepare = f"os.dup2({keep}, 3); os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))"
    code = f"import os, sys; sys.path.insert(0, {HERE!r}); import pve_clone_queue_proxy as program\n{prepare}\n"
    command = [sys.executable, "-c", code + "os._exit(program.main(sys.argv[1:]))", "-backend", backend, *flags]
    environment = {key: value for key, value in os.environ.items() if key != "JOURNAL_STREAM"}
    fds = () if keep is None else (keep,)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, pass_fds=fds, bufsize=0)
    assert process.stderr
    for clean_up in (process.stderr.close, process.wait, process.kill):  # the last one comes first
        test.addCleanup(clean_up)
    return process, process.stderr.readline()


def find_locked(clones: program.CloneQueue) -> program.CloneJob:
    """The next job, whose source is found locked."""
    job = clones.get()
    clones.settle(job, program.PutOff(job.source, refusal("locked"), "locked"))
    return job


class Locks(unittest.TestCase):
    def test_a_locked_source_is_waited_for_and_others_go_on(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            pve.locks["9000"] = "backup"
            wires = bring(proxy, clone_request(201))
            proxy.wait_log(r"CLONE LOCKED: node=pve vmid=9000 newid=201: CT is locked \(backup\)")
            wires += queue_up(proxy, *map(clone_request, (202, 203, 204)))
            self.assertEqual(proxy.clone(205, source=9001).status, 200)
            pve.unlock("9000")
            expect_cloned(*wires)
            done = [record.newid for record in pve.clones if record.status == 200]
            self.assertEqual(done, ["205", "201", "202", "203", "204"], "a source keeps its order")
            proxy.stop()
            self.assertEqual(len(proxy.lines("CLONE LOCKED")), 1)

    def test_new_and_locked_clones_take_turns(self) -> None:
        clock, clones = Clock(self), program.CloneQueue(SETTINGS)
        for source in range(1, 6):
            clones.admit(job_of(self.enterContext(PretendedClient()), source, 200 + source))
        tried = []
        for _ in range(9):
            tried.append(find_locked(clones).call.source)
            clock.now += 1  # due again before anything else can be tried
        self.assertEqual(tried[::2], ["1", "2", "3", "4", "5"])

    def test_a_taken_clone_whose_time_is_over_makes_nobody_try_without_a_pause(self) -> None:
        clock, clones = Clock(self), program.CloneQueue(program.parse_flags(["-lock-timeout", "10s"]))
        self.enterContext(unittest.mock.patch.object(clones.not_empty, "wait", side_effect=NothingDue))

        def come(source: int, newid: int) -> program.CloneJob:
            return clones.admit(job_of(self.enterContext(PretendedClient()), source, newid))

        first, second = come(9002, 205), come(9000, 205)
        self.assertEqual([find_locked(clones), find_locked(clones)], [first, second])
        clock.now += 9.5
        taker, other = come(9001, 205), come(9000, 206)
        self.assertIn(find_locked(clones), (first, second))
        self.assertIs(clones.get(), taker)
        clones.note_accepted(taker, refusal("none"), "UPID:x")
        clones.settle(taker, program.Ended("completed", refusal("none"), "OK", "CLONE COMPLETE"))
        self.assertEqual((first.outcome, second.taken_by), ("taken", taker))
        clock.now += 0.7
        self.assertIs(find_locked(clones), other)
        self.assertRaises(NothingDue, clones.get)

    def test_zero_hands_the_refusal_on_at_once(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, "-lock-timeout", "0") as proxy:
            pve.locks["9000"] = "disk"
            pve.exits.append("clone failed: cfs-lock 'storage-x' error: got lock request timeout")
            self.assertEqual(proxy.clone(201).status, 500)
            self.assertEqual(proxy.clone(202, source=9001).status, 200)
            self.assertEqual(len(pve.clones), 2)

    def test_only_the_tables_texts_are_tried_again(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            for text, tries in [
                ("CT is locked (migrate)", 2),
                ("can't lock file '/run/lock/lxc/pve-config-9000.lock' - got timeout", 2),
                ("cfs-lock 'firewall-vm-201' error: got lock request timeout", 2),
                ("can't lock file '/run/lock/lxc/pve-config-201.lock' - got timeout", 1),
                ("can't lock file '/var/log/pve/tasks/.active.lock' - got timeout", 1),
                ("got no worker upid - start worker failed", 1),
                ("CT 201 already exists on node 'pve'", 1),
            ]:
                with self.subTest(text):
                    before = len(pve.clones)
                    pve.clone_faults.append(f"500 {text}")
                    self.assertEqual((proxy.clone(201).status, len(pve.clones) - before), (200 if tries == 2 else 500, tries))
                    pve.destroy("201")

    def test_a_task_that_failed_from_contention_is_tried_again(self) -> None:
        contention = "clone failed: can't lock file '/var/lock/pve-manager/pve-storage-local-lvm' - got timeout"
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            pve.exits.extend([contention, contention])
            answer = proxy.clone(201)
            self.assertEqual(json.loads(answer.body)["data"], pve.clones[2].upid)
            self.assertEqual((len(pve.clones), pve.overlaps), (3, 0))
            pve.exits.append(contention + " +behind")
            answer = proxy.clone(202)
            self.assertEqual(json.loads(answer.body)["data"], pve.clones[3].upid, "the first try's answer")
            self.assertEqual(pve.clones[4].status, 500, "it was tried again, and the left-over was in the way")
            proxy.wait_log(r"CLONE ERROR: node=pve vmid=9000 newid=202: PVE's clean-up .* left it behind")

    def test_a_parked_clone_whose_client_left_is_dropped(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            pve.locks["9000"] = "backup"
            wire = bring(proxy, clone_request(201))[0]
            proxy.wait_log("CLONE LOCKED")
            wire.close()
            proxy.wait_log("CLONE ABANDONED")
            tries = len(pve.clones)
            pve.unlock("9000")
            self.assertEqual(proxy.clone(202).status, 200)
            self.assertLessEqual(len(pve.clones), tries + 1)
            self.assertNotIn("201", pve.guests)

    def test_several_proxies_before_one_cluster_clone_two_sources(self) -> None:
        with FakePVE(clone_seconds=0.02) as pve, contextlib.ExitStack() as stack:
            proxies = [stack.enter_context(Proxy(pve.url)) for _ in range(3)]
            answers = at_once(60, lambda index: proxies[index % 3].clone(200 + index, source=9000 + index // 3 % 2))
            self.assertEqual([answer.status for answer in answers], [200] * 60)
            self.assertEqual(pve.overlaps, 0)
            self.assertEqual(sum(record.status == 200 for record in pve.clones), 60)
            self.assertLessEqual(set(map(str, range(200, 260))), pve.guests)

    def test_after_a_crash_the_next_clone_waits_for_the_lock(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            bring(proxy, clone_request(201))
            pve.wait_for_clones(1)
            proxy.stop(signal.SIGKILL)
            with Proxy(pve.url, port=proxy.port) as again:
                wire = bring(again, clone_request(202))[0]
                again.wait_log("CLONE LOCKED")
                finish(pve, wire)
            self.assertEqual(pve.overlaps, 0)


class NothingDue(Exception):
    """The worker would wait now, for that many seconds if it knows."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds


class QueueInvariants(unittest.TestCase):
    """A queue alone is led through random steps, clients that come, leave and come back, a worker, and time that passes;
    after each of them `check` looks at what must always hold."""

    SEEDS = range(5)
    STEPS = 1500
    SIZE = 10
    LOCK_TIMEOUT = 20.0

    def begin(self, seed: int) -> None:
        """Forget all, and take many random steps from an empty queue on."""
        self.doCleanups()
        self.rng = random.Random(seed)
        self.clock = Clock(self)
        flags = ["-queue-size", str(self.SIZE), "-lock-timeout", f"{self.LOCK_TIMEOUT}s"]
        self.clones = program.CloneQueue(program.parse_flags(flags))
        self.enterContext(unittest.mock.patch.multiple(program, random=self.rng, KEEP_COUNT=40))
        self.enterContext(unittest.mock.patch.object(self.clones.not_empty, "wait", self.wait))
        self.queue: list[program.CloneJob] = []  # what has not ended, as it arrived
        self.visits: dict[program.CloneJob, PretendedClient] = {}  # clients that are there and wait for their answer
        self.gone: list[tuple[program.CloneJob, PretendedClient]] = []  # those that hung up
        self.takers: dict[program.CloneJob, program.CloneJob] = {}
        self.outcomes = dict.fromkeys(program.OUTCOMES, 0)
        self.upids: dict[bytes, int] = {}  # how often they were given to a client
        self.refused_taken = False  # a taken clone was refused, and nobody has come since
        self.returned: program.CloneJob | None = None  # who came then
        steps = [self.arrive, self.hang_up, self.answer, self.work, self.pass_time, self.look]
        for step in self.rng.choices(steps, [30, 8, 20, 50, 10, 5], k=self.STEPS):
            step()
            self.check()

    def wait(self, seconds: float | None = None) -> bool:
        raise NothingDue(seconds)

    def check(self) -> None:
        """What must hold at any time."""
        clones = self.clones
        for job in [job for job in self.queue if job.outcome]:
            self.assertEqual(clones.ended.count(job), 1)
            self.queue.remove(job)
            self.takers.pop(job, None)
            self.outcomes[job.outcome] += 1
            if job.outcome == "taken":
                self.refused_taken, self.returned = True, None
        self.assertEqual(list(clones.queue), self.queue, "in the order of arrival, until it ends")
        self.assertTrue(set(clones.ended).isdisjoint(clones.queue))
        self.assertTrue(clones.running is None or clones.running in self.queue)
        self.assertLessEqual(clones.qsize(), self.SIZE + 1, "one more if the running one was put off")
        for job in self.queue:
            self.assertIs(job.taken_by, self.takers.get(job), "by an accepted clone of the same number")
        self.assertLessEqual(clones.holds.keys(), {scope for job in self.queue for scope in job.scopes})
        for job, client in self.visits.items():
            self.assertIs(job.client, client, "nobody loses a job")
            self.assertFalse(client.left)
            self.assertTrue(client.event.is_set() or not job.answer, "who has an answer is told so")
        self.assertEqual({name: clones.totals[name] for name in program.OUTCOMES}, self.outcomes)
        self.assertLessEqual(max(self.upids.values(), default=0), 1, "one success goes to one client")

    # Clients

    def arrive(self) -> None:
        """A client comes, perhaps with a request that was there before."""
        rng, clones, client = self.rng, self.clones, PretendedClient()
        job = job_of(client, rng.choice([9000, 9001, 9002]), rng.choice(["", *range(201, 207)]), rng.choice("ab"))
        try:
            if rng.random() < 0.5:
                clones.check_room()
            admitted = clones.admit(job)
        except program.Refusal as refused:
            clones.turn_away(job.call, refused)
            waiting = [job for job in clones.queue if not job.client.left and job is not clones.running]
            self.assertTrue(clones.draining or len(waiting) >= self.SIZE, "full, of clients that have not left")
            self.outcomes["rejected"] += 1
            client.close()
            return
        if admitted is job:
            equal = [other for other in (*clones.queue, *clones.ended) if other.key == job.key and other.left]
            self.assertEqual(equal, [], "it would have taken over")
            self.note_arrival(job)
        self.assertEqual(admitted.key, job.key)
        self.assertNotIn(admitted, self.visits, "nobody shares a job")
        self.visits[admitted] = client

    def note_arrival(self, job: program.CloneJob) -> None:
        self.queue.append(job)
        running = self.clones.running
        if running and running.upid and running.call.newid == job.call.newid != "":
            self.takers[job] = running
        elif self.refused_taken:
            self.refused_taken, self.returned = False, job

    def hang_up(self) -> None:
        """A client hangs up; its handler has not noticed yet."""
        if self.visits:
            job = self.rng.choice(list(self.visits))
            client = self.visits.pop(job)
            client.hang_up()
            self.gone.append((job, client))

    def answer(self) -> None:
        """The handlers that were woken: one collects its client's answer, those whose clients hung up end."""
        told = [(job, client) for job, client in self.visits.items() if client.event.is_set()]
        if told:
            self.collect(*self.rng.choice(told))
        for job, client in [(job, client) for job, client in self.gone if client.event.is_set()]:
            kept = job in self.clones.queue or job in self.clones.ended
            with contextlib.suppress(program.ClientGone):
                self.clones.collect(job, client)
                self.assertFalse(kept, "who hung up gets nothing that another one might want")
            self.gone.remove((job, client))
            client.close()

    def collect(self, job: program.CloneJob, client: PretendedClient) -> None:
        """A client that is there gets its answer."""
        answer = self.clones.collect(job, client)
        if answer.status == 200:
            self.upids[answer.body] += 1
        del self.visits[job]
        client.close()

    # The worker

    def work(self) -> None:
        if self.clones.running:
            self.go_on(self.clones.running)
        else:
            with contextlib.suppress(NothingDue):
                self.take()

    def go_on(self, job: program.CloneJob) -> None:
        """Whatever PVE may say of a clone."""
        ways = [self.complete, self.complete, self.answer_early] if job.upid else [self.accept, self.accept]
        self.rng.choice([*ways, self.put_off, self.end_badly])(job)

    def go_well(self, job: program.CloneJob) -> None:
        (self.complete if job.upid else self.accept)(job)

    def take(self) -> None:
        """Get the next job. Raises NothingDue."""
        clones = self.clones
        try:
            job = clones.get()
        except NothingDue as nothing:
            untaken = [job for job in clones.queue if not job.taken_by]
            self.assertTrue(all(clones.holds.keys() & job.scopes for job in untaken), "the others could have been tried")
            self.assertEqual(nothing.seconds is not None and nothing.seconds > 0, bool(untaken), "it knows when to try again")
            raise
        self.assertIs(job, clones.running)
        self.assertIsNone(job.taken_by)
        self.assertIn(job, self.visits, "a clone whose client has left is not started")
        for other in itertools.takewhile(lambda other: other is not job, clones.queue):
            if not other.taken_by:
                self.assertTrue(other.scopes != job.scopes or job is self.returned, "a source keeps its order")
                held = clones.holds.keys() & other.scopes & set(job.scopes)
                self.assertEqual(held, set(), "of what is held only the first one is tried")

    def accept(self, job: program.CloneJob) -> None:
        upid = f"UPID:{len(self.upids)}"
        self.upids[upid.encode()] = 0
        self.clones.note_accepted(job, program.Answer(200, "OK", [], upid.encode()), upid)
        for other in self.queue:
            if other is not job and other.call.newid == job.call.newid != "":
                self.takers[other] = job

    def put_off(self, job: program.CloneJob) -> None:
        """PVE or a node is away, or the source locked, perhaps by a clone; or the task has failed from contention."""
        scope = self.rng.choice(job.scopes)
        if job.upid or scope == job.source:
            self.put_off_by_its_source(job, self.clones.is_time_over(job.source) and self.rng.random() < 0.5)
        else:
            self.settle(job, program.PutOff(scope, refusal("away"), "away"))

    def put_off_by_its_source(self, job: program.CloneJob, being_cloned: bool = False) -> None:
        self.settle(job, program.PutOff(job.source, job.accepted or refusal("locked"), "locked", being_cloned))

    def end_badly(self, job: program.CloneJob) -> None:
        """PVE refuses the clone, or its task fails."""
        self.settle(job, program.Ended("failed", job.accepted or refusal("no"), "no", "CLONE FAILED: no"))

    def settle(self, job: program.CloneJob, result: program.Ended | program.PutOff) -> None:
        """A clone has made nothing, and the number that it took is free again."""
        self.takers = {other: taker for other, taker in self.takers.items() if taker is not job}
        self.clones.settle(job, result)

    def complete(self, job: program.CloneJob) -> None:
        assert job.accepted
        self.clones.settle(job, program.Ended("completed", job.accepted, "OK", "CLONE COMPLETE"))
        self.assertTrue(self.clones.holds.keys().isdisjoint(job.scopes), "all that it needs is there")

    def answer_early(self, job: program.CloneJob) -> None:
        """The task takes too long."""
        had_answer = job.answer is not None
        self.assertEqual(self.clones.answer_running(refusal("too long")), not had_answer)

    def pass_time(self) -> None:
        self.clock.now += self.rng.choice([0.1, 0.3, 1.0, 3.0, 10.0, 70.0])

    def look(self) -> None:
        """What happens a few times a second, and what the status page asks for."""
        self.clones.look_around()
        json.dumps(self.clones.snapshot())

    def come_to_an_end(self, go_on: Callable[[program.CloneJob], object]) -> None:
        """Let what runs go on in this way until the queue is empty, within a bounded time; nobody is left without an answer."""
        end = self.clock.now + 3 * self.LOCK_TIMEOUT
        for _ in itertools.takewhile(lambda _: self.queue, range(1000)):
            if self.clones.running:
                go_on(self.clones.running)
            else:
                self.take_or_wait()
            self.check()
        self.assertEqual(self.queue, [])
        self.assertLess(self.clock.now, end)
        for job, client in list(self.visits.items()):
            self.assertTrue(client.event.is_set())
            self.collect(job, client)
        self.answer()
        self.assertEqual(self.gone, [])
        self.check()

    def take_or_wait(self) -> None:
        try:
            self.take()
        except NothingDue as nothing:
            self.clock.now += nothing.seconds or 0.25
            self.look()

    def test_all_are_answered_after_a_drain(self) -> None:
        for seed in self.SEEDS:
            with self.subTest(seed=seed):
                self.begin(seed)
                self.clones.drain()
                self.check()
                self.arrive()
                self.come_to_an_end(self.go_on)
                self.assertTrue(self.clones.wait_until_idle(self.clock.now))

    def test_all_end_when_pve_works_and_when_the_sources_stay_locked(self) -> None:
        for seed, go_on in itertools.product(self.SEEDS, (self.go_well, self.put_off_by_its_source)):
            with self.subTest(go_on.__name__, seed=seed):
                self.begin(seed)
                self.come_to_an_end(go_on)


class Shutdown(unittest.TestCase):
    def test_waiting_clones_get_503_and_the_running_one_its_answer(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number), FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
                running, *waiting = queue_up(proxy, clone_request(201), clone_request(202), clone_request(203, 9001))
                pve.wait_for_clones(1)
                proxy.process.send_signal(number)
                expect_shutting_down(*waiting)
                finish(pve, running)
                self.assertEqual((proxy.stop(0), len(pve.clones)), (0, 1))

    def test_a_clone_parked_after_a_failed_task_gets_that_tasks_answer(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            pve.exits.append("clone failed: cfs-lock 'storage-x' error: got lock request timeout")

            def lock_at_the_second_try(record: CloneRecord) -> None:
                if len(pve.clones) == 2:
                    pve.locks["9000"] = "backup"

            pve.on_clone = lock_at_the_second_try
            wire = bring(proxy, clone_request(201))[0]
            pve.wait_for_clones(2)
            proxy.process.terminate()
            answer = wire.message()
            self.assertEqual((answer.status, json.loads(answer.body)["data"]), (200, pve.clones[0].upid))
            self.assertEqual(proxy.stop(0), 0)

    def test_idle_connections_and_tunnels_end_at_once_and_requests_finish(self) -> None:
        go_on = threading.Event()

        def script(wire: Wire) -> None:
            if backend.request(wire).get("upgrade"):
                wire.send(SWITCHING)
                wire.rest()
            else:
                go_on.wait(LONG)
                wire.send(OK)

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy:
            tunnel, busy, silent = bring(proxy, UPGRADE, GET, b"")
            tunnel.head()
            wait_until(lambda: len(backend.requests) == 2, "the request at the backend")
            proxy.process.terminate()
            self.assertTrue(tunnel.closed())
            self.assertTrue(silent.closed())
            go_on.set()
            answer = busy.message()
            self.assertEqual((answer.body, answer.get("connection")), (b"ok", b"close"))
            self.assertEqual(proxy.stop(0), 0)

    def test_a_head_that_never_ends_does_not_hold_it_up(self) -> None:
        with answering(OK) as backend, Proxy(backend.url, constants="program.DRAIN_SECONDS = 3600") as proxy:
            drip = proxy.wire()
            drip.send(b"GET / HTTP/1.1\r\nX: ")
            proxy.process.terminate()
            for _ in range(int(10 * LONG)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    proxy.process.wait(0.1)
                    break
                with contextlib.suppress(OSError):
                    drip.send(b"x")
            self.assertEqual(proxy.stop(0), 0)

    def test_who_runs_at_the_end_of_patience_learns_what_is_known(self) -> None:
        def answer_of(pve: FakePVE, stage: str) -> Message:
            with Proxy(pve.url, constants="program.DRAIN_SECONDS = 0.3") as proxy, proxy.wire() as wire:
                wire.send(clone_request(201))
                pve.wait_for_clones(1)
                proxy.wait_log(stage)
                proxy.process.terminate()
                answer = wire.message()
                wire.close()
                self.assertEqual(proxy.stop(0), 0)
                return answer

        with FakePVE(clone_seconds=ENDLESS) as pve:
            answer = answer_of(pve, "CLONE TASK")
            self.assertEqual((answer.status, json.loads(answer.body)["data"]), (200, next(iter(pve.tasks))))
        with FakePVE() as pve:
            pve.clone_faults.append("hang")
            answer = answer_of(pve, "CLONE START")
            self.assertEqual((answer.status, answer.get("retry-after")), (504, None))
            self.assertIn("outcome of the clone is unknown", json.loads(answer.body)["message"])

    def test_who_comes_back_meanwhile_gets_the_running_clones_answer(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            leaver = queue_up(proxy, clone_request(201))[0]
            pve.wait_for_clones(1)
            threads = proxy.threads()
            back, other = bring(proxy, b"", b"")
            wait_until(lambda: proxy.threads() >= threads + 2, "both to be accepted: what is not is reset")
            leaver.close()
            proxy.wait_log("CLONE ABANDONED")
            proxy.process.terminate()
            proxy.wait_log("shutting down")
            proxy.process.send_signal(signal.SIGHUP)  # which must not end it
            self.assertEqual(other.ask(clone_request(202)).status, 503)
            back.send(clone_request(201))
            proxy.wait_log("CLONE RESUMED")
            finish(pve, back)
            self.assertEqual((proxy.stop(0), len(pve.clones)), (0, 1))

    def test_a_second_signal_ends_it_at_once_and_no_answer_without_a_length_looks_whole(self) -> None:
        ended = threading.Event()

        def script(wire: Wire) -> None:
            wire.head()
            wire.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nsome of it")
            ended.wait(LONG)

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(GET)
            wire.until(b"some of it")
            proxy.process.terminate()
            proxy.wait_log("shutting down")
            self.assertEqual(proxy.stop(), -signal.SIGTERM)
            self.assertRaises(ConnectionResetError, wire.rest)
            ended.set()


# Operation


class Status(unittest.TestCase):
    def setUp(self) -> None:
        self.pve = self.enterContext(FakePVE())
        self.proxy = self.enterContext(Proxy(self.pve.url, *WITH_STATUS))

    def page(self, path: str, method: str = "GET") -> Message:
        return status_page(self.proxy, path, method)

    def test_the_picture_of_the_queue(self) -> None:
        self.pve.clone_seconds = ENDLESS
        wires = queue_up(self.proxy, clone_request(201), clone_request(202))
        self.pve.wait_for_clones(1)
        status = snapshot_of(self.proxy)
        self.assertEqual([status["running"][name] for name in ("vmid", "newid", "user")], ["9000", "201", "root@pam!ci"])
        self.assertEqual([job["newid"] for job in status["waiting"]], ["202"])
        finish(self.pve, *wires)
        status = snapshot_with(self.proxy, "completed", 2)
        self.assertEqual([job["outcome"] for job in status["history"]], ["completed"] * 2)
        self.assertGreater(status["history"][1]["waited_seconds"], 0)
        self.assertNotIn(b"secret", self.page("/status.json").body)

    def test_values_of_clients_are_escaped(self) -> None:
        path = "/api2/json/nodes/%3Cscript%3E%22/lxc/9000/clone"
        self.proxy.clone("201", path=path)
        page, data = self.page("/"), self.page("/status.json")
        self.assertEqual(data.get("content-type"), b"application/json")
        self.assertIn('<script>"', json.loads(data.body)["history"][0]["node"])
        self.assertNotIn(b"<script>&", page.body)
        policy = page.get("content-security-policy") or b""
        script = re.search(rb"<script>(.*?)</script>", page.body, re.DOTALL)
        assert script
        digest = base64.b64encode(hashlib.sha256(script[1]).digest())
        self.assertIn(b"default-src 'none'; script-src 'sha256-" + digest + b"'", policy)
        self.assertNotIn(b"innerHTML", script[1])
        self.assertNotRegex(page.body, rb"(src|href)=\"(?!data:)")

    def test_metrics(self) -> None:
        self.proxy.clone(201)
        self.proxy.clone(202, source=777)
        self.proxy.get("/")
        # A request is counted when the last byte of its answer is on its way.
        text = wait_until(lambda: 'status="2xx"} 1' in (page := self.page("/metrics").body.decode()) and page)
        for line in ['pve_clone_queue_clones_total{outcome="completed"} 1', 'pve_clone_queue_clones_total{outcome="failed"} 1',
                     "pve_clone_queue_queued 0", "pve_clone_queue_running 0", "pve_clone_queue_wait_seconds_count 2",
                     'pve_clone_queue_relayed_requests_total{status="2xx"} 1']:  # fmt: skip
            self.assertIn(line + "\n", text)
        for line in text.splitlines():
            self.assertRegex(line, r"^(# (HELP|TYPE) \w+ .+|\w+(\{\w+=\"[\w.]+\"\})? [0-9.e-]+)$")

    def test_health(self) -> None:
        self.assertEqual((self.page("/healthz").status, self.page("/healthz").body), (200, b"ok\n"))
        self.pve.server.server_close()
        answer = wait_until(lambda: (page := self.page("/healthz")).status == 503 and page)
        self.assertIn(b"can't be reached", answer.body)

    def test_its_readers_cost_the_api_nothing(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(program.MAX_STATUS_CONNECTIONS + 4):
                stack.enter_context(Wire.to(status_port(self.proxy))).send(b"GET / HT")
            wait_until(lambda: self.proxy.threads() >= program.MAX_STATUS_CONNECTIONS)
            with Wire.to(status_port(self.proxy)) as wire:
                self.assertTrue(wire.closed(), "one too many")
            self.assertEqual(self.proxy.get("/").status, 200)
        wait_until(lambda: self.proxy.threads() < program.MAX_STATUS_CONNECTIONS)
        self.assertEqual(self.page("/").status, 200)

    def test_other_requests(self) -> None:
        self.assertEqual(self.page("/nothing").status, 404)
        self.assertEqual(self.page("/", "DELETE").status, 501)
        self.assertGreater(int(self.page("/", "HEAD").get("content-length") or 0), 1000)


class Listening(unittest.TestCase):
    """With TLS of the proxy's own."""

    def setUp(self) -> None:
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.cert, self.key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
        self.install(OLD_CERT, OLD_KEY)

    def install(self, cert: str, key: str) -> None:
        for path, text in ((self.cert, cert), (self.key, key)):
            with open(path, "w") as file:
                file.write(text)

    def proxy(self, backend: str, *flags: str) -> Proxy:
        return self.enterContext(Proxy(backend, "-tls-cert", self.cert, "-tls-key", self.key, *flags))

    def test_everything_works_over_tls(self) -> None:
        size = 30 << 20
        with FakePVE(clone_seconds=ENDLESS) as pve:
            proxy = self.proxy(pve.url)
            with proxy.wire() as wire:
                self.assertEqual([wire.ask(GET).status for _ in range(3)], [200] * 3)
            head = f"POST /api2/json/nodes/pve/storage/local/upload HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n\r\n"
            self.assertEqual(proxy.ask(head.encode() + bytes(size)).status, 200)
            download = proxy.get(f"/api2/json/nodes/pve/download?bytes={size}", f"Authorization: {TOKEN}")
            self.assertEqual(len(download.body), size)
            with proxy.wire() as wire:
                wire.send(UPGRADE)
                self.assertEqual(wire.head().status, 101)
                self.assertEqual(wire.exactly(7), b"\x82\x05hello")
                for _ in range(80):  # to and fro, since a TLS socket can't be used by two threads at once
                    wire.send(bytes(65536))
                    self.assertEqual(wire.exactly(65536), bytes(65536))
            first, leaver = queue_up(proxy, clone_request(201), clone_request(202))
            leaver.close()
            proxy.wait_log("CLONE ABANDONED")
            finish(pve, first)
            self.assertEqual(len(pve.clones), 1)

    def test_an_answer_that_breaks_off_has_no_clean_end(self) -> None:
        go_on = threading.Event()

        def script(wire: Wire) -> None:
            wire.head()
            wire.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
            go_on.wait(LONG)
            wire.reset()

        with ScriptedBackend(script) as backend:
            sock = socket.create_connection(("127.0.0.1", self.proxy(backend.url).port), LONG)
            with Wire(client_context().wrap_socket(sock, suppress_ragged_eofs=False)) as wire:
                wire.send(GET)
                wire.until(b"half")
                go_on.set()
                self.assertRaises(OSError, wire.more)

    def test_silent_handshakes_keep_nobody_out(self) -> None:
        with answering(OK) as backend:
            proxy = self.proxy(backend.url)
            for _ in range(program.MAX_CONNECTIONS + 20):
                self.enterContext(socket.create_connection(("127.0.0.1", proxy.port), LONG))
            self.assertEqual([proxy.get("/").status for _ in range(5)], [200] * 5)

    def test_old_versions_are_refused(self) -> None:
        context = client_context()
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with answering(OK) as backend, Wire.to(self.proxy(backend.url).port) as wire:
            self.assertRaisesRegex(ssl.SSLError, "PROTOCOL_VERSION", context.wrap_socket, wire.sock)

    def test_sighup_is_ignored(self) -> None:
        with answering(OK) as backend:
            proxy = self.proxy(backend.url)
            with proxy.wire() as kept:
                kept.ask(GET)
                self.install("nonsense", "nonsense")
                for _ in range(2):
                    proxy.process.send_signal(signal.SIGHUP)
                    wait_until(lambda: not int(proxy.status("ShdPnd"), 16), "the signal to be taken")
                    served = ssl.get_server_certificate(("127.0.0.1", proxy.port))
                    self.assertEqual(ssl.PEM_cert_to_DER_cert(served), ssl.PEM_cert_to_DER_cert(OLD_CERT))
                    self.assertEqual(kept.ask(GET).status, 200)
            self.assertEqual(proxy.stop(), 0)


class ServiceManager(unittest.TestCase):
    """What systemd would hear and do."""

    def setUp(self) -> None:
        self.path = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), "notify")
        self.notify = self.enterContext(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.notify.bind(self.path)
        self.notify.settimeout(LONG)
        self.kept: list[int] = []
        self.pve = self.enterContext(FakePVE(clone_seconds=ENDLESS))

    def proxy(self, constants: str = "") -> Proxy:
        return Proxy(self.pve.url, env={"NOTIFY_SOCKET": self.path}, constants=constants)

    def hear(self, pattern: str) -> str:
        """The next message that matches; the descriptors that came with those so far are kept."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.notify, 4096, 4)
            for fd in fds:
                self.addCleanup(os.close, fd)
            self.kept += fds
            if re.search(pattern, data.decode()):
                return data.decode()

    def test_it_is_told_and_keeps_the_listening_socket(self) -> None:
        with self.proxy() as proxy:
            self.assertEqual(self.hear("FDSTORE"), "FDSTORE=1\nFDNAME=listen")
            self.hear("READY=1")
            evil = "/api2/json/nodes/x%0AWATCHDOG=trigger%0Ay/lxc/9001/clone"
            forged = queue_up(proxy, clone_request(203, path=evil))[0]
            self.assertNotIn("\n", self.hear("WATCHDOG"))
            finish(self.pve, forged, then=ENDLESS)
            self.hear("STATUS=idle, 0 waiting; 1 done, 0 failed")
            first, second = queue_up(proxy, clone_request(201), clone_request(202))
            self.hear(r"STATUS=cloning pve/9000 for \d+\.\ds, 1 waiting; 1 done, 0 failed")
            proxy.process.terminate()
            self.hear("STOPPING=1")
            self.assertEqual(second.message().status, 503)
            finish(self.pve, first)
        # A connection made while nobody runs waits in the backlog of the kept socket.
        with Wire.to(proxy.port) as wire:
            wire.send(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            process, _ = start_program(self, self.pve.url, "-listen", f"127.0.0.1:{proxy.port}", keep=self.kept[0])
            self.assertEqual(wire.message().status, 200)
            process.terminate()
            self.assertEqual(process.wait(LONG), 0)

    def test_the_status_line_is_made_from_counts(self) -> None:
        with self.proxy("program.CloneQueue.facts = program.CloneQueue.snapshot = None") as proxy:
            wires = queue_up(proxy, clone_request(201), clone_request(202))
            self.hear("STATUS=cloning pve/9000 for .*, 1 waiting")
            finish(self.pve, *wires)

    @unittest.skipUnless(socket.has_dualstack_ipv6(), "no IPv6 here")
    def test_every_change_of_the_address_takes_effect(self) -> None:
        everywhere = ("::1", "127.0.0.1")
        with answering(OK) as backend:
            for before, listen, hosts, not_hosts in [
                ("0.0.0.0", ":{}", everywhere, ()),
                ("::", ":{}", everywhere, ()),
                ("::", "0.0.0.0:{}", ("127.0.0.1",), ("::1",)),
                ("127.0.0.1", ":{}", everywhere, ()),
                ("0.0.0.0", "127.0.0.1:{}", ("127.0.0.1",), ("127.0.0.2",)),
                ("127.0.0.1", "[::1]:{}", ("::1",), ("127.0.0.1",)),
            ]:
                with self.subTest(before=before, listen=listen):
                    # A port that is free there may be used elsewhere.
                    moved = any(self.moves(before, listen, hosts, not_hosts, backend.url) for attempt in range(5))
                    self.assertTrue(moved, "always in use")

    def moves(self, before: str, listen: str, hosts: tuple[str, ...], not_hosts: tuple[str, ...], backend: str) -> bool:
        """See that a restart ends with listening on these addresses and not on those; False if the port is in use."""
        family = socket.AF_INET6 if ":" in before else socket.AF_INET
        with socket.create_server((before, 0), family=family, dualstack_ipv6=before == "::") as kept:
            port = kept.getsockname()[1]
            process, line = start_program(self, backend, "-listen", listen.format(port), keep=kept.fileno())
            if b"Address already in use" in line:
                return False
            self.assertIn(b"LISTENING: ", line)
            for host in hosts:
                with Wire(socket.create_connection((host, port), LONG)) as wire:
                    self.assertEqual(wire.ask(GET).status, 200)
            for host in not_hosts:
                self.assertRaises(ConnectionRefusedError, socket.create_connection, (host, port), LONG)
            process.terminate()
            self.assertEqual(process.wait(LONG), 0)
            return True


# Nothing gets past the queue


class Smuggling(unittest.TestCase):
    """PVE takes what stands behind its limits on a head for another request."""

    CALL = "X-a: POST /api2/json/nodes/pve/lxc/9000/clone?newid=953 HTTP/1.1\r\n"
    FIELDS = f"Host: h\r\nAuthorization: {TOKEN}\r\n"  # with the proxy's X-Forwarded-For three

    def test_no_number_and_no_length_of_lines_smuggles_a_clone(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url) as proxy:

            def status_of(rest: str) -> int:
                self.assertEqual(proxy.get("/").status, 200)  # leaves a used connection to PVE behind
                return proxy.ask(f"GET / HTTP/1.1\r\n{rest}{self.CALL}\r\n".encode()).status

            statuses = [status_of(f"Host: h\r\n{padding(count)}") for count in range(50, 70)]
            self.assertEqual(statuses, [200] * 8 + [431] * 12, "60 lines, the proxy's own field among them")
            self.assertEqual(pve.requests, 28)
            others = len(f"X: \r\n{self.FIELDS}{self.CALL}X-Forwarded-For: 127.0.0.1\r\n")
            statuses = [status_of(f"X: {'x' * (size - others)}\r\n{self.FIELDS}") for size in (7680, 7681, 8150, 8191, 8300, 20000)]
            self.assertEqual(statuses, [200] + [431] * 5)
            self.assertEqual(pve.clones, [])

    def test_on_every_way_to_pve(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url, "-reserve-nextid", "1m") as proxy:
            for name, line, rest, most in [
                ("a GET", "GET /api2/json/version", "", 57),
                ("an upload", "POST /api2/json/nodes/pve/storage/local/upload", "Content-Length: 1\r\n\r\nx", 56),
                ("a chunked body", "POST /api2/json/x", "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", 56),
                ("an upgrade", "GET /api2/json/nodes/pve/x/vncwebsocket", UPGRADE.decode().partition("\r\n")[2][9:], 52),
                ("a free VMID", "GET /api2/json/cluster/nextid", "", 57),
                ("a clone", "POST /api2/json/nodes/pve/lxc/9000/clone", "Content-Length: 9\r\n\r\nnewid=201", 56),
                ("a clone without a length", "POST /api2/json/nodes/pve/lxc/9001/clone?newid=202", "", 56),
            ]:
                for count in (most, most + 1):
                    with self.subTest(name, fields=count):
                        asked = pve.requests
                        head = f"{line} HTTP/1.1\r\n{self.FIELDS}{padding(count)}{rest}"
                        with proxy.wire() as wire:
                            wire.send((head if "\r\n\r\n" in rest else head + "\r\n").encode())
                            answer = wire.head()
                        self.assertEqual(answer.status == 431, count > most, answer.first)
                        self.assertEqual(pve.requests == asked, count > most, "nothing may go to PVE")
            self.assertEqual([record.status for record in pve.clones], [200, 200])
            proxy.wait_log(r"CLONE REFUSED: node=pve vmid=9000 newid=- status=431 ")

    def test_login_checks_and_polls_are_no_way_either(self) -> None:
        # The backend's own name, longer than the one that the client gave, makes them longer than the clone.
        with FakePVE(tls="") as pve, Proxy(pve.url) as proxy:
            rest = f"{self.FIELDS}Content-Length: 9\r\nX-Forwarded-For: 127.0.0.1\r\n"
            cookie = f"Cookie: {'x' * (7680 - len(rest) - 10)}\r\n"
            answer = proxy.ask(f"POST /api2/json/nodes/pve/lxc/9000/clone HTTP/1.1\r\n{cookie}{rest}\r\nnewid=201".encode())
            self.assertIn(answer.status, (200, 431))
            self.assertEqual((len(pve.clones), pve.overlaps), (1 if answer.status == 200 else 0, 0))
            self.assertEqual(proxy.clone(202).status, 200, "the worker goes on at once")

    def test_what_is_not_sent_to_pve_does_not_count(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url) as proxy:
            hop_by_hop = "".join(f"X-{number}: {'x' * 200}\r\n" for number in range(90))
            names = ", ".join(f"x-{number}" for number in range(90))
            answer = proxy.ask(f"GET / HTTP/1.1\r\nHost: h\r\n{hop_by_hop}Connection: {names}, close\r\n\r\n".encode())
            self.assertEqual(answer.status, 200)


class Formats(unittest.TestCase):
    def test_formats_that_nobody_needs_do_not_clone(self) -> None:
        formats = ("html", "htmljs", "png", "spiceconfig", "text", "%68tml", "/html", "JSON", "json2")
        with FakePVE() as pve, Proxy(pve.url, "-qemu") as proxy:
            for format_, guest in itertools.product(formats, (f"{CT}/9000", f"{VM}/8000")):
                with self.subTest(format_, guest=guest):
                    answer = proxy.clone(201, path=f"/api2/{format_}/nodes/pve/{guest}/clone")
                    self.assertEqual(answer.status, 501)
                    self.assertIn(b"/api2/json/", answer.first)
                    self.assertIn("/api2/json/", json.loads(answer.body)["message"])
            self.assertEqual((pve.requests, pve.clones), (0, []))

    def test_the_guis_format_and_all_else_in_these_formats_are_relayed(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            answer = proxy.clone(201, path="/api2/extjs/nodes/pve/lxc/9000/clone")
            self.assertEqual((answer.status, json.loads(answer.body)["success"]), (200, 1))
            answer = proxy.get("/api2/html/nodes/pve/lxc", f"Authorization: {TOKEN}")
            self.assertEqual((answer.status, answer.get("content-type")), (200, b"text/html;charset=UTF-8"))
            self.assertEqual(proxy.clone(202, path="/api2/html/nodes/pve/qemu/8000/clone").status, 200, "VMs are not queued")
            self.assertEqual(proxy.lines("CLONE"), [])

    def test_a_ticket_without_its_csrf_token_is_relayed(self) -> None:
        cookie = "Cookie: PVEAuthCookie=PVE:root@pam:good\r\n"
        request = clone_request(201, extra=cookie).replace(f"Authorization: {TOKEN}\r\n".encode(), b"")
        with FakePVE(auth_delay=ENDLESS) as pve, Proxy(pve.url) as proxy:
            wires = bring(proxy, *[request] * 3)
            wait_until(lambda: pve.requests == 3, "the calls at PVE, and no login check")
            self.assertEqual(proxy.clone(202).status, 200, "PVE's delay holds up nobody")
            pve.hanging.set()
            for wire in wires:
                self.assertEqual(wire.message().first, b"HTTP/1.1 401 Permission denied - invalid csrf token")
            proxy.wait_log("CLONE COMPLETE")
            self.assertEqual(len(proxy.lines("CLONE QUEUED")), 1)
            with_csrf = request.replace(b"Cookie:", b"CSRFPreventionToken: token\r\nCookie:").replace(b"201", b"203")
            self.assertEqual(proxy.ask(with_csrf).status, 200)
            proxy.wait_log("CLONE QUEUED", 2)
            self.assertEqual([record.newid for record in pve.clones], ["202", "203"])


class Parameters(unittest.TestCase):
    """`newid` is read as PVE reads it."""

    # Queries and bodies (JSON where there are braces) that PVE reads as 904, and those that it refuses.
    READ: ClassVar = [
        ("", "newid=904"), ("newid=904", ""), ("newid=904", "newid=905"), ("newid=904", '{"newid": 905}'),
        ("full=1;newid=904", "newid=905"), ("", "full=1;newid=904"), ("", "full=1&newid=904;x"), ("", "newid=904=5"),
        ("newid=904=5", "newid=905"), ("", "newid=0904"), ("newid=000904", ""), ("", "n%65wid=%39%304"), ("%6eewid=904", ""),
        ("", '{"newid": 904}'), ("", ' {"newid": "904"}'), ("", '{"newid": "0904", "full": true}'),
        ("newid=904", "newid=905&newid=906"), ("newid", "newid=904"), ("", "newid&newid=904"),
    ]  # fmt: skip
    REFUSED: ClassVar = [
        ("", "newid=904&newid=904"), ("newid=904&newid=905", ""), ("newid=904;newid=905", "newid=906"),
        ("", '{"newid": [904]}'), ("", "newid="), ("", "newid"), ("newid=", "newid=904"), ("", "newid=+904"),
        ("", "newid=9x4"), ("", "newid=%D9%A3%D9%A3%D9%A3"), ("", "xnewid=904"), ("", ""),
    ]  # fmt: skip

    def test_the_proxy_and_the_simulated_pve_read_alike(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url) as proxy:
            for query, body in self.READ + self.REFUSED:
                newid = "904" if (query, body) in self.READ else ""
                with self.subTest(query=query, body=body):
                    self.assertEqual(program.newid_of(query, body.encode()), newid)
                    kind = "application/json" if "{" in body else "application/x-www-form-urlencoded"
                    request = (
                        f"POST /api2/json/nodes/pve/lxc/9000/clone{query and '?'}{query} HTTP/1.1\r\nHost: h\r\n"
                        f"Authorization: {TOKEN}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                    )
                    queued = len(proxy.lines("CLONE QUEUED"))
                    status = proxy.ask(request.encode()).status
                    self.assertEqual((pve.clones[-1].newid, status == 200), (newid, newid != ""))
                    self.assertIn(f" newid={newid or '-'} ", proxy.wait_log("CLONE QUEUED: .*", queued + 1)[0])
                    if newid:
                        pve.destroy(newid)


def data_answer(data: object) -> bytes:
    """PVE's answer with these data."""
    body = json.dumps({"data": data}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class UserNames(unittest.TestCase):
    """PVE lets users have almost any name, and names are a part of UPIDs."""

    def test_tasks_of_users_with_odd_names_are_polled(self) -> None:
        users = ["o?d%d#@pve", "100%25@pve", "a;b=c&d+e@pve", "[x]\"'<>\\|^`{}@pve", "~!@$*(),@pve", "plain@pve"]
        with FakePVE(tls="", clone_seconds=0.15) as pve, Proxy(pve.url) as proxy:
            pve.remote = True
            pve.privileged.clear()
            answers = at_once(len(users), lambda index: proxy.clone(201 + index, token=f"PVEAPIToken={users[index]}!ci=secret"))
            self.assertEqual([answer.status for answer in answers], [200] * len(users))
            self.assertEqual((pve.most_at_once, proxy.lines("TASK POLL ERROR|CLONE ERROR")), (1, []))
            self.assertEqual({task.user for task in pve.tasks.values()}, {f"{user}!ci" for user in users})

    def test_every_printable_upid_is_polled_percent_encoded(self) -> None:
        for upid, encoded in [
            ("UPID:", b"UPID%3A"),
            ("UPID:pve2:a%2fb?c#d:", b"UPID%3Apve2%3Aa%252fb%3Fc%23d%3A"),
            ("UPID:%2e%2e", b"UPID%3A%252e%252e"),
        ]:
            answers = map(data_answer, ({}, upid, {"status": "stopped", "exitstatus": "OK"}))
            with self.subTest(upid), answering(*answers) as backend, Proxy(backend.url) as proxy:
                self.assertEqual(json.loads(proxy.clone(201).body)["data"], upid)
                _, _, poll = backend.requests
                self.assertIn(b"/tasks/" + encoded + b"/status ", poll.first)
                proxy.wait_log("CLONE COMPLETE")


# PVE that is away, and sources that are locked


QUICKLY_STUCK = "program.STUCK_PAUSE = 0.05"  # how far apart the tries are that tell a stuck source
NODE_AWAY = b"HTTP/1.1 595 Connection refused\r\nContent-Length: 0\r\n\r\n"


class PveAway(unittest.TestCase):
    def with_the_end_of_a_task(self, pve: FakePVE, call: Callable[[], None]) -> None:
        """Call this right before the answer that a task has ended, which the next clone follows."""
        task_status, calls = pve.task_status, [call]

        def last_answer(upid: str, user: str) -> dict[str, object]:
            status = task_status(upid, user)
            if status["status"] == "stopped" and calls:
                calls.pop()()
            return status

        self.enterContext(unittest.mock.patch.object(pve, "task_status", last_answer))

    def test_clones_wait_until_pve_is_back(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, *WITH_STATUS) as proxy:
            first, *waiting = queue_up(proxy, *(clone_request(201 + index, 9000 + index % 2) for index in range(6)))
            self.with_the_end_of_a_task(pve, pve.go_away)
            finish(pve, first)
            proxy.wait_log("CLONE LOCKED: node=pve vmid=9001 newid=202: .*Connection refused")
            wait_until(lambda: metric_of(proxy, "lock_retries_total") >= 3, "more tries")
            self.assertEqual([job["stage"] for job in snapshot_of(proxy)["waiting"]], ["away"] * 5)
            self.assertEqual(len(proxy.lines("CLONE START")), 2, "the others wait behind it")
            waiting += bring(proxy, clone_request(207, 9002))
            pve.come_back()
            expect_cloned(*waiting)
            self.assertEqual([record.newid for record in pve.clones], ["201", "202", "203", "204", "205", "206", "207"])
            self.assertEqual(pve.most_at_once, 1)
            proxy.wait_log("CLONE COMPLETE: .* newid=202 tries=[0-9]+$")

    def test_a_restart_in_mid_task_costs_nothing(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            wires = queue_up(proxy, *map(clone_request, (201, 202, 203)))
            pve.wait_for_clones(1)
            pve.go_away()
            pve.finish()
            proxy.wait_log("TASK POLL ERROR: .*Connection refused")
            pve.come_back()
            expect_cloned(*wires)
            self.assertEqual((len(pve.clones), pve.most_at_once), (3, 1))

    def test_after_the_lock_timeout_all_get_502(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, "-lock-timeout", "600ms") as proxy:
            first, *waiting = queue_up(proxy, *(clone_request(201 + index, 9000 + index % 2) for index in range(4)))
            self.with_the_end_of_a_task(pve, pve.go_away)
            begin = time.monotonic()
            finish(pve, first)
            answers = [wire.message() for wire in waiting]
            self.assertGreater(time.monotonic() - begin, 0.6)
            for answer in answers:
                self.assertEqual(answer.status, 502)
                self.assertIn("Connection refused", json.loads(answer.body)["message"])
                self.assertNotIn("unknown", json.loads(answer.body)["message"], "nothing was sent")
            proxy.wait_log("CLONE FAILED", 3)
            self.assertEqual(len(proxy.lines("CLONE START")), 2)
            pve.come_back()

    def test_the_login_check_waits_too(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            pve.go_away()
            leaver, *wires = bring(proxy, *map(clone_request, (201, 202, 203)))
            leaver.close()
            proxy.wait_log("CLONE DROPPED: .*its client left before it was queued")
            self.assertEqual(proxy.lines("CLONE QUEUED"), [])
            pve.come_back()
            expect_cloned(*wires)
            self.assertEqual(len(pve.clones), 2)

    def test_the_login_check_ends_with_the_lock_timeout_and_at_a_shutdown(self) -> None:
        with socket.socket() as deaf:  # bound, so that nobody else gets the port, and not listening
            deaf.bind(("127.0.0.1", 0))
            backend = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            for timeout in ("0", "300ms"):
                with self.subTest(timeout), Proxy(backend, "-lock-timeout", timeout) as proxy:
                    answer = proxy.clone(201)
                    self.assertEqual(answer.status, 502)
                    self.assertIn("Connection refused", json.loads(answer.body)["message"])
        with answering(NODE_AWAY) as pveproxy, Proxy(pveproxy.url) as proxy, proxy.wire() as wire:
            wire.send(clone_request(201))
            wait_until(pveproxy.asked, "the login check")
            proxy.process.terminate()
            expect_shutting_down(wire)
            wire.close()
            self.assertEqual(proxy.stop(0), 0)

    def test_connections_that_are_not_accepted_count_as_away(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as fillers:
            for _ in range(4):
                filler = fillers.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            backend = f"http://127.0.0.1:{full.getsockname()[1]}"
            with Proxy(backend, "-request-timeout", "100ms", "-lock-timeout", "500ms") as proxy:
                begin = time.monotonic()
                answer = proxy.clone(201)
                self.assertGreater(time.monotonic() - begin, 0.5)
                self.assertIn("did not accept a connection", json.loads(answer.body)["message"])

    def test_595_is_waited_for_by_that_node_alone(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            other = clone_request(204, path="/api2/json/nodes/pve2/lxc/9002/clone")
            wires = queue_up(proxy, *(clone_request(201 + index, 9000 + index % 2) for index in range(3)), other)
            pve.wait_for_clones(1)
            pve.clone_faults.append("595 Connection refused")
            finish(pve, *wires)
            self.assertEqual([record.newid for record in pve.clones], ["201", "202", "204", "202", "203"])
            proxy.wait_log("CLONE LOCKED: node=pve vmid=9001 newid=202: Connection refused")

    def test_after_the_lock_timeout_595_is_pves_own(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, "-lock-timeout", "400ms") as proxy:
            pve.daemon_away = True
            answers = at_once(3, lambda index: proxy.clone(201 + index))
            self.assertEqual([answer.first for answer in answers], [b"HTTP/1.1 595 Connection refused"] * 3)
            self.assertEqual(pve.tasks, {})

    def test_a_595_to_the_login_check_is_waited_for(self) -> None:
        with answering(NODE_AWAY, NODE_AWAY, OK) as pveproxy, Proxy(pveproxy.url) as proxy:
            self.assertEqual(proxy.clone(201).body, b"ok")
            self.assertEqual([b"version" in request.first for request in pveproxy.requests], [True, True, True, False])
        with answering(NODE_AWAY) as pveproxy, Proxy(pveproxy.url, "-lock-timeout", "300ms") as proxy:
            self.assertEqual(proxy.clone(201).first, b"HTTP/1.1 595 Connection refused")
            self.assertGreater(len(pveproxy.requests), 1)
            self.assertTrue(all(b"version" in request.first for request in pveproxy.requests))

    def test_what_a_moment_does_not_change_is_an_error_at_once(self) -> None:
        with FakePVE() as pve:
            for backend, flags in [
                (pve.url, ("-insecure=false", "-ca", pem_file(OLD_CA))),
                (f"http://{'x' * 64}.invalid:1", ()),
            ]:
                with self.subTest(backend), Proxy(backend, "-lock-timeout", "1h", *flags) as proxy:
                    answer = proxy.clone(201)
                    self.assertEqual((answer.status, proxy.lines("CLONE LOCKED")), (502, []))
                    self.assertIn("can't be reached", json.loads(answer.body)["message"])
            self.assertEqual(pve.clones, [])

    def test_nor_is_it_waited_for_in_the_queue(self) -> None:
        with FakePVE(tls="old", clone_seconds=ENDLESS) as pve:
            with Proxy(pve.url, "-insecure=false", "-ca", pem_file(OLD_CA)) as proxy:
                wires = queue_up(proxy, clone_request(201), clone_request(202))
                pve.wait_for_clones(1)
                self.with_the_end_of_a_task(pve, lambda: setattr(pve, "context", server_context("new")))
                pve.finish()
                self.assertEqual([wire.message().status for wire in wires], [200, 502])
                self.assertEqual((proxy.lines("CLONE LOCKED"), len(pve.clones)), ([], 1))


class LockTimes(unittest.TestCase):
    def test_when_the_time_is_over_all_that_wait_for_a_source_get_pves_refusal_together(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url, "-lock-timeout", "600ms", constants=QUICKLY_STUCK) as proxy:
            pve.locks["9000"], pve.post_seconds = "snapshot", LONG
            wires = queue_up(proxy, *map(clone_request, range(201, 209)))
            begin = time.monotonic()
            pve.hanging.set()  # only now PVE says locked, and the time of all begins
            answers = [wire.message() for wire in wires]
            self.assertGreater(time.monotonic() - begin, 0.6)
            self.assertEqual({answer.first for answer in answers}, {b"HTTP/1.1 500 CT is locked (snapshot)"})
            messages = [json.loads(answer.body)["message"] for answer in answers]
            self.assertEqual(messages, ["CT is locked (snapshot)\n"] + ["CT is locked (snapshot)"] * 7, "one is PVE's own")
            self.assertEqual({record.newid for record in pve.clones}, {"201"}, "the others need no try of their own")
            self.assertGreater(len(pve.clones), 2)
            self.assertGreater(pve.clones[-1].at - pve.clones[0].at, 0.6, "one more try at the end")
            proxy.wait_log("CLONE FAILED: .*CT is locked", 8)

    def test_each_has_its_time_from_its_arrival(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url, "-lock-timeout", "1500ms", constants=QUICKLY_STUCK) as proxy:
            pve.locks["9000"] = "backup"
            first = queue_up(proxy, clone_request(201))[0]
            pve.wait_for_clones(4)
            begin = time.monotonic()
            second = queue_up(proxy, clone_request(202))[0]
            self.assertEqual(first.message().status, 500)
            is_alone = time.monotonic() - begin < 1.5
            if is_alone:
                self.assertEqual(proxy.lines("CLONE FAILED: .*newid=202"), [])
            self.assertEqual(second.message().status, 500)
            self.assertGreater(time.monotonic() - begin, 1.5)
            if is_alone:
                self.assertIn("202", [record.newid for record in pve.clones], "it was the first then")

    def test_the_time_behind_another_clone_does_not_count(self) -> None:
        with FakePVE(tls="", clone_seconds=ENDLESS) as pve, Proxy(pve.url, "-lock-timeout", "700ms") as proxy:
            pve.locks["9001"] = "backup"
            first, second = queue_up(proxy, clone_request(201), clone_request(202, 9001))
            pve.wait_for_clones(1)
            time_over = time.monotonic() + 0.8
            wait_until(lambda: time.monotonic() > time_over)
            finish(pve, first)
            pve.wait_for_clones(4)
            pve.unlock("9001")
            self.assertEqual(second.message().status, 200, "it was first found locked just now")

    def test_the_pauses_grow_to_half_a_second(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url) as proxy:
            pve.locks["9000"] = "backup"
            bring(proxy, clone_request(201))
            pve.wait_for_clones(8)
            times = [record.at for record in pve.clones]
            pauses = sorted(after - before for before, after in itertools.pairwise(times))
            self.assertGreater(pauses[0], 0.15)
            self.assertLess(pauses[len(pauses) // 2], 0.8)

    def test_waiting_for_a_lock_is_no_cloning_and_told_of_once(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url, *WITH_STATUS) as proxy:
            pve.locks["9000"] = "backup"
            wires = queue_up(proxy, clone_request(201), clone_request(202))
            pve.wait_for_clones(5)
            with pve.lock:
                tries, held = len(pve.clones) + 1, pve.clones[-1].at - pve.clones[0].at
                del pve.locks["9000"]
            expect_cloned(*wires)
            status = snapshot_with(proxy, "completed", 2)
            tasks = sum(task.seconds for task in pve.tasks.values())
            self.assertEqual(status["totals"]["clone_seconds_count"], 2)
            self.assertGreater(status["totals"]["wait_seconds_sum"], 2 * held - 0.5)
            for job in status["history"]:
                self.assertGreater(job["waited_seconds"], held - 0.5)
                self.assertLess(job["clone_seconds"], held)
            self.assertGreaterEqual(status["totals"]["clone_seconds_sum"], tasks - 0.05)
            self.assertLess(status["totals"]["clone_seconds_sum"], tasks + held)
            self.assertEqual(metric_of(proxy, "clone_seconds_count"), 2)
            self.assertEqual(metric_of(proxy, "clone_seconds_sum"), status["totals"]["clone_seconds_sum"])
            proxy.wait_log(rf"CLONE COMPLETE: .* newid=201 tries={tries}$")
            proxy.wait_log("CLONE COMPLETE: .* newid=202$")
            for newid, locked in (("201", 1), ("202", 0)):
                self.assertEqual(len(proxy.lines(f"CLONE START: .*newid={newid}")), 1)
                self.assertEqual(len(proxy.lines(f"CLONE LOCKED: .*newid={newid}: CT is locked")), locked)

    def test_clones_without_a_task_do_not_count(self) -> None:
        flags = ("-lock-timeout", "300ms", *WITH_STATUS)
        with FakePVE(tls="") as pve, Proxy(pve.url, *flags, constants=QUICKLY_STUCK) as proxy:
            pve.locks["9000"] = "backup"
            self.assertEqual([proxy.clone(201).status, proxy.clone(202, 777).status], [500, 500])
            proxy.wait_log(r"CLONE FAILED: .*newid=201 status=.* tries=[0-9]+$")
            status = snapshot_with(proxy, "failed", 2)
            self.assertEqual((status["totals"]["clone_seconds_count"], status["totals"]["clone_seconds_sum"]), (0, 0))
            self.assertEqual([job["clone_seconds"] for job in status["history"]], [0, 0])
            self.assertGreater(status["history"][0]["waited_seconds"], 0.3)
            self.assertEqual(metric_of(proxy, "wait_seconds_count"), 2)


class BusySources(unittest.TestCase):
    """Where others clone the same source, its lock is not stuck."""

    def setUp(self) -> None:
        self.pve = self.enterContext(FakePVE(tls="", clone_seconds=ENDLESS))
        # Looks at the list of tasks: when, whose, of which source, and what it showed.
        self.looks: list[tuple[float, str, object, list[dict[str, object]]]] = []
        self.see = lambda tasks: tasks  # what is shown in place of them
        list_tasks, task_status = self.pve.list_tasks, self.pve.task_status

        def look(user: str, parameters: dict[str, object]) -> list[dict[str, object]]:
            tasks = self.see(list_tasks(user, parameters))
            self.looks.append((time.monotonic(), user, parameters["vmid"], tasks))
            return tasks

        def status(upid: str, user: str) -> dict[str, object]:
            return {"status": "running"} if upid == "UPID:x" else task_status(upid, user)

        self.enterContext(unittest.mock.patch.multiple(self.pve, list_tasks=look, task_status=status))

    def proxy(self, lock_timeout: str, *flags: str, constants: str = QUICKLY_STUCK) -> Proxy:
        return self.enterContext(Proxy(self.pve.url, "-lock-timeout", lock_timeout, *flags, constants=constants))

    def show(self, type_: str, source: str, upid: str = "UPID:x") -> None:
        """Let the list show one task that runs."""
        self.see = lambda tasks: [{"type": type_, "id": source, "status": "RUNNING", "upid": upid}]

    def clone_straight(self, newid: int, source: int = 9000, token: str = TOKEN) -> None:
        """A clone that somebody else starts."""
        with Wire.to(self.pve.port) as wire:
            self.assertEqual(wire.ask(clone_request(newid, source, token)).status, 200)

    def wait_for_looks(self, count: int) -> None:
        wait_until(lambda: len(self.looks) >= count, f"{count} looks at the list of tasks")

    def test_running_clones_of_others_are_waited_for(self) -> None:
        self.clone_straight(201)
        wires = queue_up(self.proxy("150ms"), clone_request(202), clone_request(203))
        self.wait_for_looks(5)
        finish(self.pve, *wires)
        self.assertTrue(all(tasks for *_, tasks in self.looks))

    def test_tasks_that_cannot_be_seen_have_ended_or_are_none_of_the_sources_clones_do_not_count(self) -> None:
        self.pve.privileged.clear()
        self.clone_straight(200, 9001)
        self.pve.finish(ENDLESS)
        ended = next(iter(self.pve.tasks))
        self.clone_straight(201, token=OTHER_TOKEN)
        self.clone_straight(202, 9002)
        self.pve.locks["9001"] = "backup"
        proxy = self.proxy("100ms")
        self.assertEqual(proxy.clone(203).first, b"HTTP/1.1 500 CT is locked (disk)")
        self.assertEqual(proxy.clone(204, 9001).first, b"HTTP/1.1 500 CT is locked (backup)")
        for task in (("vzdump", "9001"), ("vzclone", "9000"), ("vzclone", "9001", ended)):
            self.looks.clear()
            self.show(*task)
            self.assertEqual(proxy.clone(205, 9001).first, b"HTTP/1.1 500 CT is locked (backup)", task)
            self.assertEqual(len(self.looks), 3)

    def test_a_vms_clone_is_asked_for_by_its_own_kind_of_task(self) -> None:
        self.pve.locks["8000"] = "backup"
        self.show("qmclone", "8000")
        proxy = self.proxy("100ms", "-qemu")
        wire = queue_up(proxy, clone_request(201, path="/api2/json/nodes/pve/qemu/8000/clone"))[0]
        self.wait_for_looks(5)
        self.assertEqual(proxy.lines("CLONE FAILED"), [])
        self.see = lambda tasks: []
        self.assertEqual(wire.message().first, b"HTTP/1.1 500 VM is locked (backup)")

    def test_one_look_between_two_clones_is_not_enough(self) -> None:
        self.pve.locks["9000"] = "disk"
        running: dict[str, object] = {"type": "vzclone", "id": "9000", "status": "RUNNING", "upid": "UPID:x"}
        pattern = itertools.cycle([[], [], [running]])
        self.see = lambda tasks: next(pattern)
        wire = queue_up(self.proxy("100ms"), clone_request(201))[0]
        self.wait_for_looks(9)
        with self.pve.lock:
            self.pve.clone_seconds = 0.05
            del self.pve.locks["9000"]
        self.assertEqual(wire.message().status, 200)

    def test_three_tries_spread_over_two_seconds_must_be_in_vain(self) -> None:
        self.pve.locks["9000"] = "disk"
        self.assertEqual(self.proxy("100ms", constants="").clone(201).first, b"HTTP/1.1 500 CT is locked (disk)")
        self.assertEqual(len(self.looks), 3)
        self.assertGreaterEqual(self.looks[-1][0] - self.looks[0][0], 1.9)
        self.assertGreaterEqual(self.pve.clones[-1].at - self.pve.clones[-3].at, 1.9)

    def test_a_list_that_cannot_be_read_shows_nothing(self) -> None:
        self.clone_straight(201)
        faults = {"relay": ""}
        self.pve.random_fault = lambda kind: faults.get(kind, "")
        proxy = self.proxy("100ms")
        for fault in ("403 Permission check failed", "reset", "json:nonsense", 'json:{"data":[1,null,{"type":"vzclone"}]}'):
            with self.subTest(fault):
                faults["relay"] = fault
                self.assertEqual(proxy.clone(202).first, b"HTTP/1.1 500 CT is locked (disk)")

    def test_it_is_asked_with_the_clones_own_credentials_and_only_when_the_time_is_over(self) -> None:
        self.pve.locks["9000"] = "backup"
        wire = queue_up(self.proxy("1s"), clone_request(201, token=OTHER_TOKEN))[0]
        self.pve.wait_for_clones(2)
        self.assertEqual(self.looks, [])
        self.assertEqual(wire.message().status, 500)
        self.assertEqual({(user, vmid) for _, user, vmid, _ in self.looks}, {("root@pam!other", "9000")})

    def test_no_clone_is_lost_before_several_proxies(self) -> None:
        self.pve.clone_seconds = 0.12
        proxies = [self.proxy("800ms", constants="") for _ in range(4)]
        answers = at_once(24, lambda index: proxies[index % 4].clone(201 + index))
        self.assertEqual([answer.status for answer in answers], [200] * 24)
        self.assertEqual((self.pve.overlaps, self.pve.most_at_once), (0, 1))
        self.assertEqual(sum(record.status == 200 for record in self.pve.clones), 24)
        self.assertLessEqual(set(map(str, range(201, 225))), self.pve.guests)


# Many clients, slow ones, and a log that nobody reads


FEW = "program.MAX_CONNECTIONS = 8"


def open_tunnels(proxy: Proxy, count: int) -> list[Wire]:
    """So many upgraded connections."""
    wires = bring(proxy, *[UPGRADE] * count)
    statuses = [wire.head().status for wire in wires]
    if statuses != [101] * count:
        raise AssertionError(f"not all are tunnels: {statuses}")
    return wires


class SlowBodies(unittest.TestCase):
    """Who drips a body must make room, but nobody else."""

    DRIPPING = b"POST /api2/json/access/ticket HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\nx"
    QUICKLY_SLOW = f"{FEW}; program.SLOW_SECONDS = 0.5"

    def keep_sending(self, wires: list[Wire], data: bytes) -> None:
        """Go on sending that on these connections, each as long as it goes."""
        stop = threading.Event()

        def send(wire: Wire) -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.02):
                    wire.send(data)

        for wire in wires:
            sender = threading.Thread(target=send, args=(wire,))
            sender.start()
            self.addCleanup(sender.join)
        self.addCleanup(stop.set)

    def let_in(self, proxy: Proxy, request: bytes) -> Wire:
        """A newcomer, which comes again as long as there is no room for it."""

        def come() -> Wire | None:
            wire = bring(proxy, request)[0]
            if wire.head().status != 503:
                return wire
            wire.close()
            return None

        return wait_until(come, "room")  # type: ignore[no-any-return]

    def test_they_do_not_keep_everybody_out(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, *WITH_STATUS, constants=self.QUICKLY_SLOW) as proxy:
            wires = bring(proxy, *[self.DRIPPING] * 8)
            self.keep_sending(wires, b"x")
            wait_until(lambda: len(pve.connections) == 8, "the bodies at PVE")
            wait_until(lambda: proxy.get("/").status == 200, "room")
            self.assertEqual(sum(is_closed(wire) for wire in wires), 1, "one makes room for one")
            for _ in range(8):
                self.let_in(proxy, UPGRADE)
            self.assertTrue(all(is_closed(wire) for wire in wires))

    def test_nor_do_those_of_clones(self) -> None:
        clone = clone_request(201).replace(b"Content-Length: 9", b"Content-Length: 999")
        with FakePVE() as pve, Proxy(pve.url, constants=self.QUICKLY_SLOW) as proxy:
            wires = bring(proxy, *[clone] * 8)
            wait_until(lambda: pve.requests == 8, "the login checks")
            for _ in range(8):
                self.let_in(proxy, UPGRADE)
            self.assertTrue(all(is_closed(wire) for wire in wires))

    def test_the_slowest_goes_and_moving_uploads_tunnels_and_clones_stay(self) -> None:
        constants = f"{FEW}; program.SLOW_SECONDS = 1.5"
        upload = b"POST /api2/json/nodes/pve/storage/local/upload HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n"
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, *WITH_STATUS, constants=constants) as proxy:
            clones = queue_up(proxy, clone_request(201), clone_request(202))
            pve.wait_for_clones(1)
            tunnels = open_tunnels(proxy, 3)
            dripping = bring(proxy, self.DRIPPING)[0]
            wait_until(lambda: pve.requests - pve.polls == 7, "the drip at PVE, behind two logins, a clone and the tunnels")
            uploads = bring(proxy, *[upload] * 4)
            self.keep_sending(uploads, bytes(4096))
            wait_until(lambda: snapshot_of(proxy)["connections"] == 10, "all of them")
            idle = self.let_in(proxy, GET)
            self.assertTrue(is_closed(dripping))
            self.let_in(proxy, UPGRADE)
            self.assertTrue(is_closed(idle), "idle ones make room too")
            end = time.monotonic() + 2
            while time.monotonic() < end:
                self.assertEqual(proxy.get("/").status, 503, "nobody has to make room any more")
            self.assertFalse(any(is_closed(wire) for wire in uploads + tunnels + clones))
            for wire in uploads:  # a shutdown would wait for them
                wire.close()
            finish(pve, *clones)


def is_closed(wire: Wire) -> bool:
    """Whether the proxy has closed a connection, as far as one can tell without waiting."""
    wire.sock.setblocking(False)
    try:
        while data := wire.sock.recv(65536):
            wire.buffer += data
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        pass
    finally:
        wire.sock.settimeout(LONG)
    return True


class Crowds(unittest.TestCase):
    def test_waiting_clones_leave_room_for_others_and_so_do_idle_ones_that_were_answered(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, *WITH_STATUS, constants=FEW) as proxy:
            wires = queue_up(proxy, *map(clone_request, range(201, 221)))
            self.assertEqual(proxy.get("/").status, 200)
            open_tunnels(proxy, 7)
            wires += queue_up(proxy, clone_request(221), clone_request(222))
            self.assertEqual(proxy.get("/").status, 200)
            finish(pve, *wires, then=0.01)
            self.assertEqual([proxy.get("/").status for _ in range(3)], [200] * 3)
            self.assertEqual(metric_of(proxy, "refused_connections_total"), 0)

    def test_refused_clients_that_go_on_sending_make_room(self) -> None:
        with answering(OK) as backend, Proxy(backend.url, constants=FEW) as proxy:
            bad = b"POST / HTTP/1.1\r\nHost: h h\r\nContent-Length: 100\r\n\r\n"
            for wire in bring(proxy, *[bad] * 8):
                self.assertEqual(wire.message().status, 400)
            self.assertEqual(proxy.get("/").status, 200)

    def test_who_is_refused_is_counted_and_told_of_once(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, *WITH_STATUS, constants=FEW) as proxy:
            tunnels = open_tunnels(proxy, 8)
            for _ in range(5):
                answer = proxy.get("/")
                self.assertEqual((answer.status, answer.get("retry-after")), (503, b"5"))
            self.assertEqual(metric_of(proxy, "refused_connections_total"), 5)
            proxy.wait_log("TOO MANY CONNECTIONS: 8 ")
            self.assertEqual(len(proxy.lines("TOO MANY CONNECTIONS")), 1)
            tunnels[0].close()
            wait_until(lambda: proxy.get("/").status == 200)
            self.assertGreater(pve.requests, 0)

    def test_that_is_told_again_later(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, constants=f"{FEW}; program.CROWD_LINE_SECONDS = 0.05") as proxy:
            open_tunnels(proxy, 8)
            wait_until(lambda: proxy.get("/").status == 503 and len(proxy.lines("TOO MANY CONNECTIONS")) > 2)
            self.assertEqual(len(pve.connections), 8)

    def test_a_newcomer_looks_at_all_waiting_clients_at_once(self) -> None:
        clones, poll = program.CloneQueue(program.parse_flags(["-queue-size", "500"])), select.poll
        self.enterContext(unittest.mock.patch.object(program.log, "disabled", True))
        for newid in range(100):
            clones.admit(job_of(self.enterContext(PretendedClient()), newid=newid))
        polls: list[unittest.mock.Mock] = []

        def counting() -> unittest.mock.Mock:
            polls.append(unittest.mock.Mock(wraps=poll()))
            return polls[-1]

        with unittest.mock.patch("select.poll", counting):
            clones.check_room()
            clones.look_around()
        self.assertLessEqual(sum(poller.poll.call_count for poller in polls), 2)


class LogReaders(unittest.TestCase):
    """Nobody reads stderr: a pipe holds 64 KiB, and then writing to it waits."""

    FEW_LINES = "program.LOG_LINES = 100"

    def start(self, backend: str, constants: str = "") -> None:
        """Start the program, whose stderr is read no further than to the line with its port."""
        self.process, line = start_program(self, backend, "-listen", "127.0.0.1:0", "-verbose", prepare=constants)
        self.port = int(re.findall(rb"LISTENING: 127\.0\.0\.1:(\d+)", line)[0])

    def fill(self, count: int = 500) -> None:
        """Have more lines logged than the pipe holds."""
        with Wire.to(self.port) as wire:
            for _ in range(count):
                self.assertEqual(wire.ask(b"GET /%b HTTP/1.1\r\nHost: h\r\n\r\n" % (b"x" * 300)).status, 200)

    def read(self, to_its_end: bool) -> bytes:
        """What has been written to stderr by now, or until the program's end."""
        assert self.process.stderr
        os.set_blocking(self.process.stderr.fileno(), to_its_end)
        return self.process.stderr.read() or b""

    def terminate(self) -> None:
        """Have its shutdown begin."""
        self.process.terminate()
        wait_until(self.refuses_connections, "the shutdown to begin")

    def refuses_connections(self) -> bool:
        try:
            Wire.to(self.port).close()
        except OSError:
            return True
        return False

    def test_requests_clones_and_signals_go_on(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve:
            self.start(pve.url)
            self.fill()
            with Wire.to(self.port) as running, Wire.to(self.port) as waiting:
                running.send(clone_request(201))
                pve.wait_for_clones(1)
                waiting.send(clone_request(202))
                finish(pve, running, then=ENDLESS)
                pve.wait_for_clones(2)
                self.process.terminate()
                finish(pve, waiting)
            begin = time.monotonic()
            self.assertEqual(self.process.wait(LONG), 0)
            self.assertLess(time.monotonic() - begin, LONG / 2)

    def test_what_was_dropped_is_counted_and_said(self) -> None:
        text = b""

        def said() -> bool:
            nonlocal text
            self.fill(1)
            text += self.read(to_its_end=False)
            return b" lines were dropped\n" in text

        with FakePVE(tls="") as pve:
            self.start(pve.url, self.FEW_LINES)
            self.fill()
            wait_until(said, "the line that tells of it")
            self.process.terminate()
            text += self.read(to_its_end=True)
            self.assertEqual(self.process.wait(LONG), 0)
            written, dropped = text.count(b"RELAYED: "), sum(map(int, re.findall(rb"LOG: (\d+) lines were dropped\n", text)))
            self.assertGreater(min(written, dropped), 100)
            self.assertEqual(written + dropped, pve.requests)

    def test_what_is_left_is_written_at_the_end(self) -> None:
        with FakePVE(tls="") as pve:
            self.start(pve.url, "program.LOG_FLUSH_SECONDS = 20.0")
            self.fill()
            self.terminate()
            text = self.read(to_its_end=True)
            self.assertEqual((self.process.wait(LONG), text.count(b"RELAYED: ")), (0, 500))
            self.assertIn(b"shutting down\n", text)

    def test_a_second_signal_ends_it_too(self) -> None:
        with FakePVE(tls="", clone_seconds=ENDLESS) as pve:
            self.start(pve.url, self.FEW_LINES)
            with Wire.to(self.port) as wire:
                wire.send(clone_request(201))
                pve.wait_for_clones(1)
                self.fill()
                self.terminate()
                self.process.terminate()
                self.assertEqual(self.process.wait(LONG), -signal.SIGTERM)


class CutAnswers(unittest.TestCase):
    """An answer that the backend does not bring to its end is seen by who operates the proxy."""

    def test_it_is_logged_and_counted(self) -> None:
        go_on, half = threading.Event(), b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
        answers = {
            b"/whole": OK, b"/closed": half, b"/reset": half, b"/silence": half,
            b"/chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        }  # fmt: skip

        def script(wire: Wire) -> None:
            path = backend.request(wire).first.split()[1].partition(b"?")[0]
            wire.send(answers[path])
            if path == b"/silence":
                go_on.wait(LONG)
            elif path == b"/reset":
                wire.reset()

        with ScriptedBackend(script) as backend, Proxy(backend.url, "-request-timeout", "300ms", *WITH_STATUS) as proxy:
            for number, path in enumerate(("/closed", "/reset", "/chunked", "/silence"), 1):
                with self.subTest(path), proxy.wire() as wire:
                    wire.send(f"GET {path}?secret HTTP/1.1\r\nHost: h\r\n\r\n".encode())
                    self.assertEqual(wire.head().status, 200)
                    self.assertRaises(EOFError, wire.exactly, 1000)
                    proxy.wait_log(rf"RELAY CUT OFF: GET {path}: \S+")
                    self.assertEqual(metric_of(proxy, "backend_errors_total"), number)
            go_on.set()
            self.assertEqual(proxy.get("/whole").status, 200)
            self.assertEqual(metric_of(proxy, "backend_errors_total"), 4)
            self.assertEqual(len(proxy.lines("RELAY CUT OFF")), 4)
            wait_until(lambda: metric_of(proxy, 'relayed_requests_total{status="2xx"}') == 1, "the whole one to be counted")

    def test_clients_that_leave_are_no_errors_of_the_backend(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, *WITH_STATUS) as proxy:
            with proxy.wire() as wire:
                wire.send(f"GET /api2/json/nodes/pve/download?bytes={1 << 30} HTTP/1.1\r\nHost: h\r\n"
                          f"Authorization: {TOKEN}\r\n\r\n".encode())  # fmt: skip
                wire.exactly(1 << 20)
                wire.reset()
            wait_until(lambda: snapshot_of(proxy)["connections"] == 0)
            self.assertEqual((metric_of(proxy, "backend_errors_total"), proxy.lines("RELAY CUT OFF")), (0, []))


# VMIDs that clients choose themselves


PATIENT = "program.RETURN_SECONDS = 3600.0"  # nobody is refused only because nobody came back


def expect_all_cloned(test: unittest.TestCase, pve: FakePVE, choices: list[Choice]) -> None:
    """Each client must have a container of its own."""
    test.assertEqual([choice for choice in choices if choice.status != 200], [])
    test.assertEqual(len({choice.newid for choice in choices}), len(choices))
    test.assertEqual({choice.upid for choice in choices}, set(pve.tasks))
    test.assertEqual((pve.overlaps, pve.most_at_once), (0, 1))


class Bursts(unittest.TestCase):
    def test_by_list_and_by_nextid(self) -> None:
        for (name, choose), count in itertools.product(CHOICES.items(), (8, 20, 40, 100)):
            with self.subTest(name, count=count):
                self.burst(count, choose)

    def burst(self, count: int, choose: Callable[[Chooser], Choice]) -> None:
        """That many clients, all of which have chosen before the first clone ends, get a container within five tries, hardly
        one of which is in vain a second time."""
        with FakePVE(tls="", clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                results = [pool.submit(choose, Chooser(proxy.port)) for _ in range(count)]
                proxy.wait_log("CLONE QUEUED", count)
                pve.finish(0.05 if count < 100 else 0.02)
            choices = [result.result() for result in results]
            expect_all_cloned(self, pve, choices)
            self.assertLessEqual(sum(choice.tries - 1 for choice in choices), 2 * count)
            self.assertLessEqual(len(pve.clones) - count, 2, "who is taken is not sent to PVE")


class MixedBursts(unittest.TestCase):
    def test_arrivals_one_after_the_other(self) -> None:
        with FakePVE(tls="", clone_seconds=0.1) as pve, Proxy(pve.url) as proxy:
            choices, chooser = [], Chooser(proxy.port)
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                for number in range(16):
                    choices.append(pool.submit(chooser.by_list if number % 2 else chooser.by_nextid))
                    proxy.wait_log("CLONE QUEUED", number + 1)
            expect_all_cloned(self, pve, [choice.result() for choice in choices])

    def test_several_sources_and_ways_to_choose(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url) as proxy:
            ways = [Chooser.by_list, Chooser.by_nextid, Chooser.by_probe, Chooser.by_nextid_then_probe]
            choices = at_once(24, lambda index: ways[index % 4](Chooser(proxy.port, source=9000 + index % 3)))
            expect_all_cloned(self, pve, choices)

    def test_a_locked_source(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url) as proxy, concurrent.futures.ThreadPoolExecutor(16) as pool:
            pve.locks["9000"] = "backup"
            choices = [pool.submit(Chooser(proxy.port, source=9000 + index % 2).by_list) for index in range(16)]
            # Those of the other source go on meanwhile.
            wait_until(lambda: sum(choice.done() for choice in choices) == 8, "8 of 16")
            self.assertTrue(all(choice.done() == (index % 2 == 1) for index, choice in enumerate(choices)))
            pve.unlock("9000")
            expect_all_cloned(self, pve, [choice.result() for choice in choices])

    def test_clones_that_fail(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url) as proxy:
            pve.exits.extend(["OK", "clone failed: disk full"] * 6)
            choices = at_once(12, lambda index: Chooser(proxy.port).by_list())
            self.assertEqual([choice.status for choice in choices], [200] * 12)
            self.assertEqual(len({choice.upid for choice in choices}), 12, "PVE accepted each of them")
            self.assertEqual((len(pve.tasks), pve.most_at_once), (12, 1))

    def test_who_never_tries_again_is_answered_soon(self) -> None:
        with FakePVE(tls="") as pve, Proxy(pve.url, constants="program.RETURN_SECONDS = 0.3") as proxy:
            begin = time.monotonic()
            choices = at_once(40, lambda _: Chooser(proxy.port, tries=1).by_list())
            # By ones it would take 12 s, and by ones, twos, fours a seventh of that.
            self.assertLess(time.monotonic() - begin, 7)
            self.assertEqual({choice.status for choice in choices}, {200, 500})
            texts = {f"CT {task.newid} already exists on node 'pve'" for task in pve.tasks.values()}
            self.assertLessEqual({choice.text for choice in choices if choice.status == 500}, texts)
            self.assertEqual(sum(choice.status == 200 for choice in choices), len(pve.tasks))

    def test_as_it_is_shipped_they_are_answered_within_a_few_seconds(self) -> None:
        with FakePVE(tls="", clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
            first, *taken = queue_up(proxy, *[clone_request(201)] * 8)
            begin = time.monotonic()
            answers = {wire.message().first for wire in taken}
            self.assertLess(time.monotonic() - begin, 6, "one, two and four of them, a second apart")
            self.assertEqual(answers, {b"HTTP/1.1 500 CT 201 already exists on node 'pve'"})
            finish(pve, first)
            self.assertEqual(len(pve.clones), 1)


class TakenVmids(unittest.TestCase):
    """What becomes of a clone whose number another one has."""

    TAKEN = b"HTTP/1.1 500 CT 201 already exists on node 'pve'"

    def setUp(self) -> None:
        self.pve = self.enterContext(FakePVE(tls="", clone_seconds=ENDLESS))

    def proxy(self, *flags: str, constants: str = PATIENT) -> Proxy:
        return self.enterContext(Proxy(self.pve.url, *WITH_STATUS, *flags, constants=constants))

    def collide(self, proxy: Proxy, count: int) -> list[Wire]:
        """So many clones of one number, the second of which was refused: the one that runs, and the others."""
        first = queue_up(proxy, clone_request(201))[0]
        self.pve.wait_for_clones(1)
        refused, *taken = queue_up(proxy, *[clone_request(201)] * (count - 1))
        self.expect_taken(refused)
        return [first, *taken]

    def expect_taken(self, *wires: Wire) -> None:
        self.assertEqual([wire.message().first for wire in wires], [self.TAKEN] * len(wires))

    def expect_clones(self, *newids: str) -> None:
        """What PVE has heard of."""
        self.assertEqual([record.newid for record in self.pve.clones], list(newids))

    def stages(self, proxy: Proxy) -> list[tuple[str, str]]:
        """Numbers and stages of those that wait."""
        return [(job["newid"], job["stage"]) for job in snapshot_of(proxy)["waiting"]]

    def test_they_are_refused_one_at_a_time_as_their_clients_come_back_and_keep_their_places_until_then(self) -> None:
        proxy = self.proxy("-queue-size", "3")
        first, third, fourth = self.collide(proxy, 4)
        self.assertEqual(self.stages(proxy), [("201", "taken")] * 2)
        back = queue_up(proxy, clone_request(202))[0]
        self.assertEqual(self.stages(proxy), [("201", "taken")] * 2 + [("202", "waiting")], "it is not accepted yet")
        self.assertEqual(metric_of(proxy, "queued"), 3)
        answer = proxy.clone(203)
        self.assertEqual((answer.status, answer.get("retry-after")), (503, b"10"), "they count as waiting")
        finish(self.pve, first, then=ENDLESS)
        self.expect_taken(third)
        self.assertEqual(self.stages(proxy), [("201", "taken")], "it is now, and runs")
        back_too = queue_up(proxy, clone_request(203))[0]
        finish(self.pve, back, then=ENDLESS)
        self.expect_taken(fourth)
        finish(self.pve, back_too)
        self.expect_clones("201", "202", "203")

    def test_who_is_back_overtakes_those_that_were_there(self) -> None:
        proxy = self.proxy()
        first, other = queue_up(proxy, clone_request(200, 9001), clone_request(202))
        self.pve.wait_for_clones(1)
        ahead, refused, another = queue_up(proxy, *map(clone_request, (201, 201, 203)))
        finish(self.pve, first, then=ENDLESS)
        self.pve.wait_for_clones(2)
        finish(self.pve, other, then=ENDLESS)
        self.expect_taken(refused)
        back = queue_up(proxy, clone_request(204))[0]
        finish(self.pve, ahead, another, back)
        self.expect_clones("200", "202", "201", "204", "203")

    def test_an_arrival_begins_with_one_again(self) -> None:
        proxy = self.proxy(constants="program.RETURN_SECONDS = 1.5")
        first, *taken = queue_up(proxy, *[clone_request(201)] * 7)
        proxy.wait_log("CLONE FAILED", 3)
        back = queue_up(proxy, clone_request(202))[0]
        refused = len(proxy.lines("CLONE FAILED"))
        self.pve.finish()
        proxy.wait_log("CLONE FAILED", refused + 1)
        snapshot_of(proxy)
        self.assertEqual(len(proxy.lines("CLONE FAILED")), refused + 1)
        self.expect_taken(*taken)
        expect_cloned(first, back)

    def test_a_returned_client_that_leaves_ends_or_is_locked_does_not_hold_up_the_rest(self) -> None:
        self.pve.locks["9001"] = "backup"
        proxy = self.proxy("-lock-timeout", "1h")
        first, third, fourth, fifth = self.collide(proxy, 5)
        queue_up(proxy, clone_request(202))[0].close()
        self.expect_taken(third)  # the one that is back left
        locked = queue_up(proxy, clone_request(203, 9001))[0]
        finish(self.pve, first, then=ENDLESS)
        self.expect_taken(fourth)  # its source is locked
        self.assertEqual(proxy.clone(204, 777).status, 500)
        self.expect_taken(fifth)  # PVE refused it
        self.pve.clone_seconds = 0.05
        self.pve.unlock("9001")
        expect_cloned(locked)

    def test_a_returned_client_with_a_taken_number_waits_its_turn(self) -> None:
        proxy = self.proxy(constants="program.RETURN_SECONDS = 0.3")
        first = self.collide(proxy, 2)[0]
        self.expect_taken(*queue_up(proxy, *[clone_request(201)] * 3))
        finish(self.pve, first)

    def test_where_the_first_fails_the_oldest_that_still_waits_gets_the_number(self) -> None:
        self.pve.exits.append("clone failed: disk full")
        proxy = self.proxy()
        first, third, fourth = self.collide(proxy, 4)
        finish(self.pve, first, then=ENDLESS)
        self.pve.wait_for_clones(2)
        proxy.wait_log("CLONE TASK", 2)
        self.assertEqual(self.stages(proxy), [("201", "taken")])
        back = queue_up(proxy, clone_request(202))[0]
        finish(self.pve, third, back)
        self.expect_taken(fourth)
        self.expect_clones("201", "201", "202")
        self.assertIn("201", self.pve.guests)

    def test_where_it_failed_from_contention_they_are_free_too(self) -> None:
        self.pve.exits.append("clone failed: cfs-lock 'storage-x' error: got lock request timeout")
        proxy = self.proxy(constants="program.RETURN_SECONDS = 0.5")
        first, refused, other = queue_up(proxy, clone_request(201), clone_request(201), clone_request(201, 9001))
        self.expect_taken(refused)
        finish(self.pve, other)  # its source is not held
        self.assertEqual(first.message().status, 500)
        self.assertEqual(sum(record.upid != "" for record in self.pve.clones), 2)

    def test_a_number_that_was_destroyed_is_free(self) -> None:
        self.pve.clone_seconds = 0.05
        proxy = self.proxy()
        for _ in range(3):
            self.assertEqual(proxy.clone(201).status, 200)
            self.assertEqual(proxy.clone(201).first, self.TAKEN, "PVE says so")
            self.pve.destroy("201")
        self.assertEqual(len(self.pve.clones), 6)
        # Nor does it matter that another clone runs.
        self.pve.clone_seconds = ENDLESS
        finish(self.pve, *queue_up(proxy, clone_request(202), clone_request(201)))
        self.assertEqual(proxy.lines(r"\(taken\)"), [])

    def test_it_is_said_and_counted(self) -> None:
        proxy = self.proxy()
        first, refused = queue_up(proxy, clone_request(201), clone_request(201))
        answer = refused.message()
        self.assertEqual((answer.first, answer.get("content-type")), (self.TAKEN, b"application/json;charset=UTF-8"))
        content = json.loads(answer.body)
        self.assertEqual((content["data"], content["message"].strip()), (None, "CT 201 already exists on node 'pve'"))
        proxy.wait_log(r"CLONE FAILED: node=pve vmid=9000 newid=201 status=500 CT 201 already exists on node 'pve' .*\btaken\b")
        self.assertEqual([metric_of(proxy, f'clones_total{{outcome="{outcome}"}}') for outcome in ("taken", "failed")], [1, 0])
        status = snapshot_of(proxy)
        self.assertEqual((status["totals"]["taken"], status["history"][0]["outcome"]), (1, "taken"))
        finish(self.pve, first)

    def test_at_a_shutdown_they_are_answered_like_all_that_wait(self) -> None:
        proxy = self.proxy()
        first, *taken = self.collide(proxy, 4)
        proxy.process.terminate()
        expect_shutting_down(*taken)
        finish(self.pve, first)
        self.assertEqual(proxy.stop(0), 0)

    def test_one_whose_client_left_can_be_taken_over_or_is_dropped(self) -> None:
        proxy = self.proxy()
        first, leaver, dropped = self.collide(proxy, 4)
        leaver.close()
        proxy.wait_log(r"CLONE ABANDONED: .*newid=201 \(taken\)")
        back = bring(proxy, clone_request(201))[0]
        proxy.wait_log(r"CLONE RESUMED: .*newid=201 \(taken\)")
        self.assertEqual(self.stages(proxy), [("201", "taken")] * 2)
        dropped.close()
        proxy.wait_log("CLONE ABANDONED", 2)
        other = queue_up(proxy, clone_request(202))[0]
        finish(self.pve, first, then=ENDLESS)
        self.expect_taken(back)
        finish(self.pve, other)
        proxy.wait_log("CLONE DROPPED: .*newid=201")
        self.assertEqual((len(self.pve.clones), metric_of(proxy, 'clones_total{outcome="taken"}')), (2, 2))

    def test_one_held_by_a_lock_is_taken_too(self) -> None:
        self.pve.locks["9001"] = "backup"
        proxy = self.proxy()
        held = queue_up(proxy, clone_request(201, 9001))[0]
        proxy.wait_log("CLONE LOCKED: node=pve vmid=9001")
        first = queue_up(proxy, clone_request(201))[0]
        self.expect_taken(held)  # the lock need not be waited for
        finish(self.pve, first)

    def test_texts_of_containers_and_vms(self) -> None:
        proxy = self.proxy("-qemu")
        paths = {kind: f"/api2/json/nodes/pve/{kind}/{source}/clone" for kind, source in ((CT, 9000), (VM, 8000))}
        for number, (taker, kind, text) in enumerate([
            (CT, CT, b"CT 201 already exists on node 'pve'"),
            (VM, CT, b"VM 202 already exists on node 'pve'"),
            (CT, VM, b"CT 203 already exists on node 'pve'"),
            (VM, VM, b"unable to create VM 204: config file already exists"),
        ], 201):  # fmt: skip
            with self.subTest(taker=taker, kind=kind):
                first, refused = queue_up(proxy, *(clone_request(number, path=paths[which]) for which in (taker, kind)))
                self.assertEqual(refused.message().first, b"HTTP/1.1 500 " + text)
                finish(self.pve, first, then=ENDLESS)
                if (taker, kind) != (CT, VM):  # there PVE finds out in the task
                    self.assertEqual(proxy.clone(number, path=paths[kind]).first, b"HTTP/1.1 500 " + text)
        self.assertEqual(metric_of(proxy, 'clones_total{outcome="taken"}'), 4)

    def test_the_node_is_that_of_the_upid(self) -> None:
        self.pve.remote = True
        path = "/api2/json/nodes/localhost/lxc/9000/clone"
        first, refused = queue_up(self.proxy(), *[clone_request(201, path=path)] * 2)
        self.assertEqual(refused.message().first, b"HTTP/1.1 500 CT 201 already exists on node 'pve2'")
        finish(self.pve, first)

    def test_the_number_is_read_as_pve_reads_it(self) -> None:
        proxy = self.proxy(constants="program.RETURN_SECONDS = 0.1")
        first, *taken = queue_up(proxy, clone_request(201), clone_request("0201"), clone_request("201=5"),
                                 clone_request("999", path="/api2/json/nodes/pve/lxc/9000/clone?newid=201"))  # fmt: skip
        none = queue_up(proxy, *map(clone_request, ("x", "201&newid=201", "2010")))
        self.pve.finish()
        self.assertEqual([wire.message().status for wire in (first, *none)], [200, 400, 403, 200])
        self.expect_taken(*taken)
        self.assertEqual(len(self.pve.clones), 4, "of those taken PVE never heard")


class ReservedVmids(unittest.TestCase):
    """`-reserve-nextid` gives a number to one client alone."""

    PATH = "/api2/json/cluster/nextid"
    WRONG_TOKEN = TOKEN.replace("secret", "wrong")

    def setUp(self) -> None:
        self.pve = self.enterContext(FakePVE(tls="", auth_delay=0.0))
        self.proxy = self.start("-reserve-nextid", "1m")

    def start(self, *flags: str) -> Proxy:
        return self.enterContext(Proxy(self.pve.url, *WITH_STATUS, *flags))

    def ask(self, query: str = "", token: str = TOKEN, address: str = "127.0.0.1", path: str = PATH, port: int = 0) -> Message:
        """The answer of a port, if it isn't the proxy's, to a GET."""
        with Wire(socket.create_connection(("127.0.0.1", port or self.proxy.port), LONG, (address, 0))) as wire:
            return wire.ask(f"GET {path}{query} HTTP/1.1\r\nHost: h\r\nAuthorization: {token}\r\n\r\n".encode())

    def number(self, query: str = "", **more: Any) -> int:
        """A free number."""
        return int(json.loads(self.ask(query, **more).body)["data"])

    def probe(self, number: object, token: str = TOKEN, address: str = "127.0.0.1") -> int:
        """The status of the answer to whether a number is free."""
        return self.ask(f"?vmid={number}", token, address).status

    def let_fail(self, fault: str) -> None:
        """What PVE does from now on."""
        self.pve.random_fault = lambda kind: fault

    def expect_pves_own(self, query: str, *framing: bytes, **more: Any) -> None:
        """The proxy's answers must be PVE's, byte by byte, but for the connection's own fields and those that frame it."""
        own = (b"connection", b"date", *framing)
        answers = [self.ask(query, port=port, **more) for port in (self.pve.port, self.proxy.port, self.proxy.port)]
        fields = [[field for field in answer.fields if field[0].lower() not in own] for answer in answers]
        comparable = [(answer.first, fields, answer.body) for answer, fields in zip(answers, fields, strict=True)]
        self.assertEqual(comparable[1:], [comparable[0]] * 2, query)

    def test_without_the_flag_no_byte_changes(self) -> None:
        for flags in ((), ("-reserve-nextid", "0")):
            self.proxy = self.start(*flags)
            for query in ("", "?", "?vmid=100", "?vmid=9000", "?vmid=x", "?vmid=100&vmid=101", "?vmid=7", "?x=1;vmid=9000"):
                self.expect_pves_own(query)
                self.expect_pves_own(query, token=self.WRONG_TOKEN)

    def test_with_it_refusals_and_the_gui_get_pves_own(self) -> None:
        for query in ("", "?vmid=100", "?vmid=9000"):
            # Of an empty body PVE doesn't say the length.
            self.expect_pves_own(query, b"content-length", token=self.WRONG_TOKEN)
            self.expect_pves_own(query, path=self.PATH.replace("json", "extjs"))
        for query in ("?vmid=9000", "?vmid=x", "?vmid=7", "?vmid=", "?vmid=100&vmid=101"):
            self.expect_pves_own(query)
        self.let_fail("403 Permission check failed")
        for query in ("", "?vmid=100"):
            self.expect_pves_own(query)
        self.let_fail("")
        self.assertEqual([self.number(), self.probe(101)], [100, 200], "nothing of that has reserved a number")

    def test_a_number_is_handed_out_once(self) -> None:
        self.assertEqual([self.number(), self.number(), self.number(token=OTHER_TOKEN)], [100, 101, 102])
        self.assertEqual([self.probe(103), self.probe(103), self.probe(103, OTHER_TOKEN)], [200, 400, 400])
        self.assertEqual(self.number(), 104)

    def overtaken(self, query: str, newid: int) -> Message:
        """The answer to a question that PVE has answered before another client's clone, and that arrives behind it."""
        asked, go_on, next_id = threading.Event(), threading.Event(), self.pve.next_id

        def hold(parameters: dict[str, object]) -> str:
            number = next_id(parameters)
            asked.set()
            go_on.wait(LONG)
            return number

        with unittest.mock.patch.object(self.pve, "next_id", hold), concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.ask, query)
            self.assertTrue(asked.wait(LONG))
            self.assertEqual(self.proxy.clone(newid).status, 200)
            go_on.set()
            return answer.result()

    def test_an_answer_that_a_clone_has_overtaken_hands_nothing_out(self) -> None:
        self.assertEqual(self.overtaken("?vmid=100", 100).status, 400)
        self.assertEqual(json.loads(self.overtaken("", 101).body)["data"], "102")

    def test_who_cannot_log_in_changes_no_reservation(self) -> None:
        self.assertEqual(self.number(), 100)
        self.assertEqual([self.probe(100, self.WRONG_TOKEN), self.probe(101, self.WRONG_TOKEN)], [401, 401])
        self.assertEqual([self.probe(100, OTHER_TOKEN), self.probe(100)], [400, 200], "still its owner's")
        self.assertEqual(self.probe(101, OTHER_TOKEN), 200, "nobody's")

    def test_looking_for_a_number_ends_when_pve_refuses(self) -> None:
        self.assertEqual(self.number(), 100)
        faults = collections.deque(["", "403 Permission check failed"])
        self.pve.random_fault = lambda kind: faults.popleft() if faults else ""
        self.assertEqual(self.ask().first, b"HTTP/1.1 403 Permission check failed")
        self.assertEqual((len(faults), self.number()), (0, 101))

    def test_a_spoken_for_number_is_answered_like_a_taken_one(self) -> None:
        self.assertEqual(self.probe(100), 200)
        answer, pves = self.ask("?vmid=100"), self.ask("?vmid=9000", port=self.pve.port)
        self.assertEqual((answer.first, answer.get("content-type")), (pves.first, pves.get("content-type")))
        self.assertEqual(json.loads(answer.body), json.loads(pves.body.replace(b"9000", b"100")))
        self.assertEqual(json.loads(answer.body)["errors"], {"vmid": "VM 100 already exists"})

    def test_its_owner_may_make_sure_of_it_once(self) -> None:
        self.assertEqual(self.number(), 100)
        self.assertEqual([self.probe(100, OTHER_TOKEN), self.probe(100, TOKEN, "127.0.0.2")], [400, 400])
        self.assertEqual([self.probe(100), self.probe(100)], [200, 400])
        cookie = "Cookie: PVEAuthCookie=PVE:{}:good"
        answers = [self.proxy.get(f"{self.PATH}{query}", cookie.format(user)) for user, query in
                   [("a@pve", ""), ("b@pve", "?vmid=101"), ("a@pve", "?vmid=101"), ("a@pve", "?vmid=101")]]  # fmt: skip
        self.assertEqual([answer.status for answer in answers], [200, 400, 200, 400])

    def test_clones_that_wait_or_run_speak_for_their_numbers(self) -> None:
        self.pve.clone_seconds = ENDLESS
        wires = queue_up(self.proxy, clone_request(100), clone_request("0101"))
        self.pve.wait_for_clones(1)
        self.assertEqual((self.number(), self.probe(101)), (102, 400))
        finish(self.pve, *wires)

    def test_it_ends_when_a_clone_with_the_number_is_accepted(self) -> None:
        self.pve.clone_seconds = ENDLESS
        self.assertEqual([self.number(), self.number()], [100, 101])
        wire = queue_up(self.proxy, clone_request("0100"))[0]
        self.proxy.wait_log("CLONE TASK")
        finish(self.pve, wire)
        self.pve.destroy("100")
        self.assertEqual([self.number(), self.number()], [100, 102])
        self.pve.locks["9000"] = "backup"
        self.assertEqual(self.start("-lock-timeout", "0").clone(101).status, 500)
        self.assertEqual(self.probe(101, OTHER_TOKEN), 400, "a refused clone does not end it")

    def test_it_ends_after_its_time(self) -> None:
        self.proxy = self.start("-reserve-nextid", "500ms")
        begin = time.monotonic()
        self.assertEqual(self.number(), 100)
        wait_until(lambda: self.probe(100, OTHER_TOKEN) == 200)
        self.assertGreater(time.monotonic() - begin, 0.5)
        wait_until(lambda: self.number() == 100)

    def test_vmid_and_path_are_read_as_pve_reads_them(self) -> None:
        self.assertEqual(self.number(token=OTHER_TOKEN), 100)
        for query in ("?vmid=0100", "?vmid=100=7", "?a=1;vmid=100", "?%76mid=1%300", "/?vmid=100", "?vmid&vmid=100"):
            with self.subTest(query):
                self.assertEqual(self.ask(query).status, 400)
        for number, path in enumerate(("/api2/json//cluster/next%69d", "/api2/json/cluster%2Fnextid/", self.PATH + "?x=1"), 101):
            with self.subTest(path):
                self.assertEqual(self.number(path=path), number)
        self.assertEqual([self.number("?vmid=0104"), self.probe(104, OTHER_TOKEN)], [104, 400])
        self.assertEqual([self.number("?vmid"), self.number("?vmid"), self.number()], [105, 106, 107], "no value, no number")

    def test_it_asks_for_no_more_than_a_hundred_others(self) -> None:
        self.pve.guests.update(map(str, range(101, 205)))
        self.assertEqual(self.number(), 100)
        asked = self.pve.requests
        self.assertEqual(self.number(), 100, "PVE's first answer")
        self.assertEqual(self.pve.requests - asked, 101)
        self.pve.destroy("150")
        self.assertEqual(self.number(), 150)
        self.assertEqual(self.probe(151, OTHER_TOKEN), 400, "PVE says so")

    def test_other_guests_are_asked_for_with_the_clients_own_credentials(self) -> None:
        with answering(*map(data_answer, ("100", "100", "101"))) as backend:
            self.proxy = self.enterContext(Proxy(backend.url, "-reserve-nextid", "1m"))
            self.assertEqual([self.number(), self.number(token=OTHER_TOKEN)], [100, 101])
            seen = [(request.first.decode().split()[1], request.get("authorization")) for request in backend.requests]
        own, others = TOKEN.encode(), OTHER_TOKEN.encode()
        self.assertEqual(seen, [(self.PATH, own), (self.PATH, others), (self.PATH + "?vmid=101", others)])

    def test_pve_that_does_not_answer_reserves_nothing(self) -> None:
        for number, fault in enumerate(("reset", "close", "garbage", "500 oops", "595 Connection refused"), 100):
            with self.subTest(fault):
                self.let_fail(fault)
                self.assertEqual({self.ask().status, self.probe(number)}, {int(fault[:3]) if fault[0] == "5" else 502})
                self.let_fail("")
                self.assertEqual(self.probe(number, OTHER_TOKEN), 200)
        for fault in ("json:nonsense", 'json:{"data":null}', 'json:{"data":"12"}', 'json:{"data":["100"]}', "json:[]"):
            with self.subTest(fault):
                self.let_fail(fault)
                self.assertEqual(self.ask().body.decode(), fault[5:])
        self.assertGreater(metric_of(self.proxy, "backend_errors_total"), 0)


class ReservedBursts(unittest.TestCase):
    """40 clients at once get a container each."""

    def burst(self, *ways: Callable[[Chooser], Choice], facts: Callable[[int], dict[str, Any]]) -> list[Choice]:
        """Clients that choose in these ways by turns, and what there is to say of each, by its index."""
        with FakePVE(tls="", clone_seconds=0.02) as pve, Proxy(pve.url, "-reserve-nextid", "1m") as proxy:
            choices = at_once(40, lambda index: ways[index % len(ways)](Chooser(proxy.port, **facts(index))))
            expect_all_cloned(self, pve, choices)
            return choices

    def test_by_nextid(self) -> None:
        for way in (Chooser.by_nextid, Chooser.by_nextid_then_probe):
            with self.subTest(way.__name__):
                self.burst(way, facts=lambda index: {"tries": 1})

    def test_by_probing_upwards_from_one_start(self) -> None:
        choices = self.burst(Chooser.by_probe, facts=lambda index: {"tries": 1, "start": 500})
        self.assertEqual({choice.newid for choice in choices}, set(range(500, 540)))

    def test_mixed(self) -> None:
        tell_apart: dict[str, Callable[[int], dict[str, Any]]] = {
            "each with a token of its own": lambda index: {"tries": 1, "token": f"PVEAPIToken=root@pam!ci{index}=secret"},
            "each with an address of its own": lambda index: {"tries": 1, "address": f"127.0.1.{index + 1}"},
            "one token, one address, five tries": lambda index: {},
        }
        for name, facts in tell_apart.items():
            with self.subTest(name):
                self.burst(Chooser.by_nextid, Chooser.by_probe, Chooser.by_nextid_then_probe, facts=facts)


# Exactly once, whatever happens


def ask_impatiently(wire: Wire, request: bytes, seconds: float) -> Message | None:
    """The answer to a request; None if the client has left before there was one. It leaves by a half-close, to see whether an
    answer was on its way in that very moment."""
    wire.sock.settimeout(seconds)
    wire.send(request)
    with contextlib.suppress(TimeoutError):
        return wire.message()
    wire.sock.settimeout(LONG)
    wire.sock.shutdown(socket.SHUT_WR)
    return wire.message() if wire.buffer or wire.more() else None


class Soak:
    """A run with seeded random faults: clients that leave and come back, that choose numbers which others have, and that
    send more fields than PVE reads; a PVE that resets, hangs, refuses, and is away for a moment."""

    LOCKED = ("500 CT is locked (backup)", "500 CT is locked (snapshot)")
    NO_DAEMON = "595 Connection refused"
    CONTENTION = "clone failed: cfs-lock 'storage-x' error: got lock request timeout"
    # How likely they are, by the kind of call.
    FAULTS: ClassVar = {
        "relay": (0.08, ["reset", "reset-in-head", "reset-in-body", "close", "garbage", "hang"]),
        "poll": (0.1, ["reset", "close", "garbage", "500 x", "json:{}", "401 x", NO_DAEMON]),
        "clone": (0.2, ["reset", "+reset", "close", "+close", "hang", "+hang", "596 x", "+596 x", "403 x", "json:x",
                        "reset-in-body", NO_DAEMON, *LOCKED]),
    }  # fmt: skip

    def __init__(self, relayed: int, clones: int, seconds: float, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.deadline = time.monotonic() + seconds
        # The threads take from and add to these, each time in one step, which needs no lock.
        self.to_relay, self.to_clone = iter(range(1, relayed + 1)), iter(range(1000, 1000 + clones))
        self.seen: list[str] = []
        self.upids: list[str] = []  # that clients were given
        self.told_taken: set[str] = set()
        self.problems: list[str] = []
        self.figures: collections.Counter[str] = collections.Counter()  # once it is over

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def fault(self, kind: str) -> str:
        """What happens to PVE's next call of a kind."""
        probability, faults = self.FAULTS[kind]
        return self.rng.choice(faults) if self.chance(probability) else ""

    def until_the_deadline(self, numbers: Iterator[int]) -> Iterator[int]:
        """Those of the next requests to make."""
        return itertools.takewhile(lambda _: time.monotonic() < self.deadline, numbers)

    def relay(self, proxy: Proxy) -> None:
        """Ordinary requests; each must get its own answer, an error of the proxy's, or a cut."""
        for number in self.until_the_deadline(self.to_relay):
            method, rest = ("POST", "Content-Length: 3\r\n\r\nabc") if self.chance(0.3) else ("GET", "\r\n")
            if self.chance(0.1):
                rest = padding(self.rng.randrange(50, 70)) + Smuggling.CALL + rest
            request = f"{method} /api2/json/x/{number} HTTP/1.1\r\nHost: h\r\nAuthorization: {TOKEN}\r\n{rest}"
            try:
                with proxy.wire() as wire:
                    wire.send(request.encode())
                    if self.chance(0.05):
                        self.seen.append("relayed, client left")
                        continue
                    answer = wire.message()
            except (OSError, EOFError):
                self.seen.append("relayed, cut off")
                continue
            self.seen.append(f"relayed, {answer.status}")
            if answer.status not in (431, 502, 504) and f"'{method} /x/{number}'".encode() not in answer.first:
                self.problems.append(f"request {number} got {answer.first!r}")

    def clone(self, proxy: Proxy, pve: FakePVE) -> None:
        """Clones by clients that have a number of their own, or that choose one of a few until they have got it; those are
        destroyed afterwards."""
        for number in self.until_the_deadline(self.to_clone):
            if self.chance(0.5):
                self.insist(proxy, number, str(number), str(number))
                continue
            for attempt in range(10):
                newid = str(2_000_000 + self.rng.randrange(12))
                answer = self.insist(proxy, number, newid, f"{number}-{attempt}")
                if not answer or b"already exists" not in answer.first:
                    break
                self.seen.append("clone, number taken")
                self.told_taken.add(newid)
            pve.destroy(newid)

    def insist(self, proxy: Proxy, number: int, newid: str, name: str) -> Message | None:
        """The answer to one clone, whose name is like no other's; its client leaves now and then, and may come back with
        the same request."""
        extra = padding(self.rng.randrange(50, 60)) if self.chance(0.05) else ""
        request = clone_request(f"{newid}&hostname={name}", 9000 + number % 2, extra=extra)
        while True:
            try:
                with proxy.wire() as wire:
                    patience = 0.02 + 0.3 * self.rng.random() if self.chance(0.3) else LONG * 3
                    answer = ask_impatiently(wire, request, patience)
            except (OSError, EOFError) as error:
                self.problems.append(f"clone {newid} was cut off: {error}")
                return None
            if answer:
                break
            self.seen.append("clone, client left")
            if self.chance(0.3):
                return None
        self.seen.append(f"clone, {answer.status}")
        if answer.status == 200 and b"UPID" in answer.body:
            self.upids.append(json.loads(answer.body)["data"])
        return answer

    def be_away(self, pve: FakePVE, over: threading.Event) -> None:
        """Have PVE go away now and then, for a moment."""
        while not over.wait(0.5 + self.rng.random()):
            pve.go_away()
            over.wait(0.3 * self.rng.random())
            pve.come_back()
            self.seen.append("PVE away")

    def run(self) -> None:
        """Do it all, then look whether everything is as it should be."""
        flags = ("-request-timeout", "400ms", "-poll-delay", "50ms", *WITH_STATUS)
        with FakePVE(clone_seconds=0.03, auth_delay=0.1) as pve, Proxy(pve.url, *flags) as proxy:
            proxy.get("/")
            threads, descriptors = proxy.threads(), proxy.descriptors()
            pve.random_fault = self.fault

            def exit_status(record: CloneRecord) -> None:
                if self.chance(0.1):
                    pve.exits.append(self.rng.choice([self.CONTENTION, "clone failed: disk full", "WARNINGS: 1"]))

            pve.on_clone = exit_status
            over = threading.Event()
            weather = threading.Thread(target=self.be_away, args=(pve, over))
            workers = [threading.Thread(target=self.relay, args=(proxy,)) for _ in range(4)]
            workers += [threading.Thread(target=self.clone, args=(proxy, pve)) for _ in range(12)]
            for worker in (weather, *workers):
                worker.start()
            for worker in workers:
                worker.join()
            over.set()
            weather.join()
            wait_until(lambda: not (now := snapshot_of(proxy))["running"] and not now["waiting"], "the queue to be empty", 60)
            wait_until(lambda: proxy.threads() <= threads, "no thread to be left over")
            wait_until(lambda: proxy.descriptors() <= descriptors + 1, "no descriptor to be left over")
            pve.hanging.set()
            self.figures.update(self.seen)
            self.figures += collections.Counter({
                "memory, kB": proxy.memory(), "clone calls at PVE": len(pve.clones), "tasks": len(pve.tasks),
            })  # fmt: skip
        self.check(pve)

    def check(self, pve: FakePVE) -> None:
        """Exactly once: by what reached PVE, and by what clients got."""
        by_body: dict[bytes, list[CloneRecord]] = {}
        for record in pve.clones:
            by_body.setdefault(record.body, []).append(record)
        for body, records in by_body.items():
            for record in records[:-1]:
                contention = record.upid and pve.tasks[record.upid].exit_status == self.CONTENTION
                locked = record.refused and "is locked" in record.refused.text
                if not contention and not locked and record.fault not in (*self.LOCKED, self.NO_DAEMON):
                    self.problems.append(f"{body!r} was sent again after {record.status} {record.fault} {record.upid}")
            tasks = [record.upid for record in records if record.upid and pve.tasks[record.upid].exit_status != self.CONTENTION]
            if len(tasks) > 1:
                self.problems.append(f"{body!r} was cloned {len(tasks)} times")
            if not body.startswith(b"newid="):
                self.problems.append(f"a clone that nobody asked for: {records[0].target}")
        for newid in self.told_taken - {task.newid for task in pve.tasks.values()}:
            self.problems.append(f"{newid} was said to be taken, and never was")
        if pve.overlaps:
            self.problems.append(f"{pve.overlaps} times two tasks of one source")
        for upid, count in collections.Counter(self.upids).items():
            if count > 1:
                self.problems.append(f"{upid} was given to {count} clients")


class ExactlyOnce(unittest.TestCase):
    def test_a_short_soak(self) -> None:
        soak = Soak(300, 40, 20)
        soak.run()
        self.assertEqual(soak.problems, [])
        self.assertGreater(soak.figures["tasks"], 10)


def soak(seconds: float) -> int:
    """Soak for that long, in rounds of 2,000 relayed requests and 200 clones; the exit status."""
    begin, seed = time.monotonic(), int(time.time())
    total: collections.Counter[str] = collections.Counter(problems=0)
    while (left := begin + seconds - time.monotonic()) > 0:
        round_ = Soak(2000, 200, left, seed)
        round_.run()
        memory = max(total["memory, kB"], round_.figures["memory, kB"])
        total.update(round_.figures, rounds=1, problems=len(round_.problems))
        total["memory, kB"] = memory
        for problem in round_.problems:
            print(f"PROBLEM (seed {seed}): {problem}")
        seed += 1
    total["seconds"] = round(time.monotonic() - begin)
    for name in sorted(total, key=lambda name: (name == "seconds", name)):
        print(f"{name:28} {total[name]:9,}")
    return 1 if total["problems"] else 0


# How fast it is


BENCH_ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 120\r\n\r\n{"data":"' + b"x" * 109 + b'"}'
WORK = 0.0008  # seconds that a worker of pveproxy computes for a request
ROUNDS = 3
ROUND_SECONDS = 2.0
PATIENCE = 600.0  # seconds that a client waits for its clone
# Clients at once that choose their VMIDs, and how long their clones take.
BURSTS = [(8, 0.8), (20, 0.8), (40, 0.8), (100, 0.3), (100, 0.8)]
CHOICES: dict[str, Callable[[Chooser], Choice]] = {"list": Chooser.by_list, "nextid": Chooser.by_nextid}


def say(text: str = "") -> None:
    """Print a line now. If nobody reads any more, as behind `| head`, end without a word."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is still in the buffer would be tried again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def end_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end this program and its children without a traceback."""

    def interrupted(number: int, _: object) -> None:
        for other in (signal.SIGINT, signal.SIGTERM):  # a second one must not break into what ends the children
            signal.signal(other, signal.SIG_IGN)
        os.write(sys.stderr.fileno(), b"\n")  # behind the terminal's ^C
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)


class Table:
    """A table in Markdown, printed row by row."""

    def __init__(self, heading: str, *titles: str) -> None:
        self.widths = [len(title) for title in titles]
        say(f"\n{heading}\n")
        self.row(*titles)
        self.row(*("-" * (width - 1) + ":" for width in self.widths))

    def row(self, *cells: object) -> None:
        """The next row."""
        say(f"| {' | '.join(str(cell).rjust(width) for cell, width in zip(cells, self.widths, strict=True))} |")


def bench_backend() -> None:
    """A TLS backend that does as little as it can, in a process of its own; prints its port. A GET gets a small answer,
    `/N` with a number gets N bytes, and the body of a PUT is read and dropped."""
    context = server_context()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(listener.getsockname()[1], flush=True)
    piece = bytes(1 << 18)

    def serve(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, EOFError), context.wrap_socket(sock, server_side=True) as tls:
            while data := tls.recv(65536):
                if data.startswith(b"PUT"):
                    head, _, rest = data.partition(b"\r\n\r\n")
                    left, space = int(re.findall(rb"Content-Length: (\d+)", head)[0]) - len(rest), bytearray(1 << 18)
                    while left > 0:
                        left -= tls.recv_into(space) or left
                    tls.sendall(BENCH_ANSWER)
                elif match := re.match(rb"GET /(\d+)", data):
                    left = int(match[1])
                    tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % left)
                    while left:
                        left -= tls.send(piece[:left])
                else:
                    tls.sendall(BENCH_ANSWER)

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


def bench_worker() -> None:
    """A TLS backend like a worker of pveproxy, in a process of its own: one thread, which does nothing else while it computes
    for a request; prints its port."""
    context = server_context()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener, selectors.DefaultSelector() as selector:
        print(listener.getsockname()[1], flush=True)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    sock = listener.accept()[0]
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    with contextlib.suppress(OSError):
                        selector.register(context.wrap_socket(sock, server_side=True), selectors.EVENT_READ)
                elif isinstance(key.fileobj, ssl.SSLSocket) and not work_for(key.fileobj):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


def work_for(client: ssl.SSLSocket) -> bool:
    """Take a request, which is a TLS record, compute and answer; False at the connection's end."""
    end = time.perf_counter() + WORK
    try:
        if not client.recv(65536):
            return False
        while time.perf_counter() < end:
            pass  # not asleep: meanwhile nobody else has this core
        client.sendall(BENCH_ANSWER)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def backend_process(mode: str) -> Iterator[int]:
    """The port of one of these backends."""
    with subprocess.Popen([sys.executable, __file__, mode], stdout=subprocess.PIPE, text=True) as backend:
        try:
            assert backend.stdout
            yield int(backend.stdout.readline())
        finally:
            backend.terminate()


def bench_load(port: int, tls: bool, connections: int) -> tuple[float, float]:
    """Small requests a second over so many connections, and their median latency in microseconds."""
    latencies: list[float] = []

    def one(_: int) -> None:
        stop = time.perf_counter() + ROUND_SECONDS
        with Wire.to(port, tls) as wire:
            wire.sock.settimeout(None)
            while (begin := time.perf_counter()) < stop:
                wire.sock.sendall(b"GET /api2/json/version HTTP/1.1\r\nHost: pve\r\nAuthorization: x\r\n\r\n")
                length, data = 0, b""
                while length < 120 or not data.endswith(b'"}'):
                    data = wire.sock.recv(4096)
                    if not data:
                        raise EOFError("the connection ended without a whole answer")
                    length += len(data)
                latencies.append(time.perf_counter() - begin)

    at_once(connections, one)
    return len(latencies) / ROUND_SECONDS, statistics.median(latencies) * 1e6


def bench_bulk(port: int, tls: bool, upload: bool) -> float:
    """MB a second of one body of 1 GiB."""
    size, piece = 1 << 30, bytearray(1 << 18)
    with Wire.to(port, tls) as wire:
        begin = time.perf_counter()
        if upload:
            wire.send(b"PUT / HTTP/1.1\r\nHost: pve\r\nContent-Length: %d\r\n\r\n" % size)
            for _ in range(size // len(piece)):
                wire.sock.sendall(piece)
            wire.message()
        else:
            wire.send(b"GET /%d HTTP/1.1\r\nHost: pve\r\n\r\n" % size)
            wire.head()
            left = size - len(wire.buffer)
            while left:
                left -= wire.sock.recv_into(piece)
        return size / 1e6 / (time.perf_counter() - begin)


def cpu_seconds(proxy: Proxy) -> float:
    """The processor time that it has used, in steps of 10 ms."""
    with open(f"/proc/{proxy.process.pid}/stat") as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def bench_requests(heading: str, backend: int, proxy: Proxy, *counts: int) -> None:
    """Small requests over so many connections, direct and through the proxy by turns; rates and latencies are those of the
    best rounds."""
    table = Table(heading, "connections", "direct req/s", "median µs", "proxy req/s", "median µs", "proxy/direct",
                  "its CPU µs a request")  # fmt: skip
    for connections in counts:
        direct, through, busy = [], [], 0.0
        bench_load(proxy.port, False, connections)  # warms up
        for _ in range(ROUNDS):
            direct.append(bench_load(backend, True, connections))
            before = cpu_seconds(proxy)
            through.append(bench_load(proxy.port, False, connections))
            busy += cpu_seconds(proxy) - before
        rates = [max(rate for rate, _ in rounds) for rounds in (direct, through)]
        medians = [min(latency for _, latency in rounds) for rounds in (direct, through)]
        cpu = busy / (sum(rate for rate, _ in through) * ROUND_SECONDS)
        table.row(connections, f"{rates[0]:,.0f}", f"{medians[0]:,.0f}", f"{rates[1]:,.0f}", f"{medians[1]:,.0f}",
                  f"{rates[1] / rates[0]:.2f}", f"{cpu * 1e6:.0f}")  # fmt: skip


def bench_relay() -> int:
    """Relaying, before a backend like PVE's and before one that takes next to nothing; 0, since no clone can fail."""
    with backend_process("bench-worker") as port, Proxy(f"https://127.0.0.1:{port}") as proxy:
        heading = f"Relaying, before a backend that takes {WORK * 1000} ms for each request, one after the other:"
        bench_requests(heading, port, proxy, 1, 8)
    with backend_process("bench-backend") as port, Proxy(f"https://127.0.0.1:{port}") as proxy:
        heading = "Relaying, before one that takes next to nothing (much of it is the time of this load generator):"
        bench_requests(heading, port, proxy, 1, 8, 64)
        say()
        for upload in (False, True):
            direct, through = bench_bulk(port, True, upload), bench_bulk(proxy.port, False, upload)
            say(f"{'Upload' if upload else 'Download'} of 1 GiB: direct {direct:,.0f} MB/s, proxy {through:,.0f} MB/s, "
                f"its peak memory {proxy.memory('VmHWM') / 1024:.1f} MB")  # fmt: skip
    return 0


def makespan(pve: FakePVE, begin: float) -> float:
    """The time since the beginning over the sum of the clones' durations."""
    seconds = time.monotonic() - begin
    with pve.lock:
        tasks = list(pve.tasks.values())
    wait_until(lambda: all(task.seconds for task in tasks), "the tasks' durations")
    return seconds / sum(task.seconds for task in tasks)


def clone_at_once(count: int, *proxies: Proxy) -> int:
    """Make that many clones at the same time, each with a VMID of its own, dealt out to the proxies; how many failed."""

    def clone(index: int) -> bool:
        with proxies[index % len(proxies)].wire() as wire:
            wire.sock.settimeout(PATIENCE)
            wire.send(clone_request(1000 + index))
            return wire.message().status != 200

    return sum(at_once(count, clone))


def bench_clones() -> int:
    """Few clones of several durations; how many failed."""
    table = Table("Eight concurrent clones of one template, their makespan over the sum of their durations:",
                  "clone takes", "task here", "polls a clone", "task elsewhere", "polls a clone", "failed")  # fmt: skip
    failed = 0
    for seconds in (0.3, 0.8, 2.3):
        cells = []
        for remote in (False, True):
            with FakePVE(clone_seconds=seconds) as pve, Proxy(pve.url) as proxy:
                pve.remote = remote
                begin = time.monotonic()
                failed += clone_at_once(8, proxy)
                cells += [f"{makespan(pve, begin):.3f}", f"{pve.polls / 8:.1f}"]
        table.row(f"{seconds} s", *cells, failed)
    return failed


def bench_bursts() -> int:
    """Clients at once that choose their VMIDs themselves; how many got no container of their own."""
    table = Table("Clients at once that choose their VMIDs themselves, with five tries:",
                  "clients", "choose by", "clone takes", "got a container", "collisions", "a client", "makespan / sum")  # fmt: skip
    failed = 0
    for (count, seconds), (name, choose) in itertools.product(BURSTS, CHOICES.items()):
        with FakePVE(clone_seconds=seconds) as pve, Proxy(pve.url) as proxy, concurrent.futures.ThreadPoolExecutor(count) as pool:
            begin = time.monotonic()
            choices = list(pool.map(choose, [Chooser(proxy.port, patience=PATIENCE)] * count))
            ratio = makespan(pve, begin)
        succeeded = len({choice.newid for choice in choices if choice.status == 200})
        collisions = sum(choice.tries for choice in choices) - succeeded
        failed += count - succeeded
        table.row(count, name, f"{seconds} s", f"{succeeded} of {count}", collisions, f"{collisions / count:.2f}", f"{ratio:.3f}")
    return failed


def bench_many(table: Table, rows: dict[int, tuple[int, int]], seconds: float, *flags: str) -> int:
    """So many clones at once, so long each, by so many proxies with these flags; how many failed."""
    failed = 0
    for name, (clones, proxies) in rows.items():
        with FakePVE(clone_seconds=seconds) as pve, contextlib.ExitStack() as stack:
            running = [stack.enter_context(Proxy(pve.url, *flags)) for _ in range(proxies)]
            begin = time.monotonic()
            failed_now = clone_at_once(clones, *running)
            table.row(name, f"{makespan(pve, begin):.3f}", failed_now, f"{pve.requests / clones:.1f}")
            failed += failed_now
    return failed


def bench_growth() -> int:
    """More and more clones that wait; how many failed."""
    table = Table("Many clones at once of one template, 0.2 s each, VMIDs of their own:",
                  "clones", "makespan / sum", "failed", "requests to PVE a clone")  # fmt: skip
    return bench_many(table, {count: (count, 1) for count in (8, 100, 480)}, 0.2, "-queue-size", "500")


def bench_proxies() -> int:
    """Several proxies before one cluster; how many clones failed."""
    table = Table("24 clones of one template at once, 2 s each, by several proxies before one PVE (-lock-timeout 10s):",
                  "proxies", "makespan / sum", "failed", "requests to PVE a clone")  # fmt: skip
    return bench_many(table, {count: (24, count) for count in (1, 2, 4, 8)}, 2, "-lock-timeout", "10s")


def bench_memory() -> int:
    """What it needs when idle, with many waiting, and afterwards; 0, since no clone can fail."""
    with FakePVE(clone_seconds=30) as pve, Proxy(pve.url) as proxy:
        proxy.get("/")
        idle = proxy.memory()
        wires = bring(proxy, *(clone_request(200 + index) for index in range(101)))
        for _ in range(200):
            wires += bring(proxy, GET)
            wires[-1].message()
        proxy.wait_log("CLONE QUEUED", 101)
        busy, before = proxy.memory(), cpu_seconds(proxy)
        time.sleep(10)
        load = (cpu_seconds(proxy) - before) / 10
        for wire in wires:
            wire.close()
        wait_until(lambda: proxy.threads() < 10, "the connections to end")
        say(f"\nMemory: idle {idle / 1024:.1f} MB; 100 clones waiting and 200 idle clients {busy / 1024:.1f} MB, "
            f"{load:.2%} of a core; afterwards {proxy.memory() / 1024:.1f} MB")  # fmt: skip
    return 0


BENCH_PARTS = {
    part.__name__.removeprefix("bench_"): part
    for part in (bench_clones, bench_bursts, bench_growth, bench_proxies, bench_relay, bench_memory)
}


def bench(names: list[str]) -> int:
    """Measure these parts, or all; the exit status."""
    for name in names:
        if name not in BENCH_PARTS:
            wrong_usage(f"bench has no part {name!r}, but {', '.join(BENCH_PARTS)}")
    end_on_signals()
    version = sys.version.split()[0]
    say(f"{time.strftime('%Y-%m-%d')}, Python {version}, {os.cpu_count()} cores, version {program.VERSION}")
    failed = sum(BENCH_PARTS[name]() for name in names or BENCH_PARTS)
    if failed:
        say(f"\n{failed} clones failed.")
    return 1 if failed else 0


# The demo, and the simulated PVE by hand


DEMO_CLIENTS = 12
DEMO_SECONDS = 0.8
DEMO_TRIES = 5
DEMO_WIDTH = 43  # columns of a bar, which makes 79 of a line
DEMO_SCALE = DEMO_WIDTH / (DEMO_CLIENTS * DEMO_SECONDS * 1.1)  # columns a second
GREY, GREEN, RED = 90, 32, 31


@dataclasses.dataclass
class DemoClient(Chooser):
    """A client that chooses again when its number is taken and at no other error, as real ones do; how it fares."""

    tries: int = 1  # of `by_list`: trying again is done here, to be seen
    number: int = 0
    tried: int = 0
    newid: int = 0
    refusals: list[float] = dataclasses.field(default_factory=list)
    result: str = ""  # empty while it goes on

    def run(self) -> None:
        """Clone, and wait until the task is over."""
        try:
            while not self.result:
                self._try()
        except (OSError, EOFError):
            self.result = "no answer"

    def _try(self) -> None:
        self.tried += 1
        choice = self.by_list()
        if choice.status == 200:
            while (task := self._get(f"/api2/json/nodes/pve/tasks/{choice.upid}/status"))["status"] == "running":
                time.sleep(0.05)
            self.result = task["exitstatus"]
            return
        self.refusals.append(time.monotonic())
        if "already exists" not in choice.text or self.tried == DEMO_TRIES:
            self.result = choice.text

    def _unlisted(self) -> int:
        self.newid = super()._unlisted()
        return self.newid


class DemoRun:
    """Clients at once before a port, and the lines that show them: on a terminal drawn again and again, elsewhere printed
    when a client is done."""

    def __init__(self, pve: FakePVE, port: int, tls: bool) -> None:
        self.pve = pve
        self.clients = [
            DemoClient(port, tls, f"PVEAPIToken=root@pam!client{number}=secret", number=number)
            for number in range(1, DEMO_CLIENTS + 1)
        ]
        self.coloured = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        # What has scrolled away can't be drawn again.
        size = os.get_terminal_size(sys.stdout.fileno()) if self.coloured else os.terminal_size((0, 0))
        self.redraws = size.columns >= 80 and size.lines > DEMO_CLIENTS
        self.waited, self.refused, self.ran = "·x█" if "utf" in sys.stdout.encoding.lower() else ".x#"
        self.drawn: list[DemoClient] = []
        self.begin = time.monotonic()

    def run(self) -> int:
        """Let them run, and show it; how many have got their container."""
        legend = f"{self.waited} waited  {self.refused} refused  {self.ran} ran"
        say(f"client  VMID  tries  {self.painted(legend)}{' ' * (DEMO_WIDTH - len(legend))}  waited    ran")
        for client in self.clients:
            threading.Thread(target=client.run, daemon=True).start()  # daemons: Ctrl-C does not wait for them
        while not all(client.result for client in self.clients):
            self.show()
            time.sleep(0.05)
        self.show()
        return sum(client.result == "OK" for client in self.clients)

    def show(self) -> None:
        """Draw all lines anew, or print those of the clients that are done by now."""
        with self.pve.lock:
            tasks = {int(task.user.partition("!client")[2]): task for task in self.pve.tasks.values()}
        # In the order in which their clones started, that is as stairs.
        clients = sorted(self.clients, key=lambda client: tasks[client.number].begin if client.number in tasks else math.inf)
        lines = {client.number: self.line(client, tasks.get(client.number)) for client in clients}
        if self.redraws:
            up = f"\033[{DEMO_CLIENTS}A" if self.drawn else ""
            say(up + "\n".join(f"{line}\033[K" for line in lines.values()))
            self.drawn = clients
            return
        for client in clients:
            if client.result and client not in self.drawn:
                say(lines[client.number])
                self.drawn.append(client)

    def line(self, client: DemoClient, task: Task | None) -> str:
        """How a client fares."""
        now = time.monotonic()
        start = task.begin if task else client.refusals[-1] if client.result and client.refusals else now
        ran = (task.seconds or now - start) if task else 0.0
        bar = self.bar(client.refusals, start, start + ran)
        if client.result in ("", "OK"):
            facts = f"{' ' * (DEMO_WIDTH - len(bar))}  {start - self.begin:4.1f} s  " + (f"{ran:3.1f} s" if task else "")
        else:
            facts = f" {client.result}"[: DEMO_WIDTH + len("  10.0 s  0.8 s") - len(bar)]
        return f"{client.number:6}  {client.newid or '':>4}  {client.tried:5}  {self.painted(bar)}{facts}"

    def bar(self, refusals: list[float], start: float, end: float) -> str:
        """A client's time: it waited, was refused, ran from its start to its end."""
        bar = self.waited * self.column(start)
        for at in map(self.column, refusals):
            bar = bar[:at] + self.refused + bar[at + 1 :]
        if end > start:
            bar += self.ran * max(1, self.column(end) - len(bar))
        return bar[:DEMO_WIDTH]

    def column(self, at: float) -> int:
        """The column of a bar that stands for a time."""
        return min(int((at - self.begin) * DEMO_SCALE), DEMO_WIDTH - 1)

    def painted(self, bar: str) -> str:
        """A bar in colours, on a terminal."""
        if self.coloured:
            for mark, colour in ((self.waited, GREY), (self.refused, RED), (self.ran, GREEN)):
                bar = re.sub(f"{re.escape(mark)}+", f"\033[{colour}m\\g<0>\033[0m", bar)
        return bar


def demo() -> int:
    """Show the problem and its solution on a simulated PVE; the exit status."""
    end_on_signals()
    say(f"{DEMO_CLIENTS} clients clone one template at once, straight to a simulated PVE:\n")
    with FakePVE(clone_seconds=DEMO_SECONDS) as pve:
        straight = DemoRun(pve, pve.port, tls=True).run()
    say(f"\n{straight} of {DEMO_CLIENTS} succeeded: PVE locks a template while it clones it.\n")
    say(f"The same {DEMO_CLIENTS} through the proxy:\n")
    with FakePVE(clone_seconds=DEMO_SECONDS) as pve, Proxy(pve.url) as proxy:
        run = DemoRun(pve, proxy.port, tls=False)
        through, seconds = run.run(), time.monotonic() - run.begin
        ratio = makespan(pve, run.begin)
    say(f"\n{through} of {DEMO_CLIENTS} succeeded in {seconds:.2f} s, {ratio:.3f} times the sum of the clones.")
    return 0 if through == DEMO_CLIENTS > straight else 1


def fake_pve(port: int) -> int:
    """Run the simulated PVE until Ctrl-C; the exit status."""
    seconds = number_of(os.environ.get("FAKE_PVE_CLONE_SECONDS", "2"), "FAKE_PVE_CLONE_SECONDS")
    try:
        pve = FakePVE(port, clone_seconds=seconds, auth_delay=3)
    except OSError as error:
        print(f"fake-pve: can't listen on 127.0.0.1:{port}: {error.strerror}", file=sys.stderr)
        return 1
    pve.head_delay = 5
    with pve, contextlib.suppress(KeyboardInterrupt):
        say(f"fake PVE: {pve.url}")
        say(f"""
It knows the templates 9000, 9001 and 9002 (VMs: 8000 and 8001) on the node pve; a clone takes {seconds:g} s
(FAKE_PVE_CLONE_SECONDS). Any token is good if its secret is `secret`, as that of root@pam!ci here; so is any user whose
password is `good`.
A clone straight to it, and one through the proxy (python3 pve_clone_queue_proxy.py -backend {pve.url}):

  curl -k -H 'Authorization: {TOKEN}' -d newid=101 {pve.url}/api2/json/nodes/pve/lxc/9000/clone
  curl    -H 'Authorization: {TOKEN}' -d newid=102 http://127.0.0.1:8081/api2/json/nodes/pve/lxc/9000/clone
""")
        signal.pause()
    return 0


# The command line


def run_all() -> int:
    """Run all tests, each class in a process of its own and several at a time, since they mostly wait."""
    begin = time.monotonic()
    ran = failed = 0

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, stdin=subprocess.DEVNULL)

    with concurrent.futures.ThreadPoolExecutor(PARALLEL) as pool:
        classes = list(test_classes())[::-1]  # those that take the longest stand at the end of this file
        for name, result in zip(classes, pool.map(run, classes), strict=True):
            count = re.search(r"^Ran (\d+) tests? in (.*)$", result.stderr, re.MULTILINE)
            ran += int(count[1]) if count else 0
            failed += result.returncode != 0
            say(f"{'FAILED' if result.returncode else 'ok':6} {name}: {count[0] if count else 'did not run'}")
            if result.returncode:
                say(result.stdout + result.stderr)
    say(f"\nRan {ran} tests in {time.monotonic() - begin:.1f} s: {f'{failed} classes FAILED' if failed else 'OK'}")
    return 1 if failed or not ran else 0


def test_classes() -> dict[str, type[unittest.TestCase]]:
    """The classes of tests, by name."""
    return {cls.__name__: cls for cls in unittest.TestCase.__subclasses__() if cls.__module__ == "__main__"}


def run_tests(arguments: list[str]) -> int:
    """Run some tests as unittest does, `CLASS` or `CLASS.TEST` and its options; the exit status."""
    for word in itertools.takewhile(lambda word: not word.startswith("-"), arguments):
        name, _, test = word.partition(".")
        cls = test_classes().get(name)
        if not cls or (test and not hasattr(cls, test)):
            wrong_usage(f"{word}: neither a command nor tests")
    unittest.main(module=sys.modules["__main__"])
    return 0


def wrong_usage(text: str) -> NoReturn:
    """End with a line on what is wrong with the command line."""
    print(f"test_proxy.py: {text} (--help says what there is)", file=sys.stderr)
    sys.exit(2)


def number_of(text: str, what: str) -> float:
    """A number that isn't negative."""
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        wrong_usage(f"{what}: not a number: {text!r}")
    return float(text)


def port_of(text: str) -> int:
    """A port."""
    if not re.fullmatch(r"\d{1,5}", text) or int(text) > 65535:
        wrong_usage(f"not a port: {text!r}")
    return int(text)


def main(arguments: list[str]) -> int:
    """Run what the command line asks for."""
    # As the unit does it: 512 clients are more than the usual limit of 1,024 descriptors.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 8192:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    if {"-h", "--help"} & set(arguments):
        arguments = ["help"]
    match arguments:
        case []:
            return run_all()
        case ["help"]:
            say(str(__doc__).strip())
        case ["demo"]:
            return demo()
        case ["fake-pve"]:
            return fake_pve(8006)
        case ["fake-pve", port]:
            return fake_pve(port_of(port))
        case ["bench", *parts]:
            return bench(parts)
        case ["bench-backend" | "bench-worker" as mode]:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal's Ctrl-C reaches it too, and is for its parent to handle
            (bench_backend if mode == "bench-backend" else bench_worker)()
        case ["soak"]:
            return soak(60)
        case ["soak", seconds]:
            return soak(number_of(seconds, "soak"))
        case ["help" | "demo" | "fake-pve" | "soak" | "bench-backend" | "bench-worker" as command, *_]:
            wrong_usage(f"{command}: too many words")
        case _:
            return run_tests(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
