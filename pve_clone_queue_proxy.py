#!/usr/bin/env python3
"""A proxy before the Proxmox VE API that runs container clones one at a time.

PVE locks a container while it is cloned, so of several concurrent calls of

    POST /api2/json/nodes/{node}/lxc/{vmid}/clone

all but one fail with "CT is locked". This proxy queues those calls, sends one at a time to PVE, waits until its task has
ended, and only then returns PVE's own answer. Everything else (web GUI, consoles, uploads) passes through unchanged.

The way of a request:

1. `ProxyServer`, a ThreadingHTTPServer, accepts the connection and gives it a thread, in which a `ProxyHandler` lives.
2. The handler reads the request's head from its `Wire`, the one strict reader for requests and answers alike.
3. An ordinary request goes out through `Backend`, which speaks http.client, and PVE's answer is streamed back. For a
   WebSocket `run_tunnel` then passes the bytes on, both ways.
4. A clone becomes a `CloneJob` in the `CloneQueue`, a queue.Queue, and the handler waits for its client's event.
5. `CloneWorker`, one thread, takes the job whose turn it is, posts it to PVE, reads the UPID, waits for the task (by
   polling its status, and by watching its process where that runs on this host), and hands PVE's answer to the queue,
   which sets the event. Only then does it take the next job. A source that somebody else has locked is tried again later.
6. The handler writes PVE's answer to its client.

The rooms of this file, each of which needs only those above it (but a handler calls its server): Settings, Messages,
Backend, Clone queue, VMIDs, Handler, Server, Operation (systemd, status page, metrics, -check), main. Run it with -help to
see its flags.
"""

from __future__ import annotations

import argparse
import base64
import calendar
import contextlib
import enum
import hashlib
import http.client
import http.server
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import random
import re
import select
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

VERSION = "2.1.0"
PROGRAM = "pve-clone-queue-proxy"

log = logging.getLogger(PROGRAM)


# Settings: flags in the syntax of Go's flag package, since existing command lines must go on working.


class FlagError(Exception):
    """A flag, its value or the file that it names is wrong; the text names flag and value."""


class WrongValue(argparse.ArgumentTypeError):
    """A flag's value is wrong; argparse puts the flag's name before the text."""

    def __init__(self, text: str, wanted: str) -> None:
        super().__init__(f"invalid value {text!r}: {wanted}")


def match_value(pattern: str, text: str, wanted: str) -> re.Match[str]:
    """The match of a flag's whole value. Raises WrongValue."""
    match = re.fullmatch(pattern, text)
    if not match:
        raise WrongValue(text, wanted)
    return match


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Seconds of a Go duration: `300ms`, `1.5h`, `1m30s`, `.5s`, `0`."""
    part = rf"([0-9]+\.?[0-9]*|\.[0-9]+)({'|'.join(_UNITS)})"
    match_value(rf"\+?(0|({part})+)", text, "want a duration such as 500ms, 30s, 5m or 1h30m")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(part, text))
    if seconds > 10 * 365 * 86400:
        raise WrongValue(text, "longer than ten years")
    return seconds


def parse_timeout(text: str) -> float:
    """Seconds of a Go duration that must be more than zero."""
    if not (seconds := parse_duration(text)):
        raise WrongValue(text, "must be more than 0")
    return seconds


def parse_bool(text: str) -> bool:
    """The truth values that Go's flag package takes."""
    return match_value("(1|t|T|true|TRUE|True)|0|f|F|false|FALSE|False", text, "want true or false")[1] is not None


def parse_count(text: str) -> int:
    """A number from 1 to a million."""
    return int(match_value("0*([1-9][0-9]{0,5}|1000000)", text, "want a number of 1 or more")[1])


def parse_answer(text: str) -> str:
    """When a clone's client gets PVE's answer."""
    return match_value("complete|started", text, "want complete or started")[0]


_PORT = "[0-5]?[0-9]{1,4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `:PORT` (host is then "") or `[::1]:PORT`."""
    host = r"\[[0-9A-Fa-f:.%a-z]+\]|[A-Za-z0-9._-]*"
    match = match_value(f"({host}):({_PORT})", text, "want HOST:PORT, :PORT or [IPV6]:PORT")
    return match[1].strip("[]"), int(match[2])


def host_port(host: str, port: int) -> str:
    """`HOST:PORT`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_backend(text: str) -> urllib.parse.SplitResult:
    """The backend's URL, with its port; it has no path."""
    host = r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
    match = match_value(f"(https?)://({host})(?::({_PORT}))?/?", text, "want http(s)://HOST[:PORT] without a path")
    return urllib.parse.urlsplit(f"{match[1]}://{match[2]}:{match[3] or {'http': 80, 'https': 443}[match[1]]}")


def parse_file(text: str) -> str:
    """The path of a file. A bare name is looked for among the service's credentials first (systemd.exec(5),
    LoadCredential=)."""
    credential = os.path.join(os.environ.get("CREDENTIALS_DIRECTORY", ""), text)
    return credential if "/" not in text and os.path.isfile(credential) else text


Settings = argparse.Namespace  # what the flags say, durations in seconds: `poll_delay` for -poll-delay, and so on

# How each flag's value is read, its default as one would write it, and its line in -help.
FLAGS: dict[str, tuple[Callable[[str], Any], str | None, str]] = {
    "listen": (parse_address, ":8081", "address to listen on: HOST:PORT or :PORT"),
    "backend": (parse_backend, "https://127.0.0.1:8006", "the PVE API, http(s)://HOST[:PORT]"),
    "insecure": (parse_bool, "true", "do not verify the backend's certificate"),
    "ca": (parse_file, "", "PEM file to verify the backend's certificate with (-insecure=false)"),
    "poll-delay": (parse_duration, "500ms", "longest delay between task status polls"),
    "task-timeout": (parse_timeout, "5m", "longest time a client waits for its started clone"),
    "request-timeout": (parse_timeout, "30s", "longest silence of the backend, or of a client, in one request"),
    "lock-timeout": (parse_duration, "5m", "how long a clone waits for a locked source, or for PVE to come back"),
    "queue-size": (parse_count, "100", "how many clones may wait"),
    "answer": (parse_answer, "complete", "when a clone is answered: complete, or as soon as it has started"),
    "qemu": (parse_bool, "false", "queue clones of VMs too"),
    "reserve-nextid": (parse_duration, "0", "how long a VMID of /cluster/nextid is given to nobody else; 0: off"),
    "tls-cert": (parse_file, "", "listen with TLS: PEM file of the certificate chain"),
    "tls-key": (parse_file, "", "listen with TLS: PEM file of the private key"),
    "status-listen": (parse_address, None, "address of the status page and metrics"),
    "verbose": (parse_bool, "false", "also log every relayed request"),
    "check": (parse_bool, "false", "check everything that a start needs, say what is wrong, and exit"),
}


class FlagParser(argparse.ArgumentParser):
    """argparse, whose errors are raised in place of being printed with the usage."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for whatever is wrong."""
        raise FlagError(message)


def parse_flags(arguments: list[str]) -> Settings:
    """Settings of a command line in Go's syntax: `-flag value`, `-flag=value`, one dash or two; of a flag given twice the
    last one counts. Raises FlagError, and SystemExit for -help and -version, which it prints."""
    parser = FlagParser(PROGRAM, f"{PROGRAM} [-flag value] ...", add_help=False)
    for name, (parse, default, text) in FLAGS.items():
        switch: dict[str, Any] = {"nargs": "?", "const": True} if parse is parse_bool else {}  # it may stand alone
        text += f" (default {default})" if default else ""
        parser.add_argument(f"-{name}", type=parse, default=default, help=text, metavar="VALUE", **switch)
    parser.add_argument("-version", action="version", version=f"{PROGRAM} {VERSION}", help="print the version and exit")
    parser.add_argument("-help", "-h", action="help", help="print this text and exit")
    # One dash each: with two as well, -help would show every flag twice.
    arguments = [re.sub("^--(?=[a-z])", "-", argument) for argument in arguments]
    known = {f"-{name}" for name in (*FLAGS, "version", "help", "h")}
    for argument in arguments:  # argparse would take a flag's first letters for the flag, even with allow_abbrev=False
        if re.match("-[A-Za-z]", argument) and argument.partition("=")[0] not in known:
            raise FlagError(f"unknown flag {argument.partition('=')[0]}")
    settings = parser.parse_args(arguments)
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise FlagError("flags -tls-cert and -tls-key belong together: one of them is missing")
    if settings.ca and settings.insecure:
        raise FlagError(f"flag -ca {settings.ca!r} verifies nothing without -insecure=false")
    return settings


# Messages: RFC 9112 read strictly, for requests and answers alike, from a socket that never blocks.

# The grammar. Text is latin-1, as in http.client and http.server.
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]"  # RFC 9110 5.6.2
VALUE = r"[^\x00-\x08\x0a-\x1f\x7f]"  # RFC 9110 5.5, without control characters
# RFC 9112 5: a whole line with its CRLF: a name, a colon directly behind it, a value without its outer blanks.
FIELD = re.compile(rf"^({TOKEN}++):[ \t]*+((?:{VALUE}*[^\x00-\x20\x7f])?)[ \t]*+\r\n", re.MULTILINE)
# RFC 9112 2.2: bare CR and bare LF are refused, and so are control bytes. Seen as soon as they arrive.
BAD_HEAD_BYTE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")
# RFC 9112 3: one blank between the parts; RFC 3986: a target is visible ASCII, and a fragment is never sent.
REQUEST_LINE = re.compile(rf"({TOKEN}{{1,64}}) ([!\"$-~]+) HTTP/1\.([0-9])")
# RFC 9110 7.2 with RFC 3986 3.2.2, userinfo left out
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~%!$&'()*+,;=]*)(?::[0-9]{0,5})?")
# RFC 9112 3.2.1 and 3.2.2: a path, whose first part is not empty; or a URL, of which path and query alone are used.
TARGET = re.compile(rf"(/(?!/).*)|(?i:https?)://(?=[^/?]){HOST.pattern}((?:/(?!/)|\?).*|)")
# RFC 9112 4. The blank behind the status code is optional here: some servers leave it out with an empty reason.
STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*))?")
CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")  # RFC 9110 8.6
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?")  # RFC 9112 7.1, 7.1.1

MAX_LINE = 16 * 1024
MAX_HEAD = 64 * 1024
MAX_CHUNK_LINE = 256
RECEIVE_SIZE = 64 * 1024
CHECK_SECONDS = 0.5

# Lengths of a body that are not known: RFC 9112 6.3, items 4 and 8.
CHUNKED = -1
UNTIL_CLOSE = sys.maxsize

# RFC 9110 7.6.1 names the first six; the proxy's own authentication and Trailer end here too (trailers are dropped).
HOP_BY_HOP = frozenset(("connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade", "trailer",
                        "proxy-authenticate", "proxy-authorization"))  # fmt: skip
# These too are the proxy's own business in a request.
REQUEST_DROP = HOP_BY_HOP | {"expect", "x-forwarded-for"}
# What a Connection field can't make the proxy drop, whatever it names. (Upgrade is dropped or kept for its own reasons.)
PROTECTED = frozenset(("host", "content-length", "content-type", "authorization", "cookie", "set-cookie",
                       "csrfpreventiontoken", "upgrade"))  # fmt: skip

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Fields = list[tuple[str, str]]  # names and values, in their order
Check = Callable[[], None]  # called now and then in a wait, which it ends by raising


