"""The preparation on clusters where datatrove is missing; `tests/clients` tests the rest."""

import sys

from workspace import ROOT, run

sys.path.append(str(ROOT / "scripts" / "cluster"))

import prepare


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    run(prepare, "--source", tmp_path, "--dump_file", tmp_path / "text", expect=2)
    assert "pip install 'datatrove[io]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
