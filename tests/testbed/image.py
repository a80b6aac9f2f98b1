#!/usr/bin/env python3
"""Makes a container image archive from a folder, without a container engine.

    image.py OUT.tar NAME:TAG ROOT_DIR [--entrypoint JSON] [--user UID] [--env K=V]... [--label K=V]...

One layer, docker-archive format, the same bytes for the same folder; load it with `cluster load OUT.tar`.
"""
import argparse
import hashlib
import io
import json
import os
import tarfile
import tempfile


def anonymous(info):
    """Ownership and times would differ from machine to machine."""
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mtime = 0
    return info


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("name")
    parser.add_argument("root")
    parser.add_argument("--entrypoint", type=json.loads, default=[])
    parser.add_argument("--user", default="")
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--label", action="append", default=[])
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(args.out))) as folder:
        layer = os.path.join(folder, "layer.tar")
        with tarfile.open(layer, "w") as tar:
            tar.add(args.root, arcname=".", filter=anonymous)
        layer_id = sha256(layer)
        config = json.dumps({
            "architecture": "amd64",
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {
                "Entrypoint": args.entrypoint,
                "User": args.user,
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", *args.env],
                "Labels": dict(label.split("=", 1) for label in args.label),
            },
            "rootfs": {"type": "layers", "diff_ids": ["sha256:" + layer_id]},
            "history": [{"created": "1970-01-01T00:00:00Z"}],
        }).encode()
        config_name = hashlib.sha256(config).hexdigest() + ".json"
        layer_name = layer_id + "/layer.tar"
        manifest = json.dumps([{"Config": config_name, "RepoTags": [args.name], "Layers": [layer_name]}]).encode()

        with tarfile.open(args.out, "w") as tar:
            for name, content in ((config_name, config), ("manifest.json", manifest)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            tar.add(layer, arcname=layer_name, filter=anonymous)
        print(f"{args.name}: {os.path.getsize(layer)} bytes in {args.out}")


if __name__ == "__main__":
    main()
