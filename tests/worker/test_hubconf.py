"""What a checkout sees of its process; asked from inside of a worker, since that is where it lives."""

from __future__ import annotations

import random
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch

from isohub import errors
from isohub.worker.hubconf import seed_everything


def write(directory, text, **others):
    (directory / "hubconf.py").write_text(text)
    for name, content in others.items():
        (directory / f"{name}.py").write_text(content)
    return directory


def test_the_checkout_is_first_on_the_path_and_hubconf_has_its_name(session, tmp_path):
    write(tmp_path, "import sys\ndef look():\n    return sys.path[0], __name__, __file__, 'hubconf' in sys.modules\n")
    assert session.load(tmp_path, "look") == (str(tmp_path), "hubconf", str(tmp_path / "hubconf.py"), True)


def test_what_hubconf_defines_can_be_pickled_in_its_worker(session, tmp_path):
    write(
        tmp_path,
        "import pickle\nclass Thing:\n    pass\ndef there_and_back():\n    return type(pickle.loads(pickle.dumps(Thing()))) is Thing\n",
    )
    assert session.load(tmp_path, "there_and_back") is True


def test_the_working_directory_shows_the_checkout_and_takes_new_files(session, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("a")
    write(
        tmp_path,
        "import os\ndef look():\n    open('new', 'w').close()\n    return sorted(os.listdir('.')), open('configs/a.yaml').read()\n",
    )
    assert session.load(tmp_path, "look") == (["configs", "hubconf.py", "new"], "a")
    assert not (tmp_path / "new").exists()


def test_two_repos_with_modules_of_one_name(session, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "def value():\n    import utils\n    return utils.VALUE\n", utils=f"VALUE = {name!r}\n")
    assert [session.load(tmp_path / name, "value") for name in ("one", "two", "one")] == ["one", "two", "one"]


def test_dependencies_may_be_modules_of_the_repo_itself(session, tmp_path):
    write(tmp_path, "dependencies = ['torch', 'own_part', 'json']\ndef value():\n    return 1\n", own_part="")
    assert session.load(tmp_path, "value") == 1
    write(tmp_path, "dependencies = ['torch', 'own_part', 'no_such_part_at_all']\ndef value():\n    return 1\n")
    with pytest.raises(errors.MissingDependenciesError, match="no_such_part_at_all"):
        session.load(tmp_path, "value")


@pytest.fixture
def weights():
    """A server with one file of weights a path, that counts what it is asked for."""

    class Handler(BaseHTTPRequestHandler):
        asked: list[str] = []

        def do_GET(self):
            self.asked.append(self.path)
            import io

            buffer = io.BytesIO()
            torch.save({"owner": self.path}, buffer)
            self.send_response(200)
            self.send_header("Content-Length", str(len(buffer.getvalue())))
            self.end_headers()
            self.wfile.write(buffer.getvalue())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Handler.asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("loopback_weights")
def test_weights_are_kept_and_two_repos_files_of_one_name_never_meet(session, tmp_path, weights):
    url, asked = weights
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(
            tmp_path / name,
            f"import torch\ndef owner():\n    return torch.hub.load_state_dict_from_url('{url}/{name}/model.pth', progress=False)['owner']\n",
        )
    for name in ("one", "two", "one", "two"):
        assert session.load(tmp_path / name, "owner") == f"/{name}/model.pth"
    assert sorted(asked) == ["/one/model.pth", "/two/model.pth"]


def test_seeds_give_what_a_user_gets_by_hand():
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        seed_everything((1 << 40) + 7)
        drawn = torch.rand(3), np.random.rand(3), random.random()
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
    code = f"import torch, random, numpy as n; torch.manual_seed({(1 << 40) + 7}); n.random.seed(7); random.seed({(1 << 40) + 7}); print(torch.rand(3).tolist(), n.random.rand(3).tolist(), random.random())"
    by_hand = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert by_hand == f"{drawn[0].tolist()} {drawn[1].tolist()} {drawn[2]}"
