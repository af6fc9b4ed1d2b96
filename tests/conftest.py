"Shared by the test files: which promise a test checks, for the table in nbs/benchmarks/reliability.ipynb."

import json, os, signal
from pathlib import Path

import pytest

# a shell's background jobs and nohup leave some signals ignored, and every process started here would too
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Python's own switches of this shell: with them the processes started here would not be those of a user
for name in (
    "PYTHONUNBUFFERED",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONOPTIMIZE",
    "PYTHONWARNINGS",
    "PYTHONHASHSEED",
):
    os.environ.pop(name, None)

KEPT = pytest.StashKey()


@pytest.fixture
def promise(request):
    "promise(name, cases=1, **facts): this test checks `name` in so many cases; a test that fails loses them."
    held = request.node.stash.setdefault(KEPT, [])
    return lambda name, cases=1, **facts: held.append((name, cases, facts))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if call.when != "call" or report.skipped:
        return
    for name, cases, facts in item.stash.get(KEPT, []):
        row = item.config.stash.setdefault(KEPT, {}).setdefault(
            name, dict(tests=[], slow=False, cases=0, lost=0, seconds=0.0, facts={})
        )
        row["tests"] = sorted({*row["tests"], item.nodeid.split("[")[0]})
        row["slow"] |= item.get_closest_marker("slow") is not None
        row["cases"] += cases
        row["lost"] += cases * report.failed
        row["seconds"] = round(row["seconds"] + call.duration, 2)
        row["facts"] |= facts


def pytest_sessionfinish(session):
    "With CPCL_RECORD=FILE the promises of this session take their rows there."
    if not (file := os.environ.get("CPCL_RECORD")) or not (kept := session.config.stash.get(KEPT, {})):
        return
    from cpcl.files import write_json
    from cpcl.train.environment import environment

    told = {k: v for k, v in environment().items() if k != "command"}
    old = json.loads(Path(file).read_text(encoding="utf8")) if Path(file).is_file() else {}
    write_json(file, old | {name: row | dict(environment=told) for name, row in kept.items()})
