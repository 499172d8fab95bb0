#!/usr/bin/env python3
"""A proxy before the Proxmox VE API that runs container clones one at a time.

PVE locks a container while it is cloned, so of several concurrent calls of

    POST /api2/json/nodes/{node}/lxc/{vmid}/clone

all but one fail with "CT is locked". This proxy queues those calls, sends one at a time to PVE, waits until its task has
ended, and only then returns PVE's own answer. Everything else (web GUI, consoles, uploads) passes through unchanged.

The way of a request:

1. `ProxyServer` accepts the connection and gives it a thread of its own, in which a `ProxyHandler` lives.
2. The handler reads the request's head with `MessageReader`, the one strict reader for requests and answers alike.
3. An ordinary request goes to PVE on a connection of `Backend`, and PVE's answer is streamed back. For a WebSocket
   `run_tunnel` then passes the bytes on, both ways.
4. A clone becomes a `CloneJob`, which the handler admits to the `CloneQueue`; then it waits for its event. The main
   thread looks twice a second whether the clients of all clones are still there.
5. The queue's one worker thread claims the job, posts it to PVE, reads the UPID, waits for the task (by polling its
   status, and by watching its process where that runs on this host), stores PVE's answer and sets the event. Only
   then does it take the next job. A source that is locked by somebody else is tried again later.
6. The handler writes PVE's answer to its client.

The rooms of this file, each of which needs only those above it: Settings, Messages, Backend, Clone queue, Handler,
Server, Operation (systemd, status page, metrics), main. Run it with -help to see its flags.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import enum
import errno
import functools
import hashlib
import http.client
import http.server
import ipaddress
import itertools
import json
import logging
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
from typing import Any, NamedTuple, NoReturn

VERSION = "2.0.0"
PROGRAM = "pve-clone-queue-proxy"

log = logging.getLogger(PROGRAM)


# Settings: flags as Go's flag package reads them, since existing command lines must go on working.


class FlagError(Exception):
    """A flag or its value is wrong; the text names both."""


_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"\+?(?:0|(?:{_DURATION_PART.pattern})+)")
_BACKEND = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?::([0-9]{1,5}))?/?")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%a-z]+\]|[A-Za-z0-9._-]*):([0-9]{1,5})")
_LONGEST_DURATION = 10 * 365 * 86400.0


def parse_duration(text: str) -> float:
    """Seconds of a Go duration: `300ms`, `1.5h`, `1m30s`, `.5s`, `0`. Raises ValueError."""
    if not _DURATION.fullmatch(text):
        raise ValueError("want a duration such as 500ms, 30s, 5m or 1h30m")
    seconds = sum(float(number) * _DURATION_UNITS[unit] for number, unit in _DURATION_PART.findall(text))
    if seconds > _LONGEST_DURATION:
        raise ValueError("longer than ten years")
    return seconds


def parse_timeout(text: str) -> float:
    """Seconds of a Go duration that must be more than zero."""
    seconds = parse_duration(text)
    if seconds <= 0:
        raise ValueError("must be more than 0")
    return seconds


def parse_bool(text: str) -> bool:
    """The truth values that Go's flag package takes."""
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise ValueError("want true or false")


def parse_count(text: str) -> int:
    """A number from 1 to a million."""
    if not re.fullmatch("[0-9]{1,7}", text) or not 1 <= int(text) <= 1_000_000:
        raise ValueError("want a number of 1 or more")
    return int(text)


def parse_answer(text: str) -> str:
    """When a clone's client gets PVE's answer."""
    if text not in ("complete", "started"):
        raise ValueError("want complete or started")
    return text


def _port(text: str) -> int:
    if int(text) > 65535:
        raise ValueError("no such port")
    return int(text)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `:PORT` (host is then "") or `[::1]:PORT`."""
    match = _ADDRESS.fullmatch(text)
    if not match:
        raise ValueError("want HOST:PORT, :PORT or [IPV6]:PORT")
    return match[1].strip("[]"), _port(match[2])


class BackendAddress(NamedTuple):
    """Where the PVE API listens; `str()` gives its URL."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """`host:port`, as in a Host field."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_backend(text: str) -> BackendAddress:
    """The backend of a URL without a path."""
    match = _BACKEND.fullmatch(text)
    if not match:
        raise ValueError("want http(s)://HOST[:PORT] without a path")
    scheme, host, port = match.groups()
    return BackendAddress(scheme, host.strip("[]"), _port(port or {"http": "80", "https": "443"}[scheme]))


class Settings(NamedTuple):
    """What the flags say, durations in seconds. FLAGS tells what each of them means."""

    listen: tuple[str, int] = ("", 8081)
    backend: BackendAddress = BackendAddress("https", "127.0.0.1", 8006)
    insecure: bool = True
    ca: str = ""
    poll_delay: float = 0.5
    task_timeout: float = 300.0
    request_timeout: float = 30.0
    lock_timeout: float = 300.0
    queue_size: int = 100
    answer: str = "complete"
    qemu: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    status_listen: tuple[str, int] | None = None
    verbose: bool = False


# How each flag's value is read, and its line in -help. (A NamedTuple, since dataclasses takes 1 MB of memory.)
FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "listen": (parse_address, "address to listen on: HOST:PORT or :PORT"),
    "backend": (parse_backend, "the PVE API, http(s)://HOST[:PORT]"),
    "insecure": (parse_bool, "do not verify the backend's certificate"),
    "ca": (str, "PEM file to verify the backend's certificate with (-insecure=false)"),
    "poll-delay": (parse_duration, "longest delay between task status polls"),
    "task-timeout": (parse_timeout, "longest time a client waits for its started clone"),
    "request-timeout": (parse_timeout, "longest silence of the backend in one request"),
    "lock-timeout": (parse_duration, "how long to retry when PVE says that the source is locked"),
    "queue-size": (parse_count, "how many clones may wait"),
    "answer": (parse_answer, "when a clone is answered: complete, or as soon as it has started"),
    "qemu": (parse_bool, "queue clones of VMs too"),
    "tls-cert": (str, "listen with TLS: PEM file of the certificate chain"),
    "tls-key": (str, "listen with TLS: PEM file of the private key"),
    "status-listen": (parse_address, "address of the status page and metrics"),
    "verbose": (parse_bool, "also log every relayed request"),
}


def _default_text(value: Any) -> str:
    if value == "" or value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple) and not isinstance(value, BackendAddress):
        return f"{value[0]}:{value[1]}"
    if isinstance(value, float):
        return f"{value / 60:g}m" if value >= 60 else f"{value:g}s" if value >= 1 else f"{value * 1000:g}ms"
    return str(value)


def usage() -> str:
    """The text of -help, in the shape that Go's flag package gives it."""
    lines = [f"Usage of {PROGRAM}:"]
    for name, (_, text) in FLAGS.items():
        default = _default_text(Settings._field_defaults[name.replace("-", "_")])
        lines += [f"  -{name}", f"    \t{text}" + (f" (default {default})" if default else "")]
    lines += ["  -version", "    \tprint the version and exit", "  -help", "    \tprint this text and exit"]
    return "\n".join(lines)


def parse_flags(arguments: list[str]) -> Settings:
    """Settings of a command line in Go's syntax: `-flag value`, `-flag=value`, one dash or two; a bool's value only
    after `=`. Raises FlagError."""
    values: dict[str, Any] = {}
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        match = re.fullmatch(r"--?([A-Za-z][A-Za-z-]*)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            raise FlagError(f"unexpected argument {argument!r}")
        name, value = match.groups()
        if name not in FLAGS:
            raise FlagError(f"unknown flag -{name}")
        parse, _ = FLAGS[name]
        if value is None and parse is parse_bool:
            value = "true"
        if value is None:
            if not rest:
                raise FlagError(f"flag -{name} needs a value")
            value = rest.popleft()
        try:
            values[name.replace("-", "_")] = parse(value)
        except ValueError as error:
            raise FlagError(f"invalid value {value!r} for flag -{name}: {error}") from None
    settings = Settings(**values)
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise FlagError("flags -tls-cert and -tls-key belong together: one of them is missing")
    if settings.ca and settings.insecure:
        raise FlagError(f"flag -ca {settings.ca!r} verifies nothing without -insecure=false")
    return settings


# Messages: RFC 9112 read strictly from bytes, for requests and responses alike, and the proxy's own error answers.

# RFC 9112 5 and RFC 9110 5.5: a token, a colon directly behind it, a value without control bytes; with its CRLF.
# The value's outer blanks are left in it here and stripped later: optional blanks in the regex could backtrack.
_FIELD = re.compile(rb"(([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n)")
_FIELDS = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[^\x00-\x08\x0a-\x1f\x7f]*+\r\n)*+")
# RFC 9112 2.2: bare CR and bare LF are refused, and so are control bytes. Seen as soon as they arrive.
_BAD_HEAD_BYTE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")
# RFC 9112 3: one blank between the parts; RFC 3986: a target is visible ASCII, and a fragment is never sent.
_REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}) ([!\"$-~]+) HTTP/([0-9])\.([0-9])")
# RFC 9112 3.2.2
_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://([^/?]+)(.*)")
# RFC 9110 7.2 with RFC 3986 3.2.2, userinfo left out
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~%!$&'()*+,;=]*)(?::[0-9]{0,5})?")
# RFC 9112 4. The blank behind the status code is optional here: some servers leave it out with an empty reason.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01])( ([1-9][0-9]{2})(?: [\t -~\x80-\xff]*)?)")
# RFC 9110 8.6
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")
# RFC 9112 7.1 and 7.1.1
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?")

MAX_LINE = 16 * 1024
MAX_HEAD = 64 * 1024
MAX_FIELDS = 100
MAX_CACHED = 2048  # bytes of a head whose parsed form is kept in memory
CACHED_HEADS = 64
MAX_CHUNK_LINE = 256
MAX_INTERIM = 10
RECEIVE_SIZE = 16 * 1024
PIECE_SIZE = 256 * 1024
LONGEST_POLL = 3600.0

# Lengths of a body that are not a number of bytes: RFC 9112 6.3, items 4 and 8.
CHUNKED = -1
UNTIL_CLOSE = -2

# RFC 9110 7.6.1 names the first six; the proxy's own authentication and Trailer end here too (trailers are dropped).
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection te transfer-encoding upgrade"
    b" trailer proxy-authenticate proxy-authorization".split()
)
_UNFRAMED_DROP = HOP_BY_HOP | {b"content-length"}
# These too are the proxy's own business in a request.
REQUEST_DROP = HOP_BY_HOP | {b"expect", b"x-forwarded-for"}
_UPGRADE_DROP = REQUEST_DROP - {b"upgrade"}
# What a Connection field can't make the proxy drop, whatever it names. (Upgrade is dropped or kept for its own reasons.)
PROTECTED = frozenset(
    b"host content-length content-type authorization cookie set-cookie csrfpreventiontoken upgrade".split()
)
# What a field with `_` in its name can't stand for.
_AMBIGUOUS = REQUEST_DROP | PROTECTED

_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Bytes = bytes | bytearray | memoryview
Deadline = Callable[[], float]


