"""A page to look at generated clips and say which are bad, and why: python -m emv3_jax.training.review FOLDER

FOLDER holds clips.jsonl and the videos it names; what is said is appended to verdicts.jsonl (emv3_jax.training.verdicts
has the form of both). The page is served to this machine's own browsers only. Ctrl-C ends the program; it may be
closed and started again at any time, and goes on with the clips that have no verdict yet.
"""

import collections
import http
import json
import os
import pathlib
import re
import sys
import threading
import urllib.parse
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

from emv3_jax import command_line
from emv3_jax.errors import UserError
from emv3_jax.files import reason
from emv3_jax.training import verdicts

HOST, PORT = "127.0.0.1", 8123
PAGE = pathlib.Path(__file__).with_name("review.html")
LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)
LARGEST_BODY = 10_000  # bytes; a verdict has about 100
BLOCK = 1 << 16
# The page's own script and style, videos and answers from here, nothing from elsewhere and no frame around it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ReviewServer(ThreadingHTTPServer):
    """Serves the page of one folder on 127.0.0.1.

    Args:
      folder: has been filled by the program that makes clips; it is read once, here.
      port: 0 takes a free one.
    Raises:
      UserError: the folder cannot be used, or the port.
    """

    allow_reuse_address = os.name == "posix"  # elsewhere this would let two programs share a port

    def __init__(self, folder: pathlib.Path, port: int = PORT):
        self.folder = folder
        self.clips = verdicts.read_clips(folder)
        self.videos = {clip["video"] for clip in self.clips}
        self.page = PAGE.read_bytes()
        self.writing = threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({reason(error)}): choose another with --port") from None

    @property
    def address(self) -> str:
        """What to type into a browser."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def state(self) -> dict[str, Any]:
        """What the page shows. judged: ids that have a verdict, the latest last."""
        with self.writing:
            said, _ = verdicts.verdicts_and_notes(self.folder)
        clips = []
        for clip in self.clips:
            verdict = said.get(clip["id"])
            row = {name: clip.get(name, "") for name in ("id", "video", "prompt", "task")}
            clips.append({**row, "verdict": verdict and verdict.verdict, "issue": verdict and verdict.issue})
        ids = {clip["id"] for clip in clips}
        judged = [id for id in said if id in ids]
        return {"folder": self.folder.absolute().name, "clips": clips, "issues": verdicts.ISSUES, "judged": judged}

    def save(self, row: Any) -> dict[str, Any]:
        """Appends what the page sent, and returns it as it was understood.

        Raises:
          UserError: it is not a verdict, or cannot be written.
        """
        if not isinstance(row, dict) or not {"id", "verdict"} <= row.keys() <= {"id", "verdict", "issue"}:
            raise UserError('expected {"id": ..., "verdict": ..., "issue": ...}')
        answer = {name: row.get(name) for name in ("id", "verdict", "issue")}
        with self.writing:
            verdicts.add_verdict(self.folder, **answer)
        return answer

    def counts(self) -> collections.Counter[str | None]:
        """How many clips are "keep", "reject" and None."""
        return collections.Counter(clip["verdict"] for clip in self.state()["clips"])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Browsers hang up on a video whenever they have seen enough: that is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection of a browser."""

    server: ReviewServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the page shows what goes wrong."""

    def do_GET(self) -> None:
        """The page, its data, or a video."""
        if not self._is_ours():
            return
        path = urllib.parse.urlsplit(self.path).path
        if path == "/":
            self._send(http.HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif path == "/clips":
            try:
                self._send_json(http.HTTPStatus.OK, self.server.state())
            except UserError as error:  # someone wrote into verdicts.jsonl meanwhile
                self._refuse(http.HTTPStatus.INTERNAL_SERVER_ERROR, error.message)
        elif path.startswith("/video/"):
            self._send_video(urllib.parse.unquote(path.removeprefix("/video/")))
        else:
            self._refuse(http.HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_POST(self) -> None:
        """A verdict; it is on the disk before it is answered."""
        if not self._is_ours():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/verdict":
            self._refuse(http.HTTPStatus.NOT_FOUND, "there is nothing here")
        elif self.headers.get_content_type() != "application/json":
            self._refuse(http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a verdict is application/json")
        elif not re.fullmatch("[0-9]{1,9}", length):
            self._refuse(http.HTTPStatus.LENGTH_REQUIRED, "a verdict has a Content-Length")
        elif int(length) > LARGEST_BODY:
            self._refuse(http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a verdict has at most {LARGEST_BODY} bytes")
        else:
            try:
                answer = self.server.save(json.loads(self.rfile.read(int(length))))
            except UserError as error:
                self._refuse(http.HTTPStatus.BAD_REQUEST, error.message)
            except ValueError:
                self._refuse(http.HTTPStatus.BAD_REQUEST, "a verdict is JSON")
            else:
                self._send_json(http.HTTPStatus.OK, answer)

    def _is_ours(self) -> bool:
        """Whether the request comes from the page itself or a program here; others are refused.

        A foreign page can have its own name point to 127.0.0.1, but not hide that name from Host; and it can send
        here, but not without its Origin.
        """
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not LOOPBACK.fullmatch(hosts[0]):
            self._refuse(http.HTTPStatus.FORBIDDEN, "this page is for this machine only")
            return False
        origins = self.headers.get_all("Origin") or []
        if any(origin.lower() != f"http://{hosts[0]}".lower() for origin in origins):
            self._refuse(http.HTTPStatus.FORBIDDEN, "this page takes verdicts from itself only")
            return False
        return True

    def _send_video(self, name: str) -> None:
        """A video of clips.jsonl, or the part of it that is asked for."""
        if name not in self.server.videos:
            self._refuse(http.HTTPStatus.NOT_FOUND, "there is no such video")
            return
        try:
            file = open(self.server.folder / name, "rb")  # noqa: SIM115
        except OSError as error:
            self._refuse(http.HTTPStatus.NOT_FOUND, f"video {name} cannot be read: {reason(error)}")
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            part = byte_range(self.headers.get("Range"), size)
            if part is None:
                self._head(http.HTTPStatus.OK, size, "video/mp4", {"Accept-Ranges": "bytes"})
                self._copy(file, 0, size)
            elif not part:
                self._head(http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, "", {"Content-Range": f"bytes */{size}"})
            else:
                where = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {part[0]}-{part[-1]}/{size}"}
                self._head(http.HTTPStatus.PARTIAL_CONTENT, len(part), "video/mp4", where)
                self._copy(file, part[0], len(part))

    def _copy(self, file: BinaryIO, start: int, count: int) -> None:
        file.seek(start)
        while count:
            block = file.read(min(BLOCK, count))
            if not block:  # the file has become shorter: hang up, so that the browser knows
                self.close_connection = True
                return
            self.wfile.write(block)
            count -= len(block)

    def _refuse(self, status: http.HTTPStatus, message: str) -> None:
        """An error in a form that the page can show. What the browser still sends is not read."""
        self.close_connection = True
        self._send_json(status, {"error": message})

    def _send_json(self, status: http.HTTPStatus, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: http.HTTPStatus, body: bytes, kind: str) -> None:
        self._head(status, len(body), kind)
        self.wfile.write(body)

    def _head(self, status: http.HTTPStatus, length: int, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Length": str(length),
            "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY,
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            **({"Content-Type": kind} if kind else {}),
            **({"Connection": "close"} if self.close_connection else {}),
        }
        for name, value in {**headers, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()


def byte_range(header: str | None, size: int) -> range | None:
    """The bytes that a Range header asks for; an empty range if there are none such.

    None: the whole file, as for a header that asks for several parts or cannot be read.
    """
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", (header or "").replace(" ", ""))
    if not match or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:  # the last n bytes
        return range(max(size - int(last), 0), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(int(last) + 1, size) if last else size)


def main(arguments: list[str]) -> int:
    """Parses the command line, serves until Ctrl-C."""
    parser = command_line.Parser(
        prog="python -m emv3_jax.training.review", description=(__doc__ or "").splitlines()[0].partition(":")[0]
    )
    parser.add_argument("folder", metavar="FOLDER", type=pathlib.Path, help="holds clips.jsonl and the videos")
    parser.add_argument("--port", type=int, default=PORT, help=f"of the page (default: {PORT}; 0: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port must be between 0 and 65535, got {options.port}")
    with ReviewServer(options.folder, options.port) as server:
        verdicts.read_verdicts(options.folder)  # says what is broken off, and refuses what cannot be continued
        left, total = server.counts()[None], len(server.clips)
        print(f"{left} of {total} clips wait for a verdict at {server.address} (Ctrl-C ends)", flush=True)
        if not options.no_browser:  # beside the server, for some browsers take the terminal until they are closed
            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            counts = server.counts()
            print(f"\n{counts['keep']} kept, {counts['reject']} rejected, {counts[None]} left")
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
