"""The cloud half as a server: Open Inference Protocol V2, batching, tokens, budgets, metrics.

`create_app(repository, settings)` is an ASGI application that owns nothing of its process; `serve` puts it behind
listeners for REST and gRPC on one machine. Needs the extra `cloud`, and no torch.
"""

from louver.cloud.app import App, create_app
from louver.cloud.repository import Repository
from louver.cloud.server import Addresses, Listening, Started, serve
from louver.cloud.settings import Batching, Limits, Settings

__all__ = [
    "Addresses",
    "App",
    "Batching",
    "Limits",
    "Listening",
    "Repository",
    "Settings",
    "Started",
    "create_app",
    "serve",
]
