"""The README: its example runs as written, and every file it links to exists."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "cluster/README.md", "tests/benchmarks/README.md")


def test_the_example_measures_the_drift(stored, experiment, tmp_path, monkeypatch):
    for path in stored:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1], names)
    error = names["shifts"]["shift"].values - experiment.shifts
    assert np.nanstd(error, axis=0).max() < 0.1
    assert names["aligned"].shape == names["frames"].shape


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text())
    assert [link for link in links if not ((ROOT / document).parent / link).exists()] == []
