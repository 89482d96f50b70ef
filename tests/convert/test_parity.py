from pathlib import Path

from convert import parity

ROOT = Path(__file__).parents[1] / "golden"


def test_parity_table(capsys, tmp_path):
    """Present cases print PASS or FAIL, absent ones say so, and a wrong weight seed is noticed."""
    cases = tuple(case for case in parity.CASES if case.name in ("umt5_tiny", "schedulers.flow5_x", "mask_latents"))
    missing = parity.Case("gone", "gone", 1.0, cases[0].compare)
    assert parity.run(parity.Golden(ROOT), (*cases, missing))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[2]) for row in rows[:3]] == [(case.name, "PASS") for case in cases]
    assert rows[3][:2] == ["gone", "skipped:"]
    assert not parity.run(parity.Golden(ROOT, seed=1), cases[:1])
    assert "FAIL" in capsys.readouterr().out
    assert parity.main([str(tmp_path / "none")]) == 2
    assert parity.main([str(tmp_path)]) == 2
    assert "holds none of the golden files" in capsys.readouterr().err
