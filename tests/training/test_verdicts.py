"""Verdicts on clips: what is said is kept through kills, and every folder that cannot be used gives one clear line."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from emv3_jax.errors import UserError
from emv3_jax.training import verdicts
from emv3_jax.training.verdicts import ISSUES, Verdict, add_verdict, read_clips, read_verdicts

ROWS = [{"id": f"{i:06d}", "video": f"{i:06d}.mp4", "prompt": "A puppet nods.", "task": "i2v"} for i in range(3)]


def fill(folder, *rows):
    folder.mkdir(exist_ok=True)
    text = "".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "clips.jsonl").write_text(text, encoding="utf-8")
    for row in ROWS:
        (folder / row["video"]).write_bytes(b"video")
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "clips", *ROWS)


def lines(folder):
    return [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]


def test_rows_come_in_order_with_all_their_keys(tmp_path):
    first = {**ROWS[0], "seed": 7, "prompt": "Zwei Zeilen\u2028und mehr"}  # a break that ends no line of JSON
    folder = fill(tmp_path, "\ufeff", first, "\n", ROWS[2], {"id": "b c", "video": "000001.mp4"})
    assert read_clips(folder) == [first, ROWS[2], {"id": "b c", "video": "000001.mp4"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "a", "vid', "line 2 is not JSON"),
        ("[1]", "line 2 must be an object"),
        ({"video": "000001.mp4"}, "line 2: id must be a plain file name, got None"),
        ({"id": "a"}, "line 2: video must be a plain file name, got None"),
        ({"id": 3, "video": "000001.mp4"}, "line 2: id must be a plain file name, got 3"),
        ({"id": "a", "video": "../a.mp4"}, "line 2: video must be a plain file name"),
        ({"id": "a", "video": "/etc/passwd"}, "line 2: video must be a plain file name"),
        ({"id": "a", "video": "C:a.mp4"}, "line 2: video must be a plain file name"),
        ({"id": "a", "video": "b\\a.mp4"}, "line 2: video must be a plain file name"),
        ({"id": "a", "video": "a\n.mp4"}, "line 2: video must be a plain file name"),
        ({"id": "..", "video": "000001.mp4"}, "line 2: id must be a plain file name"),
        ({"id": "", "video": "000001.mp4"}, "line 2: id must be a plain file name"),
        ('{"id": "\\ud800", "video": "000001.mp4"}', "line 2: id must be a plain file name"),
        ({"id": "a", "video": "none.mp4"}, "line 2: video .*none.mp4 does not exist"),
        ({"id": "a", "video": "000001.mp4", "prompt": 3}, "line 2: prompt must be text, got 3"),
        (ROWS[0], "line 2: the id 000000 stands in line 1 already"),
    ],
)
def test_lists_of_clips_that_cannot_be_used(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as info:
        read_clips(fill(tmp_path, ROWS[0], row))
    assert "\n" not in str(info.value)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="folder .*none does not exist"):
        read_clips(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder .*file is a file"):
        read_clips(tmp_path / "file")
    with pytest.raises(UserError, match="list of clips .*clips.jsonl does not exist"):
        read_clips(tmp_path)
    with pytest.raises(UserError, match="holds no clips"):
        read_clips(fill(tmp_path, "\n\n"))
    (tmp_path / "clips.jsonl").write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_clips(tmp_path)


def test_the_last_line_of_an_id_counts(folder):
    assert read_verdicts(folder) == {}
    add_verdict(folder, "000002", "keep", None)
    add_verdict(folder, "000000", "reject", "lips")
    add_verdict(folder, "000001", "keep")
    add_verdict(folder, "000001", None)
    add_verdict(folder, "000002", "reject", "other")
    said = read_verdicts(folder)
    assert list(said.items()) == [("000000", Verdict("reject", "lips")), ("000002", Verdict("reject", "other"))]
    assert [(row["id"], row["verdict"], row["issue"]) for row in lines(folder)] == [
        ("000002", "keep", None),
        ("000000", "reject", "lips"),
        ("000001", "keep", None),
        ("000001", None, None),
        ("000002", "reject", "other"),
    ]
    assert all(row["time"].endswith("+00:00") for row in lines(folder))


@pytest.mark.parametrize(
    ("id", "verdict", "issue", "message"),
    [
        ("000009", "keep", None, "there is no clip '000009'"),
        (["000000"], "keep", None, "there is no clip"),
        ("000000", "reject", None, "a rejected clip needs an issue, one of lips, motion, .*, got None"),
        ("000000", "reject", "smell", "a rejected clip needs an issue, one of lips, motion, .*, got 'smell'"),
        ("000000", "reject", ["lips"], "a rejected clip needs an issue"),
        ("000000", "keep", "lips", "only a rejected clip has an issue"),
        ("000000", None, "lips", "only a rejected clip has an issue"),
        ("000000", "Keep", None, "the verdict must be keep, reject or null, got 'Keep'"),
        ("000000", {}, None, "the verdict must be keep, reject or null"),
    ],
)
def test_what_is_no_verdict_is_not_written(folder, id, verdict, issue, message):
    with pytest.raises(UserError, match=message):
        add_verdict(folder, id, verdict, issue)
    assert not (folder / "verdicts.jsonl").exists()


def test_a_line_that_a_kill_broke_off_anywhere(folder, capsys):
    path = folder / "verdicts.jsonl"
    add_verdict(folder, "000000", "keep")
    before = path.read_bytes()
    add_verdict(folder, "000001", "reject", "flicker")
    whole = path.read_bytes()
    for cut in range(len(before), len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert read_verdicts(folder) == {"000000": Verdict("keep")}
        note = f"note: {path}, line 2 is broken off and left out\n" if cut > len(before) else ""
        assert capsys.readouterr().out == note
        add_verdict(folder, "000002", "keep")
        assert read_verdicts(folder) == {"000000": Verdict("keep"), "000002": Verdict("keep")}
        assert capsys.readouterr().out == note  # the broken line stays what it is
    path.write_bytes(whole[:-1])  # only the line feed is missing: nothing is lost
    add_verdict(folder, "000002", "keep")
    assert list(read_verdicts(folder)) == ["000000", "000001", "000002"]
    assert capsys.readouterr().out == "" and len(lines(folder)) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3", "line 2 must be an object"),
        ('{"verdict": "keep"}', "line 2 must be an object"),
        ('{"id": "a", "verdict": "good"}', "line 2: the verdict must be keep, reject or null"),
        ('{"id": "a", "verdict": "reject", "issue": "smell"}', "line 2: a rejected clip needs an issue"),
    ],
)
def test_whole_lines_that_say_something_else_are_refused(folder, line, message):
    add_verdict(folder, "000000", "keep")
    with open(folder / "verdicts.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        read_verdicts(folder)


def test_a_line_is_on_the_disk_before_it_is_said_to_be(folder, monkeypatch):
    path = folder / "verdicts.jsonl"
    synced = []
    sync = os.fsync
    monkeypatch.setattr(verdicts.os, "fsync", lambda number: (sync(number), synced.append(path.read_text())))
    add_verdict(folder, "000000", "keep")
    add_verdict(folder, "000001", "keep")
    assert '"000000"' in synced[0] and synced[-1] == path.read_text()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(verdicts.os, "fsync", full)
    with pytest.raises(UserError, match="verdicts.jsonl could not be written: no space left on device"):
        add_verdict(folder, "000002", "keep")


def test_killed_while_it_writes(folder):
    code = f"""
from emv3_jax.training.verdicts import ISSUES, add_verdict
n = 0
while True:
    add_verdict({str(folder)!r}, "000001", "reject", ISSUES[n % 8])
    n += 1
    print(n, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = 20 + len(process.stdout.readlines())
    process.wait()
    whole = [line for line in (folder / "verdicts.jsonl").read_text().splitlines() if line.endswith("}")]
    assert said <= len(whole) <= said + 1
    assert read_verdicts(folder) == {"000001": Verdict("reject", ISSUES[(len(whole) - 1) % 8])}
