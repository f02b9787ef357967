from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bundles import toy_bundle
from clouds import Cloud
from louver.bundle import Bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return toy_bundle(tmp_path / "bundle", has_head=True)


@pytest.fixture
def cloud(bundle: Bundle) -> Iterator[Cloud]:
    with Cloud(bundle) as cloud:
        yield cloud