class Refusal(Exception):
    """A request that is answered with an error of the proxy's own: its status and reason, and what goes with them."""

    def __init__(self, status: int, reason: str, *, data: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.data = data
        self.retry_after = retry_after


class Disconnected(Exception):
    """The connection to the peer is over: it broke, or (EndOfStream) the peer closed it."""


class EndOfStream(Disconnected):
    """The peer closed the connection."""


class Stalled(Exception):
    """The peer did not send or take a byte before the deadline."""


class Watch(NamedTuple):
    """Another descriptor to look at while a socket is waited for: `look` is called on its `events`, and may raise to
    end the wait."""

    fd: int
    events: int
    look: Callable[[], None]


def within(seconds: float) -> Deadline:
    """A deadline that starts anew each time it is asked for: a limit on silence."""
    return lambda: time.monotonic() + seconds


def printable(text: bytes | str, limit: int = 300) -> str:
    """Text of a peer's, made safe for one line of a log: only printable ASCII, at most `limit` characters."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    return re.sub(r"[^ -~]", lambda match: f"\\x{ord(match[0]):02x}", text[:limit])


def field_text(text: str) -> str:
    """The same for a value within a line, without blanks."""
    return printable(text).replace(" ", "\\x20")


class Fields:
    """A head's field lines in their order, checked. Never changed, since equal heads share them.

    `lines` holds each field's lower-case name and its whole line as it came; `values` holds each name's values.
    """

    __slots__ = ("lines", "values")

    def __init__(self, block: bytes) -> None:
        """Parse field lines, each ended by CRLF. Raises Refusal (400 or 431)."""
        if block.count(b"\r\n") > MAX_FIELDS:
            raise Refusal(431, f"more than {MAX_FIELDS} header fields")
        if not _FIELDS.fullmatch(block):
            raise Refusal(400, _what_is_wrong(block))
        self.lines: list[tuple[bytes, bytes]] = []
        self.values: dict[bytes, list[bytes]] = {}
        for line, field_name, value in _FIELD.findall(block):
            name = field_name.lower()
            self.lines.append((name, line))
            self.values.setdefault(name, []).append(value.strip(b" \t"))

    def one(self, name: bytes) -> bytes | None:
        """The value of a field that may stand once. Raises Refusal if it stands twice."""
        values = self.values.get(name, [None])
        if len(values) > 1:
            raise Refusal(400, f"more than one {name.decode()} field")
        return values[0]

    def tokens(self, name: bytes) -> set[bytes]:
        """The lower-case elements of a list-valued field (RFC 9110 5.6.1)."""
        values = self.values.get(name, [])
        return {element.strip(b" \t").lower() for value in values for element in value.split(b",")}

    def end_to_end(self, drop: frozenset[bytes]) -> bytes:
        """The lines of the fields that go on to the next hop (RFC 9110 7.6.1): without those in `drop` and those that
        a Connection field names."""
        drop = drop | (self.tokens(b"connection") - PROTECTED)
        return b"".join([line for name, line in self.lines if name not in drop])

    def framing(self, http11: bool) -> int | None:
        """Length of the body by Content-Length, CHUNKED, or None where no field says one (RFC 9112 6). Stricter than
        the RFC: both fields together, repeats and other codings are refused. Raises Refusal."""
        if b"transfer-encoding" in self.values:
            if not http11:
                raise Refusal(400, "Transfer-Encoding in HTTP/1.0")
            if b"content-length" in self.values:
                raise Refusal(400, "both Transfer-Encoding and Content-Length")
            coding = self.one(b"transfer-encoding") or b""
            if coding.lower() != b"chunked":
                raise Refusal(501, "a Transfer-Encoding other than chunked")
            return CHUNKED
        length = self.one(b"content-length")
        if length is None:
            return None
        if not _CONTENT_LENGTH.fullmatch(length):
            raise Refusal(400, "Content-Length is not a number")
        return int(length)

    def keep_alive(self, http11: bool) -> bool:
        """Whether the connection may be used again (RFC 9112 9.3)."""
        if b"connection" not in self.values:
            return http11
        options = self.tokens(b"connection")
        return b"close" not in options and (http11 or b"keep-alive" in options)


def _what_is_wrong(block: bytes) -> str:
    """Why a block of field lines was refused: the reason of the first bad line."""
    for line in block.split(b"\r\n"):
        if line[:1] in (b" ", b"\t"):
            return "line folding in the header (RFC 9112 5.2)"
        name, colon, value = line.partition(b":")
        if line and not colon:
            return "a header line without a colon"
        if name != name.rstrip(b" \t"):
            return "a blank before a header line's colon (RFC 9112 5.1)"
        if line and not _FIELD.fullmatch(name + b":\r\n"):
            return "a header field's name is not a token"
        if not _FIELD.fullmatch(b"x:" + value + b"\r\n"):
            return "a control byte in a header field's value"
    return "malformed header"


class MessageReader:
    """Reads messages from one non-blocking socket, plain or TLS, with bounded sizes and deadlines.

    Bytes beyond what was asked for stay in `buffer`. One other descriptor can be watched while this one is waited for.
    Used by one thread at a time. Methods raise Refusal on a malformed message, Disconnected and Stalled.
    """

    __slots__ = ("_fd", "_pending", "_poll", "_read", "_space", "_watch", "buffer", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self._fd = sock.fileno()
        tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._pending = tls.pending if tls else None
        self._read: Callable[[int], bytes] = tls.read if tls else sock.recv
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._space: memoryview | None = None
        self._watch: Watch | None = None

    def watch(self, watch: Watch) -> None:
        """Look at another descriptor, too, while this socket is waited for."""
        self._watch = watch
        self._poll.register(watch.fd, watch.events)

    def unwatch(self) -> None:
        """End what `watch` began. To be called before the watched descriptor is closed."""
        if self._watch:
            self._poll.unregister(self._watch.fd)
            self._watch = None

    def wait(self, deadline: float) -> None:
        """Wait until there is something to read: a byte, the end, or an error."""
        # TLS may hold decrypted bytes that the descriptor does not show.
        if self._pending is not None and self._pending():
            return
        while (seconds := deadline - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(min(seconds, LONGEST_POLL) * 1000):
                if fd == self._fd or not self._watch:
                    return
                self._watch.look()
        raise Stalled

    def holds_more(self) -> bool:
        """Whether bytes have been received that nobody has asked for; TLS may hold some too."""
        return bool(self.buffer) or (self._pending is not None and self._pending() > 0)

    def readable(self) -> bool:
        """Whether a byte, the end or an error has arrived that has not been received yet."""
        return bool(self._poll.poll(0))

    def fill_now(self) -> bool:
        """Add what is there to `buffer` without waiting; False if nothing is (a TLS ticket, say). Raises Disconnected
        at the end of the stream."""
        try:
            data = self._read(RECEIVE_SIZE)
        except _WOULD_BLOCK:
            return False
        except OSError as error:
            raise Disconnected(str(error)) from None
        if not data:
            raise EndOfStream("the connection was closed")
        self.buffer += data
        return True

    def fill(self, deadline: float) -> None:
        """Add at least one byte to `buffer`."""
        while not self.fill_now():
            self.wait(deadline)

    def head(self, deadline: float) -> bytes:
        """Read a start line and field lines, each with its CRLF, up to their empty line, all before the deadline."""
        buffer = self.buffer
        scanned = 0
        while (end := buffer.find(b"\r\n\r\n", max(0, scanned - 3))) < 0:
            self._check_partial_head(max(0, scanned - 1))
            scanned = len(buffer)
            self.fill(deadline)
        if end > MAX_LINE:
            self._check_size(end)
        head = bytes(buffer[: end + 2])
        del buffer[: end + 4]
        return head

    def _check_partial_head(self, start: int) -> None:
        if _BAD_HEAD_BYTE.search(self.buffer, start):
            raise Refusal(400, "a control byte, bare CR or bare LF in the head (RFC 9112 2.2)")
        self._check_size(len(self.buffer))

    def _check_size(self, size: int) -> None:
        if size > MAX_LINE and self.buffer.find(b"\r\n", 0, MAX_LINE + 2) < 0:
            raise Refusal(414, f"the first line is longer than {MAX_LINE} bytes")
        if size > MAX_HEAD:
            raise Refusal(431, f"the head is larger than {MAX_HEAD} bytes")

    def take(self, length: int) -> bytes:
        """What is in `buffer` of a body that is framed by Content-Length or by the close."""
        if length == CHUNKED:
            return b""
        data = bytes(self.buffer if length == UNTIL_CLOSE else self.buffer[:length])
        del self.buffer[: len(data)]
        return data

    def body(self, length: int, deadline: Deadline) -> Iterator[Bytes]:
        """The body's decoded pieces as they arrive. A piece is valid until the next one is asked for."""
        try:
            if length == CHUNKED:
                yield from self._chunks(deadline)
            elif length == UNTIL_CLOSE:
                with contextlib.suppress(EndOfStream):
                    yield from self._exactly(sys.maxsize, deadline)
            else:
                yield from self._exactly(length, deadline)
        finally:
            self._space = None

    def _receive(self, size: int, deadline: Deadline) -> memoryview:
        if self._space is None:  # small until it has been filled: many clients may announce bodies that never come
            self._space = memoryview(bytearray(RECEIVE_SIZE))
        space = self._space[:size]
        while True:
            try:
                count = self.sock.recv_into(space)
            except _WOULD_BLOCK:
                self.wait(deadline())
                continue
            except OSError as error:
                raise Disconnected(str(error)) from None
            if not count:
                raise EndOfStream("the connection was closed")
            count = self._receive_more(space, count)
            if count == len(self._space) < PIECE_SIZE:
                self._space = memoryview(bytearray(PIECE_SIZE))
            return space[:count]

    def _receive_more(self, space: memoryview, count: int) -> int:
        """TLS hands out records of 16 KiB: add those that are there, since fewer and larger sends are faster."""
        if self._pending is None:
            return count
        with contextlib.suppress(*_WOULD_BLOCK, OSError):  # an error or the end will be met again
            while len(space) - count > 0 and (more := self.sock.recv_into(space[count : count + RECEIVE_SIZE])):
                count += more
        return count

    def _exactly(self, length: int, deadline: Deadline) -> Iterator[Bytes]:
        while length:
            piece: Bytes
            if self.buffer:
                piece = bytes(self.buffer[:length])
                del self.buffer[:length]
            else:
                piece = self._receive(length, deadline)
            length -= len(piece)
            yield piece

    def _chunks(self, deadline: Deadline) -> Iterator[Bytes]:
        while True:
            match = _CHUNK_LINE.fullmatch(self._line(MAX_CHUNK_LINE, deadline()))
            if not match:
                raise Refusal(400, "a malformed chunk size (RFC 9112 7.1)")
            size = int(match[1], 16)
            if size == 0:
                break
            yield from self._exactly(size, deadline)
            self._line(0, deadline())
        left = MAX_HEAD
        while trailer := self._line(left, deadline()):
            left -= len(trailer) + 2
            if not _FIELD.fullmatch(trailer + b"\r\n"):
                raise Refusal(400, "a malformed trailer field")

    def _line(self, limit: int, deadline: float) -> bytes:
        """A line of at most `limit` bytes, without its CRLF."""
        while (end := self.buffer.find(b"\r\n", 0, max(limit, 0) + 2)) < 0:
            if len(self.buffer) >= limit + 2:
                raise Refusal(400, "a chunk's line is too long or not ended by CRLF (RFC 9112 7.1)")
            self.fill(deadline)
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 2]
        return line


def send_all(sock: socket.socket, data: Bytes, deadline: Deadline, watch: Watch | None = None) -> None:
    """Send to a non-blocking socket; the deadline starts anew with every byte taken. While the peer takes none, `watch`
    looks at what the peer sends, too. Raises Disconnected and Stalled."""
    while data:
        try:
            sent = sock.send(data)
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        except _WOULD_BLOCK:
            _wait_writable(sock, deadline(), watch)
        except OSError as error:
            raise Disconnected(str(error)) from None


def _wait_writable(sock: socket.socket, deadline: float, watch: Watch | None) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLOUT | (select.POLLIN if watch else 0))
    if watch:
        poll.register(watch.fd, watch.events)
    while (seconds := deadline - time.monotonic()) > 0:
        ready = dict(poll.poll(min(seconds, LONGEST_POLL) * 1000))
        if ready and watch:
            watch.look()
        if ready.get(sock.fileno(), 0) & ~select.POLLIN:
            return
    raise Stalled


def chunked(pieces: Iterable[Bytes]) -> Iterator[Bytes]:
    """The chunked transfer coding of a body (RFC 9112 7.1)."""
    for piece in pieces:
        if piece:
            yield b"".join((b"%x\r\n" % len(piece), piece, b"\r\n"))
    yield b"0\r\n\r\n"


