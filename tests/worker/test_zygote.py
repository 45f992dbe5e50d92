"""The process that forks: one thread, no parallel operator, no secret, and every fork as good as a fresh process."""

from __future__ import annotations

import os

import psutil
import pytest
import torch

import isohub
from tests.conftest import eventually, spare_of


@pytest.fixture(scope="module")
def own(hub):
    with isohub.Session(timeout_s=60) as opened:
        with opened.load(hub("good"), "mlp"):
            yield opened


def test_a_fork_may_run_parallel_operators(own, hub):
    """After a parallel region in the parent, libgomp hangs in its forks; so none may have run there."""

    def work(module):
        import numpy as np

        a = torch.rand(700, 700)
        conv = torch.nn.Conv2d(16, 16, 3)(torch.rand(4, 16, 64, 64))
        return (
            float((a @ a).sum()),
            conv.shape,
            float((np.ones((300, 300)) @ np.ones((300, 300))).sum()),
            torch.get_num_threads(),
        )

    for _ in range(3):
        with own.load(hub("edits_sys_path"), "model") as handle:
            total, shape, product, threads = handle.run(work)
            assert total > 0
            assert shape == (4, 16, 62, 62)
            assert product == 300.0**3
            assert threads == torch.get_num_threads()


def test_a_fork_may_use_processes_threads_and_loaders(own, hub):
    def work(module):
        import subprocess
        from concurrent.futures import ThreadPoolExecutor

        from torch.utils.data import DataLoader, TensorDataset

        data = TensorDataset(torch.arange(20.0))
        loaded = sum(float(batch[0].sum()) for batch in DataLoader(data, batch_size=5, num_workers=2))
        with ThreadPoolExecutor(3) as threads:
            doubled = sum(threads.map(lambda i: i * 2, range(5)))
        said = subprocess.run(["echo", "hello"], capture_output=True, text=True, check=True).stdout
        return loaded, doubled, said

    with own.load(hub("edits_sys_path"), "model") as handle:
        assert handle.run(work) == (190.0, 20, "hello\n")


def test_a_fork_may_script_trace_and_train(own, hub):
    def work(module):
        import warnings

        warnings.simplefilter("ignore")
        net = torch.nn.Linear(3, 2)
        traced = torch.jit.trace(net, torch.ones(1, 3))
        scripted = torch.jit.script(net)
        optimiser = torch.optim.Adam(net.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            net(torch.ones(4, 3)).square().mean().backward()
            optimiser.step()
        return traced(torch.ones(1, 3)).shape, scripted(torch.ones(1, 3)).shape

    with own.load(hub("edits_sys_path"), "model") as handle:
        assert handle.run(work) == ((1, 2), (1, 2))


def test_the_zygote_runs_no_repos_code_and_keeps_nothing_of_its_workers(own, hub):
    zygote = psutil.Process(own._pool.warm().pid)
    spare_of(own)
    descriptors = zygote.num_fds()
    for _ in range(5):
        own.load(hub("changes_directory"), "where")
    assert eventually(lambda: zygote.num_fds() == descriptors)  # it tells of an end just before it closes
    with open(f"/proc/{zygote.pid}/maps") as maps:
        assert not any("hubs" in line for line in maps)


def test_a_worker_costs_little_beside_a_process_that_imports_torch(own, hub):
    with own.load(hub("edits_sys_path"), "model") as handle:
        stats = handle.stats()
    assert stats.uss_bytes < stats.rss_bytes / 2  # most of it is the zygote's, shared


def test_a_workers_limits_and_standing(own, hub):
    def look(module):
        import resource

        with open("/proc/self/status") as status:
            lines = dict(line.split(":\t", 1) for line in status.read().splitlines() if ":\t" in line)
        return lines["NoNewPrivs"].strip(), resource.getrlimit(resource.RLIMIT_CORE), os.getpid() == os.getsid(0)

    with own.load(hub("edits_sys_path"), "model") as handle:
        assert handle.run(look) == ("1", (0, 0), True)
        assert "no_new_privs" in handle.confinement.active
