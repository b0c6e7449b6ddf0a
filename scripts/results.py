# SPDX-License-Identifier: Apache-2.0
"""Reads the results of `annulus` into rows, which are dictionaries. What scripts/collect, plot and report share.

A row is what `bench` measured of one configuration, what `run` timed, or what `plan` says of one number of ranks. JSON lines that
`collect` writes carry SCHEMA; a line of another schema is refused, so that a change of meaning cannot pass unnoticed.
"""
import csv
import json
import os
import sys

SCHEMA = "annulus.results/1"
STEP_NUMBERS = ("compute_ms", "communication_ms", "exposed_ms", "bytes_sent", "bytes_received", "work_begin_ms", "work_end_ms",
                "transfer_begin_ms", "transfer_end_ms")


class Unreadable(Exception):
    """A file that is no result."""


def plain(value):
    """A number or text of HDF5 as Python has it; what is not a number is None, which JSON has a word for."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value != value:
        return None
    return value


def steps_of(group):
    """[rank][step] of a group of [rank, step] datasets."""
    names = [name for name in STEP_NUMBERS if name in group]
    if not names:
        return []
    columns = {name: group[name][()] for name in names}
    ranks, steps = columns[names[0]].shape
    return [[{name: plain(columns[name][rank][step]) for name in names} for step in range(steps)] for rank in range(ranks)]


def provenance_of(file):
    return {name: plain(value[()]) for name, value in file.get("provenance", {}).items()}


def from_hdf5(path):
    import h5py  # only who reads HDF5 needs it

    with h5py.File(path, "r") as file:
        provenance = provenance_of(file)
        if "samples_ms" in file:
            columns = {name: data[()] for name, data in file["rows"].items()}
            rows = []
            for number, samples in enumerate(file["samples_ms"][()]):
                row = {"kind": "bench", **{name: plain(values[number]) for name, values in columns.items()}}
                row["samples_ms"] = [plain(sample) for sample in samples]
                row["timings"] = steps_of(file[f"timings/{number}"])
                rows.append(row)
        elif "timings" in file:
            timings = steps_of(file["timings"])
            rows = [{"kind": "run", "ranks": len(timings), "timings": timings}]
        else:
            raise Unreadable(f"{path} holds neither rows of bench nor timings of run")
    for row in rows:
        row["provenance"] = provenance
    return rows


def flat(document, path):
    """One object that `bench --json` or `plan --json` printed, as a row."""
    row = dict(document)
    row.update(row.pop("problem", {}))
    if "samples_ms" in row:
        row["kind"] = "bench"
        row.pop("check", None)
    elif "per_rank" in row or "predicted" in row or "refused" in row:
        row["kind"] = "plan"
    else:
        raise Unreadable(f"{path} holds JSON of neither bench nor plan")
    return row


def from_json(path):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return from_lines(text, path)
    if isinstance(document, dict) and document.get("schema"):
        return from_lines(text, path)
    return [flat(each, path) for each in (document if isinstance(document, list) else [document])]


def from_lines(text, path):
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise Unreadable(f"{path}:{number}: {error.msg}") from None
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            found = row.get("schema") if isinstance(row, dict) else type(row).__name__
            raise Unreadable(f"{path}:{number}: schema {found}, and this program reads {SCHEMA}")
        rows.append(row)
    return rows


def read(path):
    """The rows of a file, each with its `source`."""
    if path.endswith((".h5", ".hdf5")):
        rows = from_hdf5(path)
    elif path.endswith((".json", ".jsonl")):
        rows = from_json(path)
    else:
        raise Unreadable(f"{path} is neither .h5 nor .json nor .jsonl")
    for row in rows:
        row.setdefault("source", os.path.basename(path))
        row["schema"] = SCHEMA
    return rows


def files_under(paths):
    """Files as they are named, and of folders the results in them, sorted."""
    for path in paths:
        if not os.path.isdir(path):
            yield path, True
            continue
        for folder, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                if name.endswith((".h5", ".hdf5", ".json", ".jsonl")) and not name.startswith("."):
                    yield os.path.join(folder, name), False


def read_all(paths, program):
    """Rows of all files. What was named and cannot be read ends the program with code 2; what stands in a folder is said and left out."""
    rows = []
    for path, named in files_under(paths):
        try:
            rows += read(path)
        except (Unreadable, OSError, KeyError, ValueError) as error:
            print(f"{program}: {error}", file=sys.stderr)
            if named:
                sys.exit(2)
    if not rows:
        print(f"{program}: there are no results in {', '.join(paths)}", file=sys.stderr)
        sys.exit(2)
    return rows


def write_lines(rows, out):
    for row in rows:
        ordered = {"schema": SCHEMA, "source": row.get("source"), "kind": row.get("kind")}
        ordered.update((name, value) for name, value in row.items() if name not in ordered)
        out.write(json.dumps(ordered) + "\n")


def write_csv(rows, out):
    """Columns that hold single values, of all rows together."""
    names = []
    for row in rows:
        names += [name for name, value in row.items() if name not in names and not isinstance(value, (list, dict))]
    writer = csv.DictWriter(out, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
