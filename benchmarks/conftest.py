"""The options, the machine's facts, and where results go."""

from collections.abc import Iterator

import pytest

from benchmarks import machine, results


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", help="names of the cases to time, as in A,B; default: all")
    parser.addoption("--quick", action="store_true", help="one tiny case, two rounds")
    parser.addoption(
        "--save-results", action="store_true", help="write benchmarks/results/<machine>.json"
    )


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info |= machine.facts()


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Iterator[list[results.Row]]:
    """Collect one row a contender, and save them at the end if asked to."""
    facts = machine.facts()
    collected: list[results.Row] = []
    yield collected
    if request.config.getoption("--save-results") and collected:
        results.save(results.RESULTS / f"{machine.slug()}.json", facts, collected)
