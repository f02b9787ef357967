"""A cluster of two raylets on 127.0.0.1, in a process of its own: prints its address, and ends with its input."""

from __future__ import annotations

import socket
import sys

from ray.cluster_utils import Cluster


def ports(*names: str) -> dict[str, int]:
    """Free ports by name; known from the start, since a raylet gives its helpers seconds only to tell theirs."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    found = {name: one.getsockname()[1] for name, one in zip(names, held, strict=True)}
    for one in held:
        one.close()
    return found


def main() -> None:
    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(
            num_cpus=4,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            node_ip_address="127.0.0.1",
            **ports(
                "node_manager_port",
                "object_manager_port",
                "metrics_agent_port",
                "metrics_export_port",
                "dashboard_agent_listen_port",
                "runtime_env_agent_port",
            ),
        )
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
