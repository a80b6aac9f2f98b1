"""`finetune run` of the quickstart's job with other settings, for measurements on a GPU: its command line, and its log as it is written."""
import json
import pathlib
import sys

REPO = pathlib.Path(__file__).resolve().parents[1]
BUCKET = REPO / "examples/quickstart/bucket"


def command(binary, folder, cache, changes):
    """The command line; `folder` stands in for the bucket, `changes` are PATH=VALUE."""
    settings = [part for change in changes for part in ("--set", change)]
    return [binary, "run", REPO / "examples/quickstart/job.yaml", "--device", "cuda", "--bucket", f"s3://quickstart={folder}", "--log-format", "json",
            "--cache-dir", cache, *settings]  # fmt: skip


def entries(stream):
    """The entries of a log, each with its level and its fields. What is no entry goes to stderr."""
    for line in stream:
        try:
            entry = json.loads(line)
        except ValueError:
            print(line.rstrip(), file=sys.stderr)
            continue
        yield entry.get("level"), entry.get("fields", entry)
