"""Operators of random models that a careless conversion gets wrong: control flow, state, aliases, constructors."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.random_operators import Names, Operator, Step, Value

# Changes that keep the shape, for the arms of branches and the bodies of loops.
ARMS = ("{x} * 0.5", "{x} + 1.0", "torch.tanh({x})", "-{x}", "{x} * {x} * 0.1", "torch.relu({x})", "{x} / 255")
DATA_TESTS = (
    "{x}.max() > {c}", "bool(({x} > {c}).all())", "{x}.sum() > 0", "{x}.mean().item() > {c}", "{x}[0].sum() > 0",
    "bool(({x} == 0).any())", "float({x}.abs().max()) > 10", "torch.equal({x}, {x}.abs())", "{x}.min() >= 0",
)  # fmt: skip
SIZE_TESTS = ("{x}.shape[1] > 7", "{x}.size(-1) % 2 == 0", "len({x}) > 1", "{x}.shape[1] == 1", "{x}.shape[-1] >= 20",
              "{x}.numel() > 30")  # fmt: skip


def arm(names: Names, x: Value) -> str:
    return names.dice.choice(ARMS).format(x=x.name)


def branch(names: Names, x: Value, _: Sequence[Value]) -> Step:
    tests = DATA_TESTS if x.rank < 2 or names.chance(0.5) else SIZE_TESTS
    test = names.dice.choice(tests).format(x=x.name, c=names.number())
    y = names.fresh()
    lines = [f"{y} = {arm(names, x)}", f"if {test}:", f"    {y} = {arm(names, x)}"]
    return Step(lines, [y])


def loop_over_dimension(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    if x.rank != 3 or x.shape[2] is None:
        return None
    layer, h, y = names.fresh("layer"), names.fresh("h"), names.fresh()
    init = [f"self.{layer} = nn.Linear({x.shape[2]}, {x.shape[2]}){x.cast}"]
    way = names.dice.randrange(3)
    if way == 0:
        body = [
            f"{h} = torch.zeros({x.name}.shape[0], {x.shape[2]}, dtype={x.name}.dtype)",
            f"for t in range({x.name}.shape[1]):",
            f"    {h} = torch.tanh(self.{layer}({x.name}[:, t]) + {h})",
            f"{y} = {h} * 1.0",
        ]
    elif way == 1:
        body = [f"{y} = torch.stack([self.{layer}(each) for each in {x.name}.unbind(1)], 1)"]
    else:
        body = [
            f"{y} = {x.name}[:, 0]",
            f"for t in range(1, {x.name}.size(1), 2):",
            f"    {y} = torch.maximum({y}, self.{layer}({x.name}[:, t]))",
        ]
    return Step(body, [y], init)


def loop_over_data(names: Names, x: Value, _: Sequence[Value]) -> Step:
    y = names.fresh()
    if names.chance(0.5):
        body = [f"for _ in range(int({x.name}.abs().max().clamp(0, 4))):", f"    {y} = {y} * 0.5 + 1.0"]
    else:
        # Not `while`: an infinity would never get small.
        body = ["for _ in range(40):", f"    if bool({y}.abs().max() > 2.0):", f"        {y} = {y} * 0.5"]
    return Step([f"{y} = {x.name} * 1.0", *body], [y])


def loop_over_rows(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    """Each row takes its own branch: nothing goes from one to another."""
    if not x.is_batched:
        return None
    rows, y = names.fresh("rows"), names.fresh()
    return Step([
        f"{rows} = []",
        f"for i in range({x.name}.shape[0]):",
        f"    row = {x.name}[i]",
        f"    if bool(row.sum() > {names.number()}):",
        f"        row = row * {names.number()}",
        f"    {rows}.append(row)",
        f"{y} = torch.stack({rows})",
    ], [y])  # fmt: skip


def length_of_data(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    """What is not zero decides how much is read, for all rows together."""
    if x.rank != 2:
        return None
    n, y = names.fresh("n"), names.fresh()
    return Step([f"{n} = int(({x.name} != 0).sum(1).max())", f"{y} = {x.name}[:, :max({n}, 1)].sum(1)"], [y])


def number_of_data(names: Names, x: Value, _: Sequence[Value]) -> Step:
    number, y = names.fresh("number"), names.fresh()
    text = names.dice.choice(["float({x}.mean())", "{x}.max().item()", "float({x}.abs().sum())"]).format(x=x.name)
    return Step([f"{number} = {text}", f"{y} = {x.name} - {number}"], [y])


def refusal(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    if x.rank < 2:
        return None
    text = names.dice.choice([
        "assert {x}.shape[1] <= {s}", "assert bool(({x} < {c}).all()), 'too large'",
        "if {x}.shape[1] > {s}:\n    raise ValueError('too long')",
    ]).format(x=x.name, s=names.dice.choice([12, 40]), c=names.dice.choice([20, 1000]))  # fmt: skip
    return Step(text.split("\n"), [], acts=True)


def changed_in_place(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    y = names.fresh()
    if x.rank < 2:
        return None
    lines = names.dice.choice([
        ["{x}.mul_(2.0)", "{y} = {x} + 0.5"], ["{y} = {x}[:, :2]", "{y}.zero_()", "{y} = {x} * 1.0"],
        ["{x} += 1.0", "{y} = {x}"], ["{y} = {x}", "{y}[:, 0] = 0.0"], ["{y} = F.relu({x}, inplace=True)"],
        ["{x}.clamp_(-1.0, 1.0)", "{y} = {x}"], ["{y} = {x}.view({x}.shape)", "{y}.add_(1.0)"],
        ["{x}[{x} > 1.0] = 1.0", "{y} = {x} * 2.0"], ["{y} = {x}.transpose(0, 1)", "{y}.neg_()", "{y} = {x} + 0.0"],
    ])  # fmt: skip
    return Step([line.format(x=x.name, y=y) for line in lines], [y], acts=True)


def scratch_buffer(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    """Written before it is read, by each call: no call sees another's, if calls do not meet in it."""
    if not x.is_batched:
        return None
    kept, y = names.fresh("kept"), names.fresh()
    buffer = [f"self.register_buffer('{kept}', torch.zeros(1, dtype={x.dtype}), persistent=False)"]
    if names.chance(0.5):
        return Step([f"self.{kept} = {x.name} * 2.0", f"{y} = self.{kept}"], [y], buffer, acts=True)
    return Step([
        f"self.{kept}.resize_({x.name}.shape)", f"self.{kept}.copy_({x.name})", f"self.{kept}.mul_(0.5)",
        f"{y} = self.{kept}" if names.chance(0.5) else f"{y} = self.{kept} + {x.name}",
    ], [y], buffer, acts=True)  # fmt: skip