class Request:
    """A request's head that has passed every check: RFC 9112 3, 6 and RFC 9110 7.2, 10.1.1. Never changed.
    `upgrade` says whether this is a WebSocket's opening handshake (RFC 6455 4.1). `relayed_head` holds request line and
    field lines as they go to the backend, clones aside, without what the handler adds to them, and the empty line."""

    __slots__ = (
        "expects_continue", "fields", "http11", "keep_alive", "length", "method", "relayed_head", "target", "upgrade",
    )  # fmt: skip

    def __init__(self, head: bytes) -> None:
        """Parse the lines of a head. Raises Refusal with the status and reason that the client gets."""
        start_line, _, block = head.partition(b"\r\n")
        match = _REQUEST_LINE.fullmatch(start_line)
        if not match:
            raise Refusal(400, "a malformed request line (RFC 9112 3)")
        self.method, target, major, minor = match.groups()
        if major != b"1":
            raise Refusal(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
        self.fields = fields = Fields(block)
        # PVE's parser takes `_` for `-`, so these would be second fields of that name to it and another one to us.
        if any(b"_" in name and name.replace(b"_", b"-") in _AMBIGUOUS for name in fields.values):
            raise Refusal(400, "a field name with _ that can be taken for one with -")
        self.http11 = minor != b"0"
        self.target = _origin_form(self.method, target)
        host = fields.one(b"host")
        if host is None and self.http11:
            raise Refusal(400, "no Host field (RFC 9112 3.2)")
        if host is not None and not _HOST.fullmatch(host):
            raise Refusal(400, "a malformed Host field")
        self.length = fields.framing(self.http11) or 0
        self.expects_continue = b"expect" in fields.values and self.http11
        if self.expects_continue and fields.tokens(b"expect") != {b"100-continue"}:
            raise Refusal(417, "an Expect other than 100-continue")
        self.keep_alive = fields.keep_alive(self.http11)
        # Other upgrades are not offered to the backend: behind an h2c upgrade, say, clones would pass unseen.
        self.upgrade = (
            self.method == b"GET"
            and self.http11
            and self.length == 0
            and fields.tokens(b"upgrade") == {b"websocket"}
            and b"upgrade" in fields.tokens(b"connection")
        )
        lines = fields.end_to_end(_UPGRADE_DROP if self.upgrade else REQUEST_DROP)
        framing = b"Transfer-Encoding: chunked\r\n" if self.length == CHUNKED else b""
        option = b"Connection: Upgrade\r\n" if self.upgrade else b""
        self.relayed_head = b"%b %b HTTP/1.1\r\n%b%b%b" % (self.method, self.target, lines, framing, option)

    def path_parts(self) -> list[bytes]:
        """The path as PVE reads it: percent-decoded, then split on `/`, empty parts dropped. Line feeds at its end are
        left out, since `$` in Perl's regular expressions does not mind one."""
        path = urllib.parse.unquote_to_bytes(self.target.partition(b"?")[0]).rstrip(b"\n")
        return [part for part in path.split(b"/") if part]


_kept_request = functools.lru_cache(CACHED_HEADS)(Request)


def parse_request(head: bytes) -> Request:
    """The request of a head. Equal heads are parsed but once: a client mostly sends the same one again and again."""
    return _kept_request(head) if len(head) <= MAX_CACHED else Request(head)


def _origin_form(method: bytes, target: bytes) -> bytes:
    """The target as it is sent to the backend (RFC 9112 3.2): path and query, never an authority."""
    if method == b"CONNECT":
        raise Refusal(501, "CONNECT is not offered")
    if target == b"*" and method == b"OPTIONS":
        return target
    if not target.startswith(b"/"):
        match = _ABSOLUTE_FORM.fullmatch(target)
        if not match:
            raise Refusal(400, "the request target is not a path (RFC 9112 3.2)")
        authority, target = match.groups()
        if not _HOST.fullmatch(authority):
            raise Refusal(400, "a malformed authority in the request target")
        if method == b"OPTIONS" and not target:
            return b"*"
        if not target.startswith(b"/"):
            target = b"/" + target
    if target.startswith(b"//"):
        raise Refusal(400, "the request target begins with two slashes")
    return target


class Response:
    """The head of a response: `status_line` is what follows the version, `length` says how the body is framed. Never
    changed. `relayed_head` holds status line and field lines as they go to the client, without framing,
    Connection, and the empty line."""

    __slots__ = ("fields", "keep_alive", "length", "relayed_head", "status", "status_line")

    def __init__(self, head: bytes, method: bytes) -> None:
        """Parse the lines of the head of an answer to a request of that method. Raises Refusal."""
        start_line, _, block = head.partition(b"\r\n")
        match = _STATUS_LINE.fullmatch(start_line)
        if not match:
            raise Refusal(502, "a malformed status line (RFC 9112 4)")
        minor, self.status_line, status = match.groups()
        self.fields = fields = Fields(block)
        self.status = int(status)
        length = fields.framing(minor == b"1")
        if method == b"HEAD" or self.status < 200 or self.status in (204, 304):
            length = 0
        self.length = UNTIL_CLOSE if length is None else length
        self.keep_alive = fields.keep_alive(minor == b"1")
        # RFC 9110 8.6: an answer of 1xx or 204 never has a Content-Length.
        drop = _UNFRAMED_DROP if self.status < 200 or self.status == 204 else HOP_BY_HOP
        self.relayed_head = b"HTTP/1.1%b\r\n%b" % (self.status_line, fields.end_to_end(drop))

    def __str__(self) -> str:
        """Status and reason phrase, for people."""
        return printable(self.status_line.strip())

    @property
    def reason(self) -> str:
        """The reason phrase: PVE puts the text of an error there."""
        return self.status_line[5:].decode("latin-1")


_kept_response = functools.lru_cache(CACHED_HEADS)(Response)


def parse_response(head: bytes, method: bytes) -> Response:
    """The answer to a request of that method. Equal heads are parsed but once."""
    return _kept_response(head, method) if len(head) <= MAX_CACHED else Response(head, method)


def forget_heads() -> None:
    """Keep none of the heads, and so none of the credentials, that have been parsed."""
    _kept_request.cache_clear()
    _kept_response.cache_clear()


class Answer(NamedTuple):
    """A whole response that is small enough to be kept."""

    response: Response
    body: bytes

    def json_field(self, name: str) -> object:
        """That field of a JSON object in the body; None if there is no such thing."""
        try:
            content = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return content.get(name) if isinstance(content, dict) else None


def error_answer(refusal: Refusal) -> Answer:
    """An error of the proxy's own in the shape of PVE's errors: its clients show reason phrase and `message`."""
    body = json.dumps({"data": refusal.data, "message": refusal.reason}).encode() + b"\n"
    head = b"HTTP/1.1 %d %b\r\n" % (refusal.status, printable(refusal.reason).encode())
    head += b"Content-Type: application/json;charset=UTF-8\r\nContent-Length: %d\r\n" % len(body)
    if refusal.retry_after is not None:
        head += b"Retry-After: %d\r\n" % refusal.retry_after
    return Answer(Response(head, b"GET"), body)


# Backend: connections to the PVE API, whole exchanges for the worker, open responses for the relay.

# RFC 9110 9.2.1. Only these go out on a connection that was used before.
SAFE_METHODS = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE"})
# PVE closes an idle connection after 5 s; behind this age it might close it in the very moment of a request.
POOL_SECONDS = 4.0
POOL_SIZE = 64
MAX_ANSWER = 1024 * 1024


class BackendError(Refusal):
    """The backend gave no (whole, well-formed) answer; `status` is what the client gets: 502 or 504."""


class Unreachable(BackendError):
    """No connection could be made: nothing was sent."""


class Broken(BackendError):
    """The connection ended too early, or the answer came too early; what came before may still be an answer."""


class StaleConnection(BackendError):
    """A connection that was kept alive turned out closed before one byte of an answer."""


class ClientGone(Exception):
    """The client left while the backend was waited for."""


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """How the backend's certificate is verified; None without TLS. Raises FlagError if `-ca` can't be read."""
    if settings.insecure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context if settings.backend.scheme == "https" else None
    try:
        context = ssl.create_default_context(cafile=settings.ca or None)
    except OSError as error:  # SSLError is one: a file without certificates
        raise FlagError(f"invalid value {settings.ca!r} for flag -ca: {error.strerror or error}") from None
    # CAs made by older PVE releases have no keyUsage, which Python 3.13's default refuses.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context if settings.backend.scheme == "https" else None


# A client has left when it has closed its connection, or only its sending half: nginx and Go read that so too.
GONE_EVENTS = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Client:
    """Tells from a client's descriptor, without reading from it, whether the client is still there. `event` wakes the
    handler of a clone: its answer is there, or its client has left."""

    def __init__(self, fd: int) -> None:
        self.event = threading.Event()
        self._poll = select.poll()
        self._poll.register(fd, GONE_EVENTS)

    def gone(self) -> bool:
        """Whether the client has closed its connection, or its sending half."""
        return bool(self._poll.poll(0))

    def check(self) -> None:
        """Raise ClientGone if it is not."""
        if self.gone():
            raise ClientGone


class BackendConnection:
    """One connection to the backend: `http.client` connects and speaks TLS, a `MessageReader` reads the answers.

    Heads are sent as the bytes that they are, since `putrequest()` and `putheader()` take a quarter of the time of a
    relayed request to build and check what has been checked already. Every failure is a BackendError.
    """

    def __init__(
        self, address: BackendAddress, context: ssl.SSLContext | None, silence: float, connect_seconds: float
    ) -> None:
        """Connect, at most `connect_seconds` for each address. Raises Unreachable."""
        self.http = (
            http.client.HTTPSConnection(address.host, address.port, timeout=connect_seconds, context=context)
            if context
            else http.client.HTTPConnection(address.host, address.port, timeout=connect_seconds)
        )
        try:
            self.http.connect()
        except TimeoutError:
            self.http.close()
            raise Unreachable(504, f"{address} did not accept a connection within {connect_seconds:g} s") from None
        except (OSError, UnicodeError) as error:
            self.http.close()
            raise Unreachable(502, f"{address} can't be reached: {_reason(error)}") from None
        self.sock: socket.socket = self.http.sock
        self.sock.setblocking(False)
        self.reader = MessageReader(self.sock)
        self.deadline = self._deadline = within(silence)
        self.reusable = True
        self.idle_since = 0.0
        self._limit = self._silence = silence
        self._may_be_stale = False

    def reuse(self) -> None:
        """Prepare for the next request: until a byte of its answer has come, an end means that PVE had closed."""
        self._may_be_stale = True
        self._limit = self._silence
        self.deadline = self._deadline

    def limit(self, seconds: float) -> None:
        """Bound the whole exchange that begins now."""
        end = time.monotonic() + seconds
        self._limit = seconds
        self.deadline = lambda: end

    def _failure(self, error: Exception) -> BackendError:
        if isinstance(error, Refusal):
            return BackendError(502, f"the backend's answer is malformed: {error.reason}")
        if isinstance(error, Stalled):
            return BackendError(504, f"the backend gave no answer within {self._limit:g} s")
        if self._may_be_stale:
            return StaleConnection(502, "a kept-alive connection was closed")
        return Broken(502, f"the connection to the backend broke: {printable(str(error))}")

    def send(self, data: Bytes, watch: Watch | None = None) -> None:
        """Send all of it."""
        try:
            send_all(self.sock, data, self.deadline, watch)
        except (Disconnected, Stalled) as error:
            raise self._failure(error) from None

    def response(self, method: bytes, upgrade: bool, on_interim: Callable[[Response], None]) -> Response:
        """The final answer's head; interim ones (RFC 9110 15.2) are handed to `on_interim`."""
        for interim in range(MAX_INTERIM + 1):
            response = self.response_head(method)
            if response.status >= 200:
                return response
            if response.status == 101:
                if upgrade and response.fields.tokens(b"upgrade") == {b"websocket"}:
                    return response
                raise BackendError(502, "the backend's answer is malformed: a 101 that was not asked for")
            if interim < MAX_INTERIM:
                on_interim(response)
        raise BackendError(502, f"the backend's answer is malformed: more than {MAX_INTERIM} interim answers")

    def response_head(self, method: bytes) -> Response:
        """The next answer's head, be it interim or final."""
        reader = self.reader
        deadline = self.deadline()
        try:
            if not reader.buffer:
                reader.wait(deadline)
                reader.fill(deadline)
            self._may_be_stale = False
            return parse_response(reader.head(deadline), method)
        except (Refusal, Disconnected, Stalled) as error:
            raise self._failure(error) from None

    def body(self, response: Response, taken: int = 0) -> Iterator[Bytes]:
        """The answer's body, decoded, as it arrives; without so many bytes that were taken from the reader."""
        length = response.length if response.length < 0 else response.length - taken
        try:
            yield from self.reader.body(length, self.deadline)
        except (Refusal, Disconnected, Stalled) as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Close it, with TLS's close_notify where that can be sent at once."""
        close_notify(self.sock)
        self.http.close()


def _reason(error: Exception) -> str:
    """What an OSError says, without its number and without line ends."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return printable(strerror or str(error))


def close_notify(sock: socket.socket) -> None:
    """End TLS on a non-blocking socket without waiting for the peer."""
    if isinstance(sock, ssl.SSLSocket):
        with contextlib.suppress(OSError, ValueError):
            sock.unwrap()


def _ignore(_: Response) -> None:
    pass


class Backend:
    """The PVE API: makes connections, and keeps idle ones for safe requests without a body.

    `_lock` guards `_idle`, the stack of idle connections (the newest on top).
    """

    def __init__(self, settings: Settings) -> None:
        """Raises FlagError if the CA file is no good."""
        self.address = settings.backend
        self.host_line = b"Host: %b\r\n" % settings.backend.authority.encode()
        self.silence = settings.request_timeout
        self._context = tls_context(settings)
        self._lock = threading.Lock()
        self._idle: list[BackendConnection] = []

    def connect(self, seconds: float | None = None) -> BackendConnection:
        """A fresh connection, made within that time."""
        return BackendConnection(self.address, self._context, self.silence, seconds or self.silence)

    def take(self) -> BackendConnection | None:
        """An idle connection on which nothing has arrived since its last answer: `give_back` took none that held more."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if time.monotonic() - connection.idle_since < POOL_SECONDS and not connection.reader.readable():
                connection.reuse()
                return connection
            connection.close()

    def give_back(self, connection: BackendConnection, response: Response) -> None:
        """Keep a connection whose answer was read to its end, or close it: after an answer without an end of its own,
        one with bytes behind it, or when PVE said close."""
        connection.reader.unwatch()
        delimited = response.keep_alive and response.length != UNTIL_CLOSE and response.status != 101
        if not connection.reusable or not delimited or connection.reader.holds_more():
            connection.close()
            return
        connection.idle_since = time.monotonic()
        with self._lock:
            if len(self._idle) < POOL_SIZE:
                self._idle.append(connection)
                return
        connection.close()

    def prune(self) -> None:
        """Close the connections that have been idle for too long."""
        oldest = time.monotonic() - POOL_SECONDS
        with self._lock:
            expired = [connection for connection in self._idle if connection.idle_since < oldest]
            self._idle = [connection for connection in self._idle if connection.idle_since >= oldest]
        for connection in expired:
            connection.close()

    def get(self, target: str, fields: bytes, seconds: float, watch: Watch | None = None) -> Answer:
        """The whole answer to a GET, at most `seconds` from now; `watch` may end the wait for it."""
        data = b"GET %b HTTP/1.1\r\n%b\r\n" % (target.encode(), fields)
        connection = self.take()
        if connection:
            with contextlib.suppress(StaleConnection):
                return self._exchange(connection, b"GET", data, seconds, watch)
        return self._exchange(self.connect(seconds), b"GET", data, seconds, watch)

    def post(self, data: bytes) -> Answer:
        """The whole answer to a POST given as bytes, on a fresh connection; never sent a second time. Raises
        Unreachable when nothing was sent, another BackendError when nobody knows what the backend did."""
        connection = self.connect()
        connection.reusable = False
        return self._exchange(connection, b"POST", data, self.silence, None)

    def _exchange(
        self, connection: BackendConnection, method: bytes, data: bytes, seconds: float, watch: Watch | None
    ) -> Answer:
        connection.limit(seconds)
        if watch:
            connection.reader.watch(watch)
        body = bytearray()
        try:
            connection.send(data)
            response = connection.response(method, False, _ignore)
            for piece in connection.body(response):
                body += piece
                if len(body) > MAX_ANSWER:
                    raise BackendError(502, f"the backend's answer is larger than {MAX_ANSWER} bytes")
        except BaseException:
            connection.close()
            raise
        self.give_back(connection, response)
        return Answer(response, bytes(body))


# Clone queue: jobs, the one worker, PVE's locks, and waiting for a task.

# A UPID as far as it is put into a path and a log; PVE's own syntax is narrower.
_UPID = re.compile(r"UPID:(?=[!-~]{1,495}\Z)[^/%?#]*")
_NODE = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_UPID_NODE = re.compile(rf"UPID:({_NODE}):")
# Node, process id and the process's start time (field 22 of /proc/PID/stat), both in hexadecimal.
_UPID_PROCESS = re.compile(rf"UPID:{_NODE}:([0-9A-Fa-f]{{8}}):([0-9A-Fa-f]{{8,9}}):")

_TOKEN_NAME = re.compile(rb"PVEAPIToken=([^=\s]{1,200})=")
_TICKET_USER = re.compile(rb"PVEAuthCookie=PVE(?:%3A|:)([^:;\s]{1,200}?)(?:%3A|:)")

# How long a clone's answer is kept for a client that left and may come back, and how many of them.
KEEP_SECONDS = 60.0
KEEP_COUNT = 1000
# The first and the longest delay before a locked source is tried again.
FIRST_RETRY = 0.25
LONGEST_RETRY = 2.0
# The shortest delay between two polls of a task whose process can't be watched.
SHORTEST_POLL = 0.03
HISTORY = 50


def locked_refusals(kind: str, source: str, newid: str) -> re.Pattern[str]:
    """The texts of a refused POST that say "locked, and nothing was created" (pve-container, qemu-server)."""
    texts = [rf"cfs-lock 'firewall-vm-{re.escape(newid)}' error: got lock request timeout"]
    if kind == "lxc":
        texts.append(r"CT is locked \([^()]*\)")
        texts.append(rf"can't lock file '/run/lock/lxc/pve-config-{re.escape(source)}\.lock' - got timeout")
    else:
        texts.append(r"VM is locked \([^()]*\)")
    return re.compile("|".join(texts))


def contention_statuses(kind: str, source: str, newid: str) -> re.Pattern[str]:
    """The exit statuses of a task that failed from contention and has removed what it made."""
    texts = [
        r"clone failed: can't lock file '/var/lock/pve-manager/pve-storage-[^']*' - got timeout",
        r"clone failed: cfs-lock '[^']*' error: got lock request timeout",
        rf"clone failed: can't add VM {re.escape(newid)} to pool '[^']*': "
        r"cfs-lock 'file-user_cfg' error: got lock request timeout",
    ]
    if kind == "qemu":
        texts.append(rf"can't lock file '/var/lock/qemu-server/lock-{re.escape(source)}\.conf' - got timeout")
    return re.compile("|".join(texts))


def error_texts(answer: Answer) -> set[str]:
    """What PVE says of an error: the reason phrase, and the body's `message` without its line end."""
    message = answer.json_field("message")
    return {answer.response.reason, message.removesuffix("\n") if isinstance(message, str) else ""}


def upid_of(answer: Answer) -> str | None:
    """The UPID of an accepted clone, if the answer has one that can be polled and logged."""
    data = answer.json_field("data")
    if 200 <= answer.response.status < 300 and isinstance(data, str) and _UPID.fullmatch(data):
        return data
    return None


class LocalProcess:
    """A task's worker process on this host, whose end can be waited for. To be closed after use.

    PVE calls a task running exactly while /proc/PID exists with the start time that its UPID names.
    """

    def __init__(self, pid: int, start_time: str) -> None:
        """Raises OSError if that very process isn't there, or can't be seen."""
        self._pid = pid
        self._start_time = start_time
        self._pidfd = os.pidfd_open(pid)
        if not self._exists():
            self.close()
            raise ProcessLookupError
        self._poll = select.poll()
        self._poll.register(self._pidfd, select.POLLIN)

    @classmethod
    def find(cls, upid: str) -> LocalProcess | None:
        """The process that a UPID names, if it runs on this host."""
        match = _UPID_PROCESS.match(upid)
        if not match or not 0 < int(match[1], 16) < 1 << 31:
            return None
        try:
            return cls(int(match[1], 16), str(int(match[2], 16)))
        except OSError:
            return None

    def _exists(self) -> bool:
        try:
            with open(f"/proc/{self._pid}/stat", "rb") as file:
                # The command's name, in parentheses, may hold anything: field 3 follows the last one.
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return False
        return len(fields) > 19 and fields[19] == self._start_time.encode()

    def wait(self, seconds: float) -> bool:
        """Wait for its end, at most that long; True when it has ended. A zombie has not."""
        deadline = time.monotonic() + seconds
        if not self._poll.poll(min(seconds, LONGEST_POLL) * 1000):
            return False
        pause = 0.001
        while self._exists():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.064)
        return True

    def close(self) -> None:
        """Give its descriptor back."""
        os.close(self._pidfd)