class Refusal(Exception):
    """A request that is answered with an error: its status and reason, and what goes with them. It is the proxy's own, or
    PVE's, with the answer that PVE has given."""

    def __init__(self, status: int, reason: str, *, data: str = "", retry_after: int = 0, given: Answer | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.data, self.retry_after, self.given = status, reason, data, retry_after, given

    def answer(self) -> Answer:
        """In the shape of PVE's errors: its clients show reason phrase and `message`."""
        if self.given:
            return self.given
        body = json.dumps({"data": self.data or None, "message": self.reason}).encode() + b"\n"
        fields = [("Content-Type", "application/json;charset=UTF-8")]
        if self.retry_after:
            fields.append(("Retry-After", str(self.retry_after)))
        return Answer(self.status, printable(self.reason), fields, body)


class Malformed(Refusal):
    """A message that is not HTTP as RFC 9112 has it; status and reason are for a client, of a backend's only the reason."""


class Disconnected(Exception):
    """The connection to the peer is over."""


class EndOfStream(Disconnected):
    """The same, in good order: the peer closed it."""


class Stalled(Refusal):
    """The peer did not send or take a byte before the deadline; status and reason are for a client."""


def printable(text: str, limit: int = 300) -> str:
    """Text of a peer's, made safe for one line of a log: only printable ASCII, at most `limit` characters."""
    return re.sub(r"[^ -~]", lambda match: f"\\x{ord(match[0]):02x}", text[:limit])


def word(text: str) -> str:
    """The same for a value within a line, without blanks; `-` for none."""
    return printable(text).replace(" ", "\\x20") or "-"


def reason_of(error: Exception) -> str:
    """What an error says, for people: without Python's numbers and OpenSSL's places in its source."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return printable(re.sub(r"^\[[^]]*\] |^_ssl\.c:[0-9]+: | \(_ssl\.c:[0-9]+\)$", "", text))


class Wire:
    """One peer's connection, plain or TLS, on a non-blocking socket, used by one thread at a time.

    It is what http.client holds as its `sock`. Whatever waits raises Disconnected when the connection is over, and Stalled
    after `silence` seconds without a byte given or taken, or at the absolute time `end`, if that is set. `check` is called
    twice a second in a wait, and may raise to end it. What was received beyond what was asked for stays in `buffer`.
    """

    def __init__(self, sock: socket.socket, silence: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.silence = silence
        self.end: float | None = None
        self.check: Check | None = None
        self.buffer = bytearray()
        self.heads = 0  # that were read since BackendConnection.exchange, which wants to know, has set it back
        # A function: how many decrypted bytes TLS holds, which the descriptor does not show. (int() is 0.)
        self.pending = sock.pending if isinstance(sock, ssl.SSLSocket) else int
        self._poll = select.poll()

    def _deadline(self) -> float:
        return time.monotonic() + self.silence if self.end is None else self.end

    def _wait(self, events: int, deadline: float) -> None:
        """Wait a moment for the socket to be ready, the one way to wait for it."""
        self._poll.register(self.sock, events)
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            # Of a backend's, `BackendConnection.failure` makes another text.
            raise Stalled(408, "the client is too slow: it did not send or take a byte in time")
        if not self._poll.poll(min(seconds, CHECK_SECONDS) * 1000) and self.check:
            self.check()

    def readable(self) -> bool:
        """Whether a byte, the end or an error has arrived that has not been received yet."""
        self._poll.register(self.sock, select.POLLIN)
        return bool(self._poll.poll(0))

    # Receiving

    def receive_now(self, size: int = RECEIVE_SIZE) -> bytes | None:
        """What has arrived, at most `size` bytes; None if nothing has."""
        try:
            data = self.sock.recv(size)
        except WOULD_BLOCK:
            return None
        except OSError as error:
            raise Disconnected(reason_of(error)) from None
        if not data:
            raise EndOfStream("the connection was closed")
        return data

    def receive(self, size: int = RECEIVE_SIZE, *, later: bool = False) -> bytes:
        """At least one byte, at most `size`. `later`: wait before the first try, as the peer will hardly have answered."""
        deadline = self._deadline()
        data = None if later and not self.pending() else self.receive_now(size)
        while data is None:
            self._wait(select.POLLIN, deadline)
            data = self.receive_now(size)
        return data

    def head(self) -> str:
        """A start line and field lines, each with its CRLF, up to their empty line. Raises Malformed."""
        buffer = self.buffer
        size, end = 0, -1  # of what has been looked through; where the empty line is
        while end < 0:
            if size == len(buffer):
                buffer += self.receive(later=True)
            end = buffer.find(b"\r\n\r\n", max(0, size - 3))
            if end < 0 and BAD_HEAD_BYTE.search(buffer, max(0, size - 1)):
                raise Malformed(400, "a control byte, bare CR or bare LF in the head (RFC 9112 2.2)")
            size = len(buffer) if end < 0 else end
            if size > MAX_LINE and buffer.find(b"\r\n", 0, MAX_LINE + 2) < 0:
                raise Malformed(414, f"the first line is longer than {MAX_LINE} bytes")
            if size > MAX_HEAD:
                raise Malformed(431, f"the head is larger than {MAX_HEAD} bytes")
        self.heads += 1
        return self.take(end + 4)[:-2].decode("latin-1")

    def body(self, length: int) -> Iterator[bytes]:
        """The decoded pieces of a body as they arrive. Raises Malformed."""
        try:
            yield from self._chunks() if length == CHUNKED else self._exactly(length)
        except EndOfStream:
            if length != UNTIL_CLOSE:
                raise

    def take(self, length: int) -> bytes:
        """What `buffer` holds, at most `length` bytes."""
        data = bytes(self.buffer[:length])
        del self.buffer[: len(data)]
        return data

    def _exactly(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self.take(length) or self.receive(min(length, RECEIVE_SIZE))
            length -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while True:
            match = CHUNK_LINE.fullmatch(self._line(MAX_CHUNK_LINE))
            if not match:
                raise Malformed(400, "a malformed chunk size (RFC 9112 7.1)")
            if not (size := int(match[1], 16)):
                break
            yield from self._exactly(size)
            self._line(0)
        self.buffer[:0] = b"\r\n"  # the trailers are read like a head, with an empty first line; checked, and dropped
        Message(self.head().removeprefix("\r\n"), http11=True)

    def _line(self, limit: int) -> bytes:
        """A line of at most `limit` bytes, without its CRLF."""
        while (end := self.buffer.find(b"\r\n", 0, limit + 2)) < 0:
            if len(self.buffer) >= limit + 2:
                raise Malformed(400, "a chunk's line is too long or not ended by CRLF (RFC 9112 7.1)")
            self.buffer += self.receive()
        return self.take(end + 2)[:-2]

    # Sending

    def sendall(self, data: bytes | memoryview) -> None:
        """Send all of it; the limit on silence starts anew with every byte taken."""
        left = memoryview(data)
        deadline: float | None = None
        while left:
            try:
                left = left[self.sock.send(left) :]
                deadline = None
            except WOULD_BLOCK:
                # Then try again: a full buffer counts as writable only when a third of its megabytes is free.
                deadline = deadline or self._deadline()
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                raise Disconnected(reason_of(error)) from None

    def close(self) -> None:
        """Close the connection, with TLS's close_notify where that can be sent at once."""
        close_notify(self.sock)
        self.sock.close()


def close_notify(sock: socket.socket) -> None:
    """End TLS on a non-blocking socket without waiting for the peer."""
    if isinstance(sock, ssl.SSLSocket):
        with contextlib.suppress(OSError, ValueError):
            sock.unwrap()


def whole(pieces: Iterable[bytes], limit: int) -> bytes | None:
    """All of a body; None if it is larger than that: then no more of it is read."""
    body = bytearray()
    for piece in pieces:
        body += piece
        if len(body) > limit:
            return None
    return bytes(body)


class Message:
    """A head's field lines, checked: `fields` in their order, their names as they came; `values` by lower-case name;
    `options`, the elements of Connection; `keep_alive`, whether the connection may be used again (RFC 9112 9.3)."""

    def __init__(self, block: str, http11: bool) -> None:
        """Parse field lines, each ended by CRLF. Raises Malformed."""
        self.fields: Fields = FIELD.findall(block)
        if len(self.fields) != block.count("\n"):
            raise Malformed(400, "a malformed header line: folded, or a blank before its colon, say (RFC 9112 5)")
        self.values: dict[str, list[str]] = {}
        for name, value in self.fields:
            self.values.setdefault(name.lower(), []).append(value)
        self.http11 = http11
        self.options = self.tokens("connection") if "connection" in self.values else set()
        self.keep_alive = "close" not in self.options and (http11 or "keep-alive" in self.options)

    def one(self, name: str) -> str | None:
        """The value of a field that may stand once; None without it. Raises Malformed if it stands twice."""
        values = self.values.get(name, [None])
        if len(values) > 1:
            raise Malformed(400, f"more than one {name} field")
        return values[0]

    def tokens(self, name: str) -> set[str]:
        """The lower-case elements of a list-valued field (RFC 9110 5.6.1)."""
        return {element.strip(" \t") for element in ",".join(self.values.get(name, [])).lower().split(",")}

    def end_to_end(self, drop: frozenset[str]) -> Fields:
        """The fields that go on to the next hop (RFC 9110 7.6.1): without those in `drop` and those that a Connection
        field names."""
        if self.options:
            drop = drop | (self.options - PROTECTED)
        return [(name, value) for name, value in self.fields if name.lower() not in drop]

    def framing(self, otherwise: int) -> int:
        """Length of the body by Content-Length, CHUNKED, or `otherwise` where no field says one (RFC 9112 6). Stricter
        than the RFC: both fields together, repeats and other codings are refused. Raises Malformed."""
        if "transfer-encoding" in self.values:
            if not self.http11 or "content-length" in self.values:
                raise Malformed(400, "Transfer-Encoding in HTTP/1.0, or together with Content-Length")
            if (self.one("transfer-encoding") or "").lower() != "chunked":
                raise Malformed(501, "a Transfer-Encoding other than chunked")
            return CHUNKED
        length = self.one("content-length")
        if length is None:
            return otherwise
        if not CONTENT_LENGTH.fullmatch(length):
            raise Malformed(400, "Content-Length is not a number")
        return int(length)


class Request(Message):
    """A request's head that has passed every check: RFC 9112 3, 6 and RFC 9110 7.2, 10.1.1. `upgrade` says whether this
    is a WebSocket's opening handshake (RFC 6455 4.1)."""

    def __init__(self, head: str) -> None:
        """Parse the lines of a head. Raises Malformed."""
        start_line, _, block = head.partition("\r\n")
        match = REQUEST_LINE.fullmatch(start_line)
        if not match:
            raise Malformed(400, "a malformed request line, or not HTTP/1.1 or HTTP/1.0 (RFC 9112 3)")
        self.method, target, minor = match.groups()
        super().__init__(block, minor != "0")
        # PVE's parser takes `_` for `-`, so these would be second fields of that name to it and another one to us.
        if "_" in block and any("_" in name and name.replace("_", "-") in REQUEST_DROP | PROTECTED for name in self.values):
            raise Malformed(400, "a field name with _ that can be taken for one with -")
        match = TARGET.fullmatch(target)
        if not match or self.method == "CONNECT":
            raise Malformed(400, "CONNECT, or a target that is not a path or begins with two slashes (RFC 9112 3.2)")
        self.target = match[1] or "/" + match[2].removeprefix("/")
        host = self.one("host")
        if not HOST.fullmatch(host or "") or (host is None and self.http11):
            raise Malformed(400, "no Host field, or a malformed one (RFC 9112 3.2)")
        self.length = self.framing(0)
        self.expects_continue = self.http11 and "expect" in self.values and "100-continue" in self.tokens("expect")
        # Other upgrades are not offered to the backend: behind an h2c upgrade, say, clones would pass unseen.
        upgrade = "upgrade" in self.values and (self.method, self.http11, self.length) == ("GET", True, 0)
        self.upgrade = upgrade and self.tokens("upgrade") == {"websocket"} and "upgrade" in self.options

    def path_parts(self) -> list[str]:
        """The path as PVE reads it: percent-decoded, then split on `/`, empty parts dropped. Line feeds at its end are
        left out, since `$` in Perl's regular expressions does not mind one."""
        path = urllib.parse.unquote(self.target.partition("?")[0], "latin-1").rstrip("\n")
        return [part for part in path.split("/") if part]

    def __str__(self) -> str:
        """Method and path, for the log: a query may hold secrets."""
        return f"{printable(self.method)} {printable(self.target.partition('?')[0])}"


class Response(Message):
    """The head of an answer (RFC 9112 4, 6.3). `length` says how the body is framed."""

    def __init__(self, head: str, method: str) -> None:
        """Parse the lines of the head of an answer to a request of that method. Raises Malformed."""
        start_line, _, block = head.partition("\r\n")
        match = STATUS_LINE.fullmatch(start_line)
        if not match:
            raise Malformed(502, "a malformed status line (RFC 9112 4)")
        super().__init__(block, match[1] == "1")
        self.status, self.reason = int(match[2]), match[3] or ""
        length = self.framing(UNTIL_CLOSE)
        self.length = 0 if method == "HEAD" or self.status < 200 or self.status in (204, 304) else length

    def relayed_fields(self) -> Fields:
        """The fields that go to the client; RFC 9110 8.6: an answer of 1xx or 204 never has a Content-Length."""
        return self.end_to_end(HOP_BY_HOP | {"content-length"} if self.status < 200 or self.status == 204 else HOP_BY_HOP)


class Answer(NamedTuple):
    """A whole answer that is small enough to be kept; its fields without Content-Length."""

    status: int
    reason: str
    fields: Fields
    body: bytes

    def __str__(self) -> str:
        """Status and reason phrase, for people."""
        return printable(f"{self.status} {self.reason}")


def json_field(text: bytes, name: str) -> object:
    """That field of a JSON object; None if there is no such thing."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(text)
        return content.get(name) if isinstance(content, dict) else None
    return None


# Backend: requests to the PVE API, by http.client with a strict reader of answers.

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110 9.2.1
# PVE reads 62 field lines and 8 KiB of them. What stands behind that it takes for another request, which nobody has
# checked: a clone, say. So nothing comes near it.
MAX_OUTGOING_FIELDS = 60
MAX_OUTGOING_SIZE = 7680
# PVE closes an idle connection after 5 s; behind this age it might close it in the very moment of a request.
POOL_SECONDS = 4.0
POOL_SIZE = 64
MAX_ANSWER = 1024 * 1024
MAX_INTERIM = 10
INTERIM_BEGIN = re.compile(rb"HTTP/1\.[01] 1(?!01)")  # of an answer before the final one (RFC 9110 15.2)
LOOK_SECONDS = 1.0  # between two looks at idle connections, and for a backend that is away


class BackendError(Refusal):
    """The backend gave no (whole, well-formed) answer; `status` is what the client gets: 502 or 504."""


class Unreachable(BackendError):
    """No connection could be made: nothing was sent."""


class Away(Unreachable):
    """The same, but it may be different in a moment: refused, no route, no answer. Not a certificate or a name."""


class AnsweredEarly(Exception):
    """The backend has begun its answer, or closed, before it had the whole request: it won't read the rest."""


class ClientGone(Exception):
    """The client left before it had its answer."""


BodyReader = Callable[[Check], Iterable[bytes]]
CHUNKED_FIELD = ("Transfer-Encoding", "chunked")
UPGRADE_FIELD = ("Connection", "Upgrade")


class Outgoing:
    """A request as PVE gets it: method, target, all fields, and the body: bytes, or a function that gives its pieces as
    they arrive and calls what it is given before each of them, and while it waits for them."""

    def __init__(self, method: str, target: str, fields: Fields, body: bytes | BodyReader | None = None) -> None:
        """The one place that refuses what PVE would misread: raises Refusal (431)."""
        self.lines = "\r\n".join([f"{name}: {value}" for name, value in fields]).encode("latin-1")
        if len(fields) > MAX_OUTGOING_FIELDS or len(self.lines) + len("\r\n") > MAX_OUTGOING_SIZE:
            raise Refusal(431, f"more than {MAX_OUTGOING_FIELDS} header fields or {MAX_OUTGOING_SIZE} bytes of them for PVE")
        self.method, self.target, self.body = method, target, body
        # No client's Transfer-Encoding or Connection gets here.
        self.chunked, self.upgrade = CHUNKED_FIELD in fields[-1:], UPGRADE_FIELD in fields[-1:]
        # Whether it may go out on a connection that was used before, and a second time if that turns out closed.
        self.repeatable = body is None and method in SAFE_METHODS and not self.upgrade


def unusable(what: str, error: Exception) -> FlagError:
    """The error of a flag whose file can't be read, or does not hold what it should."""
    hint = "; LoadCredential= in the unit hands it to the service" if isinstance(error, PermissionError) else ""
    return FlagError(f"{what}: {reason_of(error)}{hint}")


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """How the backend's certificate is verified; None without TLS. Raises FlagError if `-ca` can't be read."""
    if settings.insecure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        try:
            context = ssl.create_default_context(cafile=settings.ca or None)
        except OSError as error:
            raise unusable(f"invalid value {settings.ca!r} for flag -ca", error) from None
        # CAs made by older PVE releases have no keyUsage, which Python 3.13's default refuses.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context if settings.backend.scheme == "https" else None


class BackendResponse:
    """The `response_class` of a BackendConnection. Of a response of http.client's it has what HTTPConnection asks for:
    `begin`, `will_close`, `isclosed`, `close`. A `with` keeps the connection for another request where that is safe, or
    else closes it."""

    will_close = False  # HTTPConnection would close the connection before the body was read
    connection: BackendConnection  # set by its `exchange`

    def __init__(self, sock: Wire, method: str) -> None:
        self.wire, self._method = sock, method

    def begin(self) -> None:
        """Read the head of the final answer; `interim` holds those before it (RFC 9110 15.2)."""
        self.interim: list[Response] = []
        while (head := Response(self.wire.head(), self._method)).status < 200 and head.status != 101:
            self.interim.append(head)
            if len(self.interim) > MAX_INTERIM:
                raise Malformed(502, f"more than {MAX_INTERIM} interim answers")
        self.head = head
        self._left = head.length  # of the body: the number of bytes, CHUNKED or UNTIL_CLOSE

    def take(self) -> bytes:
        """What has come of the body with its head, unless it is chunked."""
        data = self.wire.take(self._left) if self._left != CHUNKED else b""
        self._left -= len(data) if self._left != UNTIL_CLOSE else 0
        return data

    def __iter__(self) -> Iterator[bytes]:
        """The decoded pieces of what is left of the body. Raises BackendError."""
        try:
            yield from self.wire.body(self._left)
        except (Malformed, Disconnected, Stalled) as error:
            raise self.connection.failure(error) from None
        self._left = 0

    def isclosed(self) -> bool:
        """Whether it was read to its end."""
        return self._left == 0

    def close(self) -> None:
        """HTTPConnection calls this when `begin` has failed; the connection is closed by who made it."""

    def __enter__(self) -> BackendResponse:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection where the answer was not read to its end or had no end of its own, where bytes lie behind
        it, where PVE said close."""
        connection, head = self.connection, self.head
        delimited = head.keep_alive and head.length != UNTIL_CLOSE and head.status != 101
        if connection.reusable and delimited and self.isclosed() and not (self.wire.buffer or self.wire.pending()):
            connection.backend.keep(connection)
        else:
            connection.close()


class BackendConnection(http.client.HTTPConnection):
    """One connection to the backend, plain or TLS. Its `sock` is a Wire."""

    response_class = BackendResponse  # type: ignore[assignment]
    auto_open = 0  # a closed connection is not silently opened again

    def __init__(self, backend: Backend, end: float | None = None) -> None:
        """Connect, until that time or else within the limit on silence, to each address. Raises Unreachable."""
        seconds = backend.silence if end is None else max(end - time.monotonic(), 0.01)
        super().__init__(backend.host_field[1], timeout=seconds)
        self.backend = backend
        self.idle_since = 0.0  # 0 until it has served a request
        try:
            self.connect()
            if backend.context:
                self.sock = backend.context.wrap_socket(self.sock, server_hostname=self.host)
        except (OSError, UnicodeError) as error:
            self.close()
            late = isinstance(error, TimeoutError)
            problem = f"it did not accept a connection within {round(seconds, 1):g} s" if late else reason_of(error)
            backend.note(problem)
            lasting = isinstance(error, (ssl.SSLError, socket.gaierror, UnicodeError)) and not isinstance(error, ssl.SSLEOFError)
            raise (Unreachable if lasting else Away)(504 if late else 502, f"{backend.url} can't be reached: {problem}") from None
        backend.note("")
        self.sock = self.wire = Wire(self.sock, backend.silence)

    def exchange(self, outgoing: Outgoing, check: Check | None, end: float | None) -> BackendResponse:
        """Send a request and read the head of its final answer. Raises BackendError, and what `check` and the reader of
        the body raise; then the connection is closed."""
        wire = self.wire
        wire.check, wire.end, wire.heads = check, end, 0
        self.reusable = outgoing.body is None  # PVE may misread a body and take the rest for another request
        try:
            self.putrequest(outgoing.method, outgoing.target, skip_host=True, skip_accept_encoding=True)
            self._output(outgoing.lines)  # type: ignore[attr-defined]  # putheader would check each field again
            body = outgoing.body(self._look_for_answer) if callable(outgoing.body) else outgoing.body
            with contextlib.suppress(Disconnected, AnsweredEarly):  # what it said before can still be read
                self.endheaders(body, encode_chunked=outgoing.chunked)
            response: BackendResponse = self.getresponse()  # type: ignore[assignment]
            if response.head.status == 101 and not (outgoing.upgrade and response.head.tokens("upgrade") == {"websocket"}):
                raise Malformed(502, "a 101 that was not asked for")
        except (Malformed, Disconnected, Stalled) as error:
            self.close()
            # It was kept alive and turned out closed before one byte of an answer.
            if self.idle_since and isinstance(error, Disconnected) and not (wire.buffer or wire.heads):
                return BackendConnection(self.backend, end).exchange(outgoing, check, end)
            raise self.failure(error) from None
        except BaseException:
            self.close()
            raise
        response.connection = self
        return response

    def _look_for_answer(self) -> None:
        """Raise AnsweredEarly when the backend has begun its final answer, or closed."""
        buffer = self.wire.buffer
        try:
            buffer += self.wire.receive_now() or b""
        except Disconnected:
            raise AnsweredEarly from None
        if len(buffer) > MAX_HEAD or (len(buffer) >= len("HTTP/1.1 200") and not INTERIM_BEGIN.match(buffer)):
            raise AnsweredEarly

    def failure(self, error: Exception) -> BackendError:
        """What a failure of this connection means for the client."""
        if isinstance(error, Malformed):
            return BackendError(502, f"the backend's answer is malformed: {error.reason}")
        if isinstance(error, Stalled):
            time_limit = "in time" if self.wire.end else f"within {self.backend.silence:g} s"
            return BackendError(504, f"the backend gave no answer {time_limit}")
        return BackendError(502, f"the connection to the backend broke: {error}")


class Backend:
    """The PVE API.

    `_lock` guards `_idle`, the stack of idle connections (the newest on top), and `_problem`, why and since when the API
    can't be reached (None if it can).
    """

    def __init__(self, settings: Settings) -> None:
        """Raises FlagError if the CA file is no good."""
        self.url: str = settings.backend.geturl()
        self.host_field = ("Host", settings.backend.netloc)
        self.silence = settings.request_timeout
        self.context = tls_context(settings)
        self._lock = threading.Lock()
        self._idle: list[BackendConnection] = []
        self._problem: tuple[str, float] | None = None

    def open(self, outgoing: Outgoing, check: Check | None = None, seconds: float | None = None) -> BackendResponse:
        """Send a request and read the head of its final answer; to be used in a `with`. `check` is called while the
        backend is waited for and may raise; `seconds` bounds the whole exchange. Raises BackendError."""
        end = seconds and time.monotonic() + seconds
        connection = (self._take() if outgoing.repeatable else None) or BackendConnection(self, end)
        return connection.exchange(outgoing, check, end)

    def exchange(self, outgoing: Outgoing, seconds: float, check: Check | None = None) -> Answer:
        """The whole answer, within that time. Raises BackendError."""
        with self.open(outgoing, check, seconds) as response:
            body = whole(response, MAX_ANSWER)
        if body is None:
            raise BackendError(502, f"the backend's answer is larger than {MAX_ANSWER} bytes")
        head = response.head
        return Answer(head.status, head.reason, head.end_to_end(HOP_BY_HOP | {"content-length"}), body)

    def _take(self) -> BackendConnection | None:
        """An idle connection that is still silent."""
        with self._lock:
            while self._idle:
                connection = self._idle.pop()
                if time.monotonic() - connection.idle_since < POOL_SECONDS and not connection.wire.readable():
                    return connection
                connection.close()
        return None

    def keep(self, connection: BackendConnection) -> None:
        """Keep an idle connection for another request."""
        connection.idle_since = time.monotonic()
        with self._lock:
            self._idle.append(connection)
            if len(self._idle) > POOL_SIZE:
                self._idle.pop(0).close()

    # Whether it can be reached

    def problem(self) -> tuple[str, float] | None:
        """Why it can't be reached, and for how many seconds; None if it can."""
        with self._lock:
            return (self._problem[0], time.monotonic() - self._problem[1]) if self._problem else None

    def note(self, problem: str) -> None:
        """Say once when it can't be reached any more, and once when it can again."""
        with self._lock:
            before = self._problem
            self._problem = (problem, before[1] if before else time.monotonic()) if problem else None
        if problem and not before:
            log.warning("PVE UNREACHABLE: %s: %s", self.url, problem)
        elif before and not problem:
            log.info("PVE BACK: after %.1fs", time.monotonic() - before[1])

    def look(self) -> None:
        """See whether it can be reached, and say so if that has changed."""
        with contextlib.suppress(Unreachable):
            BackendConnection(self).close()

    def look_around(self) -> NoReturn:
        """Look at the start, and then for its return while it is away, which is so seen without a request, too. Close the
        connections that have been idle for too long."""
        self.look()
        while True:
            time.sleep(LOOK_SECONDS)
            if self.problem():
                self.look()
            oldest = time.monotonic() - POOL_SECONDS
            with self._lock:
                while self._idle and self._idle[0].idle_since < oldest:  # the oldest lie at the bottom
                    self._idle.pop(0).close()


# Clone queue: what PVE says, jobs, the queue, and the one worker.

# A UPID as far as it is polled: PVE's own syntax is narrower, but lets users have almost any name.
_UPID = re.compile(r"UPID:[^\s/]{0,495}")
# Node; process id and the process's start time (field 22 of /proc/PID/stat), both in hexadecimal.
_UPID_PARTS = re.compile(r"UPID:([a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?):(?:([0-9A-Fa-f]{8}):([0-9A-Fa-f]{8,9}):)?")

# The name of an API token, or the user of a ticket.
_USER = re.compile(r"PVEAPIToken=([^=\s]{1,200})=|PVEAuthCookie=PVE(?:%3A|:)([^:;\s]{1,200}?)(?:%3A|:)")

KEEP_SECONDS = 60.0  # for which an answer is kept for a client that left and may come back
KEEP_COUNT = 1000  # of ended clones
HISTORY = 100  # of them are shown
FIRST_RETRY = 0.25  # the first and the longest pause before a locked source, or a PVE that is away, is tried again
LONGEST_RETRY = 0.5
# Between two clones of somebody else's there is a lock and no task: so many tries in a row, this far apart, must find
# a source locked and not being cloned before it counts as stuck.
STUCK_TRIES = 3
STUCK_PAUSE = 1.0
RETURN_SECONDS = 1.0  # for which the client of a refused clone is expected back with another VMID
SHORTEST_POLL = 0.01  # between two polls of a task whose process can't be watched
LONGEST_LINE_DISTANCE = 60.0  # between two lines that say that a task still runs

PVE = "PVE"  # the scope of a hold: all clones
SHUTTING_DOWN = "the clone queue is shutting down; the clone was not started"
OUTCOMES = ("completed", "failed", "taken", "rejected", "refused", "abandoned")
SUMS = ("wait_seconds_sum", "wait_seconds_count", "clone_seconds_sum", "clone_seconds_count")


class CloneCall(NamedTuple):
    """A clone request as PVE reads it; `newid` is "" if there is none, or if the body has not been read."""

    kind: str
    node: str
    source: str
    newid: str
    user: str

    def __str__(self) -> str:
        return f"{self.place} newid={word(self.newid)}"

    @property
    def place(self) -> str:
        """How every line of a clone's begins."""
        return f"node={word(self.node)} vmid={word(self.source)}"


def user_of(message: Message) -> str:
    """Who a request says it is: the name of its API token, or its ticket's user; never a secret."""
    credentials = " ".join(message.values.get("authorization", []) + message.values.get("cookie", []))
    match = _USER.search(credentials)
    return printable(urllib.parse.unquote(match[1] or match[2])) if match else ""


def clone_call(request: Request, qemu: bool) -> CloneCall | None:
    """What a clone request asks for, as far as its head tells; None for any other request. It fails closed: what PVE
    will refuse for its node or VMID counts too. Raises Refusal (501) for a format in which PVE runs clones as well, and
    that nobody needs; `extjs` is the web GUI's, which has its own patience."""
    # A ticket without its CSRFPreventionToken PVE refuses, after 3 s that the worker need not wait.
    lacks_token = "cookie" in request.values and not {"authorization", "csrfpreventiontoken"} & request.values.keys()
    match request.path_parts() if request.method == "POST" and not lacks_token else []:
        case ["api2", format_, "nodes", node, "lxc" | "qemu" as kind, source, "clone"] if format_ != "extjs":
            if re.fullmatch("[0-9]+", source) and (kind == "lxc" or qemu):
                if format_ != "json":
                    raise Refusal(501, "clones are queued by /api2/json/ only; this format is not offered for them")
                return CloneCall(kind, node, source, "", user_of(request))
    return None


def parameter(text: str, name: str) -> list[str]:
    """The values of a parameter in a query or form, as PVE reads them: `;` separates like `&`, a second `=` ends a value."""
    pairs = [part.split("=")[:2] for part in re.split("[&;]", text) if "=" in part]
    return [urllib.parse.unquote_plus(value, "latin-1") for key, value in pairs if urllib.parse.unquote_plus(key) == name]


def newid_of(query: str, body: bytes) -> str:
    """The `newid` of a clone as PVE reads it: the query's, or else the body's, which is JSON or a form; without leading
    zeros. "" if there is none, or more than one, which PVE refuses."""
    in_body = [str(json_field(body, "newid"))] if body.lstrip()[:1] == b"{" else parameter(body.decode("latin-1"), "newid")
    values = parameter(query, "newid") or in_body
    return values[0].lstrip("0") if len(values) == 1 and re.fullmatch("[0-9]{1,20}", values[0]) else ""


# The errors that say "locked, and nothing was created", whole texts of pve-container and qemu-server: those of a refused
# POST, and those of a task that has removed what it made. Only after these a clone is sent again.
LOCKED = (
    r"(CT|VM) is locked \([^()]*\)|can't lock file '/run/lock/lxc/pve-config-SOURCE\.lock' - got timeout"
    r"|cfs-lock 'firewall-vm-NEWID' error: got lock request timeout"
)
CONTENTION = (
    r"clone failed: (can't lock file '/var/lock/pve-manager/pve-storage-[^']*' - got timeout"
    r"|cfs-lock '[^']*' error: got lock request timeout"
    r"|can't add VM NEWID to pool '[^']*': cfs-lock 'file-user_cfg' error: got lock request timeout)"
    r"|can't lock file '/var/lock/qemu-server/lock-SOURCE\.conf' - got timeout"
)


def is_one_of(errors: str, call: CloneCall, text: str) -> bool:
    """Whether a text of PVE's is one of these errors, of that very clone."""
    return bool(re.fullmatch(errors.replace("SOURCE", re.escape(call.source)).replace("NEWID", re.escape(call.newid)), text))


def upid_of(answer: Answer) -> str | None:
    """The UPID of an accepted clone, if the answer has one that can be polled."""
    data = json_field(answer.body, "data") if 200 <= answer.status < 300 else None
    return data if isinstance(data, str) and _UPID.fullmatch(data) and data.isprintable() else None


def node_of(upid: str, otherwise: str) -> str:
    """The node that a UPID names: a real one's name even where the request said `localhost`."""
    return match[1] if (match := _UPID_PARTS.match(upid)) else otherwise


class TaskProcess(contextlib.ExitStack):
    """A task's worker process, if it runs on this host: the sleep between two polls ends the moment it ends. PVE calls a
    task running exactly while /proc/PID exists with the start time that its UPID names."""

    def __init__(self, upid: str, expected_end: float) -> None:
        super().__init__()
        self.is_here = False
        self.ended_at = 0.0  # 0 until it has, or if it is not here
        self._expected_end = expected_end
        self._poll = select.poll()
        match = _UPID_PARTS.match(upid)
        pid, start = (int(part, 16) for part in match.groups("0")[1:]) if match else (0, 0)
        with contextlib.suppress(OSError, OverflowError, IndexError):
            pidfd = os.pidfd_open(pid)  # first, so that the process compared is the one that is held
            self.callback(os.close, pidfd)
            # The command's name, in parentheses, may hold anything: field 3 of proc(5) follows the last one.
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[22 - 3]) == start:
                self._poll.register(pidfd, select.POLLIN)  # it is readable when the process has ended
                self.is_here = True

    def sleep(self, longest: float) -> None:
        """Sleep until the next poll. Of a process elsewhere half of the time up to its expected end, and a tenth of the time
        since then, keep both the lag and the number of polls small; one that has ended here counts as running until it is
        reaped."""
        now, pause = time.monotonic(), longest
        if self.ended_at:
            pause = max(0.001, now - self.ended_at)
        elif not self.is_here:
            pause = max(SHORTEST_POLL, (self._expected_end - now) / 2, (now - self._expected_end) / 10)
        for pidfd, _ in self._poll.poll(max(0.0, min(pause, longest, 3600.0)) * 1000):
            self.ended_at = time.monotonic()
            self._poll.unregister(pidfd)  # from now on this only sleeps


