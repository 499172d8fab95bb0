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
import functools
import hashlib
import http.client
import http.server
import itertools
import json
import os
import random
import re
import resource
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
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pve_clone_queue_proxy as program

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "pve_clone_queue_proxy.py")
TOKEN = "PVEAPIToken=root@pam!ci=secret"
LONG = 20.0  # seconds after which a test gives up waiting
PARALLEL = 6  # test classes at a time

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


class Refused(Exception):
    """A call that PVE refuses: the status, its text, and what is wrong with which parameter."""

    def __init__(self, status: int, text: str, errors: dict[str, str] | None = None) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text
        self.errors = errors


def wrong_parameter(name: str, what: str) -> Refused:
    """The refusal of a parameter that does not pass PVE's check."""
    return Refused(400, "Parameter verification failed.", {name: what})


def decode_urlencoded(data: str) -> dict[str, object]:
    """Parameters as PVE decodes them: `;` separates like `&`, of `a=1=2` the 2 is dropped, an `a` without `=` is none, and
    a name that comes again makes a list."""
    decoded: dict[str, object] = {}
    for pair in re.split("[&;]", data):
        name, *values = (urllib.parse.unquote_plus(part) for part in pair.split("="))
        if not values:
            continue
        old = decoded.get(name)
        if isinstance(old, list):
            old.append(values[0])
        else:
            decoded[name] = values[0] if old is None else [old, values[0]]
    return decoded


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
    source: str
    newid: str  # what it makes, to be removed if it fails; empty if nothing
    process: subprocess.Popen[bytes]
    exit_status: str
    leaves_behind: bool
    begin: float
    end: float = 0.0
    seconds: float = 0.0  # how long its process lived
    killed: bool = False  # nobody cleaned up

    @property
    def type(self) -> str:
        """`vzclone` and so on."""
        return self.upid.split(":")[5]

    @property
    def user(self) -> str:
        """Whose it is: a user, or a token as `USER!NAME`."""
        return self.upid.split(":")[7]

    def belongs_to(self, caller: str) -> bool:
        """Whether that user or token started it. A token sees its own tasks alone, a user also those of his tokens."""
        token = re.fullmatch(f"({USER_ID})!{TOKEN_NAME}", self.user)
        return caller == self.user or (token is not None and caller == token[1])

    def describe(self) -> dict[str, object]:
        """As it is listed; a token is split off its user."""
        _, node, pid, pstart, starttime, type_, id_, user, _ = self.upid.split(":")
        token = re.fullmatch(f"({USER_ID})!({TOKEN_NAME})", user)
        owner = {"user": token[1], "tokenid": token[2]} if token else {"user": user}
        numbers = {"pid": int(pid, 16), "pstart": int(pstart, 16), "starttime": int(starttime, 16)}
        return {"upid": self.upid, "node": node, **numbers, "type": type_, "id": id_, **owner}

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


class FakePVE:
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
        self.post_seconds = 0.0
        self.daemon_delay = 0.1
        self.list_age = 10.0
        self.remote = False
        self.away = False
        self.daemon_away = False
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
        self.polls = 0
        self.requests = 0
        self.overlaps = 0  # times a clone's task began while another one of the same source ran
        self.most_at_once = 0
        self.hanging = threading.Event()  # set: whatever hangs goes on
        self.log: list[str] = []
        self.connections: set[FakePVEHandler] = set()
        self.context = server_context(tls) if tls else None
        self._listed: list[Task] = []
        self._listed_at = 0.0
        self._listen(port)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def _listen(self, port: int) -> None:
        """Serve on that port, or on a free one."""

        class Handler(FakePVEHandler):
            pve = self

        self.server = QuietServer(("127.0.0.1", port), Handler)
        self.port: int = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def go_away(self) -> None:
        """Listen no more, as when pveproxy is stopped: idle connections end now, others with their next answer."""
        self.away = True
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            idle = [connection for connection in self.connections if connection.idle]
        for connection in idle:
            connection.cut()

    def come_back(self) -> None:
        """Listen on the same port again."""
        self.away = False
        self._listen(self.port)

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
        running = []
        for task in self.tasks.values():
            if task.end:
                continue
            if task.process.poll() is None:
                running.append(task)
            else:
                self._end_task(task)
        return running

    def _end_task(self, task: Task) -> None:
        """Note a task's end, and do what its worker did last. One that was killed did nothing: its source and its target
        keep their locks."""
        task.end = time.monotonic()
        if task.killed or not task.newid:
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
        task = Task(upid, source, newid, process, exit_status, bool(behind), time.monotonic())
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
        wanted = parameters.get("vmid"), parameters.get("typefilter")
        with self.lock:
            if time.monotonic() - self._listed_at >= self.list_age:
                self._list_running()
            tasks = [task for task in self._listed if user in self.privileged or task.belongs_to(user)]
        return [
            {**task.describe(), "status": "RUNNING"}
            for task in tasks
            if wanted[0] in (None, task.source) and wanted[1] in (None, task.type)
        ]

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
        if task.end:
            return {**task.describe(), "status": "stopped", "exitstatus": task.exit_status}
        return {**task.describe(), "status": "running"}

    def kill_worker(self, upid: str) -> None:
        """Kill a task's worker with -9: the source keeps `disk`, the target `create`."""
        self._interrupt(upid, "unexpected status", True)

    def stop_task(self, upid: str) -> None:
        """Stop a task by hand: it cleans up."""
        self._interrupt(upid, "clone failed: interrupted by signal", False)

    def _interrupt(self, upid: str, exit_status: str, killed: bool) -> None:
        """End a task that runs; takes the lock itself."""
        with self.lock:
            task = self.tasks[upid]
            if task not in self.running():
                raise AssertionError(f"{upid} has ended by itself")
            task.exit_status, task.killed = exit_status, killed
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

    # All these run a call; only the first is meant for programs.
    FORMATS: ClassVar = {
        "json": "application/json;charset=UTF-8",
        "extjs": "application/json;charset=UTF-8",
        "html": "text/html;charset=UTF-8",
        "htmljs": "text/html;charset=UTF-8",
        "png": "image/png",
        "spiceconfig": "application/x-virt-viewer;charset=UTF-8",
    }
    # Not anchored, as PVE's own pattern: a request line may stand anywhere in a line.
    REQUEST_LINE = re.compile(r"([A-Z]+) (\S+) (HTTP/1\.[01])")
    FIELD_LINE = re.compile(r"([^:\s]+)\s*:\s*(.*)")
    MOST_LINES = 63  # of a head, the empty one included
    MOST_BYTES = 8191  # of its fields, without their line ends

    pve: FakePVE
    timeout = 5
    disable_nagle_algorithm = True
    served = 0
    idle = True  # between two requests
    request_version = "HTTP/1.0"  # of the answer to what is no request
    format = "json"
    from_pvedaemon = False

    def setup(self) -> None:
        """Begin a connection."""
        if self.pve.context:
            self.request.settimeout(10)
            self.request = self.pve.context.wrap_socket(self.request, server_side=True)
        super().setup()
        with self.pve.lock:
            self.pve.connections.add(self)

    def finish(self) -> None:
        """End a connection."""
        with self.pve.lock:
            self.pve.connections.discard(self)
        with contextlib.suppress(OSError):
            super().finish()
        self.request.close()

    def cut(self) -> None:
        """End the connection from another thread."""
        with contextlib.suppress(OSError):
            # Below TLS, whose own shutdown must not be called while another thread reads.
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)

    def version_string(self) -> str:
        """What it calls itself."""
        return "pve-api-daemon/3.0"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    # Reading a head

    def handle_one_request(self) -> None:
        """The next request and its answer."""
        self.close_connection = self.idle = True
        with contextlib.suppress(EOFError, TimeoutError):
            if self.read_head():
                self.answer()

    def read_line(self) -> str:
        """A line without its end."""
        line = self.rfile.readline(1 << 16)
        if not line.endswith(b"\n"):
            raise EOFError
        return line[:-1].removesuffix(b"\r").decode("latin-1")

    def read_head(self) -> bool:
        """Read a head as PVE does; False if there is nothing to be answered, or if that has been done."""
        while not (line := self.read_line()):
            pass  # empty lines before a request are skipped
        self.idle = False
        self.format, self.from_pvedaemon = "json", False
        request_line = self.REQUEST_LINE.search(line)
        if not request_line:
            self.refuse(Refused(400, "bad request"))
            return False
        self.command, self.path, self.request_version = request_line.groups()
        lines = self.read_field_lines()
        if lines is None:
            self.give_up_head()
            return False
        return self.take_fields(lines)

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

    def give_up_head(self) -> None:
        """What PVE does with a head beyond its limits: it reads on as if a new request began here if the connection was
        used before, and otherwise lets it time out."""
        if self.served:
            self.close_connection = False
        else:
            self.pve.hanging.wait(self.pve.head_delay)

    def take_fields(self, lines: list[str]) -> bool:
        """Take the fields in: `fields` as they came, `headers` with `-` for each `_` in a name."""
        self.fields: list[tuple[str, str]] = []
        for line in lines:
            if match := self.FIELD_LINE.match(line):
                self.fields.append((match[1], match[2]))
            elif line[0].isspace() and self.fields:
                name, value = self.fields.pop()
                self.fields.append((name, f"{value} {line.lstrip()}"))
            else:
                self.refuse(Refused(506, "unable to parse request header"))
                return False
        self.headers = http.client.HTTPMessage()
        for name, value in self.fields:
            self.headers[name.replace("_", "-")] = value
        connection = self.headers.get("Connection", "")
        self.close_connection = "close" in connection.lower() or (self.request_version == "HTTP/1.0" and not connection)
        return True

    # Answering

    def send(self, status: int, reason: str, body: bytes | None, *fields: tuple[str, str]) -> None:
        """An answer; an empty body has no Content-Length, and an error closes the connection. What comes from pvedaemon
        brings a `Connection: close` of its own along, though this connection stays."""
        self.served += 1
        if status >= 400 or self.served >= 100 or self.pve.away:
            self.close_connection = True
        reason = reason.split("\n", 1)[0]
        head = [f"{self.request_version} {status} {reason}", f"Server: {self.version_string()}", "Cache-Control: max-age=0"]
        if self.close_connection or self.from_pvedaemon:
            head.append("Connection: close")
        if not self.close_connection:
            head.append("Connection: Keep-Alive")
        head += [f"{name}: {value}" for name, value in fields]
        if body:
            head.append(f"Content-Length: {len(body)}")
        self.wfile.write("\r\n".join([*head, "", ""]).encode("latin-1") + (body or b""))

    def send_content(self, content: dict[str, object], status: int = 200, reason: str = "OK") -> None:
        """An answer of the API. What it looks like in the formats for people is of no interest here."""
        self.send(status, reason, json.dumps(content).encode(), ("Content-Type", self.FORMATS[self.format]))

    def send_data(self, data: object) -> None:
        """What a call has to say."""
        self.send_content({"data": data} | ({"success": 1} if self.format in ("extjs", "htmljs") else {}))

    def refuse(self, refused: Refused) -> None:
        """An error: its text is in the reason phrase, but the web GUI gets a 200 that tells of it."""
        content: dict[str, object] = {"data": None}
        if refused.errors:
            content["errors"] = refused.errors
        content["message"] = refused.text + "\n"
        if self.format in ("extjs", "htmljs"):
            self.send_content({**content, "success": 0, "status": refused.status})
        else:
            self.send_content(content, refused.status, refused.text)

    def misbehave(self, fault: str) -> None:
        """Do what a fault says: `reset`, `reset-in-head`, `reset-in-body`, `close`, `hang`, `garbage`, `json:...` (a 200
        with that body), `STATUS TEXT` (an empty body from 595 on). Behind a `+` the call is carried out first. Of clones
        there are two more: `no-worker`, a refusal that leaves source and target locked, and `daemon-stopped`, a 596 after
        `daemon_delay` with the clone carried out then."""
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
            if int(status) >= 595:  # pveproxy's own, for want of an answer
                self.send(int(status), text, None)
            else:
                self.refuse(Refused(int(status), text))

    def reset(self) -> None:
        """Close with a RST."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A TLS close would say goodbye first.
        os.close(self.connection.detach())

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
        """Any request."""
        pve = self.pve
        with pve.lock:
            pve.requests += 1
        target = urllib.parse.urlsplit(self.path)
        # Decoded first and split then; a line end at the path's end is lost on PVE's patterns.
        path = urllib.parse.unquote(target.path, "latin-1").removesuffix("\n")
        parts = [part for part in path.split("/") if part]
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if self.command not in ("GET", "POST", "PUT", "DELETE"):
            self.refuse(Refused(501, f"Unexpected method '{self.command}'"))
            return
        if has_body and self.command not in ("POST", "PUT") and self.headers.get("Content-Length") != "0":
            self.refuse(Refused(501, f"Unexpected content for method '{self.command}'"))
            return
        if "Transfer-Encoding" in self.headers:
            self.refuse(Refused(501, "chunked transfer encoding not supported"))
            return
        length = int(self.headers.get("Content-Length", "0"))
        if parts[-1:] == ["upload"]:
            self.upload(length)
            return
        if length > 512 * 1024:
            self.refuse(Refused(501, "for data too large"))
            return
        body = self.rfile.read(length)
        fault = "" if parts[-1:] in (["clone"], ["status"], ["version"]) else pve.random_fault("relay")
        if fault:
            self.misbehave(fault)
            return
        try:
            self.call(parts, target.query, body)
        except Refused as refused:
            self.refuse(refused)

    def call(self, parts: list[str], query: str, body: bytes) -> None:
        """A call of the API, its body read."""
        if parts[:1] != ["api2"] or len(parts) < 3:
            self.send(200, "OK", b"<!doctype html><title>pve - Proxmox Virtual Environment</title>",
                      ("Content-Type", "text/html; charset=utf-8"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"))
            return
        format_, *parts = parts[1:]
        if parts == ["access", "ticket"]:
            self.format = format_ if format_ in self.FORMATS else "json"
            self.login(parameters_of("", body, self.headers.get("Content-Type", "")))
            return
        if parts == ["access", "domains"]:
            self.send_data([{"realm": "pam", "type": "pam"}])
            return
        try:
            user = self.user()
        except Refused as refused:
            self.pve.hanging.wait(self.pve.auth_delay)
            self.send(401, refused.text, None)
            return
        if format_ not in self.FORMATS:
            raise Refused(501, f"no formatter for uri /{'/'.join(parts)}, format {format_}")
        self.format = format_
        self.call_of(user, parts, query, body)

    def call_of(self, user: str, parts: list[str], query: str, body: bytes) -> None:
        """A call of somebody whom PVE knows."""
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
        """A ticket for a password."""
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
        elif fault and fault != "no-worker" and not fault.startswith("+"):
            with pve.lock:
                pve.clones.append(record)
            self.misbehave(fault)
        else:
            pve.clone(record, kind, node, user)
            self.answer_clone(record)

    def answer_clone(self, record: CloneRecord) -> None:
        """The answer to a clone call that was carried out or refused."""
        if self.pve.post_seconds:
            self.pve.hanging.wait(self.pve.post_seconds)
        if record.fault.startswith("+"):
            self.misbehave(record.fault[1:])
        elif record.refused:
            raise record.refused
        else:
            self.send_data(record.upid)

    def task_status(self, upid: str, user: str) -> None:
        """Running or stopped."""
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
    """A backend whose every connection follows a script of the test's."""

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
                with self._lock:
                    self.connections += 1
                    self.open += 1
                threading.Thread(target=self._serve, args=(Wire(sock),), daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        try:
            if self.context:
                wire.sock = self.context.wrap_socket(wire.sock, server_side=True)
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
        """Whether a request has come."""
        return bool(self.requests)

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


def answering(*answers: bytes) -> ScriptedBackend:
    """A backend that gives each request the next answer, the last one for ever."""
    left = collections.deque(answers)

    def script(wire: Wire) -> None:
        while True:
            backend.request(wire)
            wire.send(left.popleft() if len(left) > 1 else left[0])

    backend = ScriptedBackend(script)
    return backend


def silent(wire: Wire) -> None:
    """A script: read and say nothing."""
    wire.rest()


def by_path(answers: list[bytes]) -> ScriptedBackend:
    """A backend that gives a request for /N the Nth answer, and then closes."""

    def script(wire: Wire) -> None:
        wire.send(answers[int(backend.request(wire).first.split()[1][1:])])

    backend = ScriptedBackend(script)
    return backend


ENDLESS = 3600.0  # seconds of a clone that lasts until `finish`
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


class Proxy:
    """The program as a process of its own, listening on a free port; `constants` are set before it runs."""

    def __init__(
        self, backend: str, *flags: str, env: dict[str, str] | None = None, port: int = 0, constants: str = ""
    ) -> None:
        program_arguments = [PROGRAM]
        if constants:
            code = f"import sys; sys.path.insert(0, {HERE!r}); import pve_clone_queue_proxy as program\n"
            program_arguments = ["-c", f"{code}{constants}\nprogram.run(sys.argv[1:])"]
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
                answer = self._ask(clone_request(newid, self.source, self.token))
                return Choice(tries, newid, 200, "OK", json.loads(self._good(answer))["data"])
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
        """The data of a GET."""
        request = f"GET {path} HTTP/1.1\r\nHost: pve\r\nAuthorization: {self.token}\r\nConnection: close\r\n\r\n"
        return json.loads(self._good(self._ask(request.encode())))["data"]

    def _ask(self, request: bytes) -> Message:
        sock = socket.create_connection(("127.0.0.1", self.port), self.patience, (self.address, 0))
        with Wire(client_context().wrap_socket(sock) if self.tls else sock) as wire:
            wire.sock.settimeout(self.patience)
            wire.send(request)
            return wire.message()

    def _good(self, answer: Message) -> bytes:
        """The body of an answer of 200; Refused if it is another one."""
        if answer.status != 200:
            raise Refused(answer.status, answer.first[13:].decode("latin-1"))
        return answer.body


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
        self.pve = self.enterContext(FakePVE(tls=""))

    def ask(self, target: str, method: str = "GET", *, body: str = "", token: str = TOKEN, extra: str = "") -> Message:
        """The answer to one request on a connection of its own."""
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        with Wire.to(self.pve.port) as wire:
            wire.send(f"{method} {target} HTTP/1.1\r\nAuthorization: {token}\r\n{extra}{length}\r\n{body}".encode())
            return wire.message()

    def data(self, target: str, token: str = TOKEN) -> Any:
        """The data of a GET of the API."""
        return json.loads(self.ask("/api2/json" + target, token=token).body)["data"]

    def clone(self, newid: object, source: object = 9000, kind: str = "lxc", token: str = TOKEN) -> Message:
        """The answer to a clone call."""
        return self.ask(f"/api2/json/nodes/pve/{kind}/{source}/clone", "POST", body=f"newid={newid}", token=token)

    def text(self, answer: Message) -> str:
        """Status and reason of an answer."""
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
            wire.send(GET)
            self.assertEqual(wire.message().status, 200)
            wire.send(f"GET / HTTP/1.1\r\n{padding(64)}{call}\r\nAuthorization: {TOKEN}\r\n\r\n".encode())
            self.assertIn(b"vzclone", wire.message().body)
        self.assertEqual([record.newid for record in self.pve.clones], ["953"])
        with Wire.to(self.pve.port) as wire:
            wire.send(GET)
            wire.message()
            wire.send(f"GET / HTTP/1.1\r\n{padding(65)}{call}\r\n\r\n".encode())
            self.assertEqual(self.text(wire.message()), "400 bad request", "only the line behind the dropped one can be one")

    def test_underscores_in_names_are_hyphens(self) -> None:
        head = f"POST /api2/json/nodes/pve/lxc/9000/clone HTTP/1.1\r\nAuthorization: {TOKEN}\r\nContent_Length: 9\r\n\r\n"
        with Wire.to(self.pve.port) as wire:
            wire.send(head.encode() + b"newid=201")
            self.assertEqual(wire.message().status, 200)

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
            ("newid=7", "newid=8", form, "7"),
            ("", "a=1;newid=201&b", form, "201"),
            ("", "newid=904=5", form, "904"),
            ("", "new%69d=+2%301", form, " 201"),
            ("", "newid=1;newid=2&newid=3", form, ["1", "2", "3"]),
            ("", "newid=", form, ""),
            ("", "newid", form, None),
            ("newid=3", "newid=1&newid=2", form, "3"),
            ("", '{"newid":9}', as_json, 9),
            ("", '{"newid":"9"}', "application/json; charset=utf-8", "9"),
            ("", '{"newid":9}', form, None),
        ]:
            with self.subTest(query=query, body=body):
                self.assertEqual(parameters_of(query, body.encode(), content_type).get("newid"), newid)
        for newid, text in [
            ("1&newid=1", "403 Permission check failed"), ("", "400 Parameter verification failed."),
            ("x", "400 Parameter verification failed."), ("99", "400 Parameter verification failed."), ("0201", "200 OK"),
        ]:  # fmt: skip
            with self.subTest(newid):
                self.assertEqual(self.text(self.clone(newid)), text)
        self.assertIn("201", self.pve.guests)

    def test_refusals_of_clones_and_their_order(self) -> None:
        self.pve.clone_seconds = ENDLESS
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
        self.pve.clone_seconds = ENDLESS
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
        self.pve.clone_seconds = ENDLESS
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
                wire.send(f"GET /api2/json{path} HTTP/1.1\r\nAuthorization: {TOKEN}\r\n\r\n".encode())
                self.assertEqual(wire.message().all("connection"), connection)

    def test_workers_that_are_killed_stopped_or_not_started(self) -> None:
        self.pve.clone_seconds = ENDLESS
        self.clone(201)
        self.clone(202, 9001)
        killed, stopped = self.pve.tasks
        self.pve.kill_worker(killed)
        self.pve.stop_task(stopped)
        self.pve.clone_faults.append("no-worker")
        self.assertEqual(self.text(self.clone(203, 9002)), "500 got no worker upid - start worker failed")
        statuses = [self.data(f"/nodes/pve/tasks/{upid}/status")["exitstatus"] for upid in (killed, stopped)]
        self.assertEqual(statuses, ["unexpected status", "clone failed: interrupted by signal"])
        self.assertEqual(self.pve.locks, {"9000": "disk", "201": "create", "9002": "disk", "203": "create"})
        self.assertNotIn("202", self.pve.guests)

    def test_pve_away(self) -> None:
        with Wire.to(self.pve.port) as idle:
            idle.send(GET)
            idle.message()
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
        self.pve.clone_seconds = ENDLESS
        chooser = Chooser(self.pve.port, tries=2)
        for number, choose in enumerate(
            [chooser.by_list, chooser.by_nextid, chooser.by_probe, chooser.by_nextid_then_probe], 100
        ):
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


