"""A program outside of Python as operator: started for each call, or kept running and fed through its pipes."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
from torch import Tensor

from dpnp_shared.operators.base import Operator, check_image_shape
from dpnp_shared.operators.numpy_operator import Array, check_batch, stack, to_array, to_tensor

INPUT, OUTPUT = "{input}", "{output}"
PREFIX, LONGEST = 8, 1 << 48  # bytes of a message's length, and of a message
CLOSING_TIME = 1.0  # seconds that a process has for ending by itself
LAST_LINES = 10


class ProgramError(RuntimeError):
    """An external program failed, took too long, or gave something that is not an array."""


class ExternalProgram(Operator):
    """``A(x)`` computed by another program, which gives values and no gradient.

    Images and measurements go as ``.npy`` files or streams, images in their own precision. How, depends on the command:

    - with ``{input}`` and ``{output}``, these stand for paths: the program reads the one and writes the other, both in a
      temporary folder that is removed after the call;
    - without them, the program reads one array from its standard input and writes one to its standard output;
    - with ``persistent`` the program keeps running, which saves its start-up time in each call. It answers one array after
      the other until its input ends. Each goes as 8 bytes, the length of what follows (little-endian), and a ``.npy``
      file. In Python::

          receive, send = sys.stdin.buffer, sys.stdout.buffer
          while length := receive.read(8):
              x = np.load(io.BytesIO(receive.read(int.from_bytes(length, "little"))))
              np.save(answer := io.BytesIO(), simulate(x))
              send.write(len(answer.getvalue()).to_bytes(8, "little") + answer.getvalue())
              send.flush()

      A program that has died is started again, once a call.

    No shell is involved: quotes group words, and ``$``, ``|``, ``>`` or ``;`` have no meaning. NaN is passed on: samplers
    take it as a likelihood of 0, so that a program may say in this way that it has no value for an image.

    Args:
        command: the program and its arguments, as one string or a list of words.
        image_shape: ``(C, H, W)`` that it takes; None where it takes several.
        per_image: one call an image, of ``(C, H, W)`` to ``(*y_shape)``; else one a batch, of ``(B, C, H, W)`` to
            ``(B, *y_shape)``.
        timeout: of one call, in seconds; then the program and those that it has started are killed.
        workers: calls that run at the same time; a batch is divided between them.
        persistent: keep the program running.

    Raises:
        FileNotFoundError: there is no such program.
        ValueError: an argument is out of range, or the command names only one of the two files.
    """

    differentiable = False

    def __init__(
        self,
        command: str | list[str],
        image_shape: tuple[int, int, int] | None = None,
        per_image: bool = True,
        timeout: float = 60.0,
        workers: int = 1,
        persistent: bool = False,
    ) -> None:
        super().__init__()
        self.words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
        if not self.words:
            raise ValueError("command is empty; allowed is a program and its arguments")
        if shutil.which(self.words[0]) is None:
            raise FileNotFoundError(f"command = {command!r}: there is no program {self.words[0]!r}")
        named = [any(name in word for word in self.words) for name in (INPUT, OUTPUT)]
        if named[0] != named[1]:
            raise ValueError(f"command = {command!r}; it must name both of {INPUT} and {OUTPUT}, or none")
        if persistent and named[0]:
            raise ValueError(f"command = {command!r}; a persistent program uses its pipes, not {INPUT} and {OUTPUT}")
        if not 0 < timeout <= threading.TIMEOUT_MAX or workers < 1:
            raise ValueError(f"timeout = {timeout} and workers = {workers}; both must be positive")
        self.image_shape = None if image_shape is None else check_image_shape(image_shape)
        self.files, self.per_image, self.timeout, self.workers = named[0], per_image, float(timeout), workers
        self.persistent = persistent
        self._start()

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on ``x`` ``(B, C, H, W)``.

        Raises:
            ProgramError: the program fails, takes too long, or gives no array; with the end of what it wrote to its standard
                error.
            ValueError: it gives arrays of a wrong shape.
        """
        self._check_image(x)
        images, name = to_array(x), f"the program {self.words[0]!r}"
        batch = [*images] if self.per_image else np.array_split(images, min(self.workers, len(images)))
        if min(self.workers, len(batch)) == 1:
            results = [self._call(part) for part in batch]
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                results = [*pool.map(self._call, batch)]
        if self.per_image:
            return to_tensor(stack(results, name), x, name)
        parts = [check_batch(result, len(part), name) for result, part in zip(results, batch, strict=True)]
        return to_tensor(np.concatenate(parts), x, name)

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"{shlex.join(self.words)!r}, per_image={self.per_image}, workers={self.workers}"

    def close(self) -> None:
        """End the processes of a persistent program; the next call starts them anew. Done by itself at the end."""
        self._finalizer()
        self._start()

    def _start(self) -> None:
        self._processes = [_Process(self.words) for _ in range(self.workers)] if self.persistent else []
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._finalizer = weakref.finalize(self, _close, self._processes)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle starts processes of its own."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_processes", "_idle", "_finalizer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()

    def _call(self, array: Array) -> Array:
        """One call of the program."""
        if self.persistent:
            process = self._idle.get()
            try:
                return _read(process.ask(_write(array), self.timeout), self.words)
            finally:
                self._idle.put(process)
        if not self.files:
            return _read(self._run(self.words, _write(array)), self.words)
        with tempfile.TemporaryDirectory(prefix="dpnp_") as folder:
            source, target = Path(folder, "input.npy"), Path(folder, "output.npy")
            source.write_bytes(_write(array))
            self._run([w.replace(INPUT, str(source)).replace(OUTPUT, str(target)) for w in self.words], b"")
            if not target.is_file():
                raise ProgramError(f"{shlex.join(self.words)}: ended well, but has not written {OUTPUT}")
            return _read(target.read_bytes(), self.words)

    def _run(self, words: Sequence[str], sent: bytes) -> bytes:
        """A process from its start to its end: what it wrote to its standard output."""
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as process:
            try:
                received, errors = process.communicate(sent, self.timeout)
            except subprocess.TimeoutExpired:
                _kill(process)
                _, errors = process.communicate()
                raise ProgramError(_message(self.words, f"took more than {self.timeout:g} s", errors)) from None
            except BaseException:
                _kill(process)
                raise
        if process.returncode:
            raise ProgramError(_message(self.words, f"ended with status {process.returncode}", errors))
        return received