# A client has left when it has closed its connection, or only its sending half: nginx and Go read that so too.
HUNG_UP = select.POLLRDHUP


def polled(descriptors: Iterable[int], events: int) -> list[int]:
    """Those of which these events, their end or an error can be told now, without reading from them."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, events)
    return [descriptor for descriptor, _ in poll.poll(0)]


class Client:
    """A clone's client as the queue knows it. `event` wakes its handler: the answer is there, or the client has left.
    `left` is the queue's, guarded by its mutex: nothing more can be given to this client."""

    def __init__(self, fd: int, address: str) -> None:
        self.fd = fd
        self.address = address
        self.event = threading.Event()
        self.left = False

    def check(self) -> None:
        """Raise ClientGone if it has left."""
        if polled([self.fd], HUNG_UP):
            raise ClientGone


class CloneJob:
    """One clone. All but the first block is guarded by the queue's mutex and changed by CloneQueue alone. Where it is in its
    life follows from where it stands:

        waiting   in `queue`, and none of the below
        held      a hold is on one of its scopes: PVE, its node, its source
        taken     `taken_by` is the clone that took its VMID
        running   it is `queue.running`
        ended     in `ended`, with its outcome

    In all of them its `client` is there or has left; an equal request takes a left one over. Its `answer` can come before its
    end: the 504 of a task that outlives -task-timeout, or PVE's own with -answer started. Once `delivered`, it is nobody's.
    """

    def __init__(self, call: CloneCall, outgoing: Outgoing, poll_fields: Fields, key: bytes, client: Client) -> None:
        """`outgoing` is what PVE gets, `poll_fields` the fields of a poll, `key` the same for equal requests."""
        self.call = call
        self.outgoing = outgoing
        self.poll_fields = poll_fields
        self.key = key
        self.source = f"source {call.source}"
        self.scopes = (PVE, f"node {call.node}", self.source)
        self.queued_at = time.monotonic()

        self.client = client
        self.answer: Answer | None = None
        self.delivered = False
        self.tries = 0
        self.started_at = 0.0  # of the last try
        self.accepted: Answer | None = None  # PVE's answer with the UPID of the task that runs now
        self.upid = ""
        self.failed: Answer | None = None  # PVE's answer to a try whose task failed from contention
        self.taken_by: CloneJob | None = None
        self.outcome = ""
        self.text = ""  # how it ended, in PVE's words where there are any
        self.ended_at = 0.0

    @property
    def left(self) -> bool:
        """Whether its client has left, and may come back: an ended job without an answer has been given up."""
        return self.client.left and not self.delivered and (not self.outcome or self.answer is not None)

    def times(self) -> tuple[float, float]:
        """Seconds waited and run. What is spent on a lock is part of the wait: only a task runs."""
        now = self.ended_at or time.monotonic()
        began = self.started_at if self.upid else now
        return began - self.queued_at, now - began


