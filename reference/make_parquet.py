"""Makes the Parquet files of tests/fixtures/parquet with pyarrow, which wrote those of the Hugging Face hub.

    pip install pyarrow && python reference/make_parquet.py tests/fixtures/dataset tests/fixtures/parquet

hub/      two shards of a training split and one of a test split, as `Dataset.push_to_hub` names and writes them: `image` {bytes, path} and `text`,
          Snappy, small row groups.
zstd/     one file: Zstandard, dictionary encoding, small pages, pictures as plain binary in `img`, a list of captions of each.
gzip/     one file with a compression that is not read.
nulls/    one file, uncompressed, data pages of version 2: a row without bytes, one without a caption, one whose picture is damaged.
"""

import json
import pathlib
import sys

import pyarrow as pa
import pyarrow.parquet as pq

source, target = map(pathlib.Path, sys.argv[1:3])
lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
pictures = [(source / line["file_name"]).read_bytes() for line in lines]
captions = [line["caption"] for line in lines]
image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def structs(rows):
    return pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(rows)], image)


def write(name, table, **settings):
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **settings)


def hub(rows):
    features = {"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}
    table = pa.table({"image": structs([pictures[i] for i in rows]), "text": pa.array([captions[i] for i in rows])})
    return table.replace_schema_metadata({"huggingface": json.dumps(features)})


write("hub/data/train-00000-of-00002.parquet", hub([0, 1, 2, 3]), compression="snappy", row_group_size=2)
write("hub/data/train-00001-of-00002.parquet", hub([4, 5]), compression="snappy")
write("hub/data/test-00000-of-00001.parquet", hub([0]), compression="snappy")

write("gzip/pictures.parquet", hub([0]), compression="gzip")

several = pa.table({"img": pa.array(pictures * 3, pa.binary()), "captions": pa.array([[c, c + " again"] for c in captions * 3], pa.list_(pa.string()))})
write("zstd/pictures.parquet", several, compression="zstd", use_dictionary=True, data_page_size=256, write_batch_size=2)

broken = [pictures[0], None, pictures[2], b"\x89PNG\r\n\x1a\n broken"]
nulls = pa.table({"image": structs(broken), "caption": pa.array([captions[0], captions[1], None, captions[3]]), "label": pa.array([0, 1, 2, 3])})
write("nulls/0000.parquet", nulls, compression="none", data_page_version="2.0", use_dictionary=False)
