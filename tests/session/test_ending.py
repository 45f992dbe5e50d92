"""Forks, loaders, threads at exit, exit handlers, spawned children, notebooks: what a handle does in each."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import isohub
from isohub import errors
from tests.conftest import HUBS

GOOD = str(HUBS / "good")


def run(code, *arguments, status=0, timeout=100):
    """A program's output; it must end by itself, with this status."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code), GOOD, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done


class Mapped(torch.utils.data.Dataset):
    """Uses a handle that its maker loaded."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.model(torch.full((1, 4), float(index)))


class Late(torch.utils.data.Dataset):
    """Loads in whichever process uses it."""

    model = None

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.model is None:
            self.model = isohub.load(GOOD, "mlp", seed=1)
        with torch.no_grad():  # a loader's process sends no tensor with a graph, whoever made it
            return self.model(torch.full((1, 4), float(index)))


@pytest.mark.filterwarnings("ignore:Got pickle error:UserWarning", "ignore:.*fork:DeprecationWarning")
def test_a_handle_in_a_loader_s_process_says_what_to_do(session, hub):
    handle = session.load(hub("good"), "mlp")
    here = list(torch.utils.data.DataLoader(Mapped(handle), batch_size=None, num_workers=0))
    assert len(here) == 2  # the control
    loader = torch.utils.data.DataLoader(Mapped(handle), batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(errors.SessionClosedError, match="(?s)forked process.*DataLoader.*num_workers=0") as caught:
        list(loader)
    assert "worker_init_fn" in str(caught.value)
    spawned = torch.utils.data.DataLoader(
        Mapped(handle), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    with pytest.raises(
        TypeError, match=r"cannot be copied or pickled(.|\n)*isohub.load\(\) in the process that needs it"
    ):
        list(spawned)
    assert handle(torch.ones(1, 4)).shape == (1, 2)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_loader_s_processes_may_load_by_themselves(session, hub):
    handle = session.load(hub("good"), "mlp", seed=1)
    isohub.load(hub("good"), "mlp").close()  # a default session, and its threads, in the parent of the forks
    loader = torch.utils.data.DataLoader(Late(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for index, answer in enumerate(loader):
        assert torch.equal(answer, handle(torch.full((1, 4), float(index))))


def test_a_child_by_spawn_loads_by_itself(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys, torch, isohub
            handle = None
            def work(seed):
                return isohub.load(sys.argv[1], 'mlp', seed=seed)(torch.ones(1, 4)).tolist()
            if __name__ == '__main__':
                handle = isohub.load(sys.argv[1], 'mlp', seed=1)
                with multiprocessing.get_context('spawn').Pool(2) as pool:
                    answers = pool.map(work, [1, 1])
                print(answers == [handle(torch.ones(1, 4)).tolist()] * 2)
            """
        )
    )
    done = subprocess.run([sys.executable, script, GOOD], capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_several_processes_of_tests_at_once(tmp_path):
    """As pytest-xdist has them: each with a session of its own, all with one cache and one directory of records."""
    code = (
        "import sys, torch, isohub\n"
        "for _ in range(2):\n"
        "    with isohub.Session(cache_dir=sys.argv[2]) as own:\n"
        "        print(own.load(sys.argv[1], 'mlp', seed=1)(torch.ones(1, 4)).tolist())\n"
    )
    variables = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, GOOD, tmp_path / "cache"], stdout=subprocess.PIPE, text=True, env=variables
        )
        for _ in range(4)
    ]
    answers = [child.communicate(timeout=100)[0] for child in children]
    assert [child.returncode for child in children] == [0] * 4
    assert len(set(answers)) == 1
    assert len(answers[0].splitlines()) == 2
    assert list((tmp_path / "isohub").iterdir()) == []


