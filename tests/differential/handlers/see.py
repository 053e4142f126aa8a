"""Answers with what a handler can see of its archive."""

import json
import os


def files(folder):
    found = []
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if each != "__pycache__")
        found += [os.path.relpath(os.path.join(at, name), folder) for name in sorted(names)]
        found += [os.path.relpath(os.path.join(at, name), folder) + "/" for name in folders]
    return sorted(found)


def handle(data, context):
    if data is None:
        return None
    seen = {
        "files": files(context.system_properties["model_dir"]),
        "here": os.path.samefile(os.getcwd(), context.system_properties["model_dir"]),
        "manifest": context.manifest,
        "yaml": repr(context.model_yaml_config),
        "name": context.model_name,
    }
    return [json.dumps(seen, sort_keys=True)] * len(data)
