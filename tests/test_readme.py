"""What the README shows works, in the order in which it shows it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# as on a machine that triton has no wheel for
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None; from fastsiam.cli import main; main()"


def run(*arguments, cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the commands ran, without triton."""
    folder = tmp_path_factory.mktemp("readme")
    (block,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines():
        name, *arguments = re.findall(r'"[^"]*"|\S+', line)
        assert name == "fastsiam"
        output = run("-c", WITHOUT_TRITON, *(a.strip('"') for a in arguments), cwd=folder)
        (folder / f"{arguments[0]}.txt").write_text(output, encoding="utf-8")
    return folder


def test_commands_without_triton(folder):
    found = re.search(r"test\s*│\s*\d+\s*│\s*(0\.\d+)", (folder / "demo.txt").read_text("utf-8"))
    assert float(found[1]) > 0.8
    assert float(re.search(r"similarity (\S+)", (folder / "similarity.txt").read_text())[1]) > 0.5


def test_python_examples(folder):
    module, text = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "inputs are on" in run("-c", module, cwd=folder)
    assert "tensor" in run("-c", text, cwd=folder)


def test_exit_codes_are_those_of_the_commands():
    from fastsiam.cli import exit as cli_exit

    table = README.partition("## Exit codes")[2].partition("## ")[0]
    shown = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert shown == {0, *map(int, re.findall(r"\b(\d+) (?!is)\w", cli_exit.EXIT_CODES))}
    codes = {value for value in vars(cli_exit).values() if type(value) is int}
    assert shown == {0, *codes}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benchmarks/rivals.md"])
def test_links_lead_somewhere(name):
    file = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (file.parent / target).exists(), target
