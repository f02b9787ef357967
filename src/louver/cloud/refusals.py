"""What a client is told when it does not get scores: a status of HTTP, a reason, and when to come again."""

from __future__ import annotations

__all__ = ["Refusal", "shown"]


class Refusal(Exception):  # noqa: N818 - named as the style guide names it; an error is what we do, a refusal what they get
    """A request that is not answered with scores. Its reason goes to the client, so it holds no value of a tensor."""

    def __init__(self, status: int, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


def shown(value: object) -> str:
    """What a client sent, short enough for a reason and with nothing that a terminal or a log could trip over."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
