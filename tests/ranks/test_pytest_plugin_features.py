"""Everything pytest offers an ordinary test works in a test on ranks, and its options and plugins keep working."""

import pytest

# Other plugins have tests of their own; here one of them would shuffle.
ALONE = {
    "pytest.ini": """
        [pytest]
        filterwarnings = error
        addopts = -p no:asyncio -p no:randomly -p no:rerunfailures -p no:sugar
    """
}
FEATURES = {
    **ALONE,
    "conftest.py": """
        import pytest

        @pytest.fixture
        def doubled(rank):
            return 2 * rank.rank

        @pytest.fixture(scope="module")
        def built_once():
            return object()
    """,
    "test_user.py": """
        import logging, os, warnings
        import pytest
        import torch
        import torch.distributed as dist
        from ddpcall.pytest_plugin import assert_same_on_all_ranks

        pytestmark = pytest.mark.ranks(2)

        def test_rank_fixture_matches_the_process_group(rank):
            assert (rank.rank, rank.world_size) == (dist.get_rank(), dist.get_world_size())
            assert rank.rank == int(os.environ["RANK"]) and rank.device == torch.device("cpu")

        @pytest.mark.ranks(1, 3)
        def test_sizes(rank):
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total.item() == rank.world_size

        @pytest.mark.parametrize("factor", [2, 3], ids=["two", "three"])
        def test_parametrize_and_fixtures(rank, doubled, factor, built_once):
            assert doubled * factor == 2 * rank.rank * factor

        def test_tmp_path_is_shared(rank, tmp_path):
            (tmp_path / f"from{rank.rank}").touch()
            rank.barrier()
            assert len(list(tmp_path.iterdir())) == 2

        def test_tmp_path_is_new(tmp_path, rank):
            rank.barrier()
            assert not list(tmp_path.iterdir())

        def test_capsys(rank, capsys):
            print("seen by", rank.rank)
            assert capsys.readouterr().out == f"seen by {rank.rank}\\n"

        def test_capfd(rank, capfd):
            os.write(1, b"raw")
            assert capfd.readouterr().out == "raw"

        def test_caplog(rank, caplog):
            logging.getLogger("user").warning("from %d", rank.rank)
            assert caplog.messages == [f"from {rank.rank}"]

        def test_monkeypatch(monkeypatch, rank):
            monkeypatch.setenv("ONLY_HERE", "1")
            assert_same_on_all_ranks(os.environ["ONLY_HERE"])

        def test_environment_is_clean_again(rank):
            assert "ONLY_HERE" not in os.environ

        def test_request_and_properties(request, record_property, rank):
            record_property("kind", "both")
            assert request.node.name == "test_request_and_properties"

        @pytest.mark.filterwarnings("default")
        def test_warns(rank):
            warnings.warn("careful now")

        class TestInClass:
            @pytest.fixture(autouse=True)
            def prepare(self, rank):
                self.total = rank.world_size

            def test_method(self):
                assert self.total == 2

        @pytest.mark.ranks(2, fresh=True)
        def test_fresh(rank):
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total.item() == 2
    """,
}


@pytest.fixture(scope="module")
def features(run_user_project):
    return run_user_project(FEATURES, "-v", "--ranks-report")


def test_pytest_features_work_on_ranks(features):
    assert set(features.outcomes.values()) == {"passed"}, features.output


def test_several_sizes_become_several_tests(features):
    assert {"test_sizes[ranks1]", "test_sizes[ranks3]"} <= set(features.outcomes)


def test_a_warning_of_all_ranks_is_shown_once(features):
    assert features.output.count("careful now") == 2  # the message and the source line that gives it
    assert "1 warning" in features.output


def test_ranks_report_lists_tests_and_pool_starts(features):
    report = features.output.partition(" ranks ===")[2]
    assert "ranks(2)  test_user.py::test_capsys" in report
    assert "pool starts: 1" in report


SMALL = {
    **ALONE,
    "test_user.py": """
        import os, sys
        import pytest
        import torch.distributed as dist

        @pytest.fixture(scope="module")
        def ordinary_resource():
            yield "resource"
            print("ordinary resource released")

        def test_ordinary(ordinary_resource): ...

        @pytest.mark.ranks(2)
        def test_first(rank):
            print("hello from the body")
            print("to stderr", file=sys.stderr)
            rank.barrier()

        @pytest.mark.ranks(2)
        def test_second(rank):
            assert rank.rank == 7

        @pytest.mark.ranks(2)
        def test_third(rank): ...
    """,
}