def taken_text(call: CloneCall, taker: CloneJob) -> str:
    """What PVE says to a clone whose VMID the taker's clone has taken."""
    if call.kind == taker.call.kind == "qemu":
        return f"unable to create VM {call.newid}: config file already exists"
    kind, node = "CT" if taker.call.kind == "lxc" else "VM", node_of(taker.upid, taker.call.node)
    return f"{kind} {call.newid} already exists on node '{node}'"


class Hold:
    """Why the clones of a scope can't be tried now: since when, what PVE said, and when the first of them tries again.
    `vain` counts the tries in a row that found a source locked and not being cloned, once a clone's time was over."""

    def __init__(self, lock_timeout: float) -> None:
        self.lock_timeout = lock_timeout
        self.since = self.until = time.monotonic()
        self.pause = FIRST_RETRY
        self.text = ""
        self.vain = 0

    def end_of(self, job: CloneJob) -> float:
        """When a job has waited as long as it may, from its arrival or, if that is later, from when the hold began."""
        return max(self.since, job.queued_at) + self.lock_timeout


class PutOff(NamedTuple):
    """A try that made nothing and may be repeated: the scope that is the reason, PVE's answer, its text, and whether the
    source is being cloned by somebody else: then it works, and all may wait as long again."""

    scope: str
    answer: Answer
    text: str
    being_cloned: bool = False


class Ended(NamedTuple):
    """How a clone ended: its outcome, the answer for its client, a text for the page, and its line in the log."""

    outcome: str
    answer: Answer | None
    text: str
    line: str


def gone_wrong(job: CloneJob, answer: Answer, text: str) -> Ended:
    """The end of a clone that could not be done, or of which nobody knows the outcome."""
    return Ended("failed", answer, text, f"CLONE ERROR: {job.call}: {text}")