class Durations(unittest.TestCase):
    def test_go_syntax(self) -> None:
        for text, seconds in [
            ("300ms", 0.3), ("1.5h", 5400), ("1m30s", 90), (".5s", 0.5), ("0", 0), ("5m", 300), ("1h30m", 5400),
            ("2.s", 2), ("100us", 1e-4), ("7µs", 7e-6), ("1000000ns", 1e-3), ("+3s", 3),
        ]:  # fmt: skip
            with self.subTest(text):
                self.assertAlmostEqual(program.parse_duration(text), seconds)

    def test_refuses_what_go_refuses(self) -> None:
        for text in ["", "5", "s", "1 s", "-1s", "1x", "1s ", ".s", "1e3s", "٣s", "1_0s", "0x1s", "9" * 40 + "h", "+"]:
            with self.subTest(text), self.assertRaises(ValueError):
                program.parse_duration(text)


class Flags(unittest.TestCase):
    def test_defaults(self) -> None:
        settings = program.parse_flags([])
        self.assertEqual(settings.listen, ("", 8081))
        self.assertEqual(str(settings.backend), "https://127.0.0.1:8006")
        self.assertEqual((settings.insecure, settings.poll_delay, settings.task_timeout), (True, 0.5, 300))
        self.assertEqual((settings.request_timeout, settings.queue_size, settings.lock_timeout), (30, 100, 300))

    def test_go_syntax(self) -> None:
        settings = program.parse_flags(
            ["--listen", "[::1]:1", "-backend=http://pve.example:80", "-insecure=false", "--verbose", "-queue-size=3"]
        )
        self.assertEqual(settings.listen, ("::1", 1))
        self.assertEqual(settings.backend.authority, "pve.example:80")
        self.assertEqual((settings.insecure, settings.verbose, settings.queue_size), (False, True, 3))
        self.assertTrue(program.parse_flags(["-insecure=false", "-insecure"]).insecure)

    def test_errors_name_flag_and_value(self) -> None:
        for arguments, words in [
            (["-poll-delay", "5"], ["-poll-delay", "'5'"]),
            (["-poll-delay"], ["-poll-delay", "needs a value"]),
            (["-nonsense"], ["-nonsense"]),
            (["-insecure", "false"], ["'false'"]),
            (["-insecure=maybe"], ["-insecure", "'maybe'"]),
            (["-listen", "8081"], ["-listen", "'8081'"]),
            (["-listen", ":99999"], ["-listen", "':99999'"]),
            (["-backend", "https://host/path"], ["-backend", "'https://host/path'"]),
            (["-backend", "ftp://host"], ["-backend"]),
            (["-backend", "https://u@host"], ["-backend"]),
            (["-queue-size", "0"], ["-queue-size", "'0'"]),
            (["-queue-size", "+5"], ["-queue-size", "'+5'"]),
            (["-task-timeout", "0"], ["-task-timeout"]),
            (["-answer", "never"], ["-answer", "'never'"]),
            (["-tls-cert", "x"], ["-tls-cert", "-tls-key"]),
            (["--", "x"], ["'--'"]),
        ]:
            with self.subTest(arguments), self.assertRaises(program.FlagError) as caught:
                program.parse_flags(arguments)
            for word in words:
                self.assertIn(word, str(caught.exception))


def request_of(first_line: str) -> program.Request:
    """A parsed request."""
    return program.Request(first_line.encode("latin-1") + b"\r\nHost: pve\r\n")


class CloneRecognition(unittest.TestCase):
    """A path is a clone when PVE reads it as one."""

    def test_spellings_that_pve_accepts(self) -> None:
        for target in [
            "/api2/json/nodes/pve/lxc/9000/clone",
            "/api2/json/nodes/pve/lxc/9000/clone/",
            "/api2/json//nodes/pve/lxc/9000//clone",
            "/api2/json/nodes/pve/lxc/9000/%63lone",
            "/api2/json/nodes/pve%2Flxc/9000/clone",
            "/api2/json/nodes/pve/lxc/9000/clone?newid=5",
            "/api2/json/nodes/pve/lxc/9000/clone%0A",
            "/api2/json/nodes/pve/lxc/9000/clone/%0a",
            "/%61pi2/json/nodes/any thing/lxc/1/clone".replace(" ", "%20"),
            "/api2/json/nodes/localhost/lxc/00000000000000000000001/clone",
            "http://elsewhere/api2/json/nodes/pve/lxc/9000/clone",
        ]:
            with self.subTest(target):
                self.assertIsNotNone(program.clone_call(request_of(f"POST {target} HTTP/1.1"), False))

    def test_everything_else_is_relayed(self) -> None:
        for line in [
            "GET /api2/json/nodes/pve/lxc/9000/clone",
            "PUT /api2/json/nodes/pve/lxc/9000/clone",
            "POST /api2/extjs/nodes/pve/lxc/9000/clone",
            "POST /api2/json/nodes/pve/qemu/9000/clone",
            "POST /api2/json/nodes/pve/lxc/9000/clone/x",
            "POST /api2/json/nodes/pve/lxc/9000/snapshot",
            "POST /api2/json/nodes/pve/lxc/9000/%2563lone",
            "POST /api2/json/nodes/pve/lxc/x9000/clone",
            "POST /api2/json/nodes/pve/lxc/%D9%A3/clone",
            "POST /api2/json/nodes/pve/lxc/clone",
            "POST /?/api2/json/nodes/pve/lxc/9000/clone",
        ]:
            with self.subTest(line):
                self.assertIsNone(program.clone_call(request_of(f"{line} HTTP/1.1"), False))

    def test_vms_when_asked_for(self) -> None:
        request = request_of("POST /api2/json/nodes/n/qemu/9/clone HTTP/1.1")
        self.assertEqual(program.clone_call(request, True), ("qemu", "n", "9", "", ""))

    def test_newid_in_all_three_places(self) -> None:
        request = request_of("POST /x?newid=7 HTTP/1.1")
        self.assertEqual(program.newid_of(request, b""), "7")
        self.assertEqual(program.newid_of(request, b"full=1&newid=8"), "8")
        self.assertEqual(program.newid_of(request, b'{"newid": 9}'), "9")
        self.assertEqual(program.newid_of(request, b'{"newid": "10"}'), "10")
        self.assertEqual(program.newid_of(request_of("POST /x HTTP/1.1"), b'{"newid": [1]}'), "")
        self.assertEqual(program.newid_of(request, b"[" * 100000), "7")


