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
