"""A handle in a real notebook kernel: cells that are interrupted, cells that await, completion, and a restart."""

from __future__ import annotations

import time

import psutil
import pytest
from jupyter_client.manager import KernelManager

from tests.conftest import HUBS, eventually

_PATIENCE_S = 60


class Notebook:
    """A kernel, and the front end's side of it."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(extra_arguments=["--HistoryManager.enabled=False"])
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=_PATIENCE_S)

    def begin(self, cell: str) -> str:
        return self.client.execute(cell)

    def end(self, cell_id: str) -> tuple[str, str]:
        """What a cell printed and showed, and the name of its error or nothing."""
        shown, error = [], ""
        while True:
            message = self.client.get_iopub_msg(timeout=_PATIENCE_S)
            if message["parent_header"].get("msg_id") != cell_id:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                shown.append(content["text"])
            elif kind == "execute_result":
                shown.append(content["data"]["text/plain"])
            elif kind == "error":
                error = content["ename"]
            elif kind == "status" and content["execution_state"] == "idle":
                return "".join(shown).strip(), error

    def run(self, cell: str) -> tuple[str, str]:
        return self.end(self.begin(cell))

    def reply(self, message_id: str) -> dict:
        while True:
            message = self.client.get_shell_msg(timeout=_PATIENCE_S)
            if message["parent_header"].get("msg_id") == message_id:
                return message["content"]

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def notebook():
    opened = Notebook()
    try:
        assert opened.run("import isohub, torch, os, time") == ("", "")
        assert opened.run(
            f"h = isohub.load({str(HUBS / 'good')!r}, 'mlp', seed=1); x = torch.ones(1, 4); a = h(x)"
        ) == (
            "",
            "",
        )
        assert opened.run(f"slow = isohub.load({str(HUBS / 'sleeps_in_call')!r}, 'model')") == ("", "")
        yield opened
    finally:
        opened.close()


def test_the_stop_button_ends_a_call_and_the_next_cell_goes_on(notebook):
    cell = notebook.begin("print('begun'); h.run(lambda module: __import__('time').sleep(120))")
    began = time.monotonic()
    while notebook.client.get_iopub_msg(timeout=_PATIENCE_S)["msg_type"] != "stream":
        pass
    notebook.manager.interrupt_kernel()
    assert notebook.end(cell)[1] == "KeyboardInterrupt"
    assert time.monotonic() - began < 60  # far less than it would have slept
    assert notebook.run("torch.equal(h(x), a)") == ("True", "")


def test_a_cell_may_await_a_call_and_give_it_up(notebook):
    assert notebook.run("torch.equal(await h.call_async(x), a)") == ("True", "")
    assert notebook.run("import asyncio; await asyncio.wait_for(slow.call_async(x), 0.5)")[1] == "TimeoutError"
    assert notebook.run("slow(x, 0.0).tolist() == x.tolist()") == ("True", "")


def test_a_handle_shows_itself_completes_and_is_asked_for_help(notebook):
    assert notebook.run("h")[0].startswith("Mlp(")
    matches = notebook.reply(notebook.client.complete("h.state_d"))["matches"]
    assert "state_dict" in [match.rpartition(".")[2] for match in matches]
    found = notebook.reply(notebook.client.inspect("h.forward"))
    assert found["found"]
    assert "x" in found["data"]["text/plain"]


def test_a_restarted_kernel_leaves_no_worker(notebook):
    pid = int(notebook.run("print(os.getpid())")[0])
    children = psutil.Process(pid).children(recursive=True)
    assert children
    notebook.manager.restart_kernel(now=True)
    notebook.client.wait_for_ready(timeout=_PATIENCE_S)
    assert eventually(lambda: not any(child.is_running() for child in children))
