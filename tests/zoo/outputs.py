"""Outputs that are no plain tensor with one row per item."""

from __future__ import annotations

from .case import Case, floats, tensor

X, ITEMS = (tensor(4),), floats(4)


def _with_head(body: str, before: str = "") -> str:
    """A model with one linear layer, whose forward ends with ``body``."""
    return f"""
{before}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        y = self.fc(x)
        {body}
"""


BOTH = ("eager", "scripted")

CASES = [
    Case("tuple_with_none", "None beside a tensor", _with_head("return y, None"), X, ITEMS),
    Case("none_between", "None between tensors", _with_head("return x, None, y"), X, ITEMS),
    Case("whole_number_beside", "a plain number beside a tensor", _with_head("return y, 7"), X, ITEMS, BOTH),
    Case("text_beside", "a text and a bool beside a tensor", _with_head('return {"y": y, "unit": "cm", "ok": True}'),
         X, ITEMS),
    Case("dict_of_tensors", "names of outputs", _with_head('return {"logits": y, "x": x}'), X, ITEMS, BOTH),
    Case("dict_in_dict", "names within names", _with_head('return {"a": {"b": y, "c": x}, "d": x * 2}'), X, ITEMS),
    Case("nested_tuple", "tuples within tuples", _with_head("return y, (x, (y * 2, x + 1))"), X, ITEMS, BOTH),
    Case("list_in_dict", "a list of tensors within a dict", _with_head('return {"all": [y, x], "none": None}'), X,
         ITEMS),
    Case(
        "named_tuple", "a named tuple", """
        from collections import namedtuple

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 3)
                self.out = namedtuple("Out", "scores x")  # at the top it would be a second class of the file

            def forward(self, x):
                return self.out(self.fc(x), x)
        """, X, ITEMS,
    ),
    Case("values_and_places", "what torch.max gives back", _with_head("return y.max(1)"), X, ITEMS),
    Case("namespace", "an object that is no container", _with_head(
        "return types.SimpleNamespace(logits=y)", "import types"), X, ITEMS),
    Case("one_tuple", "a tuple of one", _with_head("return (y,)"), X, ITEMS, BOTH),
    Case("scalar_beside", "a number of the whole batch beside its rows", _with_head("return y, y.sum()"), X, ITEMS,
         may_refuse=("eager",)),
    Case("no_rows", "sums over the batch: its answer has as many rows as a batch of four", _with_head(
        "return y.sum(0).repeat(2)[:4]"), X, ITEMS, may_refuse=("eager",)),
    Case("rows_twice", "two rows for each item", _with_head("return torch.cat([y, y + 1])"), X, ITEMS,
         may_refuse=("eager",)),
    Case("size_of_the_batch", "a plain number that tells the batch's size", _with_head("return y, x.shape[0]"), X,
         ITEMS, BOTH, may_refuse=BOTH),
]  # fmt: skip