class CloneCall(NamedTuple):
    """What the log and the locks need to know of a clone request, as PVE reads it."""

    kind: str
    node: str
    source: str
    newid: str
    user: str

    def __str__(self) -> str:
        return f"node={field_text(self.node)} vmid={field_text(self.source)}"


def user_of(fields: Fields) -> str:
    """Who a request says it is: the name of its API token, or its ticket's user; never a secret."""
    credentials = b" ".join(fields.values.get(b"authorization", []) + fields.values.get(b"cookie", []))
    match = _TOKEN_NAME.search(credentials) or _TICKET_USER.search(credentials)
    return printable(urllib.parse.unquote_to_bytes(match[1])) if match else ""


def clone_call(request: Request, qemu: bool) -> CloneCall | None:
    """What a clone request asks for, as far as its head tells; None for any other request. It fails closed: what PVE
    will refuse for its node or VMID counts too."""
    if request.method != b"POST":
        return None
    parts = request.path_parts()
    if len(parts) != 7 or parts[:3] != [b"api2", b"json", b"nodes"] or parts[6] != b"clone":
        return None
    kind = parts[4].decode("latin-1")
    if (kind != "lxc" and not (qemu and kind == "qemu")) or not parts[5].isdigit():
        return None
    return CloneCall(kind, parts[3].decode("latin-1"), parts[5].decode(), "", user_of(request.fields))


def newid_of(request: Request, body: bytes) -> str:
    """The `newid` parameter, from a JSON or form-encoded body or the query, or "" if there is none."""
    value: object = None
    with contextlib.suppress(ValueError, RecursionError):
        if body.lstrip()[:1] == b"{":
            content = json.loads(body)
            value = content.get("newid") if isinstance(content, dict) else None
    if value is None:
        query = request.target.partition(b"?")[2]
        with contextlib.suppress(ValueError):
            form = urllib.parse.parse_qs(b"&".join([body, query]), max_num_fields=1000)
            value = form.get(b"newid", [b""])[0].decode("latin-1")
    text = str(value)
    return text if re.fullmatch("[0-9]{1,20}", text) else ""


