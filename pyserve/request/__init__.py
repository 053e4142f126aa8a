"""One request and its answer, whatever carries it: message, answer slot, id, budget, deadline, meaning of its body.

Knows no protocol and no model.
"""
