import os
import sys


def handle(data, context):
    if data is None:
        return None
    return [{
        "argv_is_list": isinstance(sys.argv, list), "path_has_folder": any(os.path.realpath(p or ".") == os.path.realpath(os.getcwd()) for p in sys.path),
        "main": "__main__" in sys.modules, "mine": os.environ.get("MY_SETTING"),
        "properties": sorted(context.system_properties),
    }] * len(data)