def test_daemon_threads_that_call_while_python_ends():
    done = run(
        """
        import atexit, sys, threading, time, torch, isohub
        handle = isohub.load(sys.argv[1], 'mlp')
        ended = []
        def work():
            try:
                while True:
                    handle(torch.ones(1, 4))
            finally:
                ended.append(1)
        def loads():
            try:
                while True:
                    isohub.load(sys.argv[1], 'mlp').close()
            finally:
                ended.append(2)
        threads = [threading.Thread(target=target, daemon=True) for target in (work, work, loads)]
        for thread in threads: thread.start()
        time.sleep(0.5)
        import weakref
        def last():
            for thread in threads: thread.join(30)
            print(sorted(ended), flush=True)
        # Exit handlers run last in, first out: isohub's was there before this, so put ours below it.
        atexit.unregister(weakref.finalize._exitfunc)
        atexit.register(last)
        atexit.register(weakref.finalize._exitfunc)
        """
    )
    assert (done.stdout, done.stderr) == ("[1, 1, 2]\n", "")


def test_a_long_call_of_a_daemon_does_not_hold_python():
    done = run(
        """
        import sys, threading, time, torch, isohub
        handle = isohub.load(sys.argv[1], 'mlp')
        thread = threading.Thread(target=lambda: handle.run(lambda module: __import__('time').sleep(600)), daemon=True)
        thread.start()
        future = handle.submit(torch.ones(1, 4))
        time.sleep(0.3)
        """
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_threads_that_are_no_daemons_are_waited_for():
    done = run(
        """
        import sys, threading, time, torch, isohub
        handle = isohub.load(sys.argv[1], 'mlp')
        def work():
            time.sleep(0.5)
            for _ in range(20):
                answer = handle(torch.ones(1, 4))
            print(tuple(answer.shape), isohub.load(sys.argv[1], 'mlp')(torch.ones(2, 4)).shape[0], flush=True)
        threading.Thread(target=work).start()
        """
    )
    assert (done.stdout, done.stderr) == ("(1, 2) 2\n", "")


def test_exit_handlers_of_the_user_s():
    """Those that were registered after isohub's first load run before its end, the others after it."""
    done = run(
        """
        import atexit, sys, torch
        def after():
            try:
                handle(torch.ones(1, 4))
            except isohub.errors.SessionClosedError as error:
                print('closed:', error.hint, flush=True)
        atexit.register(after)
        import isohub
        handle = isohub.load(sys.argv[1], 'mlp')
        atexit.register(lambda: print(tuple(handle(torch.ones(1, 4)).shape), flush=True))
        """
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "(1, 2)"
    assert lines[1:] in (["closed: load it again"], [])  # none where another module's handler ran the exits before


def test_a_handle_that_python_s_end_collects_says_nothing():
    done = run(
        """
        import sys, torch, isohub
        class Holder:
            def __init__(self): self.handle = isohub.load(sys.argv[1], 'mlp', restart='on-death')
            def __del__(self): self.handle.close()
        holder = Holder()
        holder.itself = holder
        """
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_a_notebook_goes_on_after_an_interrupt():
    """Cells one after another in one interpreter, as a kernel runs them; SIGINT in the middle of two of them."""
    done = run(
        """
        import code, os, signal, sys, threading
        shell = code.InteractiveInterpreter()
        def cell(text, interrupt_s=None):
            if interrupt_s is not None:
                threading.Timer(interrupt_s, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                exec(compile(text, '<cell>', 'exec'), shell.locals)
            except KeyboardInterrupt:
                print('interrupted', flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cell('import isohub, torch, sys, time')
        cell("h = isohub.load(sys.argv[1], 'mlp', seed=1, restart='on-death'); a = h(torch.ones(1, 4))")
        cell('h.run(lambda module: __import__("time").sleep(60))', 0.5)
        cell('print(torch.equal(h(torch.ones(1, 4)), a))')
        cell('while True: h(torch.ones(1, 4))', 0.5)
        cell('import warnings; warnings.simplefilter("ignore"); print(torch.equal(h(torch.ones(1, 4)), a))')
        cell('print(h)')
        """
    )
    assert done.stdout.splitlines()[:4] == ["interrupted", "True", "interrupted", "True"]
    assert done.stdout.splitlines()[4].startswith("Mlp(")
    assert done.stderr == ""
