"""Tokens, rates and budgets."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from louver.cloud import budgets as budgets_module
from louver.cloud.budgets import Budgets
from louver.cloud.clients import Clients
from louver.cloud.refusals import Refusal
from louver.cloud.tokens import Client, add_client, read_clients, remove_client, rotate_client, token_hash
from louver.errors import ConfigError, StorageError


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def bearer(token: str) -> bytes:
    return f"Bearer {token}".encode()


# The file


def test_a_token_is_kept_nowhere_but_with_its_client(tmp_path):
    file = tmp_path / "deep" / "tokens.json"
    token = add_client(file, "camera-1", images_per_day=7, requests_per_s=2.5)
    assert len(token) >= 43
    assert token not in file.read_text()
    (client,) = read_clients(file)
    assert client == Client(name="camera-1", sha256=token_hash(token), images_per_day=7, requests_per_s=2.5)
    assert add_client(file, "camera-2") != token
    with pytest.raises(ConfigError, match="there is a client camera-1 already"):
        add_client(file, "camera-1")
    remove_client(file, "camera-1")
    assert [one.name for one in read_clients(file)] == ["camera-2"]
    with pytest.raises(ConfigError, match="no client camera-1; known: camera-2"):
        remove_client(file, "camera-1")


def test_a_new_token_leaves_the_limits_and_the_one_before_for_a_while(tmp_path):
    file, before = tmp_path / "t", time.time()
    first = add_client(file, "a", images_per_day=7, requests_per_s=2.5)
    add_client(file, "b")
    added = read_clients(file)
    second = rotate_client(file, "a", overlap_s=3600)
    a, b = read_clients(file)
    assert (replace(a, sha256=added[0].sha256, old_sha256=None, old_until=None), b) == added
    assert (a.sha256, a.old_sha256) == (token_hash(second), token_hash(first))
    until = datetime.strptime(a.old_until, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    assert before + 3600 <= until <= time.time() + 3601
    assert not any(token in file.read_text() for token in (first, second))
    third = rotate_client(file, "a", overlap_s=60)
    a, _ = read_clients(file)
    assert (a.sha256, a.old_sha256) == (token_hash(third), token_hash(second))
    assert token_hash(first) not in file.read_text()
    last = rotate_client(file, "a", overlap_s=0)
    assert read_clients(file)[0] == replace(added[0], sha256=token_hash(last))
    for name, overlap_s, words in (("c", 5, "no client c; known: a, b"), ("a", -1, "overlap"), ("a", 1e9, "365 days")):
        with pytest.raises(ConfigError, match=words):
            rotate_client(file, name, overlap_s=overlap_s)


def test_many_at_once_lose_no_client(tmp_path):
    threads = [threading.Thread(target=add_client, args=(tmp_path / "t", f"c{i}")) for i in range(9)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(one.name for one in read_clients(tmp_path / "t")) == [f"c{i}" for i in range(9)]


GOOD = {"name": "a", "sha256": "0" * 64}
ROTATED = {**GOOD, "old_sha256": "1" * 64, "old_until": "2026-11-23T22:00:00Z"}
WRONG = {
    "no JSON": (b"{", "not JSON"),
    "no text": (b"\xff", "not JSON"),
    "too long": (b" " * (2**24 + 1), "at most 16777216 bytes"),
    "too deep": (b"[" * 100_000, "not JSON"),
    "a list": (b"[]", "expected"),
    "something else": ({"clients": [], "more": 1}, "nothing else"),
    "no name": ({"clients": [{"sha256": "0" * 64}]}, "client 0"),
    "a client that is no object": ({"clients": ["a"]}, "client 0"),
    "an odd name": ({"clients": [{**GOOD, "name": "a b"}]}, "expected a name"),
    "a number as name": ({"clients": [{**GOOD, "name": 3}]}, "expected a name"),
    "a token for a hash": ({"clients": [{**GOOD, "sha256": "secret-token"}]}, "expected the SHA-256"),
    "an unknown key": ({"clients": [{**GOOD, "image_per_day": 5}]}, "unknown key 'image_per_day'"),
    "a limit of none": ({"clients": [{**GOOD, "images_total": 0}]}, "above 0"),
    "a limit of words": ({"clients": [{**GOOD, "images_total": "7"}]}, "above 0"),
    "a limit of truth": ({"clients": [{**GOOD, "images_total": True}]}, "above 0"),
    "a limit past all": ({"clients": [{**GOOD, "requests_per_s": 1e400}]}, "above 0"),
    "a burst of no rate": ({"clients": [{**GOOD, "burst": 5}]}, "set that too"),
    "one name twice": ({"clients": [GOOD, {**GOOD, "sha256": "1" * 64}]}, "same name"),
    "one token twice": ({"clients": [GOOD, {**GOOD, "name": "b"}]}, "same sha256"),
    "the token of another before": (
        {"clients": [{**ROTATED, "name": "b"}, {**GOOD, "sha256": "1" * 64}]},
        "same sha256",
    ),
    "one token before and now": ({"clients": [{**ROTATED, "old_sha256": "0" * 64}]}, "same sha256"),
    "a token before for a hash": ({"clients": [{**ROTATED, "old_sha256": "secret-token"}]}, "expected the SHA-256"),
    "a token before without an end": ({"clients": [{**GOOD, "old_sha256": "1" * 64}]}, "or neither"),
    "an end of nothing": ({"clients": [{**GOOD, "old_until": ROTATED["old_until"]}]}, "or neither"),
    "an end in words": ({"clients": [{**ROTATED, "old_until": "tomorrow"}]}, "a time in UTC"),
    "an end elsewhere": ({"clients": [{**ROTATED, "old_until": "2026-11-23T22:00:00+01:00"}]}, "a time in UTC"),
    "an end as a number": ({"clients": [{**ROTATED, "old_until": 1795471200}]}, "a time in UTC"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_without_its_hashes(tmp_path, case):
    content, words = WRONG[case]
    path = tmp_path / "t"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ConfigError, match=words) as refused:
        read_clients(path)
    assert "0" * 64 not in str(refused.value)
    assert "secret" not in str(refused.value)


# Who asks


def test_who_asks_is_known_by_the_token_alone(tmp_path):
    file = tmp_path / "t"
    tokens = {name: add_client(file, name) for name in ("a", "b", "c")}
    clients = Clients(file)
    for name, token in tokens.items():
        assert clients.identify(bearer(token)).name == name
        assert clients.identify(f"bearer  {token} ".encode()).name == name
    for header in (
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        bearer(tokens["a"])[:-1],
        bearer(tokens["a"] + "x"),
        b"Basic " + tokens["a"].encode(),
        tokens["a"].encode(),
        bearer(token_hash(tokens["a"])),
        bearer("\xff\0"),
    ):
        with pytest.raises(Refusal) as refused:
            clients.identify(header)
        assert refused.value.status == 401
        assert tokens["a"] not in refused.value.reason


def known(clients: Clients, *tokens: str) -> list[bool]:
    """Whether each may ask."""

    def is_known(token: str) -> bool:
        try:
            clients.identify(bearer(token))
        except Refusal:
            return False
        return True

    return [is_known(token) for token in tokens]


def test_the_file_is_read_again_when_it_changes(tmp_path, caplog):
    file, clock = tmp_path / "t", Clock(5.0)
    first = add_client(file, "first")
    clients = Clients(file, clock=clock)
    second = add_client(file, "second")
    assert known(clients, first, second) == [True, False]
    clock.now += 1.1
    assert known(clients, first, second) == [True, True]
    remove_client(file, "first")
    clock.now += 1.1
    assert known(clients, first, second) == [False, True]
    whole = file.read_text()
    file.write_text(whole[:20])
    clock.now += 1.1
    assert known(clients, second) == [True]
    assert "those known before go on" in caplog.text
    file.write_text(whole)
    clock.now += 1.1
    assert known(clients, second) == [True]
    file.unlink()
    clock.now += 1.1
    assert known(clients, second) == [False]


def test_a_token_that_was_replaced_ends_by_itself(tmp_path):
    file, clock, wall_clock = tmp_path / "t", Clock(5.0), Clock(time.time())
    first, other = add_client(file, "a"), add_client(file, "b")
    clients = Clients(file, clock=clock, wall_clock=wall_clock)
    second = rotate_client(file, "a", overlap_s=3600)
    assert known(clients, first, second, other) == [True, False, True]
    clock.now += 1.1
    assert known(clients, first, second, other) == [True, True, True]
    assert clients.identify(bearer(first)) is clients.identify(bearer(second))
    assert [one.name for one in clients.all] == ["a", "b"]
    wall_clock.now += 3590
    assert known(clients, first, second, other) == [True, True, True]
    wall_clock.now += 12
    assert known(clients, first, second, other) == [False, True, True]
    assert known(Clients(file, wall_clock=wall_clock), first, second) == [False, True]  # nor after a restart


@pytest.mark.parametrize("overlap_s", [0, 60])
def test_two_tokens_of_a_client_are_valid_at_most_and_none_when_it_is_removed(tmp_path, overlap_s):
    file = tmp_path / "t"
    tokens = [add_client(file, "a")]
    tokens += [rotate_client(file, "a", overlap_s=60), rotate_client(file, "a", overlap_s=overlap_s)]
    assert known(Clients(file), *tokens) == [False, overlap_s > 0, True]
    remove_client(file, "a")
    assert known(Clients(file), *tokens) == [False] * 3


def test_both_tokens_of_a_client_share_its_rate_and_its_budget(tmp_path):
    file, clock = tmp_path / "t", Clock(5.0)
    first = add_client(file, "a", requests_per_s=0.001, burst=3, images_total=10)
    clients = Clients(file, clock=clock)
    budgets = Budgets(tmp_path / "b", retry_window_s=60)

    def ask(token: str) -> None:
        who = clients.identify(bearer(token))
        clients.admit(who)
        assert charge(budgets, who, (3, "", b"")) == [True]

    ask(first)
    second = rotate_client(file, "a", overlap_s=60)
    clock.now += 1.1
    ask(second)
    ask(first)
    assert budgets.left(clients.identify(bearer(second))) == 1
    with pytest.raises(Refusal, match="may ask"):
        ask(second)
    budgets.close()


def test_a_client_may_ask_as_fast_as_its_bucket_fills(tmp_path):
    file, clock = tmp_path / "t", Clock(0.0)
    add_client(file, "a", requests_per_s=4, burst=3)
    add_client(file, "b", requests_per_s=0.5)
    add_client(file, "c")
    clients = Clients(file, clock=clock)
    a, b, c = sorted(clients.all, key=lambda one: one.name)

    def count(client: Client) -> int:
        for i in range(50):
            if not is_admitted(client):
                return i
        return 50

    def is_admitted(client: Client) -> bool:
        refused = None
        try:
            clients.admit(client)
        except Refusal as refusal:
            refused = refusal
        assert refused is None or refused.status == 429
        assert refused is None or 0 < refused.retry_after_s <= 1 / client.requests_per_s
        return refused is None

    assert [count(one) for one in (a, b, c)] == [3, 1, 50]
    clock.now += 0.5
    assert [count(one) for one in (a, b)] == [2, 0]
    clock.now += 1000
    assert [count(one) for one in (a, b)] == [3, 1]


# Budgets

DAY = 86400.0
NOON = 20000 * DAY + DAY / 2
TOY = ("toy", "v")


def client(**limits) -> Client:
    return Client(name="a", sha256="0" * 64, **limits)


def charge(budgets: Budgets, who: Client, *calls: tuple[int, str, bytes], model: tuple[str, str] = TOY) -> list[bool]:
    """Whether each was admitted."""

    async def work() -> list[bool]:
        found = []
        for rows, call_id, content in calls:
            try:
                await budgets.charge(who, rows, model, call_id, content)
            except Refusal as refusal:
                found.append(refusal.status)
            else:
                found.append(200)
        assert set(found) <= {200, 403}
        return [status == 200 for status in found]

    return asyncio.run(work())


def test_images_are_counted_by_day_and_ever(tmp_path):
    clock = Clock(NOON)
    budgets = Budgets(tmp_path / "b", retry_window_s=60, clock=clock)
    who = client(images_per_day=10, images_total=15)
    assert charge(budgets, who, (7, "", b""), (4, "", b""), (3, "", b""), (1, "", b"")) == [True, False, True, False]
    assert (budgets.left(who), budgets.used(who)) == (0, 10)
    clock.now += DAY
    assert budgets.left(who) == 5
    assert charge(budgets, who, (6, "", b""), (5, "", b"")) == [False, True]
    clock.now += DAY
    assert charge(budgets, who, (1, "", b"")) == [False]
    clock.now -= 2 * DAY  # a clock that is set back gives nothing back
    assert charge(budgets, who, (1, "", b"")) == [False]
    budgets.close()


def test_a_client_without_a_budget_leaves_no_trace(tmp_path):
    budgets = Budgets(tmp_path / "b", retry_window_s=60)
    assert charge(budgets, client(), (1000, "", b"")) == [True]
    assert budgets.left(client()) is None
    budgets.close()
    assert not (tmp_path / "b").exists() or "1000" not in (tmp_path / "b").read_text()


def test_the_same_request_is_paid_once_and_only_the_same(tmp_path):
    clock = Clock(NOON)
    budgets = Budgets(tmp_path / "b", retry_window_s=60, clock=clock)
    who = client(images_total=20)
    assert charge(budgets, who, (4, "x", b"one"), (4, "x", b"one"), (4, "x", b"one")) == [True] * 3
    assert budgets.left(who) == 16
    charge(budgets, who, (4, "x", b"two"))  # the id again with other images: no free pass
    assert budgets.left(who) == 12
    charge(budgets, who, (4, "y", b"one"))
    assert budgets.left(who) == 8
    charge(budgets, who, (2, "", b"one"), (2, "", b"one"))  # without an id nothing says that it is the same
    assert budgets.left(who) == 4
    clock.now += 61
    charge(budgets, who, (4, "x", b"one"))
    assert budgets.left(who) == 0
    budgets.close()


def test_the_same_request_to_another_model_or_version_is_another(tmp_path):
    budgets = Budgets(tmp_path / "b", retry_window_s=60, clock=Clock(NOON))
    who = client(images_total=20)
    models = [TOY, ("toy", "w"), ("tow", "v"), ("to", "yv"), ("toyv", "")]
    for i, model in enumerate([*models, *models]):
        charge(budgets, who, (3, "x", b"one"), model=model)
        assert budgets.left(who) == 20 - 3 * min(i + 1, len(models))
    budgets.close()


def test_an_id_that_runs_into_the_content_is_another_id(tmp_path):
    budgets = Budgets(tmp_path / "b", retry_window_s=60, clock=Clock(NOON))
    who = client(images_total=20)
    charge(budgets, who, (3, "x\0one", b"two"), (3, "x", b"one\0two"), (3, "x\0", b"one\0two"))
    assert budgets.left(who) == 11
    budgets.close()


def test_the_same_id_of_another_client_is_another_request(tmp_path):
    budgets = Budgets(tmp_path / "b", retry_window_s=60, clock=Clock(NOON))
    other = Client(name="b", sha256="1" * 64, images_total=5)
    charge(budgets, client(images_total=5), (3, "x", b"one"))
    charge(budgets, other, (3, "x", b"one"))
    assert budgets.left(other) == 2
    budgets.close()


def test_what_was_not_computed_is_given_back_once(tmp_path):
    budgets = Budgets(tmp_path / "b", retry_window_s=60, clock=Clock(NOON))
    who = client(images_per_day=20, images_total=20)

    async def work():
        first = await budgets.charge(who, 3, TOY, "x", b"one")
        again = await budgets.charge(who, 3, TOY, "x", b"one")
        assert budgets.left(who) == 17
        first()
        assert budgets.left(who) == 17  # the repetition may still be computed
        again()
        assert budgets.left(who) == 20
        await budgets.charge(who, 3, TOY, "x", b"one")
        assert budgets.left(who) == 17

    asyncio.run(work())
    budgets.close()


def test_a_restart_gives_nothing_back(tmp_path):
    who = client(images_total=1000)
    budgets = Budgets(tmp_path / "b", retry_window_s=60, clock=Clock(NOON))
    charge(budgets, who, (123, "", b""))
    budgets.close()
    budgets = Budgets(tmp_path / "b", retry_window_s=60, clock=Clock(NOON))
    assert budgets.left(who) == 877  # an orderly end is exact
    charge(budgets, who, (7, "", b""))
    budgets.close()


def test_a_kill_costs_at_most_a_block_and_never_gives_back(tmp_path):
    code = """
