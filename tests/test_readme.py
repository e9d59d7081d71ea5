"""The README's example, run as it is written there."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_trains_with_the_readers_own_function(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    exec(compile(code, str(README), "exec"), {})
    report = tmp_path / capsys.readouterr().out.strip().splitlines()[-1]
    assert report.name == "report.html"
    assert "redness" in report.read_text()


def test_the_example_is_short():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    statements = [line for line in code.splitlines() if line.strip() and '"""' not in line]
    assert len(statements) <= 10
