"""Tables for the terminal of what this machine measured."""

import io

from rich.console import Console

from secateurs.report.machine_tables import print_bench


def variant(name, speed):
    stage = {"tokens_per_second": speed, "low": 0.97 * speed, "high": 1.04 * speed, "speedup": 1.0}
    return {
        "name": name, "how": "dense", "engine": None, "first_run_seconds": 0.0, "peak_memory_bytes": 2_398_600_000,
        "weights_bytes": 269_100_000, "batches": [{"batch": 1, "prompt": 512, "prefill": stage, "decode": stage}],
    }  # fmt: skip


def test_names_break_between_words_and_every_number_shows():
    names = {"dense, torch.compile": 1120.8, "llama.cpp, 16 bits": 282.1, "packed": 24.14}
    result = {
        "new": 64, "repeats": 5, "prompt": 512, "machine": {"threads": 2},
        "variants": [variant(name, speed) for name, speed in names.items()],
    }  # fmt: skip
    file = io.StringIO()
    print_bench(result, Console(file=file, width=120, soft_wrap=True))
    said = file.getvalue()
    rows = said.splitlines()[1:-2]
    assert max(len(row.rstrip()) for row in rows) <= 120
    for word in (word for name in names for word in name.split()):
        assert word in said
    assert said.count("1,121 [1,087, 1,166]") == said.count("282 [274, 293]") == said.count("24.1 [23.4, 25.1]") == 2
    assert said.count("2,398.6 MB") == 3
