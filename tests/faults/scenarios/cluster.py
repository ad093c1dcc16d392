"""Three nodes with quorum queues behind a load balancer: a leader killed, a minority cut off, all restarted one after the other."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor

from tests.faults.proxy import Proxy
from tests.faults.scenario import scenario
from tests.faults.servers import RabbitServer
from tests.faults.world import Broken, World
from tests.servers import await_startup

NODES = 3
RATE = 300.0
"""Events a second: three brokers share the machine with everything else."""
QUEUE = "faults.faults.placed"
SETTINGS = "cluster_partition_handling = pause_minority\nloopback_users = none\n"


class Cluster:
    """Private nodes, and what stands before them: clients get to the node at `balancer.target_port`."""

    def __init__(self, world: World) -> None:
        self._world = world
        folder = world.servers.folder / f"cluster-{secrets.token_hex(4)}"
        folder.mkdir()
        cookie = secrets.token_hex(16)
        self.nodes = [RabbitServer(folder, f"node{n}", SETTINGS, cookie) for n in range(NODES)]
        for node in self.nodes:
            world.at_end(node.kill)
        with ThreadPoolExecutor(NODES) as pool:
            list(pool.map(start, self.nodes))
        for node in self.nodes[1:]:
            node.ctl("stop_app")
            node.ctl("join_cluster", self.nodes[0].node)
            node.ctl("start_app")
        self.nodes[0].ctl("add_vhost", world.vhost)
        self.nodes[0].ctl("set_permissions", "-p", world.vhost, "guest", ".*", ".*", ".*")
        world.environment["ORDERBUS_BROKER_URL"] = f"{self.nodes[0].url}{world.vhost}"
        self.balancer: Proxy = world.proxy("broker")
        world.broker_url = world.environment["ORDERBUS_BROKER_URL"]
        world.rate = RATE
        world.environment["FAULTS_RATE"] = str(RATE)

    def send_clients_to(self, node: RabbitServer) -> None:
        """As a balancer does whose health check has failed: old connections end, new ones go there."""
        self.balancer.target_port = node.port
        self.balancer.reset_all()

    def leader(self) -> RabbitServer:
        """Where the queue's leader is."""
        lines = self._alive().ctl("list_queues", "-p", self._world.vhost, "name", "leader").splitlines()
        name = dict(line.split("\t")[:2] for line in lines if "\t" in line)[QUEUE]
        return next(node for node in self.nodes if node.node == name)

    def others(self, node: RabbitServer) -> list[RabbitServer]:
        return [other for other in self.nodes if other is not node]

    def await_members(self) -> None:
        """Until every quorum queue has all its members again."""

        def all_online() -> bool:
            lines = self._alive().ctl("list_queues", "-p", self._world.vhost, "name", "online").splitlines()
            return all(line.count("@") == NODES for line in lines if "@" in line)

        self._world.until(all_online, "all members of all queues")

    def _alive(self) -> RabbitServer:
        return next(node for node in self.nodes if node.runs and node.port == self.balancer.target_port)


def start(node: RabbitServer) -> None:
    node.start()
    await_startup(node)


@scenario("cluster-leader-killed")
def leader_killed(world: World) -> None:
    """SIGKILL to the node that leads the queue, with the clients on it or on another one: a follower takes over."""
    cluster = Cluster(world)
    world.begin()
    for with_clients in (True, False):
        leader = cluster.leader()
        other = world.rng.choice(cluster.others(leader))
        cluster.send_clients_to(leader if with_clients else other)
        world.flow(200)
        leader.kill()
        if with_clients:
            cluster.send_clients_to(other)
        world.flow(500)
        start(leader)
        cluster.await_members()
    world.mended()


@scenario("cluster-minority-cut-off")
def minority(world: World) -> None:
    """The node that leads the queue and has the clients loses the two others, who elect a leader; it pauses, then comes back."""
    cluster = Cluster(world)
    world.begin()
    alone = cluster.leader()
    cluster.send_clients_to(alone)
    world.flow(200)
    cut(alone, cluster.others(alone))
    world.until(lambda: "the connection was" in world.role("service").log(), "the clients to be thrown out")
    cluster.send_clients_to(cluster.others(alone)[0])
    world.flow(500)
    if cluster.leader() is alone:
        raise Broken("nobody else was elected")
    for node in cluster.others(alone):
        alone.ctl("eval", f"erlang:set_cookie('{node.node}', erlang:get_cookie()).")
    cluster.await_members()
    world.mended()


def cut(alone: RabbitServer, others: list[RabbitServer]) -> None:
    """Ends its connections to the others, and has it refuse new ones: under another cookie nobody is let in, either way."""
    ends = ", ".join(f"erlang:set_cookie('{node.node}', stranger), erlang:disconnect_node('{node.node}')" for node in others)
    alone.ctl("eval", f"{ends}.")


@scenario("cluster-rolling-restart")
def rolling(world: World) -> None:
    """Each node is stopped, with the clients on it, and started again, as for an upgrade."""
    cluster = Cluster(world)
    world.begin()
    for node in cluster.nodes:
        cluster.send_clients_to(node)
        world.flow(200)
        node.stop()
        cluster.send_clients_to(world.rng.choice(cluster.others(node)))
        world.flow(200)
        start(node)
        cluster.await_members()
    world.mended()