class Stage(enum.Enum):
    """Where a job is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"
    ENDED = "ended"
    DROPPED = "dropped"


class CloneJob:
    """One clone and its life. Everything from `stage` on is guarded by the queue's lock and changed in CloneQueue alone.

        WAITING -> RUNNING -> ENDED           its turn, its task's end (or PVE's refusal, or an error)
                   RUNNING -> PARKED          PVE says locked: nothing was created
                              PARKED -> RUNNING
        WAITING, PARKED -> DROPPED            its client has left when its turn comes, or when its place is wanted

    Its client is there (`client`) or has left (None); an equal request takes a left job over. Its `answer` can come
    before its end: the 504 of a task that outlives -task-timeout, or PVE's own with -answer started. Once it is
    `delivered` the job is nobody's any more.
    """

    def __init__(self, call: CloneCall, request: bytes, poll_fields: bytes, key: bytes, client: Client) -> None:
        """`request` is what PVE gets, `poll_fields` the fields of a poll, `key` the same for equal requests."""
        self.call = call
        self.request = request
        self.poll_fields = poll_fields
        self.key = key
        self.stage = Stage.WAITING
        self.client: Client | None = client
        self.answer: Answer | None = None
        self.delivered = False
        self.queued_at = time.monotonic()
        self.first_started_at: float | None = None
        self.started_at = 0.0
        self.ended_at = 0.0
        self.outcome = ""
        self.tries = 0
        self.accepted: Answer | None = None  # PVE's answer with the UPID of the task that runs now
        self.failed: Answer | None = None  # PVE's answer to a try whose task failed from contention
        self.give_up_at: float | None = None  # -lock-timeout after PVE first said locked
        self.retry_delay = FIRST_RETRY
        self.next_try = 0.0

    def facts(self) -> dict[str, Any]:
        """What the status page shows. The lock is held."""
        now = self.ended_at or time.monotonic()
        started = self.first_started_at or now
        return {
            **self.call._asdict(),
            "vmid": self.call.source,
            "stage": self.stage.value,
            "outcome": self.outcome,
            "tries": self.tries,
            "client": "present" if self.client else "answered" if self.delivered else "left",
            "waited_seconds": round(started - self.queued_at, 3),
            "clone_seconds": round(now - started, 3),
        }


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _shutting_down() -> Refusal:
    return Refusal(503, "the clone queue is shutting down; the clone was not started", retry_after=5)


class Locked(NamedTuple):
    """A try that failed since somebody else holds a lock: PVE's answer to it, and PVE's text."""

    answer: Answer
    text: str


class Ended(NamedTuple):
    """How a try ended: the answer for its client, and the outcome for the record."""

    answer: Answer
    outcome: str


class CloneQueue:
    """Clones in the order of their arrival, one at a time.

    `_lock` guards all below it, and every job's life; `_changed` shares it and is notified when a clone ends. It is
    held while a client is asked whether it is there (which reads nothing and never waits), never while PVE is asked.
    `incoming` carries new jobs to the worker, which never puts into it.
    """

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self._settings = settings
        self._backend = backend
        self.incoming: queue.Queue[CloneJob] = queue.Queue(maxsize=settings.queue_size)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: dict[CloneJob, None] = {}  # WAITING and PARKED, in order of arrival
        self._running: CloneJob | None = None
        self._parked: dict[str, deque[CloneJob]] = {}  # a line for each locked source, its head to be tried next
        self._new_is_next = False  # the last try was one of a parked job
        self._by_key: dict[bytes, list[CloneJob]] = {}  # what could be taken over, oldest first
        self._kept: dict[CloneJob, None] = {}  # ended and not delivered, oldest first
        self._history: deque[CloneJob] = deque(maxlen=HISTORY)  # what has ended, the newest last
        self._draining = False
        self.totals = dict.fromkeys(("completed", "failed", "rejected", "abandoned", "lock_retries"), 0)
        self.ended = 0  # jobs whose times are in the two sums
        self.wait_seconds = 0.0
        self.clone_seconds = 0.0

    # What handlers call

    def check_room(self, call: CloneCall) -> None:
        """Raise Refusal if a new clone would find the queue full or closing, before PVE is asked and its body is read.
        Where any client has left, it might be the one that comes back: then `admit` decides."""
        with self._lock:
            if not any(not self._present(job) for jobs in self._by_key.values() for job in jobs):
                self._make_room(call)

    def admit(self, job: CloneJob) -> CloneJob:
        """Queue the job, or let its client take over an equal one whose client has left; the one that is to be waited
        for. Raises Refusal if the queue is full or closing."""
        with self._lock:
            twin = self._abandoned_twin(job.key)
            if twin:
                twin.client = job.client
                if twin.answer and twin.client:
                    twin.client.event.set()
                log.info("CLONE RESUMED: %s (%s)", twin.call, twin.stage.value)
                return twin
            self._make_room(job.call)
            # Logged under the lock, so that it can't come behind CLONE START.
            log.info("CLONE QUEUED: %s newid=%s waiting=%d", job.call, job.call.newid or "-", len(self._waiting))
            self._waiting[job] = None
            self._by_key.setdefault(job.key, []).append(job)
            # There is room: what waits in `incoming` is part of `_waiting`.
            self.incoming.put_nowait(job)
            return job

    def collect(self, job: CloneJob, client: Client) -> Answer | None:
        """The job's answer, which from now on is delivered; None if the client has left, or lost the job."""
        with self._lock:
            if job.client is not client or not self._present(job):
                return None
            assert job.answer
            job.delivered = True
            self._forget(job)
            return job.answer

    def leave(self, job: CloneJob, client: Client) -> None:
        """The client is about to close. To be called before its descriptor is closed."""
        with self._lock:
            if job.client is client:
                self._mark_left(job)

    # The parts of the above; the lock is held

    def _make_room(self, call: CloneCall) -> None:
        """See to it that one more job can wait, if need be in the place of the oldest whose client has left."""
        if self._draining:
            raise _shutting_down()
        if len(self._waiting) < self._settings.queue_size:
            return
        left = next((job for job in self._waiting if not self._present(job)), None)
        if not left:
            self.totals["rejected"] += 1
            log.warning("CLONE REJECTED: queue full: %s waiting=%d", call, len(self._waiting))
            raise Refusal(503, f"the clone queue is full: {len(self._waiting)} clones are waiting", retry_after=10)
        self._withdraw(left, Stage.DROPPED, "abandoned")

    def _present(self, job: CloneJob) -> bool:
        if job.client and job.client.gone():
            self._mark_left(job)
        return job.client is not None

    def _mark_left(self, job: CloneJob) -> None:
        if job.client:
            job.client.event.set()
        job.client = None
        if not job.delivered:
            log.warning("CLONE ABANDONED: the client left: %s (%s)", job.call, job.stage.value)

    def _abandoned_twin(self, key: bytes) -> CloneJob | None:
        """The oldest job of an equal request whose client has left."""
        return next((job for job in self._by_key.get(key, ()) if not self._present(job)), None)

    def _withdraw(self, job: CloneJob, stage: Stage, outcome: str) -> None:
        """Take a waiting job out wherever it waits; PVE never hears of it (again)."""
        self._end(job, stage, outcome)
        with self.incoming.mutex, contextlib.suppress(ValueError):  # not there: with the worker, or parked
            self.incoming.queue.remove(job)
        line = self._parked.get(job.call.source)
        if line and job in line:
            line.remove(job)
            if not line:
                del self._parked[job.call.source]
        self._forget(job)

    def _end(self, job: CloneJob, stage: Stage, outcome: str) -> None:
        job.stage = stage
        job.outcome = outcome
        job.ended_at = time.monotonic()
        job.request = job.poll_fields = b""
        self._waiting.pop(job, None)
        self._kept[job] = None
        self.totals[outcome] += 1
        started = job.first_started_at or job.ended_at
        self.ended += 1
        self.wait_seconds += started - job.queued_at
        self.clone_seconds += job.ended_at - started
        self._history.append(job)

    def _forget(self, job: CloneJob) -> None:
        """From now on nobody can take it over."""
        self._kept.pop(job, None)
        twins = self._by_key.get(job.key)
        if twins and job in twins:
            twins.remove(job)
            if not twins:
                del self._by_key[job.key]

    def _give(self, job: CloneJob, answer: Answer) -> None:
        if not job.delivered:
            job.answer = answer
            if job.client:
                job.client.event.set()

    # The worker

    def run(self) -> NoReturn:
        """The worker's life: one job after the other, whatever happens to one of them."""
        while True:
            job = self._next()
            if not self._claim(job):
                continue
            try:
                result = self._try(job)
            except Exception:
                log.exception("CLONE ERROR: %s: unexpected failure", job.call)
                refusal = Refusal(500, "unexpected failure in the clone queue; the outcome of the clone is unknown")
                result = Ended(error_answer(refusal), "failed")
            if isinstance(result, Locked):
                self._park_or_end(job, result)
            else:
                self._finish(job, result)

    def _next(self) -> CloneJob:
        """The job whose turn it is: a parked one that is due, then a new one of a source without a line, and so on: PVE
        may take 10 s to say locked, and neither kind shall keep the other waiting."""
        while True:
            with self._lock:
                line = min(self._parked.values(), key=lambda line: line[0].next_try, default=None)
                wait = line[0].next_try - time.monotonic() if line else None
                if line and wait is not None and wait <= 0 and not (self._new_is_next and not self.incoming.empty()):
                    self._new_is_next = True
                    job = line.popleft()
                    if not line:
                        del self._parked[job.call.source]
                    return job
            try:
                job = self.incoming.get(timeout=max(0.0, wait) if wait is not None else None)
            except queue.Empty:
                continue
            with self._lock:
                line = self._parked.get(job.call.source)
                if line is None:
                    self._new_is_next = False
                    return job
                if job.stage is Stage.WAITING:
                    line.append(job)

    def _claim(self, job: CloneJob) -> bool:
        """Start the job, unless it was dropped or its client has left: decided in one step."""
        with self._lock:
            if job.stage not in (Stage.WAITING, Stage.PARKED):
                return False
            if not self._present(job):
                self._withdraw(job, Stage.DROPPED, "abandoned")
                return False
            job.stage = Stage.RUNNING
            job.tries += 1
            job.accepted = None
            job.started_at = time.monotonic()
            job.first_started_at = job.first_started_at or job.started_at
            del self._waiting[job]
            self._running = job
        waited = job.started_at - job.queued_at
        log.info("CLONE START: %s waited=%.1fs%s", job.call, waited, f" try={job.tries}" if job.tries > 1 else "")
        return True

    def _finish(self, job: CloneJob, result: Ended) -> None:
        with self._lock:
            self._give(job, result.answer)
            self._running = None
            self._end(job, Stage.ENDED, result.outcome)
            if job.delivered:
                self._forget(job)
            self._changed.notify_all()

    def _park_or_end(self, job: CloneJob, locked: Locked) -> None:
        """Let the job wait for a lock that somebody else holds, for -lock-timeout and one more try in all."""
        now = time.monotonic()
        with self._lock:
            first = job.give_up_at is None
            over = job.give_up_at = now + self._settings.lock_timeout if job.give_up_at is None else job.give_up_at
            park = now < over and not self._draining
            if park:
                self.totals["lock_retries"] += 1
                job.next_try = min(now + job.retry_delay * random.uniform(0.8, 1.2), over)
                job.retry_delay = min(LONGEST_RETRY, 1.5 * job.retry_delay)
                job.stage = Stage.PARKED
                self._waiting[job] = None
                self._parked.setdefault(job.call.source, deque()).appendleft(job)
                self._running = None
                self._changed.notify_all()
        if park and first:
            log.warning("CLONE LOCKED: %s: %s", job.call, printable(locked.text))
        elif not park and now < over:  # draining
            self._finish(job, Ended(job.failed or error_answer(_shutting_down()), "failed"))
        elif not park:
            log.warning("CLONE FAILED: %s status=%s: still locked", job.call, locked.answer.response)
            self._finish(job, Ended(locked.answer, "failed"))

    def _try(self, job: CloneJob) -> Ended | Locked:
        """Post the clone to PVE and see it through."""
        call = job.call
        try:
            answer = self._backend.post(job.request)
        except BackendError as error:
            unknown = not isinstance(error, Unreachable)
            reason = error.reason + ("; the outcome of the clone is unknown: see PVE's task list" if unknown else "")
            log.warning("CLONE ERROR: %s: %s", call, reason)
            return Ended(error_answer(Refusal(error.status, reason)), "failed")
        upid = upid_of(answer)
        if upid is None:
            return self._refused(job, answer)
        log.info("CLONE TASK: %s upid=%s", call, upid)
        with self._lock:
            job.accepted = answer
            if self._settings.answer == "started":
                self._give(job, answer)
        exit_status = self._wait_for_task(job, upid)
        elapsed = time.monotonic() - job.started_at
        if exit_status is None:
            log.warning("CLONE ERROR: %s upid=%s: no longer waited for (elapsed: %.1fs)", call, upid, elapsed)
            return Ended(job.answer or answer, "failed")
        if exit_status == "OK" or exit_status.startswith("WARNINGS: "):
            log.info("CLONE COMPLETE: %s upid=%s (elapsed: %.1fs)", call, upid, elapsed)
            return Ended(answer, "completed")
        log.warning(
            "TASK FINISHED: status=stopped exitstatus=%s %s upid=%s (elapsed: %.1fs)",
            printable(exit_status), call, upid, elapsed,
        )  # fmt: skip
        contention = contention_statuses(call.kind, call.source, call.newid).fullmatch(exit_status)
        with self._lock:
            if contention and self._settings.lock_timeout and not job.answer:
                job.failed = job.failed or answer
                return Locked(answer, exit_status)
        return Ended(answer, "failed")

    def _refused(self, job: CloneJob, answer: Answer) -> Ended | Locked:
        """What follows from an answer without a UPID."""
        call = job.call
        response = answer.response
        texts = error_texts(answer)
        if response.status == 500 and self._settings.lock_timeout:
            pattern = locked_refusals(call.kind, call.source, call.newid)
            for text in texts:
                if pattern.fullmatch(text):
                    return Locked(answer, text)
        if job.failed and any("already exists" in text for text in texts):
            log.warning("CLONE ERROR: %s newid=%s: PVE's clean-up after the failed try left it behind", call, call.newid)
            return Ended(job.failed, "failed")
        if response.status < 300:
            log.warning("CLONE ERROR: %s: PVE's answer holds no UPID that can be polled: %s", call, response)
        else:
            log.warning("CLONE FAILED: %s status=%s", call, response)
        return Ended(answer, "failed")

    # Waiting for a task

    def _wait_for_task(self, job: CloneJob, upid: str) -> str | None:
        """The task's exit status; None if nobody can tell any more whether it runs."""
        process = LocalProcess.find(upid)
        with contextlib.closing(process) if process else contextlib.nullcontext():
            return self._poll_until_stopped(job, upid, process)

    def _poll_until_stopped(self, job: CloneJob, upid: str, process: LocalProcess | None) -> str | None:
        settings = self._settings
        begin = polls_since = last_success = time.monotonic()
        deadline = begin + settings.task_timeout
        next_line = begin
        ended = False
        while True:
            now = time.monotonic()
            pause = self._pause(now - polls_since, process is not None and not ended)
            if now < deadline:
                pause = min(pause, deadline - now)
            if process and not ended:
                ended = process.wait(pause)
                polls_since = time.monotonic()
            else:
                time.sleep(pause)
            now = time.monotonic()
            # Before the deadline a silent backend must not hold up the client's 504 for long.
            seconds = max(1.0, deadline - now) if now < deadline else settings.request_timeout
            try:
                exit_status = self._poll(job, upid, min(seconds, settings.request_timeout))
                if exit_status is not None:
                    return exit_status
                level, line = logging.INFO, "TASK POLLING: status=running"
                last_success = time.monotonic()
            except BackendError as error:
                level, line = logging.WARNING, f"TASK POLL ERROR: {job.call}: {error.reason}"
            now = time.monotonic()
            if now >= next_line:
                log.log(level, line)
                next_line = now + settings.poll_delay
            if now >= deadline:
                self._time_out(job, upid)
                if ended or (process is None and now - last_success >= settings.task_timeout):
                    return None

    def _pause(self, elapsed: float, watched: bool) -> float:
        """Seconds until the next poll. Watched: the process's end wakes the sleep. Otherwise a tenth of the time so
        far, which keeps both the lag and the number of polls small."""
        longest = max(self._settings.poll_delay, 0.01)
        return longest if watched else min(longest, max(SHORTEST_POLL, elapsed / 10))

    def _poll(self, job: CloneJob, upid: str, seconds: float) -> str | None:
        """Ask PVE for the task's exit status; None while it runs. Raises BackendError if PVE doesn't say."""
        match = _UPID_NODE.match(upid)
        node = urllib.parse.quote(match[1] if match else job.call.node.encode("latin-1"), safe="")
        target = f"/api2/json/nodes/{node}/tasks/{urllib.parse.quote(upid, safe='')}/status"
        answer = self._backend.get(target, job.poll_fields, seconds)
        data = answer.json_field("data")
        if answer.response.status != 200 or not isinstance(data, dict):
            raise BackendError(502, str(answer.response))
        exit_status = data.get("exitstatus", "")
        if data.get("status") == "stopped" and isinstance(exit_status, str):
            return exit_status
        if data.get("status") != "running":
            raise BackendError(502, "the task's status is neither running nor stopped")
        return None

    def _time_out(self, job: CloneJob, upid: str) -> None:
        """Tell the client, once, that its task is taking too long. The queue is held by the task all the same."""
        with self._lock:
            if job.answer:
                return
            reason = f"the clone task did not end within {self._settings.task_timeout:g} s: {upid}"
            self._give(job, error_answer(Refusal(504, reason, data=upid)))
        log.warning("CLONE TIMEOUT: %s upid=%s (elapsed: %.1fs)", job.call, upid, time.monotonic() - job.started_at)

    # Operation and shutdown

    def snapshot(self) -> dict[str, Any]:
        """What runs, what waits, what has ended lately, totals and medians: as it goes into /status.json."""
        with self._lock:
            history = [job.facts() for job in self._history]
            ran = [job["clone_seconds"] for job in history if job["outcome"] == "completed"]
            waited = [job["waited_seconds"] for job in history if job["outcome"] == "completed"]
            return {
                "running": self._running.facts() if self._running else None,
                "waiting": [job.facts() for job in self._waiting],
                "history": history,
                "totals": dict(self.totals),
                "wait_seconds": {"sum": self.wait_seconds, "median": _median(waited)},
                "clone_seconds": {"sum": self.clone_seconds, "median": _median(ran)},
                "ended": self.ended,
            }

    def look_around(self) -> None:
        """Notice the clients that have left, and forget the answers that nobody has come back for. To be called twice
        a second: one thread that looks after all costs less than a hundred that each look after one."""
        oldest = time.monotonic() - KEEP_SECONDS
        with self._lock:
            for jobs in self._by_key.values():
                for job in jobs:
                    self._present(job)
            for job in list(self._kept):
                if job.ended_at > oldest and len(self._kept) <= KEEP_COUNT:
                    break
                self._forget(job)

    def drain(self) -> None:
        """Start no more clones: those that wait are answered with 503, or with the answer to their failed task."""
        with self._lock:
            self._draining = True
            for job in list(self._waiting):
                outcome = "failed" if job.failed else "rejected"
                if self._present(job):
                    self._give(job, job.failed or error_answer(_shutting_down()))
                    log.warning("CLONE REJECTED: shutting down: %s", job.call)
                else:
                    outcome = "abandoned"
                self._withdraw(job, Stage.ENDED, outcome)

    def wait_until_idle(self, deadline: float) -> bool:
        """Wait until no clone runs; False if one still does at the deadline."""
        with self._lock:
            return self._changed.wait_for(lambda: self._running is None, max(0.0, deadline - time.monotonic()))

    def answer_running(self) -> None:
        """Give the running clone's client what is known: PVE goes on with the clone, this program doesn't."""
        reason = "the proxy is shutting down before PVE answered; the outcome of the clone is unknown: see its task list"
        with self._lock:
            job = self._running
            if job and not job.answer:
                self._give(job, job.accepted or error_answer(Refusal(504, reason)))


# Handler: one thread for each connection; reads requests, decides what they are, answers them.

HEAD_SECONDS = 30.0  # for a request's head, from its first byte; and for the first byte of a connection
CROWDED_HEAD_SECONDS = 2.0  # the same for a connection that will only hear that there are too many
IDLE_SECONDS = 180.0  # between two requests; Caddy keeps its idle connections for 120 s
HANDSHAKE_SECONDS = 10.0
LINGER_SECONDS = 5.0  # how long an answered client may go on sending before its connection is closed
HALF_CLOSED_SECONDS = 300.0  # silence after which a tunnel that is closed on one side is given up
MAX_CLONE_BODY = 512 * 1024  # PVE's own limit
TUNNEL_BUFFER = 64 * 1024

_CLONE_DROP = REQUEST_DROP | {b"content-length"}


def keep_tcp_alive(sock: socket.socket) -> None:
    """Let the kernel find out within two minutes that the peer's host has vanished."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


def plain_address(text: str) -> str | None:
    """A single IP address in its usual form, an IPv4 address out of its IPv6 mapping; None for anything else."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        # A zone (RFC 4007 11) means nothing elsewhere and may hold anything.
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address)))
    return str(address)


class _Flow:
    """One direction of a tunnel. At most one buffer is held: a slow sink stops the reading."""

    def __init__(self, source: socket.socket, sink: socket.socket, first_bytes: bytearray) -> None:
        self.source = source
        self.sink = sink
        self.buffer = first_bytes
        self.source_ended = False
        self.sink_ended = False

    def wants_to_read(self) -> bool:
        """Whether there is room for what the source sends."""
        return not self.source_ended and len(self.buffer) < TUNNEL_BUFFER

    def move(self) -> None:
        """Read once and write once, as far as that goes without waiting. Raises OSError when the tunnel broke."""
        if self.wants_to_read():
            with contextlib.suppress(*_WOULD_BLOCK):
                data = self.source.recv(TUNNEL_BUFFER)
                self.buffer += data
                self.source_ended = not data
        if self.buffer:
            with contextlib.suppress(*_WOULD_BLOCK):
                del self.buffer[: self.sink.send(self.buffer)]
        if self.source_ended and not self.buffer and not self.sink_ended:
            self.sink_ended = True
            # Not SSLSocket.shutdown(), which would end decryption for the other direction too.
            socket.socket.shutdown(self.sink, socket.SHUT_WR)


def run_tunnel(client: MessageReader, backend: MessageReader) -> None:
    """Relay the bytes of an upgraded connection, both ways, until both sides have ended or one broke. No idle limit.
    Bytes behind either head are still in the readers' buffers."""
    up = _Flow(client.sock, backend.sock, client.buffer)
    down = _Flow(backend.sock, client.sock, backend.buffer)
    with contextlib.suppress(OSError):
        while not (up.sink_ended and down.sink_ended):
            up.move()
            down.move()
            if not _wait_for_flow(up, down):
                return


