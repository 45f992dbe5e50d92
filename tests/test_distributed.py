"""Evaluations, comparisons and bisections on a real Ray cluster of several nodes on this machine.

Runs where Ray is installed: ``make ray`` installs it, and takes about a minute and a half with these tests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

import isohub
from isohub.errors import IsohubError, ValueNotTransferableError
from tests.bisection.conftest import shape_of, write_history
from tests.conftest import eventually
from tests.servers.git_repo import GitRepo
from tests.servers.github import GitHubServer

ray = pytest.importorskip("ray", reason="make ray installs it")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of its processes and of what it will call otherwise

HUBCONF = """\
import torch
from scale import SCALE


class Scaled(torch.nn.Module):
    def forward(self, x):
        return x * SCALE


def model():
    return Scaled()
"""


@dataclass
class Nodes:
    """A cluster: a head without cores, and nodes of one core each, with a store and an origin of their own."""

    cluster: object
    nodes: list
    root: Path
    server: GitHubServer

    def add(self) -> object:
        home = self.root / f"store{len(self.nodes)}"
        variables = {"ISOHUB_HOME": str(home), "NODE": str(len(self.nodes)), **self.server.environment}
        self.nodes.append(self.cluster.add_node(num_cpus=1, env_vars=variables, include_dashboard=False))
        return self.nodes[-1]

    def kill(self, node: object) -> None:
        """As if its machine had lost its power: the raylet and all below it, by SIGKILL."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass


