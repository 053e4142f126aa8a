"""Random small models with control flow, state and odd shapes, and what plain torch answers for them.

A model is grown line by line. Each line runs at once, on three example calls with other batch and other free sizes,
so that torch itself says what fits; the whole is then written down as a model file, built anew from it, filled with
weights as torch fills them, and asked item by item. The same seed gives the same model on the same machine.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import linecache
import math
import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.random_comparison import differs, rows_of, tensors_of
from tests.support.random_control import CONTROL_OPERATORS, DATA_TESTS, SIZE_TESTS
from tests.support.random_inputs import Input, draw_inputs, draw_sizes, draw_tensor, offend
from tests.support.random_operators import BOOL_OPERATORS, FLOAT_OPERATORS, INT_OPERATORS, Names, Step, Value

HEAD = "import copy\nimport math\n\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"
OPERATORS = {"float": FLOAT_OPERATORS, "int": INT_OPERATORS, "bool": BOOL_OPERATORS}
BATCHES = (1, 3, 2)
ELEMENTS_MAX = 20_000
ITEM_COUNT = 7
# How far an answer may be from eager, relative to the largest number of its tensor. Half precision within the model
# rounds differently when a kernel takes rows together.
TOLERANCE = {"fp32": 1e-4, "half": 1e-2, "bf16": 5e-2}
# Relative noise on inputs and weights which may change the right answer by a quarter of that; a model that makes more
# of it says nothing about a server.
NOISE = {"fp32": 1e-6, "half": 1e-3, "bf16": 2e-3}


@dataclass
class Item:
    """A request to be answered by itself.

    Attributes:
        inputs: what is sent, [1, ...] each.
        expected: the model's output; None if it raises.
        offence: what of the description it breaks.
    """

    inputs: tuple[torch.Tensor, ...]
    expected: Any = None
    offence: str = ""

    @property
    def is_answerable(self) -> bool:
        """Whether every tensor of the output has a row for the item."""
        if self.expected is None:
            return False
        tensors = tensors_of(self.expected)
        return bool(tensors) and all(each.dim() > 0 and each.shape[0] == 1 for each in tensors)

    @property
    def row(self) -> Any:
        return rows_of(self.expected)


@dataclass
class RandomModel:
    """A model and what is right for it.

    Attributes:
        weights: of a state dict's file, or of TorchScript if ``form`` is not ``eager``.
        config: model-config.yaml.
        in_order: outputs for the items that do not raise, one after the other by one instance; only if it
            ``remembers``, when nothing else is right.
    """

    seed: int
    source: str
    form: str
    weights: bytes
    config: dict[str, Any]
    inputs: list[Input]
    items: list[Item]
    precision: str
    tolerance: float
    remembers: bool
    in_order: list[Item] = field(default_factory=list)

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.form}\nmodel-config.yaml: {json.dumps(self.config)}\n\n{self.source}"


class _RefusedError(Exception):
    """A draw that makes no model."""


def draw_model(seed: int) -> RandomModel:
    """The model of ``seed``; leaves torch's generator as it was."""
    dice = random.Random(seed)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for _ in range(200):
            torch.manual_seed(dice.getrandbits(32))
            with contextlib.suppress(_RefusedError):
                return _Growth(seed, dice).model()
    raise AssertionError(f"nothing grows from seed {seed}")


def build(source: str, seed: int) -> nn.Module:
    """The model file's class, built as a fresh process builds it."""
    name = f"random_model_{seed}.py"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # scripting reads the source
    scope: dict[str, Any] = {"__name__": f"random_model_{seed}"}
    exec(compile(source, name, "exec"), scope)
    torch.manual_seed(99)
    made: nn.Module = scope["Net"]().eval()
    return made


