"""What a release is made of: versions that agree, a README for the package index, a source distribution that builds."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import qkernels as qk
import qtdog
from qtdog.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "build_support"))
from readme import readme

ROOT = Path(__file__).parents[1]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]


def test_one_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"qtdog {qk.__version__}, PyTorch ")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert qk.__version__ == qtdog.__version__ == citation["version"]
    assert re.search(rf"^## {re.escape(qk.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_links_of_the_readme_lead_to_this_version_from_anywhere():
    text = readme(ROOT, "9.8.7")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    ours = [link for link in links if link.startswith(URLS["Repository"])]
    assert len(ours) > 5 and any("/raw/" in link for link in ours)
    for link in ours:
        path = re.sub(rf"{re.escape(URLS['Repository'])}/(raw|blob)/v9\.8\.7/([^?#]+).*", r"\2", link)
        assert (ROOT / path).exists(), link


def test_addresses_of_the_project_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == URLS["Repository"]
    for name, url in URLS.items():
        assert url.startswith(URLS["Repository"]), name
        path = re.sub(rf"{re.escape(URLS['Repository'])}/?((blob|tree)/main/|issues$)?", "", url)
        assert (ROOT / path).exists(), url


@pytest.mark.slow
def test_the_source_distribution_has_what_a_build_reads(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (listing,) = tmp_path.glob("*/SOURCES.txt")
    listed = set(listing.read_text().splitlines())
    needed = [p for folder in ("csrc", "build_support", "qkernels", "qtdog") for p in (ROOT / folder).rglob("*.*")]
    sources = [str(p.relative_to(ROOT)) for p in needed if p.suffix in (".h", ".cuh", ".cpp", ".cu", ".py", ".typed")]
    assert len(sources) > 100
    assert not set(sources) - listed


def test_issue_forms_are_forms():
    forms = [yaml.safe_load(p.read_text()) for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    bodies = [form["body"] for form in forms if "body" in form]
    assert len(bodies) == 3
    for body in bodies:
        assert all({"type", "id", "attributes"} <= set(field) for field in body)