import asyncio, os, sys
from pathlib import Path
from louver.cloud.budgets import Budgets
from louver.cloud.tokens import Client

async def main():
    budgets = Budgets(Path(sys.argv[1]), retry_window_s=60)
    who = Client(name="a", sha256="0" * 64, images_total=1000)
    for _ in range(37):
        await budgets.charge(who, 3, ("toy", "v"), "", b"")
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=False, env={**os.environ})
    assert ended.returncode == -9
    budgets = Budgets(tmp_path / "b", retry_window_s=60)
    assert 111 <= budgets.used(client(images_total=1000)) <= 111 + 10
    budgets.close()


def test_one_server_at_a_time_holds_the_budgets(tmp_path):
    first = Budgets(tmp_path / "b", retry_window_s=60)
    with pytest.raises(StorageError, match="held by another server"):
        Budgets(tmp_path / "b", retry_window_s=60)
    first.close()
    Budgets(tmp_path / "b", retry_window_s=60).close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"accounts": {"a": {}}}',
        b'{"accounts": {"a": {"day": "x", "day_images": 1, "total_images": 1}}}',
        b'{"accounts": {"a": {"day": "2026-01-01", "day_images": -1, "total_images": 1}}}',
    ],
)
def test_damaged_budgets_are_never_taken_for_none(tmp_path, content):
    (tmp_path / "b").write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        Budgets(tmp_path / "b", retry_window_s=60)
    (tmp_path / "b").unlink()
    Budgets(tmp_path / "b", retry_window_s=60).close()  # the lock was let go