class _Growth:
    """One attempt at a model."""

    def __init__(self, seed: int, dice: random.Random):
        self.seed = seed
        self.dice = dice
        self.names = Names(dice)
        self.generator = torch.Generator().manual_seed(dice.getrandbits(32))
        self.inputs = draw_inputs(dice)
        self.steps: list[Step] = []
        self.values: list[Value] = []
        scope = {"torch": torch, "nn": nn, "F": F, "math": math, "copy": copy, "self": nn.Module().eval()}
        self.calls: list[dict[str, Any]] = [
            {**scope, **dict(zip([one.name for one in self.inputs], tensors, strict=True))}
            for tensors in self._example_calls()
        ]
        for one in self.inputs:
            self._found(one.name)
        self.grow()

    def _example_calls(self) -> list[tuple[torch.Tensor, ...]]:
        sizes: list[dict[str, int]] = [{}, {}, {}]
        for free in {each.name: each for one in self.inputs for each in one.free}.values():
            drawn = free.pad_to or self.dice.sample(range(max(free.low, 3), (free.high or 12) + 1)[:9], 3)
            for each, size in zip(sizes, drawn, strict=True):
                each[free.name] = size
        return [
            tuple(draw_tensor(self.dice, self.generator, one, one.sized(each, batch)) for one in self.inputs)
            for each, batch in zip(sizes, BATCHES, strict=True)
        ]

    # --- lines ----------------------------------------------------------------------------------------------------

    def grow(self) -> None:
        wanted = self.dice.randint(2, 7)
        for _ in range(wanted * 8):
            if len(self.steps) >= wanted:
                return
            x = self.values[-1] if self.dice.random() < 0.6 else self.dice.choice(self.values)
            operators = CONTROL_OPERATORS if x.kind == "float" and self.dice.random() < 0.3 else OPERATORS[x.kind]
            weights, choices = zip(*operators, strict=True)
            step = self.dice.choices(choices, weights)[0](self.names, x, self.values)
            if step is not None and self._runs(step):
                self.steps.append(step)
                for name in step.results:
                    self._found(name)

    def _runs(self, step: Step) -> bool:
        try:
            exec("\n".join(step.init), self.calls[0])
            for call in self.calls:
                exec("\n".join(step.lines), call)
        except Exception:  # whatever torch has against it
            return False
        made = [call[name] for name in step.results for call in self.calls]
        return all(isinstance(each, torch.Tensor) and 0 < each.numel() <= ELEMENTS_MAX for each in made)

    def _found(self, name: str) -> None:
        tensors = tuple(call[name] for call in self.calls)
        ranks = {each.dim() for each in tensors}
        if len(ranks) > 1 or len({each.dtype for each in tensors}) > 1:
            return  # different kinds of things in different calls: nothing more is made of it
        is_batched = tensors[0].dim() > 0 and all(
            each.shape[0] == batch for each, batch in zip(tensors, BATCHES, strict=True)
        )
        sizes = [{each.shape[dim] for each in tensors} for dim in range(ranks.pop())]
        shape = tuple(next(iter(each)) if len(each) == 1 else None for each in sizes)
        self.values.append(Value(name, tensors, shape, is_batched))

    # --- the whole ------------------------------------------------------------------------------------------------

    def _output(self, choices: Sequence[Value]) -> str:
        """An expression over some of ``choices``."""
        late = list(choices)[-4:]
        names = [self.dice.choice(late).name for _ in range(3)]
        a, b, c = (each if self.dice.random() > 0.02 else f"{each}.sum()" for each in (late[-1].name, *names[:2]))
        if self.dice.random() < 0.5:
            return a
        return self.dice.choice([
            f"{a}, {b}", f"{a}, {b}, {c}", f'{{"first": {a}, "second": {b}}}', f'{{"only": {a}}}', f"[{a}, {b}]",
            f"{a}, None", f"{a}, ({b}, {c})", f'{{"a": ({a}, {b}), "none": None}}', f"{a}, 3", f"({a},)",
            f'{{"z": {a}, "count": 2, "label": "text"}}', f'{{"inner": {{"a": {a}}}, "b": {b}}}', f"({a}, True, {b})",
        ])  # fmt: skip

    def _body(self) -> list[str]:
        batched = [each for each in self.values[len(self.inputs) :] if each.is_batched]
        if not batched:
            raise _RefusedError
        returned = self._output(batched)
        early: tuple[int, list[str]] = (-1, [])
        if self.dice.random() < 0.1 and len(self.steps) > 1:
            at = self.dice.randrange(1, len(self.steps))
            made = {name for step in self.steps[:at] for name in step.results}
            choices = [each for each in batched if each.name in made]
            if choices:
                x = self.dice.choice(choices)
                test = self.dice.choice(DATA_TESTS if x.rank < 2 else [*DATA_TESTS, *SIZE_TESTS])
                test = test.format(x=x.name, c=self.names.number())
                early = at, [f"if {test}:", f"    return {self._output(choices)}"]
        return self._written(returned, *early)

    def _written(self, returned: str, early_at: int, early: list[str]) -> list[str]:
        """forward without the lines that nothing depends on; these steps go from ``steps`` too."""
        needed = set(re.findall(r"\w+", returned))
        body = [f"return {returned}"]
        for index in reversed(range(len(self.steps))):
            if index + 1 == early_at:
                body = early + body
                needed.update(re.findall(r"\w+", " ".join(early)))
            step = self.steps[index]
            if step.acts or needed & set(step.results):
                body = step.lines + body
                needed.update(re.findall(r"\w+", " ".join(step.lines)))
            else:
                del self.steps[index]
        return body

    def source(self) -> str:
        body = self._body()
        init = [line for step in self.steps for line in step.init]
        if any(step.is_seeded for step in self.steps) or self.dice.random() < 0.3:
            init.insert(0, f"torch.manual_seed({self.dice.randrange(100)})")
        names = ", ".join(one.name for one in self.inputs)
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in init]
        lines += ["", f"    def forward(self, {names}):", *(f"        {line}" for line in body)]
        return HEAD + "\n".join(lines) + "\n"

    def model(self) -> RandomModel:
        source = self.source()
        try:
            state = self._weights(source)
        except RuntimeError as error:
            raise _RefusedError from error

        def fresh() -> nn.Module:
            made = build(source, self.seed)
            made.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
            return made

        remembers = any(step.remembers for step in self.steps)
        halves = any(each.dtype is torch.float16 for each in self.values)
        precision = "bf16" if not halves and not remembers and self.dice.random() < 0.12 else "fp32"
        measure = "half" if halves else precision
        items = self._items(fresh, measure)
        if measure == "bf16" and not any(item.is_answerable for item in items):
            precision = measure = "fp32"
            items = self._items(fresh, measure)
        if not any(item.expected is not None for item in items):
            raise _RefusedError
        self._add_offences(items)
        form, weights = self._form(fresh, items, measure, state)
        config = self._config(precision, remembers)
        model = RandomModel(self.seed, source, form, weights, config, self.inputs, items, precision,
                            TOLERANCE[measure], remembers)  # fmt: skip
        if remembers:
            instance = fresh()
            fine = [item for item in items if item.expected is not None and not item.offence]
            model.in_order = [Item(each.inputs, self._ask(instance, each.inputs)) for each in fine * 2]
        return model

    def _config(self, precision: str, remembers: bool) -> dict[str, Any]:
        dice = self.dice
        free = [each.name for one in self.inputs for each in one.free]
        entries = [one.entry(shares=any(free.count(each.name) > 1 for each in one.free)) for one in self.inputs]
        config: dict[str, Any] = {"input": entries if len(entries) > 1 or dice.random() < 0.5 else entries[0]}
        config["batchSize"] = dice.choice([1, 2, 3, 4, 8, 8])
        config["minWorkers"] = config["maxWorkers"] = 1 if remembers else dice.choice([1, 2])
        if config["batchSize"] > 1 and dice.random() < 0.7:  # so that batches form for sure
            config.update({"minBatch": dice.randint(2, config["batchSize"]), "maxBatchDelay": 30})
        if precision != "fp32":
            config["precision"] = precision
        if dice.random() < 0.1:
            config["conversion"] = "python"
        return config

    def _weights(self, source: str) -> bytes:
        """A state dict that is not what the constructor makes."""
        trained = build(source, self.seed)
        for name, each in trained.named_buffers():
            if name.endswith("running_var"):
                each.add_(torch.rand(each.shape, generator=self.generator))
            elif name.endswith("running_mean"):
                each.add_(torch.randn(each.shape, generator=self.generator))
        for each in trained.parameters():
            each.add_(torch.randn(each.shape, generator=self.generator).to(each.dtype) * 0.3)
        file = io.BytesIO()
        torch.save(trained.state_dict(), file)
        return file.getvalue()

    # --- items ----------------------------------------------------------------------------------------------------

    def _ask(self, module: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Any:
        """Its output; None if it raises. What the server would pad is padded."""
        seen = [one.padded(each).clone() for one, each in zip(self.inputs, tensors, strict=True)]
        try:
            return copy.deepcopy(module(*seen))
        except Exception:  # the model's own code
            return None

    def _items(self, fresh: Callable[[], nn.Module], measure: str) -> list[Item]:
        items = []
        for index in range(ITEM_COUNT):
            sizes = draw_sizes(self.dice, self.inputs)
            tensors = tuple(draw_tensor(self.dice, self.generator, one, one.sized(sizes)) for one in self.inputs)
            if index == ITEM_COUNT - 1 and self.dice.random() < 0.3:
                tensors = self._not_finite(tensors)
            item = Item(tensors, self._ask(fresh(), tensors))
            if item.expected is None or self._is_steady(fresh, item, measure):
                items.append(item)
        return items

    def _not_finite(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        for one, each in zip(self.inputs, tensors, strict=True):
            if each.is_floating_point() and one.values is None and not one.is_mask:
                each.view(-1)[0] = self.dice.choice([math.nan, math.inf, -math.inf])
        return tensors

    def _is_steady(self, fresh: Callable[[], nn.Module], item: Item, measure: str) -> bool:
        """Whether a little noise on weights and inputs changes the output by little."""

        def noisy(tensor: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(tensor.shape, generator=self.generator) * NOISE[measure]
            return (tensor * (1 + noise)).to(tensor.dtype) if tensor.is_floating_point() else tensor

        for _ in range(2):
            module = fresh()
            for each in module.parameters():
                each.copy_(noisy(each))
            again = self._ask(module, [noisy(each) for each in item.inputs])
            if differs(item.expected, again, TOLERANCE[measure] / 4):
                return False
        return True

    def _add_offences(self, items: list[Item]) -> None:
        for item in items[:2]:
            offence = offend(self.dice, self.inputs, item.inputs)
            if offence is not None:
                items.append(Item(offence[1], None, offence[0]))

    def _form(self, fresh: Callable[[], nn.Module], items: list[Item], measure: str, state: bytes) -> tuple[str, bytes]:
        """Eager, or TorchScript where that is true to eager."""
        form = self.dice.choices(["eager", "scripted", "traced"], [5, 3, 2])[0]
        if form == "eager":
            return form, state
        try:
            if form == "scripted":
                module = torch.jit.script(fresh())
            else:
                example = tuple(self.calls[1][one.name].clone() for one in self.inputs)
                module = torch.jit.trace(fresh(), example, check_trace=False)
            file = io.BytesIO()
            torch.jit.save(module, file)
        except Exception:  # it cannot be
            return "eager", state
        for item in items:
            got = self._ask(torch.jit.load(io.BytesIO(file.getvalue())).eval(), item.inputs)
            if not item.offence and differs(item.expected, got, TOLERANCE[measure] / 4):
                return "eager", state
        return form, file.getvalue()
