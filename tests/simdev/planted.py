"""The bugs of mutants.py: what a slip in the handling of streams, events and buffers would look like."""

from __future__ import annotations

from typing import NamedTuple

BATCHES = "tests/test_device_batches.py"
SLOW = f"{BATCHES}::test_answers_are_right_when_something_is_slow"
RANDOM = f"{BATCHES}::test_answers_are_right_under_random_delays"
REFILLED = f"{BATCHES}::test_a_buffer_is_filled_again_only_when_its_copy_is_over"
KEPT = f"{BATCHES}::test_an_answer_is_not_changed_by_later_batches"
PAGEABLE = f"{BATCHES}::test_no_batch_of_the_examples_size_takes_pageable_memory"
OVERLAP = f"{BATCHES}::test_a_batch_is_copied_while_another_runs"
PACE = "tests/simdev/test_flow_pace.py"
SHAPES = f"{PACE}::test_groups_of_several_shapes_are_on_the_device_together"
REPLAYED = "tests/simdev/test_graphs.py::test_answers_do_not_lie_in_memory_that_the_next_replay_writes"
FILLED = "tests/simdev/test_buckets.py::test_a_batch_of_any_size_has_the_answers_of_its_items"


class Bug(NamedTuple):
    """``edits``: texts of ``csrc/{file}`` that are there once, and what stands there instead. ``users``: a word; all
    files of csrc/ with it are compiled, where the file with the bug is a header."""

    name: str
    what: str
    file: str
    edits: list[tuple[str, str]]
    tests: list[str]
    users: str = ""


