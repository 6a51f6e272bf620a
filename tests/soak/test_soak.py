"""A short soak, and that a soak which does not add up fails; `make soak` runs it for as long as asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.soak import soak as command
from tests.soak.ledger import Accounts
from tests.soak.soak import Report, soak

SECONDS = 30.0

GOOD = Report(Accounts(promised=9, lost=[], doubled=[], ghosts=[], open=0, dead=0), {"child": 3}, 3, 0, 5, 1.5)


@pytest.mark.databases("sqlite")
@pytest.mark.brokers("filesystem")
@pytest.mark.timeout(400)
def test_whatever_is_killed_at_whatever_moment_the_accounts_add_up(database: Database, broker: Broker, tmp_path: Path) -> None:
    """Producers, relays, workers and their children die at random and the broker forgets: nothing lost, doubled or ghostly."""
    report = soak(database, broker, tmp_path, SECONDS, workers=1, relays=1, producers=1, strike_seconds=1.2)

    assert report.passed, report.as_dict()
    assert report.kills > 0


@pytest.mark.parametrize(
    ("accounts", "others", "says", "code"),
    [
        ({}, {}, "kills 3", 0),
        ({"lost": ["a"]}, {}, "lost 1", 1),
        ({"doubled": ["a", "b"]}, {}, "doubled 2", 1),
        ({"ghosts": ["a"]}, {}, "ghosts 1", 1),
        ({"open": 4}, {}, "open 4", 1),
        ({"dead": 1}, {}, "dead 1", 1),
        ({"promised": 0}, {}, "tasks 0", 1),
        ({}, {"kills": 0}, "kills 0", 1),
        ({}, {"rollbacks": 0}, "rollbacks 0", 1),
    ],
)
def test_exit_code_says_whether_the_accounts_add_up(
    accounts: dict[str, Any],
    others: dict[str, Any],
    says: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """0 only if nothing is lost, doubled, ghostly or left, and the run had something to lose; the numbers are printed either way."""
    report = replace(GOOD, accounts=replace(GOOD.accounts, **accounts), **others)
    monkeypatch.setattr(command, "soak", lambda *args, **options: report)
    monkeypatch.setattr(command, "_keep_rows", lambda database, folder: None)
    monkeypatch.setattr("sys.argv", ["soak", "--minutes", "1"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # pytest's own must stay.
    monkeypatch.setattr("signal.signal", lambda number, handler: None)

    with pytest.raises(SystemExit) as ended:
        command.main()

    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert ended.value.code == code
    assert says in printed
    assert {"lost", "doubled", "ghosts", "kills"} <= {line.split()[0] for line in printed}