def counter(names: Names, x: Value, _: Sequence[Value]) -> Step:
    kept, y = names.fresh("kept"), names.fresh()
    return Step(
        [f"self.{kept} += 1", f"{y} = {x.name} + self.{kept} * 0.5"],
        [y], [f"self.register_buffer('{kept}', torch.zeros(1))"], acts=True, remembers=True,
    )  # fmt: skip


def unread_counter(names: Names, x: Value, _: Sequence[Value]) -> Step:
    kept, y = names.fresh("kept"), names.fresh()
    return Step([f"self.{kept} += 1", f"{y} = {x.name} * 1.5"], [y],
                [f"self.register_buffer('{kept}', torch.zeros(1, dtype=torch.int64))"], acts=True)  # fmt: skip


def remembered_size(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    """Positions are made anew when the size changes: right for every call that runs by itself."""
    if x.rank < 2:
        return None
    kept, y = names.fresh("kept"), names.fresh()
    ones = ", 1" * (x.rank - 2)
    return Step([
        f"if self.{kept} is None or self.{kept}.shape[0] != {x.name}.shape[1]:",
        f"    self.{kept} = torch.arange({x.name}.shape[1]) * 0.25",
        f"{y} = {x.name} + self.{kept}.view(1, -1{ones})",
    ], [y], [f"self.{kept} = None"], acts=True)  # fmt: skip


def returned_buffer(names: Names, x: Value, _: Sequence[Value]) -> Step:
    kept, y = names.fresh("kept"), names.fresh()
    made = names.dice.choice(["torch.arange(3.0)", "torch.arange(100085, 100088)", "torch.rand(3)"])
    init = [f"self.register_buffer('{kept}', {made})"]
    return Step([f"{y} = self.{kept}.expand({x.name}.shape[0], 3)"], [y], init)


def made_in_constructor(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    """What the constructor does beyond making parameters: ties, views, seeded numbers, numbers of the weights."""
    size = x.shape[-1] if x.shape else None
    if size is None:
        return None
    a, b, y = names.fresh("layer"), names.fresh("made"), names.fresh()
    plain = f"nn.Linear({size}, {size}){x.cast}"
    square = f"self.{a} = {plain}"

    def buffer(made: str) -> str:
        return f"self.register_buffer('{b}', {made}, persistent=False)"

    # (lines, what is computed, whether numbers that are in no file come out of it)
    init, text, is_seeded = names.dice.choice([
        ([square, f"self.{b} = {plain}", f"self.{b}.weight = self.{a}.weight"], "self.{b}(self.{a}({x}))", False),
        ([square, f"self.{b} = [self.{a}.weight]"], "self.{a}({x}) @ self.{b}[0]", False),
        ([square, buffer(f"self.{a}.weight.detach().t()")], "self.{a}({x}) @ self.{b}", False),
        ([square, buffer(f"self.{a}.weight.detach().abs().mean()")], "self.{a}({x}) / self.{b}", True),
        ([square, f"self.{b} = float(self.{a}.weight.detach().abs().max())"], "self.{a}({x}) * self.{b}", True),
        ([buffer(f"torch.randn({size}, 3, dtype={x.dtype})")], "torch.cos({x} @ self.{b})", True),
        ([f"self.{b} = torch.randn({size}, dtype={x.dtype})"], "{x} * self.{b}", True),
        ([square, f"self.{b} = copy.deepcopy(self.{a})"], "self.{b}(torch.relu(self.{a}({x})))", False),
        ([f"self.{b} = torch.nn.utils.parametrizations.weight_norm({plain})"], "self.{b}({x})", False),
        ([f"self.{b} = nn.Parameter(torch.empty({size}, dtype={x.dtype}).uniform_())"], "{x} * self.{b}", False),
        ([f"self.{b} = nn.ModuleList({plain} for _ in range(2))"], "self.{b}[1](torch.tanh(self.{b}[0]({x})))", False),
        ([square, f"self.{b} = nn.Parameter(torch.eye({size}, dtype={x.dtype}), requires_grad=False)"],
         "self.{a}({x}) @ (self.{b} + 1.0)", False),
    ])  # fmt: skip
    return Step([f"{y} = {text.format(x=x.name, a=a, b=b)}"], [y], init, is_seeded=is_seeded)


CONTROL_OPERATORS: list[tuple[float, Operator]] = [
    (3, branch), (2, loop_over_dimension), (1.5, loop_over_data), (1, loop_over_rows), (1, length_of_data),
    (0.7, number_of_data), (0.7, refusal), (2, changed_in_place), (1.2, scratch_buffer),
    (0.5, counter), (0.5, unread_counter), (0.5, remembered_size), (0.8, returned_buffer), (3, made_in_constructor),
]  # fmt: skip