BUGS = [
    Bug(
        "compute_does_not_wait",
        "operators do not wait for the copy to the device",
        "staging.cpp",
        [("    slot.uploaded.block(*compute_);\n", "")],
        [SLOW],
    ),
    Bug(
        "uploaded_on_wrong_stream",
        "the event behind the copy to the device is recorded on the stream that computes",
        "staging.cpp",
        [("    slot.uploaded.record(*up_);\n", "    slot.uploaded.record(*compute_);\n")],
        [SLOW],
    ),
    Bug(
        "back_does_not_wait",
        "the copy to the host does not wait for the operators",
        "staging.cpp",
        [("    slot.computed.block(*back_);\n", "")],
        [SLOW],
    ),
    Bug(
        "computed_on_wrong_stream",
        "the event behind the operators is recorded on the stream that copies back",
        "staging.cpp",
        [("    slot.computed.record(*compute_);\n", "    slot.computed.record(*back_);\n")],
        [SLOW],
    ),
    Bug(
        "ready_on_wrong_stream",
        "the event behind the copy to the host is recorded on the stream that computes",
        "staging.cpp",
        [("    slot.ready.record(*back_);\n", "    slot.ready.record(*compute_);\n")],
        [SLOW],
    ),
    Bug(
        "outputs_not_waited_for",
        "answers are taken before they have arrived",
        "staging.cpp",
        [("return !staged.slot || wait_until([&] { return is_ready(staged); }, is_enough);", "return true;")],
        [SLOW],
    ),
    Bug(
        "slot_shared",
        "a slot is filled again while its batch is on its way: its copy to the device is not over, operators read the "
        "device buffer, or the copy to the host is not over",
        "staging.cpp",
        [
            ("constexpr size_t slots_max = 3;", "constexpr size_t slots_max = 1;"),
            ("[](const auto& slot) { return !slot->is_taken; }", "[](const auto&) { return true; }"),
            ("if (!slot->is_taken && (found == nullptr || !slot->is_dirty)) found = slot;", "found = slot;"),
            ("    if (slot.is_dirty) settle(slot);\n    const int64_t size", "    const int64_t size"),
        ],
        [REFILLED, SLOW],
    ),
    Bug(
        "answer_in_slot",
        "an answer stays in the slot's memory, which the next batch is copied to",
        "staging.cpp",
        [("return plain_copy(staged.fetched[next++]);", "return staged.fetched[next++];")],
        [KEPT],
    ),
    Bug(
        "pageable_slot",
        "slots are not page-locked",
        "staging.cpp",
        [
            (
                "    is_pinned = false;\n    try {\n",
                "    is_pinned = false;\n    return at::empty({size}, at::kByte);\n    try {\n",
            )
        ],
        [PAGEABLE],
    ),
    Bug(
        "no_compute_scope",
        "the model runs on another stream than the events say",
        "staging.h",
        [("guard_(staging.compute_)", "guard_(std::optional<c10::Stream>())")],
        [SLOW],
        users="Staging::ComputeScope",
    ),
    Bug(
        "one_stream",
        "copies to the device share the stream of the operators",
        "staging.cpp",
        [("guard.getDefaultStream(device) : guard.getStreamFromGlobalPool(device);", "*up_ : *up_;")],
        [OVERLAP],
    ),
    Bug(
        "failed_slot_used_at_once",
        "the slot of a batch that failed is filled while operators of that batch still wait in the queue",
        "staging.cpp",
        [("    if (slot.is_dirty) settle(slot);\n    const int64_t size", "    const int64_t size")],
        [f"{PACE}::test_what_a_failed_batch_left_behind_does_not_reach_the_next"],
    ),
    Bug(
        "kept_input_in_slot",
        "what a model keeps of its input lies in the slot",
        "worker.cpp",
        [("            for (at::Tensor& input : flight.staged.inputs) input = input.clone();\n", "")],
        [f"{PACE}::test_a_model_may_keep_its_input"],
    ),
    Bug(
        "full_batches_only",
        "a second batch is taken only if it is full",
        "worker_flow.cpp",
        [("    return Wish::any;\n", "    return Wish::none;\n")],
        [f"{PACE}::test_one_batch_goes_up_while_another_is_computed_with_no_more_clients_than_a_batch_has"],
    ),
    Bug(
        "taken_at_once",
        "a second batch is taken with the first request that waits",
        "worker_flow.cpp",
        [(" || now < pace_.take_at()", "")],
        [f"{PACE}::test_a_batch_grows_while_the_device_is_busy"],
    ),
    Bug(
        "groups_one_by_one",
        "a group of a take is launched when the one before it is over",
        "worker_flow.cpp",
        [("if (next > 0 && !staging_->has_room()) {", "if (next > 0) {")],
        [SHAPES],
    ),
    Bug(
        "times_overlap",
        "what a batch took on the device begins when it was launched",
        "worker_flow.cpp",
        [
            ("    if (flight.staged.times) {\n", "    if (false) {\n"),
            ("now - std::max(flight.staged_at, before)", "now - flight.staged_at"),
        ],
        [f"{PACE}::test_a_batch_counts_its_own_time_only"],
    ),
    Bug(
        "made_room_too_early",
        "a batch that has to make room for the next group of a take is not waited for",
        "worker.cpp",
        [("                staging_->wait(flight.staged);\n", "")],
        [SHAPES],
    ),
    Bug(
        "graph_input_not_filled",
        "a graph is replayed on the rows of an earlier batch",
        "batch_runner.cpp",
        [("        fill(inputs, found->inputs);\n        return replayed", "        return replayed")],
        [SLOW],
    ),
    Bug(
        "graph_output_not_copied",
        "the next replay overwrites an answer that is not yet copied to the host",
        "batch_runner.cpp",
        [
            (
                "[](const at::Tensor& tensor) { return tensor.clone(); }",
                "[](const at::Tensor& tensor) { return tensor; }",
            )
        ],
        [REPLAYED],
    ),
    Bug(
        "last_row_not_filled",
        "the last row of a batch that is filled up is one of an earlier batch",
        "batch_runner.cpp",
        [
            (
                "        const int64_t rows = batch[i].size(0), size = to[i].size(0);\n",
                "        const int64_t size = to[i].size(0), given = batch[i].size(0), rows = given - (given < size);\n"
                "        if (rows == 0) continue;\n",
            )
        ],
        [FILLED],
    ),
]