def test_output_has_rank_prefixes_without_capture(run_user_project):
    run = run_user_project(SMALL, "-s", "-k", "first")
    for line in ("[rank 0] hello from the body", "[rank 1] hello from the body", "[rank 1] to stderr"):
        assert line in run.output


def test_x_stops_after_the_first_failure(run_user_project):
    run = run_user_project(SMALL, "-x")
    assert list(run.outcomes.values()) == ["passed", "passed", "failed"]


def test_pdb_is_refused_with_the_way_out(run_user_project):
    run = run_user_project(SMALL, "--pdb")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "-m 'not ranks'" in run.output
    assert run_user_project(SMALL, "--pdb", "-m", "not ranks").outcomes == {"test_ordinary": "passed"}


def test_ordinary_fixtures_are_released_around_tests_on_ranks(run_user_project):
    run = run_user_project(SMALL, "-s", "-k", "not second")
    assert run.outcomes == {"test_ordinary": "passed", "test_first": "passed", "test_third": "passed"}
    assert run.output.count("ordinary resource released") == 1


def test_bad_marks_are_explained(run_user_project):
    text = "import pytest\n@pytest.mark.ranks({})\ndef test_it(rank): ...\n"
    run = run_user_project({"test_a.py": text.format(""), "test_b.py": text.format("2, world=3")})
    assert "ranks needs at least one positive number, as in ranks(2)" in run.output
    assert "ranks does not know world" in run.output


def test_import_error_on_a_rank_is_reported(run_user_project):
    text = """
        import os
        import pytest
        if os.environ.get("RANK") == "1":
            raise ImportError("only on rank 1")

        @pytest.mark.ranks(2)
        def test_it(rank):
            rank.barrier()
    """
    run = run_user_project({"test_user.py": text})
    assert run.outcomes == {"test_it": "failed"}
    assert "[rank 1] the test cannot be collected on this rank" in run.output
    assert "only on rank 1" in run.output


def test_collect_only_starts_no_process(run_user_project):
    conftest = """
        import os

        def pytest_unconfigure(config):
            try:
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                print("has children")
            except ChildProcessError:
                print("no children")
    """
    run = run_user_project(SMALL | {"conftest.py": conftest}, "--collect-only", "-q")
    assert "no children" in run.output


def test_200_tests_leave_memory_descriptors_and_processes_level(run_user_project):
    text = """
        import os
        from pathlib import Path
        import pytest
        import torch

        def measure():
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), pages * 4096 // 2**20

        def count_workers():
            parents = [p.read_text().rpartition(")")[2].split()[1] for p in Path("/proc").glob("[0-9]*/stat")]
            return parents.count(str(os.getppid()))

        @pytest.mark.ranks(2)
        @pytest.mark.parametrize("index", range(200))
        def test_step(rank, index):
            model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(50, 50))
            model(torch.randn(4, 50)).sum().backward()
            if index in (20, 199):
                print("MEASURED", index, *measure(), count_workers())

        @pytest.mark.parametrize("index", range(2))
        def test_parent(index):
            print("MEASURED", "parent", *measure())
    """
    order = """
        def pytest_collection_modifyitems(items):
            first, last = items[-2:]
            items[:] = [*items[:20], first, *items[20:-2], last]
    """
    run = run_user_project({"test_user.py": text, "conftest.py": order}, "-s")
    assert set(run.outcomes.values()) == {"passed"}
    measured = [line.split("MEASURED ")[1].split() for line in run.output.splitlines() if "MEASURED" in line]
    for name, early, late in (("rank", "20", "199"), ("parent", "parent", "parent")):
        first = next(row for row in measured if row[0] == early)
        last = [row for row in measured if row[0] == late][-1]
        (descriptors, threads, megabytes, *workers), (*later,) = map(int, first[1:]), map(int, last[1:])
        assert later[0] <= descriptors + 2, f"file descriptors of the {name}: {first} {last}"
        assert later[1] <= threads + 1, f"threads of the {name}: {first} {last}"
        assert later[2] <= megabytes + 30, f"megabytes of the {name}: {first} {last}"
        assert later[3:] == workers, f"processes: {first} {last}"
