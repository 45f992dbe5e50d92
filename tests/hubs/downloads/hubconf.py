"""Downloads in every way that torch.hub's users know."""

dependencies = ["torch"]

import os
import threading

import torch
from torch.hub import download_url_to_file as imported_at_the_top
from torch.utils import model_zoo


class Net(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        self.weight = torch.nn.Parameter(state["weight"].clone())

    def forward(self, x):
        return x * self.weight


def model(url, **kwargs):
    """A model with the weights of a URL."""
    return Net(torch.hub.load_state_dict_from_url(url, progress=False, **kwargs))


def zoo(url):
    return Net(model_zoo.load_url(url, progress=False))


def file(url, name="file.bin", hash_prefix=None):
    """Download by the function that was imported before anything ran; what is there then."""
    imported_at_the_top(url, name, hash_prefix, progress=False)
    with open(name, "rb") as stream:
        return stream.read(), os.path.realpath(name)


def caught(url, hash_prefix=None):
    """What is raised, and what a fallback would see."""
    try:
        file(url, hash_prefix=hash_prefix)
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "code", None)
    return None


def into(url, place):
    torch.hub.download_url_to_file(url, place, progress=False)


def in_threads(url, count):
    """Several threads at once, one URL each."""
    found = {}

    def work(number):
        name = f"thread{number}.bin"
        torch.hub.download_url_to_file(f"{url}{number}", name, progress=False)
        with open(name, "rb") as stream:
            found[number] = stream.read()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def after_the_answer(url):
    """A thread that asks when nobody waits for this worker any more."""
    state = {"gate": threading.Event(), "said": None}

    def work():
        state["gate"].wait(30)
        try:
            torch.hub.download_url_to_file(url, "late.bin", progress=False)
            state["said"] = "downloaded"
        except BaseException as error:
            state["said"] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=work)
    thread.start()

    class Late:
        def go(self):
            state["gate"].set()

        def said(self):
            return state["said"]

    return Late()


def in_a_fork(url):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.hub.download_url_to_file(url, "fork.bin", progress=False)
            os.write(write, b"downloaded" if not os.path.islink("fork.bin") else b"linked")
        except BaseException as error:
            os.write(write, type(error).__name__.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(read, 100).decode()


def nested(repo, name="model", **kwargs):
    """As MiDaS does: a model of another repo's, by torch.hub itself."""
    return torch.hub.load(repo, name, trust_repo=True, verbose=False, **kwargs)


def places():
    return torch.hub.get_dir(), os.environ.get("TORCH_HOME")


def mirror(first, second, seconds):
    """An alarm ends the first download, and a second address is tried: a usual fallback."""
    import signal

    def alarm(*_):
        raise TimeoutError("the mirror is slow")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        torch.hub.download_url_to_file(first, "a.bin", progress=False)
    except TimeoutError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    torch.hub.download_url_to_file(second, "b.bin", progress=False)
    with open("b.bin", "rb") as stream:
        return stream.read()


def within_a_download(url):
    """A signal handler that downloads while a download is under way."""
    import signal

    said = []

    def alarm(*_):
        try:
            torch.hub.download_url_to_file(url + "?2", "c.bin", progress=False)
        except RuntimeError as error:
            said.append(str(error))

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        torch.hub.download_url_to_file(url, "a.bin", progress=False)
    finally:
        signal.signal(signal.SIGALRM, before)
    return said


def in_a_directory(first, second, name=None):
    states = [
        torch.hub.load_state_dict_from_url(url, model_dir="ck", progress=False, file_name=name) for url in (first, second)
    ]
    return [state["weight"].item() for state in states]


def rewrites(url):
    """As training code does: the checkpoint is written again in its place."""
    torch.hub.download_url_to_file(url, "w.pth", progress=False)
    torch.save({"weight": torch.tensor([7.0])}, "w.pth")
    return os.path.islink("w.pth"), torch.load("w.pth")["weight"].item()


def mistake(kind):
    """What a repo gets wrong, and hears of itself."""
    wrong = {
        "hash": lambda: torch.hub.download_url_to_file("http://127.0.0.1:1/x", "x", 12345678),
        "repo": lambda: torch.hub.load(12, "model", trust_repo=True),
        "surrogate": lambda: torch.hub.download_url_to_file("http://127.0.0.1:1/\ud800", "x"),
        "directory": lambda: torch.hub.download_url_to_file("http://127.0.0.1:1/x", "."),
    }
    try:
        wrong[kind]()
    except Exception as error:
        return type(error).__name__
    return "nothing"


_SINGLE = []


def single():
    """The same object at every call."""
    if not _SINGLE:
        _SINGLE.append(torch.nn.Linear(1, 1))
    return _SINGLE[0]


def in_loader(url):
    """A DataLoader's worker is a fork."""
    return in_a_fork(url)


def late(seed=0, device=None, width=1):
    return seed, device, width