class CloneQueue(queue.Queue[CloneJob]):
    """Clones in the order of their arrival, one at a time; never asks PVE.

    A queue.Queue in the way queue.PriorityQueue is one: only what comes next is its own. `mutex` guards all below and every
    job's life. While it is held nothing waits: a descriptor is asked whether its client is there, a line is queued to be
    logged.

        queue    what waits and what runs, in the order of arrival; a job that is put off never leaves its place
        ended    what has ended, the newest last; answers in it are forgotten after KEEP_SECONDS
        holds    by scope; one exists only while somebody is in its scope
        totals   by outcome, and of tries that were put off; how long clones waited, and how many and how long tasks ran
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.queue_size)
        self._lock_timeout = settings.lock_timeout

    def _init(self, maxsize: int) -> None:
        self.queue: dict[CloneJob, None] = {}
        self.running: CloneJob | None = None
        self.ended: deque[CloneJob] = deque(maxlen=KEEP_COUNT)
        self.holds: dict[str, Hold] = {}
        self.draining = False
        self.totals: dict[str, float] = dict.fromkeys((*OUTCOMES, "lock_retries", *SUMS), 0)
        self._fresh_is_next = False  # since the last try was one of a job that had been put off
        self._refuse_at_once = 1  # see `_refuse_taken`
        self._expected_until = 0.0  # 0 if no client of a refused clone is expected back
        self._returned: CloneJob | None = None

    def _qsize(self) -> int:
        return len(self.queue) - (self.running is not None)

    def _put(self, item: CloneJob) -> None:
        call = item.call
        self._make_room()  # raises while draining: here too, or a job would slip in behind the drain
        log.info("CLONE QUEUED: %s waiting=%d client=%s user=%s", call, self._qsize(), item.client.address, word(call.user))
        self.queue[item] = None
        if self.running and self.running.upid and self.running.call.newid == call.newid != "":
            item.taken_by = self.running
        self._refuse_at_once = 1
        if self._expected_until and not item.taken_by:
            self._expected_until, self._returned = 0.0, item
        self._refuse_taken()

    def _get(self) -> CloneJob:
        """Wait for a job whose turn it is and claim it, in one step; drop those whose clients have left by then."""
        while True:
            self._notice_who_left()
            job, seconds = self._next()
            if job is None:
                self.not_empty.wait(seconds)
            elif job.client.left:
                self._end(job)
            else:
                break
        self.running = job
        job.tries += 1
        job.started_at = time.monotonic()
        if job.tries == 1:
            log.info("CLONE START: %s waited=%.1fs", job.call, job.started_at - job.queued_at)
        return job

    def _next(self) -> tuple[CloneJob | None, float | None]:
        """Of the jobs that are neither taken nor held any more, the first in the order of arrival; or None, and after how
        many seconds there may be one. Of a hold's scope only the first one tries. Those that are due again and new ones
        take turns, since PVE may take 10 s to say locked. Who is back with another VMID comes before other new ones."""
        now = time.monotonic()
        due: dict[CloneJob, float] = {}  # when each may be tried; 0 for a new one
        met: set[Hold] = set()
        for job in [job for job in self.queue if not job.taken_by]:
            holds = self._holds_of(job)
            if met.isdisjoint(holds):
                due[job] = max((hold.until for hold in holds), default=0.0)
            met.update(holds)
        # False is less than True: first whose turn it is, then who is due for longest, then who is back, then the first.
        order = {job: ((at > 0) == self._fresh_is_next, at, job is not self._returned) for job, at in due.items() if at <= now}
        chosen = min(order, key=order.__getitem__, default=None)
        self._fresh_is_next = chosen is not None and due[chosen] > 0
        return chosen, min(due.values()) - now if due else None

    def _holds_of(self, job: CloneJob) -> list[Hold]:
        return [self.holds[scope] for scope in job.scopes if scope in self.holds]

    def _state(self, job: CloneJob) -> str:
        states = {"ended": job.outcome, "taken": job.taken_by, "running": job is self.running,
                  "locked": job.source in self.holds, "away": self._holds_of(job)}  # fmt: skip
        return next((state for state, applies in states.items() if applies), "waiting")

    # Clients that leave and come back

    def _notice_who_left(self) -> None:
        """Look at the connections of all clients at once."""
        clients = {job.client.fd: job for job in itertools.chain(self.queue, self.ended) if not job.client.left}
        for job in map(clients.__getitem__, polled(clients, HUNG_UP)):
            job.client.left = True
            job.client.event.set()
            log.warning("CLONE ABANDONED: the client left: %s (%s)", job.call, self._state(job))

    def check_room(self) -> None:
        """Raise Refusal if a new clone would find the queue full or closing, before PVE is asked and its body is
        read. Where any client has left, it might be the one that comes back: then `admit` decides."""
        with self.mutex:
            self._notice_who_left()
            if not any(job.left for job in itertools.chain(self.ended, self.queue)):
                self._make_room()

    def admit(self, job: CloneJob) -> CloneJob:
        """Queue the job, or let its client take over an equal one whose client has left; the one that is to be waited
        for. Raises Refusal if the queue is full or closing."""
        with self.mutex:
            self._notice_who_left()
            for twin in itertools.chain(self.ended, self.queue):
                if twin.left and twin.key == job.key:
                    twin.client = job.client
                    if twin.answer:
                        twin.client.event.set()
                    log.info("CLONE RESUMED: %s (%s)", twin.call, self._state(twin))
                    return twin
            self._make_room()
        try:
            self.put_nowait(job)
        except queue.Full:  # somebody else was faster
            return self.admit(job)
        return job

    def _make_room(self) -> None:
        """See to it that one more job can wait, if need be in the place of the oldest whose client has left. (There may
        be one too many, if the running one was put off.)"""
        if self.draining:
            raise Refusal(503, SHUTTING_DOWN, retry_after=5)
        while self._qsize() >= self.maxsize:
            left = next((job for job in self.queue if job.client.left and job is not self.running), None)
            if not left:
                raise Refusal(503, f"the clone queue is full: {self.maxsize} clones are waiting", retry_after=10)
            self._end(left)

    def turn_away(self, call: CloneCall, error: Exception) -> None:
        """Say and count a clone that did not come into the queue: there is no place, it was refused, or its client left."""
        with self.mutex:
            if isinstance(error, Refusal) and error.status == 503:
                why = "shutting down" if self.draining else "queue full"
                self._count("rejected", f"CLONE REJECTED: {why}: {call} waiting={self._qsize()}")
            elif isinstance(error, Refusal):
                self._count("refused", f"CLONE REFUSED: {call} status={error.status} {printable(error.reason)}")
            else:
                self._count("abandoned", f"CLONE DROPPED: {call}: its client left before it was queued")

    def collect(self, job: CloneJob, client: Client) -> Answer:
        """The job's answer, from now on delivered. Raises ClientGone if the client has left."""
        with self.mutex:
            self._notice_who_left()
            if job.client is not client or client.left or not job.answer:
                raise ClientGone
            client.left = job.delivered = True
            return job.answer

    def wants(self, newid: str) -> bool:
        """Whether a clone with that VMID waits or runs."""
        with self.mutex:
            return any(job.call.newid == newid for job in self.queue)

    # Taken VMIDs

    def _refuse_taken(self) -> None:
        """Refuse clones whose VMID has been taken, one client at a time.

        A clone is taken when it waits and PVE has accepted another one with the same VMID, which runs or has succeeded
        since: PVE would refuse it from that moment on. (It can't be asked: while the source is being cloned it says locked.)
        Clients that are refused look for another VMID, and find the smallest one with which PVE has not *started* a clone:
        two that look at the same time find the same one, and collide again. So when the oldest taken clone has been refused,
        the first that arrives after it, and is not taken, is held to be its client's, back with a new number. It is started
        next, and only when PVE has accepted it (or it can't be: it ended, left, is taken or held) is the next one refused,
        which looks while that one runs: the worker never idles. Where nobody comes back within RETURN_SECONDS, clients may
        be of the kind that gives up: then two are refused, then four, and so on, until there is an arrival.
        """
        now, back = time.monotonic(), self._returned
        is_coming = back in self.queue and not (back.client.left or back.upid or back.taken_by or self._holds_of(back))
        # Where another clone of a held source waits for it, one with a new number would only wait behind that: not yet.
        tried = {hold for job in self.queue if not job.taken_by for hold in self._holds_of(job)}
        waits = {job for job in self.queue for hold in tried.intersection(self._holds_of(job)) if hold.end_of(job) > now}
        taken = {job: job.taken_by for job in self.queue if job.taken_by and job not in waits}
        if not taken or is_coming or now < self._expected_until:
            return
        if self._expected_until:
            self._refuse_at_once *= 2
        self._notice_who_left()
        for job in [job for job in taken if job.client.left]:
            self._end(job)
        for job in [job for job in taken if not job.client.left][: self._refuse_at_once]:
            text = taken_text(job.call, taken[job])
            line = f"CLONE FAILED: {job.call} status=500 {printable(text)} (taken)"
            self._end(job, Ended("taken", Refusal(500, text).answer(), text, line))
            self._expected_until, self._returned = now + RETURN_SECONDS, None

    # What the worker calls

    def note_accepted(self, job: CloneJob, answer: Answer, upid: str) -> None:
        """PVE has started the running job's task."""
        with self.mutex:
            job.accepted, job.upid = answer, upid
            for other in self.queue:
                if other is not job and other.call.newid == job.call.newid != "":
                    other.taken_by = job
            self._refuse_taken()

    def usual_time(self, job: CloneJob) -> float:
        """How long the last clone of that source ran; 0 if there was none."""
        with self.mutex:
            alike = (other for other in reversed(self.ended) if (other.source, other.outcome) == (job.source, "completed"))
            return next((other.times()[1] for other in alike), 0.0)

    def answer_running(self, answer: Answer | None = None) -> bool:
        """Answer the running job's client before its end: with this, or with what is known of the clone, with which PVE
        goes on even if this program doesn't. False if nobody runs, or has been answered."""
        reason = "the proxy is shutting down before PVE answered; the outcome of the clone is unknown: see its task list"
        with self.mutex:
            job = self.running
            if not job or job.answer:
                return False
            job.answer = answer or job.accepted or Refusal(504, reason).answer()
            job.client.event.set()
            return True

    def is_time_over(self, scope: str) -> bool:
        """Whether a job of that scope, which may be the running one, has waited for its hold as long as it may."""
        with self.mutex:
            return bool(self._out_of_time(scope))

    def _out_of_time(self, scope: str) -> list[CloneJob]:
        hold, now = self.holds.get(scope), time.monotonic()
        return [job for job in self.queue if hold and scope in job.scopes and not job.taken_by and hold.end_of(job) <= now]

    def settle(self, job: CloneJob, result: Ended | PutOff) -> None:
        """The running job has ended, or its try made nothing and it is put off."""
        with self.mutex:
            # Whatever held its scopes is over; if it is put off, what held the wider ones: PVE has answered, so it is there.
            for scope in job.scopes[: job.scopes.index(result.scope)] if isinstance(result, PutOff) else job.scopes:
                self.holds.pop(scope, None)
            if isinstance(result, Ended):
                self._end(job, result)
            self.running = None
            if isinstance(result, PutOff):
                self._put_off(job, result)
            for other in self.queue:  # unless it has succeeded, PVE has removed what it made: its VMID is free again
                if other.taken_by is job and job.outcome != "completed":
                    other.taken_by = None
            self._refuse_taken()
            self.all_tasks_done.notify_all()

    def _put_off(self, job: CloneJob, put_off: PutOff) -> None:
        """All of that scope wait until its next try, and who has waited long enough is refused."""
        job.failed = job.failed or job.accepted
        job.accepted, job.upid = None, ""
        if self.draining:
            self._end_unstarted(job)
            return
        hold = self.holds.setdefault(put_off.scope, Hold(self._lock_timeout))
        hold.text = put_off.text
        self.totals["lock_retries"] += 1
        if job.tries == 1:
            log.warning("CLONE LOCKED: %s: %s", job.call, printable(hold.text))
        now = time.monotonic()
        if put_off.being_cloned:
            hold.since = now
        over = self._out_of_time(put_off.scope)
        hold.vain = hold.vain + 1 if over else 0
        hold.until = now + (STUCK_PAUSE if over else hold.pause * random.uniform(0.8, 1.2))
        hold.pause = min(LONGEST_RETRY, 1.5 * hold.pause)
        if put_off.scope == job.source and hold.vain < STUCK_TRIES:
            return
        own = Refusal(max(put_off.answer.status, 500), hold.text).answer()
        for other in over:
            answer = put_off.answer if other is job else own
            line = f"CLONE FAILED: {other.call} status={answer}: {printable(hold.text)}"
            self._end(other, Ended("failed", answer, hold.text, line))

    # The end of a job

    def _count(self, outcome: str, line: str) -> None:
        """Say once, and count once, how a clone ended."""
        self.totals[outcome] += 1
        log.log(logging.INFO if outcome == "completed" else logging.WARNING, "%s", line)

    def _end(self, job: CloneJob, ended: Ended | None = None) -> None:
        """Move a job to what has ended. A waiting one whose client has left is dropped, whatever else was to become of it:
        PVE never hears of it (again)."""
        if not ended or (job.client.left and job is not self.running):
            ended = Ended("abandoned", None, "client left", f"CLONE DROPPED: {job.call}: its client left and did not come back")
        self._count(ended.outcome, ended.line + (f" tries={job.tries}" if job.tries > 1 else ""))
        job.outcome, job.answer, job.text, job.ended_at = ended.outcome, ended.answer, ended.text, time.monotonic()
        job.client.event.set()
        job.outgoing.body = None  # it is large, and credentials are not for keeping
        job.outgoing.lines, job.poll_fields = b"", []
        del self.queue[job]
        self.ended.append(job)
        wanted = {scope for other in self.queue for scope in other.scopes}
        self.holds = {scope: hold for scope, hold in self.holds.items() if scope in wanted}
        waited, ran = job.times()
        for name, more in zip(SUMS, (waited, 1, ran, bool(job.upid)), strict=True):
            self.totals[name] += more

    def _end_unstarted(self, job: CloneJob) -> None:
        """End a waiting job since the program ends: with 503, or with the answer to its failed task."""
        answer = job.failed or Refusal(503, SHUTTING_DOWN, retry_after=5).answer()
        line = f"CLONE REJECTED: shutting down: {job.call}"
        self._end(job, Ended("failed" if job.failed else "rejected", answer, "shutting down", line))

    # Operation and shutdown

    def look_around(self) -> None:
        """What is due without an event, a few times a second: notice the clients that have left, go on refusing taken
        clones, and forget the answers that nobody has come back for."""
        oldest = time.monotonic() - KEEP_SECONDS
        with self.mutex:
            self._notice_who_left()
            self._refuse_taken()
            for job in self.ended:
                if job.ended_at < oldest and job.client.left:
                    job.answer = None

    def drain(self) -> None:
        """Start no more clones: those that wait are answered."""
        with self.mutex:
            self.draining = True
            self._notice_who_left()
            for job in [job for job in self.queue if job is not self.running]:
                self._end_unstarted(job)

    def wait_until_idle(self, deadline: float) -> bool:
        """Wait until no clone runs; False if one still does at the deadline."""
        with self.mutex:
            return self.all_tasks_done.wait_for(lambda: self.running is None, max(0.0, deadline - time.monotonic()))

    def facts(self, job: CloneJob) -> dict[str, Any]:
        """What the status page shows of a job. The mutex is held."""
        (waited, ran), state, now = job.times(), self._state(job), time.monotonic()
        hold = next(iter(self._holds_of(job)), None) if state in ("locked", "away") else None
        return {
            **job.call._asdict(),
            **{name: getattr(job, name) for name in ("outcome", "tries", "upid")},
            "address": job.client.address,
            "vmid": job.call.source,
            "stage": state,
            "text": hold.text if hold else job.text,
            "client": "answered" if job.delivered else "left" if job.client.left else "present",
            "waited_seconds": round(waited, 3),
            "clone_seconds": round(ran, 3),
            "ended": round(time.time() - now + job.ended_at, 3) if job.ended_at else None,
            "gives_up_in": max(0.1, round(hold.end_of(job) - now, 1)) if hold else None,  # it may be overdue
        }

    def summary(self) -> str:
        """What it does, in one line: little, since it is asked for four times a second."""
        with self.mutex:
            job, totals = self.running, self.totals
            doing = f"cloning {job.call.node}/{job.call.source} for {time.monotonic() - job.started_at:.1f}s" if job else "idle"
            return f"{doing}, {self._qsize()} waiting; {totals['completed']} done, {totals['failed']} failed"

    def snapshot(self) -> dict[str, Any]:
        """What runs, what waits, what has ended lately, totals and medians: as it goes into /status.json."""
        with self.mutex:
            history = [self.facts(job) for job in list(self.ended)[-HISTORY:]]
            waiting = [self.facts(job) for job in self.queue if job is not self.running]
            running = self.facts(self.running) if self.running else None
            totals = dict(self.totals)
        runs = sorted(job["clone_seconds"] for job in history if job["outcome"] == "completed")
        return {"queue_size": self.maxsize, "running": running, "waiting": waiting, "history": history,
                "totals": totals, "median_seconds": runs[len(runs) // 2] if runs else 0.0}  # fmt: skip


class CloneWorker:
    """The one thread that runs clones: it takes the job whose turn it is, tries it, and tells the queue how that ended."""

    def __init__(self, settings: Settings, backend: Backend, clones: CloneQueue, on_accepted: Callable[[str], None]) -> None:
        """`on_accepted` is told each VMID with which PVE has started a clone."""
        self._settings = settings
        self._backend = backend
        self._clones = clones
        self._on_accepted = on_accepted

    def run(self) -> NoReturn:
        """One job after the other, whatever happens to one of them."""
        while True:
            job = self._clones.get()
            try:
                result = self._try(job)
            except Exception:
                log.exception("unexpected failure in a clone")
                reason = "unexpected failure in the clone queue; the outcome of the clone is unknown"
                result = gone_wrong(job, Refusal(500, reason).answer(), reason)
            self._clones.settle(job, result)

    def _try(self, job: CloneJob) -> Ended | PutOff:
        """Post the clone to PVE and see it through."""
        try:
            answer = self._backend.exchange(job.outgoing, self._settings.request_timeout)
        except BackendError as error:
            if isinstance(error, Away) and self._settings.lock_timeout:
                return PutOff(PVE, error.answer(), error.reason)
            if not isinstance(error, Unreachable):
                error.reason += "; the outcome of the clone is unknown: see PVE's task list"
            return gone_wrong(job, error.answer(), error.reason)
        upid = upid_of(answer)
        if upid is None:
            return self._refused(job, answer)
        log.info("CLONE TASK: %s upid=%s newid=%s", job.call.place, printable(upid), word(job.call.newid))
        self._clones.note_accepted(job, answer, upid)
        self._on_accepted(job.call.newid)
        if self._settings.answer == "started":
            self._clones.answer_running(answer)
        return self._stopped(job, answer, self._wait_for_task(job))

    def _refused(self, job: CloneJob, answer: Answer) -> Ended | PutOff:
        """What follows from an answer without a UPID."""
        texts = [answer.reason, str(json_field(answer.body, "message")).removesuffix("\n")]
        locked = next((text for text in texts if answer.status == 500 and is_one_of(LOCKED, job.call, text)), None)
        if locked and self._settings.lock_timeout:
            return PutOff(job.source, answer, locked, self._is_being_cloned(job))
        if answer.status == 595 and self._settings.lock_timeout:  # AnyEvent::HTTP: no connection to pvedaemon or that node
            return PutOff(job.scopes[1], answer, answer.reason)
        if job.failed and any("already exists" in text for text in texts):
            return gone_wrong(job, job.failed, "PVE's clean-up after the failed try left it behind")
        if answer.status < 300:
            return gone_wrong(job, answer, f"PVE's answer holds no UPID that can be polled: {answer}")
        return Ended("failed", answer, answer.reason, f"CLONE FAILED: {job.call} status={answer}")

    def _stopped(self, job: CloneJob, answer: Answer, exit_status: str | None) -> Ended | PutOff:
        """What follows from a task's exit status."""
        facts = f"upid={printable(job.upid)} (elapsed: {time.monotonic() - job.started_at:.1f}s)"
        if exit_status is None:
            return gone_wrong(job, job.answer or answer, f"no longer waited for; the outcome is unknown: {facts}")
        if exit_status == "OK" or exit_status.startswith("WARNINGS: "):
            return Ended("completed", answer, exit_status, f"CLONE COMPLETE: {job.call.place} {facts} newid={word(job.call.newid)}")
        if is_one_of(CONTENTION, job.call, exit_status) and self._settings.lock_timeout and not job.answer:
            return PutOff(job.source, answer, exit_status, self._is_being_cloned(job))
        line = f"TASK FINISHED: status=stopped exitstatus={printable(exit_status)} {job.call} {facts}"
        return Ended("failed", answer, exit_status, line)

    def _is_being_cloned(self, job: CloneJob) -> bool:
        """Whether a clone of the job's locked source runs, where some job's time is over. Asked with the job's own
        credentials, which show their own tasks, or with Sys.Audit all of the node's."""
        if not self._clones.is_time_over(job.source):
            return False
        source, kind = job.call.source, "vzclone" if job.call.kind == "lxc" else "qmclone"
        path = f"{urllib.parse.quote(job.call.node, safe='')}/tasks?source=active&vmid={source}&typefilter={kind}"
        listed, _ = self._ask(job, path, self._settings.request_timeout)
        tasks = [task for task in listed if isinstance(task, dict)] if isinstance(listed, list) else []
        upids = [str(task.get("upid")) for task in tasks if (task.get("type"), str(task.get("id"))) == (kind, source)]
        # An entry of the list may be 10 s old; the status is the truth.
        return any(self._poll(job, upid, self._settings.request_timeout) == (None, "") for upid in upids)

    # Waiting for a task

    def _wait_for_task(self, job: CloneJob) -> str | None:
        """Poll until the task has stopped: its exit status; None if for -task-timeout nothing has told that it still runs. When
        it takes longer than that its client is told so, but it holds the queue all the same."""
        timeout, delay = self._settings.task_timeout, max(self._settings.poll_delay, 0.01)
        begin = now = last_seen = next_line = time.monotonic()
        late = Refusal(504, f"the clone task did not end within {timeout:g} s: {job.upid}", data=job.upid).answer()
        last_error = ""
        with TaskProcess(job.upid, job.started_at + self._clones.usual_time(job)) as process:
            while now - last_seen < timeout:
                left = begin + timeout - now if now < begin + timeout else math.inf  # until its client is told
                process.sleep(min(delay, left))
                # A silent backend must not hold that up for long.
                exit_status, error = self._poll(job, job.upid, min(max(1.0, left), self._settings.request_timeout))
                if exit_status is not None:
                    return exit_status
                now = time.monotonic()
                if not process.ended_at and (process.is_here or not error):
                    last_seen = now
                if now >= next_line or (error and not last_error):
                    said = f"TASK POLL ERROR: {job.call}: {error}" if error else f"TASK POLLING: status=running {job.call}"
                    log.log(logging.WARNING if error else logging.INFO, "%s (elapsed: %.1fs)", said, now - begin)
                    next_line = now + min(max(0.5, now - begin), LONGEST_LINE_DISTANCE)
                last_error = error
                if now >= begin + timeout and self._clones.answer_running(late):  # which answers once
                    log.warning("CLONE TIMEOUT: %s upid=%s (elapsed: %.1fs)", job.call, printable(job.upid), now - job.started_at)
        return None

    def _poll(self, job: CloneJob, upid: str, seconds: float) -> tuple[str | None, str]:
        """A task's exit status, None while it runs or if PVE does not say; and why it does not."""
        node, task_id = (urllib.parse.quote(part, safe="") for part in (node_of(upid, job.call.node), upid))
        task, error = self._ask(job, f"{node}/tasks/{task_id}/status", seconds)
        status, exit_status = (task.get("status"), task.get("exitstatus", "")) if isinstance(task, dict) else (None, None)
        if status == "stopped" and isinstance(exit_status, str):
            return exit_status, ""
        return None, error or ("" if status == "running" else "the task's status is neither running nor stopped")

    def _ask(self, job: CloneJob, path: str, seconds: float) -> tuple[object, str]:
        """PVE's data for a GET below `nodes` with the job's credentials, or None and why there is none."""
        try:
            answer = self._backend.exchange(Outgoing("GET", f"/api2/json/nodes/{path}", job.poll_fields), seconds)
        except BackendError as error:
            return None, error.reason
        return (json_field(answer.body, "data"), "") if answer.status == 200 else (None, str(answer))


# VMIDs: `/cluster/nextid` gives two clients the same number until PVE has started a clone with it.

MAX_PROBES = 100  # numbers asked for in place of one that is spoken for
MAX_RESERVATIONS = 10_000

Owner = tuple[str, str]  # user or token, and address
Ask = Callable[[str], Answer]


class Reservations:
    """The VMIDs that were handed out within -reserve-nextid, and the answers to `/cluster/nextid` that respect them.

    A VMID is spoken for when it was handed out, or is the `newid` of a clone that waits or runs. Only PVE's answers of 200
    hand one out: a stranger, whom PVE refuses, touches no reservation. And only for what was not spoken for since PVE was
    asked: a clone with that number may have started, and ended, meanwhile. `_lock` guards `_by_vmid`, the oldest first:
    until when each is, or was, spoken for, and to whom it was handed unasked: who may ask for it by `?vmid=` once.
    """

    def __init__(self, seconds: float, clones: CloneQueue) -> None:
        self.seconds = seconds
        self._clones = clones
        self._lock = threading.Lock()
        self._by_vmid: dict[str, tuple[float, Owner | None]] = {}

    def answer(self, target: str, owner: Owner, ask: Ask) -> Answer:
        """The answer to a GET of that target: PVE's, or the one that PVE gives for a VMID that is taken. `ask` gives PVE's to
        a GET of any target, and may raise."""
        path, _, query = target.partition("?")
        asked_at = time.monotonic()
        answer = ask(target)
        if answer.status != 200:
            return answer
        if not (wanted := parameter(query, "vmid")):
            return self._next_free(path, answer, asked_at, owner, ask)
        vmid = wanted[0].lstrip("0")
        if self._claim(vmid, asked_at, probed_by=owner):
            return answer
        reason = "Parameter verification failed."
        content = {"data": None, "errors": {"vmid": f"VM {vmid} already exists"}, "message": f"{reason}\n"}
        return Answer(400, reason, [("Content-Type", "application/json;charset=UTF-8")], json.dumps(content).encode())

    def _next_free(self, path: str, first: Answer, asked_at: float, owner: Owner, ask: Ask) -> Answer:
        """PVE's first answer, or the one for the next number above that is neither spoken for nor taken."""
        number = str(json_field(first.body, "data"))
        if not re.fullmatch("[0-9]{3,9}", number) or self._claim(number, asked_at, handed_to=owner):
            return first
        above = map(str, range(int(number) + 1, 1_000_000_000))
        # Each is claimed only when the one before it was taken.
        claimed = (vmid for vmid in above if self._claim(vmid, time.monotonic(), handed_to=owner))
        for vmid in itertools.islice(claimed, MAX_PROBES):
            with contextlib.ExitStack() as unless_free:
                unless_free.callback(self.release, vmid)
                answer = ask(f"{path}?vmid={vmid}")
                if answer.status == 200:
                    unless_free.pop_all()
            if answer.status != 400:  # not taken: it is free, or PVE has something else to say
                return answer
        return first

    def _claim(self, vmid: str, asked_at: float, handed_to: Owner | None = None, probed_by: Owner | None = None) -> bool:
        """Speak for a VMID, so that nobody else is told the same; False if it is spoken for, or was since then. It is handed
        to somebody unasked, or to who asks for this very number."""
        with self._lock:
            until, may_probe = self._by_vmid.get(vmid, (0.0, None))
            reserved = until > asked_at and (may_probe is None or may_probe != probed_by)
            if reserved or self._clones.wants(vmid):
                return False
            self._speak_for(vmid, self.seconds, handed_to)
            return True

    def _speak_for(self, vmid: str, seconds: float, handed_to: Owner | None) -> None:
        self._by_vmid.pop(vmid, None)
        self._by_vmid[vmid] = (time.monotonic() + seconds, handed_to)
        if len(self._by_vmid) > MAX_RESERVATIONS:
            del self._by_vmid[next(iter(self._by_vmid))]

    def release(self, vmid: str) -> None:
        """Speak for it no more: PVE has started a clone with it, or does not say that it is free."""
        with self._lock:
            self._speak_for(vmid, 0.0, None)


def is_next_id(request: Request) -> bool:
    """Whether a request asks for a free VMID, or whether one is free. (`extjs` is the web GUI's.)"""
    return (request.method, request.length) == ("GET", 0) and request.path_parts() == ["api2", "json", "cluster", "nextid"]


# Handler: one thread for each connection; reads requests, decides what they are, answers them.

HEAD_SECONDS = 30.0  # for a request's head, from its first byte; and for the first byte of a connection
IDLE_SECONDS = 180.0  # between two requests; Caddy keeps its idle connections for 120 s
LINGER_SECONDS = 5.0  # how long an answered client may go on sending before its connection is closed
HALF_CLOSED_SECONDS = 300.0  # silence after which a tunnel that is closed on one side is given up
MAX_CLONE_BODY = 512 * 1024  # PVE's own limit
TUNNEL_BUFFER = 64 * 1024  # more is not read until less is held
# Whose body is slower than this for that long, or who takes no piece of an answer for that long, may have to make room.
SLOW_BYTES_PER_SECOND = 1024
SLOW_SECONDS = 5.0


# What a connection does. It is idle between two requests and while a head is not complete, in transfer while a body comes
# from or goes to the client, waiting for a clone, and otherwise busy with a request.
Activity = enum.Enum("Activity", ["IDLE", "TRANSFER", "WAITING", "BUSY", "TUNNEL"])


def keep_tcp_alive(sock: socket.socket) -> None:
    """Let the kernel find out within two minutes that the peer's host has vanished."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def plain_address(text: str) -> str | None:
    """A single IP address in its usual form, an IPv4 address out of its IPv6 mapping; None for anything else."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(text.partition("%")[0])  # a zone (RFC 4007 11) means nothing elsewhere
        return str(getattr(address, "ipv4_mapped", None) or address)
    return None


class _Flow:
    """One direction of a tunnel. At most one buffer is held: a slow sink stops the reading."""

    def __init__(self, source: Wire, sink: Wire) -> None:
        self.source, self.sink = source, sink
        self.buffer = source.buffer  # what came behind the head
        self.source_ended = self.sink_ended = False

    def wants_to_read(self) -> bool:
        """Whether there is room for what the source sends."""
        return not self.source_ended and len(self.buffer) < TUNNEL_BUFFER

    def move(self) -> None:
        """Read once and write once, as far as that goes without waiting. Raises OSError and Disconnected when the tunnel
        broke."""
        if self.wants_to_read():
            try:
                self.buffer += self.source.receive_now() or b""
            except EndOfStream:
                self.source_ended = True
        if self.buffer:
            with contextlib.suppress(*WOULD_BLOCK):
                del self.buffer[: self.sink.sock.send(self.buffer)]
        if self.source_ended and not self.buffer and not self.sink_ended:
            self.sink_ended = True
            # Not SSLSocket.shutdown(), which would end decryption for the other direction too.
            socket.socket.shutdown(self.sink.sock, socket.SHUT_WR)


def run_tunnel(client: Wire, backend: Wire) -> None:
    """Relay the bytes of an upgraded connection, both ways, until both sides have ended or one broke. No idle limit."""
    up, down = _Flow(client, backend), _Flow(backend, client)
    with contextlib.suppress(OSError, Disconnected):
        while not (up.sink_ended and down.sink_ended) and _wait_for_flow(up, down):
            up.move()
            down.move()


def _wait_for_flow(up: _Flow, down: _Flow) -> bool:
    """Wait until something can move. False when the tunnel broke, or one side has closed and the other is silent."""
    poll = select.poll()
    for flow, opposite in ((up, down), (down, up)):
        events = (select.POLLIN if flow.wants_to_read() else 0) | (select.POLLOUT if opposite.buffer else 0)
        if flow.wants_to_read() and flow.source.pending():
            return True
        if events or not opposite.sink_ended:  # closed both ways it would report POLLHUP, read as broken below
            poll.register(flow.source.sock, events)
    half_closed = up.source_ended or down.source_ended
    ready = poll.poll(HALF_CLOSED_SECONDS * 1000 if half_closed else None)
    # Of a socket of which nothing is wanted now, a reset is all that is told.
    return any(events & (select.POLLIN | select.POLLOUT) for _, events in ready)


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """Relays requests, queues clones, and turns WebSockets into tunnels.

    To the backend go method, target, fields and body as they came, but
    - hop-by-hop fields and those that Connection names are removed (RFC 9110 7.6.1), and so is Expect, which is answered
      here since PVE never does (RFC 9110 10.1.1);
    - the body is framed anew: by its Content-Length, chunked, or not at all where there is none;
    - X-Forwarded-For is one single address, since PVE can read only that: behind a proxy on this host the last one it
      gave, otherwise the peer's own;
    - an HTTP/1.0 request without Host gets the backend's.
    To the client go status, reason, fields and body as they came, without hop-by-hop fields, framed anew. Nothing else is
    added. An answer that the backend cuts short is cut short here too.
    """

    server: ProxyServer

    # The moments of a connection

    def setup(self) -> None:
        """Join the server's connections. What can fail comes later, in `handle`."""
        self.sock: socket.socket = self.request
        self.peer = plain_address(str(self.client_address[0])) or "0.0.0.0"
        self.message: Request | None = None  # the request in hand, or the one before it
        self.unread = False  # whether a part of it has not been read
        self.responding = False  # whether an answer has begun that is not complete
        self.credit = SLOW_SECONDS  # see `_note_moved`
        self.paid_until = math.inf  # see `_await_client`; written by this thread alone
        self.server.join(self)

    def handle(self) -> None:
        """The connection's life. Raises OSError if it is over before it has begun."""
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_tcp_alive(self.sock)
        if self.server.tls:  # its handshake comes with the first read
            self.sock = self.server.tls.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        self.wire = Wire(self.sock, self.server.backend.silence)  # -request-timeout limits the client's silence, too
        self.watch = Client(self.sock.fileno(), self.peer)  # for all but clones, each of which has its own
        super().handle()

    def finish(self) -> None:
        """Close the connection; from here on nobody else may touch its descriptor."""
        self.server.leave(self)
        if not self.responding:  # a goodbye behind an answer that was cut off would make it look complete
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))  # no reset, see `_respond`
            close_notify(self.sock)
        self.sock.close()

    def handle_one_request(self) -> None:
        """Read a request and answer it. The one place where failures become answers."""
        self.close_connection = True
        try:
            self._answer(self._read_request())
            if not self.close_connection:
                self.close_connection = not self.server.enter(self, Activity.IDLE)
        except Refusal as refusal:
            self._refuse(refusal)
        except (Disconnected, ClientGone):
            self.close_connection = True
            return
        except Exception:
            log.exception("unexpected failure in a request of %s", self.peer)
            self._refuse(Refusal(500, "unexpected failure in the proxy"))
        if self.close_connection and not self.responding and (self.unread or self.wire.readable()):
            self._linger()

    # Reading a request

    def _read_request(self) -> Request:
        """The next request, its body not read yet. Raises Refusal, and Disconnected if there is none."""
        wire = self.wire
        if not wire.buffer:
            wire.end = time.monotonic() + (IDLE_SECONDS if self.message else HEAD_SECONDS)
            try:
                wire.buffer += wire.receive(later=True)
            except Stalled:
                raise Disconnected from None
        self.unread, self.message = True, None
        wire.end = time.monotonic() + HEAD_SECONDS
        head = wire.head().removeprefix("\r\n")  # RFC 9112 2.2: old clients send an empty line behind a body
        wire.end = None
        if not self.server.enter(self, Activity.BUSY):
            raise Disconnected
        self.message = request = Request(head)
        self.unread = request.length != 0
        self.close_connection = not request.keep_alive
        return request

    def request_body(self, request: Request, check: Check | None = None, seconds: float | None = None) -> Iterator[bytes]:
        """The body's pieces, asked for first if the client waits to be asked: the one reader of bodies. `check` is called
        while the client is waited for; `seconds` bounds the whole. Raises Refusal and ClientGone for what is the client's
        fault."""
        wire = self.wire
        wire.end = seconds and time.monotonic() + seconds
        self.server.enter(self, Activity.TRANSFER)
        self._await_client()
        try:
            if request.expects_continue and not wire.buffer:
                wire.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            wire.check = check
            for piece in wire.body(request.length):
                self._note_moved(len(piece))
                if check:
                    check()
                yield piece
                self._await_client()
            self.unread = False
        except (Malformed, Stalled) as error:  # which BackendConnection.exchange, who reads this, would take for its backend's
            raise Refusal(error.status, error.reason) from None
        except Disconnected:
            raise ClientGone from None
        finally:
            wire.check = wire.end = None
            self.server.enter(self, Activity.BUSY)
            self.paid_until = math.inf

    def _await_client(self) -> None:
        """From now on it is the client that is slow: when its credit is used up, it may have to make room."""
        self.paid_until = time.monotonic() + self.credit

    def _note_moved(self, count: int) -> None:
        """The client gave or took so many bytes. Each pays for some time, of which only so much can be saved."""
        self.credit = min(max(0.0, self.paid_until - time.monotonic() + count / SLOW_BYTES_PER_SECOND), SLOW_SECONDS)
        self.paid_until = math.inf

    # Answering

    def _answer(self, request: Request) -> None:
        """Decide what the request is. What is no clone and no tunnel is counted, and logged with -verbose."""
        self.forwarded_for = self._forwarded_for(request)
        settings = self.server.settings
        call = clone_call(request, settings.qemu)
        if call:
            self._clone(request, call)
            return
        begin = time.monotonic()
        relayed = self._next_id(request) if settings.reserve_nextid and is_next_id(request) else self._relay(request)
        if relayed:
            self.server.count(f"{min(relayed[0] // 100, 5)}xx")
            if settings.verbose:
                log.info("RELAYED: %s status=%d bytes=%d time=%.3fs", request, *relayed, time.monotonic() - begin)

    def _send_head(self, status: int, reason: str, fields: Fields, body: bytes = b"") -> None:
        """Send a head together with what there is of its body."""
        self.responding = True
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields])
        self.wire.sendall(f"HTTP/1.1 {status} {reason}\r\n{lines}\r\n".encode("latin-1") + body)

    def _respond(self, status: int, reason: str, fields: Fields, length: int, first: bytes, rest: Iterable[bytes] = ()) -> int:
        """Send an answer, framed for this client; the number of bytes of its body. What is there of it, `first`, goes out
        with the head."""
        self.wire.check = self.wire.end = None  # a request that did not arrive whole may have left them
        http11 = not self.message or self.message.http11
        chunked = length == CHUNKED and http11
        until_close = length in (CHUNKED, UNTIL_CLOSE) and not chunked
        if until_close or self.unread or self.server.draining.is_set():
            self.close_connection = True
        if until_close:  # if it is cut off, be it by the end of the process, a reset keeps it from looking whole
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if chunked:
            fields.append(CHUNKED_FIELD)
        if self.close_connection or not http11:
            fields.append(("Connection", "close" if self.close_connection else "keep-alive"))
        self._send_head(status, reason, fields, first)
        sent = len(first)
        if rest:
            self.server.enter(self, Activity.TRANSFER)
        for piece in rest:
            sent += len(piece)
            self._await_client()
            self.wire.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            self._note_moved(len(piece))
        if chunked:
            self.wire.sendall(b"0\r\n\r\n")
        self.responding = False
        return sent

    def _respond_whole(self, answer: Answer) -> None:
        length = [("Content-Length", str(len(answer.body)))] if answer.status not in (204, 304) else []
        body = b"" if self.message and self.message.method == "HEAD" else answer.body
        self._respond(answer.status, answer.reason, answer.fields + length, len(answer.body), body)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with an error and close; if an answer has begun already, cut it off."""
        self.close_connection = True
        if isinstance(refusal, BackendError):
            self.server.count("backend_errors")
        if self.responding:
            log.warning("RELAY CUT OFF: %s: %s", self.message, refusal.reason)
        else:
            with contextlib.suppress(Disconnected, Stalled):
                self._respond_whole(refusal.answer())

    def _linger(self) -> None:
        """Let a client that is still sending read its answer: closing at once would destroy it by a RST (RFC 9112
        9.6). What arrives is dropped, undecrypted."""
        self.server.enter(self, Activity.IDLE)  # it has its answer, and may make room
        deadline = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):
            close_notify(self.sock)
            socket.socket.shutdown(self.sock, socket.SHUT_WR)  # not SSLSocket.shutdown(), which would end decryption, too
            poll = select.poll()
            poll.register(self.sock, select.POLLIN)
            while (seconds := deadline - time.monotonic()) > 0 and poll.poll(seconds * 1000):
                if not socket.socket.recv(self.sock, RECEIVE_SIZE):
                    return

    # Relaying

    def _forwarded_for(self, request: Request) -> str:
        values = request.values.get("x-forwarded-for")
        if values and ipaddress.ip_address(self.peer).is_loopback:
            return plain_address(values[-1].rpartition(",")[2].strip(" \t")) or self.peer
        return self.peer

    def _outgoing_fields(self, request: Request, drop: frozenset[str]) -> Fields:
        """The request's end-to-end fields, and those that the proxy adds for the backend."""
        fields = request.end_to_end(drop)
        if "host" not in request.values:
            fields.append(self.server.backend.host_field)
        fields.append(("X-Forwarded-For", self.forwarded_for))
        return fields

    def _outgoing(self, request: Request) -> Outgoing:
        """The request as the backend gets it, its body as it arrives."""
        fields = self._outgoing_fields(request, REQUEST_DROP - {"upgrade"} if request.upgrade else REQUEST_DROP)
        if request.upgrade:
            fields.append(UPGRADE_FIELD)
        if request.length == CHUNKED:
            fields.append(CHUNKED_FIELD)
        body = (lambda check: self.request_body(request, check)) if request.length else None
        return Outgoing(request.method, request.target, fields, body)

    def _relay(self, request: Request) -> tuple[int, int] | None:
        """Send the request on and stream the answer back: its status and the bytes of its body; None of a tunnel."""
        with self.server.backend.open(self._outgoing(request), self.watch.check) as response:
            head = response.head
            if head.status == 101:
                self._tunnel(response)
                return None
            if request.method == "POST":
                self._note_failed_login(request, response)
            for interim in response.interim if request.http11 else ():
                self._send_head(interim.status, interim.reason, interim.relayed_fields())
            first = response.take()
            rest = () if response.isclosed() else response
            return head.status, self._respond(head.status, head.reason, head.relayed_fields(), head.length, first, rest)

    def _note_failed_login(self, request: Request, response: BackendResponse) -> None:
        """Log a failed login, since PVE itself sees only this proxy there. The API says 401; to the web GUI PVE says
        200, and 401 in a small body, which comes with its head."""
        parts = request.path_parts()
        status, body = response.head.status, bytes(response.wire.buffer)
        gui = status == 200 and parts[1:2] == ["extjs"] and json_field(body, "status") == 401 and not json_field(body, "success")
        if parts[:1] + parts[2:] == ["api2", "access", "ticket"] and (status == 401 or gui):
            log.warning("AUTH FAILED: client=%s path=/%s", self.forwarded_for, printable("/".join(parts)))

    def _tunnel(self, response: BackendResponse) -> None:
        """Pass on the 101 and every byte after it."""
        self.close_connection = True
        keep_tcp_alive(response.wire.sock)
        head = response.head
        self._send_head(head.status, head.reason, [*head.end_to_end(HOP_BY_HOP - {"upgrade"}), UPGRADE_FIELD])
        self.responding = False
        if self.server.enter(self, Activity.TUNNEL):
            run_tunnel(self.wire, response.wire)

    def _next_id(self, request: Request) -> tuple[int, int]:
        """Answer with a VMID that nobody else was given, or that one is taken; status and bytes, as of a relayed one."""
        fields = self._outgoing_fields(request, REQUEST_DROP)

        def ask(target: str) -> Answer:
            return self.server.backend.exchange(Outgoing("GET", target, fields), self.server.backend.silence, self.watch.check)

        answer = self.server.reservations.answer(request.target, (user_of(request), self.forwarded_for), ask)
        self._respond_whole(answer)
        return answer.status, len(answer.body)

    # Clones

    def _clone(self, request: Request, call: CloneCall) -> None:
        """Queue the clone, wait for its turn and its end, and send PVE's answer."""
        clones = self.server.clones
        client = Client(self.sock.fileno(), self.forwarded_for)
        try:
            job = self._admit(request, call, client)
        except (Refusal, ClientGone, Disconnected) as error:
            clones.turn_away(call, error)
            raise
        self.server.enter(self, Activity.WAITING)
        client.event.wait()
        self.server.enter(self, Activity.BUSY)
        self._respond_whole(clones.collect(job, client))

    def _admit(self, request: Request, call: CloneCall, client: Client) -> CloneJob:
        """The clone's job in the queue. Raises Refusal and ClientGone."""
        too_large = f"the body of a clone request is larger than {MAX_CLONE_BODY} bytes"
        if request.length > MAX_CLONE_BODY:
            raise Refusal(413, too_large)
        fields = self._outgoing_fields(request, REQUEST_DROP | {"content-length"})
        fields.append(("Content-Length", str(max(request.length, 0))))
        Outgoing(request.method, request.target, fields)  # before anybody waits for a clone that PVE would misread
        self.server.clones.check_room()
        credentials = [field for field in request.fields if field[0].lower() in ("authorization", "cookie")]
        poll_fields = [self.server.backend.host_field, *credentials, ("X-Forwarded-For", self.forwarded_for)]
        # Strangers must not fill the queue, nor the memory with a body. PVE takes 3 s to say 401, in this thread's time.
        self._check_login(Outgoing("GET", "/api2/json/version", poll_fields), client)
        body = whole(self.request_body(request, seconds=HEAD_SECONDS) if request.length else (), MAX_CLONE_BODY)
        if body is None:
            raise Refusal(413, too_large)
        fields[-1] = ("Content-Length", str(len(body)))
        outgoing = Outgoing(request.method, request.target, fields, body)
        call = call._replace(newid=newid_of(request.target.partition("?")[2], body))
        secrets = [request.values.get(name) for name in ("authorization", "cookie", "csrfpreventiontoken")]
        key = hashlib.sha256(repr((request.target, secrets, body)).encode()).digest()
        return self.server.clones.admit(CloneJob(call, outgoing, poll_fields, key, client))

    def _check_login(self, login: Outgoing, client: Client) -> None:
        """Raise Refusal if PVE does not know a clone's credentials. Where PVE is away it is waited for, as in the queue."""
        end = time.monotonic() + self.server.settings.lock_timeout
        while True:
            over = time.monotonic() >= end
            try:
                answer = self.server.backend.exchange(login, self.server.backend.silence, client.check)
                if answer.status == 401 or (answer.status == 595 and over):
                    raise Refusal(answer.status, answer.reason, given=answer)
                if answer.status != 595:
                    return
            except Away:
                if over:
                    raise
            client.check()
            if self.server.draining.wait(LONGEST_RETRY):
                raise Refusal(503, SHUTTING_DOWN, retry_after=5)


