"""A handler of sequences: adds numbers up, one sum per sequence."""

from __future__ import annotations

# Adds up the numbers of each sequence. A request may wait for a file, and name the sequences that are over.
ADDER = """
import os
import time


class Adder:
    def initialize(self, context):
        self.sums = {}

    def handle(self, data, context):
        answers = []
        ids = [context.get_sequence_id(index) for index in range(len(data))]
        assert len(set(ids)) == len(ids), ids
        for index, (id, row) in enumerate(zip(ids, data)):
            order = row["body"]
            if order.get("running"):
                open(order["running"], "w").close()
            while "until" in order and not os.path.exists(order["until"]):
                time.sleep(0.001)
            self.sums.setdefault(id, []).append(order.get("add", 0))
            if order.get("end"):
                context.set_response_header(index, context.header_key_sequence_end, order["end"])
                for each in order["end"].split(";"):
                    self.sums.pop(each, None)
            answers.append({"id": id, "numbers": list(self.sums.get(id, [])), "pid": os.getpid(), "batch": ids,
                            "start": context.get_request_header(index, context.header_key_sequence_start)})
        return answers
"""
