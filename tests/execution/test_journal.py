import json
import os
import resource
import subprocess
import sys

import pytest

from isohub.errors import ResultsError
from isohub.execution.journal import Journal

HEADER = {"commits": ["a", None], "model": "net"}


def opened(path, header=HEADER):
    return Journal(path, "isohub evaluation", header)


def lines(path, header=HEADER):
    journal = opened(path, header)
    journal.close()
    return journal.lines


def filled(path, rows=3):
    journal = opened(path)
    for number in range(rows):
        journal.append({"row": number})
    journal.close()
    return path


def test_what_was_written_is_there_again(tmp_path):
    path = filled(tmp_path / "r.jsonl")
    again = opened(path)
    assert again.lines == [{"row": 0}, {"row": 1}, {"row": 2}]
    again.append({"row": 3})
    again.close()
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()[1:]] == [0, 1, 2, 3]


@pytest.mark.parametrize("cut", range(1, 11))
def test_a_last_line_that_was_not_written_whole_is_cut_off(tmp_path, cut):
    path = filled(tmp_path / "r.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = opened(path)
    # Less its newline, a line may have been written whole: nobody can tell.
    assert again.lines == [{"row": 0}, {"row": 1}]
    again.append({"row": "new"})
    again.close()
    assert [json.loads(line)["row"] for line in path.read_bytes().splitlines()[-2:]] == [1, "new"]


def test_a_torn_header_begins_anew(tmp_path):
    path = filled(tmp_path / "r.jsonl", 0)
    path.write_bytes(path.read_bytes()[:10])
    assert lines(path) == []


def test_zeros_that_a_loss_of_power_left_are_cut_off(tmp_path):
    path = filled(tmp_path / "r.jsonl")
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    assert len(lines(path)) == 3
    path.write_bytes(filled(tmp_path / "s.jsonl").read_bytes()[:-4] + b"\0" * 50 + b"\n")
    assert len(lines(path)) == 2


def test_damage_in_the_middle_is_an_error_and_the_file_stays(tmp_path):
    path = filled(tmp_path / "r.jsonl")
    lines = path.read_bytes().splitlines(True)
    lines[2] = b"\x1b]0;title\x07{\n"
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="line 3 cannot be read") as caught:
        opened(path)
    assert caught.value.path == str(path)
    assert path.read_bytes() == before


def test_another_file_is_not_touched(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nmore of them\n")
    with pytest.raises(ResultsError, match="no file of results"):
        opened(path)
    assert path.read_text() == "my notes\nmore of them\n"
    path.unlink()
    Journal(path, "isohub bisection", HEADER).close()
    with pytest.raises(ResultsError, match="holds no isohub evaluation"):
        opened(path)


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b'{"a":1}\n', b'{"kind":"isohub bisection","good', b"\x89PNG\0\0", b"\0a"]
)
def test_somebody_else_s_file_of_one_line_is_not_taken_for_a_torn_one(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match="line 1 cannot be read"):
        opened(path)
    assert path.read_bytes() == content


def test_whatever_is_cut_or_damaged_no_other_row_is_read(tmp_path):
    path = filled(tmp_path / "r.jsonl")
    whole = path.read_bytes()
    rows = [{"row": number} for number in range(3)]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found = lines(path)
        assert found == rows[: len(found)]
        assert len(found) == max(0, whole[:cut].count(b"\n") - 1)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = lines(path)
        except ResultsError:
            continue
        assert found == rows[: len(found)]
        assert len(found) >= 1  # damage at the end costs what is there, and no more


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"commits": ["a", None], "model": "other"}, r'model was "net", and is "other"'),
        ({"commits": ["b", None], "model": "net"}, r'commits\[0\] was "a", and is "b"'),
        ({"commits": ["a"], "model": "net"}, "commits was"),
    ],
)
def test_another_question_is_an_error(tmp_path, header, words):
    path = filled(tmp_path / "r.jsonl")
    with pytest.raises(ResultsError, match=words):
        opened(path, header)


def test_what_was_not_known_is_no_difference(tmp_path):
    path = filled(tmp_path / "r.jsonl")
    assert len(lines(path, {"commits": ["a", "b"], "model": "net"})) == 3


def test_one_process_has_the_file_until_it_ends(tmp_path):
    path = filled(tmp_path / "r.jsonl")
    code = (
        "import sys\nfrom isohub.execution.journal import Journal\n"
        f"j = Journal(sys.argv[1], 'isohub evaluation', {HEADER!r})\nprint('has it', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(ResultsError, match="in use"):
            opened(path)
        other.kill()
        other.wait()
        assert len(lines(path)) == 3


def test_a_full_disk_is_an_error_and_what_was_there_stays(tmp_path):
    path = filled(tmp_path / "r.jsonl")
    journal = opened(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))  # as a disk with five bytes left
    try:
        with pytest.raises(ResultsError, match="cannot be written: File too large") as caught:
            journal.append({"row": "more than five bytes"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "goes on from there" in str(caught.value)
    assert path.read_bytes() == before
    journal.append({"row": 3})
    journal.close()
    assert len(lines(path)) == 4


def test_what_is_no_file_is_refused_before_it_is_read():
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResultsError, match="/dev/zero is no regular file"):
        opened("/dev/zero")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(ResultsError, match="cannot be opened: No such file"):
        opened(tmp_path / "no" / "r.jsonl")
