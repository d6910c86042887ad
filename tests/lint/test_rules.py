"""The rules of docs/architecture.md that a machine can check."""

from __future__ import annotations

import ast
import difflib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "vivace"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400
MAX_FUNCTION_LINES = 40  # without its docstring: a contract may take the space that it needs

# Imports go one way: a package may import those of a lower rank, and of its own rank only itself. Training stands on the
# simulation, where its demonstrations come from.
RANK = {
    "types": 0, "config": 0, "errors": 0, "places": 0, "robots": 1, "checkpoints": 1, "ops": 1, "precision": 1, "model": 2,
    "backends": 3, "runtime": 4, "serving": 5, "check": 6, "sim": 6, "train": 7, "cli": 8,
}  # fmt: skip
# A precision plan names layers of ops and is calibrated on a model; it does not know who executes them.
ALLOWED = {("precision", "ops"), ("precision", "model"), ("ops", "precision"), ("precision", "checkpoints")}
KERNELS = re.compile(r"@triton\.jit")


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def package_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path) -> set[str]:
    """First component below vivace of everything that a file imports at run time (TYPE_CHECKING blocks left out)."""
    tree, found = ast.parse(path.read_text()), set()
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom):
            continue
        if node.level == depth and node.module:
            found.add(node.module.split(".")[0])
        elif node.level == depth:
            found |= {alias.name for alias in node.names}
        elif node.level == 0 and node.module and node.module.startswith("vivace."):
            found.add(node.module.split(".")[1])
    return found & set(RANK)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path):
    package = package_of(path)
    if package not in RANK:
        return  # the package's own __init__ names the public API
    for other in imported(path) - {package}:
        below = RANK[other] < RANK[package] or (RANK[other] == 0 and RANK[package] == 0)
        assert below or (package, other) in ALLOWED, f"{relative(path)} imports {other}: wrong direction"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_one_idea(path):
    text = path.read_text()
    lines = text.count("\n") + 1
    assert lines <= MAX_LINES or KERNELS.search(text), f"{lines} lines"
    assert ast.get_docstring(ast.parse(text)), "no module docstring"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_functions_are_short(path):
    text = path.read_text()
    if KERNELS.search(text):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring
            assert lines <= MAX_FUNCTION_LINES, f"{node.name}: {lines} lines"


def test_no_hardware_or_version_in_file_names():
    pattern = re.compile(r"_(rtx|sm\d+|hopper|h100|a100|thor|orin|fp16|bf16|fp32|v\d+|new|old)$")
    assert [relative(path) for path in FILES if pattern.search(path.stem)] == []


def test_model_does_not_know_hardware():
    words = re.compile(r"\b(cuda|triton|fp8|h100|hopper|tensorrt)\b", re.IGNORECASE)
    hits = [relative(p) for p in FILES if package_of(p) == "model" and words.search(p.read_text())]
    assert hits == []


def test_environment_variables_are_read_in_one_file():
    """os.environ belongs to config.py; the environment report may look at what others set."""
    allowed = {"config.py"}
    hits = [relative(path) for path in FILES if re.search(r"os\.(environ|getenv)", path.read_text())]
    assert set(hits) <= allowed, hits


def test_no_broad_except_but_at_the_server_edge():
    hits = [relative(p) for p in FILES if re.search(r"except( Exception| BaseException)?\s*(as \w+)?:", p.read_text())]
    assert all(hit.startswith("serving/") for hit in hits), hits


def test_no_pickle():
    assert [relative(p) for p in FILES if re.search(r"\b(import pickle|torch\.load\()", p.read_text())] == []


def test_no_near_copies():
    """No two files share more than 60 % of the smaller one's lines; imports and small files are free."""
    lines = {
        p: [s for line in p.read_text().splitlines() if (s := line.strip()) and not s.startswith(("from ", "import "))]
        for p in FILES
    }
    big = [p for p in FILES if len(lines[p]) > 50]
    for a, b in itertools.combinations(big, 2):
        small, large = sorted((lines[a], lines[b]), key=len)
        if len(set(small) & set(large)) <= 0.4 * len(small):
            continue  # cheap upper bound; the exact matcher is quadratic
        blocks = difflib.SequenceMatcher(None, small, large, autojunk=False).get_matching_blocks()
        common = sum(block.size for block in blocks)
        assert common <= 0.6 * len(small), f"{relative(a)} and {relative(b)} share {common} of {len(small)} lines"


def test_importing_vivace_is_light():
    """No CUDA context, no kernels, no server, no checkpoint library at import."""
    code = (
        "import sys, vivace, torch; assert not torch.cuda.is_initialized();"
        "heavy = {*sys.modules} & {'triton', 'websockets', 'tyro', 'tensorstore', 'sentencepiece', 'matplotlib'};"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_verb_has_a_file_and_every_file_a_verb():
    from vivace.cli.main import VERBS

    helpers = {"__init__", "main", "output", "policy_args", "codes", "broken", "simulate_checks", "calibrate_tables"}
    files = {p.stem for p in (PACKAGE / "cli").glob("*.py")} - helpers
    assert files == {verb.replace("-", "_") for verb in VERBS}


def test_no_traces_of_one_machine():
    """Neither sources nor documents name paths of the machine that they were written on."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.split()
    pattern = re.compile(r"(?<![\w./])/(?:work|root|home)/\w")
    hits = []
    for name in listed:
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".toml", ".txt", ".json", ""}
            and path.is_file()
            and path.name != "test_rules.py"
        ):
            text = path.read_text(errors="ignore")
            if pattern.search(text):
                hits.append(name)
    assert hits == []
