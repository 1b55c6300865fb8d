"""The numbers of `golden.json` still come out: losses, gradients, order and masks."""

import json

import golden
import pytest

TOLERANCE = 1e-9  # relative; see golden.py
KNOWN = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("name", golden.CASES)
def test_losses_and_gradients(name):
    rows = golden.losses_of(*golden.CASES[name])
    assert len(rows) == len(KNOWN["losses"][name]) == golden.N_STEPS
    for row, known in zip(rows, KNOWN["losses"][name], strict=True):
        assert row == pytest.approx(known, rel=TOLERANCE, abs=0)


def test_order_and_masks():
    found = golden.digests()
    assert found == {part: KNOWN[part] for part in found}


def test_a_small_change_would_be_found():
    family, recipe, changes = golden.CASES["bert"]
    rows = golden.losses_of(family, golden.replace(recipe, temperature=2 + 1e-5), changes)
    assert rows[0] != pytest.approx(KNOWN["losses"]["bert"][0], rel=TOLERANCE, abs=0)