def _wait_for_flow(up: _Flow, down: _Flow) -> bool:
    """Wait until something can move; False when the tunnel is over."""
    poll = select.poll()
    for flow, opposite in ((up, down), (down, up)):
        events = select.POLLIN if flow.wants_to_read() else 0
        events |= select.POLLOUT if opposite.buffer else 0
        poll.register(flow.source, events)
        if flow.wants_to_read() and isinstance(flow.source, ssl.SSLSocket) and flow.source.pending():
            return True
    half_closed = up.source_ended or down.source_ended
    ready = dict(poll.poll(HALF_CLOSED_SECONDS * 1000 if half_closed else None))
    for flow in (up, down):
        events = ready.get(flow.source.fileno(), 0)
        if events & (select.POLLHUP | select.POLLERR) and not flow.wants_to_read():
            if events & select.POLLERR or not flow.buffer:
                return False
            poll.unregister(flow.source)  # it has closed, but what it said before has yet to be sent
            return bool(poll.poll(HALF_CLOSED_SECONDS * 1000))
    return bool(ready)


class ConnectionHandler(http.server.BaseHTTPRequestHandler):
    """The server's side of a client connection: strict reading, deadlines, errors. A subclass answers requests."""

    server: ConnectionServer

    def setup(self) -> None:
        """Join the server's handlers. What can fail comes later, in `handle`."""
        self.sock: socket.socket = self.request
        self.silence = self.server.silence
        self.deadline = within(self.silence)
        self.responding = False
        self.unread = False
        self.answered = False
        self.sent = 0
        self.thread_id = threading.get_native_id()
        self.crowded = not self.server.register(self)

    def handle(self) -> None:
        """The connection's life."""
        try:
            self.peer = plain_address(str(self.client_address[0])) or "0.0.0.0"
            self.peer_is_local = ipaddress.ip_address(self.peer).is_loopback
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_tcp_alive(self.sock)
            if self.server.tls:
                self._start_tls(self.server.tls)
            self.sock.setblocking(False)
            self.reader = MessageReader(self.sock)
            self.client_watch = Watch(self.sock.fileno(), GONE_EVENTS, Client(self.sock.fileno()).check)
            self.close_connection = False
            while not self.close_connection:
                self.handle_one_request()
        except OSError as error:
            log.debug("a connection ended: %s", error)

    def _start_tls(self, context: ssl.SSLContext) -> None:
        self.sock.settimeout(HANDSHAKE_SECONDS)
        # At once in place of the plain socket, which it takes the descriptor from: else `wake` could not reach it.
        tls = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        self.sock = tls
        tls.do_handshake()

    def finish(self) -> None:
        """Close the connection; from here on nobody else may touch its descriptor."""
        self.server.unregister(self)
        if not self.responding:  # a goodbye would make an answer that was cut off look complete
            close_notify(self.sock)
        self.sock.close()

    def has_input(self) -> bool:
        """Whether a request may have arrived. Asked by another thread, which holds the server's lock."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(self.reader.buffer) or bool(poll.poll(0))

    def wake(self) -> None:
        """End the connection from another thread, which holds the server's lock."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def handle_one_request(self) -> None:
        """Read a request and answer it. The one place where failures become answers."""
        self.close_connection = True
        try:
            request = self.read_request()
            if request is None:
                return
            self.answer(request)
            self.answered = True
            if self.unread:
                self.linger()
            elif not self.close_connection:
                self.close_connection = not self.server.enter_idle(self)
        except Refusal as refusal:
            self.refuse(refusal)
        except Stalled:
            self.refuse(Refusal(408, f"the request did not arrive within {self.silence:g} s of silence"))
        except (Disconnected, ClientGone):
            self.close_connection = True
        except Exception:
            log.exception("unexpected failure in a request of %s", self.peer)
            self.refuse(Refusal(500, "unexpected failure in the proxy"))

    def read_request(self) -> Request | None:
        """The next request, its body not read yet; None if there is none."""
        reader = self.reader
        seconds = CROWDED_HEAD_SECONDS if self.crowded else HEAD_SECONDS
        idle_until = time.monotonic() + (IDLE_SECONDS if self.answered else seconds)
        try:
            while len(reader.buffer) < 3:
                reader.wait(idle_until)
                reader.fill_now()
        except (Stalled, Disconnected):
            return None
        # RFC 9112 2.2: old clients send an empty line behind a body.
        if reader.buffer.startswith(b"\r\n"):
            del reader.buffer[:2]
        try:
            head = reader.head(time.monotonic() + seconds)
        except Stalled:
            raise Refusal(408, f"the request's head was not complete within {seconds:g} s") from None
        if not self.server.leave_idle(self):
            return None
        if self.crowded:
            raise Refusal(503, "too many connections", retry_after=5)
        request = parse_request(head)
        self.close_connection = not request.keep_alive
        return request

    def answer(self, request: Request) -> None:
        """Answer one request. A subclass does it."""
        raise NotImplementedError

    def respond(self, request: Request | None, response: Response, first: bytes, pieces: Iterable[Bytes] = ()) -> None:
        """Send an answer, framed for this client. What is there of its body, `first`, goes out with the head."""
        head = response.relayed_head
        until_close = False
        if response.length == CHUNKED and request and request.http11:
            head += b"Transfer-Encoding: chunked\r\n"
            pieces = chunked(itertools.chain((first,), pieces))
            first = b""
        elif response.length < 0:
            self.close_connection = until_close = True
            self._close_by_reset(True)
        if self.server.draining:
            self.close_connection = True
        if self.close_connection:
            head += b"Connection: close\r\n"
        elif request and not request.http11:
            head += b"Connection: keep-alive\r\n"
        data = b"%b\r\n%b" % (head, first)
        self.responding = True
        send_all(self.sock, data, self.deadline)
        self.sent = len(data)
        for piece in pieces:
            send_all(self.sock, piece, self.deadline)
            self.sent += len(piece)
        self.responding = False
        if until_close:
            self._close_by_reset(False)

    def _close_by_reset(self, on: bool) -> None:
        """An answer that ends with the connection must not look whole when it is cut off, even by the end of the
        process."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error and close; if an answer has begun already, cut it off."""
        self.close_connection = True
        if self.responding:
            return
        with contextlib.suppress(Disconnected, Stalled):
            self.respond(None, *error_answer(refusal))
            self.linger()

    def linger(self) -> None:
        """Let a client that is still sending read its answer: closing at once would destroy it by a RST (RFC 9112
        9.6). What arrives is dropped, undecrypted."""
        self.close_connection = True
        deadline = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):
            close_notify(self.sock)
            socket.socket.shutdown(self.sock, socket.SHUT_WR)
            poll = select.poll()
            poll.register(self.sock, select.POLLIN)
            while (seconds := deadline - time.monotonic()) > 0 and poll.poll(seconds * 1000):
                if not socket.socket.recv(self.sock, PIECE_SIZE):
                    return


class ProxyHandler(ConnectionHandler):
    """Relays requests, queues clones, and turns WebSockets into tunnels.

    To the backend go method, target, field lines and body as they came, but
    - hop-by-hop fields and those that Connection names are removed (RFC 9110 7.6.1), and so is Expect, which is answered
      here since PVE never does (RFC 9110 10.1.1);
    - the body is framed anew: by its Content-Length, chunked, or not at all where there is none;
    - X-Forwarded-For is one single address, since PVE can read only that: behind a proxy on this host the last one it
      gave, otherwise the peer's own;
    - an HTTP/1.0 request without Host gets the backend's.
    To the client go status line, field lines and body as they came, without hop-by-hop fields, framed anew. Nothing else
    is added. An answer that the backend cuts short is cut short here too.
    """

    server: ProxyServer

    def answer(self, request: Request) -> None:
        """Decide what the request is."""
        self.forwarded_for = self._forwarded_for(request)
        call = clone_call(request, self.server.settings.qemu)
        if call:
            self.clone(request, call)
        else:
            self.relay(request)

    def _forwarded_for(self, request: Request) -> str:
        values = request.fields.values.get(b"x-forwarded-for")
        if values and self.peer_is_local:
            return plain_address(values[-1].decode("latin-1").rpartition(",")[2].strip(" \t")) or self.peer
        return self.peer

    def _added_fields(self, request: Request) -> bytes:
        """The field lines that the proxy adds for the backend."""
        host = b"" if b"host" in request.fields.values else self.server.backend.host_line
        return b"%bX-Forwarded-For: %b\r\n" % (host, self.forwarded_for.encode())

    # Relaying

    def relay(self, request: Request) -> None:
        """Send the request on and stream the answer back."""
        begin = time.monotonic()
        try:
            connection, response = self._open(request)
        except BackendError:
            self.server.count_backend_error()
            raise
        try:
            if response.status == 101:
                self._tunnel(connection, response)
            else:
                first = connection.reader.take(response.length)
                rest = connection.body(response, len(first)) if len(first) != response.length else ()
                if request.method == b"POST":
                    self._note_failed_login(request, response, first)
                self.respond(request, response, first, rest)
        except BaseException:
            connection.close()
            raise
        self.server.backend.give_back(connection, response)
        self.server.count_relayed(response.status)
        if self.server.settings.verbose:
            path = printable(request.target.partition(b"?")[0])
            log.info("RELAYED: %s %s status=%d bytes=%d time=%.3fs", printable(request.method), path, response.status,
                     self.sent, time.monotonic() - begin)  # fmt: skip

    def _open(self, request: Request) -> tuple[BackendConnection, Response]:
        """Send the request and read the head of its final answer. Only a safe request without a body may go out on a
        kept-alive connection, and a second time if that turns out closed."""
        head = b"%b%b\r\n" % (request.relayed_head, self._added_fields(request))
        backend = self.server.backend
        if request.length == 0 and request.method in SAFE_METHODS and not request.upgrade:
            connection = backend.take()
            if connection:
                try:
                    return connection, self._ask(connection, request, head)
                except StaleConnection:
                    pass
        connection = backend.connect()
        return connection, self._ask(connection, request, head)

    def _ask(self, connection: BackendConnection, request: Request, head: bytes) -> Response:
        on_interim = self._pass_on if request.http11 else _ignore
        try:
            if request.length:
                self._upload(connection, request, head, on_interim)
            else:
                connection.send(head)
            connection.reader.watch(self.client_watch)
            return connection.response(request.method, request.upgrade, on_interim)
        except BaseException:
            connection.close()
            raise

    def _pass_on(self, interim: Response) -> None:
        send_all(self.sock, interim.relayed_head + b"\r\n", self.deadline)

    def _upload(
        self, connection: BackendConnection, request: Request, head: bytes, on_interim: Callable[[Response], None]
    ) -> None:
        """Send head and body, the body as it arrives, until the backend has answered."""
        pieces = self._request_body(request, self.deadline)
        # PVE may misread a body, a chunked one above all, and take the rest for another request.
        connection.reusable = False
        if request.length == CHUNKED:
            pieces = chunked(pieces)
        if self.reader.buffer:
            head += next(pieces)

        answer = connection.reader.buffer
        early = Broken(502, "the backend answered before it had the whole request")

        def look_for_answer() -> None:
            self.client_watch.look()
            try:
                connection.reader.fill_now()
            except Disconnected:
                raise early from None
            while answer.startswith(b"HTTP/1.1 1") and b"\r\n\r\n" in answer:
                if answer.startswith(b"HTTP/1.1 101"):
                    raise early
                on_interim(connection.response_head(request.method))
            if not b"HTTP/1.1 1".startswith(answer[:10]) or len(answer) > MAX_HEAD:
                raise early

        watch = self.client_watch._replace(look=look_for_answer)
        self.reader.watch(Watch(connection.sock.fileno(), select.POLLIN, look_for_answer))
        try:
            connection.send(head, watch)
            for piece in pieces:
                connection.send(piece, watch)
        except Broken:
            # It answered already, or it closed: what it said before can still be read.
            self._leave_body_unread()
        finally:
            self.reader.unwatch()

    def _leave_body_unread(self) -> None:
        self.close_connection = self.unread = True

    def _request_body(self, request: Request, deadline: Deadline) -> Iterator[Bytes]:
        """The body's pieces, asked for first if the client waits to be asked."""
        if request.expects_continue and not self.reader.buffer:
            send_all(self.sock, b"HTTP/1.1 100 Continue\r\n\r\n", self.deadline)
        return self.reader.body(request.length, deadline)

    def _note_failed_login(self, request: Request, response: Response, body: bytes) -> None:
        """Log a failed login, since PVE itself sees only this proxy there. The API says 401; to the web GUI PVE says
        200, and 401 in a small body, which comes with its head."""
        parts = request.path_parts()
        if len(parts) != 4 or parts[0] != b"api2" or parts[2:] != [b"access", b"ticket"]:
            return
        failed = response.status == 401
        if response.status == 200 and parts[1] == b"extjs":
            answer = Answer(response, body)
            failed = answer.json_field("status") == 401 and not answer.json_field("success")
        if failed:
            log.warning("AUTH FAILED: client=%s path=/%s", self.forwarded_for, printable(b"/".join(parts)))

    def _tunnel(self, connection: BackendConnection, response: Response) -> None:
        """Pass on the 101 and every byte after it."""
        self.close_connection = True
        keep_tcp_alive(connection.sock)
        fields = response.fields.end_to_end(HOP_BY_HOP - {b"upgrade"})
        head = b"HTTP/1.1%b\r\n%bConnection: Upgrade\r\n\r\n" % (response.status_line, fields)
        send_all(self.sock, head, self.deadline)
        if self.server.begin_tunnel(self):
            run_tunnel(self.reader, connection.reader)

    # Clones

    def clone(self, request: Request, call: CloneCall) -> None:
        """Queue the clone, wait for its turn and its end, and send PVE's answer."""
        clones = self.server.clones
        if request.length > MAX_CLONE_BODY:
            raise Refusal(413, f"the body of a clone request is larger than {MAX_CLONE_BODY} bytes")
        clones.check_room(call)
        credentials = self._poll_fields(request)
        # Strangers must not fill the queue, nor the memory with a body. PVE takes 3 s to say 401, in this thread's time.
        login = self.server.backend.get("/api2/json/version", credentials, self.silence, self.client_watch)
        if login.response.status == 401:
            if request.length:
                self._leave_body_unread()
            self.respond(request, *login)
            return
        body = self._clone_body(request)
        call = call._replace(newid=newid_of(request, body))
        client = Client(self.sock.fileno())
        job = clones.admit(self._job(request, call, body, credentials, client))
        try:
            client.event.wait()
            answer = clones.collect(job, client)
            if answer is None:
                raise ClientGone
            self.respond(request, *answer)
        finally:
            clones.leave(job, client)

    def _clone_body(self, request: Request) -> bytes:
        """The whole body, which is small and must come within HEAD_SECONDS."""
        if not request.length:
            return b""
        end = time.monotonic() + HEAD_SECONDS
        body = bytearray()
        for piece in self._request_body(request, lambda: min(end, self.deadline())):
            body += piece
            if len(body) > MAX_CLONE_BODY:
                raise Refusal(413, f"the body of a clone request is larger than {MAX_CLONE_BODY} bytes")
        return bytes(body)

    def _poll_fields(self, request: Request) -> bytes:
        """The field lines with which this client's task is polled, and its login checked."""
        credentials = b"".join(line for name, line in request.fields.lines if name in (b"authorization", b"cookie"))
        forwarded_for = b"X-Forwarded-For: %b\r\n" % self.forwarded_for.encode()
        return self.server.backend.host_line + credentials + forwarded_for

    def _job(self, request: Request, call: CloneCall, body: bytes, poll_fields: bytes, client: Client) -> CloneJob:
        fields = request.fields.end_to_end(_CLONE_DROP) + self._added_fields(request)
        data = b"POST %b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b" % (request.target, fields, len(body), body)
        credentials = [request.fields.values.get(name) for name in (b"authorization", b"cookie", b"csrfpreventiontoken")]
        key = hashlib.sha256(repr((request.target, credentials, len(body))).encode())
        key.update(body)
        return CloneJob(call, data, poll_fields, key.digest(), client)


