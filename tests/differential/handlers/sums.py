"""Answers what an envelope unpacked, and fails where it is told to."""

import json


class Handler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return [json.loads(json.dumps({"got": repr(row)})) for row in data]
