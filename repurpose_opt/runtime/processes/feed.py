"""Where a service's batches come from, and where the answers go: files, standard input, clients that connect."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import stat
import sys
import threading
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.runtime.processes.console import print_error, print_note
from repurpose_opt.runtime.processes.desk import Desk, Request, ServiceEnded
from repurpose_opt.runtime.processes.outputs import write_whole
from repurpose_opt.runtime.processes.stream import DamagedStream, format_of


class Source(Protocol):
    """Hands in batches in threads of its own."""

    name: str
    """For people."""
    has_failed: bool
    """Whether a batch was not answered for a reason that is not the batch's client's to know."""

    def start(self) -> None: ...

    def close(self) -> None: ...


class Files:
    """Files (samples, …), cut into batches, and a file of outputs for each, written whole or not at all."""

    def __init__(
        self,
        desk: Desk,
        names: Sequence[Path],
        files: Sequence[NDArray[Any]],
        targets: Sequence[Path],
        batch_size: int,
    ) -> None:
        self.name = " ".join(map(str, names))
        self.has_failed = False
        self._desk, self._batch_size = desk, batch_size
        self._files = list(zip(names, files, targets, strict=True))

    def start(self) -> None:
        threading.Thread(target=self._answer, daemon=True).start()

    def close(self) -> None:
        pass

    def _answer(self) -> None:
        for number, (name, inputs, target) in enumerate(self._files):
            try:
                self._answer_file(number, name, inputs, target)
            except ServiceEnded as error:
                print_note(f"{name}: not answered: {error}")
            except RepurposeError as error:
                print_error(error)
                self.has_failed = True
        self._desk.end()

    def _answer_file(self, number: int, name: Path, inputs: NDArray[Any], target: Path) -> None:
        batches = []
        for first in range(0, max(len(inputs), 1), self._batch_size):
            request = Request(name, inputs[first : first + self._batch_size], first, number)
            with self._desk.answered(request) as outputs:
                batches.append(outputs)
        whole = np.concatenate(batches)
        write_whole(target, lambda file: np.save(file, whole))


class Pipe:
    """Standard input, answered on standard output."""

    def __init__(self, desk: Desk) -> None:
        self.name = "standard input"
        self.has_failed = False
        self._desk = desk

    def start(self) -> None:
        threading.Thread(target=self._answer, daemon=True).start()

    def close(self) -> None:
        pass

    def _answer(self) -> None:
        # A reader of its own: Python ends with an abort where a thread still waits in that of sys.stdin.
        reader = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115
        try:
            answer_stream(self._desk, reader, sys.stdout.buffer, "the batch")
        except (DamagedStream, OSError) as error:
            print_error(f"standard input and output: {error}")
            self.has_failed = True
        self._desk.end()


def targets_of(names: Sequence[Path], output: Path) -> list[Path]:
    """Where the outputs of each file go. Raises InvalidArgument."""
    if output.is_dir():
        targets = [output / name.name for name in names]
        if len(set(targets)) < len(targets):
            raise InvalidArgument("--input", "two files of one name", "different names, as --output is one folder")
    else:
        targets = [output]
        if len(names) > 1:
            raise InvalidArgument("--output", f"{output}, which is no folder", "a folder, as there are several files")
    same = {target.resolve() for target in targets} & {name.resolve() for name in names}
    if same:
        raise InvalidArgument("--output", f"{min(same)}, an input", "another file or folder")
    return targets


def answer_stream(desk: Desk, reader: BufferedReader, writer: BinaryIO, name: str) -> None:
    """Answer the batches that come in, one by one. Raises DamagedStream, after an answer that says so."""
    style = format_of(reader)
    while True:
        try:
            batch = style.read(reader)
            if batch is None:
                return
            with desk.answered(Request(name, batch)) as outputs:
                style.write(writer, outputs)
        except RepurposeError as error:
            style.write_error(writer, str(error))
            if isinstance(error, DamagedStream):
                raise


class Listener:
    """Answers clients that connect to an address, each in a thread of its own."""

    def __init__(self, address: str, desk: Desk) -> None:
        """`address` is HOST:PORT, or the path of a socket. Raises RepurposeError where it cannot be listened on."""
        try:
            self._server = _server(address, desk)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RepurposeError(f"--listen {address}: {reason}") from None
        self.name = _text(self._server.server_address)
        self.has_failed, self._is_started = False, False

    def start(self) -> None:
        self._is_started = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def close(self) -> None:
        if self._is_started:
            self._server.shutdown()
        self._server.server_close()
        if self._server.address_family == socket.AF_UNIX:
            Path(self.name).unlink(missing_ok=True)


def is_port(address: str) -> bool:
    """Whether an address is HOST:PORT; any other is a path."""
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdigit() and "/" not in address


class _Handler(socketserver.StreamRequestHandler):
    """One client."""

    def handle(self) -> None:
        if self.connection.family != socket.AF_UNIX:
            # Small messages are not held back until the one before is acknowledged.
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server, reader = cast(_Server, self.server), cast(BufferedReader, self.rfile)
        with contextlib.suppress(DamagedStream, ConnectionError):
            answer_stream(server.desk, reader, cast(BinaryIO, self.wfile), "the batch")


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64
    desk: Desk


class _PathServer(_Server):
    address_family = socket.AF_UNIX


def _server(address: str, desk: Desk) -> _Server:
    if is_port(address):
        host, _, port = address.rpartition(":")
        server = _Server((host, int(port)), _Handler)
    else:
        _remove_stale(Path(address))
        server = _PathServer(cast(Any, address), _Handler)
        os.chmod(address, 0o600)
    server.desk = desk
    return server


def _remove_stale(path: Path) -> None:
    """Remove the socket of a service that was killed; one that answers stays, and listening fails."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def _text(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)
