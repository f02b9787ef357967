"""How many images each client has used, kept on disk so that neither a restart nor kill -9 gives any back.

What is on disk is always at least what was used: a block is written down before it is used up, and what is left of it
is given back at an orderly end. So a kill costs a client at most one block, and only the request that opens a block
waits for the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from louver.cloud.refusals import Refusal
from louver.cloud.tokens import Client, locked
from louver.errors import StorageError
from louver.storage import DAMAGED, write_json

__all__ = ["Budgets"]

_BLOCKS = 100
"""A block is this part of the smallest limit: what a kill may cost."""

_MOST_REMEMBERED = 2**16


@dataclass(slots=True)
class _Account:
    day: str
    day_rows: int = 0
    total_rows: int = 0
    kept_day_rows: int = 0
    kept_total_rows: int = 0

    @property
    def is_covered(self) -> bool:
        return self.day_rows <= self.kept_day_rows and self.total_rows <= self.kept_total_rows


@dataclass(slots=True, kw_only=True)
class _Paid:
    """A request that was paid for: until when it is free to send again, and how many of it were not given back."""

    day: str
    until: float
    copies: int = 0


class Budgets:
    """The accounts in a file, which one server at a time may hold.

    Raises:
        ConfigError: `path` is a folder.
        StorageError: the file is damaged or cannot be written, or another server holds it.
    """

    def __init__(self, path: Path, *, retry_window_s: float, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._window_s = retry_window_s
        self._seen: OrderedDict[bytes, _Paid] = OrderedDict()
        self._writing = asyncio.Lock()
        self._lock = ExitStack()
        try:
            self._lock.enter_context(locked(path, wait=False))
        except BlockingIOError as error:
            raise StorageError(
                f"{path} is held by another server; name another with --budgets, or stop that one"
            ) from error
        try:
            self._accounts = _read(path)
        except StorageError:
            self._lock.close()
            raise

    def left(self, client: Client) -> int | None:
        """Images that the client may still send, today and at all; None without a limit."""
        account = self._account(client.name)
        limits = [
            most - used
            for most, used in ((client.images_per_day, account.day_rows), (client.images_total, account.total_rows))
            if most is not None
        ]
        return max(0, min(limits)) if limits else None

    def used(self, client: Client) -> int:
        """Images that the client has sent, ever."""
        return self._account(client.name).total_rows

    async def charge(
        self, client: Client, rows: int, model: tuple[str, str], call_id: str, content: bytes
    ) -> Callable[[], None]:
        """Takes `rows` off the client's budget, and gives a function that puts them back if no scores come of them.

        A request that is sent again to the same model with the same id and the same content is free for the window. The
        content counts, since an id alone would be a free pass for any number of images; so does the model, its name and
        version, since over REST the content does not name it, and other weights tell more of the same feature. The
        version is the one that answers: where a request names none, and the bundle was replaced in between, it is
        charged anew.

        Raises:
            Refusal: 403, when the budget does not hold as many.
            StorageError: what was used cannot be written down.
        """
        if not client.has_budget:
            return _nothing
        mark = _mark((client.name, *model, call_id), content) if call_id else None
        now = self._clock()
        account = self._account(client.name)
        paid = self._seen.get(mark) if mark is not None else None
        if paid is None or paid.until <= now:
            left = self.left(client)
            if left is not None and rows > left:
                raise Refusal(403, f"client {client.name} has {left} images left in its budget, and asked for {rows}")
            account.day_rows += rows
            account.total_rows += rows
            paid = _Paid(day=account.day, until=now + self._window_s)
            if mark is not None:
                self._remember(mark, paid, now)
        paid.copies += 1
        bill = paid

        def back() -> None:
            bill.copies -= 1
            if bill.copies:
                return  # the same request, sent again, was computed or still may be
            if mark is not None and self._seen.get(mark) is bill:
                del self._seen[mark]
            account.total_rows -= rows
            if account.day == bill.day:
                account.day_rows -= rows

        if not account.is_covered:
            try:
                await self._cover(client, account)
            except (StorageError, asyncio.CancelledError):
                back()
                raise
        return back

    async def _cover(self, client: Client, account: _Account) -> None:
        """Writes down a block more than is used; those who wait for the same block wait for one write."""
        async with self._writing:
            if account.is_covered:
                return
            block = max(1, min(most for most in (client.images_per_day, client.images_total) if most) // _BLOCKS)
            kept = account.day, account.day_rows + block, account.total_rows + block
            content = self._content({client.name: kept})
            await asyncio.to_thread(write_json, self._path, content)
            if account.day == kept[0]:
                account.kept_day_rows = kept[1]
            account.kept_total_rows = kept[2]

    def close(self) -> None:
        """Writes down what was used, to the image, and lets go of the file."""
        for account in self._accounts.values():
            account.kept_day_rows, account.kept_total_rows = account.day_rows, account.total_rows
        try:
            if self._accounts:
                write_json(self._path, self._content({}))
        finally:
            self._lock.close()

    def _account(self, name: str) -> _Account:
        day = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%d")
        account = self._accounts.setdefault(name, _Account(day=day))
        if account.day < day:  # a clock that is set back gives no new day
            account.day, account.day_rows, account.kept_day_rows = day, 0, 0
        return account

    def _remember(self, mark: bytes, paid: _Paid, now: float) -> None:
        self._seen[mark] = paid
        self._seen.move_to_end(mark)
        while self._seen and (len(self._seen) > _MOST_REMEMBERED or next(iter(self._seen.values())).until <= now):
            self._seen.popitem(last=False)

    def _content(self, planned: Mapping[str, tuple[str, int, int]]) -> dict[str, object]:
        kept = {name: (one.day, one.kept_day_rows, one.kept_total_rows) for name, one in self._accounts.items()}
        accounts = {
            name: {"day": day, "day_images": day_rows, "total_images": total_rows}
            for name, (day, day_rows, total_rows) in sorted({**kept, **planned}.items())
        }
        return {"accounts": accounts}


def _nothing() -> None:
    """Puts nothing back."""


def _mark(names: Iterable[str], content: bytes) -> bytes:
    """What only the same names with the same content have: each name goes in with its length, for ids hold any sign."""
    key = hashlib.sha256()
    for name in names:
        part = name.encode("utf-8", "surrogatepass")
        key.update(len(part).to_bytes(8, "big") + part)
    key.update(content)
    return key.digest()


def _read(path: Path) -> dict[str, _Account]:
    if not path.exists():
        return {}
    try:
        found = {}
        for name, one in json.loads(path.read_bytes())["accounts"].items():
            day, day_rows, total_rows = one["day"], one["day_images"], one["total_images"]
            datetime.strptime(day, "%Y-%m-%d")
            if type(day_rows) is not int or type(total_rows) is not int or min(day_rows, total_rows) < 0:
                raise ValueError(f"images of {name}")
            found[name] = _Account(day, day_rows, total_rows, day_rows, total_rows)
        return found
    except (*DAMAGED, AttributeError, RecursionError) as error:
        # To start from nothing would give every client its budget back.
        raise StorageError(
            f"{path} is damaged ({type(error).__name__}: {error}); put back a copy, or delete it to start anew"
        ) from error
