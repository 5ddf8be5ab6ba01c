"""README says what the committed results say."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.says
@pytest.mark.parametrize("table", ["addition", "smollm2", "headline"])
def test_the_tables_are_those_of_the_committed_results(table):
    tables = runpy.run_path(str(ROOT / "scripts" / "tables.py"))
    assert tables[table]() in README


@pytest.mark.says
def test_the_smollm2_results_have_the_keys_scripts_of_others_rely_on():
    for name in ("valid.json", "wikitext2.json"):
        report = json.loads((ROOT / "results" / "smollm2" / name).read_text())
        for label in ("dense", "control", "sparse"):
            assert {"cross_entropy", "edges_per_query_per_head", "density"} <= set(report[label])
        assert "kl" in report["sparse"]
        assert {"context_length", "tokens"} <= set(report)


@pytest.mark.says
def test_every_file_that_readme_links_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.says
def test_the_python_example_runs_as_written(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    assert "steps=500" in code  # 3 here: the example is run, not its training
    script = tmp_path / "example.py"
    script.write_text(code.replace("steps=500", "steps=3"))
    assert runpy.run_path(str(script))["sparse"].records[-1]["step"] == 3