def test_without_a_disk_nothing_is_answered_and_nothing_is_charged(tmp_path, monkeypatch):
    budgets = Budgets(tmp_path / "b", retry_window_s=60, clock=Clock(NOON))
    who = client(images_total=10)

    def full(path: Path, content: object) -> None:
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(budgets_module, "write_json", full)
        with pytest.raises(StorageError):
            charge(budgets, who, (3, "x", b"one"))
        with pytest.raises(StorageError):
            charge(budgets, who, (3, "x", b"one"))
    assert budgets.left(who) == 10
    assert charge(budgets, who, (3, "x", b"one")) == [True]
    budgets.close()


def test_many_at_once_are_all_counted_before_any_goes_on(tmp_path):
    budgets = Budgets(tmp_path / "b", retry_window_s=60, clock=Clock(NOON))
    who = client(images_total=500)

    async def one() -> bool:
        try:
            await budgets.charge(who, 7, TOY, "", b"")
        except Refusal:
            return False
        kept = json.loads((tmp_path / "b").read_text())["accounts"]["a"]["total_images"]
        assert kept >= 7
        return True

    async def work() -> list[bool]:
        return await asyncio.gather(*(one() for _ in range(100)))

    assert sum(asyncio.run(work())) == 500 // 7
    budgets.close()
    assert json.loads((tmp_path / "b").read_text())["accounts"]["a"]["total_images"] == 7 * (500 // 7)