# Server: listening, the number of connections, and the end of them all.

MAX_CONNECTIONS = 512  # tunnels included, clients of waiting clones not
CROWD_LINE_SECONDS = 10.0  # between two log lines that say so
DRAIN_SECONDS = 30.0
TOO_MANY = (
    b"HTTP/1.1 503 too many connections\r\nRetry-After: 5\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b'Content-Length: 47\r\n\r\n{"data":null,"message":"too many connections"}\n'
)
LISTEN_BACKLOG = 1024
STATUS_CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx")  # of relayed requests


class ListenError(Exception):
    """An address can't be listened on."""


def resolve(address: tuple[str, int]) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """The one socket address to listen on: without a host all addresses, IPv4 and IPv6 in one. Raises OSError."""
    host = address[0] or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
    family, *_, found = socket.getaddrinfo(host, address[1], type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return family, found


def listen_on(address: tuple[str, int]) -> socket.socket:
    """A listening socket. Raises ListenError."""
    try:
        family, found = resolve(address)
        return socket.create_server(found, family=family, backlog=LISTEN_BACKLOG, dualstack_ipv6=found[0] == "::")
    except (OSError, ValueError) as error:
        reason = reason_of(error).partition(" (while ")[0]  # `create_server` repeats the address
        raise ListenError(f"cannot listen on {host_port(*address)}: {reason}") from None


def server_tls(settings: Settings) -> ssl.SSLContext | None:
    """The listener's certificate, TLS 1.2 or newer. Raises FlagError if it can't be loaded."""
    if not settings.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")  # never ask at the terminal
    except (OSError, ValueError) as error:
        raise unusable(f"flags -tls-cert {settings.tls_cert!r} and -tls-key {settings.tls_key!r}", error) from None
    return context


class ListeningServer(http.server.ThreadingHTTPServer):
    """A ThreadingHTTPServer on a socket that listens already. `lock` guards `connections`, how many have been accepted and
    not closed, at most `limit`; `closed` shares it and is notified with each one's end."""

    def __init__(self, listener: socket.socket, handler: type[http.server.BaseHTTPRequestHandler], limit: int) -> None:
        host, port = listener.getsockname()[:2]
        super().__init__((host, port), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.address = host_port(host, port)
        self.is_local = ipaddress.ip_address(plain_address(host) or "::").is_loopback  # only this host can reach it
        self.limit = limit
        # Re-entrant: should a body's reader, which asks for it at its end, be left to the garbage collector, that runs anywhere.
        self.lock = threading.RLock()
        self.closed = threading.Condition(self.lock)
        self.connections = 0

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept. Without a free descriptor, wait a little: the listening socket stays readable and would spin."""
        try:
            return super().get_request()
        except OSError as error:
            log.warning("cannot accept a connection: %s", error.strerror)
            time.sleep(0.1)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Count a connection in; False if it is one too many."""
        with self.lock:
            self.connections += 1
            return self.connections <= self.limit

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What a handler did not handle. Who breaks off is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("unexpected failure in a connection")

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that was refused, got no thread, or whose handler is done, and count it out."""
        super().shutdown_request(request)
        with self.lock:
            self.connections -= 1
            self.closed.notify_all()


class ProxyServer(ListeningServer):
    """Gives each connection a thread, and holds what their handlers share. `lock` also guards `_counts` and `_activities`:
    what each connection does, in the order in which they began to do so."""

    def __init__(self, listener: socket.socket, settings: Settings, backend: Backend, tls: ssl.SSLContext | None) -> None:
        super().__init__(listener, ProxyHandler, MAX_CONNECTIONS)
        self.settings = settings
        self.backend = backend
        self.clones = CloneQueue(settings)
        self.reservations = Reservations(settings.reserve_nextid, self.clones)
        self.tls = tls
        self.draining = threading.Event()
        self._activities: dict[ProxyHandler, Activity | None] = {}  # None: it has been ended, and closes soon
        self._counts = dict.fromkeys((*STATUS_CLASSES, "backend_errors", "refused_connections"), 0)
        self._next_crowd_line = 0.0  # the accepting thread's own

    def _make_room(self) -> bool:
        """Clients of waiting clones don't count. One connection too many ends the oldest without a request in hand, or the
        slowest of those that drip a body or do not take an answer: slow or silent clients can't keep others out."""
        exempt = sum(activity in (Activity.WAITING, None) for activity in self._activities.values())
        if self.connections - exempt <= self.limit:
            return True
        slow = [handler for handler in self._those_that(Activity.TRANSFER) if handler.paid_until < time.monotonic()]
        candidates = self._those_that(Activity.IDLE) or sorted(slow, key=lambda handler: handler.paid_until)
        self._end(candidates[:1])
        return bool(candidates)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Tell a connection too many that it is one, as far as that goes without waiting."""
        with self.lock:
            self.connections += 1
            if self._make_room():
                return True
        refused = self.count("refused_connections")
        if (now := time.monotonic()) >= self._next_crowd_line:
            self._next_crowd_line = now + CROWD_LINE_SECONDS
            log.warning("TOO MANY CONNECTIONS: %d are open; %d have been refused so far", self.limit, refused)
        if not self.tls:
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(TOO_MANY)
                request.recv(RECEIVE_SIZE)  # else the close would be a reset, which may overtake the answer
        return False

    # What each connection does

    def join(self, handler: ProxyHandler) -> None:
        """Note a new connection."""
        with self.lock:
            self._activities[handler] = Activity.IDLE

    def enter(self, handler: ProxyHandler, activity: Activity) -> bool:
        """Note what a connection does from now on; False if it has been ended, or should end now."""
        with self.lock:
            if not self._activities.get(handler):  # a body's reader may be closed behind the connection's end
                return False
            del self._activities[handler]
            self._activities[handler] = activity
            return not (self.draining.is_set() and activity in (Activity.IDLE, Activity.TUNNEL))

    def leave(self, handler: ProxyHandler) -> None:
        """Forget a connection that is about to be closed."""
        with self.lock:
            del self._activities[handler]

    def _those_that(self, activity: Activity) -> list[ProxyHandler]:
        return [handler for handler, its_activity in self._activities.items() if its_activity is activity]

    def _end(self, handlers: list[ProxyHandler]) -> None:
        for handler in handlers:
            self._activities[handler] = None
            with contextlib.suppress(OSError):
                socket.socket.shutdown(handler.sock, socket.SHUT_RDWR)  # wakes its thread

    def drain(self) -> None:
        """From now on connections close behind their answers. Idle ones and tunnels are ended at once; those on which a
        request has arrived, or that are too new to tell, only when this is called again."""
        with self.lock:
            idle = self._those_that(Activity.IDLE)
            if not self.draining.is_set():
                answered = {handler.watch.fd: handler for handler in idle if handler.message and not handler.wire.buffer}
                arrived = polled(answered, select.POLLIN)
                idle = [handler for fd, handler in answered.items() if fd not in arrived]
            self.draining.set()
            self._end(idle + self._those_that(Activity.TUNNEL))

    def wait_until_closed(self, deadline: float) -> None:
        """Wait for all connections to close, at most until the deadline."""
        with self.lock:
            self.closed.wait_for(lambda: not self.connections, max(0.0, deadline - time.monotonic()))

    def count(self, name: str) -> int:
        """Count one more of STATUS_CLASSES, `backend_errors` or `refused_connections`: how many there are now."""
        with self.lock:
            self._counts[name] += 1
            return self._counts[name]

    def counters(self) -> dict[str, Any]:
        """All that was counted, and what is open now."""
        with self.lock:
            activities = [activity for activity in self._activities.values() if activity]
            return {**self._counts, "connections": len(activities), "tunnels": activities.count(Activity.TUNNEL)}


# Operation: systemd, the status page, metrics, -check. They look at the others; nothing depends on them.


def notify(text: str, *descriptors: int) -> None:
    """Tell the service manager, if there is one, by its socket (sd_notify(3)), with descriptors for its store."""
    with contextlib.suppress(KeyError, OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setblocking(False)  # one that does not listen must not hold up anything
        manager.connect(re.sub("^@", "\0", os.environ["NOTIFY_SOCKET"]))
        socket.send_fds(manager, [text.encode()], list(descriptors))


def open_listener(address: tuple[str, int]) -> socket.socket:
    """The listening socket that the service manager has kept across a restart (sd_listen_fds(3)), if it is still the one
    that is wanted, or else a new one, which it keeps from now on. Raises ListenError."""
    if (os.environ.get("LISTEN_PID"), os.environ.get("LISTEN_FDS")) == (str(os.getpid()), "1"):
        kept = socket.socket(fileno=3)
        with contextlib.suppress(OSError):
            if kept.getsockname() == resolve(address)[1]:
                return kept
            # Removal takes the manager a moment, and until then its copy would keep the port.
            kept.shutdown(socket.SHUT_RDWR)
        notify("FDSTOREREMOVE=1\nFDNAME=listen")
        kept.close()
    listener = listen_on(address)
    notify("FDSTORE=1\nFDNAME=listen", listener.fileno())
    return listener


def metrics(snapshot: dict[str, Any]) -> str:
    """The Prometheus text format of a snapshot."""
    totals, waiting, sums = snapshot["totals"], snapshot["waiting"], ("_sum", "_count")
    oldest = max((job["waited_seconds"] for job in waiting), default=0.0)
    outcomes = {f'{{outcome="{name}"}}': totals[name] for name in OUTCOMES}
    relayed = {f'{{status="{name}"}}': snapshot[name] for name in STATUS_CLASSES}
    families: list[tuple[str, str, str, Any]] = [
        ("build_info", "gauge", "The version that runs.", {f'{{version="{VERSION}"}}': 1}),
        ("backend_up", "gauge", "Whether PVE can be reached.", int(not snapshot["problem"])),
        ("queued", "gauge", "Clones that wait.", len(waiting)),
        ("queue_limit", "gauge", "Clones that may wait.", snapshot["queue_size"]),
        ("oldest_wait_seconds", "gauge", "Time that the oldest waiting clone has waited.", oldest),
        ("running", "gauge", "Clones that run.", int(snapshot["running"] is not None)),
        ("clones_total", "counter", "Clones by outcome.", outcomes),
        ("lock_retries_total", "counter", "Tries put off: a lock held elsewhere, or PVE away.", totals["lock_retries"]),
        ("wait_seconds", "summary", "Time in the queue.", {name: totals["wait_seconds" + name] for name in sums}),
        ("clone_seconds", "summary", "Time of tasks that ran.", {name: totals["clone_seconds" + name] for name in sums}),
        ("relayed_requests_total", "counter", "Relayed requests by status class.", relayed),
        ("backend_errors_total", "counter", "Requests to which PVE gave no whole answer.", snapshot["backend_errors"]),
        ("open_tunnels", "gauge", "Open WebSockets.", snapshot["tunnels"]),
        ("connections", "gauge", "Open client connections.", snapshot["connections"]),
        ("refused_connections_total", "counter", "Connections too many.", snapshot["refused_connections"]),
    ]
    text = ""
    for name, kind, meaning, value in families:
        text += f"# HELP pve_clone_queue_{name} {meaning}\n# TYPE pve_clone_queue_{name} {kind}\n"
        for labels, sample in value.items() if isinstance(value, dict) else [("", value)]:
            text += f"pve_clone_queue_{name}{labels} {sample}\n"
    return text


STATUS_STYLE = """
/* The browser's black on white or white on black, and colours that can be read on both. */
:root { color-scheme: light dark; --line: #8884 } .faint { color: #7b7b7b } #sentence { font-size: 1.15rem }
body { max-width: 80rem; margin: auto; padding: 1em; font: 14px/1.4 system-ui, sans-serif; overflow-wrap: break-word }
h1, h2, p, ul { margin: .5rem 0; padding: 0 } h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin-top: 1.8rem }
li { display: block; margin: .5rem 0; padding: .5rem; border: solid var(--tone); border-width: 1px 1px 1px 6px }
/* A row has the client below the clone, and a bar at its right; in a narrow window its parts flow like words. */
table, thead, tbody { display: block } tbody:empty::after { content: "None." } td { padding: 0; min-width: 0 }
tr { display: grid; grid-template-columns: 5.2rem 9.6rem minmax(0, 1fr) 11rem 22rem; gap: 0 .8rem;
  padding: .3rem 0; border-bottom: 1px solid var(--line) }
.at { grid-area: 1 / 1 / 3 / 2 } .who { grid-area: 2 / 2 / 3 / 5; font-size: .85em }
.bar { grid-area: 1 / 5 / 3 / 6; display: flex; justify-content: flex-end; align-items: center; overflow: hidden;
  padding: 0; min-height: 1.4rem; background: repeating-linear-gradient(90deg, var(--line) 0 1px, #0000 1px 25%) }
.bar i { flex: none; height: 12px } .bar span { flex: 0 0 25%; text-indent: .3rem; font-weight: normal }
@media (max-width: 64rem) { tr { display: flex; flex-wrap: wrap } .who, .bar { flex: 0 0 100% } }
/* Red is failed, green completed, blue running; whatever else becomes of a clone is amber. */
tr, .held { --tone: #ad6f14 } li, .failed { --tone: #de4545 } .completed { --tone: #25884f }
.running { --tone: #3a7bdb } .waiting { --tone: initial } .state { color: var(--tone) }
.wait { background: #999 } .run { background: var(--tone, #999); min-width: 4px }
"""
STATUS_SCRIPT = """
const $ = id => document.getElementById(id), FIRST = 10;  // so many of those that wait are shown
const WORDS = {locked: 'source locked', taken: 'VMID taken', away: 'PVE away', rejected: 'refused'};
let latest = null, lost = 0;  // what status.json said last; since when it says nothing
function make(tag, className, ...content) {  // of elements and of texts, which are never read as HTML
  const element = Object.assign(document.createElement(tag), {className});
  element.append(...content);
  return element;
}
const date = t => new Date(t * 1000).toLocaleString('sv');  // 2026-11-27 08:18:30, as Sweden writes it
const clock = t => date(t).replace(date(Date.now() / 1000).slice(0, 11), '');  // without the day if it is today
const period = s => s < 600 ? s.toFixed(s < 10 ? 1 : 0) + ' s'
  : s < 7200 ? Math.round(s / 60) + ' min' : Math.round(s / 3600) + ' h';
const source = job => job.node + '/' + job.vmid;
const label = job => source(job) + (job.newid && ' → ' + job.newid) + (job.kind == 'qemu' ? ' (VM)' : '');
const fate = job => job.outcome || job.stage;
const state = job => (WORDS[fate(job)] || fate(job)) + (job.text && job.text != 'OK' ? ': ' + job.text : '') +
  (job.gives_up_in ? '; gives up in ' + period(job.gives_up_in) : '') + (job.client == 'left' ? '; client left' : '');
function alarms(s) {
  const found = [], held = {}, r = s.running, stuck = s.problem ? [] : s.waiting.filter(job => job.gives_up_in);
  const add = (name, headline, text) => found.push(make('li', name, make('b', '', headline), ' ' + text));
  if (lost) add('lost', 'The proxy does not answer', `since ${clock(lost)}; what follows is older.`);
  if (s.problem) add('away', 'PVE is unreachable', `since ${clock(s.now - s.problem.seconds)}: ${s.problem.text}`);
  if (s.waiting.length >= s.queue_size) add('full', 'The queue is full', 'and further clones are refused.');
  if (r && r.clone_seconds > s.task_timeout) add('late', label(r) + ' is beyond -task-timeout:', r.upid);
  for (const job of stuck) (held[`${source(job)}: ${job.text};`] ||= []).push(job.gives_up_in);
  for (const [headline, times] of Object.entries(held))
    add('held', headline, `${times.length} waiting, the last gives up in ${period(Math.max(...times))}.`);
  return found;
}
function tables(s) {
  const newest = s.history.slice().reverse(), queue = [s.running, ...s.waiting.slice(0, FIRST)].filter(Boolean);
  const ended = newest.filter(job => !$('wrong').checked || job.outcome != 'completed');
  // One axis for all bars, up to now or to the last end, for the longest stay of the queue and of the ten newest.
  const end = queue.length || !newest.length ? s.now : newest[0].ended;
  const span = Math.max(10, ...queue.concat(newest.slice(0, 10)).map(job => job.waited_seconds + job.clone_seconds));
  for (const axis of document.querySelectorAll('th'))
    axis.replaceChildren(...[1, .75, .5, .25].map(part => make('span', 'faint', clock(end - span * part))));
  const part = (name, t) => Object.assign(make('i', name), {style: `width: ${100 * t / span}%`});
  const row = (job, first) => make('tr', fate(job), make('td', 'at faint', first), make('td', '', label(job)),
    make('td', 'state', state(job)), make('td', '', 'waited ' + period(job.waited_seconds) +
      (job.clone_seconds ? (job.ended ? ', ran ' : ', runs ') + period(job.clone_seconds) : '')),
    make('td', 'who faint', [job.user, job.address, job.upid].filter(Boolean).join(' · ')), make('td', 'bar',
      part('wait', job.waited_seconds), part('run', job.clone_seconds), part('', job.ended ? end - job.ended : 0)));
  $('queue').replaceChildren(...queue.map((job, i) => row(job, job == s.running ? 'now' : s.running ? i : i + 1)));
  $('ended').replaceChildren(...ended.map(job => row(job, clock(job.ended))));
}
function show(s) {
  const found = alarms(s), r = s.running, n = s.waiting.length, t = s.totals, median = s.median_seconds;
  document.title = (found.length ? '! ' : '') + (r || n ? `${r ? 1 : 0}+${n} ` : '') + 'PVE clone queue';
  $('name').textContent = 'PVE clone queue on ' + s.host;
  $('about').textContent = `version ${s.version}, PVE at ${s.backend}, up ${period(s.uptime_seconds)}`;
  $('alarms').replaceChildren(...found);
  const foreseen = n && median && found.every(alarm => alarm.className == 'full');
  $('sentence').textContent = (r ? `Cloning ${label(r)} for ${period(r.clone_seconds)}; ` : 'No clone runs; ') +
    `${n} of ${s.queue_size} wait` + (foreseen ? `, about ${period(median * (n + 1))} until the last is done.` : '.');
  $('counts').textContent = `Since ${clock(s.now - s.uptime_seconds)}: ${t.completed} done, ${t.failed} failed, ` +
    `refused ${t.taken} (VMID taken), ${t.rejected} (no place), ${t.refused} (login, request); ${t.abandoned} left` +
    (median ? `; the median clone takes ${period(median)}.` : '.');
  $('more').textContent = n > FIRST ? `and ${n - FIRST} more` : '';
  if (getSelection().isCollapsed) tables(s);  // what is marked, say to be copied, stays
}
async function refresh() {
  const fresh = await fetch('status.json', {signal: AbortSignal.timeout(5000)}).then(r => r.json()).catch(() => null);
  latest = fresh || latest;
  lost = fresh ? 0 : lost || Date.now() / 1000;
  setTimeout(refresh, document.hidden ? 5000 : 1000);
  if (latest) show(latest);
}
$('wrong').addEventListener('change', () => latest && show(latest));
refresh();
"""
STATUS_PAGE = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>PVE clone queue</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{STATUS_STYLE}</style></head><body><h1 id="name">PVE clone queue</h1><p class="faint" id="about"></p>
<ul id="alarms"></ul><p id="sentence">The proxy has not answered yet.</p><p class="faint" id="counts"></p>
<h2>Queue</h2><table><thead><tr><th class="bar"></th></tr></thead><tbody id="queue"></tbody></table>
<p class="faint" id="more"></p><h2>Ended</h2><label><input type="checkbox" id="wrong"> only what went wrong</label>
<table><thead><tr><th class="bar"></th></tr></thead><tbody id="ended"></tbody></table>
<noscript>Without JavaScript, see status.json.</noscript><script>{STATUS_SCRIPT}</script></body></html>
"""
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(STATUS_SCRIPT.encode()).digest()).decode()
STATUS_FIELDS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{_SCRIPT_HASH}'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


MAX_STATUS_CONNECTIONS = 16  # slow readers of the page must not cost the API its threads and descriptors


class StatusServer(ListeningServer):
    """The listener of -status-listen."""

    def __init__(self, listener: socket.socket, proxy: ProxyServer) -> None:
        super().__init__(listener, StatusHandler, MAX_STATUS_CONNECTIONS)
        self.proxy = proxy
        self._started_at = time.monotonic()

    def snapshot(self) -> dict[str, Any]:
        """The queue's and the proxy's figures."""
        problem = self.proxy.backend.problem()
        return {
            "version": VERSION,
            "host": socket.gethostname(),
            "now": round(time.time(), 3),
            "backend": self.proxy.backend.url,
            "problem": {"text": problem[0], "seconds": round(problem[1], 1)} if problem else None,
            "task_timeout": self.proxy.settings.task_timeout,
            "uptime_seconds": round(time.monotonic() - self._started_at, 1),
            **self.proxy.clones.snapshot(),
            **self.proxy.counters(),
        }


class StatusHandler(http.server.BaseHTTPRequestHandler):
    """Answers `/`, `/status.json`, `/metrics` and `/healthz`, and closes."""

    server: StatusServer
    timeout = 10.0

    def log_message(self, format: str, *args: Any) -> None:
        """Requests of the page are not logged."""

    def do_GET(self) -> None:
        """Answer a GET or HEAD."""
        status, kind, backend = 200, "text/plain;charset=UTF-8", self.server.proxy.backend
        match self.path.partition("?")[0]:
            case "/":
                kind, text = "text/html;charset=UTF-8", STATUS_PAGE
            case "/status.json":
                kind, text = "application/json", json.dumps(self.server.snapshot())
            case "/metrics":
                kind, text = "text/plain; version=0.0.4; charset=utf-8", metrics(self.server.snapshot())
            case "/healthz":  # the worker need not be looked at: the process ends with it
                backend.look()
                problem = backend.problem()
                status, text = (503, f"{backend.url} can't be reached: {problem[0]}\n") if problem else (200, "ok\n")
            case _:
                status, text = 404, "there is no such page\n"
        body = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **STATUS_FIELDS}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET


def _check_certificate(settings: Settings) -> str:
    if not server_tls(settings):
        return "none: the listener speaks plain HTTP"
    text = Path(settings.tls_cert).read_text("latin-1")  # there may be any text around the certificates
    certificate = base64.b64decode(re.findall("-----BEGIN [A-Z0-9 ]*CERTIFICATE-----([^-]+)", text)[0])
    # RFC 5280 4.1.2.5: the second time in a certificate is its notAfter, with a year of two digits or four.
    ends = "20" + re.findall(rb"(?:\x17\x0d|\x18\x0f)([0-9]{12,14})Z", certificate)[1].decode()
    days = (calendar.timegm(time.strptime(ends[-14:], "%Y%m%d%H%M%S")) - time.time()) / 86400
    if days < 0:
        raise FlagError(f"{settings.tls_cert} has expired; renew it, then restart the service")
    return f"{settings.tls_cert} and its key fit, valid for {days:.0f} days more"


def _holder(port: int) -> str:
    """The process of this program's that runs as the user whose socket listens on a port of this host; "" if none is
    seen to. (Whose descriptors they are, other users can't see.)"""
    rows = [line.split() for path in Path("/proc/net").glob("tcp*") for line in path.read_text().splitlines()]
    users = {row[7] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = [os.path.basename(word) for word in (process / "cmdline").read_text("latin-1").split("\0")]
            named = words[0].startswith("python") and PROGRAM in words[1:4]
            if named and str(process.stat().st_uid) in users and process.name != str(os.getpid()):
                return process.name
    return ""


def _check_listen(address: tuple[str, int] | None) -> str:
    if not address:
        return "off"
    try:
        listen_on(address).close()
    except ListenError:
        if process := _holder(address[1]):
            return f"{host_port(*address)} is in use by {PROGRAM}, which runs as process {process}"
        raise
    return f"{host_port(*address)} can be listened on"


def _check_pve(settings: Settings) -> str:
    backend = Backend(settings)
    answer = backend.exchange(Outgoing("GET", "/api2/json/access/domains", [backend.host_field]), settings.request_timeout)
    if answer.status != 200:
        raise BackendError(502, f"{backend.url} answers {answer} to GET /api2/json/access/domains: is it PVE's API?")
    verified = "not verified (-insecure)" if settings.insecure else "verified"
    return f"{backend.url} answers" + (f", its certificate {verified}" if backend.context else "")


def check(settings: Settings) -> int:
    """Do all that a start does without serving, and say a line for each: 0 if nothing failed, or 1."""
    checks: dict[str, Callable[[], str]] = {
        "flags": lambda: "understood",
        "certificate": lambda: _check_certificate(settings),
        "-listen": lambda: _check_listen(settings.listen),
        "-status-listen": lambda: _check_listen(settings.status_listen),
        "PVE": lambda: _check_pve(settings),
        "tasks": lambda: f"of this host: their end is seen {'at once' if os.path.exists('/proc/1/stat') else 'by polling only'}",
    }
    status = 0
    for name, look in checks.items():
        try:
            line = f"ok    {name}: {look()}"
        except (FlagError, ListenError, BackendError) as error:
            line, status = f"FAIL  {name}: {error}", 1
        print(line, flush=True)
    return status


# main

LOG_LINES = 10_000  # that may wait to be written; more are dropped, counted, and told of
LOG_FLUSH_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)
HOUSEKEEPING_SECONDS = 0.25
SHUTDOWN_POLL_SECONDS = 0.1  # how often the accepting thread looks whether it should end


class LogQueue(logging.handlers.QueueHandler):
    """Hands lines to the thread that writes them: where nobody reads stderr, only that one waits."""

    _dropped = 0  # guarded by the handler's own lock, which `handle` holds

    def enqueue(self, record: logging.LogRecord) -> None:
        """Called by `handle`; never waits."""
        try:
            if self._dropped:
                told = logging.LogRecord(PROGRAM, logging.WARNING, "", 0, f"LOG: {self._dropped} lines were dropped", None, None)
                self.queue.put_nowait(told)
                self._dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1


def set_up_log() -> queue.Queue[Any]:
    """Log to stderr; the queue of the lines that are yet to be written."""
    logging.raiseExceptions = False  # a broken stderr is no reason to fail, or to complain to it
    for level, priority in ((logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3)):
        logging.addLevelName(level, f"<{priority}>")
    # For the journal its priority, otherwise a timestamp in the form of Go's log package.
    form = "%(levelname)s%(message)s" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s %(message)s"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(form, "%Y/%m/%d %H:%M:%S"))
    lines: queue.Queue[Any] = queue.Queue(LOG_LINES)
    log.addHandler(LogQueue(lines))
    log.setLevel(logging.INFO)
    logging.handlers.QueueListener(lines, handler).start()
    return lines


def run_vital(run: Callable[..., object], *arguments: Any) -> None:
    """The life of a thread without which the program is useless: if it fails, the process ends, to be started anew."""
    try:
        run(*arguments)
    except BaseException:
        log.exception("the %s thread failed", threading.current_thread().name)
        time.sleep(LOG_FLUSH_SECONDS)
        os._exit(1)


def serve_status(address: tuple[str, int], proxy: ProxyServer) -> None:
    """Serve the status page, whose absence must never cost the API."""
    try:
        status = StatusServer(listen_on(address), proxy)
    except ListenError as error:
        log.warning("no status page: %s", error)
        return
    log.info("STATUS PAGE: %s", status.address)
    if not status.is_local:
        log.warning("the status page on %s shows nodes, VMIDs and token names", status.address)
    threading.Thread(target=status.serve_forever, name="status", daemon=True).start()


def serve(server: ProxyServer) -> None:
    """Run until SIGTERM or SIGINT."""
    worker = CloneWorker(server.settings, server.backend, server.clones, server.reservations.release)
    threading.Thread(target=run_vital, args=[worker.run], name="clone worker", daemon=True).start()
    threading.Thread(target=run_vital, args=[server.backend.look_around], name="look", daemon=True).start()
    threading.Thread(target=run_vital, args=[server.serve_forever, SHUTDOWN_POLL_SECONDS], name="accept", daemon=True).start()
    notify("READY=1")
    status = ""
    while not signal.sigtimedwait(SIGNALS, HOUSEKEEPING_SECONDS):
        server.clones.look_around()
        problem = server.backend.problem()
        line = (f"PVE unreachable for {problem[1]:.0f}s, " if problem else "") + server.clones.summary()
        before, status = status, printable(line)  # a client's text must not become another assignment
        if status != before:
            notify(f"STATUS={status}")


def stop(server: ProxyServer) -> None:
    """End in good order: nobody who was accepted is left without an answer. A second signal ends it at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    log.info("shutting down")
    notify("STOPPING=1")
    begin = time.monotonic()
    server.shutdown()
    server.server_close()
    server.clones.drain()
    server.drain()
    server.wait_until_closed(begin + 1)
    server.drain()  # who still has said nothing
    server.clones.wait_until_idle(begin + DRAIN_SECONDS)
    server.wait_until_closed(begin + DRAIN_SECONDS)
    server.clones.answer_running()
    server.wait_until_closed(time.monotonic() + 2)


def run(arguments: list[str]) -> int:
    """Run the program, its log set up; its exit status."""
    try:
        settings = parse_flags(arguments)
        if settings.check:
            log.disabled = True  # its lines say it
            return check(settings)
        backend = Backend(settings)
        tls = server_tls(settings)
        # Last: a socket that is kept while no start succeeds would make clients hang.
        server = ProxyServer(open_listener(settings.listen), settings, backend, tls)
    except (FlagError, ListenError) as error:
        log.error("%s: %s", PROGRAM, error)
        return 2 if isinstance(error, FlagError) else 1
    log.info("LISTENING: %s backend=%s", server.address, backend.url)
    if not tls and not server.is_local:
        log.warning("listening on %s without TLS: PVE credentials travel in clear text", server.address)
    if settings.status_listen:
        serve_status(settings.status_listen, server)
    serve(server)
    stop(server)
    return 0


def main(arguments: list[str]) -> int:
    """The exit status: 0 after a signal, 1 if an address can't be listened on or -check found a failure, 2 for a wrong
    flag."""
    # Blocked here and in every thread, to be taken by sigtimedwait: no handler can interrupt what holds a lock.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for `stop`, not Python's own handler
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nothing is read again: a restart refuses nobody
    lines = set_up_log()
    try:
        return run(arguments)
    finally:  # write what is left, but do not wait for a reader who does not read
        with lines.all_tasks_done:
            lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, LOG_FLUSH_SECONDS)


if __name__ == "__main__":
    # Without the interpreter's own shutdown, which fails when a daemon thread happens to be writing to stderr.
    os._exit(main(sys.argv[1:]))