def ray_processes() -> list[int]:
    """Descendants of this process that are Ray's."""
    names = ("raylet", "gcs_server", "ray::", "dashboard", "log_monitor")
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(name in " ".join(process.cmdline()) for name in names):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[GitHubServer]:
    with GitHubServer() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def repos(server: GitHubServer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    repo = GitRepo(tmp_path_factory.mktemp("origin") / "clone")
    for scale in (1, 2, 3):
        repo.commit({"hubconf.py": HUBCONF, "scale.py": f"SCALE = {scale}.0\n"})
        repo.tag(f"s{scale}")
    server.add("org", "clone", repo)
    return [f"org/clone:s{scale}" for scale in (1, 2, 3)]


@pytest.fixture(scope="module")
def nodes(server: GitHubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    os.environ["RAY_DISABLE_IMPORT_WARNING"] = "1"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made = Nodes(cluster, [], tmp_path_factory.mktemp("nodes"), server)
    try:
        made.add()
        made.add()
        yield made
    finally:
        ray.shutdown()
        cluster.shutdown()
        left = ray_processes
        assert eventually(lambda: not left(), 20), [psutil.Process(pid).cmdline() for pid in left()]


@pytest.fixture
def executor(nodes: Nodes):
    from isohub.distributed import RayExecutor

    return RayExecutor(nodes.cluster.address)


DATA = [torch.randn(4, 3, generator=torch.Generator().manual_seed(number)) for number in range(16)]
REDUCERS = {"y": "concat", "noise": "list"}


def metric(model, x):
    time.sleep(0.05)
    y = model(x)
    return {"mean": y.mean(), "y": y, "noise": torch.rand(())}


def alike(one, other):
    for row, again in zip(one.rows, other.rows, strict=True):
        assert row.commit == again.commit
        assert row.metrics["mean"] == again.metrics["mean"]
        assert torch.equal(row.metrics["y"], again.metrics["y"])
        assert row.metrics["noise"] == again.metrics["noise"]


@pytest.fixture(scope="module")
def here(repos):
    return isohub.evaluate(metric, repos, "model", DATA, reducers=REDUCERS)


def test_an_evaluation_is_that_of_one_machine_and_each_node_fetches_a_commit_once(executor, nodes, server, repos, here):
    server.forget()
    found = isohub.evaluate(metric, repos, "model", DATA, reducers=REDUCERS, executor=executor)
    alike(found, here)
    assert found.complete
    assert found.lanes == 2
    assert found.threads == 1
    # One archive for each commit that a node has in its store, however many lanes and batches asked for it.
    stored = list(nodes.root.glob("store*/checkouts/*/org/clone/*/checkout.json"))
    assert len({each.parts[-6] for each in stored}) in (1, 2)
    assert server.count("archive/") == len(stored) >= 3


def test_a_node_that_is_killed_midway_changes_nothing(executor, nodes, repos, here, tmp_path):
    killed = []

    def told(done, total):
        if done >= 12 and not killed:
            killed.append(nodes.nodes[1])
            nodes.kill(nodes.nodes[1])

    results = tmp_path / "r.jsonl"
    found = isohub.evaluate(
        metric, repos, "model", DATA, reducers=REDUCERS, executor=executor, progress=told, results=results
    )
    assert killed
    assert found.complete, found
    alike(found, here)
    # What a cluster wrote is what one machine reads.
    again = isohub.evaluate(metric, repos, "model", DATA, reducers=REDUCERS, results=results)
    assert again.resumed == 48
    nodes.cluster.remove_node(nodes.nodes[1], allow_graceful=False)
    nodes.add()


def test_a_stream_and_failures(executor, repos):
    def picky(model, x):
        if x[0, 0] == DATA[3][0, 0]:
            raise KeyError("no")
        return {"mean": model(x).mean()}

    found = isohub.evaluate(picky, repos[:2], "model", iter(DATA[:6]), executor=executor)
    for row in found.rows:
        assert [(each.batch, each.kind, each.tries) for each in row.failures] == [(3, "KeyError", 2)]
        assert len(row.results) == 5


def test_a_comparison_is_that_of_one_machine(executor, repos):
    there = isohub.compare(repos[:2], "model", torch.ones(2, 3), repeats=0, executor=executor)
    local = isohub.compare(repos[:2], "model", torch.ones(2, 3), repeats=0)
    assert there.changed
    assert there.differences == local.differences
    assert [ref.commit for ref in there.refs] == [ref.commit for ref in local.refs]


def test_a_bisection_is_that_of_one_machine(executor, server, tmp_path):
    commits = write_history(tmp_path / "clone", shape_of(100), {47: "1.5"})
    repo = GitRepo.__new__(GitRepo)
    repo.path = tmp_path / "clone"
    server.add("org", "history", repo)
    expected = torch.ones(2)
    offset = 3  # of this module, which no node has

    def test(model):
        return bool(torch.equal(model(expected) + offset, expected + offset))

    found = isohub.bisect("org/history", commits[1], "main", test, model="model", executor=executor)
    local = isohub.bisect("org/history", commits[1], "main", test, model="model", workers=2)
    assert found.first_bad.id == local.first_bad.id == commits[47]
    assert [(probe.commit, probe.verdict) for probe in found.probes] == [
        (probe.commit, probe.verdict) for probe in local.probes
    ]
    outputs = isohub.bisect("org/history", commits[1], "main", model="model", inputs="randn(2)", executor=executor)
    assert outputs.first_bad.id == commits[47]


def test_mistakes(executor, nodes, repos):
    from isohub.distributed import RayExecutor

    with isohub.load(repos[0], "model") as handle, pytest.raises(ValueNotTransferableError):
        isohub.evaluate(lambda model, x: {"a": handle(x)}, repos, "model", DATA, executor=executor)
    with pytest.raises(ValueError, match="workers="):
        isohub.evaluate(metric, repos, "model", DATA, executor=executor, workers=2)
    with pytest.raises(IsohubError, match="placed no lane within 3 s; each needs CPU 64"):
        isohub.evaluate(metric, repos, "model", DATA, executor=RayExecutor(cpus=64, start_s=3))
    with pytest.raises(ValueError, match="cpus"):
        RayExecutor(cpus=0)


def test_workers_are_confined_and_end_with_their_lanes(executor, nodes, repos):
    def where(model, x):
        try:
            with open("/etc/hostname") as file:
                return {"seen": len(file.read())}
        except OSError:
            return {"seen": 0}

    found = isohub.evaluate(where, repos[0], "model", DATA[:4], executor=executor)
    assert found.rows[0].metrics["seen"] == 0

    def workers() -> list[int]:
        found = []
        for node in nodes.nodes:
            if not node.all_processes.get("raylet"):
                continue
            for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
                try:
                    if "isohub/worker/start.py" in " ".join(process.cmdline()):
                        found.append(process.pid)
                except psutil.NoSuchProcess:
                    pass
        return found

    assert eventually(lambda: not workers(), 20)