# Server: listening, the number of connections, and the end of them all.

MAX_CONNECTIONS = 512  # tunnels included
SPARE_THREADS = 64  # for telling the clients beyond that there are too many
DRAIN_SECONDS = 30.0
LISTEN_BACKLOG = 1024
BUSY = 250  # relayed requests between two looks, above which the handlers are gathered on one CPU


class ListenError(Exception):
    """An address can't be listened on."""


def listen_on(address: tuple[str, int]) -> socket.socket:
    """A listening socket; without a host on all addresses, IPv4 and IPv6 in one socket. Raises ListenError."""
    host, port = address
    everywhere = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    try:
        found = socket.getaddrinfo(host or everywhere, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, resolved = found[0]
        both = resolved[0] == "::"
        return socket.create_server(resolved, family=family, backlog=LISTEN_BACKLOG, dualstack_ipv6=both)
    except (OSError, ValueError) as error:
        raise ListenError(f"cannot listen on {host}:{port}: {_reason(error)}") from None


def is_local(listener: socket.socket) -> bool:
    """Whether only this host can reach a listening socket."""
    return ipaddress.ip_address(plain_address(listener.getsockname()[0]) or "::").is_loopback


def address_text(listener: socket.socket) -> str:
    """HOST:PORT of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class ConnectionServer(http.server.ThreadingHTTPServer):
    """Gives each connection a thread, at most MAX_CONNECTIONS of them.

    `_lock` guards `_handlers`, `_idle`, `_tunnels` and the counters. `_idle` holds, the oldest first, the handlers whose
    connection has no request in hand: between two requests, or with a head that is not complete. When a connection too
    many arrives, the oldest of them is ended in its favour: slow or silent clients can't keep others out.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        listener: socket.socket,
        handler: type[ConnectionHandler],
        silence: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`silence` is the limit on that of a client in mid-request."""
        super().__init__(listener.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.silence = silence
        self.tls = tls
        self.draining = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._handlers: set[ConnectionHandler] = set()
        self._idle: dict[ConnectionHandler, None] = {}
        self._tunnels: set[ConnectionHandler] = set()
        self._connections = 0  # also those that are not yet, or no longer, in `_handlers`

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept. Without a free descriptor, wait a little: the listening socket stays readable and would spin."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.warning("cannot accept a connection: %s", error.strerror)
                time.sleep(0.1)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Count a connection in, and refuse a thread to what is far beyond the limit."""
        with self._lock:
            self._connections += 1
            return self._connections <= MAX_CONNECTIONS + SPARE_THREADS

    def shutdown_request(self, request: Any) -> None:
        """Count a connection out: it was refused or got no thread, or its handler is done."""
        super().shutdown_request(request)
        with self._lock:
            self._connections -= 1
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What is left over when even a handler's own error handling failed."""
        log.exception("unexpected failure in a connection")

    def register(self, handler: ConnectionHandler) -> bool:
        """Note a new connection's handler; False if it is one too many."""
        with self._lock:
            self._handlers.add(handler)
            if len(self._handlers) > MAX_CONNECTIONS:
                oldest = next(iter(self._idle), None)
                if oldest is None:
                    return False
                self._end_idle(oldest)
            self._idle[handler] = None
            return True

    def unregister(self, handler: ConnectionHandler) -> None:
        """Forget the handler of a connection that is about to be closed."""
        with self._lock:
            self._handlers.discard(handler)
            self._idle.pop(handler, None)
            self._tunnels.discard(handler)

    def _end_idle(self, handler: ConnectionHandler) -> None:
        del self._idle[handler]
        self._handlers.discard(handler)
        handler.wake()

    def enter_idle(self, handler: ConnectionHandler) -> bool:
        """The connection waits for its next request; False if it should rather close."""
        with self._lock:
            if self.draining:
                return False
            self._idle[handler] = None
            return True

    def leave_idle(self, handler: ConnectionHandler) -> bool:
        """A request is complete enough to be answered; False if the connection was ended meanwhile."""
        with self._lock:
            if handler not in self._idle:
                return handler.crowded
            del self._idle[handler]
            return True

    def begin_tunnel(self, handler: ConnectionHandler) -> bool:
        """The connection has become a tunnel; False if it should rather close."""
        with self._lock:
            if self.draining:
                return False
            self._tunnels.add(handler)
            return True

    def drain(self) -> None:
        """From now on connections close behind their answers. Idle ones and tunnels are ended at once; those on which
        a request has arrived, or that are too new to tell, are not."""
        with self._lock:
            self.draining = True
            for handler in list(self._idle):
                if handler.answered and not handler.has_input():
                    self._end_idle(handler)
            for handler in self._tunnels:
                handler.wake()

    def end_silent(self) -> None:
        """End the connections that still have no request in hand."""
        with self._lock:
            for handler in list(self._idle):
                self._end_idle(handler)

    def wait_until_closed(self, deadline: float) -> bool:
        """Wait for all connections to close; False if some are left at the deadline."""
        with self._lock:
            return self._changed.wait_for(lambda: not self._connections, max(0.0, deadline - time.monotonic()))


def _bind(thread_id: int, cpus: set[int]) -> None:
    with contextlib.suppress(OSError, ValueError):  # not permitted, not offered, or taken from this process just now
        os.sched_setaffinity(thread_id, cpus)


class ProxyServer(ConnectionServer):
    """The proxy's listener: what its handlers share. The base's `_lock` guards the counters."""

    def __init__(
        self,
        listener: socket.socket,
        settings: Settings,
        backend: Backend,
        clones: CloneQueue,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(listener, ProxyHandler, settings.request_timeout, tls)
        self.settings = settings
        self.backend = backend
        self.clones = clones
        self._relayed = [0] * 6  # by status class
        self._relayed_before = 0  # their sum when `look_around` last looked
        self._cpus: set[int] | None = None  # where the handlers run while they are gathered
        self._backend_errors = 0

    def register(self, handler: ConnectionHandler) -> bool:
        """Note a new connection's handler; False if it is one too many."""
        admitted = super().register(handler)
        with self._lock:
            if self._cpus:
                _bind(handler.thread_id, self._cpus)
        return admitted

    def look_around(self) -> None:
        """Gather the handlers on one CPU while many requests come in, and forget the heads when none do. To be called
        twice a second, by a thread that the kernel runs where it likes: there they go.

        One thread at a time can run Python, and handing the interpreter's lock to a thread on another CPU takes longer
        than the work itself. With several busy connections, one CPU serves twice as many requests as two.
        """
        with self._lock:
            relayed = sum(self._relayed)
            if relayed == self._relayed_before:
                forget_heads()
            busy = relayed - self._relayed_before > BUSY and len(self._handlers) > 1
            self._relayed_before = relayed
            if busy == bool(self._cpus):
                return
            self._cpus = {ctypes.CDLL(None).sched_getcpu()} if busy else None
            for handler in self._handlers:
                _bind(handler.thread_id, self._cpus or os.sched_getaffinity(0))

    def count_relayed(self, status: int) -> None:
        """A request was relayed to its end."""
        with self._lock:
            self._relayed[min(status // 100, 5)] += 1

    def count_backend_error(self) -> None:
        """The backend gave no answer to a relayed request."""
        with self._lock:
            self._backend_errors += 1

    def counters(self) -> dict[str, Any]:
        """Requests by status class, backend errors, open tunnels and connections."""
        with self._lock:
            relayed = {f"{status_class}xx": self._relayed[status_class] for status_class in range(1, 6)}
            return {
                "relayed": relayed,
                "backend_errors": self._backend_errors,
                "tunnels": len(self._tunnels),
                "connections": len(self._handlers),
            }


# Operation: systemd, and the status listener. They look at the others; nothing depends on them.


class Systemd:
    """Talks to the service manager by its notify socket (sd_notify(3)); does nothing where there is none."""

    def __init__(self, path: str | None) -> None:
        self._path = "\0" + path[1:] if path and path.startswith("@") else path
        self._status = ""

    def send(self, text: str, *descriptors: int) -> None:
        """Send assignments, with descriptors for the store."""
        if not self._path:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.setblocking(False)  # a manager that does not listen must not hold up anything
            notify.connect(self._path)
            socket.send_fds(notify, [text.encode()], list(descriptors))

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows."""
        if text != self._status:
            self._status = text
            self.send(f"STATUS={printable(text)}")  # a client's text must not become another assignment

    def keep(self, listener: socket.socket) -> None:
        """Put the listening socket into the descriptor store, so that it outlives this process at a restart."""
        self.send("FDSTORE=1\nFDNAME=listen", listener.fileno())

    def take_back(self, address: tuple[str, int]) -> socket.socket | None:
        """The listening socket that the store kept (sd_listen_fds(3)), if it is still the one that is wanted."""
        if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
            return None
        listener = socket.socket(fileno=3)
        listener.set_inheritable(False)
        host, port = address
        with contextlib.suppress(OSError):
            wanted = {found[4][:2] for found in socket.getaddrinfo(host or None, port, flags=socket.AI_PASSIVE)}
            if listener.getsockname()[:2] in wanted:
                return listener
        # Removal takes the manager a moment, and until then its copy would keep the port.
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        self.send("FDSTOREREMOVE=1\nFDNAME=listen")
        listener.close()
        return None


def status_line(snapshot: dict[str, Any]) -> str:
    """What the queue does, in one line."""
    totals = snapshot["totals"]
    running = snapshot["running"]
    doing = "idle"
    if running:
        doing = f"cloning {running['node']}/{running['vmid']} for {running['clone_seconds']:.1f}s"
    return f"{doing}, {len(snapshot['waiting'])} waiting; {totals['completed']} done, {totals['failed']} failed"


def health(backend: BackendAddress) -> str:
    """What is wrong, or "" if PVE's port answers. (The worker lives as long as the process: start_vital_thread.)"""
    try:
        socket.create_connection((backend.host, backend.port), HEALTH_SECONDS).close()
    except OSError as error:
        return f"{backend} can't be reached: {_reason(error)}"
    return ""


def metrics(snapshot: dict[str, Any]) -> str:
    """The Prometheus text format of a snapshot."""
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: dict[str, float]) -> None:
        name = f"pve_clone_queue_{name}"
        lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))
        lines.extend(f"{name}{labels} {value!r}" for labels, value in samples.items())

    totals = snapshot["totals"]
    family("queued", "gauge", "Clones that wait.", {"": len(snapshot["waiting"])})
    family("running", "gauge", "Clones that run.", {"": int(snapshot["running"] is not None)})
    outcomes = {f'{{outcome="{name}"}}': totals[name] for name in ("completed", "failed", "rejected", "abandoned")}
    family("clones_total", "counter", "Clones by outcome.", outcomes)
    family("lock_retries_total", "counter", "Tries put off since a lock was held elsewhere.",
           {"": totals["lock_retries"]})  # fmt: skip
    for name, text in (("wait", "Time in the queue."), ("clone", "Time from a clone's start to its end.")):
        samples = {"_sum": snapshot[f"{name}_seconds"]["sum"], "_count": snapshot["ended"]}
        family(f"{name}_seconds", "summary", text, samples)
    relayed = {f'{{status="{name}"}}': count for name, count in snapshot["relayed"].items()}
    family("relayed_requests_total", "counter", "Relayed requests by status class.", relayed)
    family("backend_errors_total", "counter", "Relayed requests that the backend did not answer.",
           {"": snapshot["backend_errors"]})  # fmt: skip
    family("open_tunnels", "gauge", "Open WebSockets.", {"": snapshot["tunnels"]})
    family("connections", "gauge", "Open client connections.", {"": snapshot["connections"]})
    return "\n".join(lines) + "\n"


STATUS_STYLE = """
:root { color-scheme: light dark; --ground: #f6f6f4; --card: #fff; --ink: #1d1f21; --faint: #6b7075; --line: #dfe1e3;
  --wait: #c3c8cd; --completed: #2e9e5b; --failed: #d23f3f; --abandoned: #c98a1b; --running: #2f74d0; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --card: #1e2125; --ink: #e8e9ea; --faint: #9aa1a8;
  --line: #33383d; --wait: #4a5158; --completed: #43b975; --failed: #ee6464; --abandoned: #e0a83c; --running: #5b9bf0; } }
* { box-sizing: border-box }
body { margin: 0; padding: 1.5rem 1rem 3rem; background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif }
main { max-width: 60rem; margin: auto; display: grid; gap: 1rem }
header { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: baseline; justify-content: space-between }
h1 { font-size: 1.2rem; margin: 0 } h2 { font-size: .95rem; margin: 0 0 .6rem } .faint { color: var(--faint) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem }
#tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)) }
#tiles b { display: block; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums }
#running { font-size: 1.1rem; overflow-wrap: anywhere } #running b { color: var(--running) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-top: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums } th { border: 0; font-weight: 500; color: var(--faint) }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--faint); font-size: 11px }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin-top: .6rem; font-size: .85rem }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
.gone { color: var(--failed) }
"""
STATUS_SCRIPT = """
const $ = id => document.getElementById(id), SVG = 'http://www.w3.org/2000/svg';
const seconds = s => s < 60 ? s.toFixed(1) + ' s' : s < 3600 ? Math.floor(s / 60) + ' m ' + Math.floor(s % 60) + ' s'
  : Math.floor(s / 3600) + ' h ' + Math.floor(s % 3600 / 60) + ' m';
const make = (name, text) => { const e = document.createElement(name); e.textContent = text; return e; };
const label = j => j.node + '/' + j.vmid + (j.newid ? ' \\u2192 ' + j.newid : '') + (j.kind == 'qemu' ? ' (VM)' : '');
const set = (id, text) => { if ($(id).textContent != text) $(id).textContent = text; };
function picture(jobs) {
  const width = Math.max(260, $('chart').clientWidth - 34), row = 9, left = 34, height = Math.max(jobs.length, 1) * row;
  const longest = Math.max(1, ...jobs.map(j => j.waited_seconds + j.clone_seconds));
  const scale = (width - left - 8) / longest, out = [];
  const add = (name, attributes, parent) => { const e = document.createElementNS(SVG, name);
    for (const a in attributes) e.setAttribute(a, attributes[a]); (parent ? parent.append(e) : out.push(e)); return e; };
  const step = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600].find(s => longest / s <= width / 80) || longest / 4;
  for (let t = 0; t <= longest; t += step) {
    add('line', {x1: left + t * scale, x2: left + t * scale, y1: 0, y2: height, stroke: 'var(--line)'});
    add('text', {x: left + t * scale, y: height + 13, 'text-anchor': 'middle'}).textContent =
      t < 60 ? t + ' s' : +(t / 60).toFixed(1) + ' m'; }
  jobs.forEach((j, i) => {
    const g = add('g', {}), y = i * row + 1, w = j.waited_seconds * scale;
    add('title', {}, g).textContent = label(j) + ': ' + (j.outcome || 'running') + ', waited ' +
      seconds(j.waited_seconds) + ', ran ' + seconds(j.clone_seconds);
    add('rect', {x: left, y, width: Math.max(w, .5), height: row - 2, rx: 1.5, fill: 'var(--wait)'}, g);
    const known = ['completed', 'failed', 'abandoned'].includes(j.outcome) ? j.outcome : j.outcome ? 'wait' : 'running';
    add('rect', {x: left + w, y, width: Math.max(j.clone_seconds * scale, 1.5), height: row - 2, rx: 1.5,
      fill: 'var(--' + known + ')'}, g);
    add('text', {x: left - 4, y: y + row - 3, 'text-anchor': 'end', style: 'font-size:8px'}, g).textContent =
      j.newid || j.vmid; });
  $('picture').setAttribute('viewBox', '0 0 ' + width + ' ' + (height + 18));
  $('picture').replaceChildren(...out);
}
function show(s) {
  set('completed', s.totals.completed); set('failed', s.totals.failed); set('waiting', s.waiting.length);
  set('median', seconds(s.clone_seconds.median)); set('medianwait', seconds(s.wait_seconds.median));
  set('others', s.totals.rejected + ' / ' + s.totals.abandoned);
  const r = s.running;
  if (r) { $('running').replaceChildren(make('b', label(r)), ' for ' + seconds(r.clone_seconds),
    make('span', (r.user ? ' \\u00b7 ' + r.user : '') + (r.client == 'left' ? ' \\u00b7 its client has left' : ''))); }
  else set('running', 'No clone runs.');
  $('queue').replaceChildren(...s.waiting.map((j, i) => { const tr = make('tr', '');
    tr.append(...[i + 1, label(j), seconds(j.waited_seconds + j.clone_seconds), j.stage == 'parked' ? 'source locked' :
      j.client == 'left' ? 'client left' : 'waiting', j.user].map(t => make('td', t))); return tr; }));
  $('waitingtable').hidden = !s.waiting.length; $('nobody').hidden = !!s.waiting.length;
  const all = s.history.concat(r ? [r] : []).slice(-50);
  $('picture').style.display = all.length ? '' : 'none'; $('nothing').hidden = !!all.length; picture(all);
  set('relay', 'up ' + seconds(s.uptime_seconds) + ' \\u00b7 ' + Object.values(s.relayed).reduce((a, b) => a + b, 0) +
    ' requests relayed \\u00b7 ' + s.connections + ' connections \\u00b7 ' + s.tunnels + ' consoles \\u00b7 ' +
    s.backend_errors + ' backend errors'); }
async function refresh() {
  try { show(await (await fetch('status.json', {cache: 'no-store'})).json()); $('lost').hidden = true; }
  catch (error) { $('lost').hidden = false; }
  setTimeout(refresh, document.hidden ? 5000 : 1000); }
refresh();
"""
STATUS_PAGE = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>PVE clone queue</title>
<link rel="icon" href="data:,"><style>{STATUS_STYLE}</style></head><body><main>
<header><h1>PVE clone queue</h1><span class="faint" id="relay"></span>
<span class="gone" id="lost" hidden>The proxy does not answer.</span></header>
<section id="tiles"><span>completed<b id="completed">0</b></span><span>failed<b id="failed">0</b></span>
<span>waiting<b id="waiting">0</b></span><span>median clone<b id="median">-</b></span>
<span>median wait<b id="medianwait">-</b></span><span>rejected / left<b id="others">-</b></span></section>
<section><h2>Running</h2><div id="running">No clone runs.</div></section>
<section><h2>Waiting</h2><div id="nobody" class="faint">Nobody waits.</div><div class="scroll"><table id="waitingtable"
hidden><thead><tr><th>#</th><th>clone</th><th>for</th><th></th><th>user</th></tr></thead><tbody id="queue"></tbody>
</table></div></section>
<section id="chart"><h2>The last {HISTORY} clones</h2><div id="nothing" class="faint">None yet.</div>
<svg id="picture" role="img" aria-label="A bar for each clone: grey while it waited, coloured while it ran"></svg>
<div class="key"><span><i style="background:var(--wait)"></i>waited</span>
<span><i style="background:var(--running)"></i>running</span>
<span><i style="background:var(--completed)"></i>completed</span>
<span><i style="background:var(--failed)"></i>failed</span>
<span><i style="background:var(--abandoned)"></i>client left</span></div></section>
<noscript>This page needs JavaScript; the same data is at status.json.</noscript>
</main><script>{STATUS_SCRIPT}</script></body></html>
"""
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(STATUS_SCRIPT.encode()).digest()).decode()
STATUS_POLICY = (
    f"default-src 'none'; script-src 'sha256-{_SCRIPT_HASH}'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEALTH_SECONDS = 3.0


class StatusServer(ConnectionServer):
    """The listener of -status-listen."""

    def __init__(self, listener: socket.socket, proxy: ProxyServer) -> None:
        super().__init__(listener, StatusHandler, proxy.silence)
        self.proxy = proxy
        self._started_at = time.monotonic()

    def snapshot(self) -> dict[str, Any]:
        """The queue's and the proxy's figures."""
        uptime = round(time.monotonic() - self._started_at, 1)
        return {"version": VERSION, "uptime_seconds": uptime, **self.proxy.clones.snapshot(), **self.proxy.counters()}


class StatusHandler(ConnectionHandler):
    """Answers `/`, `/status.json`, `/metrics` and `/healthz`."""

    server: StatusServer

    def answer(self, request: Request) -> None:
        """Answer a GET or HEAD."""
        if request.method not in (b"GET", b"HEAD") or request.length:
            raise Refusal(405, "only GET is offered here")
        path = request.target.partition(b"?")[0]
        status = 200
        if path == b"/":
            kind, text = "text/html;charset=UTF-8", STATUS_PAGE
        elif path == b"/status.json":
            kind, text = "application/json", json.dumps(self.server.snapshot())
        elif path == b"/metrics":
            kind, text = "text/plain; version=0.0.4; charset=utf-8", metrics(self.server.snapshot())
        elif path == b"/healthz":
            problem = health(self.server.proxy.backend.address)
            status = 503 if problem else 200
            kind, text = "text/plain;charset=UTF-8", (problem or "ok") + "\n"
        else:
            raise Refusal(404, "there is no such page")
        body = text.encode()
        head = (
            f"HTTP/1.1 {status} {http.client.responses[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
            f"Content-Security-Policy: {STATUS_POLICY}\r\n"
        )
        response = Response(head.encode(), request.method)
        self.respond(request, response, b"" if request.method == b"HEAD" else body)


# main


class _LogFormatter(logging.Formatter):
    """For the journal its priority, otherwise a timestamp in the form of Go's log package."""

    PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def __init__(self, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(message)s", "%Y/%m/%d %H:%M:%S")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._journal:
            return text
        priority = next((number for level, number in self.PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


def set_up_log() -> None:
    """Log to stderr."""
    logging.raiseExceptions = False  # a broken stderr is no reason to fail, or to complain to it
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormatter(bool(os.environ.get("JOURNAL_STREAM"))))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def server_tls(settings: Settings) -> ssl.SSLContext | None:
    """The listener's certificate, TLS 1.2 or newer. Raises FlagError if it can't be loaded."""
    if not settings.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for name, path in (("tls-cert", settings.tls_cert), ("tls-key", settings.tls_key)):
        try:
            open(path, "rb").close()
        except OSError as error:
            raise FlagError(f"invalid value {path!r} for flag -{name}: {_reason(error)}") from None
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")  # never ask at the terminal
    except (OSError, ValueError) as error:
        raise FlagError(
            f"flags -tls-cert {settings.tls_cert!r} and -tls-key {settings.tls_key!r}: {printable(str(error))}"
        ) from None
    return context


def start_vital_thread(name: str, run: Callable[[], object], daemon: bool = True) -> None:
    """Start a thread without which the program is useless: if it fails, the process ends, to be started anew."""

    def live() -> None:
        try:
            run()
        except BaseException:
            log.exception("the %s thread failed", name)
            os._exit(1)

    threading.Thread(target=live, name=name, daemon=daemon).start()


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HOUSEKEEPING_SECONDS = 0.5
SHUTDOWN_POLL_SECONDS = 0.1  # how often the accepting thread looks whether it should end


def serve(settings: Settings, server: ProxyServer, status: StatusServer | None, systemd: Systemd) -> None:
    """Run until SIGTERM or SIGINT. SIGHUP loads the listener's certificate anew."""
    clones = server.clones
    start_vital_thread("clone worker", clones.run)
    start_vital_thread("accept", lambda: server.serve_forever(SHUTDOWN_POLL_SECONDS))
    if status:
        start_vital_thread("status", status.serve_forever)
    systemd.send("READY=1")
    while True:
        received = signal.sigtimedwait(SIGNALS, HOUSEKEEPING_SECONDS)
        if received and received.si_signo != signal.SIGHUP:
            return
        if received and settings.tls_cert:
            try:
                server.tls = server_tls(settings)
                log.info("certificate loaded anew")
            except FlagError as error:
                log.error("certificate not loaded anew: %s", error)
        server.backend.prune()
        server.look_around()
        clones.look_around()
        systemd.status(status_line(clones.snapshot()))


def stop(server: ProxyServer, systemd: Systemd) -> None:
    """End in good order: nobody who was accepted is left without an answer. A second signal ends it at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    log.info("shutting down")
    systemd.send("STOPPING=1")
    begin = time.monotonic()
    server.shutdown()
    server.server_close()
    server.clones.drain()
    server.drain()
    if not server.wait_until_closed(begin + 1):
        server.end_silent()
    server.clones.wait_until_idle(begin + DRAIN_SECONDS)
    server.wait_until_closed(begin + DRAIN_SECONDS)
    server.clones.answer_running()
    server.wait_until_closed(time.monotonic() + 2)


def main(arguments: list[str]) -> int:
    """Run the program; its exit status: 0 after a signal, 1 if it can't listen, 2 for a wrong flag."""
    for argument in arguments:
        if re.fullmatch("--?(h|help|version)", argument):
            print(f"{PROGRAM} {VERSION}" if argument.endswith("version") else usage())
            return 0
    set_up_log()
    try:
        settings = parse_flags(arguments)
        backend = Backend(settings)
        tls = server_tls(settings)
    except FlagError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    systemd = Systemd(os.environ.get("NOTIFY_SOCKET"))
    try:
        listener = systemd.take_back(settings.listen)
        if not listener:
            listener = listen_on(settings.listen)
            systemd.keep(listener)
        status_listener = listen_on(settings.status_listen) if settings.status_listen else None
    except ListenError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    server = ProxyServer(listener, settings, backend, CloneQueue(settings, backend), tls)
    status = StatusServer(status_listener, server) if status_listener else None
    log.info("LISTENING: %s backend=%s", address_text(listener), settings.backend)
    if not tls and not is_local(listener):
        log.warning("listening on %s without TLS: PVE credentials travel in clear text", address_text(listener))
    if status_listener:
        log.info("STATUS PAGE: %s", address_text(status_listener))
        if not is_local(status_listener):
            log.warning("the status page on %s shows nodes, VMIDs and token names", address_text(status_listener))
    serve(settings, server, status, systemd)
    stop(server, systemd)
    return 0


def run(arguments: list[str]) -> None:
    """Let `main` run in a thread of its own, and the process end with its exit status. The caller's thread should end:
    while it is in this file, Python keeps the file's syntax tree, 5 MB."""
    # Blocked here and in every thread, to be taken by sigtimedwait: no handler can interrupt what holds a lock.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for `stop`, not Python's own handler

    def run_main() -> None:
        if threading.current_thread() is not threading.main_thread():
            threading.main_thread().join()
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
        exit_status = main(arguments)
        with contextlib.suppress(OSError, AttributeError):  # a closed standard output
            sys.stdout.flush()
        # Without the interpreter's own shutdown, which fails when a daemon thread happens to be writing to stderr.
        os._exit(exit_status)

    if sys.version_info[:3] in ((3, 12, 0), (3, 12, 1)):  # they start no thread any more when the first one has ended
        run_main()
    start_vital_thread("main", run_main, daemon=False)


if __name__ == "__main__":
    run(sys.argv[1:])