class _Process:
    """A persistent program's process; used by one thread at a time.

    Args:
        words: the command.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.process: subprocess.Popen[bytes] | None = None
        self.errors: IO[bytes] | None = None  # a file: nobody empties a pipe while the program computes

    def ask(self, sent: bytes, timeout: float) -> bytes:
        """Send one message and receive another.

        Raises:
            ProgramError: the program has died, also when it was started again; took too long; or gave no message.
        """
        started = self.process is None
        while True:
            try:
                return self._exchange(sent, timeout)
            except _DeadError as error:
                if started:
                    raise ProgramError(*error.args) from None
                started = True

    def stop(self) -> bytes:
        """End the process: what it wrote to its standard error since the last message."""
        if self.process is None or self.errors is None:
            return b""
        _kill(self.process)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # what it has not read is lost
            self.process.stdin.close()
        with self.process, self.errors:
            self.errors.seek(0)
            written = self.errors.read()
        self.process = self.errors = None
        return written

    def _exchange(self, sent: bytes, timeout: float) -> bytes:
        if self.process is None or self.errors is None:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by stop()
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                self.words, stdin=pipe, stdout=pipe, stderr=self.errors, start_new_session=True
            )
        else:  # what it has written about earlier messages
            self.errors.seek(0)
            self.errors.truncate()
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:  # and the reading below ends
            late.set()
            _kill(process)

        timer = threading.Timer(timeout, end)
        timer.start()
        try:
            process.stdin.write(len(sent).to_bytes(PREFIX, "little") + sent)
            process.stdin.flush()
            prefix = process.stdout.read(PREFIX)
            length = int.from_bytes(prefix, "little")
            if len(prefix) == PREFIX and length > LONGEST:
                problem = (
                    f"answered {prefix!r}, which is no length of a message; what it prints must go to standard error"
                )
                raise ProgramError(_message(self.words, problem, self.stop()))
            received = process.stdout.read(length)
            if len(prefix) == PREFIX and len(received) == length:
                return received
        except OSError:  # the pipe is closed at its other end
            pass
        finally:
            timer.cancel()
        if late.is_set():
            raise ProgramError(_message(self.words, f"took more than {timeout:g} s", self.stop()))
        try:
            problem = f"ended with status {process.wait(CLOSING_TIME)} before it had answered"
        except subprocess.TimeoutExpired:
            problem = "closed its standard input or output before it had answered"
        raise _DeadError(_message(self.words, problem, self.stop()))


class _DeadError(ProgramError):
    """A persistent program is not there any more."""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, and those that it has started."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # its session is its own
        else:
            process.kill()
    except ProcessLookupError:
        pass


def _close(processes: list[_Process]) -> None:
    """End the processes of a persistent program: its input ends, and what does not stop then is killed."""
    for process in processes:
        if process.process is not None and process.process.stdin is not None:
            with contextlib.suppress(OSError):
                process.process.stdin.close()
    for process in processes:
        if process.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.process.wait(CLOSING_TIME)
        process.stop()


def _write(array: Array) -> bytes:
    """An array as the content of a ``.npy`` file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _read(content: bytes, words: Sequence[str]) -> Array:
    """The array of a ``.npy`` file's content.

    Raises:
        ProgramError: it is none.
    """
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        start = content[:40]
        raise ProgramError(
            _message(words, f"gave {len(content)} bytes that are no .npy array ({error}): {start!r}")
        ) from error


def _message(words: Sequence[str], problem: str, errors: bytes = b"") -> str:
    """What went wrong, and the end of what the program wrote to its standard error."""
    lines = errors.decode(errors="replace").strip().splitlines()[-LAST_LINES:]
    return "\n  ".join([f"{shlex.join(words)}: {problem}", *lines])
