#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: figures_test.py SCRIPTS_FOLDER ANNULUS

Runs collect, plot and report on results that `annulus` makes here and on rows made up for the figures, and looks at what comes out.
"""
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile

SCRIPTS, ANNULUS = sys.argv[1:]
SKIPPED = 77  # as every test here says it


def call(*arguments, code=0):
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{arguments}: code {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def script(name, *arguments, code=0):
    return call(sys.executable, os.path.join(SCRIPTS, name), *arguments, code=code)


def made_up(folder):
    """Rows of perfect scaling of one problem, of which the last two take longer than that."""
    rows = []
    for ranks, tokens, ms in ((1, 4096, 80.0), (2, 4096, 40.0), (4, 4096, 25.0), (2, 8192, 170.0), (4, 16384, 400.0)):
        rows.append({"schema": "annulus.results/1", "kind": "bench", "source": "made up", "ranks": ranks, "seq-len": tokens, "batch": 1, "heads": 2,
                     "head-dim": 64, "dtype": "fp32", "causal": "false", "transport": "self" if ranks == 1 else "mpi",
                     "segment-lengths": str(tokens), "median_ms": ms, "samples_ms": [0.9 * ms, ms, 1.2 * ms], "predicted_ms": 1.1 * ms,
                     "exposed_ms": ms / 20 if ranks > 1 else 0, "flops": 4.0 * 64 * 2 * tokens * tokens, "fma_peak_gflops": 900.0,
                     "bytes_received": 1 << 24 if ranks > 1 else 0})
    path = os.path.join(folder, "made_up.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def main():
    try:
        import h5py  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        print(f"skipped: {error}")
        sys.exit(SKIPPED)

    with tempfile.TemporaryDirectory() as folder:
        results = os.path.join(folder, "job")
        os.mkdir(results)
        shape = ("--heads", "2", "--head-dim", "16", "--repetitions", "3", "--warmup", "0", "--threads", "1")
        call(ANNULUS, "bench", "--sweep", "virtual-ranks=1,3", "--sweep", "seq-len=96,192", *shape, "--output", os.path.join(results, "bench.h5"))
        with open(os.path.join(results, "bench.json"), "w", encoding="utf-8") as file:
            file.write(call(ANNULUS, "bench", "--seq-len", "64", *shape, "--json").stdout)
        call(ANNULUS, "run", "--seq-len", "128", "--heads", "2", "--head-dim", "16", "--virtual-ranks", "4", "--output", os.path.join(results, "run.h5"))
        with open(os.path.join(results, "plan.json"), "w", encoding="utf-8") as file:
            file.write(call(ANNULUS, "plan", "--seq-len", "4096", "--segment-lengths", "1024,4096", "--dilation-rates", "1,4", "--ranks", "4",
                            "--causal", "--json").stdout)

        # One table: four rows of the sweep, one of JSON, one of run, one of plan, each with schema and source.
        table = os.path.join(folder, "all.jsonl")
        script("collect", "--output", table, results)
        with open(table, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        assert len(rows) == 7, len(rows)
        assert all(row["schema"] == "annulus.results/1" and row["source"] for row in rows)
        assert sorted(row["kind"] for row in rows) == ["bench"] * 5 + ["plan", "run"]
        swept = [row for row in rows if row["source"] == "bench.h5"]
        assert [(row["ranks"], row["seq-len"]) for row in swept] == [(1, 96), (1, 192), (3, 96), (3, 192)]
        assert all(len(row["samples_ms"]) == 3 and sorted(row["samples_ms"])[1] == row["median_ms"] for row in swept)
        assert len(swept[2]["timings"]) == 3 and swept[2]["timings"][0][1]["bytes_received"] > 0
        assert "command_line" in swept[0]["provenance"]
        # What collect wrote it reads, and as a table it has a line for each row.
        assert script("collect", table).stdout == open(table, encoding="utf-8").read()
        lines = list(csv.DictReader(io.StringIO(script("collect", "--csv", table).stdout)))
        assert len(lines) == 7 and lines[0]["seq-len"] and "samples_ms" not in lines[0]

        # Other schemas and other files are refused where they are named, and left out of a folder.
        strange = os.path.join(folder, "strange.jsonl")
        with open(strange, "w", encoding="utf-8") as file:
            file.write('{"schema": "annulus.results/99", "kind": "bench"}\n')
        assert "schema annulus.results/99" in script("collect", strange, code=2).stderr
        script("collect", os.path.join(folder, "absent.h5"), code=2)
        with open(os.path.join(results, "other.json"), "w", encoding="utf-8") as file:
            file.write('{"colour": "red"}')
        assert "other.json" in script("collect", results).stderr

        # Every figure can be drawn of something, as PNG and SVG.
        figures = os.path.join(folder, "figures")
        script("plot", "--output", figures, made_up(folder), table)
        names = ("strong", "weak", "efficiency", "exposed", "roofline", "prediction", "timeline", "pattern")
        for name in names:
            with open(os.path.join(figures, f"{name}.png"), "rb") as file:
                assert file.read(8) == b"\x89PNG\r\n\x1a\n", name
            with open(os.path.join(figures, f"{name}.svg"), encoding="utf-8") as file:
                assert "</svg>" in file.read(), name
        assert "no row has a prediction" in script("plot", "--figure", "prediction", "--output", figures, table, code=2).stderr
        script("plot", "--figure", "spiral", "--output", figures, table, code=2)

        # The page holds what it shows: no address but those of XML's own names, which nobody fetches.
        page = script("report", results).stdout.strip()
        with open(page, encoding="utf-8") as file:
            text = file.read()
        assert text.count("data:image/svg+xml;base64,") == text.count("<figure>") >= 3
        assert not re.search(r"(src|href)=\"(?!data:)", text)
        assert "command_line: " in text and text.count("<tr>") == 8
        script("report", os.path.join(folder, "absent"), code=2)
    print("collect, plot and report make of results what they should")


if __name__ == "__main__":
    main()