class LockTexts(unittest.TestCase):
    def test_refusals(self) -> None:
        for kind, text, locked in [
            ("lxc", "CT is locked (disk)", True),
            ("lxc", "CT is locked (backup)", True),
            ("lxc", "can't lock file '/run/lock/lxc/pve-config-9000.lock' - got timeout", True),
            ("lxc", "cfs-lock 'firewall-vm-105' error: got lock request timeout", True),
            ("qemu", "VM is locked (clone)", True),
            ("lxc", "VM is locked (clone)", False),
            ("qemu", "CT is locked (disk)", False),
            ("lxc", "can't lock file '/run/lock/lxc/pve-config-105.lock' - got timeout", False),
            ("lxc", "cfs-lock 'firewall-vm-9000' error: got lock request timeout", False),
            ("lxc", "can't lock file '/var/log/pve/tasks/.active.lock' - got timeout", False),
            ("lxc", "CT is locked (disk) at somewhere", False),
            ("lxc", "CT is locked", False),
            ("lxc", "CT 105 already exists on node 'pve'", False),
            ("lxc", "got no worker upid - start worker failed", False),
        ]:
            with self.subTest(kind=kind, text=text):
                match = program.locked_refusals(kind, "9000", "105").fullmatch(text)
                self.assertEqual(match is not None, locked)

    def test_exit_statuses(self) -> None:
        for kind, text, again in [
            ("lxc", "clone failed: can't lock file '/var/lock/pve-manager/pve-storage-local-lvm' - got timeout", True),
            ("lxc", "clone failed: cfs-lock 'storage-x' error: got lock request timeout", True),
            ("lxc", "clone failed: can't add VM 105 to pool 'p': cfs-lock 'file-user_cfg' error: got lock request timeout",
             True),
            ("qemu", "can't lock file '/var/lock/qemu-server/lock-9000.conf' - got timeout", True),
            ("lxc", "can't lock file '/var/lock/qemu-server/lock-9000.conf' - got timeout", False),
            ("qemu", "can't lock file '/var/lock/qemu-server/lock-105.conf' - got timeout", False),
            ("lxc", "clone failed: can't lock file '/run/lock/lxc/pve-config-105.lock' - got timeout", False),
            ("lxc", "can't lock file '/var/lock/pve-manager/pve-storage-local-lvm' - got timeout", False),
            ("lxc", "clone failed: unable to create image: got lock timeout - aborting command", False),
            ("lxc", "unexpected status", False),
        ]:  # fmt: skip
            with self.subTest(kind=kind, text=text):
                match = program.contention_statuses(kind, "9000", "105").fullmatch(text)
                self.assertEqual(match is not None, again)


class Upids(unittest.TestCase):
    def test_what_is_polled(self) -> None:
        def upid_in(data: object, status: int = 200) -> str | None:
            body = json.dumps({"data": data}).encode()
            head = b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n" % (status, len(body))
            return program.upid_of(program.Answer(program.Response(head, b"POST"), body))

        good = "UPID:pve:000010C3:0004305D:6B051704:vzclone:9000:root@pam!ci:"
        self.assertEqual(upid_in(good), good)
        self.assertEqual(upid_in("UPID:" + "x" * 495), "UPID:" + "x" * 495)
        self.assertIsNone(upid_in(good, 500))
        table: list[object] = [
            "UPID:" + "x" * 496, "UPID:a b", "UPID:a/b", "UPID:a%62", "UPID:a?b", "UPID:a#b", "UPID:a\n", "UPID:",
                    "UPID:é", "upid:x", "xUPID:x", None, 5, ["UPID:x"], {}]  # fmt: skip
        for bad in table:
            with self.subTest(bad):
                self.assertIsNone(upid_in(bad))


class LocalProcesses(unittest.TestCase):
    def test_finds_the_very_process_and_sees_its_end(self) -> None:
        child = subprocess.Popen(["sleep", "60"])
        with open(f"/proc/{child.pid}/stat") as file:
            start = int(file.read().rpartition(")")[2].split()[19])
        upid = f"UPID:pve:{child.pid:08X}:{{:08X}}:6B051704:vzclone:9000:root@pam:"
        self.assertIsNone(program.LocalProcess.find(upid.format(start + 1)))
        process = program.LocalProcess.find(upid.format(start))
        assert process
        self.assertFalse(process.wait(0.01))
        child.kill()
        self.assertFalse(process.wait(0.2), "a zombie still counts as running")
        child.wait()
        self.assertTrue(process.wait(0.0))
        process.close()
        self.assertIsNone(program.LocalProcess.find(upid.format(start)))

    def test_nonsense(self) -> None:
        for upid in ["UPID:x", "UPID:pve:00000000:00000000:", "UPID:pve:FFFFFFFF:00000001:"]:
            self.assertIsNone(program.LocalProcess.find(upid))


# The program's command line


