"""The review page: what its server gives and refuses, and what a real browser makes of it."""

import contextlib
import functools
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from emv3_jax import command_line
from emv3_jax.errors import UserError
from emv3_jax.media import VideoWriter
from emv3_jax.training import review
from emv3_jax.training.verdicts import ISSUES, Verdict, add_verdict, read_verdicts

ROOT = pathlib.Path(__file__).parents[2]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1000,700"
).split()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A second of a moving square with a tone."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    frames = np.full((25, 64, 64, 3), 60, np.uint8)
    for number, frame in enumerate(frames):
        frame[20:40, number : number + 20] = 220
    tone = 0.2 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    with VideoWriter(path, 64, 64, wave=tone.astype(np.float32)) as writer:
        writer.write(frames)
    return path


@pytest.fixture
def folder(tmp_path, video):
    folder = tmp_path / "clips"
    folder.mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (folder / "unlisted.mp4").write_bytes(b"secret")
    rows = []
    for number in range(4):
        name = "a clip, 100%.mp4" if number == 3 else f"{number:06d}.mp4"
        shutil.copy(video, folder / name)
        prompt = f"A puppet nods, <b>take {number}</b>."
        rows.append({"id": f"{number:06d}", "video": name, "prompt": prompt, "task": "i2v", "seed": float("nan")})
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def server(folder):
    with review.ReviewServer(folder, 0) as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.02))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, body=None, method=None, host=None, **headers):
    """(status, headers, body) of a request that is sent as it is written here."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    port = server.server_address[1]
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.putrequest(method or ("GET" if body is None else "POST"), path, skip_host=True)
        if host != "":
            connection.putheader("Host", host or f"127.0.0.1:{port}")
        if body is not None:
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_the_page_needs_nothing_from_elsewhere(server):
    status, headers, body = ask(server, "/?again")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert body == review.PAGE.read_bytes()
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search(rb"https?://|@import|<link(?! rel=\"icon\" href=\"data:,\")|\ssrc=", body)
    assert ask(server, "/review.py")[0] == ask(server, "/clips.jsonl")[0] == 404


def test_clips_come_with_their_verdicts(server, folder):
    for id, verdict, issue in [("000002", "keep", None), ("000001", "reject", "lips"), ("000000", "keep", None)]:
        add_verdict(folder, id, verdict, issue)
    add_verdict(folder, "000000", None)
    status, headers, body = ask(server, "/clips")
    state = json.loads(body, parse_constant=pytest.fail)  # a NaN is no JSON to a browser
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert state["issues"] == list(ISSUES) and state["folder"] == "clips" and state["judged"] == ["000002", "000001"]
    assert [(clip["id"], clip["verdict"], clip["issue"]) for clip in state["clips"]] == [
        ("000000", None, None),
        ("000001", "reject", "lips"),
        ("000002", "keep", None),
        ("000003", None, None),
    ]
    assert state["clips"][3]["video"] == "a clip, 100%.mp4"
    assert state["clips"][3]["prompt"] == "A puppet nods, <b>take 3</b>." and state["clips"][3]["task"] == "i2v"
    (folder / "verdicts.jsonl").write_text("3\n")
    assert ask(server, "/clips")[0] == 500


def test_videos_come_whole_and_in_parts(server, video):
    data = video.read_bytes()
    size = len(data)
    status, headers, body = ask(server, "/video/a%20clip%2C%20100%25.mp4")
    assert (status, headers["Accept-Ranges"], headers["Content-Type"]) == (200, "bytes", "video/mp4")
    assert body == data
    for asked, first, last in [
        ("bytes=0-", 0, size - 1),
        ("bytes=10-19", 10, 19),
        ("bytes=10-10", 10, 10),
        (f"bytes=100-{size + 50}", 100, size - 1),
        ("bytes=-7", size - 7, size - 1),
        (f"bytes=-{size + 50}", 0, size - 1),
    ]:
        status, headers, body = ask(server, "/video/000000.mp4", Range=asked)
        assert (status, headers["Content-Range"]) == (206, f"bytes {first}-{last}/{size}"), asked
        assert body == data[first : last + 1]
    for asked in (f"bytes={size}-", f"bytes={size}-{size + 5}", "bytes=-0"):
        status, headers, body = ask(server, "/video/000000.mp4", Range=asked)
        assert (status, headers["Content-Range"], body) == (416, f"bytes */{size}", b"")
    for asked in ("bytes=0-1,5-6", "bytes=5-2", "bytes=-", "lines=1-2", "bytes=a-b"):  # these may be disregarded
        assert ask(server, "/video/000000.mp4", Range=asked)[::2] == (200, data)


@pytest.mark.parametrize(
    "path",
    [
        "/video/unlisted.mp4",
        "/video/clips.jsonl",
        "/video/../secret.mp4",
        "/video/%2e%2e/secret.mp4",
        "/video/..%2fsecret.mp4",
        "/video/..%5csecret.mp4",
        "/video/%2Fetc%2Fpasswd",
        "/video//etc/passwd",
        "/video/000000.mp4%00",
        "/video/%ff",
        "/video/",
        "/../secret.mp4",
        "//etc/passwd",
    ],
)
def test_only_listed_videos_are_given(server, path):
    status, _, body = ask(server, path)
    assert status == 404 and b"secret" not in body and b"root:" not in body


def test_a_video_that_has_gone_is_said_to(server, folder):
    (folder / "000000.mp4").unlink()
    status, _, body = ask(server, "/video/000000.mp4")
    assert (status, json.loads(body)) == (404, {"error": "video 000000.mp4 cannot be read: no such file or directory"})


def test_foreign_pages_are_refused(server, folder):
    port = server.server_address[1]
    row = {"id": "000000", "verdict": "keep", "issue": None}
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "",
        "[::2]",
    ):
        for path in ("/", "/clips", "/video/000000.mp4"):
            assert ask(server, path, host=host)[0] == 403, host
        assert ask(server, "/verdict", row, host=host)[0] == 403
    for origin in (
        "http://evil.example",
        "null",
        f"https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
        "http://127.0.0.1",
    ):
        assert ask(server, "/verdict", row, Origin=origin)[0] == 403, origin
    assert ask(server, "/verdict", row, Content_Type="text/plain")[0] == 415  # what a foreign form can send
    assert not (folder / "verdicts.jsonl").exists()
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST:9000", "[::1]:9000"):  # 9000: a forwarded port
        assert ask(server, "/clips", host=host)[0] == 200
        assert ask(server, "/verdict", row, host=host, Origin=f"http://{host.lower()}")[0] == 200


def test_verdicts_are_written_before_they_are_answered(server, folder):
    for row in (
        {"id": "000000", "verdict": "keep", "issue": None},
        {"id": "000001", "verdict": "reject", "issue": "colour"},
        {"id": "000000", "verdict": None},
    ):
        status, _, body = ask(server, "/verdict", row, Content_Type="application/json; charset=utf-8")
        last = json.loads((folder / "verdicts.jsonl").read_text().splitlines()[-1])
        assert (status, json.loads(body)) == (200, {"issue": None, **row})
        assert {**last, "time": ""} == {"issue": None, **row, "time": ""}
    assert read_verdicts(folder) == {"000001": Verdict("reject", "colour")}


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        ({"id": "none", "verdict": "keep"}, {}, 400, "there is no clip 'none'"),
        ({"id": ["000000"], "verdict": "keep"}, {}, 400, "there is no clip"),
        ({"id": "000000", "verdict": "reject"}, {}, 400, "needs an issue"),
        ({"id": "000000", "verdict": "keep", "folder": "/"}, {}, 400, "expected"),
        ({"id": "000000"}, {}, 400, "expected"),
        ([], {}, 400, "expected"),
        (b"{", {}, 400, "a verdict is JSON"),
        (b"\xff", {}, 400, "a verdict is JSON"),
        (b" " * 10_001, {}, 413, "at most 10000 bytes"),
        (b"{}", {"Content-Length": None}, 411, "Content-Length"),
        (b"{}", {"Content-Length": "-1"}, 411, "Content-Length"),
    ],
)
def test_what_is_no_verdict_is_refused(server, folder, body, headers, status, message):
    answer = ask(server, "/verdict", body, **headers)
    assert answer[0] == status and message in json.loads(answer[2])["error"]
    assert not (folder / "verdicts.jsonl").exists()
    assert ask(server, "/clips", {"id": "000000", "verdict": "keep"})[0] == 404


def test_many_verdicts_at_once(server, folder):
    def judge(number):
        for _ in range(5):
            row = {"id": f"{number % 4:06d}", "verdict": "reject", "issue": ISSUES[number]}
            assert ask(server, "/verdict", row)[0] == 200

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert sorted(row["issue"] for row in rows) == sorted(ISSUES * 5)


def test_a_browser_that_hangs_up_is_no_error(folder, capfd):
    (folder / "000000.mp4").write_bytes(bytes(50_000_000))
    with review.ReviewServer(folder, 0) as server:
        server.daemon_threads = False  # so that the end of the block waits for the connection
        threading.Thread(target=server.handle_request).start()
        with socket.create_connection(server.server_address[:2]) as connection:
            connection.sendall(b"GET /video/000000.mp4 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
    assert capfd.readouterr() == ("", "")


def test_command_lines_that_cannot_be_used(folder, capsys):
    def says(*words):
        assert command_line.run_main(review.main, [str(folder), "--no-browser", *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
        return captured.err

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} cannot be used (address already in use): choose another with --port" in says(
            f"--port={port}"
        )
    assert "--port must be between 0 and 65535, got 65536" in says("--port=65536")
    (folder / "verdicts.jsonl").write_text("3\n")
    assert "line 1 must be an object" in says("--port=0")
    (folder / "clips.jsonl").unlink()
    assert "clips.jsonl does not exist" in says("--port=0")


PROGRAM = """
import signal
import sys
from emv3_jax import command_line
from emv3_jax.training import review
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background does not listen to it
sys.exit(command_line.run_main(review.main))
"""


def start(folder):
    """The program in a process of its own, and the port that it names."""
    command = [sys.executable, "-c", PROGRAM, str(folder), "--port=0", "--no-browser"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, process.stdout.readline()


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_program_ends_and_keeps_what_was_said(folder, number):
    (folder / "verdicts.jsonl").write_text('{"id": "000003", "verd')
    process, first = start(folder)
    note = f"note: {folder / 'verdicts.jsonl'}, line 1 is broken off and left out\n"
    line = process.stdout.readline()
    port = re.fullmatch(r"4 of 4 clips wait for a verdict at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends\)\n", line)[1]
    assert first == note
    for id, verdict, issue in [("000000", "keep", None), ("000001", "reject", "motion"), ("000002", "keep", None)]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)) as connection:
            body = json.dumps({"id": id, "verdict": verdict, "issue": issue})
            connection.request("POST", "/verdict", body, {"Content-Type": "application/json"})
            assert connection.getresponse().status == 200
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out.strip(), err) == {
        signal.SIGINT: (0, "2 kept, 1 rejected, 1 left", ""),
        signal.SIGTERM: (143, "", "terminated\n"),
        signal.SIGKILL: (-9, "", ""),
    }[number]
    assert read_verdicts(folder) == {
        "000000": Verdict("keep"),
        "000001": Verdict("reject", "motion"),
        "000002": Verdict("keep"),
    }


def test_the_browser_is_opened_unless_it_shall_not(folder, monkeypatch, capsys):
    opened = threading.Event()
    addresses = []
    monkeypatch.setattr(review.webbrowser, "open", lambda address: (addresses.append(address), opened.set()))

    def serve(self):
        assert opened.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(review.ReviewServer, "serve_forever", serve)
    assert review.main([str(folder), "--port=0"]) == 0
    out = capsys.readouterr().out
    assert addresses[0] in out and out.endswith("\n0 kept, 0 rejected, 4 left\n")
    assert review.main([str(folder), "--port=0", "--no-browser"]) == 0 and len(addresses) == 1


def test_the_port_is_free_again_at_once(folder):
    with review.ReviewServer(folder, 0) as server:
        port = server.server_address[1]
        with pytest.raises(UserError, match=f"port {port} cannot be used"):
            review.ReviewServer(folder, port)
    with review.ReviewServer(folder, port) as server:
        assert server.address == f"http://127.0.0.1:{port}/"


class Page:
    """The page in a browser, as a person sees and uses it."""

    def __init__(self, browser):
        self.browser = browser

    def text(self, id):
        return self.browser.find_element("id", id).text

    def wait(self, test, what):
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 60, poll_frequency=0.05).until(lambda _: test(), what)

    def shows(self, *seen):
        """Waits for a position, a verdict and counts."""
        self.wait(
            lambda: tuple(map(self.text, ("position", "verdict", "counts"))) == seen,
            f"{seen} is not shown",
        )

    def press(self, key):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(key).perform()

    def click(self, issue):
        self.browser.find_element("css selector", f"[data-issue={issue}]").click()

    def video(self, expression):
        return self.browser.execute_script(f"const video = document.querySelector('video'); return {expression}")


@pytest.fixture
def page(tmp_path, server):
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as browser:
        browser.get(server.address)
        yield Page(browser)


def test_a_person_reviews_clips(page, folder):
    page.shows("1 of 4", "No verdict yet", "0 kept, 0 rejected, 4 left")
    about = [page.text(id) for id in ("prompt", "task", "id")]
    assert about == ["A puppet nods, <b>take 0</b>.", "i2v", "000000"]
    buttons = page.browser.find_elements("css selector", "#issues button")
    assert [button.accessible_name for button in buttons] == [f"Reject: {issue.capitalize()}" for issue in ISSUES]
    assert page.browser.execute_script("const {scrollWidth: w, scrollHeight: h} = document.body; return [w, h]") == (
        page.browser.execute_script("return [innerWidth, innerHeight]")
    )

    page.press("k")
    page.shows("2 of 4", "No verdict yet", "1 kept, 0 rejected, 3 left")
    page.wait(lambda: page.video("!video.paused && video.currentTime > 0.1"), "the video does not play after a key")
    assert page.video("video.loop && !video.muted && video.videoWidth === 64 && Math.abs(video.duration - 1) < 0.2")
    page.press(" ")
    page.wait(lambda: page.video("video.paused") and page.text("play").startswith("Play"), "space does not pause")
    page.video("(video.currentTime = 0.8)")
    page.wait(lambda: page.video("!video.seeking && Math.abs(video.currentTime - 0.8) < 0.01"), "it does not seek")

    page.click("anatomy")
    page.shows("3 of 4", "No verdict yet", "1 kept, 1 rejected, 2 left")
    page.press(" ")  # the clicked button must not be pressed once more
    page.press("\ue012")  # arrow left
    page.shows("2 of 4", "Rejected: anatomy", "1 kept, 1 rejected, 2 left")
    page.press("\ue014")
    page.shows("3 of 4", "No verdict yet", "1 kept, 1 rejected, 2 left")

    page.press("u")
    page.shows("2 of 4", "No verdict yet", "1 kept, 0 rejected, 3 left")
    page.press("8")
    page.shows("3 of 4", "No verdict yet", "1 kept, 1 rejected, 2 left")
    page.browser.refresh()
    page.shows("3 of 4", "No verdict yet", "1 kept, 1 rejected, 2 left")
    page.press("u")  # after a reload it is still known which was the last
    page.shows("2 of 4", "No verdict yet", "1 kept, 0 rejected, 3 left")
    rows = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert [(row["id"], row["verdict"], row["issue"]) for row in rows] == [
        ("000000", "keep", None),
        ("000001", "reject", "anatomy"),
        ("000001", None, None),
        ("000001", "reject", "other"),
        ("000001", None, None),
    ]
    check_failure_and_end(page, folder)


def check_failure_and_end(page, folder):
    """From the second of four clips on, the first of which is kept."""
    path, aside = folder / "verdicts.jsonl", folder / "aside"
    path.rename(aside)
    path.mkdir()
    page.press("k")
    page.wait(lambda: "Not saved, please try again (clip 000001)" in page.text("error"), "a failure is not visible")
    page.shows("2 of 4", "No verdict yet", "1 kept, 0 rejected, 3 left")
    path.rmdir()
    aside.rename(path)
    page.press("1")
    page.shows("3 of 4", "No verdict yet", "1 kept, 1 rejected, 2 left")
    assert page.text("error") == ""
    page.press("k")
    page.shows("4 of 4", "No verdict yet", "2 kept, 1 rejected, 1 left")
    page.wait(lambda: page.video("video.videoWidth === 64"), "a video with an odd name is not shown")
    page.press("2")
    end = "All clips are reviewed\n2 kept, 2 rejected\nLips: 1\nMotion: 1"
    page.wait(lambda: page.text("done") == end, "the end is not said")
    page.press("k")  # nothing to keep
    page.press("u")
    page.shows("4 of 4", "No verdict yet", "2 kept, 1 rejected, 1 left")
    assert list(read_verdicts(folder)) == ["000000", "000001", "000002"]