class CommandLine(unittest.TestCase):
    def run_program(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, timeout=LONG)

    def test_wrong_flags_exit_with_2_and_one_line(self) -> None:
        for arguments in [["-poll-delay", "x"], ["-insecure=false", "-ca", "/nonexistent.pem"], ["extra"],
                          ["-insecure=false", "-ca", PROGRAM],
                          ["-tls-cert", "/nonexistent.pem", "-tls-key", "/nonexistent.pem"]]:  # fmt: skip
            with self.subTest(arguments):
                result = self.run_program(*arguments)
                self.assertEqual(result.returncode, 2)
                self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
                self.assertIn(arguments[-1], result.stderr)

    def test_addresses_that_fail_exit_with_1(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for address in [f"127.0.0.1:{port}", "192.0.2.1:80", "no-such-host.invalid:80"]:
                with self.subTest(address):
                    result = self.run_program("-listen", address)
                    self.assertEqual(result.returncode, 1)
                    self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
                    self.assertIn(address, result.stderr)

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
            proxy.wait_log(r"^<4>CLONE FAILED: node=pve vmid=777 status=500 unable to find configuration file")
            proxy.wait_log(r"^<6>CLONE QUEUED: node=pve vmid=777")


# Relaying


class Relaying(unittest.TestCase):
    def test_target_fields_and_body_go_through_byte_for_byte(self) -> None:
        answer = (b"HTTP/1.1 299 Very \xfcnusual  Reason\r\nX-One: 1\r\nset-cookie: a=1\r\nSET-COOKIE: b=2\r\n"
                  b"Content-Length: 4\r\nX-Last:\r\n\r\n\0\1\r\n")  # fmt: skip
        with answering(answer) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(b"PUT /a%2Fb//c/?q=%20&a;b HTTP/1.1\r\nHost: the.host:99\r\nX-b: 2\r\nx-A:  1 \r\nX-b: 3\r\n"
                      b"Content-Length: 5\r\n\r\n12\r\n3")  # fmt: skip
            got = wire.until(b"\r\n\r\n") + wire.exactly(4)
            self.assertEqual(got, answer)
            request = backend.requests[0]
            self.assertEqual(request.first, b"PUT /a%2Fb//c/?q=%20&a;b HTTP/1.1")
            self.assertEqual(request.fields, [(b"Host", b"the.host:99"), (b"X-b", b"2"), (b"x-A", b" 1 "), (b"X-b", b"3"),
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
            for fields, address in [
                ([], b"127.0.0.1"),
                (["X-Forwarded-For: 192.0.2.7"], b"192.0.2.7"),
                (["X-Forwarded-For: 10.0.0.1, 192.0.2.7"], b"192.0.2.7"),
                (["X-Forwarded-For: 10.0.0.1", "x-forwarded-for: 2001:db8::1"], b"2001:db8::1"),
                (["X-Forwarded-For: ::ffff:192.0.2.9"], b"192.0.2.9"),
                (["X-Forwarded-For: 192.0.2.7, nonsense"], b"127.0.0.1"),
                (["X-Forwarded-For: 192.0.2.7:80"], b"127.0.0.1"),
                (["X-Forwarded-For: fe80::1%x AUTH FAILED"], b"fe80::1"),
            ]:
                with self.subTest(fields):
                    proxy.get("/", *fields)
                    self.assertEqual(backend.requests[-1].all("x-forwarded-for"), [address])

    def test_http_1_0_request_without_host_gets_the_backends(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(b"GET / HTTP/1.0\r\n\r\n")
            self.assertEqual(wire.message().body, b"ok")
            self.assertTrue(wire.closed())
            self.assertEqual(backend.requests[0].get("host"), f"127.0.0.1:{backend.port}".encode())

    def test_absolute_form_uses_path_and_query_alone(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            for target, path in [(b"http://evil.example/a?b", b"/a?b"), (b"https://evil.example", b"/"),
                                 (b"HTTP://evil.example?q", b"/?q")]:  # fmt: skip
                self.assertEqual(proxy.ask(b"GET " + target + b" HTTP/1.1\r\nHost: h\r\n\r\n").status, 200)
                self.assertEqual(backend.requests[-1].first, b"GET " + path + b" HTTP/1.1")
                self.assertEqual(backend.requests[-1].get("host"), b"h")
            self.assertEqual(proxy.ask(b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n").status, 200)
            self.assertEqual(backend.requests[-1].first, b"OPTIONS * HTTP/1.1")

    def test_empty_line_before_a_request_is_skipped(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            self.assertEqual(proxy.ask(b"\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n").status, 200)

    def test_pipelined_requests_are_answered_in_order(self) -> None:
        def script(wire: Wire) -> None:
            while True:
                path = backend.request(wire).first.split()[1]
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path))

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
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
                    keep = b"Connection: keep-alive\r\n" if version == b"1.0" else b""
                    request = b"GET /%d HTTP/%b\r\nHost: h\r\n%b\r\n" % (index, version, keep)
                    wire.send(request)
                    response = wire.message()
                    self.assertEqual((response.fields, response.body), (fields, body))
                    if closes:
                        self.assertTrue(wire.closed())
                    else:
                        wire.send(request)
                        self.assertEqual(wire.message().body, body)

    def test_head_answers_have_no_body(self) -> None:
        with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n") as backend, Proxy(backend.url) as proxy:
            with proxy.wire() as wire:
                wire.send(b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n" * 2)
                for _ in range(2):
                    self.assertEqual(wire.message(no_body=True).get("content-length"), b"99")

    def test_interim_answers_reach_http_1_1_clients(self) -> None:
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        with answering(interim * 2 + OK) as backend, Proxy(backend.url) as proxy:
            with proxy.wire() as wire:
                wire.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                self.assertEqual([wire.message().status for _ in range(3)], [103, 103, 200])
            self.assertEqual(proxy.ask(b"GET / HTTP/1.0\r\n\r\n").status, 200)
        with answering(interim * 11 + OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            self.assertEqual([wire.message().status for _ in range(11)], [103] * 10 + [502])

    def test_expect_is_answered_here(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-Continue\r\nContent-Length: 3\r\n\r\n")
            self.assertEqual(wire.message().first, b"HTTP/1.1 100 Continue")
            wire.send(b"abc")
            self.assertEqual(wire.message().body, b"ok")
            self.assertIsNone(backend.requests[0].get("expect"))
            self.assertEqual(backend.requests[0].body, b"abc")

    def test_error_of_an_unreachable_backend_has_pves_shape(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        with Proxy(f"https://127.0.0.1:{port}") as proxy:
            response = proxy.get("/")
            self.assertEqual(response.status, 502)
            content = json.loads(response.body)
            self.assertEqual(content, {"data": None, "message": response.first[13:].decode()})
            self.assertIn("can't be reached", content["message"])

    def test_verbose_logs_requests_without_queries(self) -> None:
        with answering(OK) as backend, Proxy(backend.url, "-verbose") as proxy:
            proxy.get("/path?secret=1", "Authorization: hidden")
            proxy.wait_log(r"RELAYED: GET /path status=200 bytes=\d+ time=")
            self.assertEqual(proxy.lines("secret|hidden"), [])

    def test_failed_logins_are_logged_with_the_clients_address(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            for format_, status in [("json", 401), ("extjs", 200)]:
                body = "username=root@pam&password=bad"
                request = (f"POST /api2/{format_}/access/ticket HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 192.0.2.7\r\n"
                           f"Content-Length: {len(body)}\r\n\r\n{body}")  # fmt: skip
                self.assertEqual(proxy.ask(request.encode()).status, status)
                self.assertEqual(proxy.ask(request.replace("bad", "good").replace("30", "31").encode()).status, 200)
                proxy.wait_log(rf"AUTH FAILED: client=192\.0\.2\.7 path=/api2/{format_}/access/ticket$")
            self.assertEqual(len(proxy.lines("AUTH FAILED")), 2)

    def test_many_requests_gather_the_connections_on_one_cpu_until_they_end(self) -> None:
        everywhere = os.sched_getaffinity(0)
        with FakePVE() as pve, Proxy(pve.url, constants="program.BUSY = 0") as proxy:
            wires = [proxy.wire(), proxy.wire()]
            tasks = f"/proc/{proxy.process.pid}/task"

            def places() -> list[set[int]]:
                return [os.sched_getaffinity(int(thread)) for thread in os.listdir(tasks)]

            def gathered() -> bool:
                for wire in wires:
                    wire.send(GET)
                    self.assertEqual(wire.message().status, 200)
                bound = [cpus for cpus in places() if len(cpus) == 1]
                return len(bound) >= len(wires) and bound.count(bound[0]) == len(bound)

            wait_until(gathered)
            wires.append(proxy.wire())  # one that comes later
            wait_until(gathered)
            wait_until(lambda: all(cpus == everywhere for cpus in places()))
            for wire in wires:
                wire.close()

    def test_certificates_old_and_new_are_verified(self) -> None:
        for kind, ca, other in [("old", OLD_CA, NEW_CA), ("new", NEW_CA, OLD_CA)]:
            with self.subTest(kind), FakePVE(tls=kind) as pve:
                with Proxy(pve.url, "-insecure=false", "-ca", pem_file(ca)) as proxy:
                    self.assertEqual(proxy.get("/").status, 200)
                with Proxy(pve.url, "-insecure=false", "-ca", pem_file(other)) as proxy:
                    response = proxy.get("/")
                    self.assertEqual(response.status, 502)
                    self.assertIn(b"certificate verify failed", response.first)


class BackendConnections(unittest.TestCase):
    """Which connections are used again, and which never."""

    def test_safe_requests_share_a_connection_and_others_do_not(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            with proxy.wire() as wire:  # on one connection: its thread has given the backend's back when it reads on
                for _ in range(5):
                    wire.send(GET)
                    self.assertEqual(wire.message().status, 200)
            self.assertEqual(backend.connections, 1)
            for _ in range(3):
                proxy.ask(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx")
            self.assertEqual(backend.connections, 4)

    def test_a_connection_that_turns_out_closed_is_not_the_clients_problem(self) -> None:
        release = threading.Event()

        def script(wire: Wire) -> None:
            backend.request(wire)
            wire.send(OK)
            # Wait for the second request, so that the close can't be seen before it is sent.
            if not release.is_set():
                wire.more()
                release.set()
                wire.reset()

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            for _ in range(2):
                wire.send(GET)
                self.assertEqual(wire.message().status, 200)
            self.assertTrue(release.is_set())
            self.assertEqual(backend.connections, 2)

    def test_not_used_again(self) -> None:
        post = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
        for what, request, answer in [
            ("carried a chunked request", post, OK),
            ("has a byte beyond its answer", GET, OK + b"H"),
            ("answered with close", GET, OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")),
            ("answered in HTTP/1.0", GET, OK.replace(b"1.1", b"1.0")),
        ]:
            with self.subTest(what), answering(answer, OK) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
                for each in (request, GET):
                    wire.send(each)
                    self.assertEqual(wire.message().body, b"ok")
                self.assertEqual(backend.connections, 2)

    def test_bytes_behind_an_answer_that_only_tls_knows_of(self) -> None:
        def script(wire: Wire) -> None:
            backend.request(wire)
            wire.send(OK[:-2])
            wire.send(b"okHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
            wire.more()

        with ScriptedBackend(script, tls=True) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            for _ in range(3):
                wire.send(GET)
                self.assertEqual(wire.message().body, b"ok")
            self.assertEqual(backend.connections, 3)

    def test_bytes_that_follow_later_spoil_no_other_answer(self) -> None:
        sent = threading.Event()

        def script(wire: Wire) -> None:
            backend.request(wire)
            wire.send(OK)
            if backend.connections == 1:
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
                sent.set()
                wire.more()

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(GET)
            wire.message()
            self.assertTrue(sent.wait(LONG))
            wire.send(GET)
            self.assertEqual(wire.message().body, b"ok")


BAD_REQUESTS: list[tuple[str, bytes, int]] = [
    ("obsolete folding", b"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n", 400),
    ("blank before the colon", b"GET / HTTP/1.1\r\nHost : h\r\n\r\n", 400),
    ("no colon", b"GET / HTTP/1.1\r\nHost: h\r\nnonsense\r\n\r\n", 400),
    ("empty name", b"GET / HTTP/1.1\r\nHost: h\r\n: x\r\n\r\n", 400),
    ("name is no token", b"GET / HTTP/1.1\r\nHost: h\r\nX(y): x\r\n\r\n", 400),
    ("8-bit name", b"GET / HTTP/1.1\r\nHost: h\r\nX\xe9: x\r\n\r\n", 400),
    ("NUL in a value", b"GET / HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n", 400),
    ("bare CR in a value", b"GET / HTTP/1.1\r\nHost: h\r\nX: a\rb\r\n\r\n", 400),
    ("control byte in a value", b"GET / HTTP/1.1\r\nHost: h\r\nX: a\x1bb\r\n\r\n", 400),
    ("DEL in a value", b"GET / HTTP/1.1\r\nHost: h\r\nX: a\x7fb\r\n\r\n", 400),
    ("bare LF ends a line", b"GET / HTTP/1.1\nHost: h\r\n\r\n", 400),
    ("bare LF ends all lines", b"GET / HTTP/1.1\nHost: h\n\n", 400),
    ("101 fields", b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: 1\r\n" * 100 + b"\r\n", 431),
    ("head over 64 KiB", b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 66000 + b"\r\n\r\n", 431),
    ("head without an end", b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 80000, 431),
    ("request line over 16 KiB", b"GET /" + b"a" * 17000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
    ("request line without an end", b"GET /" + b"a" * 20000, 414),
    ("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505),
    ("HTTP/0.9", b"GET / HTTP/0.9\r\nHost: h\r\n\r\n", 505),
    ("an HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("no version", b"GET /\r\nHost: h\r\n\r\n", 400),
    ("lower-case version", b"GET / http/1.1\r\nHost: h\r\n\r\n", 400),
    ("HTTP/1.10", b"GET / HTTP/1.10\r\nHost: h\r\n\r\n", 400),
    ("two blanks", b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("blank at the end", b"GET / HTTP/1.1 \r\nHost: h\r\n\r\n", 400),
    ("tab in the request line", b"GET\t/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("leading blank", b" GET / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("blank in the target", b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("8-bit byte in the target", b"GET /\xe9 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("control byte in the target", b"GET /\x01 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("fragment in the target", b"GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("target without a slash", b"GET a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("target begins with //", b"POST //api2/json/nodes/pve/lxc/1/clone HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("// in absolute-form", b"GET http://h//x HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("userinfo", b"GET http://u:p@h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("no authority", b"GET http:///x HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("another scheme", b"GET ftp://h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("CONNECT", b"CONNECT h:443 HTTP/1.1\r\nHost: h:443\r\n\r\n", 501),
    ("* without OPTIONS", b"GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("method is no token", b"G@T / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("no Host", b"GET / HTTP/1.1\r\n\r\n", 400),
    ("Content_Length", b"POST / HTTP/1.1\r\nHost: h\r\nContent_Length: 0\r\nContent-Length: 3\r\n\r\nabc", 400),
    ("Transfer_Encoding", b"POST / HTTP/1.1\r\nHost: h\r\nTransfer_Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc", 400),
    ("X_Forwarded-For", b"GET / HTTP/1.1\r\nHost: h\r\nX_Forwarded-For: 192.0.2.1\r\n\r\n", 400),
    ("two Hosts", b"GET / HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n", 400),
    ("Host with a path", b"GET / HTTP/1.1\r\nHost: h/x\r\n\r\n", 400),
    ("Host with userinfo", b"GET / HTTP/1.1\r\nHost: u@h\r\n\r\n", 400),
    ("Content-Length with a sign", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +3\r\n\r\nabc", 400),
    ("Content-Length with an underscore", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1_0\r\n\r\nabc", 400),
    ("negative Content-Length", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", 400),
    ("empty Content-Length", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: \r\n\r\n", 400),
    ("hexadecimal Content-Length", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0x3\r\n\r\nabc", 400),
    ("Content-Length of 19 digits", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000000000000\r\n\r\n", 400),
    ("two different lengths", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
    ("a list of lengths", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3, 4\r\n\r\nabc", 400),
    ("both framings", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ("another coding", b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
    ("chunked twice", b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, chunked\r\n\r\n", 501),
    ("xchunked", b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n", 501),
    ("two codings", b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ("vertical tab before chunked", b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: \x0bchunked\r\n\r\n", 400),
    ("chunked in HTTP/1.0", b"POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("another Expect", b"POST / HTTP/1.1\r\nHost: h\r\nExpect: magic\r\nContent-Length: 1\r\n\r\n", 417),
    ("a TLS handshake", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
]

BAD_CHUNKS = [
    (b"+3\r\nabc\r\n0\r\n\r\n", "sign"),
    (b"0x3\r\nabc\r\n0\r\n\r\n", "0x"),
    (b"1_0\r\nabc\r\n0\r\n\r\n", "underscore"),
    (b" 3\r\nabc\r\n0\r\n\r\n", "leading blank"),
    (b"3 \r\nabc\r\n0\r\n\r\n", "trailing blank"),
    (b"\r\nabc\r\n0\r\n\r\n", "no size"),
    (b"3\nabc\r\n0\r\n\r\n", "bare LF"),
    (b"3\r\nabcd\r\n0\r\n\r\n", "longer than its size"),
    (b"3\r\nabc\n0\r\n\r\n", "bare LF behind a chunk"),
    (b"11111111111111111\r\nabc\r\n0\r\n\r\n", "17 digits"),
    (b"3;" + b"x" * 300 + b"\r\nabc\r\n0\r\n\r\n", "long extension"),
    (b"3;a\x00b\r\nabc\r\n0\r\n\r\n", "NUL in an extension"),
    (b"3\r\nabc\r\n0\r\nbad trailer\r\n\r\n", "malformed trailer"),
    (b"3\r\nabc\r\n0\r\n" + b"T: " + b"x" * 70000 + b"\r\n\r\n", "long trailers"),
]

BAD_ANSWERS = [
    ("two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!"),
    ("both framings", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("another coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"),
    ("bad length", b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok"),
    ("bare CR in a field", b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: evil\r\nContent-Length: 2\r\n\r\nok"),
    ("bare LF", b"HTTP/1.1 200 OK\r\nX: a\nSet-Cookie: evil\r\nContent-Length: 2\r\n\r\nok"),
    ("folding", b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nok"),
    ("NUL", b"HTTP/1.1 200 OK\r\nX: \0\r\nContent-Length: 2\r\n\r\nok"),
    ("no status", b"HTTP/1.1 OK\r\n\r\n"),
    ("bad status", b"HTTP/1.1 20 OK\r\n\r\n"),
    ("another version", b"HTTP/2.0 200 OK\r\n\r\n"),
    ("no HTTP", b"SSH-2.0-OpenSSH\r\n\r\n"),
    ("an unasked 101", SWITCHING),
    ("a huge head", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000 + b"\r\n\r\n"),
    ("nothing", b""),
    ("half a head", b"HTTP/1.1 200 OK\r\nContent-Le"),
]


class Strictness(unittest.TestCase):
    def test_bad_requests_get_a_reason_and_never_reach_the_backend(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            for what, request, status in BAD_REQUESTS:
                with self.subTest(what), proxy.wire() as wire:
                    wire.send(request)
                    response = wire.message()
                    self.assertEqual(response.status, status, response.first)
                    self.assertEqual(response.get("connection"), b"close")
                    self.assertEqual(json.loads(response.body)["message"].encode(), response.first[13:])
                    self.assertTrue(wire.closed())
            self.assertEqual(backend.connections, 0)

    def test_bad_chunks_are_refused_and_cut_off(self) -> None:
        got: list[bytes] = []

        def script(wire: Wire) -> None:
            got.append(wire.rest())

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy:
            for body, what in BAD_CHUNKS:
                with self.subTest(what):
                    got.clear()
                    response = proxy.ask(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
                    self.assertEqual(response.status, 400, response.first)
                    wait_until(lambda: got, "the backend's connection to be closed")
                    self.assertNotIn(b"\r\n0\r\n", got[0], "an incomplete body was made to look complete")

    def test_good_chunks_pass(self) -> None:
        with answering(OK) as backend, Proxy(backend.url) as proxy:
            body = b"3;ext=\"a\"\r\nabc\r\n0A\r\n0123456789\r\n000\r\nT: 1\r\nU: 2\r\n\r\n"
            with proxy.wire() as wire:
                for byte in b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: Chunked\r\n\r\n" + body:
                    wire.send(bytes([byte]))
                self.assertEqual(wire.message().status, 200)
                self.assertEqual(backend.requests[0].body, b"abc0123456789")
                self.assertEqual(backend.requests[0].all("transfer-encoding"), [b"chunked"])

    def test_bad_answers_become_a_502(self) -> None:
        with by_path([answer for _, answer in BAD_ANSWERS]) as backend, Proxy(backend.url) as proxy:
            for index, (what, _) in enumerate(BAD_ANSWERS):
                with self.subTest(what):
                    response = proxy.get(f"/{index}")
                    self.assertEqual(response.status, 502)
                    self.assertNotIn(b"evil", response.first + response.body)

    def test_answers_that_break_off_never_look_complete(self) -> None:
        begin = b"HTTP/1.1 200 OK\r\n"
        table = [
            ("length", begin + b"Content-Length: 10\r\n\r\n12345"),
            ("chunks", begin + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n"),
            ("in a chunk", begin + b"Transfer-Encoding: chunked\r\n\r\n9\r\n12345"),
            ("bad chunk", begin + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\nx\r\n"),
            ("in trailers", begin + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n0\r\nT: 1\r\n"),
        ]
        with by_path([answer for _, answer in table]) as backend, Proxy(backend.url) as proxy:
            for index, (what, _) in enumerate(table):
                for version in (b"1.1", b"1.0"):
                    with self.subTest(what, version=version), proxy.wire() as wire:
                        with self.assertRaises((EOFError, ConnectionResetError)):
                            wire.send(b"GET /%d HTTP/%b\r\nHost: h\r\n\r\n" % (index, version))
                            wire.message()

    def test_a_fuzzer_finds_nothing(self) -> None:
        """Mutated requests: no traceback, no leak, and a victim always gets its own answer."""

        def script(wire: Wire) -> None:
            while True:
                path = wire.message().first.split(b" ")[1]
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path))

        rng = random.Random(20261124)
        good = [
            b"GET /a HTTP/1.1\r\nHost: h\r\nCookie: a=b\r\n\r\n",
            b"POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n12345",
            b"PUT /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n0\r\n\r\n",
            b"GET /d HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            clone_request(101),
        ]
        tokens = [b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n",
                  b"0\r\n\r\n", b"HTTP/1.1", b"GET ", b"//", b"%", b"\xff", b"Expect: 100-continue\r\n", b"9" * 30]  # fmt: skip
        with ScriptedBackend(script) as backend, Proxy(backend.url, "-request-timeout", "2s") as proxy:
            proxy.get("/warm")
            descriptors, threads = proxy.descriptors(), proxy.threads()
            with proxy.wire() as victim:
                for round_ in range(300):
                    data = bytearray(rng.choice(good))
                    for _ in range(rng.randint(1, 4)):
                        at = rng.randrange(len(data))
                        what = rng.randrange(3)
                        if what == 0:
                            data[at : at + rng.randint(0, 3)] = rng.choice(tokens)
                        elif what == 1:
                            data[at] = rng.randrange(256)
                        else:
                            del data[at : at + rng.randint(1, 8)]
                    with contextlib.suppress(OSError), proxy.wire() as wire:
                        wire.send(bytes(data))
                        wire.sock.shutdown(socket.SHUT_WR)
                    path = b"/victim%d" % round_
                    victim.send(b"GET " + path + b" HTTP/1.1\r\nHost: h\r\n\r\n")
                    self.assertEqual(victim.message().body, path)
            wait_until(lambda: proxy.threads() <= threads and proxy.descriptors() <= descriptors, "no leak")
            self.assertFalse(backend.failures, backend.failures)


class Streaming(unittest.TestCase):
    def test_the_first_byte_is_passed_on_when_it_arrives(self) -> None:
        go_on = threading.Event()

        def script(wire: Wire) -> None:
            backend.request(wire)
            wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for part in (b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n"):
                go_on.wait(LONG)
                go_on.clear()
                wire.send(part)

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            wire.head()
            for part in (b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n"):
                go_on.set()
                self.assertEqual(wire.exactly(len(part)), part)

    def test_the_backend_sees_the_body_while_the_client_sends(self) -> None:
        seen: list[bytes] = []

        def script(wire: Wire) -> None:
            wire.head()
            for _ in range(3):
                seen.append(wire.exactly(4))
            wire.send(OK)

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\n\r\n")
            for count in range(3):
                wire.send(b"%04d" % count)
                wait_until(functools.partial(lambda count: len(seen) == count + 1, count), "the part at the backend")
            self.assertEqual(wire.message().status, 200)
            self.assertEqual(b"".join(seen), b"000000010002")

    def test_an_early_answer_reaches_the_client(self) -> None:
        for reads_on in (False, True):

            def script(wire: Wire, reads_on: bool = reads_on) -> None:
                wire.head()
                wire.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
                if reads_on:
                    wire.rest()

            with self.subTest(reads_on=reads_on), ScriptedBackend(script) as backend, Proxy(backend.url) as proxy:
                with proxy.wire() as wire:
                    wire.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 100000)
                    response = wire.message()
                    self.assertEqual((response.status, response.body), (413, b"big"))
                    self.assertEqual(response.get("connection"), b"close")
                    self.assertTrue(wire.closed())

    def test_a_bad_interim_answer_to_an_upload_is_not_passed_on(self) -> None:
        for bad in (
            SWITCHING,
            b"HTTP/1.1 102 Processing\r\nno colon\r\n\r\n",
        ):

            def script(wire: Wire, bad: bytes = bad) -> None:
                wire.head()
                wire.send(bad + OK)
                wire.rest()

            with self.subTest(bad), ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
                wire.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n12345")
                response = wire.message()
                self.assertEqual(response.status, 502)
                self.assertIn(b"malformed", response.first)

    def test_an_early_answer_over_tls_reaches_the_client(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy, proxy.wire() as wire:
            wire.send(b"POST /api2/json/x HTTP/1.1\r\nHost: h\r\nContent-Length: 900000\r\n\r\n" + b"x" * 1000)
            self.assertEqual(wire.message().status, 501)

    def test_a_client_that_leaves_in_mid_upload_ends_the_backends_connection(self) -> None:
        for chunked in (False, True):
            ends: list[bytes] = []

            def script(wire: Wire, ends: list[bytes] = ends) -> None:
                wire.head()
                try:
                    ends.append(wire.rest())
                except OSError:
                    ends.append(b"reset")

            framing = b"Transfer-Encoding: chunked\r\n\r\n4\r\n" if chunked else b"Content-Length: 12\r\n\r\n"
            with self.subTest(chunked=chunked), ScriptedBackend(script) as backend, Proxy(backend.url) as proxy:
                with proxy.wire() as wire:
                    wire.send(b"POST / HTTP/1.1\r\nHost: h\r\n" + framing + b"1234")
                wait_until(functools.partial(list, ends), "the backend to see the end")
                self.assertNotIn(b"0\r\n\r\n", ends[0])

    def test_a_client_that_leaves_while_the_backend_does_not_read(self) -> None:
        done = threading.Event()

        def script(wire: Wire) -> None:
            wire.head()
            done.wait(LONG)

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy:
            self.assertEqual(proxy.ask(b"bad\r\n\r\n").status, 400)  # so that what is opened once is open
            descriptors = proxy.descriptors()
            with proxy.wire() as wire:
                wire.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n")
                wire.sock.settimeout(0.5)
                with self.assertRaises(TimeoutError):
                    while True:
                        wire.send(bytes(1 << 20))
                wire.reset()
            wait_until(lambda: proxy.descriptors() <= descriptors, "both connections to be closed", 5)
            done.set()

    def test_a_client_that_leaves_frees_the_backend(self) -> None:
        for answer in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n1"):
            ended = threading.Event()

            def script(wire: Wire, answer: bytes = answer, ended: threading.Event = ended) -> None:
                backend.request(wire)
                wire.send(answer)
                with contextlib.suppress(OSError):
                    wire.rest()
                ended.set()

            with self.subTest(answer), ScriptedBackend(script) as backend, Proxy(backend.url) as proxy:
                with proxy.wire() as wire:
                    wire.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                    wait_until(backend.asked, "the request at the backend")
                    if answer:
                        wire.until(b"\r\n\r\n1")
                self.assertTrue(ended.wait(LONG))

    def test_large_bodies_in_little_memory(self) -> None:
        size = 300 << 20
        with FakePVE() as pve, Proxy(pve.url) as proxy:

            def upload(_: int) -> None:
                with proxy.wire() as wire:
                    wire.send(b"POST /api2/json/nodes/pve/storage/local/upload HTTP/1.1\r\nHost: h\r\n"
                              b"Content-Length: %d\r\n\r\n" % size)  # fmt: skip
                    piece = bytes(1 << 20)
                    for _ in range(size >> 20):
                        wire.send(piece)
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
    def test_a_silent_backend_is_a_504(self) -> None:
        with ScriptedBackend(silent) as backend:
            with Proxy(backend.url, "-request-timeout", "200ms") as proxy:
                response = proxy.get("/")
                self.assertEqual(response.status, 504)
                self.assertIn(b"no answer within 0.2 s", response.first)

    def test_silence_is_bounded_and_length_is_not(self) -> None:
        stalls = threading.Event()

        def script(wire: Wire) -> None:
            backend.request(wire)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
            for _ in range(10 if not stalls.is_set() else 5):
                wire.send(b"0123456789")
                threading.Event().wait(0.1)  # the drip itself
            wire.more()

        with ScriptedBackend(script) as backend, Proxy(backend.url, "-request-timeout", "600ms") as proxy:
            self.assertEqual(len(proxy.get("/").body), 100)
            stalls.set()
            with self.assertRaises((EOFError, ConnectionResetError)):
                proxy.get("/")

    def test_a_stalled_upload_is_a_408(self) -> None:
        with answering(OK) as backend, Proxy(backend.url, "-request-timeout", "200ms") as proxy:
            response = proxy.ask(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n123")
            self.assertEqual(response.status, 408)

    def test_slow_clients_keep_nobody_out(self) -> None:
        """More dripping clients than connections: the oldest give way."""
        with answering(OK) as backend, Proxy(backend.url) as proxy, contextlib.ExitStack() as stack:
            for _ in range(program.MAX_CONNECTIONS + 20):
                stack.enter_context(proxy.wire()).send(b"GET / HT")
            wait_until(lambda: proxy.threads() > program.MAX_CONNECTIONS - 20, "the drips to be accepted")
            for _ in range(20):
                self.assertEqual(proxy.get("/").status, 200)

    def test_too_many_connections_get_a_503(self) -> None:
        hold = threading.Event()

        def script(wire: Wire) -> None:
            backend.request(wire)
            hold.wait(LONG)
            wire.send(OK)

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, contextlib.ExitStack() as stack:
            wires = [stack.enter_context(proxy.wire()) for _ in range(program.MAX_CONNECTIONS)]
            for wire in wires:
                wire.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            wait_until(lambda: len(backend.requests) == len(wires), "all requests at the backend")
            response = proxy.get("/")
            self.assertEqual((response.status, response.get("retry-after")), (503, b"5"))
            hold.set()
            for wire in wires:
                self.assertEqual(wire.message().status, 200)
            wait_until(lambda: proxy.get("/").status == 200, "room again")


UPGRADE = (b"GET /api2/json/nodes/pve/lxc/100/vncwebsocket?port=5900&vncticket=x HTTP/1.1\r\nHost: h\r\n"
           b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
           b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: PVEAPIToken=root@pam!ci=secret\r\n\r\n")  # fmt: skip


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

        def flood(sock: socket.socket, which: int) -> None:
            piece = bytes(1 << 16)
            with contextlib.suppress(OSError):
                while True:
                    sent[which] += sock.send(piece)

        def script(wire: Wire) -> None:
            wire.head()
            wire.send(SWITCHING)
            wire.sock.settimeout(None)
            flood(wire.sock, 0)

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(UPGRADE)
            wire.head()
            wire.sock.settimeout(None)
            threading.Thread(target=flood, args=(wire.sock, 1), daemon=True).start()

            def stopped() -> bool:
                before = list(sent)
                threading.Event().wait(0.2)
                return all(before) and before == sent

            wait_until(stopped, "both sides to be stopped")
            self.assertLess(proxy.memory(), 60 * 1024)
            wire.sock.shutdown(socket.SHUT_RDWR)

    def test_a_reset_behind_a_full_buffer_ends_it(self) -> None:
        done = threading.Event()

        def script(wire: Wire) -> None:
            wire.head()
            wire.send(SWITCHING)
            done.wait(LONG)

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy:
            with proxy.wire() as wire:
                wire.send(UPGRADE)
                wire.head()
                threads = proxy.threads()
                wire.sock.settimeout(0.5)
                with self.assertRaises(TimeoutError):
                    while True:
                        wire.send(bytes(1 << 20))
                wire.reset()
            wait_until(lambda: proxy.threads() < threads, "the tunnel's thread to end", 5)
            done.set()

    def test_half_close_is_carried_over(self) -> None:
        def script(wire: Wire) -> None:
            wire.head()
            wire.send(SWITCHING)
            wire.send(b"got " + wire.rest())

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(UPGRADE)
            wire.head()
            wire.send(b"all of this")
            wire.sock.shutdown(socket.SHUT_WR)
            self.assertEqual(wire.rest(), b"got all of this")
            wait_until(lambda: not backend.open, "the backend's end")

    def test_what_was_said_before_a_close_arrives_at_a_slow_reader_that_says_no_more(self) -> None:
        def script(wire: Wire) -> None:
            wire.head()
            wire.send(SWITCHING)
            wire.rest()
            wire.send(bytes(24_000_000))

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy, proxy.wire() as wire:
            wire.send(UPGRADE)
            wire.head()
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
            wire.sock.shutdown(socket.SHUT_WR)
            count = len(wire.buffer)
            while data := wire.sock.recv(1024):
                count += len(data)
            self.assertEqual(count, 24_000_000)

    def test_close_is_carried_over(self) -> None:
        ended = threading.Event()

        def script(wire: Wire) -> None:
            wire.head()
            wire.send(SWITCHING)
            wire.rest()
            ended.set()

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy:
            with proxy.wire() as wire:
                wire.send(UPGRADE)
                wire.head()
                threads = proxy.threads()
            self.assertTrue(ended.wait(LONG))
            wait_until(lambda: proxy.threads() < threads, "the tunnel's thread to end")

    def test_a_refused_upgrade_is_an_ordinary_answer(self) -> None:
        with answering(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", OK) as backend:
            with Proxy(backend.url) as proxy, proxy.wire() as wire:
                wire.send(UPGRADE)
                self.assertEqual(wire.message().status, 403)
                wire.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                self.assertEqual(wire.message().body, b"ok")

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
        queued = len(proxy.lines("CLONE QUEUED"))
        wires += bring(proxy, request)
        proxy.wait_log("CLONE QUEUED", queued + 1)
    return wires


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
            task = next(iter(pve.tasks.values()))
            self.assertIsNotNone(task.process.poll())
            self.assertEqual(answer.first, b"HTTP/1.1 200 OK")
            self.assertEqual(answer.body, json.dumps({"data": task.upid}).encode())
            self.assertEqual([name for name, _ in answer.fields],
                             [b"Server", b"Cache-Control", b"Content-Type", b"Content-Length"])  # fmt: skip

    def test_log_lines(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url, "-poll-delay", "20ms") as proxy:
            wire = queue_up(proxy, clone_request(201))[0]
            proxy.wait_log("TASK POLLING")
            pve.finish()
            self.assertEqual(wire.message().status, 200)
            upid = re.escape(next(iter(pve.tasks)))
            for pattern in [
                r"CLONE QUEUED: node=pve vmid=9000( newid=201 waiting=0)?$",
                r"CLONE START: node=pve vmid=9000( waited=\d+\.\ds)?$",
                rf"CLONE TASK: node=pve vmid=9000 upid={upid}$",
                r"TASK POLLING: status=running$",
                rf"CLONE COMPLETE: node=pve vmid=9000 upid={upid} \(elapsed: \d+\.\ds\)$",
            ]:
                proxy.wait_log(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d " + pattern)

    def test_exit_statuses(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            pve.exits.extend(["WARNINGS: 2", "clone failed: disk full", "OK"])
            self.assertEqual([proxy.clone(201 + index).status for index in range(3)], [200] * 3)
            proxy.wait_log("CLONE COMPLETE", 2)
            self.assertEqual(len(proxy.lines("CLONE COMPLETE")), 2)
            proxy.wait_log(r"TASK FINISHED: status=stopped exitstatus=clone failed: disk full node=pve vmid=9000")

    def test_every_spelling_is_queued_and_sent_as_it_came(self) -> None:
        paths = ["/api2/json//nodes/pve/lxc/9000/clone/", "/api2/json/nodes/pve/lxc/9000/%63lone?full=1",
                 "/api2/json/nodes/pve%2Flxc/9000/clone", "/api2/json/nodes/a%20b%0ac/lxc/9000/clone"]  # fmt: skip
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            answers = at_once(len(paths), lambda index: proxy.clone(201 + index, path=paths[index]))
            self.assertEqual([answer.status for answer in answers], [200] * len(paths))
            self.assertEqual((sorted(record.target for record in pve.clones), pve.overlaps), (sorted(paths), 0))
            proxy.wait_log(r"CLONE START: node=a\\x20b\\x0ac vmid=9000")

    def test_bodies_in_every_form_arrive_with_a_length(self) -> None:
        head = b"POST /api2/json/nodes/pve/lxc/9000/clone%b HTTP/1.1\r\nHost: h\r\nAuthorization: " + TOKEN.encode()
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            for query, rest in [
                (b"", b"Transfer-Encoding: chunked\r\n\r\n5\r\nnewid\r\n4\r\n=201\r\n0\r\n\r\n"),
                (b"", b'Content-Type: application/json\r\nContent-Length: 13\r\n\r\n{"newid":202}'),
                (b"?newid=203", b"\r\n"),
                (b"", b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"),
            ]:
                with proxy.wire() as wire:
                    wire.send(head % query + b"\r\n" + rest)
                    response = wire.message()
                    if response.status == 100:
                        wire.send(b"newid=204")
                        response = wire.message()
                    self.assertEqual(response.status, 200)
            self.assertEqual([record.newid for record in pve.clones], ["201", "202", "203", "204"])
            for record in pve.clones:
                fields = {name.lower(): value for name, value in record.fields}
                self.assertEqual(fields["content-length"], str(len(record.body)))
                self.assertNotIn("transfer-encoding", fields)
                self.assertNotIn("expect", fields)

    def test_bodies_over_512_kib_are_refused(self) -> None:
        size = 512 * 1024
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            head = b"POST /api2/json/nodes/pve/lxc/9000/clone HTTP/1.1\r\nHost: h\r\nAuthorization: " + TOKEN.encode()
            length = b"\r\nContent-Length: %d\r\n\r\n"
            self.assertEqual(proxy.ask(head + length % (size + 1)).status, 413)
            chunk = b"\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (size + 1) + b"x" * (size + 1)
            self.assertEqual(proxy.ask(head + chunk).status, 413)
            self.assertEqual(pve.clones, [])
            self.assertEqual(proxy.ask(head + length % size + b"newid=201&".ljust(size, b"x")).status, 200)

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
        with FakePVE(clone_seconds=0.3) as pve, Proxy(pve.url) as proxy:
            pve.remote = True
            self.assertEqual(proxy.clone(201).status, 200)
            self.assertIsNotNone(next(iter(pve.tasks.values())).process.poll())
            self.assertGreater(pve.polls, 1)

    def test_tasks_here_wake_the_worker(self) -> None:
        with FakePVE(clone_seconds=0.3) as pve, Proxy(pve.url, "-poll-delay", "1h") as proxy:
            self.assertEqual(proxy.clone(201).status, 200)
            self.assertEqual(pve.polls, 1)

    def test_vms_are_queued_when_asked_for(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, "-qemu") as proxy:
            path = "/api2/json/nodes/pve/qemu/8001/clone"
            answers = at_once(4, lambda index: proxy.clone(201 + index, path=path))
            self.assertEqual(([answer.status for answer in answers], pve.overlaps), ([200] * 4, 0))

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

    def test_credentials_are_never_logged(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, "-verbose") as proxy:
            cookie = "Cookie: PVEAuthCookie=PVE:root@pam:good\r\nCSRFPreventionToken: token\r\n"
            self.assertEqual(proxy.clone(201, token="x", extra=cookie, path="/api2/json/nodes/pve/lxc/9000/clone?a=s3cr3t")
                             .status, 200)  # fmt: skip
            proxy.clone(202, token="PVEAPIToken=root@pam!ci=wrong-s3cr3t")
            proxy.get("/x?s3cr3t", "Authorization: s3cr3t")
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
        def script(wire: Wire) -> None:
            while True:
                first = backend.request(wire).first
                wire.send(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n" if b"version" in first else OK)

        with ScriptedBackend(script) as backend, Proxy(backend.url) as proxy:
            self.assertEqual(proxy.clone(201).body, b"ok")

    def test_pve_out_of_reach_is_said_at_once(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        with Proxy(f"http://127.0.0.1:{port}") as proxy:
            self.assertEqual(proxy.clone(201).status, 502)
            self.assertEqual(proxy.lines("CLONE QUEUED"), [])
        with ScriptedBackend(silent) as backend:
            with Proxy(backend.url, "-request-timeout", "100ms") as proxy:
                self.assertEqual(proxy.clone(201).status, 504)


class PveFaults(unittest.TestCase):
    def test_answers_to_the_post(self) -> None:
        upid = "UPID:pve:000010C3:0004305D:6B051704:vzclone:9000:root@pam!ci:"
        with FakePVE() as pve, Proxy(pve.url, "-request-timeout", "1s") as proxy:
            for fault, status in [
                ("reset", 502), ("reset-in-head", 502), ("reset-in-body", 502), ("close", 502), ("garbage", 502),
                ("hang", 504), ("+reset", 502), ("+hang", 504), ("595 Connection refused", 595), ("+596 Connection timed out", 596),
                ("599 Too many", 599), ("500 no quorum", 500), ("403 Permission check failed", 403),
                ("json:no json", 200), ("json:[1]", 200), ('json:{"data":null}', 200), ('json:{"data":{"x":1}}', 200),
                ("json:" + "[" * 20000, 200), ('json:{"data":"UPID:x/../../y"}', 200),
                (f'json:{{"data":"{upid}%"}}', 200), (f'json:{{"data":"{"UPID:" + "x" * 600}"}}', 200),
            ]:  # fmt: skip
                with self.subTest(fault[:40]):
                    before = len(pve.clones)
                    pve.clone_faults.append(fault)
                    answer = proxy.clone(201, source=9001)
                    pve.hanging.set()
                    self.assertEqual(answer.status, status, answer)
                    self.assertEqual(len(pve.clones) - before, 1, "sent once")
                    if status in (502, 504):
                        message = json.loads(answer.body)["message"]
                        self.assertIn("the outcome of the clone is unknown", message)
                        self.assertNotRegex(message, "already exists|got timeout|got no worker upid")
                    with pve.lock:
                        tasks = pve.running()
                    for task in tasks:
                        task.process.kill()
                        task.process.wait()
                    with pve.lock:
                        pve.running()
                        pve.guests.discard("201")
                    pve.hanging.clear()
            self.assertEqual(proxy.clone(202).status, 200, "the worker goes on")
            pve.hanging.set()

    def test_polls_that_fail_are_repeated(self) -> None:
        faults = ["reset", "reset-in-head", "reset-in-body", "close", "garbage", "401 permission denied - invalid ticket",
                  "500 oops", "596 Connection timed out", "json:no json", "json:[1]", 'json:{"data":[]}',
                  'json:{"data":{"status":7}}', 'json:{"data":{"status":"stopped","exitstatus":7}}',
                  "400 Parameter verification failed."]  # fmt: skip
        with FakePVE(clone_seconds=0.3) as pve, Proxy(pve.url, "-poll-delay", "10ms") as proxy:
            pve.poll_faults.extend(faults)
            self.assertEqual(proxy.clone(201).status, 200)
            self.assertGreater(pve.polls, len(faults))
            proxy.wait_log("TASK POLL ERROR: node=pve vmid=9000: ")
            proxy.wait_log("CLONE COMPLETE")

    def test_a_task_that_takes_too_long_holds_the_queue(self) -> None:
        for remote in (False, True):
            with self.subTest(remote=remote), FakePVE(clone_seconds=ENDLESS) as pve:
                pve.remote = remote
                with Proxy(pve.url, "-task-timeout", "400ms", "-poll-delay", "50ms") as proxy:
                    first, second = queue_up(proxy, clone_request(201), clone_request(202, source=9001))
                    answer = first.message()
                    upid = next(iter(pve.tasks))
                    self.assertEqual(answer.status, 504)
                    content = json.loads(answer.body)
                    self.assertEqual(content["data"], upid)
                    self.assertIn(upid, content["message"])
                    self.assertEqual(len(pve.clones), 1, "the second waits")
                    pve.finish()
                    self.assertEqual(second.message().status, 200)
                    self.assertEqual(pve.most_at_once, 1)
                    proxy.wait_log(r"CLONE TIMEOUT: node=pve vmid=9000 upid=UPID:\S+ \(elapsed: \d+\.\ds\)")

    def test_a_task_that_nobody_can_tell_of_is_given_up(self) -> None:
        for remote in (False, True):
            with self.subTest(remote=remote), FakePVE(clone_seconds=0.1) as pve:
                pve.remote = remote
                with Proxy(pve.url, "-task-timeout", "300ms", "-poll-delay", "50ms") as proxy:
                    pve.poll_faults.extend(["400 no such task"] * 1000)
                    self.assertEqual(proxy.clone(201).status, 504)
                    proxy.wait_log("CLONE ERROR: .* no longer waited for")
                    pve.poll_faults.clear()
                    self.assertEqual(proxy.clone(202).status, 200)

    def test_a_task_that_outlives_its_polls_holds_the_queue_by_its_process(self) -> None:
        with (
            FakePVE(clone_seconds=ENDLESS) as pve,
            Proxy(pve.url, "-task-timeout", "200ms", "-poll-delay", "50ms") as proxy,
        ):
            pve.poll_faults.extend(["401 permission denied - invalid ticket"] * 1000)
            self.assertEqual(proxy.clone(201).status, 504)
            proxy.wait_log("TASK POLL ERROR", 3)
            self.assertEqual(proxy.lines("no longer waited for"), [])
            pve.finish()
            proxy.wait_log("no longer waited for")

    def test_an_unexpected_failure_answers_500_and_the_worker_goes_on(self) -> None:
        class Broken:
            def post(self, data: bytes) -> program.Answer:
                raise RuntimeError("unexpected")

        clones = program.CloneQueue(program.Settings(), Broken())  # type: ignore[arg-type]
        with self.assertLogs(program.log, "ERROR"):
            threading.Thread(target=clones.run, daemon=True).start()
            for index in range(2):
                client = PretendedClient()
                job = clones.admit(job_of(b"%d" % index, client))
                self.assertTrue(client.event.wait(LONG))
                answer = clones.collect(job, client)
                assert answer
                self.assertEqual(answer.response.status, 500)

    def test_the_process_ends_when_a_vital_thread_dies(self) -> None:
        code = (f"import sys; sys.path.insert(0, {HERE!r}); import pve_clone_queue_proxy as p, signal\n"
                "def fail(self): raise RuntimeError('dead')\n"
                "p.CloneQueue._next = fail\n"
                "sys.exit(p.main(['-listen', '127.0.0.1:0']))")  # fmt: skip
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG)
        self.assertEqual(result.returncode, 1)
        self.assertIn("the clone worker thread failed", result.stderr)


class PretendedClient(program.Client):
    """A client that is there until it is said to have left."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.left = False

    def gone(self) -> bool:
        """Whether it was said to have left."""
        return self.left


def job_of(key: bytes, client: program.Client) -> program.CloneJob:
    """A job without a request."""
    return program.CloneJob(program.CloneCall("lxc", "pve", "9000", "101", ""), b"", b"", key, client)


class Leaving(unittest.TestCase):
    def test_a_clone_whose_client_left_is_not_started(self) -> None:
        for how in ("close", "reset", "half-close", "with a pipelined request"):
            with self.subTest(how), FakePVE(clone_seconds=ENDLESS) as pve, Proxy(pve.url) as proxy:
                first, leaver, last = queue_up(proxy, *(clone_request(newid) for newid in (201, 202, 203)))
                if how == "close":
                    leaver.close()
                elif how == "reset":
                    leaver.reset()
                elif how == "half-close":
                    leaver.sock.shutdown(socket.SHUT_WR)
                else:
                    leaver.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                    leaver.close()
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
            third = bring(proxy, clone_request(204))[0]
            proxy.wait_log("CLONE QUEUED", 4)
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
                raise AssertionError("no answer in 100 tries")

            answers = at_once(8, insist)
            self.assertEqual([answer.status for answer in answers], [200] * 8)
            self.assertEqual(len({json.loads(answer.body)["data"] for answer in answers}), 8)
            self.assertEqual((len(pve.clones), pve.overlaps), (8, 0))

    def test_claiming_and_leaving_never_both_win(self) -> None:
        sent: list[bytes] = []

        class Refusing:
            def post(self, data: bytes) -> program.Answer:
                sent.append(data)
                return program.error_answer(program.Refusal(500, "no"))

        clones = program.CloneQueue(program.Settings(), Refusing())  # type: ignore[arg-type]
        threading.Thread(target=clones.run, daemon=True).start()
        program.log.disabled = True
        self.addCleanup(setattr, program.log, "disabled", False)
        dropped = ran = 0
        for index in range(5000):
            client = PretendedClient()
            job = job_of(b"%d" % index, client)
            job.request = b"%d" % index
            clones.admit(job)
            client.left = True
            clones.leave(job, client)
            deadline = time.monotonic() + LONG
            while job.stage not in (program.Stage.ENDED, program.Stage.DROPPED):
                os.sched_yield()
                self.assertLess(time.monotonic(), deadline)
            self.assertEqual(job.stage is program.Stage.ENDED, bool(sent) and sent[-1] == b"%d" % index)
            dropped += job.stage is program.Stage.DROPPED
            ran += job.stage is program.Stage.ENDED
        self.assertEqual((dropped + ran, len(sent)), (5000, ran))
        self.assertGreater(dropped, 0)
        self.assertEqual(clones.snapshot()["waiting"], [])

    def test_kept_answers_are_forgotten(self) -> None:
        clones = program.CloneQueue(program.Settings(), None)  # type: ignore[arg-type]
        client = PretendedClient()
        job = clones.admit(job_of(b"x", client))
        clones._claim(clones._next())
        clones.leave(job, client)
        clones._finish(job, program.Ended(program.error_answer(program.Refusal(500, "x")), "failed"))
        clones.look_around()
        self.assertIs(clones._abandoned_twin(b"x"), job)
        job.ended_at -= program.KEEP_SECONDS + 1
        clones.look_around()
        self.assertIsNone(clones._abandoned_twin(b"x"))
        self.assertEqual((clones._by_key, clones._kept), ({}, {}))


class Locks(unittest.TestCase):
    def test_a_locked_source_is_waited_for_and_others_go_on(self) -> None:
        with FakePVE() as pve, Proxy(pve.url) as proxy:
            pve.locks["9000"] = "backup"
            locked = bring(proxy, clone_request(201))[0]
            proxy.wait_log(r"CLONE LOCKED: node=pve vmid=9000: CT is locked \(backup\)")
            later = bring(proxy, clone_request(202))[0]
            proxy.wait_log("CLONE QUEUED", 2)
            self.assertEqual(proxy.clone(203, source=9001).status, 200)
            with pve.lock:
                del pve.locks["9000"]
            self.assertEqual((locked.message().status, later.message().status), (200, 200))
            done = [record.newid for record in pve.clones if record.status == 200]
            self.assertEqual(done, ["203", "201", "202"], "a source keeps its order")
            self.assertEqual(len(proxy.lines("CLONE LOCKED")), 1)

    def test_new_and_locked_clones_take_turns(self) -> None:
        clones = program.CloneQueue(program.Settings(), None)  # type: ignore[arg-type]
        answer = program.error_answer(program.Refusal(500, "CT is locked (disk)"))

        def admit(source: str) -> None:
            job = job_of(source.encode(), PretendedClient())
            job.call = job.call._replace(source=source)
            clones.admit(job)

        def try_in_vain() -> str:
            job = clones._next()
            self.assertTrue(clones._claim(job))
            clones._park_or_end(job, program.Locked(answer, "CT is locked (disk)"))
            job.next_try = 0.0  # due again before anything else can be tried
            return job.call.source

        for source in "12345":
            admit(source)
        tried = [try_in_vain() for _ in range(9)]
        self.assertEqual(tried[::2], ["1", "2", "3", "4", "5"])

    def test_when_the_time_is_over_pves_refusal_is_the_answer(self) -> None:
        with FakePVE() as pve, Proxy(pve.url, "-lock-timeout", "600ms") as proxy:
            pve.locks["9000"] = "snapshot"
            begin = time.monotonic()
            answer = proxy.clone(201)
            self.assertGreater(time.monotonic() - begin, 0.6)
            self.assertEqual(answer.first, b"HTTP/1.1 500 CT is locked (snapshot)")
            self.assertEqual(json.loads(answer.body)["message"], "CT is locked (snapshot)\n")
            self.assertGreater(len(pve.clones), 2)
            self.assertGreater(pve.clones[-1].at - pve.clones[0].at, 0.6, "one more try at the end")

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
                    self.assertEqual(proxy.clone(201).status, 200 if tries == 2 else 500)
                    self.assertEqual(len(pve.clones) - before, tries)
                    with pve.lock:
                        pve.guests.discard("201")

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
            with pve.lock:
                tries = len(pve.clones)
                del pve.locks["9000"]
            self.assertEqual(proxy.clone(202).status, 200)
            self.assertLessEqual(len(pve.clones), tries + 1)
            self.assertNotIn("201", pve.guests)

    def test_three_proxies_before_one_cluster(self) -> None:
        with FakePVE(clone_seconds=0.02) as pve, Proxy(pve.url) as a, Proxy(pve.url) as b, Proxy(pve.url) as c:
            proxies = (a, b, c)
            answers = at_once(60, lambda index: proxies[index % 3].clone(200 + index, source=9000 + index // 3 % 2))
            self.assertEqual([answer.status for answer in answers], [200] * 60)
            self.assertEqual(pve.overlaps, 0)
            self.assertEqual(sum(record.status == 200 for record in pve.clones), 60)
            self.assertTrue({str(200 + index) for index in range(60)} <= pve.guests)

    def test_after_a_crash_the_next_clone_waits_for_the_lock(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve:
            proxy = Proxy(pve.url)
            bring(proxy, clone_request(201))
            pve.wait_for_clones(1)
            port = proxy.port
            proxy.stop(signal.SIGKILL)
            with Proxy(pve.url, port=port) as again:
                wire = bring(again, clone_request(202))[0]
                again.wait_log("CLONE LOCKED")
                pve.finish()
                self.assertEqual(wire.message().status, 200)
            self.assertEqual(pve.overlaps, 0)


class Shutdown(unittest.TestCase):
    def test_waiting_clones_get_503_and_the_running_one_its_answer(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number), FakePVE(clone_seconds=ENDLESS) as pve:
                proxy = Proxy(pve.url)
                requests = clone_request(201), clone_request(202), clone_request(203, 9001)
                running, *waiting = queue_up(proxy, *requests)
                pve.wait_for_clones(1)
                proxy.process.send_signal(number)
                for wire in waiting:
                    answer = wire.message()
                    self.assertEqual((answer.status, answer.get("retry-after")), (503, b"5"))
                pve.finish()
                self.assertEqual(running.message().status, 200)
                self.assertEqual(proxy.stop(0), 0)
                self.assertEqual(len(pve.clones), 1)

    def test_a_clone_parked_after_a_failed_task_gets_that_tasks_answer(self) -> None:
        with FakePVE() as pve:
            proxy = Proxy(pve.url)
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
            if b"Upgrade" in b"".join(name for name, _ in backend.request(wire).fields):
                wire.send(SWITCHING)
                wire.rest()
            else:
                go_on.wait(LONG)
                wire.send(OK)

        with ScriptedBackend(script) as backend:
            proxy = Proxy(backend.url)
            tunnel, busy, silent = bring(proxy, UPGRADE, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"")
            tunnel.head()
            wait_until(lambda: len(backend.requests) == 2, "the request at the backend")
            proxy.process.terminate()
            self.assertTrue(tunnel.closed())
            self.assertTrue(silent.closed())
            go_on.set()
            answer = busy.message()
            self.assertEqual((answer.body, answer.get("connection")), (b"ok", b"close"))
            self.assertEqual(proxy.stop(0), 0)

    def test_who_runs_at_the_end_of_patience_learns_what_is_known(self) -> None:
        def run(fault: str) -> Message:
            with FakePVE(clone_seconds=60) as pve, Proxy(pve.url, constants="program.DRAIN_SECONDS = 0.3") as proxy:
                if fault:
                    pve.clone_faults.append(fault)
                with proxy.wire() as wire:
                    wire.send(clone_request(201))
                    pve.wait_for_clones(1)
                    if not fault:
                        proxy.wait_log("CLONE TASK")
                    proxy.process.terminate()
                    answer = wire.message()
                self.assertEqual(proxy.stop(0), 0)
                if not fault:
                    self.assertEqual(json.loads(answer.body)["data"], next(iter(pve.tasks)))
            return answer

        self.assertEqual(run("").status, 200)
        answer = run("hang")
        self.assertEqual((answer.status, answer.get("retry-after")), (504, None))
        self.assertIn("outcome of the clone is unknown", json.loads(answer.body)["message"])

    def test_who_comes_back_meanwhile_gets_the_running_clones_answer(self) -> None:
        with FakePVE(clone_seconds=ENDLESS) as pve:
            proxy = Proxy(pve.url)
            leaver = queue_up(proxy, clone_request(201))[0]
            pve.wait_for_clones(1)
            back, other = bring(proxy, b"", b"")
            leaver.close()
            proxy.wait_log("CLONE ABANDONED")
            proxy.process.terminate()
            proxy.wait_log("shutting down")
            proxy.process.send_signal(signal.SIGHUP)  # a reload, which must not end it
            other.send(clone_request(202))
            back.send(clone_request(201))
            self.assertEqual(other.message().status, 503)
            proxy.wait_log("CLONE RESUMED")
            pve.finish()
            self.assertEqual(back.message().status, 200)
            self.assertEqual((proxy.stop(0), len(pve.clones)), (0, 1))

    def test_a_second_signal_ends_it_at_once(self) -> None:
        with FakePVE(clone_seconds=60) as pve:
            proxy = Proxy(pve.url)
            bring(proxy, clone_request(201))
            pve.wait_for_clones(1)
            proxy.process.terminate()
            proxy.wait_log("shutting down")
            self.assertEqual(proxy.stop(), -signal.SIGTERM)

    def test_nor_does_that_make_an_answer_without_a_length_look_whole(self) -> None:
        ended = threading.Event()

        def script(wire: Wire) -> None:
            wire.head()
            wire.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nsome of it")
            ended.wait(LONG)

        with ScriptedBackend(script) as backend:
            proxy = Proxy(backend.url)
            with proxy.wire() as wire:
                wire.send(GET)
                wire.until(b"some of it")
                proxy.process.terminate()
                proxy.wait_log("shutting down")
                self.assertEqual(proxy.stop(), -signal.SIGTERM)
                with self.assertRaises(ConnectionResetError):
                    wire.rest()
            ended.set()


# Operation


class Status(unittest.TestCase):
    def setUp(self) -> None:
        self.pve = self.enterContext(FakePVE())
        self.proxy = self.enterContext(Proxy(self.pve.url, "-status-listen", "127.0.0.1:0"))
        self.port = int(self.proxy.wait_log(r"STATUS PAGE: 127\.0\.0\.1:(\d+)")[1])

    def page(self, path: str, method: str = "GET") -> Message:
        with Wire.to(self.port) as wire:
            wire.send(f"{method} {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            return wire.message(no_body=method == "HEAD")

    def status(self) -> Any:
        return json.loads(self.page("/status.json").body)

    def test_the_picture_of_the_queue(self) -> None:
        self.pve.clone_seconds = ENDLESS
        wires = queue_up(self.proxy, clone_request(201), clone_request(202))
        self.pve.wait_for_clones(1)
        status = self.status()
        self.assertEqual((status["running"]["vmid"], status["running"]["newid"]), ("9000", "201"))
        self.assertEqual(status["running"]["user"], "root@pam!ci")
        self.assertEqual([job["newid"] for job in status["waiting"]], ["202"])
        self.pve.finish()
        self.assertEqual([wire.message().status for wire in wires], [200, 200])
        status = wait_until(lambda: (now := self.status())["totals"]["completed"] == 2 and now)
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
            self.assertRegex(line, r"^(# (HELP|TYPE) \w+ .+|\w+(\{\w+=\"\w+\"\})? [0-9.e-]+)$")

    def test_health(self) -> None:
        self.assertEqual((self.page("/healthz").status, self.page("/healthz").body), (200, b"ok\n"))
        self.pve.server.server_close()
        answer = wait_until(lambda: (page := self.page("/healthz")).status == 503 and page)
        self.assertIn(b"can't be reached", answer.body)

    def test_other_requests(self) -> None:
        self.assertEqual(self.page("/nothing").status, 404)
        self.assertEqual(self.page("/", "DELETE").status, 405)
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
        with FakePVE(clone_seconds=ENDLESS) as pve:
            proxy = self.proxy(pve.url)
            with proxy.wire() as wire:
                for _ in range(3):
                    wire.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                    self.assertEqual(wire.message().status, 200)
            size = 30 << 20
            with proxy.wire() as wire:
                wire.send(b"POST /api2/json/nodes/pve/storage/local/upload HTTP/1.1\r\nHost: h\r\n"
                          b"Content-Length: %d\r\n\r\n" % size + bytes(size))  # fmt: skip
                self.assertEqual(wire.message().status, 200)
            self.assertEqual(len(proxy.get(f"/api2/json/nodes/pve/download?bytes={size}",
                                           f"Authorization: {TOKEN}").body), size)  # fmt: skip
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
            pve.finish()
            self.assertEqual((first.message().status, len(pve.clones)), (200, 1))

    def test_an_answer_that_breaks_off_has_no_clean_end(self) -> None:
        def script(wire: Wire) -> None:
            backend.request(wire)
            wire.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
            go_on.wait(LONG)
            wire.reset()

        go_on = threading.Event()
        with ScriptedBackend(script) as backend:
            proxy = self.proxy(backend.url)
            with socket.create_connection(("127.0.0.1", proxy.port), LONG) as sock:
                wire = Wire(client_context().wrap_socket(sock, suppress_ragged_eofs=False))
                wire.send(GET)
                wire.until(b"half")
                go_on.set()
                with self.assertRaises(OSError):
                    wire.more()
                wire.close()

    def test_silent_handshakes_keep_nobody_out(self) -> None:
        with answering(OK) as backend:
            proxy = self.proxy(backend.url)
            for _ in range(program.MAX_CONNECTIONS + 20):
                self.enterContext(socket.create_connection(("127.0.0.1", proxy.port), LONG))
            for _ in range(5):
                self.assertEqual(proxy.get("/").status, 200)

    def test_versions_and_stalled_handshakes(self) -> None:
        with answering(OK) as backend:
            proxy = self.proxy(backend.url)
            with socket.create_connection(("127.0.0.1", proxy.port)):  # never begins its handshake
                self.assertEqual(proxy.get("/").status, 200)
            context = client_context()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = ssl.TLSVersion.TLSv1
                context.maximum_version = ssl.TLSVersion.TLSv1_1
            context.set_ciphers("ALL:@SECLEVEL=0")
            with self.assertRaises(OSError), socket.create_connection(("127.0.0.1", proxy.port)) as sock:
                context.wrap_socket(sock)

    def test_sighup_loads_the_certificate_anew(self) -> None:
        with answering(OK) as backend:
            proxy = self.proxy(backend.url)

            def served() -> bytes | None:
                with proxy.wire() as wire:
                    assert isinstance(wire.sock, ssl.SSLSocket)
                    return wire.sock.getpeercert(binary_form=True)

            self.assertEqual(served(), ssl.PEM_cert_to_DER_cert(OLD_CERT))
            with proxy.wire() as kept:
                kept.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                kept.message()
                self.install("nonsense", "nonsense")
                proxy.process.send_signal(signal.SIGHUP)
                proxy.wait_log("certificate not loaded anew")
                self.install(NEW_CERT, NEW_KEY)
                proxy.process.send_signal(signal.SIGHUP)
                proxy.wait_log("certificate loaded anew")
                self.assertEqual(served(), ssl.PEM_cert_to_DER_cert(NEW_CERT))
                kept.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                self.assertEqual(kept.message().status, 200)


class ServiceManager(unittest.TestCase):
    """What systemd would hear and do."""

    def test_it_is_told_and_keeps_the_listening_socket(self) -> None:
        with tempfile.TemporaryDirectory() as folder, FakePVE() as pve:
            path = os.path.join(folder, "notify")
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.bind(path)
                notify.settimeout(LONG)
                kept: list[int] = []

                def hear(pattern: str) -> str:
                    while True:
                        data, fds, _, _ = socket.recv_fds(notify, 4096, 4)
                        kept.extend(fds)
                        if re.search(pattern, data.decode()):
                            return data.decode()

                with Proxy(pve.url, env={"NOTIFY_SOCKET": path}) as proxy:
                    self.assertEqual(hear("FDSTORE"), "FDSTORE=1\nFDNAME=listen")
                    hear("READY=1")
                    evil = "/api2/json/nodes/x%0AWATCHDOG=trigger%0Ay/lxc/9001/clone"
                    pve.clone_seconds = ENDLESS
                    forged = queue_up(proxy, clone_request(203, path=evil))[0]
                    self.assertNotIn("\n", hear("WATCHDOG"))
                    pve.finish()
                    self.assertEqual(forged.message().status, 200)
                    hear("STATUS=idle, 0 waiting; 1 done, 0 failed")
                    pve.clone_seconds = ENDLESS
                    wires = queue_up(proxy, clone_request(201), clone_request(202))
                    hear(r"STATUS=cloning pve/9000 for \d+\.\ds, 1 waiting; 1 done, 0 failed")
                    proxy.process.terminate()
                    hear("STOPPING=1")
                    self.assertEqual(wires[1].message().status, 503)
                    pve.finish()
                    self.assertEqual(wires[0].message().status, 200)
                    port = proxy.port
                # A connection made while nobody runs waits in the backlog of the kept socket.
                with Wire.to(port) as wire:
                    wire.send(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                    code = (f"import os, sys; os.dup2({kept[0]}, 3); os.environ['LISTEN_PID'] = str(os.getpid());"
                            f"os.execv(sys.executable, [sys.executable, {PROGRAM!r}, *sys.argv[1:]])")  # fmt: skip
                    command = [sys.executable, "-c", code, "-listen", f"127.0.0.1:{port}", "-backend", pve.url]
                    environment = {**os.environ, "LISTEN_FDS": "1"}
                    with subprocess.Popen(command, env=environment, pass_fds=kept, stderr=subprocess.PIPE) as process:
                        self.assertEqual(wire.message().status, 200)
                        process.terminate()
                        self.assertEqual(process.wait(LONG), 0)
                for fd in kept:
                    os.close(fd)


# Exactly once, whatever happens


class Soak:
    """A run with seeded random faults: clients that leave and come back, a PVE that resets, hangs and refuses."""

    LOCKED = ("500 CT is locked (backup)", "500 CT is locked (snapshot)")
    CONTENTION = "clone failed: cfs-lock 'storage-x' error: got lock request timeout"

    def __init__(self, relayed: int, clones: int, seconds: float, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.lock = threading.Lock()
        self.left_to_relay, self.left_to_clone = relayed, clones
        self.deadline = time.monotonic() + seconds
        self.figures: collections.Counter[str] = collections.Counter()
        self.successes: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.next = 1000

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        with self.lock:
            return self.rng.random() < probability

    def fault(self, kind: str) -> str:
        """What happens to PVE's next call of a kind."""
        with self.lock:
            number = self.rng.random()
            if kind == "relay" and number < 0.08:
                return self.rng.choice(["reset", "reset-in-head", "reset-in-body", "close", "garbage", "hang"])
            if kind == "poll" and number < 0.1:
                return self.rng.choice(["reset", "close", "garbage", "500 x", "json:{}", "401 x"])
            if kind == "clone" and number < 0.2:
                return self.rng.choice(["reset", "+reset", "close", "+close", "hang", "+hang", "596 x", "+596 x", "403 x",
                                        "json:x", "reset-in-body", *self.LOCKED])  # fmt: skip
            return ""

    def take(self, what: str) -> int:
        """The number of the next request to make; 0 when there are enough."""
        with self.lock:
            left = getattr(self, what)
            if left <= 0 or time.monotonic() > self.deadline:
                return 0
            setattr(self, what, left - 1)
            self.next += 1
            return self.next

    def count(self, what: str) -> None:
        """Add one to a figure."""
        with self.lock:
            self.figures[what] += 1

    def relay(self, proxy: Proxy) -> None:
        """Ordinary requests; each must get its own answer, an error of the proxy's, or a cut."""
        while number := self.take("left_to_relay"):
            method = "POST" if self.chance(0.3) else "GET"
            body = "Content-Length: 3\r\n\r\nabc" if method == "POST" else "\r\n"
            try:
                with proxy.wire() as wire:
                    wire.send(f"{method} /api2/json/x/{number} HTTP/1.1\r\nHost: h\r\nAuthorization: {TOKEN}\r\n{body}".encode())
                    if self.chance(0.05):
                        self.count("relayed, client left")
                        continue
                    answer = wire.message()
            except (OSError, EOFError):
                self.count("relayed, cut off")
                continue
            self.count(f"relayed, {answer.status}")
            if answer.status not in (502, 504) and f"'{method} /x/{number}'".encode() not in answer.first:
                self.problems.append(f"request {number} got {answer.first!r}")

    def clone(self, proxy: Proxy) -> None:
        """Clones; each client gets one answer or leaves, and may come back with the same request."""
        while newid := self.take("left_to_clone"):
            source = 9000 + newid % 2
            while True:
                try:
                    with proxy.wire() as wire:
                        wire.send(clone_request(newid, source))
                        try:
                            wire.sock.settimeout(0.02 + 0.3 * random.random() if self.chance(0.3) else LONG * 3)
                            answer = wire.message()
                        except TimeoutError:
                            # It leaves by a half-close, to see whether an answer was on its way in that very moment.
                            wire.sock.settimeout(LONG)
                            wire.sock.shutdown(socket.SHUT_WR)
                            if wire.more():
                                answer = wire.message()
                            else:
                                self.count("clone, client left")
                                if self.chance(0.7):
                                    continue
                                break
                except (OSError, EOFError) as error:
                    self.problems.append(f"clone {newid} was cut off: {error}")
                    break
                self.count(f"clone, {answer.status}")
                if answer.status == 200 and b"UPID" in answer.body:
                    with self.lock:
                        self.successes[json.loads(answer.body)["data"]] += 1
                break

    def run(self, flags: tuple[str, ...] = ()) -> None:
        """Do it all, then look whether everything is as it should be."""
        with FakePVE(clone_seconds=0.03, auth_delay=0.1) as pve:
            flags = ("-request-timeout", "400ms", "-poll-delay", "50ms", "-status-listen", "127.0.0.1:0", *flags)
            with Proxy(pve.url, *flags) as proxy:
                proxy.get("/")
                threads, descriptors = proxy.threads(), proxy.descriptors()
                pve.random_fault = self.fault

                def exit_status(record: CloneRecord) -> None:
                    if self.rng.random() < 0.1:
                        pve.exits.append(self.rng.choice([self.CONTENTION, "clone failed: disk full", "WARNINGS: 1"]))

                pve.on_clone = exit_status
                workers = [threading.Thread(target=self.relay, args=(proxy,)) for _ in range(4)]
                workers += [threading.Thread(target=self.clone, args=(proxy,)) for _ in range(12)]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
                port = int(proxy.wait_log(r"STATUS PAGE: 127\.0\.0\.1:(\d+)")[1])

                def snapshot() -> Any:
                    with Wire.to(port) as wire:
                        wire.send(b"GET /status.json HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                        return json.loads(wire.message().body)

                wait_until(lambda: not (now := snapshot())["running"] and not now["waiting"], "the queue to be empty", 60)
                wait_until(lambda: proxy.threads() <= threads, "no thread to be left over")
                wait_until(lambda: proxy.descriptors() <= descriptors + 1, "no descriptor to be left over")
                self.figures["memory, kB"] = proxy.memory()
                pve.hanging.set()
            self.check(pve)

    def check(self, pve: FakePVE) -> None:
        """Exactly once: by what reached PVE, and by what clients got."""
        by_newid: dict[str, list[CloneRecord]] = {}
        for record in pve.clones:
            by_newid.setdefault(record.newid, []).append(record)
        self.figures["clone calls at PVE"] = len(pve.clones)
        self.figures["tasks"] = len(pve.tasks)
        for newid, records in by_newid.items():
            for record in records[:-1]:
                contention = record.upid and pve.tasks[record.upid].exit_status == self.CONTENTION
                locked = (record.status == 500 and not record.upid) or record.fault in self.LOCKED
                if not contention and not locked:
                    self.problems.append(f"{newid} was sent again after {record.status} {record.fault} {record.upid}")
        started = collections.Counter(task.newid for task in pve.tasks.values() if task.exit_status != self.CONTENTION)
        for newid, count in started.items():
            if count > 1 and not any(t.newid == newid and t.exit_status.startswith("clone failed") for t in pve.tasks.values()):
                self.problems.append(f"{newid} was cloned {count} times")
        if pve.overlaps:
            self.problems.append(f"{pve.overlaps} times two tasks of one source")
        for upid, count in self.successes.items():
            if count > 1:
                self.problems.append(f"{upid} was given to {count} clients")


class ExactlyOnce(unittest.TestCase):
    def test_a_short_soak(self) -> None:
        soak = Soak(300, 40, 6)
        soak.run()
        self.assertEqual(soak.problems, [])
        self.assertGreater(soak.figures["tasks"], 10)


def soak(seconds: float) -> int:
    """Soak for that long, in rounds of 2,000 relayed requests and 200 clones; the exit status."""
    begin, seed = time.monotonic(), int(time.time())
    total: collections.Counter[str] = collections.Counter()
    while (left := begin + seconds - time.monotonic()) > 0:
        round_ = Soak(2000, 200, left, seed)
        round_.run()
        memory = max(total["memory, kB"], round_.figures["memory, kB"])
        total += round_.figures
        total["memory, kB"] = memory
        total["rounds"] += 1
        for problem in round_.problems:
            print(f"PROBLEM (seed {seed}): {problem}")
        total["problems"] += len(round_.problems)
        seed += 1
    for name in sorted(total):
        print(f"{name:28} {total[name]:9,}")
    print(f"{'seconds':28} {time.monotonic() - begin:9,.0f}")
    return 1 if total["problems"] else 0


# How fast it is


BENCH_ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 120\r\n\r\n{"data":"' + b"x" * 109 + b'"}'


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
                    left = int(re.findall(rb"Content-Length: (\d+)", head)[0]) - len(rest)
                    space = bytearray(1 << 18)
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


def bench_load(port: int, tls: bool, connections: int, seconds: float) -> tuple[float, float]:
    """Small requests a second over so many connections, and their median latency in microseconds."""
    latencies: list[float] = []

    def one(_: int) -> int:
        count, end = 0, time.monotonic() + seconds
        with Wire.to(port, tls) as wire:
            wire.sock.settimeout(None)
            begin = time.perf_counter()
            while time.monotonic() < end:
                wire.sock.sendall(b"GET /api2/json/version HTTP/1.1\r\nHost: pve\r\nAuthorization: x\r\n\r\n")
                length, data = 0, b""
                while length < 120 or not data.endswith(b'"}'):
                    data = wire.sock.recv(4096)
                    length += len(data)
                count += 1
                now = time.perf_counter()
                latencies.append(now - begin)
                begin = now
        return count

    return sum(at_once(connections, one)) / seconds, statistics.median(latencies) * 1e6


def bench_bulk(port: int, tls: bool, upload: bool, size: int = 1 << 30) -> float:
    """MB a second of one large body."""
    with Wire.to(port, tls) as wire:
        begin = time.perf_counter()
        if upload:
            wire.send(b"PUT / HTTP/1.1\r\nHost: pve\r\nContent-Length: %d\r\n\r\n" % size)
            piece = bytes(1 << 18)
            for _ in range(size >> 18):
                wire.send(piece)
            wire.message()
        else:
            wire.send(b"GET /%d HTTP/1.1\r\nHost: pve\r\n\r\n" % size)
            wire.head()
            left, space = size - len(wire.buffer), bytearray(1 << 18)
            while left:
                left -= wire.sock.recv_into(space)
        return size / 1e6 / (time.perf_counter() - begin)


def bench_clones() -> None:
    """The makespan of eight concurrent clones over the sum of their durations."""
    print("Eight concurrent clones of one template, their makespan over the sum of their durations:\n")
    print("| clone takes | task here | polls a clone | task elsewhere | polls a clone |")
    print("| ----------: | --------: | ------------: | -------------: | ------------: |")
    for seconds in (0.3, 0.8, 2.3):
        row = f"| {seconds:9} s |"
        for remote in (False, True):
            with FakePVE(clone_seconds=seconds) as pve, Proxy(pve.url) as proxy:
                pve.remote = remote
                begin = time.monotonic()
                statuses = [answer.status for answer in at_once(8, functools.partial(lambda proxy, i: proxy.clone(200 + i), proxy))]
                ratio = (time.monotonic() - begin) / sum(task.seconds for task in pve.tasks.values())
                assert statuses == [200] * 8, statuses
                row += f" {ratio:{'9' if not remote else '14'}.3f} | {pve.polls / 8:13.1f} |"
        print(row, flush=True)


def bench_memory() -> None:
    """What it needs when idle, with many waiting, and afterwards."""
    with FakePVE(clone_seconds=30) as pve, Proxy(pve.url) as proxy:
        proxy.get("/")
        idle = proxy.memory()
        wires = bring(proxy, *(clone_request(200 + index) for index in range(101)))
        for _ in range(200):
            wires += bring(proxy, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            wires[-1].message()
        proxy.wait_log("CLONE QUEUED", 101)
        busy = proxy.memory()

        def cpu() -> int:
            with open(f"/proc/{proxy.process.pid}/stat") as file:
                return sum(map(int, file.read().rpartition(")")[2].split()[11:13]))

        before = cpu()
        time.sleep(10)
        load = (cpu() - before) / os.sysconf("SC_CLK_TCK") / 10
        for wire in wires:
            wire.close()
        wait_until(lambda: proxy.threads() < 10, "the connections to end")
        print(f"\nMemory: idle {idle / 1024:.1f} MB; 100 clones waiting and 200 idle clients {busy / 1024:.1f} MB, "
              f"{load:.2%} of a core; afterwards {proxy.memory() / 1024:.1f} MB")  # fmt: skip


def bench() -> int:
    """Measure the program against going direct; the exit status."""
    version = sys.version.split()[0]
    print(f"{time.strftime('%Y-%m-%d')}, Python {version}, {os.cpu_count()} cores, version {program.VERSION}\n")
    bench_clones()
    with subprocess.Popen([sys.executable, __file__, "bench-backend"], stdout=subprocess.PIPE, text=True) as backend:
        assert backend.stdout
        port = int(backend.stdout.readline())
        with Proxy(f"https://127.0.0.1:{port}") as proxy:
            print("\nRelaying, direct and through the proxy:\n")
            print("| connections | direct req/s | median | proxy req/s | median |")
            print("| ----------: | -----------: | -----: | ----------: | -----: |")
            bounded = []
            for connections in (1, 8, 64):
                direct, direct_latency = bench_load(port, True, connections, 2)
                rate, latency = bench_load(proxy.port, False, connections, 2)
                if direct < 2 * rate:
                    bounded.append(str(connections))
                row = f"| {connections:11} | {direct:12,.0f} | {direct_latency:3,.0f} µs | {rate:11,.0f} | {latency:3,.0f} µs |"
                print(row, flush=True)
            if bounded:
                print(f"\nAt {', '.join(bounded)} connections the figures are bounded by this load generator (or its backend).")
            for upload in (False, True):
                direct, through = bench_bulk(port, True, upload), bench_bulk(proxy.port, False, upload)
                print(f"{'Upload' if upload else 'Download'} of 1 GiB: direct {direct:,.0f} MB/s, proxy {through:,.0f} MB/s, "
                      f"its peak memory {proxy.memory('VmHWM') / 1024:.1f} MB")  # fmt: skip
        backend.terminate()
    bench_memory()
    return 0


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
        pve.head_delay = 5
        print(f"fake PVE: {pve.url}", flush=True)
        print(f"""
It knows the templates 9000, 9001 and 9002 (VMs: 8000 and 8001) on the node pve; a clone takes {seconds:g} s
(FAKE_PVE_CLONE_SECONDS).
A clone straight to it, and one through the proxy (python3 pve_clone_queue_proxy.py -backend {pve.url}):

  curl -k -H 'Authorization: {TOKEN}' -d newid=101 {pve.url}/api2/json/nodes/pve/lxc/9000/clone
  curl    -H 'Authorization: {TOKEN}' -d newid=102 http://127.0.0.1:8081/api2/json/nodes/pve/lxc/9000/clone
""", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


def run_all() -> int:
    """Run all tests, each class in a process of its own and several at a time, since they mostly wait."""
    begin = time.monotonic()
    classes = [cls.__name__ for cls in unittest.TestCase.__subclasses__() if cls.__module__ == "__main__"]
    ran = failed = 0

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, stdin=subprocess.DEVNULL)

    with concurrent.futures.ThreadPoolExecutor(PARALLEL) as pool:
        for name, result in zip(classes, pool.map(run, classes), strict=True):
            count = re.search(r"^Ran (\d+) tests? in (.*)$", result.stderr, re.MULTILINE)
            ran += int(count[1]) if count else 0
            failed += result.returncode != 0
            print(f"{'FAILED' if result.returncode else 'ok':6} {name}: {count[0] if count else 'did not run'}", flush=True)
            if result.returncode:
                print(result.stdout + result.stderr, flush=True)
    print(f"\nRan {ran} tests in {time.monotonic() - begin:.1f} s: {f'{failed} classes FAILED' if failed else 'OK'}")
    return 1 if failed or not ran else 0


def main(arguments: list[str]) -> int:
    """Run what the command line asks for."""
    # As the unit does it: 512 clients are more than the usual limit of 1,024 descriptors.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 8192:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    mode = arguments[0] if arguments else ""
    if mode == "demo":
        return demo()
    if mode == "fake-pve":
        return fake_pve(int(arguments[1]) if len(arguments) > 1 else 8006)
    if mode == "bench":
        return bench()
    if mode == "bench-backend":
        bench_backend()
    if mode == "soak":
        return soak(float(arguments[1]) if len(arguments) > 1 else 60)
    if not arguments:
        return run_all()
    unittest.main(module=sys.modules["__main__"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
